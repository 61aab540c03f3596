"""`python -m benchmarks.families [NAME ...]`: all families, or some, through three schemes.

Of all, writes docs/families.md; of some, prints their rows.
"""

from __future__ import annotations

import logging
import sys
import tempfile
import time
import warnings
from pathlib import Path

import transformers

from benchmarks.families.matrix import row_of
from benchmarks.families.models import FAMILIES
from benchmarks.families.page import SCHEMES, line, page

PAGE = Path(__file__).resolve().parents[2] / "docs" / "families.md"


def main(chosen: list[str]) -> None:
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    transformers.utils.logging.disable_progress_bar()
    begin, rows = time.monotonic(), []
    for family in chosen or FAMILIES:
        with tempfile.TemporaryDirectory() as folder:
            rows.append(row_of(family, SCHEMES, Path(folder)))
        notes: dict[str, int] = {}
        print(line(rows[-1], notes), *notes, sep="\n  ", flush=True)
    if not chosen:
        PAGE.write_text(page(rows, max(1, round((time.monotonic() - begin) / 60))), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
