"""What is known of the curvature around one weight, from wherever it was collected.

    inputs  = sum over tokens of x^T x        x the input of the layer
    outputs = sum over tokens of y^T y        y the gradient of the loss at its output

Legend: M out, N in.

Source: K-FAC (arXiv 1503.05671).
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
    """

    inputs: Tensor | None
    outputs: Tensor | None
    tokens: int
    source: str
    left_out: int = 0


Curvature: TypeAlias = Mapping[str, Statistics]
"""Checkpoint name -> statistics, for the weights of which there are any."""
