"""What a run exports, as a user says it, checked when it is made."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from daq_lightning.checkpoint.manifest import ChainFrom
from daq_lightning.export.settings import ExportSettings
from daq_lightning.training import settings_check as check

if TYPE_CHECKING:
    from daq_lightning.training.curvature import Collecting
    from daq_lightning.training.schedule import Schedule


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

    def __post_init__(self) -> None:
        named = self.module is None or isinstance(self.module, str)
        check.require(named, "module", self.module, "None or a str, the name of a submodule")
        check.choice("reference", self.reference, ("initial", "previous_checkpoint"))
        check.flag("merge_adapters", self.merge_adapters)
        base = check.path("base", self.base, "'auto', 'snapshot', 'memory' or a path")
        places = {
            "dirpath": check.local_path("dirpath", self.dirpath, "a path, such as 'exports'"),
            "base": base,
            "parent": check.chain(self.parent, self.chain_from, base),
        }
        for name, value in places.items():  # with `~` as the user's home
            object.__setattr__(self, name, value)

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
