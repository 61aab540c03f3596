"""docs/families.md says what becomes of each family of models, and nothing in it is unknown or out of date.

Every family goes through FP8_BLOCK again, and some through all schemes; `python -m benchmarks.families`
writes the page.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from benchmarks.families.matrix import row_of
from benchmarks.families.models import FAMILIES, class_of, served_by
from benchmarks.families.page import SCHEMES, WORDS, cell, ending, states

pytestmark = pytest.mark.filterwarnings("ignore")
PAGE = (Path(__file__).resolve().parent.parent / "docs" / "families.md").read_text(encoding="utf-8")
WHOLE = (
    "DeepseekV32ForCausalLM", "DeepseekV4ForCausalLM", "GptOssForCausalLM", "GraniteMoeForCausalLM",
    "KimiLinearForCausalLM", "Llama4ForCausalLM", "MambaForCausalLM", "Qwen3_5ForCausalLM, MTP layer",
    "Qwen3VLMoeForConditionalGeneration",
)  # fmt: skip
"""Families that go through all schemes here: one of each kind of exception."""


def test_every_family_has_three_outcomes_and_none_is_unknown() -> None:
    found = states(PAGE)
    assert list(found) == FAMILIES
    assert len({family.partition(",")[0] for family in found}) >= 100
    assert {word for words in found.values() for word in words} == set(WORDS.values())
    assert all(served_by(family) in PAGE for family in FAMILIES)


def test_every_exception_has_a_reason_in_words() -> None:
    table, _, reasons = PAGE.partition("## Reasons")
    numbered = set(re.findall(r"^(\d+)\. \w", reasons, re.MULTILINE))
    assert set(re.findall(r"(?:pass|vLLM only|refused) \((\d+)\) ", table)) == numbered
    assert not re.search(r"\| (refused|vLLM only) \|", table)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_does_what_the_page_says(family: str, tmp_path: Path) -> None:
    schemes = SCHEMES if family in WHOLE else SCHEMES[:1]
    row = row_of(family, schemes, tmp_path)
    words = [re.sub(r" \(\d+\)$", "", cell(row.outcomes[scheme], {})) for scheme in schemes]
    assert words == states(PAGE)[family][: len(words)]
    (line,) = [line for line in PAGE.splitlines() if line.startswith(f"| {family} | {served_by(family)} | ")]
    assert line.endswith(f" | {ending(row)}")
    refused = [outcome.words for outcome in row.outcomes.values() if outcome.state == "refused"]
    assert all(class_of(family).__name__ in words or ".weight (" in words for words in refused)
