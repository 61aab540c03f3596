"""A strategy whose weights cannot be read is refused in `setup`, and the message advises only what is
accepted."""

from __future__ import annotations

import re
from types import SimpleNamespace

import lightning.pytorch.strategies as strategies
import pytest
import torch
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from live import Tuning

from daq_lightning import DeltaAwareQuantization
from daq_lightning.training.strategies import check_strategy


class OwnDeepSpeed(strategies.DeepSpeedStrategy):
    """As users subclass it."""


def set_up(folder, kind: type) -> None:
    """Runs `setup` under a strategy that was not constructed: its package need not be installed."""
    callback = DeltaAwareQuantization(dirpath=str(folder / "exports"))
    trainer = SimpleNamespace(strategy=kind.__new__(kind), fast_dev_run=False, callbacks=[callback])
    callback.setup(trainer, Tuning(), "fit")  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", [strategies.XLAStrategy, strategies.SingleDeviceXLAStrategy])
def test_strategies_whose_weights_are_not_read_are_refused_by_name(tmp_path, kind):
    with pytest.raises(MisconfigurationException, match=f"does not support {kind.__name__}") as caught:
        set_up(tmp_path, kind)
    advice = str(caught.value).split(kind.__name__, 1)[1]
    assert not re.search("XLA", advice)
    assert not (tmp_path / "exports").exists()


def trainer_of(kind: type, device: str = "cpu", *callbacks):
    """A Trainer under a strategy that was not constructed."""
    strategy = type(kind.__name__, (kind,), {"root_device": torch.device(device)})
    return SimpleNamespace(strategy=strategy.__new__(strategy), callbacks=callbacks, world_size=2)


SETTINGS = DeltaAwareQuantization()._settings
IN_MEMORY = DeltaAwareQuantization(base="memory")._settings
SHARDED = [
    strategies.FSDPStrategy, strategies.ModelParallelStrategy, strategies.DeepSpeedStrategy, OwnDeepSpeed,
]  # fmt: skip


@pytest.mark.parametrize("kind", [strategies.DDPStrategy, strategies.SingleDeviceStrategy, *SHARDED])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_strategies_whose_weights_are_read_are_accepted(kind, device):
    check_strategy(trainer_of(kind, device), SETTINGS)


@pytest.mark.parametrize(
    ("kind", "settings", "why"),
    [
        *((kind, SETTINGS, f"{kind.__name__} shards the model") for kind in SHARDED),
        (strategies.DDPStrategy, IN_MEMORY, "base='memory' is shared out"),
    ],
)
def test_an_export_that_one_rank_cannot_make_alone_is_refused(kind, settings, why):
    with pytest.raises(MisconfigurationException, match=f"export_on_exception=True.*{why}"):
        check_strategy(trainer_of(kind), settings, alone=True)
    check_strategy(trainer_of(kind), settings)
    check_strategy(trainer_of(strategies.DDPStrategy), SETTINGS, alone=True)


@pytest.mark.parametrize("kind", SHARDED)
def test_averages_of_a_sharded_model_are_refused(kind):
    with pytest.raises(MisconfigurationException, match=f"WeightAveraging .* {kind.__name__}"):
        check_strategy(trainer_of(kind, "cpu", WeightAveraging()), SETTINGS)


def test_apples_gpus_which_have_no_float64_are_refused_in_setup(tmp_path):
    callback = DeltaAwareQuantization(dirpath=str(tmp_path / "exports"))
    strategy = strategies.SingleDeviceStrategy(device=torch.device("mps"))
    trainer = SimpleNamespace(strategy=strategy, fast_dev_run=False, callbacks=[callback])
    with pytest.raises(MisconfigurationException, match=r"MPS.*accelerator='cpu'.*daq-lightning quantize"):
        callback.setup(trainer, Tuning(), "fit")  # type: ignore[arg-type]
    assert not (tmp_path / "exports").exists()
