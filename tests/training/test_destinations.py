"""A run whose exports go elsewhere, or nowhere for want of room."""

import shutil
import tempfile
from types import SimpleNamespace
from uuid import uuid4

import fsspec
import pytest
from live import Tuning, data, fit, make_trainer

from daq_lightning import CheckpointError, DeltaAwareQuantization, ScaleSearch
from daq_lightning.checkpoint.remote import Remote

QUICK = ScaleSearch(metric="cosine", n_coarse=3, n_fine=0)
MEMORY = fsspec.filesystem("memory")


@pytest.fixture
def temporary(tmp_path, monkeypatch):
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


@pytest.fixture
def url():
    return f"memory://{uuid4().hex}/run"


def quantization(place, **changes):
    return DeltaAwareQuantization(**({"dirpath": str(place), "search": QUICK} | changes))


def files_in(url):
    root = MEMORY._strip_protocol(url)
    return {path[len(root) + 1 :] for path in MEMORY.find(root)}


@pytest.mark.parametrize("base", ["auto", "memory"])
def test_exports_are_uploaded_and_the_last_ones_stay(tmp_path, temporary, url, base):
    local = quantization(tmp_path / "exports", base=base)
    fit(tmp_path, local)
    callback = quantization(url, base=base, every_n_train_steps=2, keep_last=1)
    fit(tmp_path, callback)
    assert callback.exports == [f"{url}/step=4"]
    assert callback.report.path == f"{url}/step=4"
    assert callback.metrics["daq/cosine"] == local.metrics["daq/cosine"]
    expected = {path.name for path in (tmp_path / "exports" / "step=4").iterdir()}
    assert files_in(url) == {f"step=4/{name}" for name in expected}
    weights = (tmp_path / "exports" / "step=4" / "model.safetensors").read_bytes()
    assert MEMORY.cat_file(f"{url}/step=4/model.safetensors") == weights
    left = {path.parent.name for path in temporary.rglob("*") if path.is_file()}
    assert left == ({"base"} if base == "auto" else set())


def test_the_name_of_an_export_that_is_there_is_not_taken(tmp_path, temporary, url):
    MEMORY.pipe_file(f"{url}/step=4/notes.txt", b"mine")
    callback = quantization(url, base="memory")
    fit(tmp_path, callback)
    assert callback.exports == [f"{url}/step=4-v1"]
    assert MEMORY.cat_file(f"{url}/step=4/notes.txt") == b"mine"


def test_a_failed_upload_stops_no_training_and_keeps_the_export(tmp_path, temporary, url, monkeypatch):
    original = Remote._put

    def put(self, file, name):
        if name == "model.safetensors" and "step=2" in self.url:
            raise TimeoutError("the connection is gone")
        original(self, file, name)

    monkeypatch.setattr(Remote, "_put", put)
    callback = quantization(url, base="memory", every_n_train_steps=2)
    with pytest.raises(CheckpointError, match="the connection is gone") as caught:
        fit(tmp_path, callback)
    assert callback.exports == [f"{url}/step=4"]
    [kept] = [path.parent for path in temporary.rglob("daq_manifest.json")]
    assert str(kept) in str(caught.value)
    assert "--resume" not in str(caught.value)  # the weights of a run are gone with it


def test_a_file_system_without_its_package_is_refused_before_the_first_step(tmp_path):
    module = Tuning()
    callback = quantization("oci://bucket@space/run")
    trainer = make_trainer(tmp_path, callback)
    with pytest.raises(CheckpointError, match="ocifs"):
        trainer.fit(module, data())
    assert trainer.global_step == 0


def test_want_of_room_is_warned_of_at_the_start_and_ends_in_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda place: SimpleNamespace(free=7_000))
    callback = quantization(tmp_path / "exports", base="memory")
    trainer = make_trainer(tmp_path, callback)
    with (
        pytest.warns(UserWarning, match=r"needs .* kB, and .* has 7 kB free\. Make room before"),
        pytest.raises(CheckpointError, match=r"was not begun: .*7 kB free"),
    ):
        trainer.fit(Tuning(), data())
    assert trainer.global_step == 4
    assert not list((tmp_path / "exports").rglob("*.safetensors"))
