"""`recipe.yaml` of an export makes the export again, byte for byte, from wherever it lies."""

import os
import shutil

import pytest
import tiny_models
import torch
import transformers

from daq_lightning import ScaleSearch, export_checkpoint
from daq_lightning.cli import main

QUICK = ["--n-coarse", "2", "--n-fine", "1"]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A base, a fine-tuned model, a LoRA adapter and a first stage."""
    import peft

    folder = tmp_path_factory.mktemp("made")
    base, post = tiny_models.make_pair(folder, lambda: tiny_models.llama(num_hidden_layers=1))
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    adapted = peft.get_peft_model(
        model, peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    )
    adapted.save_pretrained(folder / "adapter")
    assert main(["quantize", str(post), "--base", str(base), "--out", str(folder / "stage1"), "--quiet"]) == 0
    return folder


def contents(folder):
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def assert_made_again(out, monkeypatch):
    """Calls the recipe where it lies, and compares every file with the manifest's."""
    expected = contents(out)
    assert {"recipe.yaml", "README.md", "daq_manifest.json"} <= set(expected)
    monkeypatch.chdir(out)
    assert main(["quantize", "--config", "recipe.yaml", "--quiet"]) == 0
    assert contents(out.parent / "made-again") == expected
    assert contents(out) == expected


@pytest.mark.parametrize(
    "options",
    [
        "post --base base",
        "post --base base --scheme FP8_DYNAMIC --metric sign --range 0.9 1.11 --alpha-scope layer "
        "--tau 1e-05 --ignore re:.*o_proj --ignore lm_head --max-shard-bytes 50000",
        "post --base base --scheme FP8_BLOCK --container compressed-tensors --scale-format ue8m0",
        "post --base base --range 1 2 --spacing log",
        "base --adapter adapter",
        "post --base stage1 --chain-from deployed",
        "post --base post --chain-from weights --parent stage1",
    ],
)
def test_a_recipe_makes_the_same_files(made, tmp_path, monkeypatch, options):
    shutil.copytree(made, tmp_path / "made")
    monkeypatch.chdir(tmp_path / "made")
    assert main(["quantize", *options.split(), "--out", "fp8", *QUICK, "--quiet"]) == 0
    assert_made_again(tmp_path / "made" / "fp8", monkeypatch)


def test_an_export_by_the_function_has_the_recipe_of_the_command(made, tmp_path, monkeypatch):
    shutil.copytree(made, tmp_path / "made")
    place = tmp_path / "made"
    search = ScaleSearch(metric="mse", alpha_min=1, alpha_max=2, n_coarse=8, n_fine=0, spacing="log")
    export_checkpoint(place / "post", place / "base", place / "fp8", search=search)
    assert "spacing: log" in (place / "fp8" / "recipe.yaml").read_text()
    assert_made_again(place / "fp8", monkeypatch)


@pytest.mark.parametrize(
    "name",
    ["null", "1e5", "~", "- a: 'b' \"c\" #d", "{x}", "a\nb", "über ✓", "%s ${HOME}"],
)
def test_folders_of_any_name(made, tmp_path, monkeypatch, name):
    for folder in ("base", "post"):
        shutil.copytree(made / folder, tmp_path / name / folder / name)
    places = [str(tmp_path / name / part / name) for part in ("post", "base")]
    out = tmp_path / name / "out"
    assert main(["quantize", places[0], "--base", places[1], "--out", str(out), *QUICK, "--quiet"]) == 0
    assert str(tmp_path) not in (out / "recipe.yaml").read_text()
    assert_made_again(out, monkeypatch)


def test_a_path_that_is_no_utf8_has_no_recipe(made, tmp_path):
    place = shutil.copytree(made, tmp_path / os.fsdecode(b"\xff"))
    export_checkpoint(made / "post", place / "base", tmp_path / "fp8", search=ScaleSearch.absmax())
    assert not (tmp_path / "fp8" / "recipe.yaml").exists()
    assert "Made in Python" in (tmp_path / "fp8" / "README.md").read_text()


def test_behind_links(made, tmp_path, monkeypatch):
    """Of a destination behind a link, `..` is not where its name says."""
    (tmp_path / "disk" / "deep" / "exports").mkdir(parents=True)
    (tmp_path / "exports").symlink_to(tmp_path / "disk" / "deep" / "exports")
    out = tmp_path / "exports" / "fp8"
    command = ["quantize", str(made / "post"), "--base", str(made / "base"), "--out", str(out), *QUICK]
    assert main([*command, "--quiet"]) == 0
    monkeypatch.chdir(out)
    assert main(["quantize", "--config", "recipe.yaml", "--quiet"]) == 0
    again, expected = contents(tmp_path / "exports" / "made-again"), contents(out)
    # the manifest names the base from where it was called
    assert again.keys() == expected.keys()
    assert [name for name in expected if again[name] != expected[name]] in ([], ["daq_manifest.json"])


def test_options_go_before_the_recipe(made, tmp_path, monkeypatch):
    shutil.copytree(made, tmp_path / "made")
    monkeypatch.chdir(tmp_path / "made" / "stage1")
    again = tmp_path / "elsewhere"
    assert main(["quantize", "--out", str(again), "--config", "recipe.yaml", "--quiet"]) == 0
    expected = contents(tmp_path / "made" / "stage1")
    assert contents(again)["model.safetensors"] == expected["model.safetensors"]
