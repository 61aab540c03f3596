"""`python -m benchmarks.families [NAME ...]`: all families, or some, through three schemes.

Of all, writes docs/families.md; of some, prints their rows.
"""

from __future__ import annotations

import logging
import sys
import tempfile
import warnings
from pathlib import Path

import transformers

from benchmarks.families.matrix import Row, row_of
from benchmarks.families.models import FAMILIES
from benchmarks.families.own_sizes import that_fit_no_blocks
from benchmarks.families.page import SCHEMES, line, page

PAGE = Path(__file__).resolve().parents[2] / "docs" / "families.md"


def main(chosen: list[str]) -> None:
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    transformers.utils.logging.disable_progress_bar()
    rows, odd = [], 0
    for family in chosen or FAMILIES:
        notes: dict[str, int] = {}
        try:
            with tempfile.TemporaryDirectory() as folder:
                rows.append(_with_own_sizes(row_of(family, SCHEMES, Path(folder))))
            print(line(rows[-1], notes), *notes, sep="\n  ", flush=True)
        except Exception as error:  # whatever a family trips over: the others are shown all the same
            odd += 1
            print(f"{family}: {type(error).__name__}: {error}", flush=True)
    if odd:
        sys.exit(f"{odd} families are neither passed nor refused")
    if not chosen:
        PAGE.write_text(page(rows), encoding="utf-8")


def _with_own_sizes(row: Row) -> Row:
    """Says of blocks that fit the tiny model whether they fit the family's default configuration."""
    outcome = row.outcomes["FP8_BLOCK"]
    odd = that_fit_no_blocks(row.family, experts="*experts*" not in row.kept)
    if outcome.state != "pass" or not odd:
        return row
    names = ", ".join(f"`{name}`" for name in odd)
    words = f"refused at the sizes of the default configuration, where `auto` takes FP8_DYNAMIC: {names}"
    return row._replace(outcomes={**row.outcomes, "FP8_BLOCK": outcome._replace(words=words)})


if __name__ == "__main__":
    main(sys.argv[1:])
