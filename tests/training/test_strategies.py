"""A strategy whose weights cannot be read is refused in `setup`, and the message advises only what is
accepted."""

from __future__ import annotations

import re
from types import SimpleNamespace

import lightning.pytorch.strategies as strategies
import pytest
import torch
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


REFUSED = [
    strategies.DeepSpeedStrategy, OwnDeepSpeed, strategies.XLAStrategy, strategies.SingleDeviceXLAStrategy,
    strategies.FSDPStrategy, strategies.ModelParallelStrategy,
]  # fmt: skip


@pytest.mark.parametrize("kind", REFUSED)
def test_strategies_without_whole_weights_are_refused_by_name(tmp_path, kind):
    with pytest.raises(MisconfigurationException, match=f"does not support {kind.__name__}") as caught:
        set_up(tmp_path, kind)
    advice = str(caught.value).split(kind.__name__, 1)[1]
    assert not re.search("FSDP|ModelParallel|DeepSpeed|XLA", advice)
    assert not (tmp_path / "exports").exists()


@pytest.mark.parametrize("kind", [strategies.DDPStrategy, strategies.SingleDeviceStrategy])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_strategies_with_whole_weights_are_accepted(kind, device):
    on_device = type(kind.__name__, (kind,), {"root_device": torch.device(device)})
    check_strategy(on_device.__new__(on_device))


def test_apples_gpus_which_have_no_float64_are_refused_in_setup(tmp_path):
    callback = DeltaAwareQuantization(dirpath=str(tmp_path / "exports"))
    strategy = strategies.SingleDeviceStrategy(device=torch.device("mps"))
    trainer = SimpleNamespace(strategy=strategy, fast_dev_run=False, callbacks=[callback])
    with pytest.raises(MisconfigurationException, match=r"MPS.*accelerator='cpu'.*daq-lightning quantize"):
        callback.setup(trainer, Tuning(), "fit")  # type: ignore[arg-type]
    assert not (tmp_path / "exports").exists()
