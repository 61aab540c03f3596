"""The curvature of a Linear layer, summed batch after batch: A = sum x^T x, G = sum y^T y.

    used     tokens whose gradient y is not zero: padding and masked tokens say nothing
    A        over the tokens that any of the layers with this input used

Sums are float32 on the device of the layer. Both are symmetric: of the blocks of 128 x 128 those on and above
the diagonal are summed, and mirrored when the sum is read. A GPU is not waited for: tokens are left out there
by zeros in their place. A call with NaN or Inf in it adds nothing and is counted.

Legend: M out, N in, of a layer; T tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

_BLOCK = 128


class KroneckerSum:
    """One side: the sum of v^T v over tokens.

    Attributes:
        tokens: How many tokens were added: int64, shape ().
        left_out: How many calls were not, because of NaN or Inf: int64, shape ().

    Example:
        >>> one = KroneckerSum(2, torch.device("cpu"))
        >>> one.add(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([True, False]))
        >>> one.total.tolist(), int(one.tokens)
        ([[1.0, 2.0], [2.0, 4.0]], 1)
    """

    def __init__(self, size: int, device: torch.device) -> None:
        self._upper = torch.zeros(size, size, dtype=torch.float32, device=device)
        self.tokens = torch.zeros((), dtype=torch.int64, device=device)
        self.left_out = torch.zeros((), dtype=torch.int64, device=device)

    @property
    @torch.no_grad()
    def total(self) -> Tensor:
        """The sum until now: float32, shape (K, K), for vectors of size K; later calls change it."""
        for start in range(0, len(self._upper), _BLOCK):
            end = start + _BLOCK
            self._upper[end:, start:end] = self._upper[start:end, end:].T
        return self._upper

    @torch.no_grad()
    def add(self, values_TK: Tensor, used_T: Tensor, factor: float = 1.0) -> None:
        """Adds the tokens that are used.

        Args:
            values_TK: Any floating dtype.
            used_T: bool.
            factor: Multiplies the values; 1 over the scale of a scaled loss.
        """
        self.tokens += used_T.sum() * self._add(values_TK, used_T, factor)

    @torch.no_grad()
    def add_step(self, gradient_TK: Tensor) -> None:
        """Adds all rows of the gradient of one optimizer step, which counts as one token."""
        used_T = torch.ones(len(gradient_TK), dtype=torch.bool, device=gradient_TK.device)
        self.tokens += self._add(gradient_TK, used_T, 1.0)

    def _add(self, values_TK: Tensor, used_T: Tensor, factor: float) -> Tensor:
        """Whether all values were finite, and hence added."""
        finite = _largest(values_TK).isfinite().all()
        self.left_out += finite.logical_not()
        if values_TK.device.type != "cpu":
            values_TK = torch.where((used_T & finite)[:, None], values_TK, 0.0)
        elif not finite:
            return finite
        elif not used_T.all():
            values_TK = values_TK[used_T]
        with torch.autocast(values_TK.device.type, enabled=False):
            values_TK = values_TK.float()
            for start in range(0, values_TK.shape[1], _BLOCK):
                rows = slice(start, start + _BLOCK)
                self._upper[rows, start:].addmm_(values_TK[:, rows].T, values_TK[:, start:], alpha=factor**2)
        return finite


@torch.no_grad()
def used_tokens(gradient_TM: Tensor) -> Tensor:
    """The tokens with a gradient, none of them if any value is NaN or Inf: bool, shape (T,)."""
    largest_T = _largest(gradient_TM)
    return (largest_T != 0) & largest_T.isfinite().all()


def _largest(values_TK: Tensor) -> Tensor:
    """The largest size of a value of each token, NaN if one is: one pass, that makes no mask."""
    return values_TK.abs().amax(1) if values_TK.shape[1] else values_TK.new_zeros(len(values_TK))
