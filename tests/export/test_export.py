"""From two checkpoints to a third: figures that the files bear out, clear words where base and weights do not
fit."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import tiny_models
import torch
from torch import nn

from daq_lightning import CheckpointError, ExportReport, ScaleSearch, export_checkpoint, load_checkpoint
from daq_lightning.checkpoint.tensor_file import TensorEntry, spec_of
from daq_lightning.export.job import ExportSettings
from daq_lightning.export.source import Source, _guess_modules
from daq_lightning.report.figures import only_finite

QUICK = ScaleSearch(metric="cosine", n_coarse=3, n_fine=2)
DOWN = "model.layers.0.mlp.down_proj.weight"


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return tiny_models.make_pair(tmp_path_factory.mktemp("pair"), tiny_models.llama)


@pytest.fixture
def copies(pair, tmp_path):
    """Base and post that a test may damage."""
    for source in pair:
        shutil.copytree(source, tmp_path / source.name)
    return tmp_path / "base", tmp_path / "post"


def tensors_of(folder):
    return {
        name: tensor
        for file in sorted(folder.glob("*.safetensors"))
        for name, tensor in safetensors.torch.load_file(file).items()
    }


def save(folder, tensors):
    safetensors.torch.save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def hashes(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def dequantized(stored, name):
    """The float32 product of codes and scale that a reader takes."""
    codes = stored[name].float().numpy()
    scale = next(stored[name + end] for end in ("_scale", "_scale_inv") if name + end in stored).numpy()
    rows, cols = codes.shape[0] // scale.shape[0], codes.shape[1] // scale.shape[1]
    return (codes * scale.repeat(rows, 0).repeat(cols, 1)).astype(np.float64)


def figures(weight, base, quantized):
    """Every figure of the report, from its definition, in float64."""
    delta, delta_q = weight - base, quantized - base
    changed = delta != 0
    return {
        "sign_rate": np.mean(np.sign(delta) == np.sign(delta_q)),
        "cosine": (delta * delta_q).sum() / np.sqrt((delta**2).sum() * (delta_q**2).sum()),
        "gain": (delta * delta_q).sum() / (delta**2).sum(),
        "mse": ((quantized - weight) ** 2).mean(),
        "delta_norm": np.sqrt((delta**2).sum()),
        "lost": (changed & (delta_q == 0)).mean(),
        "flipped": (changed & (np.sign(delta) == -np.sign(delta_q)) & (delta_q != 0)).mean(),
    }


def exact(tensor):
    return tensor.float().double().numpy()


@pytest.mark.parametrize("scheme", ["FP8_BLOCK", "FP8_DYNAMIC"])
@pytest.mark.parametrize("on_a_grid", [False, True])
def test_the_figures_of_the_report_can_be_recomputed_from_the_files(pair, tmp_path, scheme, on_a_grid):
    base, post = pair
    if on_a_grid:  # a base that is FP8 itself, of which plain quantization loses most of the update
        export_checkpoint(base, base, tmp_path / "base", scheme=scheme, search=ScaleSearch.absmax())
        base = tmp_path / "base"
    out = tmp_path / "out"
    returned = export_checkpoint(post, base, out, scheme=scheme, search=QUICK)
    report = json.loads((out / "daq_report.json").read_text())
    export_checkpoint(post, base, tmp_path / "absmax", scheme=scheme, search=ScaleSearch.absmax())
    weights, bases = tensors_of(post), load_checkpoint(base)
    assert len(report["tensors"]) == 14
    total = {}
    for side, folder in (("searched", out), ("absmax", tmp_path / "absmax")):
        stored = tensors_of(folder)
        everything = [[], [], []]
        for name, entry in report["tensors"].items():
            triple = exact(weights[name]), exact(bases[name]), dequantized(stored, name)
            for part, values in zip(everything, triple, strict=True):
                part.append(values.ravel())
            expected = figures(*triple)
            assert {key: entry[side][key] for key in expected} == pytest.approx(expected, rel=1e-5, abs=1e-12)
        total[side] = figures(*(np.concatenate(part) for part in everything))
        written = {key: report["totals"][side][key] for key in total[side]}
        assert written == pytest.approx(total[side], rel=1e-5, abs=1e-12)
        assert returned.metrics(side) == pytest.approx(total[side], rel=1e-5, abs=1e-12)
    assert total["searched"]["cosine"] > total["absmax"]["cosine"]
    assert set(report["kept"]) == set(weights) - set(report["tensors"])


def test_the_report_on_disk_is_the_report_returned(pair, tmp_path):
    base, post = pair
    returned = export_checkpoint(post, base, tmp_path / "out", search=QUICK)
    loaded = ExportReport.load(tmp_path / "out")
    assert (
        loaded.to_dict()
        == returned.to_dict()
        == json.loads((tmp_path / "out" / "daq_report.json").read_text())
    )
    assert str(tmp_path / "out") in loaded.summary()
    assert len(loaded.summary().splitlines()) <= 10


def test_two_runs_write_the_same_bytes(pair, tmp_path):
    base, post = pair
    for name in ("a", "b"):
        export_checkpoint(post, base, tmp_path / name, search=QUICK, max_shard_bytes=200_000)
    assert len(hashes(tmp_path / "a")) > 6
    assert hashes(tmp_path / "a") == hashes(tmp_path / "b")
    export_checkpoint(post, base, tmp_path / "a", search=QUICK, max_shard_bytes=200_000)
    assert hashes(tmp_path / "a") == hashes(tmp_path / "b")


def test_how_the_input_is_sharded_changes_nothing_but_the_order(pair, tmp_path):
    base, post = pair
    tensors = tensors_of(post)
    names = sorted(tensors)
    folder = tmp_path / "sharded"
    shutil.copytree(post, folder)
    (folder / "model.safetensors").unlink()
    for number, part in enumerate((names[::2], names[1::2])):
        safetensors.torch.save_file(
            {name: tensors[name] for name in part}, folder / f"part{number}.safetensors"
        )
    export_checkpoint(post, base, tmp_path / "a", search=QUICK)
    export_checkpoint(folder, base, tmp_path / "b", search=QUICK)
    first, second = tensors_of(tmp_path / "a"), tensors_of(tmp_path / "b")
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name].float(), second[name].float()) for name in first)
    assert not (tmp_path / "b" / "part0.safetensors").exists()


def no_folder(base):
    shutil.rmtree(base)


def no_safetensors(base):
    (base / "model.safetensors").unlink()


def only_a_pickle(base):
    (base / "model.safetensors").rename(base / "pytorch_model.bin")


def lacks_one(base):
    tensors = tensors_of(base)
    del tensors[DOWN]
    save(base, tensors)


def other_shape(base):
    tensors = tensors_of(base)
    tensors[DOWN] = tensors[DOWN][:, :128].clone()
    save(base, tensors)


def other_names(base):
    save(base, {f"transformer.{name}": tensor for name, tensor in tensors_of(base).items()})


def cut_off(base):
    path = base / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


BAD_BASES = [
    (no_folder, "base does not exist: expected a folder"),
    (no_safetensors, "base has no safetensors files"),
    (only_a_pickle, "can run code when opened"),
    (lacks_one, rf"does not fit 1 of 14 weights: {DOWN}: the base has no such weight.*missing_base='absmax'"),
    (other_shape, r"does not fit 1 of 14 weights.*the base has shape \(128, 128\), the weight \(128, 256\)"),
    (other_names, r"does not fit 14 of 14 weights.*and 9 more"),
    (cut_off, "cut off"),
]


@pytest.mark.parametrize(("damage", "message"), BAD_BASES)
def test_a_base_that_does_not_fit_is_refused_before_anything_is_written(copies, tmp_path, damage, message):
    base, post = copies
    damage(base)
    with pytest.raises(CheckpointError, match=message):
        export_checkpoint(post, base, tmp_path / "out", search=QUICK)
    assert {path.name for path in tmp_path.iterdir()} <= {"base", "post"}


@pytest.mark.parametrize("damage", [lacks_one, other_shape])
def test_a_missing_base_may_be_replaced_by_absmax_and_the_report_names_it(copies, tmp_path, damage):
    base, post = copies
    export_checkpoint(post, base, tmp_path / "whole", search=QUICK)
    export_checkpoint(post, base, tmp_path / "absmax", search=ScaleSearch.absmax())
    damage(base)
    report = export_checkpoint(post, base, tmp_path / "out", search=QUICK, missing_base="absmax")
    [note] = report.notes
    assert note.startswith(f"{DOWN}: plain absmax scale, because the base")
    assert [tensor.name for tensor in report.tensors if tensor.without_base] == [DOWN]
    assert note in json.loads((tmp_path / "out" / "daq_report.json").read_text())["notes"]
    stored, whole, absmax = (tensors_of(tmp_path / name) for name in ("out", "whole", "absmax"))
    for name in stored:
        expected = absmax if name.startswith(DOWN) else whole
        assert torch.equal(stored[name].float(), expected[name].float())
    without = ExportReport.load(tmp_path / "whole")
    others = [tensor.searched.dot for tensor in without.tensors if tensor.name != DOWN]
    assert report.totals().dot == pytest.approx(float(torch.stack(others).sum()))


def post_lacks_one(post):
    lacks_one(post)


def config_of_another_model(post):
    config = json.loads((post / "config.json").read_text())
    (post / "config.json").write_text(json.dumps(config | {"intermediate_size": 512}))


def more_layers(post):
    config = json.loads((post / "config.json").read_text())
    (post / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))


def no_config(post):
    (post / "config.json").unlink()


def unknown_model(post):
    (post / "config.json").write_text(
        json.dumps({"model_type": "no_such_model", "architectures": ["NoSuchModel"]})
    )


def own_code(post):
    (post / "config.json").write_text(
        json.dumps(
            {"model_type": "mine", "architectures": ["Mine"], "auto_map": {"AutoConfig": "mine.MyConfig"}}
        )
    )
    (post / "mine.py").write_text(f"open({str(post.parent / 'sprung')!r}, 'w')\nclass MyConfig: pass\n")


def no_model_class(post):
    config = json.loads((post / "config.json").read_text())
    (post / "config.json").write_text(json.dumps(config | {"architectures": ["pipeline"]}))


def wrong_types(post):
    config = json.loads((post / "config.json").read_text())
    (post / "config.json").write_text(json.dumps(config | {"hidden_size": "128", "architectures": [5]}))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (post_lacks_one, f"post lacks {DOWN}, which the model"),
        (more_layers, r"post lacks model.layers.2.* and 5 more"),
        (config_of_another_model, r"has shape \(.*by config.json it should have \(.*512"),
        (no_config, "has no config.json"),
        (unknown_model, "cannot build the model"),
        (own_code, "Models with code of their own are not supported"),
        (no_model_class, "pipeline is not a model class|cannot build the model"),
        (wrong_types, "cannot build the model"),
    ],
)
def test_a_post_folder_that_is_incomplete_or_foreign_is_refused(copies, tmp_path, damage, message):
    base, post = copies
    damage(post)
    with pytest.raises(CheckpointError, match=message):
        export_checkpoint(post, base, tmp_path / "out", search=QUICK)
    assert {path.name for path in tmp_path.iterdir()} == {"base", "post"}


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", [DOWN, "model.norm.weight", "lm_head.weight"])
def test_nan_and_inf_are_named_with_their_tensor(copies, tmp_path, value, name):
    base, post = copies
    tensors = tensors_of(post)
    tensors[name].view(-1)[-3:] = value
    save(post, tensors)
    with pytest.raises(ValueError, match=rf"{name} .*has {3 if value != value else 0} NaN"):
        export_checkpoint(post, base, tmp_path / "out", search=QUICK)
    assert {path.name for path in tmp_path.iterdir()} == {"base", "post"}


def test_nan_in_the_base_is_named_too(copies, tmp_path):
    base, post = copies
    tensors = tensors_of(base)
    tensors[DOWN][0, 0] = float("nan")
    save(base, tensors)
    with pytest.raises(ValueError, match=rf"the base of {DOWN}.*1 NaN"):
        export_checkpoint(post, base, tmp_path / "out", search=QUICK)


def test_a_nan_code_in_an_fp8_folder_is_named(copies, tmp_path):
    base, post = copies
    export_checkpoint(post, base, tmp_path / "fp8", search=QUICK)
    tensors = tensors_of(tmp_path / "fp8")
    tensors[DOWN].view(torch.uint8)[0, 0] = 0x7F
    save(tmp_path / "fp8", tensors)
    with pytest.raises(ValueError, match=rf"{DOWN} .*1 NaN"):
        export_checkpoint(tmp_path / "fp8", base, tmp_path / "out", search=QUICK)


@pytest.mark.parametrize("place", ["base", "post"])
def test_an_input_is_never_its_own_destination(copies, place):
    base, post = copies
    for folder in copies:
        (folder / "daq_report.json").write_text("{}")  # looks like an export
    before = hashes(base) | hashes(post)
    with pytest.raises(CheckpointError, match="which this export would replace"):
        export_checkpoint(post, base, base.parent / "." / place, search=QUICK)
    assert hashes(base) | hashes(post) == before


def test_a_destination_that_is_not_ours_is_refused_before_the_inputs_are_searched(copies, tmp_path):
    base, post = copies
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("x")
    with pytest.raises(CheckpointError, match="not written by this package"):
        export_checkpoint(post, base, tmp_path / "out")


def test_settings_are_checked_when_they_are_made():
    with pytest.raises(ValueError, match="missing_base"):
        ExportSettings(missing_base="ignore")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="max_shard_bytes"):
        ExportSettings(max_shard_bytes=0)


def test_an_error_while_other_files_are_copied_leaves_nothing(copies, tmp_path):
    base, post = copies
    (post / "secret.json").symlink_to("/proc/self/environ")
    with pytest.raises(CheckpointError, match="link out of its folder"):
        export_checkpoint(post, base, tmp_path / "out", search=QUICK)
    assert {path.name for path in tmp_path.iterdir()} == {"base", "post"}


def test_mappings_export_as_the_folders_that_they_come_from(pair, tmp_path):
    base, post = pair
    export_checkpoint(post, base, tmp_path / "folders", scheme="FP8_BLOCK", search=QUICK)
    report = export_checkpoint(
        tensors_of(post), tensors_of(base), tmp_path / "mappings", scheme="FP8_BLOCK", search=QUICK
    )
    expected, stored = tensors_of(tmp_path / "folders"), tensors_of(tmp_path / "mappings")
    assert expected.keys() == stored.keys()
    assert all(torch.equal(stored[name].float(), expected[name].float()) for name in expected)
    assert len(report.tensors) == 14
    assert not (tmp_path / "mappings" / "config.json").exists()
    opened = load_checkpoint(tmp_path / "mappings")
    assert set(opened) == set(tensors_of(post))
    whole = load_checkpoint(tmp_path / "folders")
    assert all(torch.equal(opened[name], whole[name]) for name in opened)
    manifest = json.loads((tmp_path / "mappings" / "daq_manifest.json").read_text())
    assert manifest["quantization_config"]["modules_to_not_convert"] == ["lm_head"]


class Lazy(dict):
    """A mapping that counts what it hands out."""

    def __init__(self, values):
        super().__init__(values)
        self.asked = []

    def __getitem__(self, name):
        self.asked.append(name)
        return super().__getitem__(name)


def test_a_mapping_and_a_folder_mix_and_a_model_says_what_the_tensors_are(pair, tmp_path):
    base, post = pair
    report = export_checkpoint(Lazy(tensors_of(post)), base, tmp_path / "a", scheme="FP8_BLOCK", search=QUICK)
    again = export_checkpoint(post, Lazy(tensors_of(base)), tmp_path / "b", scheme="FP8_BLOCK", search=QUICK)
    assert report.metrics() == again.metrics()
    model = nn.Sequential(nn.Linear(128, 128), nn.LayerNorm(128), nn.Linear(128, 4))
    source = Source.from_mapping(dict(model.state_dict()), model)
    assert [source.outline.role(key, 2) for key in ("0.weight", "2.weight")] == ["linear", "linear"]


def test_names_of_linear_weights_are_guessed_without_tripping_over_odd_ones():
    shapes = {
        "type.weight": (4, 4), "a.weight": (4, 4), "a.b.weight": (4, 8), "c.d.weight": (8, 4),
        "c.weight": (4, 4),
        "embed.weight": (9, 4), "x.norm.weight": (4, 4), "mlp.gate.weight": (2, 4), "lm_head.weight": (9, 4),
        "conv.weight": (4, 4, 3), "a.bias": (4,), "weight": (4, 4),
    }  # fmt: skip
    modules = dict(
        _guess_modules([spec_of(name, torch.empty(shape)) for name, shape in shapes.items()]).named_modules()
    )
    linear = {name for name, module in modules.items() if isinstance(module, nn.Linear)}
    assert linear == {"type", "a", "a.b", "c", "c.d", "lm_head"}


MEMORY = """
import gc, sys
import torch
import transformers.models.llama.modeling_llama  # which an export may or may not import
from daq_lightning import ScaleSearch, export_checkpoint
torch.set_num_threads(1)

def memory(kind):
    [line] = [line for line in open("/proc/self/status") if line.startswith(kind)]
    return int(line.split()[1]) * 1024

for layers in (2, 2, 8):  # the first warms up
    gc.collect()
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # the peak begins anew
    before = memory("VmRSS")
    base, post, out = (f"{sys.argv[1]}/{layers}/{role}" for role in ("base", "post", "out"))
    export_checkpoint(post, base, out, search=ScaleSearch.absmax())
    print(memory("VmHWM") - before)
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_the_number_of_layers(tmp_path):
    size = {}
    for count in (2, 8):
        shape = {"num_hidden_layers": count, "hidden_size": 512, "intermediate_size": 1024}
        _, post = tiny_models.make_pair(tmp_path / str(count), tiny_models.llama, **shape)
        size[count] = (post / "model.safetensors").stat().st_size
    root = str(Path(__file__).resolve().parents[2])
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])}
    # what is freed goes back to the system at once, so that only memory in use is counted
    environment |= {"MALLOC_MMAP_THRESHOLD_": "65536"}
    result = subprocess.run(
        [sys.executable, "-c", MEMORY, str(tmp_path)], capture_output=True, text=True, env=environment
    )
    assert result.returncode == 0, result.stderr[-2000:]
    peak = [int(line) for line in result.stdout.splitlines()[-2:]]
    # bytes that the second export reads beyond the first, from base and from post
    assert size[8] - size[2] > 20e6
    assert peak[1] - peak[0] < (size[8] - size[2]) / 4


def test_every_tensor_is_read_once(pair, tmp_path, monkeypatch):
    base, post = pair
    read, original = [], TensorEntry.read

    def counted(entry, buffers=None):
        read.append((entry.path, entry.name))
        return original(entry, buffers)

    monkeypatch.setattr(TensorEntry, "read", counted)
    export_checkpoint(post, base, tmp_path / "out", search=QUICK)
    assert len(read) == len(set(read))


@pytest.mark.parametrize("with_config", [True, False])
def test_a_base_that_equals_the_weights_is_said(copies, tmp_path, with_config):
    base, post = copies
    same = base if with_config else tensors_of(base)
    report = export_checkpoint(same, base, tmp_path / "out", search=QUICK)
    [note] = [note for note in report.notes if "no weight changed" in note]
    assert "is the base (--base) the model before training?" in note
    assert note in report.summary()
    assert "nan" not in report.summary()
    assert note in json.loads((tmp_path / "out" / "daq_report.json").read_text())["notes"]
    other = export_checkpoint(post, base, tmp_path / "other", search=QUICK)
    assert not any("no weight changed" in note for note in other.notes)


def test_one_changed_weight_is_a_change(copies, tmp_path):
    base, _ = copies
    weights = tensors_of(base)
    weights[DOWN] = weights[DOWN] + 1
    report = export_checkpoint(weights, base, tmp_path / "out", search=QUICK)
    assert not any("no weight changed" in note for note in report.notes)


def test_figures_that_are_no_numbers_are_left_out_for_loggers(copies, tmp_path):
    base, post = copies
    same = export_checkpoint(base, base, tmp_path / "same", search=QUICK).metrics()
    assert set(same) - set(only_finite(same)) == {"gain"}
    changed = export_checkpoint(post, base, tmp_path / "out", search=QUICK).metrics()
    assert only_finite(changed) == changed
