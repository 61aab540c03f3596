"""Which strategies of the Trainer keep whole weights in every process, on a device that can search them."""

from __future__ import annotations

from lightning.pytorch.strategies import (
    DDPStrategy,
    DeepSpeedStrategy,
    SingleDeviceStrategy,
    SingleDeviceXLAStrategy,
    Strategy,
    XLAStrategy,
)
from lightning.pytorch.utilities.exceptions import MisconfigurationException


def check_strategy(strategy: Strategy) -> None:
    """Refuses a strategy whose weights cannot be read, and Apple's GPUs.

    Raises:
        MisconfigurationException: Anything but a single CPU or CUDA GPU, or DDP.
    """
    # some of these are a DDPStrategy, so they come first
    if isinstance(strategy, (DeepSpeedStrategy, XLAStrategy, SingleDeviceXLAStrategy)):
        why = "whose weights are placeholders, or lie on a device that is not read from here"
    elif not isinstance(strategy, (SingleDeviceStrategy, DDPStrategy)):
        why = "which does not keep whole weights in one process"
    elif strategy.root_device.type == "mps":
        raise MisconfigurationException(
            "DeltaAwareQuantization needs float64, which Apple's GPUs (MPS) do not have: train with "
            "Trainer(accelerator='cpu'), or save the trained model as a Hugging Face folder and run "
            "`daq-lightning quantize`."
        )
    else:
        return
    raise MisconfigurationException(
        f"DeltaAwareQuantization reads whole weights and does not support {type(strategy).__name__}, {why}. "
        "Train on a single CPU or GPU or with DDP; or save the trained model as a Hugging Face folder and "
        "run `daq-lightning quantize`."
    )
