"""The one way of a weight: settled once, read once, together with its base, and released at the end."""

import gc
import json
import threading
from collections.abc import Mapping

import pytest
import tiny_models
import torch

from daq_lightning import CheckpointError, ExportReport, ScaleSearch, export_checkpoint, load_checkpoint
from daq_lightning.checkpoint import buffers as buffers_module
from daq_lightning.checkpoint.tensor_file import TensorEntry
from daq_lightning.checkpoint.writer import plan_shards
from daq_lightning.export import plan as plan_module
from daq_lightning.export.job import prepare
from daq_lightning.export.ranks import ALONE
from daq_lightning.export.run import run
from daq_lightning.export.settings import ExportSettings
from daq_lightning.export.source import Source
from daq_lightning.export.stream import stream
from daq_lightning.export.work import share_out

QUICK = ScaleSearch(n_coarse=2, n_fine=0)


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return tiny_models.make_pair(tmp_path_factory.mktemp("pair"), tiny_models.llama)


def files_of(folder):
    skipped = ("daq_report.json", "daq_manifest.json")
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir()) if file.name not in skipped}


class OnceOnly(Mapping):
    """A mapping that computes its tensors, and fails when one is asked for again."""

    def __init__(self, tensors):
        self.tensors, self.asked = tensors, []

    def __getitem__(self, name):
        if name not in self.tensors:
            raise KeyError(name)
        if name in self.asked:
            raise RuntimeError(f"{name} was read a second time")
        self.asked.append(name)
        return self.tensors[name].clone()

    def __iter__(self):
        return iter(self.tensors)

    def __len__(self):
        return len(self.tensors)


def test_a_lazy_mapping_is_read_once(pair, tmp_path):
    base, post = ({name: tensor.clone() for name, tensor in load_checkpoint(path).items()} for path in pair)
    plain = export_checkpoint(post, base, tmp_path / "plain", search=QUICK)
    lazy = OnceOnly(post), OnceOnly(base | {"unused.weight": torch.ones(4, 4)})
    export_checkpoint(*lazy, tmp_path / "lazy", search=QUICK)
    assert files_of(tmp_path / "lazy") == files_of(tmp_path / "plain")
    assert sorted(lazy[0].asked) == sorted(post)
    assert sorted(lazy[1].asked) == sorted(tensor.name for tensor in plain.tensors)


def test_an_open_folder_is_the_folder_that_it_is(pair, tmp_path):
    base, post = pair
    export_checkpoint(post, base, tmp_path / "folders", search=QUICK)
    export_checkpoint(load_checkpoint(post), load_checkpoint(base), tmp_path / "open", search=QUICK)
    assert files_of(tmp_path / "open") == files_of(tmp_path / "folders")
    assert {"config.json", "tokenizer_config.json", "chat_template.jinja"} <= set(files_of(tmp_path / "open"))


def test_an_adapter_of_a_mapping_is_refused(pair, tmp_path):
    base = dict(load_checkpoint(pair[0]))
    with pytest.raises(CheckpointError, match="adapter='there' is merged into the model folder"):
        export_checkpoint(base, base, tmp_path / "out", adapter="there")
    assert not (tmp_path / "out").exists()


def test_every_pair_holds_a_weight_and_its_own_base(tmp_path):
    base, post = tiny_models.make_pair(tmp_path, tiny_models.qwen3_moe)
    weights, bases = load_checkpoint(post), load_checkpoint(base)
    job = prepare(Source.from_folder(post), bases, ExportSettings(search=QUICK))
    seen = []
    work = share_out(job.plan, plan_shards(job.plan.stored_together), ALONE, together=True)
    for batch in stream(job, work):
        for plan, weight, reference in batch:
            seen.append(plan.spec.name)
            assert torch.equal(weight, weights[plan.spec.name])
            assert (reference is not None) == plan.quantize
            assert reference is None or torch.equal(reference, bases[plan.spec.name])
    assert sorted(seen) == sorted(tensor.spec.name for tensor in job.plan.tensors)


def test_the_plan_is_made_once(pair, tmp_path, monkeypatch):
    made, original = [], plan_module.check_fused
    monkeypatch.setattr(plan_module, "check_fused", lambda *arguments: made.append(0) or original(*arguments))
    export_checkpoint(pair[1], pair[0], tmp_path / "out", search=QUICK)
    assert made == [0]


def test_threads_and_buffers_end_with_the_export(pair, tmp_path, monkeypatch):
    pools, original = [], buffers_module.Buffers.close
    monkeypatch.setattr(buffers_module.Buffers, "close", lambda self: pools.append(self) or original(self))
    read, reader = [], TensorEntry.read

    def failing(entry, buffers=None):
        read.append(entry.name)
        if len(read) > 12:
            raise OSError("the disk is gone")
        return reader(entry, buffers)

    export_checkpoint(pair[1], pair[0], tmp_path / "out", search=QUICK)
    monkeypatch.setattr(TensorEntry, "read", failing)
    with pytest.raises(OSError, match="the disk is gone"):
        export_checkpoint(pair[1], pair[0], tmp_path / "failed", search=QUICK)
    gc.collect()
    assert len(pools) == 2
    assert all(pool._free == [] for pool in pools)
    assert not [
        thread for thread in threading.enumerate() if thread.name.startswith(("read-ahead", "write-behind"))
    ]
    assert not (tmp_path / "failed").exists()


def test_a_note_in_a_report_takes_no_tensor_out_of_the_totals(pair, tmp_path):
    report = export_checkpoint(pair[1], pair[0], tmp_path / "out", search=QUICK)
    file = tmp_path / "out" / "daq_report.json"
    content = json.loads(file.read_text())
    for entry in content["tensors"].values():
        entry["note"] = "looked at by hand"
    file.write_text(json.dumps(content))
    assert ExportReport.load(tmp_path / "out").totals() == report.totals()
    first = next(iter(content["tensors"].values()))
    first["without_base"] = "the base has no such weight"
    file.write_text(json.dumps(content))
    left = int(report.totals().n) - first["searched"]["sums"]["n"]
    assert int(ExportReport.load(tmp_path / "out").totals().n) == left


def test_a_job_takes_the_weights_of_a_later_step_and_refuses_other_tensors(pair, tmp_path):
    base, post = load_checkpoint(pair[0]), dict(load_checkpoint(pair[1]))
    job = prepare(Source.from_mapping(dict(base)), base, ExportSettings(search=QUICK))
    trained = job.after_training(Source.from_mapping(post), {"global_step": 7})
    run(trained, tmp_path / "later")
    assert json.loads((tmp_path / "later" / "daq_manifest.json").read_text())["training"] == {
        "global_step": 7
    }
    export_checkpoint(post, base, tmp_path / "at once", search=QUICK)
    later, at_once = files_of(tmp_path / "later"), files_of(tmp_path / "at once")
    cards = [files.pop("README.md").decode() for files in (later, at_once)]
    assert later == at_once
    assert ["callbacks=[export]" in card for card in cards] == [True, False]  # how each was made
    name = next(iter(post))
    with pytest.raises(CheckpointError, match=f"other tensors than when training began: {name}"):
        job.after_training(Source.from_mapping(post | {name: post[name].float()}), {})
