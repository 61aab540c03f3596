"""The last export of a run goes to the Hub, here a stand-in on this machine, and is never lost on the way."""

from __future__ import annotations

from pathlib import Path

import pytest
from hub_server import hub
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from live import fit, folder_bytes

from daq_lightning import DeltaAwareQuantization, ScaleSearch
from daq_lightning.model.hub import HubError

QUICK = ScaleSearch(metric="cosine", n_coarse=3, n_fine=0)


def quantization(folder: Path, name: str) -> DeltaAwareQuantization:
    settings = {"search": QUICK, "every_n_train_steps": 2, "push_to_hub": name}
    return DeltaAwareQuantization(dirpath=str(folder / "exports"), **settings)


def test_the_last_export_is_uploaded_when_training_is_over(tmp_path, monkeypatch):
    export = quantization(tmp_path, "org/model-FP8")
    with hub() as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        fit(tmp_path, export)
        assert len(export.exports) == 2
        stored = dict(server.repos["org/model-FP8"])
    stored.pop(".gitattributes", None)
    assert stored == folder_bytes(export.exports[-1])


def test_a_failed_upload_is_raised_at_the_end_and_the_export_stays(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    export = quantization(tmp_path, "org/model-FP8")
    with pytest.raises(HubError, match="The export is complete in") as caught:
        fit(tmp_path, export)
    assert str(export.exports[-1]) in str(caught.value)
    assert (export.exports[-1] / "config.json").is_file()


@pytest.mark.parametrize("name", ["model", "", 3, "https://hub/org/model"])
def test_what_names_no_repository_is_refused_at_once(tmp_path, name):
    with pytest.raises(MisconfigurationException, match="push_to_hub"):
        quantization(tmp_path, name)
