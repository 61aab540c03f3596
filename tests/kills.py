"""SIGKILL at random times: what is there afterwards is whole, and the next run ends as if it had not been.

    python tests/kills.py --kills 500 --seed 0        prints a table; exit code 1 if anything was broken

| work | killed while it | afterwards there is | the next run |
| --- | --- | --- | --- |
| export | writes a folder | that folder whole, or none | writes it, same bytes |
| replace | writes over an earlier export | the old one, the new one, or the old one set aside | same |
| resume | goes on where the last one was killed | that folder whole, or none | ends, same bytes |
| chain | writes the stage after an export | both stages whole, or the first | same, `chain` finds nothing |
| snapshot | copies the weights before training | the copy whole, or none | uses or makes it, same bytes |
| training | exports beside every checkpoint | every step's folder whole, or none | goes on, same bytes |

Everything is imported once; each run is a fork, made before any thread is started. A run is killed between
its start and 1.2 times what an undisturbed one takes. Whole means: the same files with the same bytes as
those of a run that nobody killed, on which `verify` found nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

Hashes = dict[str, str]
LEFT = (".out.", ".stage2.", ".base.", ".step=")  # what the leftovers of these destinations begin with


class BrokenError(AssertionError):
    """Something half-written, left behind, or different."""


def hashes(folder: Path) -> Hashes | None:
    """File -> SHA-256; None if there is no folder."""
    if not folder.is_dir():
        return None
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != "shared")
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def child(function: Callable[[], object]) -> int:
    """Forks; the child runs the function and ends."""
    process = os.fork()
    if process:
        return process
    with open(os.dup(2), "w") as told:
        silent = os.open(os.devnull, os.O_WRONLY)
        os.dup2(silent, 1)
        os.dup2(silent, 2)
        try:
            function()
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", file=told, flush=True)
            os._exit(1)
    os._exit(0)


def finish(function: Callable[[], object]) -> float:
    """Runs a function in a fork to its end; how long it took."""
    started = time.monotonic()
    if os.waitpid(child(function), 0)[1]:
        raise BrokenError("a run that nobody killed failed")
    return time.monotonic() - started


@dataclass(frozen=True)
class Work:
    """One kind of work.

    Attributes:
        run: Does it in a place, or goes on with it.
        results: The folders of a place that it publishes.
        begin: Makes the place ready.
        old: What the result was before, if it is there already.
        skips: Whether a run that goes on leaves out what the last one was about to publish.
    """

    run: Callable[[Path], object]
    results: Callable[[Path], Iterator[Path]]
    begin: Callable[[Path], None] = lambda place: None
    old: Path | None = None
    skips: bool = False


def works(inputs: Path) -> dict[str, Work]:
    """The kinds of work, on a small model of their own."""
    import tiny_models
    import torch
    from lightning.pytorch.callbacks import ModelCheckpoint
    from live import fit
    from test_when import Repeatable

    from daq_lightning import DeltaAwareQuantization, ScaleSearch, export_checkpoint
    from daq_lightning.training.base import take_snapshot
    from daq_lightning.training.tidy import tidy

    search = ScaleSearch(n_coarse=4, n_fine=2)
    base, post = inputs / "base", inputs / "post"

    def make_inputs() -> None:
        tiny_models.make_pair(inputs, lambda: tiny_models.llama(num_hidden_layers=4, vocab_size=512))
        for name in ("old", "stage1"):
            export_checkpoint(post, base, inputs / name, search=search, ignore=["lm_head"])

    finish(make_inputs)

    def export(out: Path, *, resume: bool = False) -> None:
        export_checkpoint(post, base, out, search=search, max_shard_bytes=100_000, resume=resume)

    def chain(place: Path) -> None:
        export_checkpoint(
            post,
            place / "stage1",
            place / "stage2",
            search=search,
            max_shard_bytes=200_000,
            chain_from="deployed",
        )

    def snapshot(place: Path) -> None:
        generator = torch.Generator().manual_seed(0)
        weights = {f"w{i}": torch.randn(512, 512, generator=generator) for i in range(64)}
        tidy(place)  # as a run does when it begins
        take_snapshot(weights, weights, place / "base")

    def train(place: Path) -> None:
        saver = ModelCheckpoint(
            dirpath=place / "checkpoints", every_n_epochs=1, save_top_k=-1, filename="{step:02}"
        )
        exports = DeltaAwareQuantization(
            dirpath=str(place / "exports"), base="snapshot", search=search, export_on="checkpoint"
        )
        # Lightning's own files: a kill may leave a part of one
        saved = sorted(file for file in (place / "checkpoints").glob("*.ckpt") if zipfile.is_zipfile(file))
        ckpt = saved[-1] if saved else None
        fit(place, saver, exports, module=Repeatable(), ckpt=ckpt, max_steps=-1, max_epochs=3)

    def only(name: str) -> Callable[[Path], Iterator[Path]]:
        return lambda place: iter([place / name])

    def all_exports(place: Path) -> Iterator[Path]:
        for name in ("base", "step=4", "step=8", "step=12"):
            yield place / "exports" / name

    def copied(source: str, name: str) -> Callable[[Path], None]:
        return lambda place: shutil.copytree(inputs / source, place / name) and None

    return {
        "export": Work(lambda place: export(place / "out"), only("out")),
        "replace": Work(
            lambda place: export(place / "out"), only("out"), copied("old", "out"), inputs / "old"
        ),
        "resume": Work(lambda place: export(place / "out", resume=True), only("out")),
        "chain": Work(chain, only("stage2"), copied("stage1", "stage1")),
        "snapshot": Work(snapshot, only("base")),
        "training": Work(train, all_exports, skips=True),
    }


def verify(folder: Path) -> None:
    """Raises if an export, or the chain that it ends, is not what its readers need."""
    from daq_lightning.audit.chain import Chain
    from daq_lightning.audit.verify import verify_checkpoint

    problems = [*verify_checkpoint(folder), *Chain.open(folder).verify()]
    if problems:
        raise BrokenError(f"{folder}: {problems}")


class Campaign:
    """Kills of one kind of work.

    Args:
        work: The work.
        folder: Where to do it.
        chance: When to kill.
    """

    def __init__(self, work: Work, folder: Path, chance: random.Random) -> None:
        self.work, self.chance = work, chance
        self.place, self.seen = folder / "place", Counter[str]()
        whole = folder / "whole"
        for _ in range(2):  # the first of an architecture takes longer: it makes the outline, which is kept
            self._begin(whole)
            self.seconds = finish(lambda: work.run(whole))
        self.expected = {path.name: hashes(path) for path in work.results(whole)}
        self.old = None if work.old is None else hashes(work.old)
        self.names = self._names(whole)
        for path in work.results(whole):
            if (path / "daq_report.json").exists():
                finish(lambda path=path: verify(path))
        self._begin(self.place)

    def kill(self, count: int) -> Counter[str]:
        """Kills so many runs and looks at what is there after each; what was seen how often."""
        killed = 0
        while killed < count:
            process = child(lambda: self.work.run(self.place))
            time.sleep(self.chance.uniform(0, 1.2) * self.seconds)
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
            status = os.waitpid(process, 0)[1]
            if os.WIFSIGNALED(status):
                killed += 1
                self._look()
            if not os.WIFSIGNALED(status) or self.chance.random() < 0.2 or killed == count:
                if not os.WIFSIGNALED(status) and status:
                    raise BrokenError("a run failed before it was killed")
                finish(lambda: self.work.run(self.place))
                self._compare()
                self._begin(self.place)
        return self.seen

    def _begin(self, place: Path) -> None:
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir(parents=True)
        self.work.begin(place)

    def _look(self) -> None:
        """After a kill: every result is whole, or not there."""
        states = []
        for path in self.work.results(self.place):
            found = hashes(path)
            aside = list(path.parent.glob(f".{path.name}.earlier-*"))
            if found == self.expected[path.name]:
                states.append("new")
            elif found is None and self.old is not None:
                if [hashes(folder) for folder in aside] != [self.old]:
                    raise BrokenError(f"{path}: neither an old nor a new export is there")
                states.append("aside")
            elif found is None:
                states.append("none")
            elif found == self.old:
                states.append("old")
            else:
                raise BrokenError(f"{path} is half-written: {_differences(found, self.expected[path.name])}")
        partial = "+partial" if list(self.place.rglob(".*.partial-*.lock")) else ""
        self.seen[f"{sum(state == 'new' for state in states)} new{partial}" if len(states) > 1
                  else states[0] + partial] += 1  # fmt: skip

    def _compare(self) -> None:
        """After a whole run: the results and nothing else."""
        names = set(self.names)
        for path in self.work.results(self.place):
            found, expected = hashes(path), self.expected[path.name]
            if found is None and self.work.skips:
                names -= {name for name in names if path.name in Path(name).parts}
            elif found != expected:
                raise BrokenError(f"{path} differs: {_differences(found, expected)}")
        if self._names(self.place) != names:
            raise BrokenError(f"left behind: {sorted(self._names(self.place) ^ names)}")
        self.seen["finished"] += 1

    def _names(self, place: Path) -> set[str]:
        return {
            str(path.relative_to(place))
            for path in place.rglob("*")
            if path.name != "shared" and "checkpoints" not in path.parts
        }


def _differences(found: Hashes | None, expected: Hashes | None) -> list[str]:
    one, two = found or {}, expected or {}
    return sorted(name for name in {*one, *two} if one.get(name) != two.get(name))


def main(folder: Path, kills: int, seed: int, chosen: list[str]) -> dict[str, Counter[str]]:
    """Runs the campaigns; kind of work -> what was seen how often."""
    import torch

    torch.set_num_threads(1)
    every = works(folder / "inputs")
    names = chosen or list(every)
    shares = [kills // len(names) + (index < kills % len(names)) for index in range(len(names))]
    seen = {}
    for name, share in zip(names, shares, strict=True):
        started = time.monotonic()
        seen[name] = Campaign(every[name], folder / name, random.Random(f"{seed} {name}")).kill(share)
        words = ", ".join(f"{state} {count}" for state, count in sorted(seen[name].items()))
        print(f"{name:9} {share:4} kills  {time.monotonic() - started:6.1f} s  {words}", flush=True)
    return seen


if __name__ == "__main__":
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    root = Path(__file__).resolve().parents[1]
    sys.path[:0] = [str(root), str(root / "tests"), str(root / "tests" / "training")]
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kills", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="*", default=[], help="kinds of work")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        try:
            counted = main(Path(scratch), options.kills, options.seed, options.only)
        except BrokenError as error:
            raise SystemExit(f"BROKEN: {error}") from error
    if options.json:
        print(json.dumps(counted))
