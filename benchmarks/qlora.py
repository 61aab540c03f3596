"""Does an adapter survive the merge into its quantized base? A byte LM, in the format and scales of its base.

    python -m benchmarks.qlora --out outputs/qlora            three formats, three seeds: a quarter of an hour
    python -m benchmarks.qlora --out /tmp/qlora --quick       to see that it runs

A base of 2 M weights is quantized at plain scales; LoRA of rank 8 is trained on top of the dequantized base,
In Title Case. Rows, all judged on unseen text:

    unmerged adapter       base and adapter side by side, in float32: what training made
    plain merge            scheme "keep", nearest codes at the base's own scales
    searched scales        the scheme by name: new scales, searched, and nearest codes
    along the update       scheme "keep" without data: codes along the update
    along inputs           scheme "keep" with the inputs of the last training batches, outputs from the update
    along activations      scheme "keep" as in a Trainer: inputs and gradients of the last training batches

recovery = (loss of the base - loss) / (loss of the base - loss of the unmerged adapter); KL is that of the
unmerged adapter to the row, in nats a byte.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, get_args

import peft
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div

from benchmarks.retention.curvature import gather
from benchmarks.retention.subjects import Batch
from benchmarks.retention.toy import make_base
from daq_lightning import ExportReport, ScaleSearch, export_checkpoint, load_checkpoint
from daq_lightning.checkpoint.schemes import SchemeName
from daq_lightning.export.job import prepare
from daq_lightning.export.run import run
from daq_lightning.export.settings import ExportSettings
from daq_lightning.export.source import Source
from daq_lightning.numerics.rounding.statistics import Curvature, Statistics
from daq_lightning.report.recovery import recovery
from recipes.finetune_and_export import BATCH, in_title_case, new_model, standard_library_text, train, windows

SCHEMES = ("W4A16", "NVFP4A16", "FP8_BLOCK")
LAST_STEPS = 16  # whose batches give statistics
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


class Size(NamedTuple):
    """How much of everything."""

    base_steps: int
    steps: int
    windows: int


class Row(NamedTuple):
    """One way to merge."""

    scheme: str
    seed: int
    name: str
    loss: float
    recovery: float
    kl: float
    gain: float


class Judge:
    """Logits on unseen text of whatever weights there are."""

    def __init__(self, text: str, count: int) -> None:
        self._tokens = windows(in_title_case(text), count, seed=1)
        self._targets = self._tokens[:, 1:].flatten()
        self.network = new_model().eval()

    def put(self, weights: Mapping[str, Tensor]) -> None:
        """Puts weights into the network."""
        self.network.load_state_dict({name: weights[name].float() for name in weights})

    @torch.no_grad()
    def log_probs(self, weights: Mapping[str, Tensor]) -> Tensor:
        """(T, V)."""
        self.put(weights)
        logits = [self.network(input_ids=part[:, :-1]).logits for part in self._tokens.split(16)]
        return torch.cat(logits).flatten(0, 1).double().log_softmax(-1)

    def loss(self, log_probs: Tensor) -> float:
        """In nats a byte."""
        return float(cross_entropy(log_probs, self._targets))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="models and exports; what is there is kept")
    parser.add_argument("--schemes", nargs="+", default=list(SCHEMES), choices=get_args(SchemeName))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--learning-rate", type=float, default=2e-4, help="of the adapters")
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    size = Size(16, 8, 4) if options.quick else Size(450, 75, 48)
    passages = standard_library_text()
    seen, unseen = "".join(passages[400:]), "".join(passages[:400])
    plain = make_base(options.out, "bf16", windows(seen, size.base_steps * BATCH, 0))
    judge, rows = Judge(unseen, size.windows), list[Row]()
    for scheme in options.schemes:
        base = options.out / scheme
        if not base.exists():
            export_checkpoint(plain, plain, base, scheme=scheme, search=ScaleSearch.absmax())
        for seed in options.seeds:
            data = windows(in_title_case(seen), size.steps * BATCH, seed + 1)
            adapter = options.out / f"{scheme}-adapter-{seed}-{options.learning_rate:g}"
            if not adapter.exists():
                train_adapter(base, adapter, seed, data, options.learning_rate)
            rows += rows_of(base, adapter, scheme, seed, data, judge)
            print(table([row for row in rows if (row.scheme, row.seed) == (scheme, seed)]), flush=True)
    print(f"\n{table(rows)}")
    (options.out / "rows.json").write_text(json.dumps([row._asdict() for row in rows], indent=1))


def rows_of(base: Path, adapter: Path, scheme: Any, seed: int, data: Tensor, judge: Judge) -> list[Row]:
    """The rows of one adapter."""
    source, before = Source.from_folder(base, adapter), load_checkpoint(base)
    post = judge.log_probs(dict(source.weights))
    losses = {"base": judge.loss(judge.log_probs(before)), "post": judge.loss(post)}
    curvature = collected(judge, source.weights, before, data)
    inputs_only = {name: dataclasses.replace(one, outputs=None) for name, one in curvature.items()}
    rows = [Row(scheme, seed, "base", losses["base"], 0.0, _kl(post, judge.log_probs(before)), 0.0)]
    rows.append(Row(scheme, seed, "unmerged adapter", losses["post"], 1.0, 0.0, 1.0))
    out = base.parent / "merged"

    def kept(curvature: Curvature | None) -> ExportReport:
        job = prepare(source, before, ExportSettings(scheme="keep"), curvature=curvature)
        return run(job, out)

    def by_export(**settings: Any) -> ExportReport:
        return export_checkpoint(base, base, out, adapter=adapter, rounding="nearest", **settings)

    ways = {
        "plain merge": lambda: by_export(scheme="keep"),
        "searched scales": lambda: by_export(scheme=scheme),
        "along the update": lambda: kept(None),
        "along inputs": lambda: kept(inputs_only),
        "along activations": lambda: kept(curvature),
    }
    for name, merge in ways.items():
        gain = merge().metrics()["gain"]
        found = judge.log_probs(load_checkpoint(out))
        loss = judge.loss(found)
        recovered = recovery(base=losses["base"], export=loss, post=losses["post"])
        rows.append(Row(scheme, seed, name, loss, recovered, _kl(post, found), gain))
    return rows


def train_adapter(base: Path, folder: Path, seed: int, data: Tensor, learning_rate: float) -> None:
    """LoRA of rank 8 on every projection of the dequantized base."""
    began = time.monotonic()
    torch.manual_seed(seed + 1)
    model: Any = new_model()
    model.load_state_dict({name: tensor.float() for name, tensor in load_checkpoint(base).items()})
    adapted: Any = peft.get_peft_model(model, peft.LoraConfig(r=8, lora_alpha=16, target_modules=TARGETS))
    train(adapted, data, learning_rate, [])
    adapted.save_pretrained(folder)
    print(f"{folder.name}: trained in {time.monotonic() - began:.0f} s", flush=True)


def collected(judge: Judge, weights: Mapping[str, Tensor], base: Any, data: Tensor) -> dict[str, Statistics]:
    """What the last steps of a Trainer would have collected."""
    judge.put(weights)
    for parameter in judge.network.parameters():
        parameter.requires_grad_(True)
    names = tuple(name for name in base if base.stored(name) is not None)
    batches = [Batch({"input_ids": part[:, :-1]}, part[:, 1:]) for part in data.split(BATCH)[-LAST_STEPS:]]
    found = gather(judge.network, names, batches).activations
    tokens = sum(batch.targets.numel() for batch in batches)
    return {
        name: Statistics(inputs=side.inputs, outputs=side.outputs, tokens=tokens, source="activations")
        for name, side in found.items()
    }


def table(rows: list[Row]) -> str:
    """Means over seeds; of recovery also the smallest."""
    lines = [
        "| base | merge | loss | recovery (least) | KL | gain |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for scheme, name in dict.fromkeys((row.scheme, row.name) for row in rows):
        these = [row for row in rows if (row.scheme, row.name) == (scheme, name)]
        loss, recovered, kl, gain = (
            statistics.mean(getattr(row, field) for row in these)
            for field in ("loss", "recovery", "kl", "gain")
        )
        least = min(row.recovery for row in these)
        figures = f"{loss:.4f} | {recovered:.3f} ({least:.3f}) | {kl:.1e} | {gain:.3f} |"
        lines.append(f"| {scheme} | {name} | {figures}")
    return "\n".join(lines)


def _kl(reference: Tensor, other: Tensor) -> float:
    return float(kl_div(other, reference, log_target=True, reduction="batchmean"))


if __name__ == "__main__":
    main()
