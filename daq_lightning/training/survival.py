"""What plain rounding would keep of the update if training stopped now, hours before it does.

    gain      = <delta_q, delta> / <delta, delta>           delta = weight - base, delta_q = q(weight) - base
    survival  = max(0, 1 - |gain - 1|)                      q rounds to nearest, with plain absmax scales

over the added sums of a sample: up to 16 pieces of 2^14 weights, see `sample`. It is 1 where the update comes
through at its strength, 0 where rounding takes the weights back to the base (or moves them twice as far), and
foretells `daq/absmax_gain` of an export. `daq/survival_searched` is the same with the scales that a search
with the export's settings finds for the pieces. An export that rounds along a curvature has other codes, at
plain scales: what it keeps stands in its own figures only. Only the strength along the update counts; noise
across it, which every format adds, shows in `daq/cosine` of an export.

Rounding errors are not chance, but to the update, which knows nothing of them, they are like it. In sums over
n weights they blur the gain by about

    sqrt(error_sq / (n * delta_sq))        error_sq = |q(weight) - weight|^2, delta_sq = |delta|^2

A survival that is blurred by more than 0.1 is not logged: where nothing is trained, and in the first steps
from a base that is not on the grid of the format. (On the grid, lost updates ARE the error, and the blur is
1 / sqrt(n).)

The sample is taken when training starts: at most 1 MB on the device of the weights. Between two measurements
nothing is computed and no device is waited for. Weights are those that are trained, not their averages by
WeightAveraging. Under DDP every rank measures the whole sample, which is the same everywhere; in a sharded
model each measures what lies in its shards, and one all-reduce of 20 numbers adds it up (with LoRA, sharded
factors are gathered before). FSDP1 and ZeRO-3 keep no rows that could be measured, and are refused.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor

from daq_lightning.checkpoint.families import family_of
from daq_lightning.model.pieces import LivePieces
from daq_lightning.numerics.objectives import DeltaStats, as_searched, gain
from daq_lightning.numerics.search.search import search_scale
from daq_lightning.report.figures import only_finite
from daq_lightning.training.loggers import share
from daq_lightning.training.sample import Sample, choose_pieces

if TYPE_CHECKING:
    from daq_lightning.export.job import Job
    from daq_lightning.export.ranks import Ranks
    from daq_lightning.model.live import LiveModel
    from daq_lightning.training.references import Base
    from daq_lightning.training.run_settings import RunSettings

NAMES = ("daq/survival", "daq/survival_searched")
_MOST_BLUR = 0.1
_POOR, _WARM_UP = 0.5, 3  # below which survival users are warned, after so many measurements


class Survival:
    """Measures and logs the survival during a fit; all ranks have one.

    Args:
        sample: What is measured.
        job: With format and search.
        every_n_steps: How often, in optimizer steps.
    """

    def __init__(self, sample: Sample, job: Job, every_n_steps: int) -> None:
        self._sample, self._job, self._every = sample, job, every_n_steps
        self._periods = self._points = 0
        self._warned = False

    def after_step(self, trainer: Trainer) -> None:
        """Measures and logs after every so many optimizer steps. A collective for a sharded model."""
        periods = trainer.global_step // self._every
        if periods == self._periods:
            return
        self._periods = periods
        with torch.no_grad():
            sums = self._measured()
            if self._sample.live.sharded:
                sums = trainer.strategy.reduce(sums, reduce_op="sum")
        values = survival_of(sums)
        share(trainer, only_finite(values))  # one that is known stays until the next, for those who watch it
        self._warn_once(trainer, values)

    def retake_base(self) -> None:
        """Measures from now on what changes from here. A collective for a sharded model with adapters."""
        self._sample = self._sample.since_now()

    def _measured(self) -> Tensor:
        """The sums of this rank's pieces with plain and with searched scales: float64, shape (2, 10)."""
        layout, pairs = self._job.plan.layout, self._sample.read()
        sums = torch.zeros(2, len(DeltaStats._fields), dtype=torch.float64, device=self._sample.device)
        for weight, base in pairs:
            try:
                found = search_scale(
                    as_searched(weight),
                    as_searched(base),
                    layout.granularity,
                    self._job.settings.search,
                    scale_format=layout.scale_format,
                    fmt=layout.scheme.format,
                )
            except ValueError:
                if bool((weight - base).isfinite().all()):
                    raise
                return sums.fill_(math.nan)  # no figure: that the run has diverged is for others to say
            sums += torch.stack([found.absmax_stats.total().packed(), found.stats.total().packed()])
        return sums

    def _outlook(self, searched: float) -> str:
        """What the warning says of the export."""
        if self._job.settings.by_curvature:
            return "This export rounds along a curvature: what it keeps is known when it is made."
        if not math.isfinite(searched):
            return "What this export's search of scales would keep cannot be told yet."
        return f"This export, which searches its scales, would keep {searched:.0%} (daq/survival_searched)."

    def _warn_once(self, trainer: Trainer, values: dict[str, float]) -> None:
        survival, searched = (values[name] for name in NAMES)
        if self._warned or not math.isfinite(survival):
            return
        self._points += 1
        late = 0 < trainer.max_steps <= 10 * trainer.global_step  # type: ignore[operator]
        if survival < _POOR and (late or self._points >= _WARM_UP):
            self._warned = True
            family = family_of(self._job.plan.layout.scheme.name)
            rank_zero_warn(
                f"At step {trainer.global_step}, plain {family} would round away or distort "
                f"{1 - survival:.0%} of what training has changed so far (daq/survival = {survival:.2f}): "
                f"the changes are small beside the steps of the format. {self._outlook(searched)} The share "
                "may grow as training goes on. If it does not: a larger learning rate or more steps make "
                "larger changes, and a base in bfloat16, instead of one that was quantized before, lets more "
                "of the small ones through."
            )


def survival_of(sums: Tensor) -> dict[str, float]:
    """The figures of measured sums; NaN where there is no update, or too small a one to tell.

    Args:
        sums: With plain and with searched scales: float64, shape (2, 10).
    """
    stats = DeltaStats(*sums.T)  # fields of shape (2,)
    blur = (stats.error_sq / (stats.n * stats.delta_sq)).sqrt()
    survival = (1 - (gain(stats) - 1).abs()).clamp(min=0)
    known = (stats.delta_sq > 0) & (blur <= _MOST_BLUR)
    values = torch.where(known, survival, math.nan).tolist()
    return dict(zip(NAMES, values, strict=True))


def survival_in(
    trainer: Trainer, model: LiveModel, job: Job, base: Base, settings: RunSettings, ranks: Ranks
) -> Survival | None:
    """What `log_survival_every_n_steps` asks for, at the start of a fit; None without it. A collective.

    Args:
        trainer: Of the fit.
        model: As it is before the first step.
        job: Of the exports.
        base: Of the job.
        settings: Of the run.
        ranks: Of the fit.

    Raises:
        MisconfigurationException: A strategy or a model that cannot be measured in pieces.
    """
    every = settings.logs.survival_every_n_steps
    if every is None:
        return None
    strategy, zero_3 = trainer.strategy, getattr(trainer.strategy, "zero_stage_3", False)
    if isinstance(strategy, FSDPStrategy) or (isinstance(strategy, DeepSpeedStrategy) and zero_3):
        raise MisconfigurationException(
            f"log_survival_every_n_steps={every} measures some rows of the weights, and the flat shards of "
            f"{type(strategy).__name__}{' (ZeRO-3)' * zero_3} have none: leave it out, or train with "
            "ModelParallelStrategy (FSDP2), DDP or ZeRO-2."
        )
    if not settings.merge_adapters and model.adapters is not None:
        raise MisconfigurationException(
            f"log_survival_every_n_steps={every} measures what rounding keeps of the update, and with "
            "merge_adapters=False no update is quantized: adapters stay as they are. Leave it out."
        )
    live = LivePieces(model)
    shapes = {spec.name: spec.shape for spec in model.specs}
    names = live.trained(name for name in shapes if name in job.base_names)
    mine = {name: box for name in names if (box := live.box(name)) is not None}
    pieces = choose_pieces(
        {name: (shapes[name][0], shapes[name][1]) for name in names},
        ranks.gather(mine) if live.sharded else [mine],
        job.plan.layout.granularity,
    )
    if not pieces:
        raise MisconfigurationException(
            f"log_survival_every_n_steps={every}: none of the {len(job.base_names)} quantized weights is "
            "trained and lies on one rank in whole groups of the format. Use scheme='FP8_DYNAMIC', whose "
            "groups are rows, or fewer shards; or leave it out."
        )
    # the base that the run takes is what the weights are now
    from_now = trainer.ckpt_path is None and settings.base in ("auto", "snapshot", "memory")
    owned = [(piece, not live.sharded or piece.holders[0] == ranks.rank) for piece in pieces]
    sample = Sample(live=live, pieces=owned, device=strategy.root_device)
    if base.kind == "adapters":
        sample = sample.since_frozen()
    elif from_now:
        sample = sample.since_now()
    else:
        sample = ranks.together(lambda: sample.since_base(job.base, job.base_names))
    return Survival(sample, job, every)
