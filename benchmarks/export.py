"""How fast an export is, and how much memory it needs: a synthetic Llama of 0.6 B parameters, beside a plain
copy.

    export     read both checkpoints, search all scales, fingerprint, write, fsync
    copy       read both checkpoints in pieces and write as many bytes as the export, fsync: the disk alone
    snapshot   the copy of a base that a full fine-tuning makes at the start: fingerprint, write, fsync
    write      write the same tensors from memory, fsync
    llmc       llm-compressor's `model_free_ptq` to the same scheme, where it is installed: no base, no search

Each runs in a process of its own, so that each has a peak of resident memory; imports and building the kernel
are left out of the time. Run it on a quiet machine; compare runs by their ratio.

    python benchmarks/export.py [--layers 8] [--folder outputs/benchmark] [--scheme FP8_BLOCK] [--json FILE]

    python benchmarks/export.py --nproc 2 [--pin]      one process and two, in turn

Each of these searches in one thread; two more threads read and write. With `--pin` each has one core for all
of them, as where every core has a rank; without it, one process by itself uses more than one core as well.
On a busy machine compare processor time: that of the busiest rank, beside that of one process.

What a rank needs beyond what it had when the export began should be about one layer and one file
(`--shard-bytes`), whatever the size of the model.
"""

import argparse
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

HIDDEN, INTERMEDIATE, VOCABULARY = 2048, 8192, 32000


def make_pair(folder: Path, layers: int) -> tuple[Path, Path]:
    """A base and a fine-tuned checkpoint with random weights, in bfloat16; kept for the next run."""
    import torch
    from transformers import LlamaConfig

    from daq_lightning.checkpoint.tensor_file import TensorSpec
    from daq_lightning.checkpoint.writer import CheckpointWriter

    config = LlamaConfig(
        hidden_size=HIDDEN, intermediate_size=INTERMEDIATE, num_hidden_layers=layers, num_attention_heads=16,
        vocab_size=VOCABULARY, architectures=["LlamaForCausalLM"], dtype="bfloat16",
    )  # fmt: skip
    shapes = {"model.embed_tokens.weight": (VOCABULARY, HIDDEN), "model.norm.weight": (HIDDEN,)}
    for i in range(layers):
        layer = f"model.layers.{i}."
        shapes |= {f"{layer}self_attn.{name}_proj.weight": (HIDDEN, HIDDEN) for name in "qkvo"}
        shapes |= {f"{layer}mlp.{name}_proj.weight": (INTERMEDIATE, HIDDEN) for name in ("gate", "up")}
        shapes |= {f"{layer}mlp.down_proj.weight": (HIDDEN, INTERMEDIATE)}
        shapes |= {f"{layer}{name}_layernorm.weight": (HIDDEN,) for name in ("input", "post_attention")}
    shapes["lm_head.weight"] = (VOCABULARY, HIDDEN)
    specs = [TensorSpec(name=name, dtype=torch.bfloat16, shape=shape) for name, shape in shapes.items()]
    paths = folder / f"base-{layers}", folder / f"post-{layers}"
    for path, change in zip(paths, (0.0, 1e-4), strict=True):
        if path.exists():
            continue
        generator = torch.Generator().manual_seed(0)
        with CheckpointWriter(path, specs) as writer:
            for spec in specs:
                weight = 0.02 * torch.randn(spec.shape, generator=generator)
                update = torch.randn(spec.shape, generator=generator)
                writer.write(spec.name, (weight + change * update).bfloat16())
            writer.publish(json.loads(config.to_json_string()))
    return paths


def export(
    post: Path, base: Path, out: Path, scheme: str, shard_bytes: int = 5 * 10**9, pin: int = 0
) -> float:
    """One export, by all processes of torchrun if that started this one."""
    import torch
    import torch.distributed as dist
    import transformers.models.llama.modeling_llama  # noqa: F401  imports are not timed

    from daq_lightning import PerBlock, ScaleSearch, export_checkpoint, search_scale

    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    if pin:
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[int(os.environ.get("LOCAL_RANK", "0")) % len(cores)]})
    search = ScaleSearch(metric="cosine", n_coarse=5, n_fine=10)
    search_scale(torch.ones(256, 256), torch.zeros(256, 256), PerBlock(), search)  # builds the kernel
    if several:
        dist.init_process_group("gloo")
        dist.barrier()
    before, worked = peak_memory(), time.process_time()
    start = time.perf_counter()
    export_checkpoint(
        post, base, out, scheme=scheme, search=search, max_shard_bytes=shard_bytes, distributed=several
    )  # type: ignore[call-overload]
    seconds = time.perf_counter() - start
    worked = time.process_time() - worked
    if several:
        dist.destroy_process_group()
    print(f"measured {seconds} {worked} {before} {peak_memory()}", flush=True)
    return seconds


def llmc(post: Path, base: Path, out: Path, scheme: str) -> float:
    import transformers.models.llama.modeling_llama  # noqa: F401
    from llmcompressor import model_free_ptq  # pyright: ignore[reportMissingImports]

    start = time.perf_counter()
    model_free_ptq(model_stub=str(post), save_directory=str(out), scheme=scheme, ignore=["lm_head"])
    return time.perf_counter() - start


def copy(post: Path, base: Path, out: Path, scheme: str) -> float:
    start = time.perf_counter()
    buffer = bytearray(32 << 20)
    left = sum(file.stat().st_size for file in post.iterdir()) * 2 // 3  # about what an export writes
    with open(out, "wb", buffering=0) as target:
        for folder in (post, base):
            with open(folder / "model.safetensors", "rb", buffering=0) as source:
                while count := source.readinto(buffer):
                    written = min(count, left)
                    target.write(memoryview(buffer)[:written])
                    left -= written
        os.fsync(target.fileno())
    return time.perf_counter() - start


def snapshot(post: Path, base: Path, out: Path, scheme: str) -> float:
    from daq_lightning.checkpoint.folder import RawCheckpoint
    from daq_lightning.export.ranks import ALONE
    from daq_lightning.training.base import take_snapshot

    weights = dict(RawCheckpoint(base))
    print(peak_memory())
    start = time.perf_counter()
    take_snapshot(weights, weights, out, ALONE)
    return time.perf_counter() - start


def write(post: Path, base: Path, out: Path, scheme: str) -> float:
    from daq_lightning.checkpoint.flat_bytes import tensor_bytes
    from daq_lightning.checkpoint.folder import RawCheckpoint

    weights = dict(RawCheckpoint(base))
    start = time.perf_counter()
    with open(out, "wb", buffering=0) as file:
        for tensor in weights.values():
            file.write(tensor_bytes(tensor))
        os.fsync(file.fileno())
    return time.perf_counter() - start


def peak_memory() -> float:
    """Peak resident memory of this process in GB. (`getrusage` would count its parent's as well.)"""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024 / 1e9
    return float("nan")


JOBS = {"copy": copy, "export": export, "write": write, "snapshot": snapshot}
if importlib.util.find_spec("llmcompressor"):
    JOBS["llmc"] = llmc


def measure(job: str, *arguments: str) -> tuple[float, float]:
    """Seconds and peak resident gigabytes of a job in a process of its own."""
    output = subprocess.run(
        [sys.executable, __file__, "--job", job, *arguments], capture_output=True, text=True
    )
    if output.returncode:
        raise SystemExit(output.stderr)
    seconds, peak = output.stdout.split()[-2:]
    return float(seconds), float(peak)


class Rank(NamedTuple):
    """What one rank took.

    Attributes:
        seconds: By the clock.
        worked: Processor time in seconds, that of the threads that read and write included.
        before: Peak resident memory in GB when the export began.
        peak: The same at its end.
    """

    seconds: float
    worked: float
    before: float
    peak: float


def measure_ranks(count: int, *arguments: str) -> list[Rank]:
    """One export by some processes of one thread."""
    launcher = (
        ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"] if count > 1 else []
    )
    output = subprocess.run(
        [sys.executable, *launcher, __file__, "--job", "export", *arguments],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    if output.returncode:
        raise SystemExit(output.stderr)
    lines = [line.split()[1:] for line in output.stdout.splitlines() if line.startswith("measured ")]
    assert len(lines) == count
    return [Rank(*map(float, line)) for line in lines]


def compare_ranks(count: int, repeat: int, out: Path, arguments: list[str]) -> list[Any]:
    """One process beside several, in turn: times, their ratio, memory."""
    rows, ratios = [], []
    for _ in range(repeat):
        row, times = {}, {}
        for number in (1, count):
            shutil.rmtree(out, ignore_errors=True)
            ranks = row[number] = measure_ranks(number, *arguments)
            times[number] = max(rank.seconds for rank in ranks)
            memory = ", ".join(f"{rank.peak:.2f} GB (+{rank.peak - rank.before:.2f})" for rank in ranks)
            worked = " + ".join(f"{rank.worked:.2f}" for rank in ranks)
            print(f"{number} x: {times[number]:5.2f} s, processors {worked} s, {memory}", flush=True)
        ratios.append(times[count] / times[1])
        rows.append(row)
    files = len(list(out.glob("*.safetensors")))
    shown = ", ".join(f"{ratio:.2f}" for ratio in ratios)
    best = {number: min(max(rank.seconds for rank in row[number]) for row in rows) for number in (1, count)}
    busiest = {number: min(max(rank.worked for rank in row[number]) for row in rows) for number in (1, count)}
    print(
        f"\n{files} files; processor time of the busiest rank {busiest[count] / busiest[1]:.2f} of one's; "
        f"fastest {best[1]:.2f} s and {best[count]:.2f} s, {best[count] / best[1]:.2f}; "
        f"median of the pairs {sorted(ratios)[len(ratios) // 2]:.2f} ({shown})"
    )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description="Time and memory of an export.")
    parser.add_argument("--layers", type=int, default=8, help="layers of the model; 8 are 0.6 B parameters")
    parser.add_argument("--folder", type=Path, default=Path("outputs/benchmark"))
    parser.add_argument("--scheme", default="FP8_BLOCK")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--nproc", type=int, help="compare one process with so many, of one thread each")
    parser.add_argument("--shard-bytes", type=int, default=80_000_000, help="size of a file, with --nproc")
    parser.add_argument("--pin", action="store_true", help="with --nproc: one core for each, not one thread")
    parser.add_argument("--job", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.job:
        job, post, base, out, scheme, *rest = args.job
        seconds = JOBS[job](Path(post), Path(base), Path(out), scheme, *map(int, rest))
        print(seconds, peak_memory())
        return
    args.folder.mkdir(parents=True, exist_ok=True)
    print(f"Making a pair of checkpoints with {args.layers} layers in {args.folder} ...", flush=True)
    base, post = make_pair(args.folder, args.layers)
    if args.nproc:
        out = args.folder / "out-ranks"
        arguments = [str(post), str(base), str(out), args.scheme, str(args.shard_bytes), str(int(args.pin))]
        rows = compare_ranks(args.nproc, args.repeat, out, arguments)
        write_json(args, rows)
        return
    rows = []
    for _ in range(args.repeat):
        row = {}
        for job in JOBS:
            out = args.folder / f"out-{job}"
            shutil.rmtree(out) if out.is_dir() else out.unlink(missing_ok=True)
            row[job] = measure(job, str(post), str(base), str(out), args.scheme)
        rows.append(row)
        print(
            "   ".join(f"{job} {seconds:5.2f} s, {peak:.2f} GB" for job, (seconds, peak) in row.items()),
            flush=True,
        )
    best = {job: min(row[job][0] for row in rows) for job in JOBS}
    peak = max(row["export"][1] for row in rows)
    print(
        f"\n{args.scheme}, {args.layers} layers, 16 candidates: export {best['export']:.2f} s "
        f"({best['export'] / best['copy']:.1f} x the copy), peak {peak:.2f} GB; "
        f"snapshot {best['snapshot']:.2f} s ({best['snapshot'] / best['write']:.2f} x the write)"
    )
    if "llmc" in best:
        print(
            f"llm-compressor, without a search: {best['llmc']:.2f} s, {best['llmc'] / best['export']:.1f} x "
            "the export"
        )
    write_json(args, rows)


def write_json(args: argparse.Namespace, rows: list[Any]) -> None:
    if args.json:
        args.json.write_text(
            json.dumps({"layers": args.layers, "scheme": args.scheme, "rows": rows}, indent=2)
        )


if __name__ == "__main__":
    main()
