"""How long an export took and how much it wrote. The report says nothing of it, for it is the same whenever,
wherever and by however many ranks an export is made."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from daq_lightning.export.ranks import Ranks


@dataclass
class Timings:
    """The clock of one export, on each of its ranks; it runs from when it is made until `collect`.

    Attributes:
        search_seconds: Time in the search of scales and in rounding, of the rank with the most. A GPU works
            behind the program's back: there it is the time until a batch is searched, with what was given to
            the GPU before and was not yet done (a search ends with a look at its result, so no more waiting
            is added for the clock).
        export_seconds: Wall time of the whole export, of the slowest rank: reading and writing too.
        bytes: Size of the safetensors files that were written.
    """

    search_seconds: float = 0.0
    export_seconds: float = 0.0
    bytes: int = 0
    _began: float = field(default_factory=time.monotonic, repr=False)

    @contextlib.contextmanager
    def searching(self) -> Iterator[None]:
        """Adds what happens inside to the time in search and rounding."""
        began = time.monotonic()
        yield
        self.search_seconds += time.monotonic() - began

    def weigh(self, folder: Path) -> None:
        """Notes the size of the files in a folder."""
        self.bytes = sum(file.stat().st_size for file in folder.glob("*.safetensors"))

    def collect(self, ranks: Ranks) -> None:
        """Ends the clock and makes it the same on all ranks. A collective."""
        mine = (self.search_seconds, time.monotonic() - self._began, self.bytes)
        searched, lasted, sizes = zip(*ranks.gather(mine), strict=True)
        self.search_seconds, self.export_seconds, self.bytes = max(searched), max(lasted), max(sizes)

    def metrics(self) -> dict[str, float]:
        """As loggers are told: "daq/search_seconds", "daq/export_seconds" and "daq/bytes"."""
        return {
            "daq/search_seconds": self.search_seconds,
            "daq/export_seconds": self.export_seconds,
            "daq/bytes": float(self.bytes),
        }
