"""A run that collects the curvature of its weights trains as if it did not, and exports codes along it."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import lightning.pytorch as L
import peft
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from live import Tuning, data, fit, make_trainer, tiny_llama

from daq_lightning import DeltaAwareQuantization, ExportReport, load_checkpoint
from daq_lightning.audit.recompute import differences, recompute
from daq_lightning.export.ranks import ALONE
from daq_lightning.model.observer import Layer
from daq_lightning.model.parts import in_parts
from daq_lightning.numerics.rounding.sums import KroneckerSum
from daq_lightning.training import collecting, curvature
from daq_lightning.training.collecting import batches_left

BATCH = 2 * 7
"""Tokens of a batch that a loss depends on: of two sequences of eight, the last predict nothing."""


def quantization(folder: Path, **changes) -> DeltaAwareQuantization:
    settings = {"dirpath": str(folder / "exports"), "rounding": "curvature"}
    return DeltaAwareQuantization(**(settings | changes))


def adapted() -> Tuning:
    config = peft.LoraConfig(r=4, lora_alpha=16, target_modules=["q_proj", "down_proj"])
    torch.manual_seed(5)
    return Tuning(peft.get_peft_model(tiny_llama(), config), learning_rate=1e-2)  # type: ignore[arg-type]


class Manual(Tuning):
    """Steps the optimizer itself."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()


def sources(report: ExportReport) -> set[str]:
    return {tensor.rounding.source for tensor in report.tensors}


def in_16_bit(overflows: bool = False) -> MixedPrecision:
    """As on a GPU: the loss is scaled by 2^10; at first by 2^40, which overflows in float16, if asked for."""
    first, factor = (2.0**40, 2.0**-30) if overflows else (2.0**10, 0.5)
    scaler = torch.amp.GradScaler("cpu", init_scale=first, backoff_factor=factor)
    return MixedPrecision("16-mixed", "cpu", scaler=scaler)  # type: ignore[arg-type]


RUNS = {
    "full": (Tuning, {}),
    "lora": (adapted, {}),
    "accumulated": (Tuning, {"accumulate_grad_batches": 2, "max_steps": 2}),
    "bf16": (Tuning, {"precision": "bf16-mixed"}),
    "manual": (Manual, {"max_steps": -1, "max_epochs": 1}),
    "clipped": (Tuning, {"gradient_clip_val": 0.1}),
    "16": (Tuning, {"plugins": in_16_bit}),
    "16, lora": (adapted, {"plugins": in_16_bit}),
    "16, accumulated": (Tuning, {"plugins": in_16_bit, "accumulate_grad_batches": 2, "max_steps": 2}),
    "16, manual": (Manual, {"plugins": in_16_bit, "max_steps": -1, "max_epochs": 1}),
}


@pytest.mark.parametrize("kind", RUNS)
def test_training_is_bit_identical_while_statistics_are_collected(tmp_path, kind):
    make, changes = RUNS[kind]
    plugins = changes.get("plugins", list)  # anew for each run
    callback = quantization(tmp_path)
    with_it = fit(tmp_path, callback, module=make(), **(changes | {"plugins": plugins()}))
    random_with = torch.get_rng_state()
    optimizer_with = with_it.trainer.optimizers[0].state_dict()["state"]
    without = fit(tmp_path, module=make(), **(changes | {"plugins": plugins()}))
    assert torch.equal(torch.get_rng_state(), random_with)
    for (name, one), two in zip(with_it.named_parameters(), without.parameters(), strict=True):
        assert torch.equal(one, two), name
    for one, two in zip(
        optimizer_with.values(), without.trainer.optimizers[0].state_dict()["state"].values(), strict=True
    ):
        assert torch.equal(one["exp_avg"], two["exp_avg"])
    assert sources(callback.report) == {"activations" if "lora" in kind else "activations and update"}
    assert not any(part._forward_hooks for part in with_it.modules())
    for tensor in callback.report.tensors:
        assert tensor.rounding.loss <= tensor.rounding.nearest_loss
        assert tensor.rounding.tokens > 0
    assert callback.report.tensors[-1].rounding.tokens == 4 * BATCH


class Sums(L.Callback):
    """What was collected, before it is let go."""

    def __init__(self, export: DeltaAwareQuantization) -> None:
        self.export, self.found = export, {}

    def on_train_end(self, trainer, pl_module):
        run = self.export._run
        owners = {tensor.spec.name: 0 for tensor in run._job.plan.tensors}
        self.found = dict(run.collector.curvature(owners))


def test_gradients_of_a_scaled_loss_are_those_of_a_plain_one(tmp_path):
    found = []
    for plugins in ([], [in_16_bit()]):
        export = quantization(tmp_path)
        sums = Sums(export)
        fit(tmp_path, sums, export, max_steps=1, plugins=plugins)
        found.append(sums.found)
    plain, scaled = found
    for name in plain:
        size = plain[name].outputs.norm()
        assert (scaled[name].outputs - plain[name].outputs).norm() < 0.02 * size
        assert scaled[name].tokens == pytest.approx(plain[name].tokens, abs=2)  # of 8 bits less


def test_a_step_that_overflows_is_left_out_and_counted(tmp_path):
    callback = quantization(tmp_path)
    with_it = fit(tmp_path, callback, plugins=[in_16_bit(overflows=True)])
    assert callback.report.tensors[-1].rounding.tokens == 3 * BATCH
    assert all(tensor.rounding.left_out for tensor in callback.report.tensors)
    without = fit(tmp_path, plugins=[in_16_bit(overflows=True)])
    assert all(torch.equal(*pair) for pair in zip(with_it.parameters(), without.parameters(), strict=True))


def test_an_adapted_layer_has_a_gradient_where_nothing_before_it_is_trained(tmp_path):
    callback = quantization(tmp_path)
    fit(tmp_path, callback, module=adapted())
    damping = {tensor.name.split(".")[-2]: tensor.rounding.damping_out for tensor in callback.report.tensors}
    assert damping["q_proj"] == damping["down_proj"] == 0.01  # both sides
    assert damping["k_proj"] == damping["v_proj"] == 0.1  # inputs alone


def test_a_trained_copy_of_a_module_is_observed(tmp_path):
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["down_proj"])
    torch.manual_seed(5)
    model = peft.get_peft_model(tiny_llama(), config)  # type: ignore[arg-type]
    callback = quantization(tmp_path)
    fit(tmp_path, callback, module=Tuning(model))
    found = {tensor.name.split(".")[-2]: tensor.rounding for tensor in callback.report.tensors}
    assert found["down_proj"].method == "curvature"
    assert found["down_proj"].tokens == 4 * BATCH
    assert found["down_proj"].damping_out == 0.01  # both sides


def test_the_report_holds_what_the_files_say(tmp_path):
    tiny_llama().save_pretrained(tmp_path / "base")
    callback = quantization(tmp_path, base=str(tmp_path / "base"))
    trained = fit(tmp_path, callback)
    post = {name.removeprefix("model."): tensor for name, tensor in trained.state_dict().items()}
    found = recompute(callback.report, post, load_checkpoint(tmp_path / "base"))
    assert differences(callback.report, found) == {}
    assert "rounded along their curvature" in callback.report.summary()
    assert 0 < callback.metrics["daq/predicted_loss"] < 0.5
    assert 'rounding="curvature"' in (callback.exports[0] / "README.md").read_text()


def test_auto_collects_unless_a_search_is_asked_for(tmp_path):
    auto = DeltaAwareQuantization(dirpath=str(tmp_path / "auto"))
    searched = DeltaAwareQuantization(dirpath=str(tmp_path / "searched"), metric="cosine")
    fit(tmp_path, auto, searched)
    assert sources(auto.report) == {"activations and update"}
    assert all(tensor.rounding is None for tensor in searched.report.tensors)


def test_the_last_batches_are_observed(tmp_path, monkeypatch):
    seen = []
    original = curvature.observe
    monkeypatch.setattr(curvature, "observe", lambda *a: seen.append(trainer.global_step) or original(*a))
    trainer = make_trainer(tmp_path, quantization(tmp_path, curvature_steps=2), max_steps=10, max_epochs=-1)
    trainer.fit(Tuning(), data())
    assert seen == [7, 8]  # and one to spare


def test_parts_that_fit_the_memory_take_turns_and_files_are_removed(tmp_path, caplog):
    callback = quantization(tmp_path, curvature_memory="300 kB", curvature_steps=1)
    with caplog.at_level("INFO"):
        fit(tmp_path, callback)
    assert "7 weights in 4 parts, 262 kB of sums at a time" in caplog.text
    assert sources(callback.report) == {"activations and update"}
    assert {tensor.rounding.tokens for tensor in callback.report.tensors[-1:]} == {BATCH}
    assert sorted(path.name for path in (tmp_path / "exports").iterdir()) == ["base", "step=4"]


def test_a_run_that_is_too_short_says_which_weights_were_not_seen(tmp_path):
    callback = quantization(tmp_path, curvature_memory="300 kB")
    fit(tmp_path, callback, module=adapted(), max_steps=1)
    kept = [tensor for tensor in callback.report.tensors if tensor.rounding.reason]
    assert 0 < len(kept) < 7
    assert any("no token reached it" in note and kept[0].name in note for note in callback.report.notes)


def test_a_weight_that_needs_more_than_the_memory_is_named_before_training(tmp_path, caplog):
    callback = quantization(tmp_path, curvature_memory="140 kB")
    with caplog.at_level("INFO"):
        fit(tmp_path, callback)
    assert "need more than curvature_memory" in caplog.text
    assert sources(callback.report) == {"update", "activations and update"}


def test_exports_before_the_end_have_statistics_too(tmp_path):
    callback = quantization(tmp_path, every_n_train_steps=2, curvature_steps=1)
    fit(tmp_path, callback)
    for folder in callback.exports:
        report = ExportReport.load(folder)
        assert sources(report) == {"activations and update"}
        assert report.tensors[-1].rounding.tokens == BATCH


def test_a_resumed_run_collects_anew_and_says_so(tmp_path, caplog):
    saver = ModelCheckpoint(
        dirpath=tmp_path / "saved", every_n_train_steps=2, save_top_k=-1, filename="{step}"
    )
    fit(tmp_path, saver, quantization(tmp_path), max_steps=2)
    callback = quantization(tmp_path)
    with caplog.at_level("INFO"):
        fit(tmp_path, callback, ckpt=tmp_path / "saved" / "step=2.ckpt", max_steps=4)
    assert "collected anew in this resumed run" in caplog.text
    assert callback.report.tensors[-1].rounding.tokens == 2 * BATCH


def test_the_best_checkpoint_is_rounded_along_what_the_run_collected(tmp_path):
    saver = ModelCheckpoint(dirpath=tmp_path / "saved", monitor="train_loss", every_n_train_steps=1)
    callback = quantization(tmp_path, which="best")
    fit(tmp_path, saver, callback)
    assert sources(callback.report) == {"activations and update"}


def test_two_layers_with_one_weight_add_up(tmp_path):
    class Twice(Tuning):
        def __init__(self) -> None:
            super().__init__(torch.nn.Sequential(*(torch.nn.Linear(16, 16, bias=False) for _ in range(2))))
            self.model[1].weight = self.model[0].weight

        def training_step(self, batch, batch_idx):
            return self.model(batch.float() @ torch.ones(8, 16)).square().mean()

    callback = quantization(tmp_path)
    fit(tmp_path, callback, module=Twice())
    assert {tensor.rounding.tokens for tensor in callback.report.tensors} == {2 * 4 * 2}


class Padded(Tuning):
    """Half of each sequence has no label."""

    def training_step(self, batch, batch_idx):
        labels = batch.clone()
        labels[:, 4:] = -100
        return self.model(input_ids=batch, labels=labels).loss


def test_tokens_that_say_nothing_are_dropped(tmp_path):
    callback = quantization(tmp_path)
    fit(tmp_path, callback, module=Padded())
    # the last label is that of token 3: of the last tokens nothing depends on
    assert {tensor.rounding.tokens for tensor in callback.report.tensors[-1:]} == {4 * 2 * 3}


class Diverging(Tuning):
    """One batch has a gradient of NaN, and its step is skipped."""

    def on_before_optimizer_step(self, optimizer):
        if any(p.grad is not None and not p.grad.isfinite().all() for p in self.parameters()):
            optimizer.zero_grad()

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        return loss * torch.nan if batch_idx == 2 else loss


def test_a_batch_with_nan_is_skipped_and_said(tmp_path):
    callback = quantization(tmp_path)
    fit(tmp_path, callback, module=Diverging())
    assert {tensor.rounding.tokens for tensor in callback.report.tensors[-1:]} == {3 * BATCH}
    assert all(tensor.rounding.left_out for tensor in callback.report.tensors)
    assert any("NaN or Inf were left out" in note for note in callback.report.notes)


def test_a_compiled_model_is_refused_or_rounded_to_nearest(tmp_path, caplog):
    compiled = Tuning()
    compiled.model.model.layers[0].compile(backend="eager")
    with pytest.raises(MisconfigurationException, match="compiled model does not call hooks"):
        fit(tmp_path, quantization(tmp_path), module=compiled)
    assert compiled.steps == 0
    with caplog.at_level("INFO"):
        callback = quantization(tmp_path, rounding="auto")
        fit(tmp_path, callback, module=compiled)
    assert "rounded to nearest, not along a curvature" in caplog.text
    assert callback.report.tensors[0].rounding is None


def test_a_compiled_lightning_module_is_refused_too(tmp_path):
    compiled = torch.compile(Tuning(), backend="eager")
    with pytest.raises(MisconfigurationException, match="compiled model does not call hooks"):
        fit(tmp_path, quantization(tmp_path), module=compiled)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"rounding": "up"}, "rounding='up'"),
        ({"curvature": "hessian"}, "curvature='hessian'"),
        ({"curvature_memory": "2 apples"}, "such as '2 GB'"),
        ({"curvature_memory": 0}, "such as '2 GB'"),
        ({"curvature_steps": 0}, "curvature_steps=0"),
    ],
)
def test_wrong_arguments_are_said_at_once(wrong, message):
    with pytest.raises(MisconfigurationException, match=message):
        DeltaAwareQuantization(**wrong)


def test_batches_left_are_known_where_the_end_is(tmp_path):
    def trainer(*callbacks: L.Callback, **state):
        defaults = {
            "callbacks": list(callbacks), "num_training_batches": 10, "max_epochs": 2, "current_epoch": 0,
            "max_steps": -1, "global_step": 0, "accumulate_grad_batches": 1,
            "lightning_module": SimpleNamespace(automatic_optimization=True),
        }  # fmt: skip
        return SimpleNamespace(**(defaults | state))

    assert batches_left(trainer(), 3) == 17
    assert batches_left(trainer(max_steps=5, global_step=2), 3) == 3
    assert batches_left(trainer(max_steps=5, accumulate_grad_batches=4), 1) == 19
    assert batches_left(trainer(num_training_batches=float("inf")), 0) is None
    assert batches_left(trainer(max_epochs=-1), 0) is None
    assert batches_left(trainer(EarlyStopping(monitor="x")), 0) is None
    manual = SimpleNamespace(automatic_optimization=False)
    assert batches_left(trainer(max_steps=5, lightning_module=manual), 0) is None


def test_parts_hold_whole_groups_and_what_fits():
    def layer(name: str, group: str, m: int, n: int) -> Layer:
        return Layer(name=name, group=group, shape=(m, n), modules=())

    layers = [layer("q", "a", 8, 8), layer("o", "o", 8, 8), layer("k", "a", 8, 8), layer("w", "w", 64, 8)]
    parts, too_large = in_parts(layers, 4 * 64 * 5)
    assert [[one.name for one in part] for part in parts] == [["q", "k", "o"]]
    assert too_large == ["w"]
    assert [[one.name for one in part] for part in in_parts(layers, 4 * 64 * 4)[0]] == [["q", "k"], ["o"]]


@pytest.mark.parametrize("curvature", ["activations", "gradients"])
@pytest.mark.parametrize("calls", [0, 9, 16])
def test_a_run_goes_on_where_memory_ends(tmp_path, monkeypatch, recwarn, curvature, calls):
    done = []

    def ends(original):
        def add(self, *arguments):
            done.append(1)
            if len(done) > calls:
                raise torch.OutOfMemoryError("no memory")
            return original(self, *arguments)

        return add

    for name in ("add", "add_step"):
        monkeypatch.setattr(KroneckerSum, name, ends(getattr(KroneckerSum, name)))
    callback = quantization(tmp_path, curvature=curvature)
    with_it = fit(tmp_path, callback)
    assert len(done) == calls + 1  # it was not tried again
    without = fit(tmp_path)
    for (name, one), two in zip(with_it.named_parameters(), without.parameters(), strict=True):
        assert torch.equal(one, two), name
    assert not any(part._forward_hooks for part in with_it.modules())
    said = [str(one.message) for one in recwarn if "No more curvature is collected" in str(one.message)]
    assert len(said) == 1
    assert "no memory" in said[0]
    assert ("update" in sources(callback.report)) == (calls < 14)  # which one batch needs
    assert (f"{curvature} and update" in sources(callback.report)) == (calls > 0)


class AsksFirst(L.Callback):
    """Lets an export be made before its callback takes the hooks of the batch away."""

    def __init__(self, export: DeltaAwareQuantization) -> None:
        self.export, self.hooked = export, 0

    def on_train_batch_end(self, trainer, pl_module, *_):
        self.hooked += any(part._forward_hooks for part in pl_module.modules())
        self.export._consider("step", trainer)


class Validated(Tuning):
    """Has a validation, with random numbers."""

    def validation_step(self, batch, batch_idx):
        torch.rand(3)
        self.log("val_loss", self.model(input_ids=batch, labels=batch).loss)


@pytest.mark.parametrize("model", [tiny_llama, lambda: adapted().model], ids=["full", "lora"])
def test_validation_is_not_observed_and_changes_nothing(tmp_path, model):
    files, states, reports = [], [], []
    for validate in (False, True):
        folder = tmp_path / str(validate)
        export = quantization(folder, rounding="auto", every_n_train_steps=2, validate=validate)
        first, module = AsksFirst(export), Validated(model())
        L.seed_everything(3, verbose=False)
        make_trainer(folder, first, export, num_sanity_val_steps=0).fit(module, data(), data())
        assert first.hooked >= 2
        files.append([(path / "model.safetensors").read_bytes() for path in export.exports])
        states.append([*module.state_dict().values(), torch.get_rng_state()])
        reports.append(export.report)
    assert len(files[0]) == 2
    assert files[0] == files[1]
    assert all(torch.equal(one, two) for one, two in zip(*states, strict=True))
    assert reports[0].tensors == reports[1].tensors
    assert {tensor.rounding.method for tensor in reports[1].tensors} == {"curvature"}
    assert "val_loss" in reports[1].validation


def test_a_fallback_is_rounded_along_the_same_statistics(tmp_path):
    fallback = {"max_degradation": {"val_loss": 1.0}, "on_failure": "fallback", "schemes": ["FP8_DYNAMIC"]}
    export = quantization(tmp_path, scheme="FP8_BLOCK", validate=True, **fallback)
    seen = {}

    def look_at(self, figures, modes):
        seen[len(seen)] = figures
        return ["it is the first"] if len(seen) == 1 else []

    module = Validated()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("daq_lightning.training.gate.ValidationSettings.failures", look_at)
        make_trainer(tmp_path, export, num_sanity_val_steps=0).fit(module, data(), data())
    alone = quantization(tmp_path / "alone", scheme="FP8_DYNAMIC")
    make_trainer(tmp_path / "alone", alone, num_sanity_val_steps=0).fit(Validated(), data(), data())
    assert len(seen) == 2
    assert export.report.scheme == "FP8_DYNAMIC"
    assert export.report.tensors == alone.report.tensors
    assert sources(export.report) == {"activations and update"}


def test_fallbacks_of_several_ranks_are_rounded_along_a_curvature_too(tmp_path):
    fallback = {
        "validate": True, "max_degradation": {"val_loss": 1.0}, "on_failure": "fallback",
        "schemes": ["keep:1"],
    }  # fmt: skip
    model = torch.nn.Linear(2, 2)
    alone, several = (
        SimpleNamespace(
            strategy=SimpleNamespace(model=model),
            lightning_module=model,
            world_size=size,
            enable_validation=True,
        )
        for size in (1, 2)
    )
    required = quantization(tmp_path, **fallback)._settings
    assert collecting.settled(required, alone).choices.rounding == "curvature"
    for choice in ({}, {"rounding": "auto"}, {"curvature": "gradients"}):
        settings = quantization(tmp_path, **choice, **fallback)._settings
        assert collecting.settled(settings, several).choices.rounding == "curvature"


def test_collecting_costs_nothing_in_other_batches(tmp_path):
    trainer = make_trainer(tmp_path, quantization(tmp_path, curvature_steps=1), max_steps=6, max_epochs=-1)
    hooked = []

    class Looks(L.Callback):
        def on_after_backward(self, trainer, pl_module):
            hooked.append(any(part._forward_hooks for part in pl_module.modules()))

    trainer.callbacks.append(Looks())
    trainer.fit(Tuning(), data())
    assert hooked == [False] * 4 + [True, False]
    assert ALONE.size == 1
