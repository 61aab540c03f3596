"""Scales of an FP8 cache from the validation of a run: those of the exported weights, on all ranks, and
the run does not notice."""

from __future__ import annotations

import copy
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import numpy as np
import pytest
import torch
import transformers
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from live import Tuning, data, make_trainer, tiny_llama
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import DataLoader

from daq_lightning import CheckpointError, DeltaAwareQuantization, ExportReport, ScaleSearch, load_checkpoint
from daq_lightning.audit.verify import verify_checkpoint
from daq_lightning.numerics.kv_cache import cache_scale, cached

QUICK = ScaleSearch(metric="cosine", n_coarse=2, n_fine=0)
TOKENS = torch.randint(1, 32, (6, 8), generator=torch.Generator().manual_seed(11))


def held_out() -> DataLoader[Any]:
    return DataLoader(TOKENS, batch_size=2)  # type: ignore[arg-type]


def quantization(folder: Path, **changes: Any) -> DeltaAwareQuantization:
    settings = {
        "dirpath": str(folder / "exports"),
        "search": QUICK,
        "scheme": "FP8A16",
        "kv_cache": "fp8-calibrated",
    }
    return DeltaAwareQuantization(**(settings | changes))


def fit(folder: Path, *callbacks: L.Callback, module: Tuning | None = None, **changes: Any) -> Tuning:
    module = Tuning(tiny_llama(num_hidden_layers=2)) if module is None else module
    L.seed_everything(3, verbose=False)
    trainer = make_trainer(folder, *callbacks, **({"num_sanity_val_steps": 0} | changes))
    trainer.fit(module, data(), held_out())
    return module


def scales_of(folder: Path) -> np.ndarray:
    stored = load_file(folder / "model.safetensors")
    names = [name for name in stored if name.endswith(("k_scale", "v_scale"))]
    return np.array([stored[name].item() for name in sorted(names)]).reshape(-1, 2)


def scales_by_numpy(model: Any, batches: Any = None) -> np.ndarray:
    """From what transformers' own cache holds of each batch."""
    peaks = []
    for batch in held_out() if batches is None else batches:
        cache = transformers.DynamicCache()
        with torch.no_grad():
            model.eval()(input_ids=batch, past_key_values=cache, use_cache=True)
        parts = [(layer.keys, layer.values) for layer in cache.layers]
        peaks.append([[np.abs(part.float().numpy()).max() for part in pair] for pair in parts])
    largest = np.max(np.array(peaks), axis=0)
    return cache_scale(torch.from_numpy(largest)).double().numpy()


def lora() -> nn.Module:
    torch.manual_seed(5)
    model = tiny_llama(num_hidden_layers=2)
    return get_peft_model(model, LoraConfig(r=4, target_modules=["k_proj", "down_proj"]))  # type: ignore[arg-type]


@pytest.mark.parametrize("make", [lambda: tiny_llama(num_hidden_layers=2), lora], ids=["plain", "lora"])
def test_scales_are_those_of_the_cache_of_transformers_over_all_validation_batches(tmp_path, make):
    module = fit(tmp_path, quantization(tmp_path), module=Tuning(make()))
    out = tmp_path / "exports" / "step=4"
    assert np.array_equal(scales_of(out), scales_by_numpy(module.model))
    report = ExportReport.load(out).kv_cache
    assert report is not None
    assert (report.found_on, report.tokens) == ("the run's validation data", TOKENS.numel())
    assert not verify_checkpoint(out)
    assert 'kv_cache="fp8-calibrated"' in (out / "README.md").read_text()


def test_each_export_has_the_scales_of_its_own_weights(tmp_path):
    """The best checkpoint is not the last one, and is exported when training is over."""
    saver = ModelCheckpoint(dirpath=tmp_path, monitor="val_loss", mode="min", save_top_k=1)
    many = quantization(tmp_path, which="best")
    trained = fit(tmp_path, saver, many, max_steps=-1, max_epochs=2, val_check_interval=2)
    (out,) = (tmp_path / "exports").glob("step=*")
    best = copy.deepcopy(trained)
    state = torch.load(saver.best_model_path, weights_only=True)["state_dict"]
    assert any(not torch.equal(value, trained.state_dict()[name]) for name, value in state.items())
    best.load_state_dict(state)
    assert np.array_equal(scales_of(out), scales_by_numpy(best.model))
    assert not np.array_equal(scales_of(out), scales_by_numpy(trained.model))


class Remembers(L.Callback):
    """All that the next step may depend on, at each step."""

    def __init__(self) -> None:
        self.seen: list[Any] = []

    def on_train_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
        state = {name: value.clone() for name, value in module.state_dict().items()}
        modes = [part.training for part in module.modules()]
        self.seen.append((state, torch.get_rng_state(), modes, dict(trainer.callback_metrics)))


def assert_same_run(one: Remembers, other: Remembers) -> None:
    assert len(one.seen) == len(other.seen) > 0
    for (state, random, modes, metrics), expected in zip(one.seen, other.seen, strict=True):
        assert all(torch.equal(value, expected[0][name]) for name, value in state.items())
        assert torch.equal(random, expected[1])
        assert modes == expected[2]
        assert {key: float(value) for key, value in metrics.items() if not key.startswith("daq/")} == {
            key: float(value) for key, value in expected[3].items()
        }


def hooks_of(module: nn.Module) -> list[Any]:
    return [hook for part in module.modules() for hook in part._forward_pre_hooks.values()]


def test_training_does_not_notice(tmp_path):
    plain, observed = Remembers(), Remembers()
    fit(tmp_path / "plain", plain)
    module = fit(tmp_path / "observed", quantization(tmp_path, every_n_train_steps=1), observed)
    assert len(list((tmp_path / "exports").glob("step=*"))) == 4
    assert_same_run(observed, plain)
    assert not hooks_of(module)


def test_without_scales_there_is_no_export_and_training_goes_on_as_it_was(tmp_path):
    class Failing(Tuning):
        def validation_step(self, batch: Tensor, batch_idx: int) -> None:
            super().validation_step(batch, batch_idx)
            if batch_idx == 1:
                raise RuntimeError("no more data")

    plain, observed = Remembers(), Remembers()
    fit(tmp_path / "plain", plain)
    module = Failing(tiny_llama(num_hidden_layers=2))
    callback = quantization(tmp_path, every_n_train_steps=2)
    with pytest.warns(UserWarning, match="no more data"), pytest.raises(RuntimeError, match="no more data"):
        # the fit's own validation never comes
        fit(tmp_path / "o", callback, observed, module=module, check_val_every_n_epoch=100)
    assert_same_run(observed, plain)
    assert not hooks_of(module)
    assert not list((tmp_path / "exports").glob("step=*"))


def test_a_model_whose_layers_are_not_run_is_not_exported_and_they_are_named(tmp_path):
    class Elsewhere(Tuning):
        def validation_step(self, batch: Tensor, batch_idx: int) -> None:
            self.log("val_loss", self.model.get_input_embeddings()(batch).mean())

    module = Elsewhere(tiny_llama(num_hidden_layers=2))
    named = r"Nothing entered the caches of model.layers.0.self_attn, model.layers.1.self_attn"
    with pytest.warns(UserWarning, match=named), pytest.raises(ValueError, match=named):
        fit(tmp_path, quantization(tmp_path), module=module)


def test_what_is_validated_is_a_server_with_an_fp8_cache(tmp_path):
    """The oracle: the dequantized weights of the files, and a cache of transformers that rounds."""
    module = fit(tmp_path, quantization(tmp_path, validate=True))
    out = tmp_path / "exports" / "step=4"
    scales = scales_of(out)

    class Rounding(transformers.DynamicCache):
        def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any):
            keys, values = (
                cached(part, scale)
                for part, scale in zip((key_states, value_states), scales[layer_idx], strict=True)
            )
            return super().update(keys, values, layer_idx, *args, **kwargs)

    model: Any = copy.deepcopy(module.model)
    weights = load_checkpoint(out, torch.float32)
    model.load_state_dict({name: weights[name].float() for name in weights})
    losses, without = [], []
    with torch.no_grad():
        for batch in held_out():
            losses.append(model(input_ids=batch, labels=batch, past_key_values=Rounding()).loss.item())
            without.append(model(input_ids=batch, labels=batch).loss.item())
    served = ExportReport.load(out).validation["val_loss"]["served"]
    assert served == pytest.approx(np.mean(losses), abs=1e-6)
    assert abs(np.mean(losses) - np.mean(without)) > 1e-5


@pytest.mark.parametrize(
    ("changes", "trainer", "message"),
    [
        ({}, {"limit_val_batches": 0}, "kv_cache='fp8-calibrated' runs the Trainer's validation"),
        ({"export_on_exception": True}, {}, "leave export_on_exception out"),
        ({"kv_cache": "e5m2"}, {}, "kv_cache='e5m2': expected one of None, 'fp8', 'fp8-calibrated'"),
    ],
)
def test_what_cannot_be_calibrated_is_said_before_the_first_step(tmp_path, changes, trainer, message):
    with pytest.raises(MisconfigurationException, match=message):
        fit(tmp_path, quantization(tmp_path, **changes), **trainer)


def test_a_model_without_such_a_cache_is_refused_before_the_first_step(tmp_path):
    module = Tuning(nn.Sequential(nn.Embedding(32, 8), nn.Linear(8, 32)))
    with pytest.raises(CheckpointError, match="no attention that transformers knows"):
        fit(tmp_path, quantization(tmp_path), module=module)
    assert module.steps == 0


@pytest.mark.slow
def test_two_processes_have_the_largest_of_both(tmp_path):
    process = subprocess.Popen(
        [sys.executable, __file__, str(tmp_path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    try:
        output, _ = process.communicate(timeout=150)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    assert process.returncode == 0, output
    model = tiny_llama(num_hidden_layers=2)
    model.load_state_dict(torch.load(tmp_path / "model0.pt", weights_only=True))
    by_rank = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(2)]
    each = [scales_by_numpy(model, map(torch.tensor, batches)) for batches in by_rank]
    found = scales_of(tmp_path / "exports" / "step=4")
    assert np.array_equal(found, np.maximum(*each))
    assert all((found > one).any() for one in each), "one rank alone has all of the largest"


def _two_processes(folder: Path) -> None:
    class Telling(Tuning):
        batches: Any = ()

        def on_validation_epoch_start(self) -> None:
            self.batches = []

        def validation_step(self, batch: Tensor, batch_idx: int) -> None:
            super().validation_step(batch, batch_idx)
            self.batches.append(batch.tolist())

        def on_validation_epoch_end(self) -> None:
            (folder / f"rank{self.global_rank}.json").write_text(json.dumps(self.batches))
            torch.save(self.model.state_dict(), folder / f"model{self.global_rank}.pt")

    module = Telling(tiny_llama(num_hidden_layers=2))
    fit(folder, quantization(folder), module=module, strategy="ddp_fork", devices=2)


if __name__ == "__main__":
    _two_processes(Path(sys.argv[1]))
