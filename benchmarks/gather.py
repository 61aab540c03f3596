"""What it costs to bring sharded weights to the rank that exports them, beside searching them.

    to owner     each weight goes to one rank, in turn (`daq_lightning.model.sharded.tensor_on`)
    to all       `DTensor.full_tensor`: every rank gets every weight
    search       all ranks search at once, each a weight that is its own

Processes of one thread and gloo, weights in bfloat16, sharded by rows as FSDP2 does. A weight is two bytes
an element and its codes are one: ranks that searched their own shards and sent codes would save half of "to
owner" at most. Counts of bytes are those that a rank receives from others, computed
from who holds what.

    python benchmarks/gather.py [--nproc 2] [--weights 8] [--rows 8192] [--columns 4096] [--repeat 3]

With `--pair outputs/benchmark`, where benchmarks/export.py left its checkpoints, also whole exports by the
same ranks, in turn: of the folder, and of a model that was loaded from it and that FSDP2 shards. The two
differ by what gathering costs an export.
"""

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path


def launch() -> None:
    """Starts this file again, once for each rank."""
    count = sys.argv[sys.argv.index("--nproc") + 1] if "--nproc" in sys.argv else "2"
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"]
    command = [sys.executable, *launcher, __file__, *sys.argv[1:]]
    raise SystemExit(subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}).returncode)


def main() -> None:
    parser = argparse.ArgumentParser(description="Gathering weights beside searching them.")
    parser.add_argument("--nproc", type=int, default=2, help="ranks")
    parser.add_argument("--weights", type=int, default=8)
    parser.add_argument("--rows", type=int, default=8192)
    parser.add_argument("--columns", type=int, default=4096)
    parser.add_argument("--repeat", type=int, default=3, help="of which the fastest counts")
    parser.add_argument("--pair", type=Path, help="folder of benchmarks/export.py, for whole exports")
    args = parser.parse_args()
    if "RANK" not in os.environ:
        launch()

    import torch
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    from daq_lightning import PerBlock, ScaleSearch, search_scale
    from daq_lightning.model.sharded import tensor_on

    dist.init_process_group("gloo")
    rank, size = dist.get_rank(), dist.get_world_size()
    mesh = init_device_mesh("cpu", (size,))
    settings = ScaleSearch(metric="cosine", n_coarse=5, n_fine=10)

    torch.manual_seed(0)
    whole = [0.02 * torch.randn(args.rows, args.columns) for _ in range(args.weights)]
    weights = [distribute_tensor(weight.bfloat16(), mesh, [Shard(0)]) for weight in whole]
    owned = [
        (weight.bfloat16(), (weight + 1e-4 * torch.randn_like(weight)).bfloat16())
        for i, weight in enumerate(whole)
        if i % size == rank
    ]
    del whole

    def to_owner() -> None:
        for i, weight in enumerate(weights):
            tensor_on(weight, i % size)

    def to_all() -> None:
        for weight in weights:
            tensor_on(weight, None)

    def search() -> None:
        for base, post in owned:
            search_scale(post, base, PerBlock(), settings)

    def fastest(act: Callable[[], None]) -> float:
        """Seconds until the last rank is done."""
        times = []
        for _ in range(args.repeat + 1):  # the first one warms up
            dist.barrier()
            start = time.perf_counter()
            act()
            dist.barrier()
            times.append(time.perf_counter() - start)
        return min(times[1:])

    seconds = {act.__name__: fastest(act) for act in (to_owner, to_all, search)}
    total = args.weights * args.rows * args.columns * 2
    received = {"to_owner": total * (size - 1) / size**2, "to_all": total * (size - 1) / size}
    if rank == 0:
        shape = f"{args.rows} x {args.columns}"
        print(f"{args.weights} weights of {shape}, bfloat16 ({total / 1e6:.0f} MB), {size} ranks")
        for name, took in seconds.items():
            moved = f", {received[name] / 1e6:.0f} MB received by a rank" if name in received else ""
            print(f"{name:9} {took:6.2f} s  {total / took / 1e6:7.0f} MB/s of weights{moved}")
        print(f"to_owner / search {seconds['to_owner'] / seconds['search']:.2f}")
    if args.pair:
        compare_exports(args.pair, args.repeat)
    dist.destroy_process_group()


def compare_exports(pair: Path, repeat: int) -> None:
    """Exports of a folder and of the same weights in an FSDP2 model, by all ranks, in turn."""
    import torch
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from transformers import AutoModelForCausalLM

    from daq_lightning import ScaleSearch, load_checkpoint
    from daq_lightning.export.job import prepare
    from daq_lightning.export.ranks import Ranks
    from daq_lightning.export.run import run
    from daq_lightning.export.settings import ExportSettings
    from daq_lightning.export.source import Source
    from daq_lightning.model.live import LiveModel

    post = max(file.parent for file in pair.glob("post-*/config.json"))
    base = pair / post.name.replace("post", "base")
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    model = AutoModelForCausalLM.from_pretrained(post, dtype=torch.bfloat16)
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    live = LiveModel(model)
    sharded = Source(
        weights=live.weights,
        specs=live.specs,
        outline=live.architecture.outline(live.keys),
        keys_of=live.architecture.keys_of,
        config=live.config(),
        copy_files=lambda folder: None,
    )
    search = ScaleSearch(metric="cosine", n_coarse=5, n_fine=10)
    settings = ExportSettings(scheme="FP8_BLOCK", search=search, max_shard_bytes=80_000_000)
    ranks = Ranks.all()
    times: dict[str, list[float]] = {"folder": [], "sharded": []}
    for i in range(2 * (repeat + 1)):  # the first of both warm up
        name = ("folder", "sharded")[i % 2]
        source = sharded if name == "sharded" else Source.from_folder(post)
        os.sync()
        dist.barrier()
        start = time.perf_counter()
        job = prepare(source, load_checkpoint(base), settings, ranks=ranks)
        run(job, pair / "out-gather", ranks=ranks)
        times[name].append(time.perf_counter() - start)
    if ranks.rank == 0:
        for name, each in times.items():
            print(f"export {name:7} {min(each[1:]):5.2f} s ({', '.join(f'{one:.2f}' for one in each[1:])})")
    ranks.close()


if __name__ == "__main__":
    main()
