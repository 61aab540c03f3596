"""An export deletes nothing that an export did not write: no input of its own, and no file of anybody
else."""

import hashlib
import json
import os
import shutil
from types import SimpleNamespace

import pytest
import tiny_models
import torch
import transformers

from daq_lightning import CheckpointError, ScaleSearch, export_checkpoint, load_checkpoint
from daq_lightning.cli import main

QUICK = ScaleSearch(n_coarse=2, n_fine=1)
SETTINGS = ["--n-coarse", "2", "--n-fine", "1", "--quiet"]


def hashes(folder):
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A base, a fine-tuned model, a LoRA adapter, an export, and a second stage that follows it."""
    import peft

    folder = tmp_path_factory.mktemp("made")
    base, post = tiny_models.make_pair(folder, lambda: tiny_models.llama(num_hidden_layers=1))
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(
        folder / "adapter"
    )
    export_checkpoint(post, base, folder / "stage1", search=QUICK)
    export_checkpoint(post, folder / "stage1", folder / "stage2", search=QUICK, chain_from="deployed")
    return folder


@pytest.fixture
def place(made, tmp_path):
    """A copy of all that a test may damage."""
    shutil.copytree(made, tmp_path / "place", symlinks=True)
    return tmp_path / "place"


def quantize(post, *options):
    return main(["quantize", str(post), *map(str, options), *SETTINGS])


def adapter_below(place):
    (place / "stage1" / "adapter").mkdir()
    for file in (place / "adapter").iterdir():
        shutil.move(file, place / "stage1" / "adapter" / file.name)
    return [place / "base", "--adapter", place / "stage1" / "adapter", "--out", place / "stage1"]


def listed_adapter_below(place):
    """As `merge_adapters=False` leaves it: the adapter is a part of the export, and all that the training
    made."""
    out = place / "stage1"
    command = adapter_below(place)
    manifest = json.loads((out / "daq_manifest.json").read_text())
    del manifest["fingerprint"]
    for file in (out / "adapter").iterdir():
        manifest["files"][f"adapter/{file.name}"] = {
            "size": file.stat().st_size,
            "sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
        }
    text = json.dumps(manifest, sort_keys=True)
    manifest["fingerprint"] = hashlib.sha256(text.encode()).hexdigest()
    (out / "daq_manifest.json").write_text(json.dumps(manifest))
    return command


def base_below(place):
    shutil.move(place / "base", place / "stage1" / "base")
    return [place / "post", "--base", place / "stage1" / "base", "--out", place / "stage1"]


def post_below(place):
    shutil.move(place / "post", place / "stage1" / "post")
    return [place / "stage1" / "post", "--base", place / "base", "--out", place / "stage1"]


def base_is_out(place):
    return [place / "post", "--base", place / "stage1", "--out", place / "stage1"]


def base_through_a_link(place):
    (place / "link").symlink_to("stage1")
    return [place / "post", "--base", place / "link", "--out", place / "stage1"]


def out_through_a_link(place):
    shutil.copytree(place / "stage1", place / "runs" / "stage1")
    (place / "link").symlink_to("runs")
    return [place / "post", "--base", place / "runs" / "stage1", "--out", place / "link" / "stage1"]


def links_of_a_cache(place, folder):
    """As in the hub's cache: a folder whose files are links into another, which holds an export too."""
    snapshot, blobs = place / "hub" / "snapshots" / "abc", place / "hub" / "blobs"
    snapshot.mkdir(parents=True)
    shutil.copytree(place / "stage1", blobs)
    for file in (place / folder).iterdir():
        shutil.copyfile(file, blobs / f"of-{file.name}")
        (snapshot / file.name).symlink_to(blobs / f"of-{file.name}")
    return snapshot, blobs


def a_base_of_links(place):
    snapshot, blobs = links_of_a_cache(place, "base")
    return [place / "post", "--base", snapshot, "--out", blobs]


def adapter_of_links(place):
    snapshot, blobs = links_of_a_cache(place, "adapter")
    return [place / "base", "--adapter", snapshot, "--out", blobs]


def parent_is_out(place):
    chained = ["--base", place / "stage1", "--chain-from", "deployed", "--parent", place / "stage1"]
    shutil.copytree(place / "stage1", place / "copy")
    chained[1] = place / "copy"
    return [place / "post", *chained, "--out", place / "stage1"]


def root_is_out(place):
    """The base of the first stage is an export, and would be replaced by the third."""
    export_checkpoint(place / "post", place / "stage1", place / "first", search=QUICK)
    chained = ["--base", place / "first", "--chain-from", "deployed"]
    return [place / "post", *chained, "--out", place / "stage1"]


def earlier_stage_is_out(place):
    return [place / "post", "--base", place / "stage2", "--chain-from", "deployed", "--out", place / "stage1"]


def out_in_the_parent(place):
    chained = ["--base", place / "stage1", "--chain-from", "deployed"]
    return [place / "post", *chained, "--out", place / "stage1" / "next"]


def base_is_a_leftover(place):
    shutil.move(place / "base", place / ".out.earlier-12345678")
    return [place / "post", "--base", place / ".out.earlier-12345678", "--out", place / "out"]


IN_THE_WAY = {
    case.__name__: case
    for case in (
        adapter_below, listed_adapter_below, base_below, post_below, base_is_out, base_through_a_link,
        out_through_a_link, a_base_of_links, adapter_of_links, parent_is_out, root_is_out,
        earlier_stage_is_out,
        out_in_the_parent, base_is_a_leftover,
    )
}  # fmt: skip


@pytest.mark.parametrize("case", IN_THE_WAY)
def test_an_export_that_would_destroy_an_input_is_refused(place, capsys, case):
    command = IN_THE_WAY[case](place)
    before = hashes(place)
    for options in (["--dry-run"], []):
        assert quantize(*command, *options) == 1
        assert "choose another destination" in capsys.readouterr().err
    assert hashes(place) == before


@pytest.mark.parametrize("role", ["weights", "base"])
def test_checkpoints_that_are_passed_as_mappings_are_inputs_too(place, role):
    before = hashes(place)
    inputs = {"weights": load_checkpoint(place / "post"), "base": load_checkpoint(place / "base")}
    inputs[role] = load_checkpoint(place / "stage1")
    with pytest.raises(CheckpointError, match="choose another destination"):
        export_checkpoint(**inputs, out=place / "stage1", search=QUICK)
    assert hashes(place) == before


def thesis(out):
    (out / "thesis.txt").write_text("years of work")
    return "thesis.txt"


def hidden(out):
    (out / ".notes").write_text("x")
    return ".notes"


def in_a_subfolder(out):
    (out / "runs" / "1").mkdir(parents=True)
    (out / "runs" / "1" / "last.ckpt").write_text("x")
    return "runs/1/last.ckpt"


def more_weights(out):
    shutil.copyfile(out / "model.safetensors", out / "merged.safetensors")
    return "merged.safetensors"


def link(out):
    (out / "data").symlink_to(out.parent / "base")
    return "data"


def other_weights(out):
    """A model that was saved over the export: files of the same names."""
    for file in ("model.safetensors", "config.json"):
        shutil.copyfile(out.parent / "post" / file, out / file)
    return "model.safetensors"


@pytest.mark.parametrize("put", [thesis, hidden, in_a_subfolder, more_weights, link, other_weights])
def test_an_earlier_export_with_a_file_of_another_is_not_replaced_and_the_file_is_named(place, capsys, put):
    named = put(place / "stage1")
    before = hashes(place)
    for options in (["--dry-run"], []):
        assert quantize(place / "post", "--base", place / "base", "--out", place / "stage1", *options) == 1
        assert f" {named} in it is not listed" in capsys.readouterr().err
    assert hashes(place) == before


def test_an_export_whose_model_card_was_edited_is_not_replaced(place, capsys):
    card = place / "stage1" / "README.md"
    written = card.read_bytes()
    card.write_bytes(written + b"Our scores.\n")
    before = hashes(place)
    for options in (["--dry-run"], []):
        assert quantize(place / "post", "--base", place / "base", "--out", place / "stage1", *options) == 1
        assert "README.md that was edited" in capsys.readouterr().err
    assert hashes(place) == before
    for content in (None, written):  # removed, or as it was
        card.unlink() if content is None else card.write_bytes(content)
        assert quantize(place / "post", "--base", place / "base", "--out", place / "stage1") == 0


def test_an_export_without_a_manifest_that_can_be_read_is_not_replaced(place, capsys):
    manifest = place / "stage1" / "daq_manifest.json"
    for content in (None, "[]", manifest.read_text().replace("config.json", "thesis.txt")):
        manifest.unlink() if content is None else manifest.write_text(content)
        before = hashes(place)
        assert quantize(place / "post", "--base", place / "base", "--out", place / "stage1") == 1
        assert "does not say which files are its own" in capsys.readouterr().err
        assert hashes(place) == before


@pytest.mark.parametrize("shards", [10**9, 50_000])
def test_an_earlier_export_is_replaced(place, shards):
    """Also one of several files, and one that was cut off."""
    fresh = export_checkpoint(place / "post", place / "base", place / "fresh", search=QUICK)
    export_checkpoint(place / "post", place / "base", place / "again", search=QUICK, max_shard_bytes=shards)
    os.truncate(next((place / "again").glob("*.safetensors")), 100)
    export_checkpoint(place / "post", place / "base", place / "again", search=QUICK)
    assert hashes(place / "again") == hashes(place / "fresh")
    assert fresh.path == str(place / "fresh")


def test_a_destination_beside_or_below_the_models_is_taken(place):
    assert quantize(place / "post", "--base", place / "base", "--out", place / "base" / "fp8") == 0
    assert quantize(place / "post", "--base", place / "base", "--out", place / "base-2") == 0
    assert torch.equal(*(load_checkpoint(place / out)["lm_head.weight"] for out in ("base/fp8", "base-2")))


def test_a_dry_run_knows_a_destination_that_cannot_be_written(made, tmp_path, capsys):
    (tmp_path / "file").touch()
    for out in (tmp_path / "file", tmp_path / "file" / "below" / "out"):
        assert quantize(made / "post", "--base", made / "base", "--out", out, "--dry-run") == 1
        assert str(out) in capsys.readouterr().err
    readonly = SimpleNamespace(path=tmp_path / "readonly")
    readonly.path.mkdir(mode=0o500)
    code = quantize(made / "post", "--base", made / "base", "--out", readonly.path / "a" / "out", "--dry-run")
    assert code == (0 if os.geteuid() == 0 else 1)  # the superuser may write everywhere
    assert list(readonly.path.iterdir()) == []
