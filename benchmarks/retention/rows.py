"""The file of rows: a line for each model, base, seed and setting; what it has is not computed again."""

from __future__ import annotations

import csv
from dataclasses import fields
from pathlib import Path
from typing import NamedTuple

from benchmarks.retention.settings import Setting


class Key(NamedTuple):
    """What a row is of; `setting` is the name of one."""

    model: str
    base: str
    seed: int
    setting: str


_SETTING = [field.name for field in fields(Setting)]
_FIRST = [*Key._fields, *_SETTING, "seconds"]


class Rows:
    """Rows of figures by key, in a CSV file that grows line by line.

    Raises:
        ValueError: The file has other columns than this program writes.
    """

    def __init__(self, file: Path) -> None:
        self._file = file
        self._figures: list[str] = []
        self.found: dict[Key, dict[str, float]] = {}
        lines = file.read_text().splitlines(keepends=True) if file.exists() else []
        if not lines:
            return
        columns = lines[0].strip().split(",")
        if columns[: len(_FIRST)] != _FIRST:
            raise ValueError(
                f"{file} has the columns {', '.join(columns)}, expected {', '.join(_FIRST)} and figures: "
                "it is of another version; move it away."
            )
        if not lines[-1].endswith("\n"):  # a run was cut off in the middle of a line
            lines.pop()
            file.write_text("".join(lines))
        self._figures = columns[len(_FIRST) :]
        for line in csv.DictReader(lines):
            key = Key(line["model"], line["base"], int(line["seed"]), line["setting"])
            self.found[key] = {name: float(line[name]) for name in ("seconds", *self._figures)}

    def add(self, key: Key, setting: Setting, seconds: float, figures: dict[str, float]) -> None:
        """Writes one row to the file."""
        new = not self._file.exists()
        self._figures = self._figures or list(figures)
        with self._file.open("a", newline="") as lines:
            writer = csv.writer(lines, lineterminator="\n")
            if new:
                writer.writerow([*_FIRST, *self._figures])
            of_setting = [getattr(setting, name) for name in _SETTING]
            values = [f"{figures.get(name, float('nan')):.6g}" for name in self._figures]
            writer.writerow([*key, *of_setting, f"{seconds:.2f}", *values])
        known = {name: figures.get(name, float("nan")) for name in self._figures}
        self.found[key] = {"seconds": seconds} | known

    def of(self, model: str, base: str, setting: Setting) -> list[dict[str, float]]:
        """The rows of a setting, one for each `seed`."""
        return [
            {"seed": key.seed} | row
            for key, row in sorted(self.found.items())
            if (key.model, key.base, key.setting) == (model, base, setting.name)
        ]

    def subjects(self) -> set[tuple[str, str]]:
        """Models and bases that have rows."""
        return {(key.model, key.base) for key in self.found}
