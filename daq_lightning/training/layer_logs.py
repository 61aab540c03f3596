"""What loggers are told of each weight: `daq/layer/<weight>/<figure>`, and pictures of all.

Pictures go through what TensorBoard's writer (`experiment.add_image`) and W&B's logger (`log_image`) have;
other loggers get none.
"""

from __future__ import annotations

from lightning.pytorch import Trainer
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from daq_lightning.report.figures import ExportReport, Side, figures
from daq_lightning.report.plots import can_draw, pictures
from daq_lightning.training.loggers import tell

_SIDES: tuple[tuple[Side, str], ...] = (("searched", ""), ("absmax", "absmax_"))
_OF_A_LAYER = ("sign_rate", "cosine", "gain")


def log_layers(trainer: Trainer, report: ExportReport) -> None:
    """Tells the loggers of each weight, and shows pictures to those that can."""
    metrics = {
        f"daq/layer/{tensor.name}/{prefix}{name}": values[name]
        for tensor in report.tensors
        if not tensor.without_base
        for side, prefix in _SIDES
        for values in (figures(getattr(tensor, side)),)
        for name in _OF_A_LAYER
    }
    tell(trainer, metrics)
    shown_by = [logger for logger in trainer.loggers if trainer.is_global_zero and _shows_pictures(logger)]
    if not shown_by:
        return
    if not can_draw():
        rank_zero_warn(
            "log_per_layer=True logs pictures as well, which matplotlib draws, and it is not installed: the "
            "figures are logged without them. Install it with pip install 'daq-lightning[plot]'."
        )
        return
    for name, picture in pictures(report).items():
        for logger in shown_by:
            if hasattr(logger, "log_image"):
                logger.log_image(f"daq/{name}", [picture])  # type: ignore[attr-defined]
            else:
                logger.experiment.add_image(  # type: ignore[attr-defined]
                    f"daq/{name}", picture, trainer.global_step, dataformats="HWC"
                )


def _shows_pictures(logger: Logger) -> bool:
    return hasattr(logger, "log_image") or hasattr(getattr(logger, "experiment", None), "add_image")
