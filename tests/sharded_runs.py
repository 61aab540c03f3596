"""Fits of one tiny model under every strategy, for the tests of exports by several ranks.

A training step changes each weight by an amount that depends on its name, its place and the step alone, so
that all strategies end with the same bits, and their exports can be compared byte for byte.

    python sharded_runs.py SCENARIO STRATEGY FOLDER     one rank; LOCAL_RANK and WORLD_SIZE say which
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from live import Tuning, data, end_process_group, make_trainer, tiny_llama
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from daq_lightning import DeltaAwareQuantization

STRATEGIES = ["ddp2", "fsdp2", "tp2", "ddp4", "fsdp4", "fsdp2tp2"]
HIDDEN = 128
SHARD = 60_000  # bytes: several files for each rank, and an odd number of them


def model(lora: bool) -> nn.Module:
    made: nn.Module = tiny_llama(
        hidden=HIDDEN,
        intermediate_size=HIDDEN,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
    )
    if lora:
        from peft import LoraConfig, get_peft_model

        torch.manual_seed(5)
        made = get_peft_model(made, LoraConfig(r=4, target_modules=["q_proj", "down_proj"]))  # type: ignore[arg-type]
    return made


class Steps(Tuning):
    """Moves weights by fixed amounts instead of following gradients."""

    def __init__(self, lora: bool = False, meta: bool = False) -> None:
        super().__init__(model=nn.Identity())
        self.lora, self.meta = lora, meta

    def configure_model(self) -> None:
        if not isinstance(self.model, nn.Identity):
            return
        self.model = model(self.lora)
        mesh = getattr(self, "_device_mesh", None)
        if mesh is None:
            return
        whole = self.model.state_dict()
        buffers = dict(self.model.named_buffers())
        if self.meta:
            self.model = self.model.to("meta")
        inner = self.model.base_model.model if self.lora else self.model
        data_mesh, tensor_mesh = mesh["data_parallel"], mesh["tensor_parallel"]
        if tensor_mesh.size() > 1:
            columns, rows = ColwiseParallel(), RowwiseParallel()
            plan = {
                "self_attn.k_proj": columns, "self_attn.v_proj": columns, "self_attn.o_proj": rows,
                "mlp.gate_proj": columns, "mlp.up_proj": columns,
                "self_attn.q_proj.base_layer": columns, "self_attn.q_proj.lora_B.default": columns,
                "mlp.down_proj.base_layer": rows, "mlp.down_proj.lora_A.default": rows,
            }  # fmt: skip
            if not self.lora:
                adapted = {"self_attn.q_proj": columns, "mlp.down_proj": rows}
                plan = {name: style for name, style in plan.items() if "_proj." not in name} | adapted
            for layer in inner.model.layers:
                parallelize_module(layer, tensor_mesh, plan)
        if data_mesh.size() > 1:
            for layer in inner.model.layers:
                fully_shard(layer, mesh=data_mesh)
            fully_shard(self.model, mesh=data_mesh)
        if self.meta:
            from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

            self.model.to_empty(device="cpu")
            for name, buffer in buffers.items():
                self.model.get_buffer(name).copy_(buffer)
            set_model_state_dict(self.model, whole, options=StateDictOptions(full_state_dict=True))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        trained = (parameter for parameter in self.parameters() if parameter.requires_grad)
        return torch.optim.AdamW(trained, lr=0.0, weight_decay=0.0, foreach=False)

    def optimizer_step(self, *arguments: Any, **options: Any) -> None:
        super().optimizer_step(*arguments, **options)
        flat = self.trainer.strategy.model
        whole: Any = contextlib.nullcontext()
        if isinstance(flat, FullyShardedDataParallel):
            whole = FullyShardedDataParallel.summon_full_params(flat)
        with torch.no_grad(), whole:
            for name, parameter in self.named_parameters():
                if parameter.requires_grad:
                    parameter.add_(self.amount(name, parameter))

    def amount(self, name: str, like: torch.Tensor) -> torch.Tensor:
        start = (
            zlib.crc32(name.replace("_fsdp_wrapped_module.", "").encode()) % 1000 + self.trainer.global_step
        )
        change = 2e-3 * torch.sin(0.37 * torch.arange(like.numel()) + start).reshape(like.shape)
        if not isinstance(like, DTensor):
            return change
        return distribute_tensor(
            change, like.device_mesh, [Replicate()] * like.device_mesh.ndim
        ).redistribute(placements=like.placements)


class OnCPU(FSDPStrategy):
    """FSDP1 on a CPU, which torch can do and Lightning does not ask it for."""

    def _setup_model(self, model: nn.Module) -> nn.Module:
        policy = ModuleWrapPolicy({LlamaDecoderLayer})
        self.model = FullyShardedDataParallel(
            model, auto_wrap_policy=policy, device_id=torch.device("cpu"), use_orig_params=True
        )
        return self.model


def strategy(name: str) -> tuple[Any, int]:
    """The strategy of a name, and how many ranks it has."""
    if name == "single":
        return "auto", 1
    if name == "fsdp1":
        return OnCPU(process_group_backend="gloo"), 2
    if name.startswith("ddp"):
        return DDPStrategy(process_group_backend="gloo"), int(name[3:])
    sizes = {"fsdp2": (2, 1), "tp2": (1, 2), "fsdp4": (4, 1), "fsdp2tp2": (2, 2)}
    rows, columns = sizes[name]
    kind = ModelParallelStrategy(
        data_parallel_size=rows, tensor_parallel_size=columns, process_group_backend="gloo"
    )
    return kind, rows * columns


def quantization(folder: Path, **settings: Any) -> DeltaAwareQuantization:
    """The callback, with small files; codes are nearest, whatever part of the data a rank has seen."""
    settings = {"max_shard_bytes": SHARD, "rounding": "nearest"} | settings
    return DeltaAwareQuantization(dirpath=str(folder / "exports"), **settings)


def fit(
    folder: Path,
    kind: str,
    *callbacks: L.Callback,
    lora: bool = False,
    meta: bool = False,
    ckpt: Path | None = None,
    held_out: Any = None,
    **changes: Any,
) -> L.Trainer:
    L.seed_everything(3, verbose=False)
    chosen, devices = strategy(kind)
    settings: dict[str, Any] = {"max_epochs": 1, "max_steps": -1, "use_distributed_sampler": False}
    trainer = make_trainer(folder, *callbacks, strategy=chosen, devices=devices, **(settings | changes))
    trainer.fit(Steps(lora, meta), data(4), held_out, ckpt_path=ckpt)
    return trainer


def saver(folder: Path) -> ModelCheckpoint:
    return ModelCheckpoint(dirpath=folder / "checkpoints", save_top_k=-1, filename="{step}", every_n_epochs=1)


def everything(folder: Path, kind: str) -> None:
    """Full and LoRA, at once and resumed, with the figures of each rank."""
    for lora in (False, True):
        whole, parts = (folder / f"{'lora' if lora else 'full'}-{how}" for how in ("whole", "parts"))
        callback = quantization(whole, export_on="checkpoint")
        trainer = fit(whole, kind, saver(whole), callback, lora=lora, meta=not lora, max_epochs=2)
        note(folder, f"lora={lora}", callback, trainer)
        fit(parts, kind, saver(parts), quantization(parts, export_on="checkpoint"), lora=lora)
        fit(
            parts, kind, saver(parts), quantization(parts, export_on="checkpoint"), lora=lora,
            ckpt=parts / "checkpoints" / "step=2.ckpt", max_epochs=2,
        )  # fmt: skip


def bases(folder: Path, kind: str) -> None:
    """Bases of every kind, the best checkpoint, adapters that are not merged, and ranks that differ."""
    before = folder / "before"
    fit(before, kind, saver(before))
    saved = before / "checkpoints" / "step=2.ckpt"
    fit(folder / "memory", kind, quantization(folder / "memory", base="memory"))
    fit(folder / "ckpt", kind, quantization(folder / "ckpt", base=str(saved)), max_epochs=2)
    export = quantization(folder / "folder", base=str(folder / "memory" / "exports" / "step=2"))
    fit(folder / "folder", kind, export)
    best = ModelCheckpoint(
        dirpath=folder / "best" / "checkpoints", monitor="train_loss", save_top_k=1, filename="best"
    )
    fit(folder / "best", kind, best, quantization(folder / "best", which="best"), max_epochs=2)
    apart = quantization(folder / "apart", merge_adapters=False, base=str(export.exports[-1]))
    fit(folder / "apart", kind, apart, lora=True)
    if kind != "single":
        other = quantization(folder / "other", ignore=["re:.*o_proj"] if rank() == 1 else None)
        said = ""
        try:
            fit(folder / "other", kind, other)
        except ValueError as error:
            said = str(error)
        (folder / f"other{rank()}").write_text(said)


class Dies(L.Callback):
    """Rank 1 fails in the middle of a step, while rank 0 waits for its gradients."""

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step == 1 and rank() == 1:
            raise RuntimeError("rank 1 has failed")


def left_alone(folder: Path, kind: str) -> None:
    """Rank 0 exports what it has when the other one is gone, and waits for nobody."""
    callback = quantization(folder, export_on_exception=True)
    try:
        fit(folder, kind, callback, Dies())
    except Exception as error:
        (folder / f"said{rank()}").write_text(str(error))
    os._exit(0)  # of gloo, nothing can be ended in order


def without_checkpoints(folder: Path, kind: str) -> None:
    """Exports alone: Lightning's own checkpoints of FSDP1 crash on a CPU. LoRA and validation are refused."""
    fit(folder, kind, quantization(folder, every_n_train_steps=2), max_epochs=2)
    refused: list[tuple[str, dict[str, Any], bool]] = [
        ("said", {}, True),
        ("judged", {"validate": True}, False),
    ]
    for name, settings, lora in refused:
        said = ""
        try:
            fit(folder / name, kind, quantization(folder / name, **settings), lora=lora, held_out=data(4))
        except (ValueError, MisconfigurationException) as error:
            said = str(error)
        (folder / f"{name}{rank()}").write_text(said)


def failing(folder: Path, kind: str) -> None:
    """The first export fails on rank 1 alone; the run goes on, and the second is made."""
    from daq_lightning.export import scales as module

    original, calls = module.search_batch, []

    def search(*arguments: Any, **options: Any) -> Any:
        calls.append(0)
        if rank() == 1 and len(calls) == 2:
            raise OSError("the disk of rank 1 is gone")
        return original(*arguments, **options)

    module.search_batch = search  # type: ignore[assignment]
    callback = quantization(folder, every_n_train_steps=2)
    said = ""
    try:
        fit(folder, kind, callback, max_epochs=2)
    except OSError as error:
        said = str(error)
    content = {"said": said, "exports": [path.name for path in callback.exports]}
    (folder / f"rank{rank()}.json").write_text(json.dumps(content))


def identical(folder: Path, kind: str) -> None:
    """Training by gradients, with and without the callback: the same weights and random numbers?"""
    Steps.amount = lambda self, name, like: torch.zeros_like(like)  # type: ignore[method-assign]
    Steps.configure_optimizers = Tuning.configure_optimizers  # type: ignore[method-assign]
    states = []
    for callbacks in ([], [quantization(folder, every_n_train_steps=1)]):
        trainer = fit(folder, kind, *callbacks, use_distributed_sampler=True, max_epochs=2)
        state = {
            name: p.to_local() if isinstance(p, DTensor) else p
            for name, p in trainer.lightning_module.state_dict().items()
        }
        optimizer = trainer.optimizers[0].state_dict()["state"]
        moments = [
            value.to_local() if isinstance(value, DTensor) else value
            for entry in optimizer.values()
            for value in entry.values()
        ]
        states.append((state, moments, torch.get_rng_state()))
    (one, moments, random), (two, other_moments, other_random) = states
    assert trainer.callbacks[0].exports  # type: ignore[attr-defined]
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert all(torch.equal(a, b) for a, b in zip(moments, other_moments, strict=True))
    assert len(moments) > 10
    assert torch.equal(random, other_random)
    assert any(bool(moment.any()) for moment in moments)


def validated(folder: Path, kind: str) -> None:
    """Validation of every export, a fallback that keeps layers, and weights that end as without it."""
    states = []
    settings: dict[str, Any] = {"every_n_train_steps": 1, "scheme": "FP8_DYNAMIC"}
    for lora in (False, True):
        for judged in (True, False):
            callback = quantization(folder / f"{lora}-{judged}", validate=judged, **settings)
            options: dict[str, Any] = {"lora": lora, "num_sanity_val_steps": 0}
            trainer = fit(folder, kind, callback, held_out=data(4), **options)
            states.append({
                name: p.to_local() if isinstance(p, DTensor) else p
                for name, p in trainer.lightning_module.state_dict().items()
            })  # fmt: skip
            if judged:
                note(folder, f"lora={lora}", callback, trainer)
        one, two = states[-2:]
        assert all(torch.equal(one[name], two[name]) for name in two)
    gate: dict[str, Any] = {"max_degradation": {"val_loss": 1e-9}, "on_failure": "fallback"}
    callback = quantization(folder / "kept", validate=True, schemes=["keep:2"], **gate, **settings)
    said = ""
    try:
        fit(folder, kind, callback, held_out=data(4), num_sanity_val_steps=0)
    except RuntimeError as error:
        said = str(error)
    (folder / f"kept{rank()}").write_text(said)


def survival(folder: Path, kind: str) -> None:
    """What is logged of the survival: of full runs by blocks and by rows, and of LoRA."""
    global HIDDEN
    HIDDEN = 512  # so that the shards of two ranks are whole blocks
    from daq_lightning.training.survival import Survival

    kept: list[torch.Tensor] = []
    measured = Survival._measured

    def keeping(self: Survival) -> torch.Tensor:
        sums = measured(self)
        whole = sums.clone()
        if self._sample.live.sharded:
            dist.all_reduce(whole)
        kept.append(whole)
        return sums

    Survival._measured = keeping  # type: ignore[method-assign]
    found = {}
    for run, settings, lora in (
        ("full", {"scheme": "FP8_BLOCK"}, False),
        ("rows", {"scheme": "FP8_DYNAMIC"}, False),
        ("lora", {"scheme": "FP8_BLOCK"}, True),
    ):
        callback = quantization(folder / run, log_survival_every_n_steps=2, **settings)
        trainer = fit(folder / run, kind, callback, lora=lora)
        for name in ("daq/survival", "daq/survival_searched"):
            found[f"{run}-{name}"] = float(trainer.callback_metrics[name])
        if rank() == 0:
            torch.save(kept[-1], folder / f"{run}.pt")
    (folder / f"survival{rank()}.json").write_text(json.dumps(found))


def survival_of_flat_shards(folder: Path, kind: str) -> None:
    """FSDP1 is refused before the first step."""
    said = ""
    try:
        fit(folder, kind, quantization(folder, log_survival_every_n_steps=1))
    except MisconfigurationException as error:
        said = str(error)
    (folder / f"said{rank()}").write_text(said)


def note(folder: Path, name: str, callback: DeltaAwareQuantization, trainer: L.Trainer) -> None:
    """Writes what a user reads on this rank."""
    shared = {key: float(value) for key, value in trainer.callback_metrics.items() if "daq/" in key}
    figures = dict(callback.metrics)
    for clock in ("daq/search_seconds", "daq/export_seconds"):  # of two runs, never the same
        assert shared.pop(clock) > 0
        assert figures.pop(clock) > 0
    assert callback.report is not None
    content = {
        "exports": [path.name for path in callback.exports],
        "metrics": figures,
        "trainer": shared,
        "tensors": callback.report.to_dict()["tensors"],
    }
    (folder / f"{name}-rank{rank()}.json").write_text(json.dumps(content))


def rank() -> int:
    return int(os.environ.get("LOCAL_RANK", 0))


def launch(
    script: str,
    arguments: list[str],
    world: int,
    timeout: float = 280,
    kill: Callable[[list[subprocess.Popen[str]]], None] | None = None,
) -> list[tuple[int, str]]:
    """Starts the ranks of a script, each in a process group of its own; exit code and output of each."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes = []
    for local in range(world):
        environment = {
            "LOCAL_RANK": str(local), "NODE_RANK": "0", "RANK": str(local), "WORLD_SIZE": str(world),
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1",
        }  # fmt: skip
        if world == 1:
            environment = {"OMP_NUM_THREADS": "1"}
        command = [sys.executable, *([script] if script.endswith(".py") else ["-m", script]), *arguments]
        processes.append(
            subprocess.Popen(
                command, env=os.environ | environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                text=True, start_new_session=True,
            )
        )  # fmt: skip
    end = time.monotonic() + timeout
    if kill is not None:
        kill(processes)
    results = []
    try:
        for process in processes:
            output, _ = process.communicate(timeout=max(1.0, end - time.monotonic()))
            results.append((process.returncode, output))
    except subprocess.TimeoutExpired:
        for process in processes:
            os.killpg(process.pid, signal.SIGKILL)
        shown = "\n".join(process.communicate()[0][-3000:] for process in processes)
        raise AssertionError(f"a rank did not end within {timeout} s:\n{shown}") from None
    return results


if __name__ == "__main__":
    scenario, kind, place = sys.argv[1:]
    known = (everything, bases, failing, identical, without_checkpoints, left_alone, validated)
    known += (survival, survival_of_flat_shards)
    {run.__name__: run for run in known}[scenario](Path(place), kind)
    end_process_group()
