"""The curvature of a Linear layer, summed batch after batch: A = sum x^T x, G = sum y^T y.

    used     tokens whose gradient y is not zero: padding and masked tokens say nothing
    A        over the tokens that any of the layers with this input used

Sums are float32 on the device of the layer, and nothing waits for it: tokens are left out by zeros in their
place. A call with NaN or Inf in it adds nothing and is counted.

Legend: M out, N in, of a layer; T tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor


class KroneckerSum:
    """One side: the sum of v^T v over tokens.

    Attributes:
        total: float32, shape (K, K), for vectors of size K.
        tokens: How many tokens were added: int64, shape ().
        left_out: How many calls were not, because of NaN or Inf: int64, shape ().

    Example:
        >>> one = KroneckerSum(2, torch.device("cpu"))
        >>> one.add(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([True, False]))
        >>> one.total.tolist(), int(one.tokens)
        ([[1.0, 2.0], [2.0, 4.0]], 1)
    """

    def __init__(self, size: int, device: torch.device) -> None:
        self.total = torch.zeros(size, size, dtype=torch.float32, device=device)
        self.tokens = torch.zeros((), dtype=torch.int64, device=device)
        self.left_out = torch.zeros((), dtype=torch.int64, device=device)

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
        with torch.autocast(values_TK.device.type, enabled=False):
            values_TK = values_TK.float() if factor == 1 else values_TK.float() * factor
            finite = values_TK.isfinite().all()
            values_TK = torch.where((used_T & finite)[:, None], values_TK, 0.0)
            self.total.addmm_(values_TK.T, values_TK)
        self.left_out += finite.logical_not()
        return finite


@torch.no_grad()
def used_tokens(gradient_TM: Tensor) -> Tensor:
    """The tokens with a gradient, none of them if any value is NaN or Inf: bool, shape (T,)."""
    return (gradient_TM != 0).any(1) & gradient_TM.isfinite().all()
