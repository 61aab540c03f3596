"""float64 weights, which no FP8 reader knows, are exported as their float32 copies would be; the report says
so."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from live import Tuning, fit, tiny_llama
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from daq_lightning import DeltaAwareQuantization, ScaleSearch, export_checkpoint
from daq_lightning.cli import main

QUICK = ScaleSearch(metric="cosine", n_coarse=3, n_fine=0)


def pair(folder: Path, dtype: torch.dtype) -> tuple[Path, Path]:
    """A base and a trained model; float64 ones hold values that float32 does not have."""
    model = tiny_llama().double()
    generator = torch.Generator().manual_seed(1)
    for name in ("base", "post"):
        with torch.no_grad():
            for parameter in model.parameters():
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.add_(noise * 1e-3)
        saved = tiny_llama().to(dtype)
        saved.load_state_dict(model.state_dict())
        saved.save_pretrained(folder / name)
    return folder / "base", folder / "post"


def quantized(folder: Path) -> dict[str, torch.Tensor]:
    tensors = load_file(folder / "model.safetensors")
    return {
        name: t
        for name, t in tensors.items()
        if name + "_scale_inv" in tensors or name.endswith("_scale_inv")
    }


def test_folders_in_float64_give_the_codes_and_scales_of_their_float32_copies(tmp_path):
    found = {}
    for dtype in (torch.float32, torch.float64):
        base, post = pair(tmp_path / str(dtype), dtype)
        report = export_checkpoint(post, base, tmp_path / str(dtype) / "out", search=QUICK)
        found[dtype] = (quantized(tmp_path / str(dtype) / "out"), report)
    (expected, _), (actual, report) = found[torch.float32], found[torch.float64]
    assert set(actual) == set(expected)
    assert len(actual) == 14
    assert all(
        torch.equal(actual[name].view(torch.uint8), expected[name].view(torch.uint8)) for name in expected
    )
    assert report.metrics() == found[torch.float32][1].metrics()
    assert "7 weights are float64: they were searched and measured as float32." in report.notes
    out = tmp_path / "torch.float64" / "out"
    post = load_file(tmp_path / "torch.float64" / "post" / "model.safetensors")
    for name in ("lm_head.weight", "model.norm.weight"):
        assert torch.equal(load_file(out / "model.safetensors")[name], post[name].bfloat16()), name
    _, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not info["missing_keys"]
    assert main(["verify", str(out)]) == 0


def test_a_stage_that_follows_a_float64_export_finds_its_weights_and_is_measured_since_the_root(tmp_path):
    base, post = pair(tmp_path, torch.float64)
    export_checkpoint(post, base, tmp_path / "one", search=QUICK)
    model = AutoModelForCausalLM.from_pretrained(post)
    assert model.dtype == torch.float64
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.001)
    model.save_pretrained(tmp_path / "next")
    report = export_checkpoint(
        tmp_path / "next",
        post,
        tmp_path / "two",
        search=QUICK,
        parent=str(tmp_path / "one"),
        chain_from="weights",
    )
    assert report.totals("root") is not None
    assert main(["chain", str(tmp_path / "two")]) == 0


def test_a_few_float64_tensors_of_a_16_bit_checkpoint_are_stored_in_its_dtype(tmp_path):
    weights = {name: tensor.bfloat16() for name, tensor in tiny_llama().state_dict().items()}
    weights["model.norm.weight"] = weights["model.norm.weight"].double() + 1e-9
    base = {name: tensor.double() * 0.99 for name, tensor in weights.items()}
    export_checkpoint(weights, base, tmp_path / "out", search=QUICK)
    stored = load_file(tmp_path / "out" / "model.safetensors")["model.norm.weight"]
    assert torch.equal(stored, weights["model.norm.weight"].bfloat16())


@pytest.mark.parametrize("base", ["snapshot", "memory", "auto with LoRA"])
def test_a_model_that_trains_in_float64_is_exported(tmp_path, base):
    model = tiny_llama().double()
    if base == "auto with LoRA":
        model = get_peft_model(model, LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    callback = DeltaAwareQuantization(dirpath=str(tmp_path / "exports"), search=QUICK, base=base.split()[0])
    module = fit(tmp_path, callback, module=Tuning(model))
    assert next(module.parameters()).dtype == torch.float64
    loaded, info = AutoModelForCausalLM.from_pretrained(callback.exports[0], output_loading_info=True)
    assert not info["missing_keys"]
    live = module.model.merge_and_unload() if base == "auto with LoRA" else module.model
    for name, weight in live.state_dict().items():
        limit = float(weight.abs().max()) * 2**-8
        assert torch.allclose(loaded.state_dict()[name].double(), weight, rtol=2**-4, atol=limit), name
