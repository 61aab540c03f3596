"""What is known of the curvature around one weight, from wherever it was collected.

    inputs  = sum over tokens of x^T x        x the input of the layer
    outputs = sum over tokens of y^T y        y the gradient of the loss at its output
    joint   = sum over tokens of |x|^2 |y|^2

The curvature of a weight is the sum over tokens of (x^T x) (x) (y^T y), which the two sums stand for as if x
and y had nothing to do with each other: inputs (x) outputs / tokens. Where large inputs have small gradients,
or large ones, `joint` says by how much that is off, on the whole: `dependence` is 1 where it is right.

Legend: M out, N in.

Source: K-FAC (arXiv 1503.05671); the correction of its trace is ours.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeAlias

from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Statistics:
    """The sums of one weight.

    Attributes:
        inputs: float32, shape (N, N); None where no input was seen. Weights that share their inputs share
            this tensor too, which is how they are known to.
        outputs: float32, shape (M, M); None where no gradient came.
        tokens: How many tokens were summed.
        source: Where they come from, in a word or two.
        left_out: How many calls of the layer were left out because of NaN or Inf.
        joint: See the module; None where it was not summed.
    """

    inputs: Tensor | None
    outputs: Tensor | None
    tokens: int
    source: str
    left_out: int = 0
    joint: float | None = None

    @property
    def dependence(self) -> float:
        """The mean of |x|^2 |y|^2 over the product of the means of |x|^2 and |y|^2; 1 where it is not known.

        Example:
            >>> import torch
            >>> x, y = torch.tensor([[1.0], [3.0]]), torch.tensor([[2.0], [0.0]])
            >>> one = Statistics(inputs=x.T @ x, outputs=y.T @ y, tokens=2, source="", joint=4.0)
            >>> round(one.dependence, 6)
            0.2
        """
        if self.joint is None or self.inputs is None or self.outputs is None:
            return 1.0
        apart = float(self.inputs.double().trace()) * float(self.outputs.double().trace())
        return self.tokens * self.joint / apart if apart else 1.0


Curvature: TypeAlias = Mapping[str, Statistics]
"""Checkpoint name -> statistics, for the weights of which there are any."""
