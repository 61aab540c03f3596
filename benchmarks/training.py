"""What the callback costs a step of training: without it, with it, and with the survival logged.

    without         a small Llama is trained, the callbacks sleep
    with            DeltaAwareQuantization is asked after every step; its export at the end is left out
    with survival   the same, with log_survival_every_n_steps=10
    collecting      every batch is observed for rounding, which a run does for a few of them

One fit goes through many short segments of so many steps, each of one kind, in an order that changes, so that
whatever else the machine does meets all kinds; each segment is compared with the "without" of its turn. On a
CPU the time of the process (of all its threads) is shown beside that of the wall: others on the machine
disturb it less. The ratio is the median over turns of steps per second, over "without"; the interval holds
the true median with 95 % (order statistics). The last column is measured directly: what the hooks of the
callback take, of all time in its segments.

    OMP_NUM_THREADS=1 python benchmarks/training.py [--turns 30] [--device cpu] [--hidden 256] [--quick]

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
from collections import defaultdict
from pathlib import Path
from typing import Any, NamedTuple

KINDS = ("without", "with", "with survival", "collecting")


class Spent(NamedTuple):
    """Seconds.

    Attributes:
        wall: By the clock on the wall.
        process: Of all threads of this process.
    """

    wall: float
    process: float


def main() -> None:
    parser = argparse.ArgumentParser(description="What the callback costs a step of training.")
    parser.add_argument("--turns", type=int, default=30, help="segments of each kind")
    parser.add_argument("--every", type=int, default=10, help="steps of a segment, between two survivals")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=64, help="tokens of a sequence")
    parser.add_argument("--quick", action="store_true", help="a model and a number of steps for a test")
    args = parser.parse_args()
    if args.quick:
        args.turns, args.every, args.hidden, args.layers, args.length = 2, 2, 128, 1, 16

    warnings.filterwarnings("ignore")
    for name in ("lightning.pytorch", "lightning.fabric", "lightning.pytorch.utilities.rank_zero"):
        logging.getLogger(name).setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() as folder:
        fit(["without"], Path(folder), args)
        alone = peak_memory()
        order = []
        for turn in range(args.turns):
            order += random.Random(turn).sample(KINDS, len(KINDS))
        spent, in_hooks = fit(order, Path(folder), args)
    print(f"{'':16}{'steps/s':>10}{'wall':>10}{'95 %':>20}{'process':>10}{'95 %':>20}{'hooks':>10}")
    for kind in KINDS:
        columns = f"{kind:16}{args.every / statistics.median(one.wall for one in spent[kind]):>10.2f}"
        for clock in Spent._fields:
            pairs = zip(spent["without"], spent[kind], strict=True)
            ratios = sorted(getattr(without, clock) / getattr(this, clock) for without, this in pairs)
            low, high = interval(ratios)
            columns += f"{statistics.median(ratios):>10.4f}{f'{low:.4f} to {high:.4f}':>20}"
        share = in_hooks[kind] / sum(one.process for one in spent[kind])
        print(f"{columns}{share:>10.3%}")
    print(
        f"peak memory {alone / 1e6:.0f} MB of a fit without callbacks, {peak_memory() / 1e6:.0f} MB with them"
    )


def fit(order: list[str], folder: Path, args: Any) -> tuple[dict[str, list[Spent]], dict[str, float]]:
    """One fit of segments of these kinds.

    Returns:
        What each segment took, by kind, and the time of the process in the hooks of callbacks in all of them.
    """
    import lightning.pytorch as L
    import torch
    from torch import Tensor
    from torch.utils.data import DataLoader
    from transformers import LlamaConfig, LlamaForCausalLM

    from daq_lightning import DeltaAwareQuantization

    spent: dict[str, list[Spent]] = defaultdict(list)
    in_hooks: dict[str, float] = defaultdict(float)
    now = {"kind": order[0]}

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

    class Sleeping(DeltaAwareQuantization):
        """Works in the segments of its kind, and never exports."""

        kind = "with"

        def should_export(self, trainer: L.Trainer) -> bool:
            return False

        def on_train_batch_end(self, trainer: L.Trainer, *others: Any) -> None:
            if now["kind"] == self.kind:
                began = time.process_time()
                super().on_train_batch_end(trainer, *others)
                in_hooks[self.kind] += time.process_time() - began
            elif self._run is not None and self._run.survival is not None:  # as if it had been awake
                self._run.survival._periods = trainer.global_step // args.every

        def on_train_batch_start(self, *others: Any) -> None:
            if now["kind"] == self.kind:
                super().on_train_batch_start(*others)

    class Measuring(Sleeping):
        kind = "with survival"

    class Collecting(Sleeping):
        kind = "collecting"

    class Clock(L.Callback):
        """Reads the clocks between segments; the last callback, so that it sees what the others do."""

        began = Spent(0.0, 0.0)

        def read(self) -> Spent:
            if args.device == "cuda":
                torch.cuda.synchronize()
            return Spent(time.perf_counter(), time.process_time())

        def on_train_epoch_start(self, *_: Any) -> None:
            self.began = self.read()

        def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
            if trainer.global_step % args.every:
                return
            ended = self.read()
            spent[now["kind"]].append(
                Spent(*(end - start for start, end in zip(self.began, ended, strict=True)))
            )
            now["kind"] = order[min(trainer.global_step // args.every, len(order) - 1)]
            self.began = self.read()

    callbacks: list[L.Callback] = [Clock()]
    if len(order) > 1:
        plain: dict[str, Any] = {"rounding": "nearest"}
        measuring = Measuring(dirpath=str(folder / "two"), log_survival_every_n_steps=args.every, **plain)
        collecting = Collecting(dirpath=str(folder / "three"), curvature_steps=10**9)
        callbacks = [Sleeping(dirpath=str(folder / "one"), **plain), measuring, collecting, *callbacks]
    L.seed_everything(0, verbose=False)
    trainer = L.Trainer(
        max_steps=args.every * len(order),
        max_epochs=1,
        accelerator="gpu" if args.device == "cuda" else "cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        callbacks=callbacks,
    )
    data = torch.randint(0, 512, (args.batch * args.every * len(order), args.length))
    trainer.fit(Tuning(), DataLoader(data, batch_size=args.batch))  # type: ignore[arg-type]
    return spent, in_hooks


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
