"""The candidates of a search: the values of alpha that are tried in each of its stages.

    coarse, linear   evenly over [alpha_min, alpha_max], both ends included
    coarse, log      alpha_min * (alpha_max / alpha_min)^(i / n): for the range [1, 2) the dense grid
    fine             evenly within `radius` of the best so far, cut off at the ends of the range

Legend: G groups, K candidates.

Source: arXiv 2603.22324, Algorithm 1.
"""

from __future__ import annotations

import torch
from torch import Tensor

from daq_lightning.numerics.search.settings import ScaleSearch


def coarse(search: ScaleSearch) -> Tensor:
    """The candidates of the coarse stage: float64 on the CPU, shape (K,)."""
    if search.spacing == "log":
        step_K = torch.arange(search.n_coarse, dtype=torch.float64, device="cpu") / search.n_coarse
        return search.alpha_min * (search.alpha_max / search.alpha_min) ** step_K
    return torch.linspace(
        search.alpha_min, search.alpha_max, search.n_coarse, dtype=torch.float64, device="cpu"
    )


def fine_steps(search: ScaleSearch) -> Tensor:
    """Where in the fine stage's interval its candidates lie, from 0 to 1: float64 on the CPU, shape (K,)."""
    return torch.linspace(0, 1, search.n_fine, dtype=torch.float64, device="cpu")


def fine(search: ScaleSearch, alpha_G: Tensor) -> Tensor:
    """The candidates of the fine stage around the best alpha of each group: shape (G, K)."""
    low_G = (alpha_G - search.radius).clamp(min=search.alpha_min)
    high_G = torch.maximum((alpha_G + search.radius).clamp(max=search.alpha_max), low_G)
    return low_G[:, None] + (high_G - low_G)[:, None] * fine_steps(search).to(alpha_G.device)
