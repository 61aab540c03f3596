"""The candidates of a search: the values of alpha that are tried in each of its stages.

    coarse, linear   evenly over [alpha_min, alpha_max], both ends included
    coarse, log      alpha_min * (alpha_max / alpha_min)^(i / n): for the range [1, 2) the dense grid
    fine             evenly within `radius` of the best so far, cut off at the ends of the range

Scales of few bits have a grid of their own, which these candidates would hit twice or miss. Where each group
has its own alpha, a search over powers of two ("ue8m0") or E4M3 ("e4m3") is one stage over the neighbours of
the plain scale that can be stored: those with alpha in [alpha_min, alpha_max], both ends included, nearest
first and of two as near the larger, at most as many as the stages above have candidates together. In [0.5, 2]
that is 2 neighbours of a power of two and 16 of a normal value of E4M3, of which 15 candidates leave out the
half.

Legend: G groups, K candidates.

Source: arXiv 2603.22324, Algorithm 1.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from daq_lightning.numerics.formats import ScaleFormat
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


STEPS_AN_OCTAVE = {"ue8m0": 1, "e4m3": 8}
"""Of the scale formats with a grid of their own: how many values lie between a scale and its double."""
_LARGEST_CODE = 126  # of E4M3, 448; 127 is NaN and 0 no scale


def neighbour_steps(search: ScaleSearch, scale_format: ScaleFormat) -> Tensor:
    """How many values of the scale format the candidates are from the plain scale: int64 on the CPU, (K,).

    Example:
        >>> neighbour_steps(ScaleSearch(alpha_min=0.5, alpha_max=4.0), "ue8m0")
        tensor([ 1, -1,  2])
    """
    octave = STEPS_AN_OCTAVE[scale_format]
    up = max(0, math.ceil(octave * math.log2(search.alpha_max)))
    down = max(0, math.ceil(-octave * math.log2(search.alpha_min)))
    steps = sorted((step for step in range(-down, up + 1) if step), key=lambda step: (abs(step), -step))
    steps = steps[: search.n_coarse + search.n_fine] or [0]
    return torch.tensor(steps, dtype=torch.int64, device="cpu")


def neighbours(
    plain_G: Tensor, search: ScaleSearch, scale_format: ScaleFormat, global_scale: Tensor | None = None
) -> Tensor:
    """The candidates of scales with a grid of their own, as multiples of the plain scale.

    Args:
        plain_G: The plain scales, as the format stores them.
        search: The range, and how many candidates.
        scale_format: "ue8m0" or "e4m3".
        global_scale: Of scales in E4M3.

    Returns:
        alpha_GK, float64: exact up to its last bit, so that rounding plain * alpha gives the candidate; 1
        where there is none.
    """
    steps_K = neighbour_steps(search, scale_format).to(plain_G.device)
    if scale_format == "ue8m0":
        alpha_GK = torch.exp2(steps_K.double()).expand(len(plain_G), -1)
        stored_GK = torch.ones_like(alpha_GK, dtype=torch.bool)
    else:
        assert global_scale is not None
        codes = torch.arange(_LARGEST_CODE + 1, dtype=torch.uint8, device=plain_G.device)
        value = codes.view(torch.float8_e4m3fn).double()
        code_G = (plain_G * global_scale).to(torch.float8_e4m3fn).view(torch.uint8).long()
        code_G = code_G.clamp(1, _LARGEST_CODE)  # of a group that is not finite any will do
        code_GK = code_G[:, None] + steps_K
        stored_GK = (code_GK >= 1) & (code_GK <= _LARGEST_CODE)
        alpha_GK = value[code_GK.clamp(1, _LARGEST_CODE)] / value[code_G][:, None]
    inside_GK = (alpha_GK >= search.alpha_min) & (alpha_GK <= search.alpha_max)
    return torch.where(stored_GK & inside_GK, alpha_GK, 1.0)
