"""What a run exports, as a user says it, checked when it is made."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, get_args

from lightning.pytorch.utilities.exceptions import MisconfigurationException

from daq_lightning.checkpoint.kv_cache import KVCache
from daq_lightning.checkpoint.manifest import ChainFrom
from daq_lightning.checkpoint.remote import staging_folder
from daq_lightning.checkpoint.schemes import SchemeName
from daq_lightning.checkpoint.urls import is_url
from daq_lightning.export.settings import ExportSettings
from daq_lightning.model.hub import is_repository
from daq_lightning.numerics.formats import ScaleFormat
from daq_lightning.numerics.objectives import Metric
from daq_lightning.numerics.rounding.settings import RoundingChoice
from daq_lightning.numerics.search.settings import ScaleSearch
from daq_lightning.training import settings_check as check
from daq_lightning.training.gate import ValidationSettings

if TYPE_CHECKING:
    from daq_lightning.training.collecting import Collecting
    from daq_lightning.training.schedule import Schedule


MissingBase: TypeAlias = Literal["error", "absmax"]


@dataclass(frozen=True, kw_only=True)
class LogSettings:
    """What is logged beside the figures of each export; checked when it is made.

    Attributes:
        per_layer: Whether figures of each weight, and pictures, are logged.
        survival_every_n_steps: How often `daq/survival` is, in optimizer steps; None never.
    """

    per_layer: bool
    survival_every_n_steps: int | None

    def __post_init__(self) -> None:
        check.flag("log_per_layer", self.per_layer)
        check.count("log_survival_every_n_steps", self.survival_every_n_steps)


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """What a run exports, where to, against what; the fields are arguments of `DeltaAwareQuantization`."""

    dirpath: str
    base: str
    module: str | None
    reference: Literal["initial", "previous_checkpoint"]
    merge_adapters: bool
    parent: str | None
    chain_from: ChainFrom | None
    choices: ExportSettings
    collecting: Collecting | None
    schedule: Schedule
    validation: ValidationSettings
    logs: LogSettings
    push_to_hub: str | None

    def __post_init__(self) -> None:
        named = self.module is None or isinstance(self.module, str)
        check.require(named, "module", self.module, "None or a str, the name of a submodule")
        check.choice("reference", self.reference, ("initial", "previous_checkpoint"))
        check.flag("merge_adapters", self.merge_adapters)
        repository = self.push_to_hub is None or is_repository(self.push_to_hub)
        check.require(repository, "push_to_hub", self.push_to_hub, "None or 'org/name', a repository")
        base = check.local("base", check.path("base", self.base, "'auto', 'snapshot', 'memory' or a path"))
        places = {
            "dirpath": check.destination("dirpath", self.dirpath, "a path, such as 'exports'"),
            "base": base,
            "parent": check.chain(self.parent, self.chain_from, base),
        }
        for name, value in places.items():  # with `~` as the user's home
            object.__setattr__(self, name, value)
        if self.push_to_hub is not None and is_url(self.dirpath):
            raise MisconfigurationException(
                f"push_to_hub={self.push_to_hub!r} uploads from a local dirpath, and this one is "
                f"{self.dirpath!r}: leave one of them out."
            )

    @property
    def folder(self) -> Path:
        """The local `dirpath`; of a URL, where exports are before they are uploaded, and snapshots stay."""
        if is_url(self.dirpath):
            return staging_folder(f"{self.dirpath}/export").parent
        return Path(self.dirpath)

    def place(self, name: str) -> str:
        """Where an export of this name goes: a path, or a URL."""
        return f"{self.dirpath}/{name}" if is_url(self.dirpath) else str(Path(self.dirpath) / name)

    @property
    def deals_anew(self) -> bool:
        """Whether an export may be planned otherwise than when training began."""
        return bool(self.validation.schemes) or self.choices.budget is not None

    def description(self, model: str | None, place: int | None) -> dict[str, Any]:
        """What a resumed run knows its callback by, in primitives; see `resume.py`.

        Args:
            model: Name of the model in the LightningModule.
            place: Number of the callback among those of its class in the Trainer.
        """
        return {
            "model": model,
            "place": place,
            "dirpath": self.dirpath,
            "base": self.base,
            "reference": self.reference,
            "merge_adapters": self.merge_adapters,
            "scheme": self.choices.scheme,
            "settings": repr(self.choices),
            **dataclasses.asdict(self.schedule),
        }


def make_settings(
    scheme: SchemeName,
    metric: Metric | None,
    alpha_range: tuple[float, float] | None,
    search: ScaleSearch | None,
    ignore: Sequence[str] | None,
    scale_format: ScaleFormat | None,
    missing_base: MissingBase,
    max_shard_bytes: int,
    rounding: RoundingChoice,
    kv_cache: KVCache | None,
    budget: str | int | None,
    ladder: Sequence[str] | None,
) -> ExportSettings:
    """The settings of an export from the arguments of `DeltaAwareQuantization`.

    Raises:
        MisconfigurationException: A value of a wrong kind, or values that contradict each other.
    """
    check.choice("scheme", scheme, get_args(SchemeName))
    check.require(
        metric is None or isinstance(metric, str), "metric", metric, "None or a str, such as 'cosine'"
    )
    check.require(
        search is None or isinstance(search, ScaleSearch), "search", search,
        "a ScaleSearch, or None; what to maximize alone is said by metric='cosine'",
    )  # fmt: skip
    check.names("ignore", ignore, "a list of names, such as ['lm_head']")
    check.names("ladder", ladder, "a list of schemes, such as ['W4A16', 'FP8A16', '16']")
    check.choice("rounding", rounding, get_args(RoundingChoice))
    check.choice("scale_format", scale_format, (None, "ue8m0"))
    check.choice("kv_cache", kv_cache, (None, *get_args(KVCache)))
    check.choice("missing_base", missing_base, ("error", "absmax"))
    whole = isinstance(max_shard_bytes, int) and not isinstance(max_shard_bytes, bool)
    check.require(whole, "max_shard_bytes", max_shard_bytes, "a whole number of bytes, such as 2_000_000_000")
    if alpha_range is not None:
        two = isinstance(alpha_range, (list, tuple)) and len(alpha_range) == 2
        numbers = two and all(
            isinstance(end, (int, float)) and not isinstance(end, bool) for end in alpha_range
        )
        check.require(numbers, "alpha_range", alpha_range, "two numbers, such as (0.8, 1.25)")
    if search is not None and (metric is not None or alpha_range is not None):
        raise MisconfigurationException(
            "search=... already holds metric and range: leave metric and alpha_range out."
        )
    if rounding == "auto" and not (search is None and metric is None and alpha_range is None):
        rounding = "nearest"  # of the scales that were asked for
    try:
        if search is None:
            low, high = alpha_range or (ScaleSearch.alpha_min, ScaleSearch.alpha_max)
            search = ScaleSearch(metric=metric or ScaleSearch.metric, alpha_min=low, alpha_max=high)
        return ExportSettings(
            scheme=scheme,
            search=search,
            rounding=rounding,
            ignore=tuple(ignore or ()),
            scale_format=scale_format,
            kv_cache=kv_cache,
            missing_base=missing_base,
            max_shard_bytes=max_shard_bytes,
            budget=budget,
            ladder=tuple(ladder or ()),
        )
    except (TypeError, ValueError) as error:
        raise MisconfigurationException(str(error)) from error
