"""Does a budget spent by what survives beat other ways to spend the same bytes? The demo's byte LM.

    python -m benchmarks.mixed                              # three seeds; minutes on two cores
    python -m benchmarks.mixed --bits 4.5 6 --seeds 0       # fewer

Every row is a model of the same bytes or fewer: weights of the ladder that W4A16 begins, placed by the export
itself (`within_budget`), or by somebody who does not measure. A mixed model is put together from
the weights of the uniform exports: each weight is quantized by itself, so they are its own, bit for bit. The
figure is the mean KL to the unquantized model over held-out text, in the style that was taught and other.

    curvature    placed by tr(E^T H_out E H_in), statistics of the last 16 batches of training
    update       placed by |E|^2 / |D|^2
    ...          what else was tried where there are no statistics: |E|^2; |E|^2 / n; the share of the update
                 that the hybrid objective misses, times |D|^2
    random       mean of eight; first, last: whole layers from one end
    int4 gN      all weights in int4 with a scale for N: 5 and 6 bits; W4A16_G32 and NVFP4A16: 4.5 bits

`--alone` prints instead how well each of these ranks the groups of weights by what they cost: Spearman's
correlation with the KL of one group alone in W4A16, both per byte.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import logging
import random
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.retention.subjects import BaseKind, Subject
from benchmarks.retention.toy import make_toy
from daq_lightning import ScaleSearch, export_checkpoint, load_checkpoint
from daq_lightning.checkpoint.reader import Checkpoint
from daq_lightning.checkpoint.schemes import FULL, LADDERS
from daq_lightning.export.collected import AllCollected, Collected
from daq_lightning.export.job import prepare
from daq_lightning.export.mixed import within_budget
from daq_lightning.export.settings import ExportSettings
from daq_lightning.export.source import Source
from daq_lightning.model.fusion import shared_input
from daq_lightning.model.observer import Layer, Observer, Sums
from daq_lightning.numerics.divergence import compare_logits, kl_divergence_to_reference
from daq_lightning.numerics.formats import PerBlock
from daq_lightning.numerics.formats.int4 import INT4
from daq_lightning.numerics.knapsack import choose_options
from daq_lightning.numerics.objectives import DeltaStats, cosine, sign_rate
from daq_lightning.numerics.quantize import dequantize
from daq_lightning.numerics.rounding.statistics import Curvature
from daq_lightning.numerics.search.search import search_scale
from daq_lightning.report.placement import Placement

LADDER = LADDERS["W4A16"]
RANDOM = 8
GROUPS = {16: 5.0, 8: 6.0}
"""Sizes of groups of int4 -> bits a weight."""


class Study:
    """One fine-tuned model, and the models of its uniform exports."""

    def __init__(self, folder: Path, base: BaseKind, seed: int, quick: bool) -> None:
        self.subject: Subject = make_toy(folder, base, seed, quick)
        self.post = folder / f"toy-{base}-{seed}"
        self.base = folder / ("toy-base-fp8" if base == "fp8" else "toy-base")
        self.curvature = collected(self.subject)
        self.sums: dict[str, dict[str, DeltaStats]] = {}
        self.weights: dict[str, Mapping[str, Tensor]] = {"16": self.subject.post}
        with tempfile.TemporaryDirectory() as out:
            for scheme in (*(rung for rung in LADDER if rung != FULL), "NVFP4A16"):
                report = export_checkpoint(self.post, self.base, f"{out}/{scheme}", scheme=scheme)
                self.sums[scheme] = {tensor.name: tensor.searched for tensor in report.tensors}
                self.weights[scheme] = dict(load_checkpoint(report.path).items())
        for size in GROUPS:  # those of 32 are W4A16_G32
            self.weights[f"int4 g{size}"] = in_groups(self.subject, PerBlock(1, size))

    def kl(self, weights: Mapping[str, Tensor]) -> float:
        """Mean over both texts, nats a token."""
        known = {text: self.subject.known_logits("post", text) for text in self.subject.texts}
        self.subject.put({name: weights[name] for name in self.subject.quantized})
        sums = [compare_logits(self.subject.logits(text), known[text]) for text in known]
        return sum(float(kl_divergence_to_reference(one).kld_mean) for one in sums) / len(sums)

    def placed(self, bits: float, *, curvature: bool) -> Placement:
        """As an export places its weights."""
        settings = ExportSettings(scheme="W4A16", budget=f"{bits} bits", rounding="nearest", ladder=LADDER)
        known = self.curvature if curvature else None
        job = prepare(Source.of(self.post), Checkpoint(self.base), settings, curvature=known)
        placement = within_budget(job, stack=contextlib.ExitStack()).placement
        assert placement is not None
        return placement

    def mixed(self, placement: Placement) -> float:
        """KL of the model of a placement."""
        rungs = {name: group.rung for group in placement.groups for name in group.names}
        return self.kl({name: self.weights[rung][name] for name, rung in rungs.items()})


def collected(subject: Subject) -> Curvature:
    """What a run would collect of the last batches of training."""
    subject.put(subject.post)
    network, sums = subject.network, Sums()
    layers = [
        Layer(
            name=name,
            group=shared_input(name),
            shape=tuple(subject.post[name].shape),
            modules=(network.get_submodule(name.removesuffix(".weight")),),
        )
        for name in subject.quantized
    ]
    for batch in subject.training:
        with Observer(layers, sums):
            logits = network(**batch.inputs).logits.flatten(0, 1)
            torch.nn.functional.cross_entropy(logits, batch.targets.flatten(), reduction="sum").backward()
        network.zero_grad()
    return AllCollected([Collected.of(sums)], "run")


def in_groups(subject: Subject, groups: PerBlock) -> dict[str, Tensor]:
    """All weights in int4 with a bfloat16 scale for so many of a row."""
    weights = {}
    for name in subject.quantized:
        post, base = subject.post[name], subject.base[name]
        found = search_scale(post, base, groups, ScaleSearch(), scale_format="bfloat16", fmt=INT4)
        weights[name] = dequantize(found.codes, found.scale, groups)
    return weights


def by_loss(study: Study, placement: Placement, loss: Callable[[DeltaStats], float]) -> Placement:
    """The same budget, spent by another loss of a weight's sums; 16 bit loses nothing."""
    sums = study.sums

    def of(names: Sequence[str], rung: str) -> float:
        return 0.0 if rung == "16" else sum(loss(sums[rung][name]) for name in names)

    losses = [[of(group.names, rung) for rung in group.sizes] for group in placement.groups]
    sizes = [list(group.sizes.values()) for group in placement.groups]
    chosen = choose_options(sizes, losses, placement.capacity)
    return _with(placement, [list(g.sizes)[at] for g, at in zip(placement.groups, chosen, strict=True)])


def in_order(placement: Placement, order: Sequence[int]) -> Placement:
    """Groups go up to FP8A16 in some order, each that still fits."""
    rungs = ["W4A16"] * len(placement.groups)
    left = placement.capacity - sum(group.sizes["W4A16"] for group in placement.groups)
    for index in order:
        sizes = placement.groups[index].sizes
        if sizes["FP8A16"] - sizes["W4A16"] <= left:
            left -= sizes["FP8A16"] - sizes["W4A16"]
            rungs[index] = "FP8A16"
    return _with(placement, rungs)


def _with(placement: Placement, rungs: Sequence[str]) -> Placement:
    groups = zip(placement.groups, rungs, strict=True)
    return dataclasses.replace(
        placement, groups=tuple(dataclasses.replace(group, rung=rung) for group, rung in groups)
    )


def hybrid_missed(stats: DeltaStats) -> float:
    """What the hybrid objective misses of the update, times its size."""
    kept = 0.5 * float(sign_rate(stats)) + 0.5 * float(cosine(stats))
    return (1 - kept) * float(stats.delta_sq)


CANDIDATES: Mapping[str, Callable[[DeltaStats], float]] = {
    "|E|^2": lambda stats: float(stats.error_sq),
    "missed |D|^2": hybrid_missed,
    "|E|^2 / n": lambda stats: float(stats.error_sq) / float(stats.n),
}


def rows_of(study: Study, bits: float) -> dict[str, float]:
    """Way of spending the budget -> KL."""
    update = study.placed(bits, curvature=False)
    curvature = study.placed(bits, curvature=True)
    found = {"curvature": study.mixed(curvature), "update": study.mixed(update)}
    found |= {name: study.mixed(by_loss(study, update, loss)) for name, loss in CANDIDATES.items()}
    count = len(update.groups)
    draws = [random.Random(seed).sample(range(count), count) for seed in range(RANDOM)]
    found["random"] = sum(study.mixed(in_order(update, order)) for order in draws) / RANDOM
    found["first"] = study.mixed(in_order(update, range(count)))
    found["last"] = study.mixed(in_order(update, range(count)[::-1]))
    return found


def ranks_of(study: Study) -> dict[str, float]:
    """Loss -> Spearman's correlation with the KL of each group alone in W4A16, per byte."""
    update, curvature = (study.placed(5.0, curvature=known) for known in (False, True))
    sums, more, costs = study.sums["W4A16"], [], []
    losses: dict[str, list[float]] = {}
    for group, other in zip(update.groups, curvature.groups, strict=True):
        alone = {name: study.weights["W4A16"][name] for name in group.names}
        costs.append(study.kl({**study.subject.post, **alone}))
        more.append(group.sizes["FP8A16"] - group.sizes["W4A16"])
        found = {"curvature": other.losses["W4A16"], "update": group.losses["W4A16"]}
        found |= {name: sum(loss(sums[one]) for one in group.names) for name, loss in CANDIDATES.items()}
        for name, loss in found.items():
            losses.setdefault(name, []).append(loss)

    def order(values: Sequence[float]) -> Tensor:
        return (torch.tensor(values) / torch.tensor(more)).argsort().argsort().double()

    return {
        name: float(torch.corrcoef(torch.stack([order(values), order(costs)]))[0, 1])
        for name, values in losses.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("outputs/mixed"), help="where models are trained")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--base", default="bf16", choices=["bf16", "fp8", "lora"])
    parser.add_argument("--bits", type=float, nargs="+", default=[4.5, 5.0, 6.0])
    parser.add_argument("--quick", action="store_true", help="hardly trained models, to see that it runs")
    parser.add_argument("--alone", action="store_true", help="rank groups of weights instead")
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    args = parser.parse_args()
    for name in ("lightning.pytorch", "transformers"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    args.out.mkdir(parents=True, exist_ok=True)
    table: dict[str, list[float]] = {}
    for seed in args.seeds:
        study = Study(args.out, args.base, seed, args.quick)
        if args.alone:
            for name, value in ranks_of(study).items():
                table.setdefault(f"{name:18}", []).append(value)
            continue
        for uniform, weights in study.weights.items():
            table.setdefault(f"{uniform:14}", []).append(study.kl(weights))
        for bits in args.bits:
            for name, kl in rows_of(study, bits).items():
                table.setdefault(f"{name:14}{bits:g}", []).append(kl)
        print(f"seed {seed} done", flush=True)
    what = "Spearman's correlation, per byte" if args.alone else "KL to the unquantized model, nats a token"
    print(f"\n{what}; base {args.base}, seeds {args.seeds}")
    print(
        f"{'placed by':14}{'bits':>4}"
        + "".join(f"{f'seed {seed}':>12}" for seed in args.seeds)
        + f"{'mean':>12}"
    )
    for name, values in table.items():
        listed: list[Any] = [*values, sum(values) / len(values)]
        print(f"{name:18}" + "".join(f"{value:12.3e}" for value in listed))
    if args.json:
        args.json.write_text(json.dumps({"seeds": args.seeds, "base": args.base, "kl": table}))


if __name__ == "__main__":
    main()
