"""What the callback costs a step of training: without it, with it, and with the survival logged.

    without         a fit of a small Llama
    with            the same with DeltaAwareQuantization; its export at the end is left out
    with survival   the same with log_survival_every_n_steps=10

Fits of a few steps are made in turn, many times, in an order that changes, and each is compared with the fits
beside it, so that whatever else the machine does meets all of them. What counts is the time between
`on_train_start` and the end of the last step. On a CPU, the time of the process (of all its threads) is shown
as well as that of the wall: others on the same machine disturb it less. The ratio is the median over turns of
steps per second with, over without; the interval holds the true median with 95 % (from order statistics).

    OMP_NUM_THREADS=1 python benchmarks/training.py [--turns 15] [--steps 20] [--device cpu] [--quick]

One thread, for threads that wait for each other by spinning spend time of the process on that.
"""

import argparse
import logging
import math
import random
import resource
import statistics
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any, NamedTuple

KINDS = ("without", "with", "with survival")


class Spent(NamedTuple):
    """Seconds of a step.

    Attributes:
        wall: By the clock on the wall.
        process: Of all threads of this process.
    """

    wall: float
    process: float


def main() -> None:
    parser = argparse.ArgumentParser(description="What the callback costs a step of training.")
    parser.add_argument("--turns", type=int, default=15)
    parser.add_argument("--steps", type=int, default=20, help="of a fit")
    parser.add_argument("--every", type=int, default=10, help="steps between two survivals")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=64, help="tokens of a sequence")
    parser.add_argument("--quick", action="store_true", help="a model and a number of steps for a test")
    args = parser.parse_args()
    if args.quick:
        args.turns, args.steps, args.hidden, args.layers, args.length = 2, 4, 128, 1, 16
        args.every = 2

    quieten()
    spent: dict[str, list[Spent]] = {kind: [] for kind in KINDS}
    order = list(KINDS)
    with tempfile.TemporaryDirectory() as folder:
        for kind in KINDS:  # compiles kernels, fills caches
            fit(kind, Path(folder), args)
        before = peak_memory()
        for turn in range(args.turns):
            random.Random(turn).shuffle(order)
            for kind in order:
                spent[kind].append(fit(kind, Path(folder), args))
    print(f"{'':16}{'steps/s':>10}{'wall':>10}{'95 %':>20}{'process':>10}{'95 %':>20}")
    for kind in KINDS:
        rate = 1 / statistics.median(one.wall for one in spent[kind])
        columns = f"{kind:16}{rate:>10.2f}"
        for clock in Spent._fields:
            pairs = zip(spent["without"], spent[kind], strict=True)
            ratios = sorted(getattr(without, clock) / getattr(this, clock) for without, this in pairs)
            low, high = interval(ratios)
            columns += f"{statistics.median(ratios):>10.4f}{f'{low:.4f} to {high:.4f}':>20}"
        print(columns)
    print(f"peak memory {peak_memory() / 1e6:.0f} MB, of which {before / 1e6:.0f} MB were there at the start")


def quieten() -> None:
    """Keeps Lightning from announcing each of many fits."""
    warnings.filterwarnings("ignore")
    for name in ("lightning.pytorch", "lightning.fabric", "lightning.pytorch.utilities.rank_zero"):
        logging.getLogger(name).setLevel(logging.ERROR)


def fit(kind: str, folder: Path, args: Any) -> Spent:
    """One fit; the time of one of its steps."""
    import lightning.pytorch as L
    import torch
    from torch import Tensor
    from torch.utils.data import DataLoader
    from transformers import LlamaConfig, LlamaForCausalLM

    from daq_lightning import DeltaAwareQuantization

    class Tuning(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = LlamaForCausalLM(
                LlamaConfig(
                    hidden_size=args.hidden,
                    intermediate_size=2 * args.hidden,
                    num_hidden_layers=args.layers,
                    num_attention_heads=4,
                    num_key_value_heads=4,
                    vocab_size=512,
                )
            )

        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            return self.model(input_ids=batch, labels=batch).loss

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.parameters(), lr=1e-4)

    class Clock(L.Callback):
        """Runs from the end of all `on_train_start` to the end of the last step."""

        began = Spent(0.0, 0.0)
        ended = Spent(0.0, 0.0)

        def now(self) -> Spent:
            if args.device == "cuda":
                torch.cuda.synchronize()
            return Spent(time.perf_counter(), time.process_time())

        def on_train_epoch_start(self, *_: Any) -> None:
            self.began = self.now()

        def on_train_batch_end(self, *_: Any) -> None:
            self.ended = self.now() if trainer.global_step == args.steps else self.ended

    class NoExport(DeltaAwareQuantization):
        """Takes the base and sees every step; what is left out is the export."""

        def should_export(self, trainer: L.Trainer) -> bool:
            return False

    L.seed_everything(0, verbose=False)
    clock, callbacks = Clock(), []
    if kind != "without":
        every = args.every if kind == "with survival" else None
        callbacks = [NoExport(dirpath=str(folder / "exports"), log_survival_every_n_steps=every)]
    trainer = L.Trainer(
        max_steps=args.steps,
        accelerator="gpu" if args.device == "cuda" else "cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        callbacks=[*callbacks, clock],  # the clock last: it sees what the callback does in a step
    )
    data = torch.randint(0, 512, (args.batch * args.steps, args.length))
    trainer.fit(Tuning(), DataLoader(data, batch_size=args.batch))  # type: ignore[arg-type]
    wall, process = (end - start for start, end in zip(clock.began, clock.ended, strict=True))
    return Spent(wall / args.steps, process / args.steps)


def interval(ordered: list[float]) -> tuple[float, float]:
    """An interval that holds the median with at least 95 %, if there are six values or more.

    Of n values, so many lie below the median as heads fall in n throws of a coin.
    """
    n, below, out = len(ordered), 0.0, 0
    while below + math.comb(n, out) / 2**n <= 0.025:
        below += math.comb(n, out) / 2**n
        out += 1
    first = max(0, out - 1)
    return ordered[first], ordered[n - 1 - first]


def peak_memory() -> int:
    """The most memory of this process so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    main()
