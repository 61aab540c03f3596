"""Two folders with a text: nearer to the model than without, the same each time, refused at once."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import pytest
import tiny_models
import torch
import transformers
from live import folder_bytes
from text_models import save_tokenizer, write_text
from torch import nn

from daq_lightning import CheckpointError, ExportReport, ScaleSearch, export_checkpoint, load_checkpoint
from daq_lightning.cli import main
from daq_lightning.export import calibration as module
from daq_lightning.export import run as running
from daq_lightning.export.calibration import Calibration
from daq_lightning.export.finished import Records, find_leftover
from daq_lightning.export.job import prepare
from daq_lightning.export.run import run
from daq_lightning.export.settings import ExportSettings
from daq_lightning.export.source import Source

CURVATURE, ABSMAX = ExportSettings(rounding="curvature"), ScaleSearch.absmax()
WORDS = ("the", "river", "runs", "over", "stones", "and", "an", "old", "mill", "turns", "slowly", "in", "it")


def text_of(letters: int, seed: int) -> str:
    choose = random.Random(seed)
    text = ""
    while len(text) < letters:
        text += " ".join(choose.choices(WORDS, k=choose.randint(3, 8))) + ".\n"
    return text[:letters]


def trained(model: nn.Module, tokens: torch.Tensor, steps: int, rate: float) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), rate)
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        starts = torch.randint(len(tokens) - 64, (8,), generator=generator)
        batch = torch.stack([tokens[start : start + 64] for start in starts.tolist()])
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    """A base in FP8, a fine-tuned model and an adapter of it, each trained for a moment; and a text."""
    import peft

    folder = tmp_path_factory.mktemp("models")
    (folder / "text.txt").write_text(text_of(4000, seed=0))
    for name in ("unrounded", "base", "post"):
        save_tokenizer(folder / name)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "post")
    torch.manual_seed(0)
    model = tiny_models.llama()
    trained(model, torch.tensor(tokenizer(text_of(4000, seed=1)).input_ids), 40, 3e-3)
    model.bfloat16().save_pretrained(folder / "unrounded")
    shutil.rmtree(folder / "base")
    unrounded = folder / "unrounded"
    export_checkpoint(unrounded, unrounded, folder / "base", scheme="FP8_BLOCK", search=ABSMAX)
    capitals = torch.tensor(tokenizer(text_of(4000, seed=2).replace("the", "a")).input_ids)
    model = tiny_models.llama()
    model.load_state_dict({name: tensor.float() for name, tensor in load_checkpoint(folder / "base").items()})
    trained(model, capitals, 12, 3e-5)
    model.bfloat16().save_pretrained(folder / "post")
    start = transformers.AutoModelForCausalLM.from_pretrained(folder / "unrounded", dtype=torch.float32)
    adapted = peft.get_peft_model(start, peft.LoraConfig(r=4, target_modules=["q_proj", "up_proj"]))
    trained(adapted, capitals, 12, 1e-3)
    adapted.save_pretrained(folder / "adapter")
    return folder


def log_p(model: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model.float().eval()(input_ids=tokens).logits.double().log_softmax(-1)


def read(path: Path | str) -> nn.Module:
    """As a user of transformers loads it, dequantized by this package's reader."""
    config = transformers.AutoConfig.from_pretrained(path)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = transformers.LlamaForCausalLM(config)
    weights = {name: tensor.float() for name, tensor in load_checkpoint(path, torch.float32).items()}
    model.load_state_dict(weights)
    return model


def divergence(post: nn.Module, out: Path, models: Path) -> float:
    tokenizer = transformers.AutoTokenizer.from_pretrained(models / "post")
    tokens = torch.tensor(tokenizer(text_of(64 * 8, seed=9)).input_ids).reshape(8, 64)
    right, found = log_p(post, tokens), log_p(read(out), tokens)
    return float((right.exp() * (right - found)).sum(-1).mean())


def exported(models: Path, out: Path, **choices) -> ExportReport:
    return export_checkpoint(models / "post", models / "base", out, rounding="curvature", **choices)


@pytest.fixture(scope="module")
def text(models, tmp_path_factory) -> ExportReport:
    return exported(models, tmp_path_factory.mktemp("text") / "out", calibrate=models / "text.txt")


@pytest.fixture(scope="module")
def own(models, tmp_path_factory) -> ExportReport:
    return exported(models, tmp_path_factory.mktemp("self") / "out", calibrate="self")


def test_a_text_and_the_models_own_bring_an_export_nearer_than_the_update(models, text, own, tmp_path):
    post = read(models / "post")
    nearest = export_checkpoint(models / "post", models / "base", tmp_path / "nearest", search=ABSMAX)
    update = exported(models, tmp_path / "update")
    reports = {"nearest": nearest, "update": update, "text": text, "self": own}
    kl = {name: divergence(post, Path(report.path), models) for name, report in reports.items()}
    print(kl)
    assert kl["text"] < 0.5 * kl["update"] < 0.5 * kl["nearest"], kl
    assert kl["self"] < 0.7 * kl["update"], kl
    for report, source in ((text, "text: 2,048 tokens of text.txt"), (own, "self: 32 sequences")):
        assert all(tensor.rounding.source == f"{source} and update" for tensor in report.tensors)
        assert any(f"along their curvature ({source} and update)" in note for note in report.notes)
        rounding = report.tensors[-1].rounding
        assert 2048 - 64 <= rounding.tokens <= 2048 - 32
        assert (rounding.damping_in, rounding.damping_out, rounding.update) == (0.001, 0.01, 0.1)
        assert all(tensor.rounding.loss <= tensor.rounding.nearest_loss for tensor in report.tensors)
    assert all(tensor.rounding is None for tensor in nearest.tensors)


def test_a_budget_goes_by_the_text_which_is_read_once(models, tmp_path, monkeypatch):
    asked, inner = [], Calibration.curvature
    monkeypatch.setattr(
        Calibration, "curvature", lambda *given, **named: asked.append(1) or inner(*given, **named)
    )
    choices = {"scheme": "W4A16", "budget": "6 bits", "calibrate": models / "text.txt"}
    report = exported(models, tmp_path / "mixed", **choices)
    assert len(asked) == 1
    assert report.placement.measure == "curvature"
    assert not any("error over update" in note for note in report.notes)
    assert len(report.scheme.split(" + ")) > 1
    assert {tensor.rounding.method for tensor in report.tensors} == {"curvature"}
    post = read(models / "post")
    uniform = exported(models, tmp_path / "uniform", scheme="W4A16_G32", calibrate=models / "text.txt")
    assert divergence(post, tmp_path / "mixed", models) < divergence(post, Path(uniform.path), models)


def test_an_adapter_is_rounded_along_a_text(models, tmp_path):
    import peft

    base, adapter = models / "unrounded", models / "adapter"
    choices = {"adapter": adapter, "scheme": "FP8_BLOCK"}
    with pytest.raises(CheckpointError, match="calibrate='self'"):
        export_checkpoint(base, base, tmp_path / "refused", rounding="curvature", **choices)
    report = export_checkpoint(
        base, base, tmp_path / "text", rounding="curvature", calibrate=models / "text.txt", **choices
    )
    export_checkpoint(base, base, tmp_path / "nearest", search=ABSMAX, **choices)
    assert {tensor.rounding.source for tensor in report.tensors} == {"text: 2,048 tokens of text.txt"}
    start = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    post = peft.PeftModel.from_pretrained(start, adapter).merge_and_unload()
    assert divergence(post, tmp_path / "text", models) < 0.3 * divergence(post, tmp_path / "nearest", models)


def test_the_number_of_threads_changes_no_byte(models, own, tmp_path):
    before = torch.get_num_threads()
    torch.set_num_threads(3 if before == 1 else 1)
    try:
        exported(models, tmp_path / "out", calibrate="self")
    finally:
        torch.set_num_threads(before)
    one, many = folder_bytes(tmp_path / "out"), folder_bytes(Path(own.path))
    assert [name for name in many if one[name] != many[name] and name != "daq_manifest.json"] == []


@pytest.mark.parametrize("choice", ["text.jsonl", "self"])
def test_a_recipe_makes_it_again_and_knows_another_text(models, tmp_path, monkeypatch, capsys, choice):
    shutil.copytree(models / "base", tmp_path / "base")
    shutil.copytree(models / "post", tmp_path / "post")
    write_text(tmp_path / "text.jsonl", 1500)
    monkeypatch.chdir(tmp_path)
    command = ["quantize", "post", "--base", "base", "--out", "out", "--rounding", "curvature", "--quiet"]
    assert main([*command, "--calibrate", choice]) == 0
    manifest = json.loads((tmp_path / "out" / "daq_manifest.json").read_text())
    assert manifest["settings"]["calibration"]["text"] == choice
    monkeypatch.chdir(tmp_path / "out")
    assert main(["quantize", "--config", "recipe.yaml", "--quiet"]) == 0
    assert folder_bytes(tmp_path / "out") == folder_bytes(tmp_path / "made-again")
    if choice != "self":
        write_text(tmp_path / "text.jsonl", 1500, seed=1)
        assert main(["quantize", "--config", "recipe.yaml", "--out", "../third", "--quiet"]) == 1
        assert "text.jsonl has changed: its SHA-256 is" in capsys.readouterr().err
        assert not (tmp_path / "third").exists()


def test_an_export_that_is_cut_off_is_resumed_with_the_same_bytes(models, tmp_path, monkeypatch):
    settings = ExportSettings(rounding="curvature", max_shard_bytes=100_000)

    def job(text: Path):
        source, base = Source.from_folder(models / "post"), load_checkpoint(models / "base")
        return prepare(source, base, settings, calibration=Calibration.of(text, source, settings))

    rounded, original = [], running.choose_codes

    def failing(*arguments):
        rounded.append(0)
        if len(rounded) > 4:
            raise KeyboardInterrupt
        return original(*arguments)

    run(job(models / "text.txt"), tmp_path / "expected")
    with monkeypatch.context() as patch:
        patch.setattr(running, "choose_codes", failing)
        with pytest.raises(KeyboardInterrupt):
            run(job(models / "text.txt"), tmp_path / "out", resume=True)
    (tmp_path / "other.txt").write_text(text_of(3000, seed=5))
    assert find_leftover(tmp_path / "out", Records(job(models / "text.txt"))) is not None
    assert find_leftover(tmp_path / "out", Records(job(tmp_path / "other.txt"))) is None
    rounded.clear()
    monkeypatch.setattr(running, "choose_codes", lambda *a: rounded.append(0) or original(*a))
    run(job(models / "text.txt"), tmp_path / "out", resume=True)
    assert 0 < len(rounded) < 10  # of ten groups
    one, two = folder_bytes(tmp_path / "out"), folder_bytes(tmp_path / "expected")
    assert [name for name in two if one[name] != two[name] and name != "daq_manifest.json"] == []


def test_what_cannot_be_walked_is_loaded_whole_and_said(models, text, tmp_path, monkeypatch, caplog):
    def no_stack(*arguments):
        raise module.NotAStackError("its layers share weights")

    monkeypatch.setattr(module, "StreamedModel", no_stack)
    report = exported(models, tmp_path / "whole", calibrate=models / "text.txt")
    assert "loaded whole, not layer by layer: its layers share weights" in caplog.text
    for one, two in zip(report.tensors, text.tensors, strict=True):
        assert one.rounding.loss / one.rounding.nearest_loss == pytest.approx(
            two.rounding.loss / two.rounding.nearest_loss, rel=0.1
        )
    monkeypatch.setattr("daq_lightning.model.whole._memory", lambda device: 1000)
    with pytest.raises(CheckpointError, match="Since its layers share weights"):
        exported(models, tmp_path / "large", calibrate=models / "text.txt")
    assert not (tmp_path / "large").exists()


def test_experts_in_a_stack_go_by_the_update_and_are_named(tmp_path):
    base, post = tiny_models.make_pair(tmp_path, tiny_models.qwen3_moe)
    report = export_checkpoint(post, base, tmp_path / "out", rounding="curvature", calibrate="self")
    sources = {tensor.name: tensor.rounding.source for tensor in report.tensors}
    experts = [name for name in sources if ".experts." in name]
    assert {sources.pop(name) for name in experts} == {"update"}
    assert set(sources.values()) == {"self: 32 sequences and update"}
    assert f"of {', '.join(experts[:3])} and {len(experts) - 3} more." in "".join(report.notes)


@pytest.mark.parametrize(
    ("content", "options", "error"),
    [
        (b" \n", [], "is empty"),
        ("über".encode("latin-1") * 100, [], "is not UTF-8"),
        (b"the river runs", [], "has 14 tokens, expected 64 or more"),
        (None, [], "is not there"),
        (b"the river" * 20, ["--rounding", "auto"], "--calibrate text.txt is what codes are rounded along"),
        (b"the river" * 20, ["--rounding", "nearest"], "--rounding nearest"),
        (b"the river" * 20, ["--calibrate-sha256", "0" * 64], "has changed"),
        (b"the river" * 20, ["--calibrate", "self", "--calibrate-sha256", "0" * 64], "has none"),
        (b'{"words": "the river"}\n', ["--calibrate", "text.jsonl"], "line 1 is no document"),
        (b"the river" * 20, ["--calibrate", "text.pdf"], "expected a .txt file"),
    ],
)
def test_a_text_that_does_not_do_is_refused_before_anything_is_written(
    models, tmp_path, monkeypatch, capsys, content, options, error
):
    monkeypatch.chdir(tmp_path)
    if content is not None:
        for name in ("text.txt", "text.jsonl", "text.pdf"):
            Path(name).write_bytes(content)
    command = ["quantize", str(models / "post"), "--base", str(models / "base"), "--out", "out"]
    command += ["--rounding", "curvature", "--calibrate", "text.txt"]
    assert main([*command, *options]) == 1
    assert error in capsys.readouterr().err
    assert not list(tmp_path.glob("*out*"))


def test_a_model_that_does_not_do_is_refused_before_anything_is_written(models, tmp_path):
    source = Source.from_folder(models / "post")
    with pytest.raises(ValueError, match="needs the folder of the fine-tuned model"):
        export_checkpoint(
            dict(load_checkpoint(models / "post").items()), models / "base", tmp_path / "out",
            rounding="curvature", calibrate="self",
        )  # fmt: skip
    shutil.copytree(models / "post", tmp_path / "bare")
    for file in (tmp_path / "bare").glob("tokenizer*"):
        file.unlink()
    with pytest.raises(ValueError, match=r"no tokenizer .* in .*bare: copy its tokenizer there"):
        Calibration.of(models / "text.txt", Source.from_folder(tmp_path / "bare"), CURVATURE)
    assert Calibration.of("self", Source.from_folder(tmp_path / "bare"), CURVATURE).text is None
    content = json.loads((models / "post" / "config.json").read_text())
    source.weights.config["vocab_size"] = 8
    with pytest.raises(ValueError, match="but the model has 8 tokens"):
        Calibration.of(models / "text.txt", source, CURVATURE)
    assert content["vocab_size"] == tiny_models.VOCABULARY
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("")
    with pytest.raises(CheckpointError, match="not written by this package"):  # before the walk
        exported(models, tmp_path / "out", calibrate=models / "text.txt")
    with pytest.raises(CheckpointError, match="calibration text"):
        place = shutil.copytree(models / "base", tmp_path / "earlier")
        shutil.copy(models / "text.txt", place / "text.txt")
        exported(models, place, calibrate=place / "text.txt")
