"""The factor of a curvature, by the Cholesky factorization of torch; the CPU backend has one of its own.

Legend: K the size of the matrix.
"""

from __future__ import annotations

import torch
from torch import Tensor


def unit_upper(matrix_KK: Tensor, order_K: Tensor) -> tuple[Tensor, Tensor]:
    """A and d with ``H[order][:, order] = A diag(d) A^T``, A unit upper triangular, for any device.

    The Cholesky factor L of H flipped in both directions, flipped back, is upper triangular.

    Returns:
        float32 A and float64 d; d is NaN where H is not positive definite.
    """
    last_first_K = order_K.flip(0)
    lower_KK, failed = torch.linalg.cholesky_ex(matrix_KK.double()[last_first_K][:, last_first_K])
    upper_KK = lower_KK.flip(0, 1)
    root_K = upper_KK.diagonal().where(failed == 0, torch.nan)
    return (upper_KK / root_K).float(), root_K.square()
