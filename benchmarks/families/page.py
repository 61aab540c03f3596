"""docs/families.md: what became of each family in each scheme, as a table with its reasons in words."""

from __future__ import annotations

import re
from collections.abc import Iterable

from benchmarks.families.matrix import Outcome, Row
from benchmarks.families.models import served_by

SCHEMES = ("FP8_BLOCK", "FP8_DYNAMIC", "W4A16")
WORDS = {"pass": "pass", "noted": "pass", "vllm": "vLLM only", "refused": "refused"}
HEADER = "| family | vLLM 0.33 | FP8_BLOCK | FP8_DYNAMIC | W4A16 | quantized | kept in 16 bit |"
HEAD = """# Families of models

A tiny random model of each family of decoders that transformers 5.23 ships and vLLM 0.33 serves, through each
of three schemes: quantized, `verify`, loaded by `from_pretrained` with the `config.json` that was written,
its logits held against those of a plain float32 model of the weights that codes and scales stand for. This
page is written by `python -m benchmarks.families`; a test puts every family through the first scheme again,
and some through all.

* *pass*: loaded complete, the logits equal to the bit. A number leads to what to know of it.
* *refused*: nothing is written, and the error says why.
* *vLLM only*: written and verified, and transformers 5.23 does not load it; the export's report says so.

vLLM was read (`registry.py`, the layers of its models, `packed_modules_mapping`), not run. "Own code": it has
a class for the family; "backend": it lists it for its transformers backend; "up to": the last version that
had it; "not listed": the class may run in the backend, which takes what fits.

Sizes of the tiny models are those of blocks (128) where the family allows it; where its own sizes do not fit,
a number says so. Kept in 16 bit are head and router; *towers*: all outside the language model; *experts*:
those that a checkpoint holds in one tensor a layer, which no reader takes quantized; *MTP*: layers for
speculation, which transformers does not build; others by name, since one of the readers has no quantized
layer there. With `--ignore` the weights that a refusal names are kept too.

"""


def page(rows: Iterable[Row]) -> str:
    """The whole page."""
    notes: dict[str, int] = {}
    lines = [HEADER, "| --- | --- | --- | --- | --- | --- | --- |"]
    lines += [line(row, notes) for row in rows]
    told = [f"{number}. {words}" for words, number in notes.items()]
    return HEAD + "\n".join([*lines, "", "## Reasons", "", *told]) + "\n"


def line(row: Row, notes: dict[str, int]) -> str:
    """A row of the table; adds its reasons to the notes.

    Raises:
        ValueError: An outcome that is neither a pass nor a refusal.
    """
    found = (cell(row.outcomes[scheme], notes) for scheme in SCHEMES)
    return " | ".join([f"| {row.family}", served_by(row.family), *found, ending(row)])


def ending(row: Row) -> str:
    """A row of the table after its outcomes."""
    named = [", ".join(f"`{name}`" if name[0] != "*" else name for name in some)
             for some in (row.quantized, row.kept)]  # fmt: skip
    return f"{' | '.join(named)} |"


def cell(outcome: Outcome, notes: dict[str, int]) -> str:
    """An outcome in a word, with the number of its reason."""
    if outcome.state not in WORDS:
        raise ValueError(f"neither a pass nor a refusal: {outcome.state}, {outcome.words}")
    if not outcome.words:
        return WORDS[outcome.state]
    return f"{WORDS[outcome.state]} ({notes.setdefault(reason(outcome.words), len(notes) + 1)})"


def reason(words: str) -> str:
    """Words without what is of one model alone: layers by number, counts."""
    words = re.sub(r"[\w.]*\.layers\.\d+\.", "...", words)
    words = re.sub(r"(\.\.\.[\w.]+\.weight \([0-9, ]+\)(, )?)+(\.\.\.)?", _sorted_out, words)
    words = re.sub(r"^\w+ has no Linear weight", "The model has no Linear weight", words)
    words = re.sub(r"\b\d+ (weights|tensors)\b", r"\1", words).rstrip(".") + "."
    return words[0].upper() + words[1:] if not words.startswith("transformers") else words


def _sorted_out(found: re.Match[str]) -> str:
    names = re.findall(r"([\w]+)\.weight \([0-9, ]+\)", found[0])
    return ", ".join(f"`{name}`" for name in dict.fromkeys(names))


def states(text: str) -> dict[str, list[str]]:
    """Family -> the words of its three outcomes, from a page."""
    found = {}
    for row in text.splitlines():
        cells = [part.strip() for part in row.strip("|").split("|")]
        if len(cells) == len(HEADER.strip("|").split("|")) and cells[0] not in ("family", "---"):
            found[cells[0]] = [re.sub(r" \(\d+\)$", "", word) for word in cells[2:5]]
    return found
