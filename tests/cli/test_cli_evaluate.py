"""The command `evaluate`: what it prints, what it reads, and what it says of wrong input."""

import json
import shutil

import pytest
import text_models
import tiny_models
import torch
import yaml

from daq_lightning import ScaleSearch, export_checkpoint
from daq_lightning.cli import main

FIGURES = {"kld_mean", "kld_p999", "perplexity_ratio", "delta_p_rms", "same_top", "flips"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """base, post and out with a tokenizer, and texts."""
    place = tmp_path_factory.mktemp("models")
    base, post = tiny_models.make_pair(place, tiny_models.llama, size=0.02)
    text_models.save_tokenizer(post)
    export_checkpoint(post, base, place / "out", search=ScaleSearch(n_coarse=2, n_fine=1))
    text_models.write_text(place / "text.txt")
    text_models.write_text(place / "text.jsonl")
    return place


def run(folder, *options, text="text.txt", base=True):
    """The exit code of the command; `{}` in options stands for the folder."""
    models = ["--post", str(folder / "post"), *(["--base", str(folder / "base")] if base else [])]
    given = [option.format(folder) for option in options]
    return main(["evaluate", str(folder / "out"), *models, "--text", str(folder / text), "--quiet", *given])


def found(capsys):
    return json.loads(capsys.readouterr().out)


def test_the_verdict_comes_first_and_every_figure_with_a_word(folder, capsys):
    assert run(folder) == 0
    first, *lines = capsys.readouterr().out.splitlines()
    assert first.startswith(("Good: ", "Fair: ", "Bad: "))
    assert "of the first choices that training changed are served" in first
    assert "llama.cpp" in first
    text = "\n".join(lines)
    for words in ("KLD from POST", "perplexity", "delta-p", "same top", "flips", "of these", "gain", "along"):
        assert words in text
    assert "393 tokens of text.txt were predicted, in 7 windows of up to 64." in text  # 400, less one each


def test_without_a_base_there_is_no_word_of_the_update(folder, capsys):
    assert run(folder, base=False) == 0
    text = capsys.readouterr().out
    assert "training changed" not in text
    assert "predictions differ from POST by" in text


@pytest.mark.parametrize("text", ["text.txt", "text.jsonl"])
def test_json_holds_all_figures_and_what_they_are_of(folder, text, capsys):
    assert run(folder, "--json", "--limit", "100", "--context", "32", text=text) == 0
    content = found(capsys)
    assert content["figures"].keys() >= FIGURES | {"top_kept", "update_gain", "kld_along"}
    assert content["windows"] == (100 - content["tokens"] if text == "text.txt" else content["windows"])
    assert content["scheme"] == "FP8_BLOCK"
    assert content["quantized_activations"] is True
    assert content["context"] == 32
    assert content["level"] in ("good", "fair", "bad")


def test_a_document_a_line_and_messages_through_the_template(folder, tmp_path, capsys):
    lines = [{"text": "abc"}, {"messages": [{"role": "user", "content": "hi"}]}, {"text": "a"}]
    (tmp_path / "text.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    assert run(folder, "--json", text=tmp_path / "text.jsonl") == 0
    content = found(capsys)
    assert (content["tokens"], content["windows"]) == (2 + len("user.hi\n") - 1, 2)


def test_figures_without_a_number_are_null(folder, capsys):
    post = ["--base", "{}/post"]
    assert run(folder, "--json", "--limit", "2", *post, base=False) == 0
    content = found(capsys)
    assert content["tokens"] == 1
    assert content["figures"]["top_kept"] is None
    assert content["figures"]["kld_mean_error"] is None


def test_weights_only_is_said(folder, capsys):
    assert run(folder, "--weights-only") == 0
    assert "activations in 16 bit" in capsys.readouterr().out


def test_few_changed_tokens_are_said(folder, capsys):
    assert run(folder, "--limit", "20") == 0
    assert "more text would say more" in capsys.readouterr().out


def test_an_adapter_is_merged_into_post_which_is_then_the_base(folder, tmp_path, capsys):
    import peft
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.bfloat16)
    model = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj", "up_proj"]))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    model.save_pretrained(tmp_path / "adapter")
    base, out, adapter = str(folder / "base"), str(tmp_path / "out"), ["--adapter", str(tmp_path / "adapter")]
    assert main(["quantize", base, *adapter, "--out", out, "--quiet"]) == 0
    options = [
        "--post",
        base,
        *adapter,
        "--text",
        str(folder / "text.txt"),
        "--tokenizer",
        str(folder / "post"),
    ]
    assert main(["evaluate", out, *options, "--json", "--quiet"]) == 0
    figures = found(capsys)["figures"]
    assert figures["kld_base"] > 2 * figures["kld_mean"] > 0


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.txt", b" \n", "empty.txt is empty"),
        ("latin.txt", "d\xe9j\xe0".encode("latin1"), "latin.txt is not UTF-8 (byte 1)"),
        ("one.txt", b"a", "fewer than 2 tokens"),
        ("text.csv", b"a,b", "expected a .txt file"),
        ("bad.jsonl", b'{"text": "abc"}\n{"title": "abc"}', "bad.jsonl, line 2 is no document"),
        ("bad.jsonl", b'{"text": "abc"}\n\n[', "bad.jsonl, line 3 is not valid JSON"),
        (
            "bad.jsonl",
            b'{"messages": [{"content": "no role"}]}',
            "line 1: the messages do not fit",
        ),
    ],
)
def test_a_text_that_is_none_is_refused(folder, tmp_path, name, content, message, capsys):
    (tmp_path / name).write_bytes(content)
    assert run(folder, text=tmp_path / name) == 1
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--post", "{}/none"], "none is not there"),
        (["--base", "{}/none"], "none is not there"),
        (["--text", "{}/none.txt"], "none.txt is not there"),
        (["--tokenizer", "{}/base"], "There is no tokenizer (tokenizer.json"),
        (["--device", "cuda:99"], "--device cuda:99 cannot be used"),
        (["--context", "65"], "--context 65: the models take 64 tokens"),
        (["--context", "1"], "--context: expected 2 or more"),
        (["--limit", "1"], "--limit: expected 2 or more"),
        (["--batch-size", "0"], "--batch-size: expected 1 or more"),
    ],
)
def test_wrong_arguments_are_named(folder, options, message, capsys):
    of_the_line = options[-1] in ("0", "1")  # nothing has to be read to see it
    assert run(folder, *options) == (2 if of_the_line else 1)
    assert message in capsys.readouterr().err


def test_a_folder_that_is_no_export_and_missing_options_are_refused(folder, capsys):
    text = ["--text", str(folder / "text.txt")]
    assert main(["evaluate", str(folder / "post"), "--post", str(folder / "post"), *text]) == 1
    assert "was not written by `daq-lightning quantize`" in capsys.readouterr().err
    assert main(["evaluate", str(folder / "out"), *text]) == 2
    assert "--post is missing" in capsys.readouterr().err
    assert main(["evaluate", str(folder / "out"), "--post", str(folder / "post")]) == 2
    assert "--text is missing" in capsys.readouterr().err


def test_too_little_memory_is_no_mistake_of_the_program(folder, monkeypatch, capsys):
    def full(*_, **__):
        raise torch.OutOfMemoryError("out of memory. Tried to allocate 2 GiB.")

    monkeypatch.setattr("daq_lightning.audit.evaluate.evaluate", full)
    assert run(folder, "--device", "cpu") == 1
    assert "cpu has too little memory: pass a smaller --batch-size" in capsys.readouterr().err


def test_the_export_is_left_as_it_was(folder, tmp_path):
    shutil.copytree(folder / "out", tmp_path / "before")
    assert run(folder) == 0
    files = {path.name: path.read_bytes() for path in (folder / "out").iterdir()}
    assert files == {path.name: path.read_bytes() for path in (tmp_path / "before").iterdir()}


def test_figures_of_a_dataset_of_the_hub_are_written_where_it_reads_them(folder, capsys):
    place = folder / "out" / ".eval_results"
    assert run(folder, "--dataset", "no dataset") == 2
    assert "ORG/NAME" in capsys.readouterr().err
    assert not place.exists()
    assert run(folder, "--dataset", "org/bench", "--json") == 0
    figures = found(capsys)["figures"]
    entries = yaml.safe_load((place / "org--bench.yaml").read_text())
    values = {entry["dataset"]["task_id"]: entry["value"] for entry in entries}
    assert values == pytest.approx({name: value for name, value in figures.items() if value is not None})
    assert {entry["dataset"]["id"] for entry in entries} == {"org/bench"}
    assert main(["verify", str(folder / "out")]) == 0  # it is no foreign file
