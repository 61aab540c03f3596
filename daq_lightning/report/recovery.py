"""How much of an adapter the quantized model has: the headline of a merge into a quantized base.

    recovery = (loss(base) - loss(export)) / (loss(base) - loss(post))        on a text
    gain     = <delta_q, delta> / <delta, delta>                              of the weights alone

where post is the base with the adapter beside it, unmerged, in 16 bit. 1 is all of it, 0 is the base again.
The gain is known without a text and says whether the update is there; recovery says what that is worth.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from daq_lightning.numerics.objectives import DeltaStats, gain

if TYPE_CHECKING:
    from daq_lightning.report.figures import TensorReport


def recovery(*, base: float, export: float, post: float) -> float:
    """The share of what training gained that the export has; NaN where training gained nothing.

    Args:
        base: Mean loss of the true tokens, in nats, before training.
        export: Of the quantized model.
        post: After training.

    Example:
        >>> recovery(base=2.5, export=2.25, post=2.0)
        0.5
    """
    gained = base - post
    return (base - export) / gained if gained != 0 else math.nan


def sum_of_losses(logits: Tensor | None, target: Tensor) -> float:
    """The loss of the true tokens, summed, in nats; 0 without logits.

    Args:
        logits: (T, V), of any floating dtype, taken in float64.
        target: (T,).
    """
    if logits is None:
        return 0.0
    return float(cross_entropy(logits.double(), target.to(logits.device), reduction="sum"))


def figures_of_recovery(figures: Mapping[str, float], base_loss: float | None) -> dict[str, float]:
    """`base_perplexity` and `recovery`; none without a base.

    Args:
        figures: With `perplexity` of the export and `reference_perplexity`, that of post.
        base_loss: Mean loss of the base.

    Example:
        >>> figures_of_recovery({"perplexity": 1.0, "reference_perplexity": 1.0}, 0.0)
        {'base_perplexity': 1.0, 'recovery': nan}
    """
    if base_loss is None:
        return {}
    export, post = math.log(figures["perplexity"]), math.log(figures["reference_perplexity"])
    return {
        "base_perplexity": math.exp(base_loss),
        "recovery": recovery(base=base_loss, export=export, post=post),
    }


def note_on_merge(tensors: Sequence[TensorReport], scheme: str) -> str:
    """What was kept of the update in the format of the base, and what a plain merge would keep; "" where
    no weight tells.

    Args:
        tensors: Those of the report.
        scheme: Of the base.
    """
    told = [tensor for tensor in tensors if tensor.plain is not None and not tensor.without_base]
    if not told:
        return ""
    kept = _gain([tensor.searched for tensor in told])
    plain = _gain([tensor.plain for tensor in told if tensor.plain is not None])
    if math.isnan(kept):
        return f"format and scales are those of the base ({scheme}), and so are all codes: no weight changed."
    return (
        f"format and scales are those of the base ({scheme}): the gain of the update is {kept:.3f}, a plain "
        f"merge (nearest codes at these scales) would have {plain:.3f}."
    )


def _gain(stats: Sequence[DeltaStats]) -> float:
    return float(gain(DeltaStats(*(torch.stack(fields).sum(0) for fields in zip(*stats, strict=True)))))
