"""What the loggers of a Trainer are told, and what its other callbacks find.

| name | what | when |
| --- | --- | --- |
| `daq/<figure>` | of all weights, with the written scales | export |
| `daq/absmax_<figure>` | the same with plain scales | export |
| `daq/predicted_loss` | of codes along a curvature, over that of nearest rounding | export |
| `daq/search_seconds`, `daq/export_seconds`, `daq/bytes` | what it cost | export |
| `daq/layer/<weight>/<figure>` and `absmax_<figure>` | of each weight; and pictures | export, if asked |
| `daq/survival`, `daq/survival_searched` | what nearest rounding would keep now | every N steps, if asked |

Figures of single weights go to loggers alone (`layer_logs`); all others also to `trainer.callback_metrics`,
where EarlyStopping and ModelCheckpoint look. Loggers are told by Lightning's own interface, `log_metrics`:
`self.log` would raise where most exports are made.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from lightning.pytorch import Trainer

from daq_lightning.report.figures import only_finite


def share(trainer: Trainer, metrics: Mapping[str, float]) -> None:
    """Tells the loggers, and puts metrics where EarlyStopping and others look; on every rank.

    What is no number is not logged, and is taken away from where others would find an old one.
    """
    for name, value in metrics.items():
        if math.isfinite(value):
            trainer.callback_metrics[name] = torch.tensor(value, dtype=torch.float32, device="cpu")
        else:
            trainer.callback_metrics.pop(name, None)
    tell(trainer, metrics)


def tell(trainer: Trainer, metrics: Mapping[str, float]) -> None:
    """Tells the loggers alone, on rank 0, of what is a number."""
    numbers = only_finite(metrics)
    if trainer.is_global_zero and numbers:
        for logger in trainer.loggers:
            logger.log_metrics(numbers, step=trainer.global_step)
