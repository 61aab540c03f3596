"""One command on several processes: those that torchrun started, or one for each GPU of this machine.

    torchrun --nproc-per-node 8 -m daq_lightning quantize POST --base BASE --out OUT
    daq-lightning quantize POST --base BASE --out OUT --device cuda       the same, if there are several GPUs

The processes share out the files of the export. Each takes the GPU of its local rank; the first one speaks.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from daq_lightning.export.ranks import Ranks


def started_by_torchrun() -> bool:
    """Whether this is one of several processes of torchrun."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1 and "RANK" in os.environ


def spread_over_gpus(argv: Sequence[str], device: str | None) -> None:
    """Starts the command again, once for each GPU, if it asks for "cuda" and there are several.

    Does not return then: this process becomes torchrun.
    """
    if device != "cuda" or started_by_torchrun():
        return
    import torch

    count = torch.cuda.device_count()
    if count > 1:
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"]
        sys.stderr.write(f"Export: on {count} GPUs; --device cuda:0 takes one\n")
        sys.stderr.flush()
        os.execv(sys.executable, [sys.executable, *launcher, "-m", "daq_lightning", *argv])


def device_of_rank(device: str | None) -> str | None:
    """The device of this process: of "cuda", the GPU with the number of its local rank."""
    if device == "cuda" and started_by_torchrun():
        return f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
    return device


@contextlib.contextmanager
def all_ranks() -> Iterator[Ranks]:
    """The processes of torchrun, or this one by itself."""
    from daq_lightning.export.ranks import ALONE, Ranks

    if not started_by_torchrun():
        yield ALONE
        return
    import torch.distributed as dist

    dist.init_process_group("gloo")  # for words; each process reads its own weights
    ranks = Ranks.all()
    try:
        yield ranks
    finally:
        ranks.close()
        with contextlib.suppress(Exception):  # of a group whose other ranks are gone
            dist.destroy_process_group()


def speaker() -> str:
    """What an error message begins with: the name of the program, and of several processes which one."""
    return f"daq-lightning [rank {os.environ['RANK']}]" if started_by_torchrun() else "daq-lightning"
