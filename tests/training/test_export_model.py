"""An export without a Trainer is that of the same weights in a folder, whatever is around the model, and only
reads it."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import text_models
import tiny_models
import torch
import transformers
from installed import needs_add_adapter
from lightning.fabric import Fabric
from lightning.fabric.strategies import ModelParallelStrategy
from live import end_process_group, folder_bytes, tiny_llama
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from daq_lightning import ScaleSearch, export_checkpoint, export_model

QUICK: dict[str, Any] = {"search": ScaleSearch(metric="cosine", n_coarse=3, n_fine=0)}
TOKENS = torch.arange(3, 19).view(2, 8)
NAMING = ("README.md", "daq_manifest.json", "daq_report.json")  # files that name the folder or the base


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The folders of a base and of its fine-tuned model."""
    folder = tmp_path_factory.mktemp("pair")
    return tiny_models.make_pair(folder, lambda: tiny_models.llama(num_hidden_layers=1))


def loaded(folder: Path, **more: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, **more)


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(input_ids=TOKENS).logits.float()


def trained(model: nn.Module, fabric: Fabric) -> nn.Module:
    """The model as Fabric wraps it, after one step."""
    wrapped, optimizer = fabric.setup(model, torch.optim.SGD(model.parameters(), lr=0.5))
    fabric.backward(wrapped(input_ids=TOKENS, labels=TOKENS).loss)
    optimizer.step()
    return wrapped


@pytest.mark.parametrize("around", ["nothing", "fabric", "compiled", "module"])
def test_files_are_those_of_the_same_weights_in_a_folder(
    around: str, pair: tuple[Path, Path], tmp_path: Path
) -> None:
    base, post = pair
    export_checkpoint(post, base, tmp_path / "folder", **QUICK)
    module: Any = loaded(post)
    if around == "fabric":
        module = Fabric(accelerator="cpu", devices=1).setup(module)
    elif around == "compiled":
        module = torch.compile(module)
    elif around == "module":
        module = nn.ModuleDict({"critic": nn.Linear(4, 4), "actor": module})
    export_model(module, base, tmp_path / "model", **QUICK)
    expected, found = (load_file(tmp_path / name / "model.safetensors") for name in ("folder", "model"))
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name
    served = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("folder", "model"))
    assert next(served) == next(served)


def test_a_fabric_loop_exports_what_transformers_reads_as_the_trained_model(
    pair: tuple[Path, Path], tmp_path: Path
) -> None:
    base, _ = pair
    before = logits(loaded(base))
    model = trained(loaded(base, dtype="float32"), Fabric(accelerator="cpu", devices=1))
    tokenizer = AutoTokenizer.from_pretrained(text_models.save_tokenizer(tmp_path))
    export_model(model, base, tmp_path / "fp8", tokenizer=tokenizer)
    plain = transformers.FineGrainedFP8Config(dequantize=True)
    served = logits(loaded(tmp_path / "fp8", quantization_config=plain))
    assert float((served - logits(model)).norm()) < 0.2 * float((logits(model) - before).norm())
    assert AutoTokenizer.from_pretrained(tmp_path / "fp8").get_vocab() == tokenizer.get_vocab()


def test_a_copied_state_is_a_base_like_the_folder(pair: tuple[Path, Path], tmp_path: Path) -> None:
    base, post = pair
    model = nn.ModuleDict({"actor": loaded(base)})
    state = copy.deepcopy(model.state_dict())
    model["actor"].load_state_dict(loaded(post).state_dict())
    export_model(model, state, tmp_path / "state", **QUICK)
    export_model(model, base, tmp_path / "folder", **QUICK)
    assert folder_bytes(tmp_path / "state", NAMING) == folder_bytes(tmp_path / "folder", NAMING)


def test_the_model_is_only_read(pair: tuple[Path, Path], tmp_path: Path) -> None:
    model: Any = trained(loaded(pair[0]), Fabric(accelerator="cpu", devices=1))
    model.lm_head.eval()
    model.lm_head.weight.requires_grad_(False)

    def seen() -> list[Any]:
        modes = [part.training for part in model.modules()]
        tensors = [(one.detach().clone(), one.requires_grad, one.grad.clone()) for one in model.parameters()]
        return [modes, tensors, torch.get_rng_state(), torch.is_grad_enabled()]

    before = seen()
    export_model(model, pair[0], tmp_path / "fp8", **QUICK)
    torch.testing.assert_close(seen(), before, rtol=0, atol=0)


@pytest.mark.parametrize("injected", [False, True])
def test_adapters_merge_as_peft_does_and_are_their_own_base(
    injected: bool, pair: tuple[Path, Path], tmp_path: Path
) -> None:
    config = LoraConfig(target_modules=["q_proj", "up_proj"], init_lora_weights=False)
    models = [loaded(pair[0], dtype="float32") for _ in range(2)]
    torch.manual_seed(0)
    adapted: Any = get_peft_model(models[0], config)
    torch.manual_seed(0)
    if injected:
        needs_add_adapter()
        models[1].add_adapter(config)
    else:
        models[1] = get_peft_model(models[1], config)
    export_model(models[1], "auto", tmp_path / "live", **QUICK)
    adapted.merge_and_unload().save_pretrained(tmp_path / "merged")
    export_checkpoint(tmp_path / "merged", pair[0], tmp_path / "folder", **QUICK)
    expected, found = (
        loaded(folder, quantization_config=transformers.FineGrainedFP8Config(dequantize=True)).state_dict()
        for folder in (tmp_path / "folder", tmp_path / "live")
    )
    for name, weight in expected.items():
        assert float((found[name] != weight).float().mean()) < 1e-3, (
            name
        )  # PEFT adds in float32, ours in float64


def test_adapters_that_are_not_merged_lie_beside_the_frozen_model(
    pair: tuple[Path, Path], tmp_path: Path
) -> None:
    model = get_peft_model(loaded(pair[0]), LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    with pytest.warns(UserWarning, match="No weight changed"):
        export_model(model, "auto", tmp_path / "fp8", merge_adapters=False, **QUICK)
    assert (tmp_path / "fp8" / "adapter" / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize(
    ("base", "more", "message"),
    [
        ("own", {}, "shares memory with the model"),
        ("auto", {}, "copy.deepcopy"),
        ("memory", {}, "copy.deepcopy"),
        ("base", {"kv_cache": "fp8-calibrated"}, "kv_text=FILE"),
        ("base", {"submodule": "critic"}, "no such submodule"),
        ("base", {"scheme": "FP9"}, "FP9"),
        ("base", {"device": "meta"}, "device='meta'"),
    ],
)
def test_what_cannot_be_exported_is_refused_and_writes_nothing(
    base: str, more: dict[str, Any], message: str, pair: tuple[Path, Path], tmp_path: Path
) -> None:
    model = loaded(pair[0])
    given: Any = {"own": model.state_dict(), "base": pair[0]}.get(base, base)
    with pytest.raises(ValueError, match=message):
        export_model(model, given, tmp_path / "out", **more)
    assert list(tmp_path.iterdir()) == []


def test_of_two_models_one_has_to_be_named(pair: tuple[Path, Path], tmp_path: Path) -> None:
    both = nn.ModuleDict({"actor": loaded(pair[1]), "critic": loaded(pair[1])})
    with pytest.raises(ValueError, match="actor, critic"):
        export_model(both, pair[0], tmp_path / "out", **QUICK)
    assert export_model(both, pair[0], tmp_path / "out", submodule="critic", **QUICK).tensors


@pytest.mark.slow
def test_two_ranks_write_the_files_of_one(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*command, __file__, str(tmp_path)], capture_output=True, text=True, timeout=150, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    model = loaded(tmp_path / "post")
    export_model(model, tmp_path / "base", tmp_path / "one", max_shard_bytes=100_000, **QUICK)
    assert len(list((tmp_path / "one").glob("*.safetensors"))) == 2
    for strategy in ("fsdp2", "ddp"):
        assert folder_bytes(tmp_path / strategy, NAMING) == folder_bytes(tmp_path / "one", NAMING), strategy


def _two_ranks(folder: Path) -> None:
    """A step with Fabric and FSDP2, then the same weights under DDP."""
    strategy: Any = ModelParallelStrategy(_shard, process_group_backend="gloo")
    fabric = Fabric(accelerator="cpu", devices=2, strategy=strategy)
    fabric.launch()
    model: Any = tiny_llama()
    if fabric.is_global_zero:
        model.save_pretrained(folder / "base")
    wrapped: Any = fabric.setup_module(model)
    optimizer = fabric.setup_optimizers(torch.optim.AdamW(wrapped.parameters(), lr=0.1))
    fabric.backward(wrapped(input_ids=TOKENS, labels=TOKENS).loss)
    optimizer.step()
    fabric.barrier()
    with pytest.raises(ValueError, match="sharded"):
        export_model(wrapped, copy.deepcopy(wrapped.state_dict()), folder / "fsdp2", **QUICK)
    whole = tiny_llama()
    whole.load_state_dict({name: tensor.full_tensor() for name, tensor in wrapped.state_dict().items()})
    if fabric.is_global_zero:  # it sets a dtype in the config of this rank
        whole.save_pretrained(folder / "post")
    for name, one in {"fsdp2": wrapped, "ddp": nn.parallel.DistributedDataParallel(whole)}.items():
        export_model(one, folder / "base", folder / name, max_shard_bytes=100_000, **QUICK)
    end_process_group()


def _shard(model: Any, mesh: Any) -> Any:
    from torch.distributed.fsdp import fully_shard

    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh["data_parallel"])
    return fully_shard(model, mesh=mesh["data_parallel"])


if __name__ == "__main__":
    _two_ranks(Path(sys.argv[1]))
