"""Models by their name on the Hub, and exports that go there, against a stand-in on this machine."""

import pytest
import tiny_models
import torch
import yaml
from hub_server import hub
from live import folder_bytes

from daq_lightning import ScaleSearch, export_checkpoint
from daq_lightning.checkpoint.reader import load_checkpoint
from daq_lightning.cli import main
from daq_lightning.model.hub import HubError, local_folder, push_folder

QUICK = ScaleSearch(n_coarse=2, n_fine=1)
FEW = ["--n-coarse", "2", "--n-fine", "1"]
SECRET = "hf_" + "s" * 30


@pytest.fixture
def server(monkeypatch, tmp_path):
    with hub() as running:
        monkeypatch.setenv("HF_ENDPOINT", running.url)
        monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
        yield running


@pytest.fixture
def pair(tmp_path):
    return tiny_models.make_pair(tmp_path, tiny_models.llama)


def test_a_folder_that_exists_is_taken_as_it_is(server, tmp_path, monkeypatch):
    (tmp_path / "org" / "model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert str(local_folder("org/model")) == "org/model"
    assert local_folder(tmp_path / "elsewhere") == tmp_path / "elsewhere"  # no name on the Hub: not asked for
    assert server.seen == []


def test_only_tensors_and_text_are_fetched(server):
    wanted = {"model.safetensors": b"t", "config.json": b"{}", "tokenizer.model": b"m", "README.md": b"#"}
    others = {
        "pytorch_model.bin": b"p",
        "weights.pt": b"p",
        "modeling.py": b"c",
        "fp16/model.safetensors": b"x",
    }
    server.repos["org/model"] = wanted | others
    folder = local_folder("org/model")
    assert folder_bytes(folder) == wanted
    assert not any(name in path for _, path in server.seen for name in others)
    commit = server.sha("org/model")
    assert folder.name == commit
    server.seen.clear()
    assert local_folder(f"org/model@{commit}") == folder
    assert not any("resolve" in path for _, path in server.seen)  # all of it is in the cache


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "org/missing",
            "no model org/missing on the Hub that you may read: check the name; if it is private",
        ),
        ("org/gated", "org/gated is gated: accept its terms"),
        ("org/model@nowhere", "org/model has no revision nowhere"),
    ],
)
def test_errors_say_what_to_do(server, name, message):
    server.repos["org/model"] = {"config.json": b"{}"}
    server.gated.add("org/gated")
    with pytest.raises(HubError, match=message):
        local_folder(name)


def test_without_a_connection_the_cache_is_looked_into(server, monkeypatch):
    server.repos["org/model"] = {"config.json": b"{}"}
    folder = local_folder("org/model")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    server.seen.clear()
    assert local_folder("org/model") == folder
    with pytest.raises(HubError, match="HF_HUB_OFFLINE is set"):
        local_folder("org/other")
    assert server.seen == []
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert local_folder("org/model") == folder
    with pytest.raises(HubError, match="the Hub cannot be reached: pass a folder"):
        local_folder("org/other")


def test_an_export_goes_to_the_hub_and_comes_back_as_it_was(server, pair, tmp_path, capsys):
    base, post = pair
    server.repos["org/base"], server.repos["org/post"] = folder_bytes(base), folder_bytes(post)
    out = tmp_path / "fp8"
    models = ["org/post", "--base", "org/base@main", "--out", str(out)]
    code = main(["quantize", *models, *FEW, "--push-to-hub", "org/post-FP8", "--private"])
    said = capsys.readouterr()
    assert code == 0, said.err
    assert f"uploaded: {server.url}/org/post-FP8" in said.out
    assert server.repos["org/post-FP8"] == folder_bytes(out)
    assert server.private["org/post-FP8"] is True
    assert len(server.commits) == 1
    card = yaml.safe_load((out / "README.md").read_text().split("---")[1])
    assert card["base_model"] == ["org/post"]
    assert card["base_model_relation"] == "quantized"
    recipe = yaml.safe_load((out / "recipe.yaml").read_text())
    assert recipe["post"] == f"org/post@{server.sha('org/post')}"
    assert recipe["base"] == f"org/base@{server.sha('org/base')}"
    pulled = local_folder("org/post-FP8")
    assert folder_bytes(pulled) == folder_bytes(out)
    assert main(["verify", str(pulled)]) == 0
    # a stage that begins with it
    export_checkpoint(post, "org/post-FP8", tmp_path / "next", search=QUICK)
    one, two = load_checkpoint(out), load_checkpoint(pulled)
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_weights_of_an_earlier_upload_do_not_stay(server, tmp_path):
    folder = tmp_path / "export"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"new")
    old = {"model-00001-of-00002.safetensors": b"o", "model.safetensors.index.json": b"{}", "LICENSE": b"MIT"}
    server.repos["org/model"] = dict(old)
    assert push_folder(folder, "org/model").endswith("/org/model")
    assert server.repos["org/model"] == {"model.safetensors": b"new", "LICENSE": b"MIT"}
    assert len(server.commits) == 1


@pytest.mark.parametrize("status", [403, 400])
def test_a_failed_upload_keeps_the_export_and_shows_no_token(
    server, pair, tmp_path, monkeypatch, capsys, status
):
    base, post = pair
    monkeypatch.setenv("HF_TOKEN", SECRET)
    server.refuses = status
    out = tmp_path / "fp8"
    models = [str(post), "--base", str(base), "--out", str(out)]
    code = main(["quantize", *models, *FEW, "--quiet", "--push-to-hub", "org/post-FP8"])
    said = capsys.readouterr()
    assert code == 1
    assert f"hf upload org/post-FP8 {out}" in said.err
    assert f"HTTP {status}" in said.err or str(status) in said.err
    assert SECRET not in said.err + said.out
    assert main(["verify", str(out)]) == 0
    with pytest.raises(HubError) as raised:
        push_folder(out, "org/post-FP8", token="another-secret")
    assert "another-secret" not in str(raised.value)
    assert raised.value.__cause__ is None  # --debug would print it, with what the server said
    assert raised.value.__suppress_context__


def test_a_name_that_is_none_is_refused_before_any_work(pair, tmp_path, capsys):
    base, post = pair
    arguments = ["quantize", str(post), "--base", str(base), "--out", str(tmp_path / "fp8")]
    assert main([*arguments, "--push-to-hub", "/not/a/name"]) == 2
    assert "--push-to-hub expects ORG/NAME" in capsys.readouterr().err
    assert not (tmp_path / "fp8").exists()
    with pytest.raises(HubError, match="expected ORG/NAME"):
        push_folder(post, "name")


def test_in_python_too(server, pair, tmp_path):
    base, post = pair
    server.repos["org/base"] = folder_bytes(base)
    export_checkpoint(post, "org/base", tmp_path / "fp8", search=QUICK, push_to_hub="org/fp8")
    assert server.repos["org/fp8"] == folder_bytes(tmp_path / "fp8")
