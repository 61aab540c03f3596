"""Curvature from validation: its sums are those of NumPy, and the run goes on as if it had not been taken."""

from __future__ import annotations

import copy
from functools import partial
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as L
import numpy as np
import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from live import Tuning, data, fit, make_trainer, tiny_llama
from test_curvature import adapted, quantization, sources
from torch import Tensor, nn

from daq_lightning.export.collected import AllCollected, Collected
from daq_lightning.model.fusion import shared_input
from daq_lightning.model.live import LiveModel
from daq_lightning.model.parts import in_parts
from daq_lightning.training.from_validation import observe_validation
from daq_lightning.training.observed import layers_of, observe


class Validated(Tuning):
    """A validation with random numbers, dropout and a buffer, that returns its loss in one of many ways."""

    returns = "loss"
    error: type[BaseException] | None = None

    def __init__(self, model: nn.Module | None = None) -> None:
        super().__init__(model)
        self.register_buffer("validations", torch.zeros(()))
        self.norm = nn.BatchNorm1d(8)

    def validation_step(self, batch: Any, batch_idx: int) -> Any:
        self.validations += 1
        if self.returns == "labels":  # they stand in the batch, and the loss is computed nowhere
            self.model(input_ids=batch["ids"])
            return None
        self.norm.train()(torch.rand(4, 8))
        if self.error is not None and batch_idx == 1:
            raise self.error("in validation")
        labelled = {} if self.returns == "logits" else {"labels": batch}
        output = self.model(input_ids=batch, **labelled)
        if labelled:
            self.log("val_loss", output.loss)
        return {
            "loss": lambda: output.loss,
            "dict": lambda: {"loss": output.loss, "other": 1},
            "model": lambda: None,
            "logits": lambda: output.logits,
        }[self.returns]()


def labelled(rows: list[Tensor]) -> dict[str, Tensor]:
    return {"ids": torch.stack(rows), "labels": torch.stack(rows)}


def held_out(length: int = 6, **settings: Any) -> torch.utils.data.DataLoader[Any]:
    generator = torch.Generator().manual_seed(11)
    return torch.utils.data.DataLoader(
        torch.randint(1, 32, (length, 8), generator=generator), batch_size=2, **settings
    )  # type: ignore[arg-type]


def everything(trainer: L.Trainer) -> dict[str, Any]:
    """All that a validation could change."""
    module = trainer.lightning_module
    return copy.deepcopy({
        "state": module.state_dict(),
        "gradients": [parameter.grad for parameter in module.parameters()],
        "needs": [parameter.requires_grad for parameter in module.parameters()],
        "optimizer": trainer.optimizers[0].state_dict(),
        "modes": [part.training for part in module.modules()],
        "hooks": [len(part._forward_hooks) for part in module.modules()],
        "random": torch.get_rng_state(),
        "loops": trainer.fit_loop.state_dict(),
        "metrics": trainer.callback_metrics,
        "stage": trainer.state.stage,
        "callbacks": len(trainer.callbacks),  # type: ignore[attr-defined]
    })  # fmt: skip


def is_same(one: Any, other: Any) -> bool:
    """Equal to the last bit, whatever it is made of."""
    if isinstance(one, Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(is_same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(is_same, one, other))
    return one == other


class Probes(L.Callback):
    """Observes a validation after the second batch, and compares."""

    def __init__(self, memory: int = 10**9, steps: int = 2) -> None:
        self.memory, self.steps = memory, steps
        self.found: dict[int, Collected] = {}
        self.model: nn.Module | None = None
        self.batches = 0
        self.error: BaseException | None = None

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step != 2:
            return
        live = LiveModel(pl_module, "model")
        planned = [
            SimpleNamespace(spec=spec, together=shared_input(spec.name))
            for spec in live.specs
            if "_proj" in spec.name
        ]
        layers = layers_of(live, planned, experts=True)  # type: ignore[arg-type]
        parts, _ = in_parts(layers, self.memory)
        before = everything(trainer)
        self.model = copy.deepcopy(pl_module.model)
        try:
            self.batches = observe_validation(
                trainer, live.model, dict(enumerate(parts)), self.steps, observe=observe,
                keep=lambda part, sums: self.found.update({part: Collected.of(sums)}),
            )  # fmt: skip
        except (RuntimeError, KeyboardInterrupt, ValueError) as error:
            self.error = error
        after = everything(trainer)
        for name in before:
            assert is_same(after[name], before[name]), name


def run(folder, *callbacks: L.Callback, module: Validated | None = None, **changes: Any) -> Validated:
    L.seed_everything(3, verbose=False)
    module = Validated() if module is None else module
    validation = held_out(collate_fn=labelled) if module.returns == "labels" else held_out()
    make_trainer(folder, *callbacks, num_sanity_val_steps=0, **changes).fit(module, data(), validation)
    return module


def assert_same_run(one: Validated, other: Validated) -> None:
    for (name, tensor), same in zip(one.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(tensor, same), name
    for name, state in one.trainer.optimizers[0].state_dict()["state"].items():
        same = other.trainer.optimizers[0].state_dict()["state"][name]
        assert all(torch.equal(state[key], same[key]) for key in state)


@pytest.mark.parametrize("error", [None, RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("model", [tiny_llama, lambda: adapted().model], ids=["full", "lora"])
def test_nothing_of_a_run_changes_whatever_happens_in_it(tmp_path, error, model):
    module, probe = Validated(model()), Probes()
    module.error = error
    probed = run(tmp_path, probe, module=module, check_val_every_n_epoch=9)
    assert (type(probe.error) is error) if error else probe.batches == 2
    random = torch.get_rng_state()
    assert_same_run(probed, run(tmp_path, module=Validated(model()), check_val_every_n_epoch=9))
    assert torch.equal(random, torch.get_rng_state())


def expected(model: nn.Module, batches: list[Tensor]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """x^T x and y^T y in float64, of a copy of the model in evaluation."""
    model = model.double().eval()
    layers = {name: part for name, part in model.named_modules() if name.endswith("_proj")}
    sums = {}
    for batch in batches:
        seen: dict[str, tuple[Tensor, Tensor]] = {}

        def see(name: str, seen: dict, _: nn.Module, args: Any, out: Tensor) -> None:
            seen[name] = (args[0], out)

        handles = [part.register_forward_hook(partial(see, name, seen)) for name, part in layers.items()]
        loss = model(input_ids=batch, labels=batch).loss
        for handle in handles:
            handle.remove()
        gradients = torch.autograd.grad(loss, [out for _, out in seen.values()])
        for (name, (x, _)), y in zip(seen.items(), gradients, strict=True):
            used = (y != 0).any(-1)
            a, b = x[used].detach().numpy(), y[used].numpy()
            before = sums.get(name, (0, 0))
            sums[name] = (before[0] + a.T @ a, before[1] + b.T @ b)
    return sums


@pytest.mark.parametrize("returns", ["loss", "dict", "model", "labels"])
def test_sums_are_those_of_numpy_and_layers_take_turns(tmp_path, returns):
    """Four parts, two batches each, of three that there are: they come again."""
    module, probe = Validated(), Probes(memory=300_000)
    module.returns = returns
    run(tmp_path, probe, module=module, check_val_every_n_epoch=9)
    assert len(probe.found) == 4
    assert probe.batches == 8
    batches = list(held_out())
    turns = [[batches[0], batches[1]], [batches[2], batches[0]], [batches[1], batches[2]], batches[:2]]
    for part, turn in zip(sorted(probe.found), turns, strict=True):
        sums = expected(copy.deepcopy(probe.model), turn)
        found = AllCollected([probe.found[part]], "validation")
        for name, one in found.items():
            inputs, outputs = sums[name.removesuffix(".weight")]
            np.testing.assert_allclose(one.inputs.numpy(), inputs, rtol=1e-3, atol=1e-5 * inputs.max())
            np.testing.assert_allclose(one.outputs.numpy(), outputs, rtol=1e-3, atol=1e-4 * outputs.max())
            assert one.tokens == 2 * 2 * 7 or ".q_proj" in name  # a first token attends to itself alone


def test_more_batches_than_there_are_are_not_seen_twice(tmp_path):
    probe = Probes(steps=10)
    run(tmp_path, probe, check_val_every_n_epoch=9)
    assert probe.batches == 3


@pytest.mark.parametrize("model", [tiny_llama, lambda: adapted().model], ids=["full", "lora"])
def test_codes_are_rounded_along_validation_and_the_run_is_the_same(tmp_path, model, caplog):
    export = quantization(tmp_path, curvature="validation", every_n_train_steps=2)
    with caplog.at_level("INFO"):
        with_it = run(tmp_path, export, module=Validated(model()))
    random = torch.get_rng_state()
    assert_same_run(with_it, run(tmp_path, module=Validated(model())))
    assert torch.equal(random, torch.get_rng_state())
    assert len(export.exports) == 2
    assert {source.partition(" ")[0] for source in sources(export.report)} == {"validation"}
    assert {tensor.rounding.tokens for tensor in export.report.tensors[-1:]} == {3 * 2 * 7}
    assert "from 3 batches of validation" in caplog.text
    assert "from validation at an export" in caplog.text


def test_what_another_callback_takes_from_validation_is_not_observed_in_training(tmp_path):
    """The first exports while the hooks of the second are there."""
    first = quantization(tmp_path / "first", curvature="validation", every_n_train_steps=3)
    second = quantization(tmp_path / "second", curvature="activations")
    run(tmp_path, first, second)
    alone = quantization(tmp_path / "alone", curvature="activations")
    run(tmp_path, alone)
    assert len(first.exports) == 2
    assert second.report.tensors == alone.report.tensors


def test_auto_takes_from_validation_what_a_short_run_did_not_see(tmp_path, caplog):
    export = quantization(tmp_path, curvature_memory="300 kB")
    with caplog.at_level("INFO"):
        run(tmp_path, export, max_steps=2)
    found = {tensor.rounding.source for tensor in export.report.tensors}
    assert found == {"activations and update", "validation and update"}
    assert "what no batch was observed for is taken from validation" in caplog.text
    assert "batches of validation" in caplog.text


def test_auto_takes_validation_where_memory_ends_in_training(tmp_path, monkeypatch):
    def fails(*_):
        raise torch.OutOfMemoryError("no memory")

    with monkeypatch.context() as patch:
        patch.setattr("daq_lightning.training.curvature.Collector.end_batch", fails)
        export = quantization(tmp_path)
        with pytest.warns(UserWarning, match="No more curvature"):
            run(tmp_path, export)
    assert sources(export.report) == {"validation and update"}


def test_after_an_error_nothing_is_taken_from_validation(tmp_path):
    """Other ranks may be gone: an export of what is left waits for none."""

    class Fails(Validated):
        def on_train_batch_end(self, outputs, batch, batch_idx):
            if batch_idx == 2:
                raise RuntimeError("in training")

    module, export = Fails(), quantization(tmp_path, curvature="validation", export_on_exception=True)
    with pytest.raises(RuntimeError, match="in training"):
        run(tmp_path, export, module=module)
    assert sources(export.report) == {"update"}
    assert not module.validations


def test_a_compiled_model_is_observed_in_validation(tmp_path, caplog):
    module = Validated()
    module.model.model.layers[0].compile(backend="eager")
    export = quantization(tmp_path)
    with caplog.at_level("INFO"):
        run(tmp_path, export, module=module)
    assert "from validation, not in training: a compiled model" in caplog.text
    assert sources(export.report) == {"validation and update"}


def test_without_validation_it_is_refused_or_rounded_to_nearest(tmp_path, caplog):
    module = Validated()
    with pytest.raises(MisconfigurationException, match="needs a validation_step"):
        fit(tmp_path, quantization(tmp_path, curvature="validation"), module=module)
    assert module.steps == 0
    export = quantization(tmp_path, curvature="validation", rounding="auto")
    with caplog.at_level("INFO"):
        fit(tmp_path, export, module=module)
    assert "rounded to nearest, not along a curvature" in caplog.text


def test_a_validation_without_a_loss_is_named_and_the_export_goes_on(tmp_path):
    module = Validated()
    module.returns = "logits"
    export = quantization(tmp_path, curvature="validation")
    with pytest.warns(UserWarning, match="validation_step returns no loss"):
        run(tmp_path, export, module=module)
    assert sources(export.report) == {"update"}


class WithoutGradients(Validated):
    """Computes nothing that could be differentiated."""

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        with torch.no_grad():
            self.model(input_ids=batch)


def test_a_validation_that_computes_without_gradients_is_named(tmp_path):
    export = quantization(tmp_path, curvature="validation")
    with pytest.warns(UserWarning, match="no loss with a gradient"):
        run(tmp_path, export, module=WithoutGradients())
