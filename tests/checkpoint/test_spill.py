"""Rows on disk come back to the bit, in any pieces, and leave nothing behind."""

import tempfile
from pathlib import Path

import pytest
import torch

from daq_lightning.checkpoint.spill import Spill


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_rows_come_back_in_any_pieces(dtype):
    rows_RN = torch.randn(50, 7).to(dtype)
    with Spill() as spill:
        for start, stop in [(0, 1), (1, 20), (20, 20), (20, 50)]:
            spill.append("one", rows_RN[start:stop])
            spill.append("two", -rows_RN[start:stop])
        for start, stop in [(0, 50), (3, 4), (19, 33), (50, 50)]:
            assert torch.equal(spill.read("one", start, stop), rows_RN[start:stop])
            assert torch.equal(spill.read("two", start, stop), -rows_RN[start:stop])


def test_rows_that_are_no_row_of_memory_are_written_in_order():
    columns = torch.arange(12.0).reshape(3, 4).T
    with Spill() as spill:
        spill.append("a", columns)
        assert torch.equal(spill.read("a", 0, 4), columns)


def test_nothing_is_left_behind_after_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with pytest.raises(KeyError), Spill() as spill:
        spill.append("a", torch.ones(2, 2))
        assert len(list(Path(tmp_path).iterdir())) == 1
        raise KeyError
    assert list(Path(tmp_path).iterdir()) == []
