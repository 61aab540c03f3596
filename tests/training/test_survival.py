"""The survival of the update: the figure of an outside computation, for every kind of run and base."""

from __future__ import annotations

import json
import math
import re
import warnings
from pathlib import Path
from types import SimpleNamespace

import ml_dtypes
import numpy as np
import peft
import pytest
import sharded_runs
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import FSDPStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from live import Tuning, data, fit, make_trainer, tiny_llama
from test_logging import Listening
from test_lora import adapted, float64_merge

from daq_lightning import (
    DeltaAwareQuantization,
    PerBlock,
    PerChannel,
    ScaleSearch,
    absmax_scale,
    dequantize,
    quantize,
)
from daq_lightning.model.live import LiveModel
from daq_lightning.model.pieces import LivePieces
from daq_lightning.numerics.objectives import DeltaStats
from daq_lightning.numerics.tiling import Box
from daq_lightning.training import survival as module
from daq_lightning.training.sample import PIECES, choose_pieces, piece_size
from daq_lightning.training.survival import survival_in, survival_of

QUICK = ScaleSearch(metric="cosine", n_coarse=3, n_fine=0)
LINEAR = re.compile(r"layers\.\d+\..*_proj\.weight")
NEVER_CLEAR = {"daq/survival", "daq/survival_searched"}


def watching(folder: Path, every: int = 1, **changes) -> DeltaAwareQuantization:
    settings = {"dirpath": str(folder / "exports"), "search": QUICK, "log_survival_every_n_steps": every}
    return DeltaAwareQuantization(**(settings | changes))


def on_the_grid(**changes):
    """A model whose weights are those of an FP8 checkpoint, as the base of DeepSeek-V3 is."""
    model = tiny_llama(**changes)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if LINEAR.search(name):
                scale = absmax_scale(weight, PerBlock())
                weight.copy_(dequantize(quantize(weight, scale, PerBlock()), scale, PerBlock()))
    return model


def linear(model) -> dict[str, np.ndarray]:
    """The weights that are quantized, in float64."""
    return {
        name: tensor.detach().double().numpy().copy()
        for name, tensor in model.state_dict().items()
        if LINEAR.search(name)
    }


def outside(weights: dict[str, np.ndarray], bases: dict[str, np.ndarray], scheme: str = "FP8_BLOCK") -> float:
    """The survival of whole weights, by NumPy in float64 and the FP8 numbers of ml_dtypes."""
    dot = delta_sq = 0.0
    for name, weight in weights.items():
        M, N = weight.shape
        rows, columns = (128, 128) if scheme == "FP8_BLOCK" else (1, N)
        groups = weight.reshape(M // rows, rows, N // columns, columns).astype(np.float32)
        scale = np.abs(groups).max((1, 3), keepdims=True) / np.float32(448)
        if scheme == "FP8_DYNAMIC":  # as its readers keep it
            scale = scale.astype(ml_dtypes.bfloat16).astype(np.float32)
        codes = np.clip(groups * (1 / scale), -448, 448).astype(ml_dtypes.float8_e4m3fn)
        served = (codes.astype(np.float64) * scale.astype(np.float64)).reshape(M, N)
        delta, delta_q = weight - bases[name], served - bases[name]
        dot += (delta * delta_q).sum()
        delta_sq += (delta**2).sum()
    return max(0.0, 1 - abs(dot / delta_sq - 1))


def values_of(logger: Listening, name: str = "daq/survival") -> dict[int, float]:
    return {step: metrics[name] for step, metrics in logger.told if name in metrics}


class Computing(Tuning):
    """Computes the survival outside, after every step."""

    def __init__(self, *arguments, scheme="FP8_BLOCK", **options):
        super().__init__(*arguments, **options)
        self.scheme, self.bases, self.expected = scheme, linear(self.model), {}

    def on_train_batch_end(self, *_):
        self.expected[self.global_step] = outside(linear(self.model), self.bases, self.scheme)


@pytest.mark.parametrize("scheme", ["FP8_BLOCK", "FP8_DYNAMIC"])
@pytest.mark.parametrize("grid", [False, True])
def test_it_is_that_of_an_outside_computation(tmp_path, scheme, grid):
    file, logger = CSVLogger(tmp_path), Listening()
    training = Computing(on_the_grid() if grid else tiny_llama(), learning_rate=2e-4, scheme=scheme)
    callback = watching(tmp_path, scheme=scheme)
    trainer = make_trainer(tmp_path, callback, logger=[file, logger])
    trainer.fit(training, data())
    assert values_of(logger) == pytest.approx(training.expected, rel=1e-5)
    assert sorted(values_of(logger)) == [1, 2, 3, 4]
    assert float(trainer.callback_metrics["daq/survival"]) == pytest.approx(training.expected[4], rel=1e-5)
    assert "daq/survival,daq/survival_searched" in Path(file.experiment.metrics_file_path).read_text()
    # this model is small enough to be sampled whole: so is the export
    for name, figure in (("daq/survival", "daq/absmax_gain"), ("daq/survival_searched", "daq/gain")):
        kept = max(0.0, 1 - abs(callback.metrics[figure] - 1))
        assert values_of(logger, name)[4] == pytest.approx(kept, rel=1e-5)


def test_what_the_search_of_the_export_would_keep_is_told_beside_it(tmp_path):
    logger = Listening()
    training = Tuning(on_the_grid(), learning_rate=2e-5)
    make_trainer(tmp_path, watching(tmp_path, search=ScaleSearch(tau=0.0)), logger=logger).fit(
        training, data()
    )
    plain, searched = (values_of(logger, name)[4] for name in ("daq/survival", "daq/survival_searched"))
    assert plain < 0.3
    assert searched > plain + 0.3


def test_of_a_lora_run_it_is_that_of_the_merged_weights(tmp_path):
    logger, training = Listening(), adapted()
    base = linear(tiny_llama())
    trainer = make_trainer(tmp_path, watching(tmp_path), logger=logger)
    trainer.fit(training, data())
    adapters = [name for name in base if "q_proj" in name or "down_proj" in name]
    merged = {name: float64_merge(training, name).numpy() for name in adapters}
    assert values_of(logger)[4] == pytest.approx(outside(merged, base), rel=1e-4)
    assert sorted(values_of(logger)) == [1, 2, 3, 4]


@pytest.mark.parametrize("changes", [{"use_dora": True}, {"modules_to_save": ["up_proj"]}])
def test_other_adapters_are_measured_as_they_are_exported(tmp_path, changes):
    callback, logger = watching(tmp_path), Listening()
    make_trainer(tmp_path, callback, logger=logger).fit(adapted(**changes), data())
    # the pieces are the adapted weights, whole; of the others no update is added to the sums of the export
    kept = max(0.0, 1 - abs(callback.metrics["daq/absmax_gain"] - 1))
    assert values_of(logger)[4] == pytest.approx(kept, rel=1e-4)


@pytest.mark.parametrize("dora", [False, True])
def test_any_piece_of_an_adapted_weight_is_that_of_the_whole(dora):
    config = peft.LoraConfig(r=4, lora_alpha=16, target_modules=["q_proj"], use_dora=dora)
    torch.manual_seed(5)
    training = Tuning(peft.get_peft_model(tiny_llama(hidden=256), config))  # type: ignore[arg-type]
    with torch.no_grad():
        for name, parameter in training.named_parameters():
            if "lora_" in name:
                parameter.add_(0.1 * torch.sin(torch.arange(parameter.numel()).float()).view_as(parameter))
    name = "model.layers.0.self_attn.q_proj.weight"
    model = LiveModel(training)
    live, whole = LivePieces(model), model.weights[name]
    assert live.trained(model.weights) == [name]
    for box in (Box(0, 256, 0, 256), Box(128, 256, 0, 128), Box(0, 128, 128, 256), Box(3, 7, 11, 200)):
        piece = live.read(name, box)
        assert torch.allclose(piece, whole[box.top : box.bottom, box.left : box.right], rtol=1e-6, atol=1e-8)
    assert live.read(name, None) is None


def test_the_base_of_a_resumed_run_is_the_one_it_started_from(tmp_path):
    saver = ModelCheckpoint(
        dirpath=tmp_path / "checkpoints", every_n_train_steps=2, save_top_k=-1, filename="{step}"
    )
    whole, resumed = Listening(), Listening()
    fit(tmp_path, saver, watching(tmp_path), logger=whole)
    checkpoint = tmp_path / "checkpoints" / "step=2.ckpt"
    fit(tmp_path, watching(tmp_path), logger=resumed, ckpt=checkpoint, module=Tuning(tiny_llama(seed=9)))
    assert sorted(values_of(resumed)) == [3, 4]
    assert values_of(resumed).keys() < values_of(whole).keys()
    state = torch.load(checkpoint, weights_only=True)["state_dict"]
    assert "model.model.layers.0.mlp.up_proj.weight" in state
    training = Computing()
    training.load_state_dict(state)
    fit(tmp_path / "again", module=training, ckpt=checkpoint)
    assert values_of(resumed) == pytest.approx(training.expected, rel=1e-5)


def test_bases_in_folders_and_files_give_the_same(tmp_path):
    saver = ModelCheckpoint(dirpath=tmp_path / "checkpoints", save_last=True)
    fit(tmp_path, saver, module=Tuning(learning_rate=0.0))
    tiny_llama().save_pretrained(tmp_path / "base")
    found = []
    for base in ("snapshot", "memory", str(tmp_path / "base"), str(tmp_path / "checkpoints" / "last.ckpt")):
        logger = Listening()
        fit(tmp_path, watching(tmp_path, base=base), logger=logger, module=Tuning(learning_rate=1e-5))
        found.append(values_of(logger))
    assert 4 in found[0]
    assert found[0] == found[1] == found[2] == found[3]


def test_a_base_that_is_not_where_training_began_is_the_one_that_counts(tmp_path):
    other = tiny_llama(seed=0)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(1e-3 * torch.sin(torch.arange(parameter.numel()).float()).reshape(parameter.shape))
    other.save_pretrained(tmp_path / "base")
    logger, training = Listening(), Computing()
    training.bases = linear(other)
    callback = watching(tmp_path, base=str(tmp_path / "base"))
    make_trainer(tmp_path, callback, logger=logger).fit(training, data())
    assert values_of(logger) == pytest.approx(training.expected, rel=1e-5)


def test_with_a_reference_that_moves_on_so_does_the_base(tmp_path):
    logger, training = Listening(), Computing(on_the_grid(), learning_rate=2e-4)
    rebased = watching(tmp_path, reference="previous_checkpoint", every_n_train_steps=2)
    bases = {}

    class Keep(Tuning):
        def on_train_batch_end(self, *_):
            bases[self.global_step] = linear(self.model)

    training = Keep(on_the_grid(), learning_rate=2e-4)
    make_trainer(tmp_path, rebased, logger=logger).fit(training, data())
    assert values_of(logger)[4] == pytest.approx(outside(bases[4], bases[2]), rel=1e-5)


def test_training_is_bit_identical_with_and_without_it(tmp_path):
    one = fit(tmp_path / "one", watching(tmp_path, every=1))
    random, optimizer = torch.get_rng_state(), one.trainer.optimizers[0].state_dict()["state"]
    two = fit(tmp_path / "two")
    assert torch.equal(torch.get_rng_state(), random)
    for (name, mine), theirs in zip(one.named_parameters(), two.parameters(), strict=True):
        assert torch.equal(mine, theirs), name
        assert mine.requires_grad == theirs.requires_grad
    for mine, theirs in zip(
        optimizer.values(), two.trainer.optimizers[0].state_dict()["state"].values(), strict=True
    ):
        assert all(torch.equal(mine[key], theirs[key]) for key in mine)


def test_it_is_measured_every_n_optimizer_steps_and_nothing_is_in_between(tmp_path, monkeypatch):
    steps, original = [], module.search_scale

    def counted(*arguments, **options):
        steps.append(training.global_step)
        return original(*arguments, **options)

    monkeypatch.setattr(module, "search_scale", counted)
    training, logger = Tuning(), Listening()
    trainer = make_trainer(
        tmp_path, watching(tmp_path, every=2), logger=logger, accumulate_grad_batches=2, max_steps=5
    )
    trainer.fit(training, data(32))
    assert sorted(values_of(logger)) == [2, 4]
    assert sorted(set(steps)) == [2, 4]


def test_without_an_update_nothing_is_logged(tmp_path):
    logger = Listening()
    trainer = make_trainer(tmp_path, watching(tmp_path), logger=logger)
    with pytest.warns(UserWarning, match="No weight changed"):
        trainer.fit(Tuning(learning_rate=0.0), data())
    assert values_of(logger) == {}
    assert all(metrics for _, metrics in logger.told)
    assert not NEVER_CLEAR & set(trainer.callback_metrics)


def test_a_run_that_has_diverged_goes_on_and_logs_no_figure(tmp_path):
    class Diverging(Tuning):
        def on_before_optimizer_step(self, optimizer):
            if self.global_step == 1:
                self.model.model.layers[0].mlp.up_proj.weight.data[0, 0] = math.nan

    logger = Listening()
    with pytest.raises(ValueError, match="has diverged"):  # of the export, when all is over
        fit(tmp_path, watching(tmp_path), logger=logger, module=Diverging())
    assert sorted(values_of(logger)) == [1]


# the warning


def warned(folder: Path, module, callback=None, **changes) -> list[str]:
    callback = watching(folder) if callback is None else callback
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        make_trainer(folder, callback, **({"max_steps": 6} | changes)).fit(module, data(16))
    return [str(one.message) for one in caught if "daq/survival" in str(one.message)]


def test_a_learning_rate_too_small_to_survive_is_said_once_and_in_time(tmp_path):
    [said] = warned(tmp_path, Tuning(on_the_grid(), learning_rate=1e-6))
    assert said.startswith("At step 1, plain FP8 would round away or distort 100% of what training")
    assert "What this export's search of scales would keep cannot be told yet." in said
    [said] = warned(
        tmp_path / "without an end", Tuning(on_the_grid(), learning_rate=1e-5), max_epochs=1, max_steps=-1
    )
    assert said.startswith("At step 3,")


def test_of_codes_along_a_curvature_the_warning_foretells_nothing(tmp_path):
    module = Tuning(on_the_grid(), learning_rate=1e-6)
    [said] = warned(tmp_path, module, watching(tmp_path, search=None))
    assert "This export rounds along a curvature: what it keeps is known when it is made." in said


def test_early_measurements_of_a_long_run_warn_of_nothing(tmp_path):
    class Long(Tuning):
        def on_train_batch_end(self, *_):
            self.trainer.should_stop = self.global_step == 4

    [said] = warned(tmp_path, Long(on_the_grid(), learning_rate=1e-6), max_steps=1000, min_steps=1)
    assert said.startswith("At step 3,")


def test_an_update_that_survives_is_no_reason_to_warn(tmp_path):
    assert warned(tmp_path, Tuning(tiny_llama(), learning_rate=1e-3)) == []


# those who watch it


def test_early_stopping_ends_a_run_whose_update_would_not_survive(tmp_path):
    stopping = EarlyStopping(
        monitor="daq/survival", mode="max", divergence_threshold=0.3, patience=1000, strict=False,
        check_on_train_epoch_end=True,
    )  # fmt: skip
    lost = fit(
        tmp_path, stopping, watching(tmp_path), max_steps=-1, max_epochs=3,
        module=Tuning(on_the_grid(), learning_rate=1e-6),
    )  # fmt: skip
    assert lost.trainer.current_epoch == 1
    assert "Divergence threshold reached" in stopping.stopping_reason_message
    kept = fit(tmp_path, stopping, watching(tmp_path), max_steps=-1, max_epochs=3, module=Tuning())
    assert kept.trainer.current_epoch == 3


def test_model_checkpoint_keeps_the_weights_that_survive_best(tmp_path):
    saver = ModelCheckpoint(
        dirpath=tmp_path / "checkpoints", monitor="daq/survival", mode="max", every_n_train_steps=1,
        filename="{step}", save_top_k=1,
    )  # fmt: skip
    logger = Listening()
    fit(
        tmp_path, saver, watching(tmp_path), logger=logger,
        module=Tuning(on_the_grid(), learning_rate=2e-4),
    )  # fmt: skip
    values = values_of(logger)
    best = max(values, key=values.__getitem__)
    assert Path(saver.best_model_path).name == f"step={best}.ckpt"
    assert float(saver.best_model_score) == pytest.approx(values[best], rel=1e-6)


# what is refused


def test_flat_shards_are_refused_before_the_first_step(tmp_path):
    settings = watching(tmp_path)._settings
    trainer = SimpleNamespace(strategy=FSDPStrategy())
    with pytest.raises(MisconfigurationException, match="flat shards of FSDPStrategy have none"):
        survival_in(trainer, None, None, None, settings, None)  # type: ignore[arg-type]


def test_adapters_that_stay_apart_are_refused_before_the_first_step(tmp_path):
    training = adapted()
    with pytest.raises(MisconfigurationException, match="no update is quantized"):
        fit(tmp_path, watching(tmp_path, merge_adapters=False), module=training)
    assert training.steps == 0


def test_a_model_of_which_nothing_is_trained_is_refused(tmp_path):
    training = Tuning()
    for name, parameter in training.named_parameters():
        parameter.requires_grad_("norm" in name)
    with pytest.raises(MisconfigurationException, match="none of the 7 quantized weights is trained"):
        fit(tmp_path, watching(tmp_path), module=training)


# the figure and the sample


def sums(gain: float, error_sq: float = 1.0, n: float = 1e6, delta_sq: float = 4.0) -> torch.Tensor:
    fields = dict.fromkeys(DeltaStats._fields, 0.0) | {
        "n": n, "dot": gain * delta_sq, "delta_sq": delta_sq, "error_sq": error_sq,
        "delta_q_sq": 1.0,
    }  # fmt: skip
    return torch.tensor(list(fields.values()), dtype=torch.float64)


@pytest.mark.parametrize(
    ("gain", "kept"), [(0.3, 0.3), (1.0, 1.0), (1.8, 0.2), (2.5, 0.0), (-0.5, 0.0), (0.0, 0.0)]
)
def test_too_strong_an_update_is_as_wrong_as_too_weak_a_one(gain, kept):
    values = survival_of(torch.stack([sums(gain), sums(1.0)]))
    assert list(values.values()) == pytest.approx([kept, 1.0])


def test_what_the_sample_cannot_tell_is_no_figure():
    errors = {error_sq: error_sq / (1e6 * 4) for error_sq in (3.9e4, 4.1e4)}  # squared blur: 0.01 is the most
    assert [error < 0.01 for error in errors.values()] == [True, False]
    found = [survival_of(torch.stack([sums(1.0, error), sums(1.0)]))["daq/survival"] for error in errors]
    assert found[0] == 1.0
    assert math.isnan(found[1])
    assert math.isnan(survival_of(torch.stack([sums(1.0, delta_sq=0.0)] * 2))["daq/survival"])


def test_the_blur_is_how_far_the_survival_of_random_updates_lies_from_one():
    generator = np.random.default_rng(0)
    n, found = 4096, []
    for _ in range(300):
        base = generator.normal(size=n)
        delta = 0.01 * generator.normal(size=n)
        error = generator.uniform(-1, 1, size=n) * 0.1
        found.append((delta * (delta + error)).sum() / (delta**2).sum() - 1)
        assert base.size
    blur = math.sqrt(0.1**2 / 3 / (n * 0.01**2))
    assert np.std(found) == pytest.approx(blur, rel=0.15)


SHAPES = {
    f"model.layers.{layer}.{kind}.weight": (512, 256) if kind.startswith("mlp") else (256, 256)
    for layer in range(8)
    for kind in ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj")
}


@pytest.mark.parametrize("granularity", [PerBlock(128, 128), PerChannel()])
def test_a_sample_is_spread_over_kinds_and_depth_and_holds_nothing_twice(granularity):
    whole = {name: Box(0, M, 0, N) for name, (M, N) in SHAPES.items()}
    pieces = choose_pieces(SHAPES, [whole], granularity)
    assert len(set(pieces)) == len(pieces) == PIECES
    assert {name.partition("layers.")[2][2:] for name, *_ in pieces} == {
        "self_attn.q_proj.weight", "self_attn.o_proj.weight", "mlp.up_proj.weight",
    }  # fmt: skip
    assert len({name.split(".")[2] for name, *_ in pieces}) == 8
    for name, box, holders in pieces:
        rows, columns = piece_size(SHAPES[name], granularity)
        assert (box.bottom - box.top, box.right - box.left) == (rows, columns)
        assert box.top % rows == box.left % columns == 0
        assert box.bottom <= SHAPES[name][0]
        assert holders == (0,)


@pytest.mark.parametrize("granularity", [PerBlock(128, 128), PerChannel()])
def test_shards_between_groups_do_not_change_a_sample(granularity):
    whole = {name: Box(0, M, 0, N) for name, (M, N) in SHAPES.items()}
    halves = [
        {name: Box(half * M // 2, (half + 1) * M // 2, 0, N) for name, (M, N) in SHAPES.items()}
        for half in (0, 1)
    ]
    one, two = choose_pieces(SHAPES, [whole], granularity), choose_pieces(SHAPES, halves, granularity)
    assert [piece[:2] for piece in one] == [piece[:2] for piece in two]
    assert {piece.holders for piece in two} == {(0,), (1,)}
    doubled = choose_pieces(SHAPES, [*halves, *halves], granularity)
    assert {piece.holders for piece in doubled} == {(0, 2), (1, 3)}


def test_pieces_move_into_the_shards_and_shards_without_a_whole_group_have_none():
    shapes = {"w": (384, 128)}
    uneven = [{"w": Box(0, 100, 0, 128)}, {"w": Box(100, 384, 0, 128)}]
    found = {piece.box: piece.holders for piece in choose_pieces(shapes, uneven, PerBlock(128, 128))}
    assert found == {Box(128, 256, 0, 128): (1,), Box(256, 384, 0, 128): (1,)}
    thin = [{"w": Box(top, top + 64, 0, 128)} for top in range(0, 384, 64)]
    assert choose_pieces(shapes, thin, PerBlock(128, 128)) == []
    assert choose_pieces(shapes, [{}], PerChannel()) == []


def test_pieces_of_small_weights_are_whole_groups_too():
    assert piece_size((3, 5), PerChannel()) == (3, 5)
    assert piece_size((4096, 40_000), PerChannel()) == (1, 40_000)
    assert piece_size((256, 256), PerBlock(1, 32)) == (128, 128)


# several ranks


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp2", "fsdp2", "fsdp2tp2"])
def test_several_ranks_measure_what_one_does(tmp_path, kind):
    logged = {}
    for name in ("single", kind):
        (tmp_path / name).mkdir()
        arguments = ["survival", name, str(tmp_path / name)]
        for code, output in sharded_runs.launch(
            sharded_runs.__file__, arguments, sharded_runs.strategy(name)[1]
        ):
            assert code == 0, output
        logged[name] = [
            json.loads((tmp_path / name / f"survival{rank}.json").read_text())
            for rank in range(sharded_runs.strategy(name)[1])
        ]
    [single] = logged["single"]
    assert set(single) == {f"{run}-{name}" for run in ("full", "rows", "lora") for name in NEVER_CLEAR}
    for rank in logged[kind]:
        assert rank.keys() == single.keys()
        for name, value in rank.items():
            # with tensor parallelism some places of the sample lie between shards
            if kind != "fsdp2tp2":
                assert value == pytest.approx(single[name], rel=1e-6), name  # the Trainer's are float32
            assert value == logged[kind][0][name]
    for run in ("full", "rows", "lora"):
        sums = [torch.load(tmp_path / name / f"{run}.pt", weights_only=True) for name in ("single", kind)]
        if kind != "fsdp2tp2":
            assert torch.allclose(*sums, rtol=1e-12, atol=0.0), run


@pytest.mark.slow
def test_flat_shards_are_refused_by_every_rank(tmp_path):
    arguments = ["survival_of_flat_shards", "fsdp1", str(tmp_path)]
    for code, output in sharded_runs.launch(sharded_runs.__file__, arguments, 2):
        assert code == 0, output
    for rank in range(2):
        assert "flat shards of OnCPU have none" in (tmp_path / f"said{rank}").read_text()
