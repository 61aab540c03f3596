"""The figures of one row: the update in the weights, and the model on text."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext

from torch import Tensor
from torch.nn.functional import cross_entropy

from benchmarks.retention.settings import Setting
from benchmarks.retention.subjects import Subject
from daq_lightning.checkpoint.schemes import SCHEMES
from daq_lightning.model.activations import quantized_activations
from daq_lightning.numerics.divergence import (
    compare_logits,
    kl_divergence_to_reference,
    perplexity_ratio,
    top_token_agreement,
)
from daq_lightning.numerics.objectives import DeltaStats
from daq_lightning.numerics.retention import compare_update, update_retention
from daq_lightning.report.figures import figures as weight_figures


def figures_of_weights(stats: DeltaStats) -> dict[str, float]:
    """sign_rate, cosine, gain and others of the update, and its length before and after."""
    return weight_figures(stats) | {"delta_q_norm": float(stats.delta_q_sq.sqrt())}


def figures_of_model(subject: Subject, weights: Mapping[str, Tensor], setting: Setting) -> dict[str, float]:
    """Loss, KL and retention, on each text, as `style_...` and `other_...`."""
    known = {(of, text): subject.known_logits(of, text) for of in ("post", "base") for text in subject.texts}
    subject.put(weights)
    layers = [subject.network.get_submodule(name.removesuffix(".weight")) for name in subject.quantized]
    found: dict[str, float] = {}
    for text in subject.texts:
        scheme = SCHEMES[setting.scheme]
        with quantized_activations(layers, scheme) if setting.activations else nullcontext():
            logits = subject.logits(text)
        post, base, target = known["post", text], known["base", text], subject.targets(text)
        sums = compare_logits(logits, post, target)
        perplexities = perplexity_ratio(sums)
        losses = [float(cross_entropy(each.double(), target)) for each in (logits, base, post)]
        values = {
            "loss": losses[0],
            "gap_kept": (losses[1] - losses[0]) / (losses[1] - losses[2]),
            "perplexity_ratio": float(perplexities.perplexity_ratio),
        }
        for figures in (
            kl_divergence_to_reference(sums),
            top_token_agreement(sums),
            update_retention(compare_update(logits, post, base, target)),
        ):
            values |= {name: float(value) for name, value in figures._asdict().items()}
        found |= {f"{text}_{name}": value for name, value in values.items()}
    return found
