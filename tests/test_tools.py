"""What other tools leave behind becomes a checkpoint in two lines, as docs/recipes.md says.

transformers' Trainer and Fabric are always tested. Other tools are no dependency: their tests are skipped
where they are not installed (`pip install --no-deps trl litgpt datasets`).
"""

from __future__ import annotations

import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import text_models
import tiny_models
import torch
import transformers
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from daq_lightning import ExportReport, export_checkpoint, load_checkpoint
from daq_lightning.cli import main

ROOT = Path(__file__).resolve().parent.parent
TOKENS = torch.arange(3, 19).view(2, 8)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A model folder with a tokenizer, and a text beside it."""
    folder, _ = tiny_models.make_pair(tmp_path, lambda: tiny_models.llama(num_hidden_layers=1))
    text_models.save_tokenizer(folder)
    text_models.write_text(tmp_path / "text.txt", letters=700)
    return folder


@pytest.fixture
def recipe(monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Any]]:
    """Runs a recipe as a script does."""

    def run(name: str, *arguments: object) -> dict[str, Any]:
        path = str(ROOT / "recipes" / name)
        monkeypatch.setattr(sys, "argv", [path, *map(str, arguments)])
        return runpy.run_path(path, run_name="__main__")

    return run


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=TOKENS).logits


def check_export(out: Path, base: Path) -> ExportReport:
    """The folder verifies, holds an update, and computes in transformers what its dequantized weights do."""
    assert main(["verify", str(out)]) == 0
    plain = transformers.FineGrainedFP8Config(dequantize=True)
    served = AutoModelForCausalLM.from_pretrained(out, quantization_config=plain)
    twin = LlamaForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    twin.load_state_dict(dict(load_checkpoint(out)))
    assert torch.equal(logits(served), logits(twin))
    report = ExportReport.load(out)
    assert 0.9 < report.metrics()["gain"] < 1.1
    return report


def quantize(*arguments: object) -> None:
    assert main(["quantize", *map(str, arguments)]) == 0


@pytest.mark.parametrize("lora", [False, True])
def test_the_adapter_for_transformers_trainer_exports_the_trained_weights(
    lora: bool, base: Path, tmp_path: Path, recipe: Callable[..., dict[str, Any]]
) -> None:
    adapter = runpy.run_path(str(ROOT / "recipes" / "transformers_trainer.py"))["ExportQuantized"]
    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype="float32")
    if lora:
        model = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules="all-linear"))
    trainer = transformers.Trainer(
        model=model,
        args=transformers.TrainingArguments(
            str(tmp_path / "trainer"), max_steps=2, learning_rate=1e-2, report_to=[], save_strategy="no"
        ),
        train_dataset=[{"input_ids": row, "labels": row} for row in TOKENS],  # type: ignore[arg-type]
        processing_class=AutoTokenizer.from_pretrained(base),
        data_collator=transformers.default_data_collator,
        callbacks=[adapter("auto" if lora else str(base), str(tmp_path / "fp8"), scheme="FP8_BLOCK")],
    )
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    check_export(tmp_path / "fp8", base)
    if lora:
        quantize(base, "--adapter", tmp_path / "saved", "--out", tmp_path / "again")
    else:
        export_checkpoint(tmp_path / "saved", base, tmp_path / "again", scheme="FP8_BLOCK")
    expected, found = (load_file(tmp_path / name / "model.safetensors") for name in ("again", "fp8"))
    assert found.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())
    assert (tmp_path / "fp8" / "tokenizer.json").is_file()


@pytest.mark.parametrize("name", ["transformers_trainer.py", "fabric_loop.py"])
def test_a_recipe_trains_and_exports(
    name: str, base: Path, tmp_path: Path, recipe: Callable[..., dict[str, Any]]
) -> None:
    recipe(name, base, tmp_path / "text.txt", tmp_path / "fp8", "--steps", 2, "--lr", 1e-2, "--length", 64)
    check_export(tmp_path / "fp8", base)
    assert (tmp_path / "fp8" / "tokenizer.json").is_file()


@pytest.mark.parametrize("lora", [False, True])
def test_what_trl_saves(lora: bool, base: Path, tmp_path: Path) -> None:
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    tokenizer: Any = AutoTokenizer.from_pretrained(base)
    tokenizer.eos_token = tokenizer.pad_token = "<unk>"
    trainer = trl.SFTTrainer(
        str(base),
        args=trl.SFTConfig(
            str(tmp_path / "output"), max_steps=2, learning_rate=1e-2, report_to=[], use_cpu=True, bf16=False,
            max_length=32, save_strategy="no",
        ),
        train_dataset=datasets.Dataset.from_dict({"text": ["the cat sat on the mat"] * 16}),
        processing_class=tokenizer,
        peft_config=peft.LoraConfig(r=4, target_modules="all-linear") if lora else None,
    )  # fmt: skip
    trainer.train()
    trainer.save_model()
    if lora:
        quantize(base, "--adapter", tmp_path / "output", "--out", tmp_path / "fp8")
    else:
        quantize(tmp_path / "output", "--base", base, "--out", tmp_path / "fp8")
    check_export(tmp_path / "fp8", base)


@pytest.mark.parametrize("prefixed", [False, True])
def test_a_litgpt_checkpoint(
    prefixed: bool, base: Path, tmp_path: Path, recipe: Callable[..., dict[str, Any]]
) -> None:
    """LitGPT's own weights and forward are the oracle: it made the checkpoint from the folder, and trains."""
    pytest.importorskip("litgpt")
    from litgpt import GPT, Config
    from litgpt.scripts.convert_hf_checkpoint import copy_weights_hf_llama
    from litgpt.utils import save_config

    config = Config(
        name="tiny", n_layer=1, n_embd=128, n_head=2, n_query_groups=1, head_size=128, vocab_size=64,
        padded_vocab_size=64, block_size=64, bias=False, parallel_residual=False, norm_class_name="RMSNorm",
        norm_eps=1e-6, mlp_class_name="LLaMAMLP", intermediate_size=256, rotary_percentage=1.0,
    )  # fmt: skip
    state: dict[str, Any] = {}
    copy_weights_hf_llama(config, {}, state, load_file(base / "model.safetensors"))
    model = GPT(config)
    model.load_state_dict(state)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    torch.nn.functional.cross_entropy(model(TOKENS).flatten(0, 1), TOKENS.flatten()).backward()
    optimizer.step()
    out = tmp_path / "litgpt"
    out.mkdir()
    torch.save({"model": model.state_dict()} if prefixed else model.state_dict(), out / "lit_model.pth")
    save_config(config, out)
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (out / name).write_bytes((base / name).read_bytes())

    recipe("litgpt_export.py", out, base, tmp_path / "fp8")
    check_export(tmp_path / "fp8", base)
    served = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "fp8", dtype=torch.bfloat16)).float()
    before = logits(AutoModelForCausalLM.from_pretrained(base)).float()
    trained = model(TOKENS).detach()
    assert float((served - trained).norm()) < 0.3 * float((trained - before).norm())
