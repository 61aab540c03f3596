"""The objective over alpha: the landscape in which a search looked for its scales.

All groups of a sample share one alpha here, so that there is one curve; the search itself gives each group
its own (unless `alpha_scope` is "layer"), which does at least as well.

Legend: S groups of a sample, E elements of a group, K candidates.
"""

from __future__ import annotations

import torch
from torch import Tensor

from daq_lightning.numerics.backends import delta_stats
from daq_lightning.numerics.formats import Format, PerChannel, ScaleFormat
from daq_lightning.numerics.objectives import score
from daq_lightning.numerics.scales import round_scale, zero_of
from daq_lightning.numerics.search.grid import coarse, fine
from daq_lightning.numerics.search.settings import ScaleSearch
from daq_lightning.numerics.tiling import extremes

MOST_POINTS = 64


def tried(search: ScaleSearch) -> Tensor:
    """What a search can try, float64 on the CPU, ascending, shape (K,): alpha = 1, the coarse candidates and
    the fine ones around each of them; of many, 64 evenly spaced ones.

    Example:
        >>> tried(ScaleSearch(alpha_min=0.5, alpha_max=2.0, n_coarse=3, n_fine=0))
        tensor([0.5000, 1.0000, 1.2500, 2.0000], dtype=torch.float64)
    """
    coarse_K = coarse(search)
    parts = [coarse_K, fine(search, coarse_K).flatten()] if search.n_fine else [coarse_K]
    one_K = torch.ones(1, dtype=torch.float64, device="cpu")
    alpha_K = torch.cat([*parts, one_K]).unique()
    if len(alpha_K) > MOST_POINTS:
        kept = torch.linspace(0, len(alpha_K) - 1, MOST_POINTS, dtype=torch.float64, device="cpu").long()
        alpha_K = torch.cat([alpha_K[kept], one_K]).unique()
    return alpha_K


def objective_curve(
    weight_SE: Tensor,
    base_SE: Tensor,
    plain_S1: Tensor,
    search: ScaleSearch,
    *,
    scale_format: ScaleFormat,
    fmt: Format,
    global_scale: Tensor | None = None,
) -> Tensor:
    """The score of a sample under each alpha of `tried`, float64, shape (K,).

    Args:
        weight_SE: Fine-tuned weights, float32, bfloat16 or float16.
        base_SE: Before fine-tuning.
        plain_S1: The plain scales, float32.
        search: The objective and the candidates.
        scale_format: What scales are rounded to before they are scored.
        fmt: The format of the codes.
        global_scale: Of scales in E4M3.
    """
    alpha_K = tried(search).to(plain_S1.device)
    scale_SK = round_scale((plain_S1.double() * alpha_K).float(), scale_format, global_scale)
    zero_SK = None
    if fmt.zero_point:
        smallest_S1, largest_S1 = extremes(weight_SE, PerChannel())
        zero_SK = zero_of((smallest_S1.double() * alpha_K).float(), largest_S1, scale_SK, fmt)
    stats_SK = delta_stats(weight_SE, base_SE, scale_SK, PerChannel(), fmt, zero_SK)
    return score(stats_SK.total(), search.metric, tau=search.tau)
