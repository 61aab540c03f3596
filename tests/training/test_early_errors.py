"""Whatever can be known before the first step is said then: when the callback is made, or in `setup`."""

from __future__ import annotations

from pathlib import Path

import pytest
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from live import Tuning, data, fit, make_trainer

from daq_lightning import CheckpointError, DeltaAwareQuantization, ScaleSearch

QUICK = ScaleSearch(metric="cosine", n_coarse=3, n_fine=0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dirpath": None}, r"dirpath=None: expected a path, such as 'exports'"),
        ({"dirpath": ""}, r"dirpath='': expected a path"),
        ({"base": None}, r"base=None: expected 'auto', 'snapshot', 'memory' or a path"),
        ({"scheme": "FP4"}, r"scheme='FP4': expected one of 'auto', 'FP8_BLOCK'"),
        ({"scheme": None}, r"scheme=None: expected one of 'auto', 'FP8_BLOCK'"),
        ({"metric": "kl"}, r"Unknown metric 'kl': expected one of sign, cosine"),
        ({"metric": 3}, r"metric=3: expected None or a str"),
        ({"alpha_range": 0.5}, r"alpha_range=0.5: expected two numbers, such as \(0.8, 1.25\)"),
        ({"alpha_range": (0.8, 1.0, 1.25)}, r"alpha_range=\(0.8, 1.0, 1.25\): expected two numbers"),
        ({"alpha_range": ("0.8", "1.25")}, r"alpha_range=\('0.8', '1.25'\): expected two numbers"),
        ({"alpha_range": ()}, r"alpha_range=\(\): expected two numbers"),
        ({"search": "cosine"}, r"search='cosine': expected a ScaleSearch, .*metric='cosine'"),
        ({"ignore": "lm_head"}, r"ignore='lm_head': expected a list of names, such as \['lm_head'\]"),
        ({"ignore": [3]}, r"ignore=\[3\]: expected a list of names"),
        ({"module": 3}, r"module=3: expected None or a str"),
        ({"scale_format": "e5m2"}, r"scale_format='e5m2': expected one of None, 'ue8m0'"),
        ({"export_on": None}, r"export_on=None: expected one of 'train_end', 'checkpoint'"),
        (
            {"every_n_train_steps": 1.5},
            r"every_n_train_steps=1.5: expected a whole number of at least 1, or None",
        ),
        (
            {"every_n_train_steps": True},
            r"every_n_train_steps=True: expected a whole number of at least 1, or None",
        ),
        ({"every_n_epochs": "1"}, r"every_n_epochs='1': expected a whole number of at least 1, or None"),
        ({"keep_last": 0}, r"keep_last=0: expected a whole number of at least 1, or None"),
        ({"keep_last": "2"}, r"keep_last='2': expected a whole number of at least 1, or None"),
        ({"filename": None}, r"filename=None: expected the name of a folder"),
        ({"filename": ".."}, r"filename='\.\.': expected the name of a folder"),
        ({"filename": "."}, r"filename='\.': expected the name of a folder"),
        ({"filename": "{step"}, r"filename='\{step': cannot be formatted: .*expected '\}'"),
        ({"filename": "step}"}, r"filename='step\}': cannot be formatted: Single '\}'"),
        ({"filename": "{step:.2q}"}, r"filename='\{step:.2q\}': cannot be formatted"),
        ({"filename": "{val_loss:d}"}, r"filename='\{val_loss:d\}': cannot be formatted: .*'d' .*float"),
        ({"filename": "a/{step}"}, r"filename='a/\{step\}': expected the name of a folder"),
        ({"reference": "last"}, r"reference='last': expected one of"),
        ({"merge_adapters": "no"}, r"merge_adapters='no': expected True or False"),
        ({"export_on_exception": "yes"}, r"export_on_exception='yes': expected True or False"),
        ({"parent": 3}, r"parent=3: expected None or a path"),
        ({"chain_from": "weights"}, r"chain_from='weights': needs parent="),
        ({"parent": "exports/a"}, r"parent='exports/a': say .* chain_from="),
        (
            {"parent": "exports/a", "chain_from": "guess"},
            r"chain_from='guess': expected one of None, 'weights'",
        ),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_a_setting_of_a_wrong_kind_is_refused_when_the_callback_is_made(changes, message):
    with pytest.raises(MisconfigurationException, match=message):
        DeltaAwareQuantization(**changes)


def test_what_is_allowed_is_not_refused(tmp_path):
    DeltaAwareQuantization(
        dirpath=tmp_path, base=tmp_path / "base", scheme="FP8_BLOCK", metric="sign", alpha_range=[1, 2],
        ignore=("lm_head", "re:.*mlp.*"), module="model", scale_format="ue8m0", every_n_train_steps=1,
        every_n_epochs=2, keep_last=3, filename="run.1-{epoch:03d}-{step}-{val/loss:.2f}-{acc:e}",
        parent=tmp_path,
        chain_from="deployed", export_on_exception=True, merge_adapters=False,
    )  # fmt: skip


def saver(folder: Path, **changes) -> ModelCheckpoint:
    return ModelCheckpoint(dirpath=folder / "checkpoints", **changes)


@pytest.mark.parametrize(
    ("settings", "checkpoint", "message"),
    [
        ({"which": "best"}, None, r"which='best' .*there is no ModelCheckpoint"),
        ({"which": "best"}, {}, r"which='best' .*ModelCheckpoint\(monitor=None"),
        ({"which": "best"}, {"monitor": "val_loss", "save_top_k": 0}, r"which='best' .*save_top_k=0"),
        ({"export_on": "checkpoint"}, None, r"export_on='checkpoint' .*there is no ModelCheckpoint"),
        ({"export_on": "checkpoint"}, {"save_top_k": 0}, r"export_on='checkpoint' .*save_top_k=0"),
    ],
)
def test_what_the_other_callbacks_lack_is_said_before_the_first_step(tmp_path, settings, checkpoint, message):
    module = Tuning()
    others = [] if checkpoint is None else [saver(tmp_path, **checkpoint)]
    callback = DeltaAwareQuantization(dirpath=str(tmp_path / "exports"), search=QUICK, **settings)
    with pytest.raises(MisconfigurationException, match=message):
        fit(tmp_path, callback, *others, module=module)
    assert module.steps == 0
    assert not (tmp_path / "exports").exists()


def test_a_checkpoint_that_is_only_the_last_one_is_enough(tmp_path):
    callback = DeltaAwareQuantization(dirpath=str(tmp_path / "exports"), search=QUICK, export_on="checkpoint")
    fit(tmp_path, callback, saver(tmp_path, save_top_k=0, save_last=True))
    assert [path.name for path in callback.exports] == ["step=4"]


def test_best_is_that_of_the_model_checkpoint_with_a_monitor(tmp_path):
    class Worsening(Tuning):
        def validation_step(self, batch, batch_idx):
            self.log("val_loss", float(self.trainer.global_step))

    callback = DeltaAwareQuantization(dirpath=str(tmp_path / "exports"), search=QUICK, which="best")
    regular = ModelCheckpoint(dirpath=tmp_path / "regular", every_n_train_steps=1)
    best = saver(tmp_path, monitor="val_loss", filename="{step}")
    trainer = make_trainer(tmp_path, callback, regular, best, max_steps=8, val_check_interval=2)
    trainer.fit(Worsening(), data(), data())
    training = (callback.exports[0] / "daq_manifest.json").read_text()
    assert "checkpoints/step=2.ckpt" in training


def test_a_dirpath_inside_the_export_it_goes_on_from_is_refused_before_the_first_step(tmp_path):
    first = DeltaAwareQuantization(dirpath=str(tmp_path / "first"))
    fit(tmp_path, first)
    parent = first.exports[-1]
    second = DeltaAwareQuantization(
        dirpath=str(parent / "next"), base=str(parent), parent=str(parent), chain_from="deployed"
    )
    module = Tuning()
    with pytest.raises(CheckpointError, match="is in the"):
        fit(tmp_path, second, module=module)
    assert module.steps == 0
    assert not (parent / "next").exists()
