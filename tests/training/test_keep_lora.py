"""A LoRA run over a quantized base exports in the format and the scales of that base."""

from __future__ import annotations

import json
from pathlib import Path

import peft
import pytest
import torch
from live import Tuning, fit, tiny_llama

from daq_lightning import (
    CheckpointError,
    DeltaAwareQuantization,
    ScaleSearch,
    export_checkpoint,
    load_checkpoint,
)


@pytest.fixture
def base(tmp_path) -> Path:
    tiny_llama().bfloat16().save_pretrained(tmp_path / "plain")
    plain = tmp_path / "plain"
    export_checkpoint(plain, plain, tmp_path / "base", scheme="W4A16", search=ScaleSearch.absmax())
    return tmp_path / "base"


def over(base: Path) -> Tuning:
    model = tiny_llama()
    weights = {name: tensor.float() for name, tensor in load_checkpoint(base).items()}
    model.load_state_dict(weights, strict=False)
    torch.manual_seed(5)
    config = peft.LoraConfig(r=4, lora_alpha=16, target_modules=["q_proj", "down_proj"])
    return Tuning(peft.get_peft_model(model, config))  # type: ignore[arg-type]


@pytest.mark.parametrize("rounding", ["auto", "nearest"])
def test_a_run_exports_what_the_base_is(tmp_path, base, rounding):
    callback = DeltaAwareQuantization(
        dirpath=str(tmp_path / "exports"), base=str(base), scheme="keep", rounding=rounding
    )
    fit(tmp_path, callback, module=over(base))
    before, after = load_checkpoint(base).raw, load_checkpoint(callback.exports[0]).raw
    assert set(before) == set(after)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    adapted = {name for name in before if "packed" in name and ("q_proj" in name or "down_proj" in name)}
    assert changed <= adapted
    assert changed == adapted or rounding == "nearest"
    configs = [json.loads((folder / "config.json").read_text())["quantization_config"]
               for folder in (base, callback.exports[0])]  # fmt: skip
    assert configs[0] == configs[1]
    gain = callback.report.metrics()["gain"]
    assert gain == pytest.approx(1, abs=0.1) if rounding == "auto" else gain < 0.5


def test_a_base_that_is_not_named_is_asked_for_before_training(tmp_path, base):
    module = over(base)
    callback = DeltaAwareQuantization(dirpath=str(tmp_path / "exports"), scheme="keep")
    with pytest.raises(CheckpointError, match="pass base='<folder>'"):
        fit(tmp_path, callback, module=module)
    assert module.steps == 0
