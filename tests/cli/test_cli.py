"""The command line does what `export_checkpoint` does, says clearly what is wrong, and leaves nothing
behind."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import get_args

import pytest
import tiny_models
import torch
import transformers
from safetensors.torch import load_file, save_file

import daq_lightning
from daq_lightning import Chain, ExportReport, ScaleSearch, export_checkpoint, load_checkpoint
from daq_lightning.audit.verify import verify_checkpoint
from daq_lightning.checkpoint.schemes import SchemeName
from daq_lightning.cli import _without_interrupts, main
from daq_lightning.cli.arguments import make_parser
from daq_lightning.cli.normalized import normalized
from daq_lightning.export.job import ExportSettings
from daq_lightning.numerics.objectives import METRICS

ROOT = Path(__file__).resolve().parents[2]
CONFIG = transformers.LlamaConfig(
    hidden_size=128,
    intermediate_size=256,
    num_hidden_layers=1,
    num_attention_heads=4,
    num_key_value_heads=4,
    vocab_size=64,
)
Q = "model.layers.0.self_attn.q_proj.weight"
QUICK = ScaleSearch(n_coarse=2, n_fine=1)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folders of a base and of a fine-tuned model."""
    folder = tmp_path_factory.mktemp("models")
    base, post = tiny_models.make_pair(folder, lambda: transformers.LlamaForCausalLM(CONFIG), size=0.0015)
    return SimpleNamespace(base=str(base), post=str(post))


@pytest.fixture(scope="module")
def exported(models, tmp_path_factory):
    """An export, made by the command."""
    out = tmp_path_factory.mktemp("exported") / "fp8"
    assert main(["quantize", models.post, "--base", models.base, "--out", str(out), "--quiet"]) == 0
    return out


def quantize(models, out, *options):
    return main(["quantize", models.post, "--base", models.base, "--out", str(out), *options])


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_quantize_writes_what_export_checkpoint_writes(models, tmp_path, capsys):
    options = ["--scheme", "FP8_DYNAMIC", "--metric", "cosine", "--range", "0.8", "1.25", "--n_coarse", "3"]
    options += ["--n-fine=2", "--alpha_scope", "layer", "--ignore", "re:.*o_proj", "--ignore", "lm_head"]
    assert quantize(models, tmp_path / "command", *options) == 0
    assert "FP8 export" in capsys.readouterr().out
    search = ScaleSearch(
        metric="cosine", alpha_min=0.8, alpha_max=1.25, n_coarse=3, n_fine=2, alpha_scope="layer"
    )
    export_checkpoint(
        models.post,
        models.base,
        tmp_path / "function",
        scheme="FP8_DYNAMIC",
        search=search,
        ignore=["re:.*o_proj", "lm_head"],
    )
    assert contents(tmp_path / "command") == contents(tmp_path / "function")


def test_choices_and_defaults_are_those_of_the_settings():
    quantize_parser = make_parser()._subcommands_action._name_parser_map["quantize"]  # type: ignore[union-attr]
    choices = {action.dest: action.choices for action in quantize_parser._actions}
    assert tuple(choices["scheme"]) == get_args(SchemeName)
    assert tuple(choices["metric"]) == METRICS
    defaults, search = quantize_parser.get_defaults(), ScaleSearch()
    assert tuple(defaults.range) == (search.alpha_min, search.alpha_max)
    for name in ("metric", "n_coarse", "n_fine", "alpha_scope", "tau", "spacing"):
        assert defaults[name] == getattr(search, name)
    for name in ("scheme", "container", "scale_format", "missing_base"):
        assert defaults[name] == getattr(ExportSettings(), name)
    assert tuple(defaults.ignore) == ExportSettings().ignore


def test_help_and_typing_errors_import_no_torch():
    code = (
        "import sys\nfrom daq_lightning.cli import _without_interrupts, main\n"
        "try:\n    main(sys.argv[1:])\nexcept SystemExit as end:\n"
        "    print(end.code, sorted({'torch', 'transformers', 'lightning', 'numpy'} & set(sys.modules)))"
    )

    def run(*argv):
        result = subprocess.run([sys.executable, "-c", code, *argv], cwd=ROOT, capture_output=True, text=True)
        return result.stdout.splitlines()[-1]

    assert run("--help") == "0 []"
    assert run("quantize", "--help") == "0 []"
    assert run("quantize", "x", "--scheme", "INT8") == "2 []"


def test_a_dry_run_prints_the_plan_and_writes_nothing(models, tmp_path, capsys):
    out = tmp_path / "below" / "out"
    assert quantize(models, out, "--dry-run", "--ignore", "model.layers.0.self_attn.o_proj") == 0
    text = capsys.readouterr().out
    assert "ignored by pattern" in text
    assert "6 of 12 tensors in FP8 (E4M3)" in text
    assert "6 of 6 weights to quantize are in" in text
    assert quantize(models, out, "--dry_run", "--json") == 0
    plan = json.loads(capsys.readouterr().out)
    assert sum(tensor["quantize"] for tensor in plan["tensors"].values()) == 7
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_notices_a_base_that_does_not_fit(models, tmp_path, capsys):
    base = tmp_path / "base"
    base.mkdir()
    tensors = load_file(Path(models.base) / "model.safetensors")
    tensors[Q] = tensors[Q][:64].clone()
    save_file(tensors, base / "model.safetensors")
    command = ["quantize", models.post, "--base", str(base), "--dry-run"]
    assert main(command) == 1
    message = capsys.readouterr().err
    assert Q in message
    assert "--missing-base absmax" in message
    assert main([*command, "--missing_base", "absmax"]) == 0
    assert f"{Q}: plain scale" in capsys.readouterr().out


def test_a_config_file_is_a_whole_command_and_options_go_before_it(models, tmp_path, capsys):
    command = [
        "quantize",
        models.post,
        "--base",
        models.base,
        "--out",
        str(tmp_path / "out"),
        "--range",
        "0.9",
        "1.11",
    ]
    with pytest.raises(SystemExit) as end:
        main([*command, "--ignore", "lm_head", "--dry-run", "--print_config"])
    assert end.value.code == 0
    file = tmp_path / "run.yaml"
    file.write_text(capsys.readouterr().out)
    again = make_parser().parse_args(normalized(["quantize", "--config", str(file)])).quantize
    assert (again.post, again.base, again.range) == (models.post, models.base, [0.9, 1.11])
    assert (again.ignore, again.dry_run) == (["lm_head"], True)
    # also where the file is named last
    other = (
        make_parser()
        .parse_args(normalized(["quantize", "elsewhere", "--metric", "sign", f"--config={file}"]))
        .quantize
    )
    assert (other.post, other.metric, other.range) == ("elsewhere", "sign", [0.9, 1.11])
    file.write_text(file.read_text() + "typo: 1\n")
    with pytest.raises(SystemExit) as end:
        main(["quantize", "--config", str(file)])
    assert end.value.code == 2


def test_json_is_the_report(models, tmp_path, capsys):
    assert quantize(models, tmp_path / "out", "--json", "--quiet") == 0
    printed = capsys.readouterr()
    content = json.loads(printed.out)
    assert printed.err == ""
    assert content.pop("path") == str(tmp_path / "out")
    assert content == json.loads((tmp_path / "out" / "daq_report.json").read_text())


def test_progress_in_a_log_has_rate_and_time_left(models, tmp_path, capsys):
    assert quantize(models, tmp_path / "out") == 0
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("Export: 100%")
    assert "MB/s" in line
    assert "0 s left" in line


BAD_COMMANDS = {
    "no such post": (["quantize", "nowhere", "--base", "BASE", "--out", "OUT"], "nowhere is not there"),
    "a name of the Hub": (
        ["quantize", "some/model", "--base", "BASE", "--out", "OUT"],
        "POST: There is no folder some/model; some/model is not (completely) in the Hub's cache",
    ),
    "no such base": (
        ["quantize", "POST", "--base", "nowhere", "--out", "OUT"],
        "--base: nowhere is not there",
    ),
    "no base": (["quantize", "POST", "--out", "OUT"], "--base is missing"),
    "no out": (["quantize", "POST", "--base", "BASE"], "--out is missing"),
    "out is the post": (
        ["quantize", "POST", "--base", "BASE", "--out", "POST"],
        "choose another destination",
    ),
    "range": (
        ["quantize", "POST", "--base", "BASE", "--out", "OUT", "--range", "2", "1"],
        "alpha_max must be",
    ),
    "device": (
        ["quantize", "POST", "--base", "BASE", "--out", "OUT", "--device", "abacus"],
        "--device abacus",
    ),
    "a device that does not compute": (
        ["quantize", "POST", "--base", "BASE", "--out", "OUT", "--device", "meta"],
        "--device meta cannot be used",
    ),
    "a negative limit": (["inspect", "EXPORT", "--limit", "-1"], "--limit says how many weights to show"),
    "ignore": (
        ["quantize", "POST", "--base", "BASE", "--out", "OUT", "--ignore", "nothing"],
        "matches no module",
    ),
    "container": (
        [
            "quantize",
            "POST",
            "--base",
            "BASE",
            "--out",
            "OUT",
            "--scheme",
            "FP8_DYNAMIC",
            "--container",
            "fp8",
        ],
        "use --container compressed-tensors or --scheme FP8_BLOCK",
    ),
    "inspect something else": (["inspect", "POST"], "not written by `daq-lightning quantize`"),
    "inspect with one of two": (["inspect", "OUT", "--base", "BASE"], "belong together"),
    "a parent, but not what it was begun with": (
        ["quantize", "POST", "--base", "BASE", "--out", "OUT", "--parent", "BASE"],
        "--parent BASE: say what this stage was trained from with --chain-from deployed",
    ),
    "a chain without a parent": (
        ["quantize", "POST", "--base", "BASE", "--out", "OUT", "--chain-from", "deployed"],
        "--chain-from deployed needs --parent",
    ),
    "chain of something else": (["chain", "POST"], "is not an export"),
    "chain of nothing": (["chain", "nowhere"], "FOLDER: nowhere is not there"),
    "verify something else": (["verify", "POST"], "holds no quantized weights"),
    "verify nothing": (["verify", "nowhere"], "nowhere is not a folder"),
}


USAGE = {
    "no base",
    "no out",
    "range",
    "a negative limit",
    "container",
    "inspect with one of two",
    "a parent, but not what it was begun with",
}
"""Those that are wrong whatever is in the folders."""


@pytest.mark.parametrize("case", BAD_COMMANDS)
def test_bad_input_is_one_line_and_exit_code_1_or_2(models, exported, tmp_path, capsys, case):
    command, expected = BAD_COMMANDS[case]
    places = {"POST": models.post, "BASE": models.base, "OUT": str(tmp_path / "out"), "EXPORT": str(exported)}
    command = [places.get(part, part) for part in command]
    expected = expected.replace("BASE", models.base)
    code = 2 if case in USAGE else 1
    assert main(command) == code
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.count("\n") == 1
    assert printed.err.startswith("daq-lightning: error: ")
    assert expected in printed.err
    assert list(tmp_path.iterdir()) == []
    assert main([*command, "--debug"]) == code
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["quantize", "inspect", "chain", "verify"])
def test_a_mistake_of_this_program_is_one_line_and_exit_code_70(
    models, exported, tmp_path, capsys, monkeypatch, command
):
    def broken(*_, **__):
        raise KeyError("oh")

    for target in (
        "export.run.run",
        "report.figures.ExportReport.load",
        "audit.chain.Chain.open",
        "audit.verify.run_checks",
    ):
        monkeypatch.setattr(f"daq_lightning.{target}", broken)
    options = {"quantize": [models.post, "--base", models.base, "--out", str(tmp_path / "out")]}
    command = [command, *options.get(command, [str(exported)])]
    assert main(command) == 70
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.count("\n") == 1
    assert "unexpected error: KeyError: 'oh'" in printed.err
    assert "please report" in printed.err
    assert main([*command, "--debug"]) == 70
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.slow
def test_a_path_that_the_terminal_cannot_show_is_escaped(models, tmp_path):
    out = tmp_path / "é→x"
    code = "import sys; from daq_lightning.cli import main; sys.exit(main(sys.argv[1:]))"

    def run(*argv):
        environment = os.environ | {"PYTHONIOENCODING": "ascii", "PYTHONPATH": os.pathsep.join(sys.path)}
        return subprocess.run(
            [sys.executable, "-c", code, *map(str, argv)], capture_output=True, env=environment
        )

    quick = ["--n-coarse", "2", "--n-fine", "1"]
    done = run("quantize", models.post, "--base", models.base, "--out", out, *quick)
    assert (done.returncode, b"Traceback" in done.stderr) == (0, False), done.stderr
    assert b"FP8 export: " + str(out).encode("ascii", "backslashreplace") in done.stdout
    shown = run("inspect", out, "--json")
    assert json.loads(shown.stdout)["path"] == str(out)
    assert (
        run("inspect", out).returncode == run("verify", out).returncode == run("chain", out).returncode == 0
    )


def test_the_home_folder_has_its_short_name(models, tmp_path, monkeypatch, capsys):
    home = tmp_path / "home"
    home.mkdir()
    shutil.copytree(models.post, home / "post")
    shutil.copytree(models.base, home / "base")
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(tmp_path)
    quick = ["--n-coarse", "2", "--n-fine", "1", "--quiet"]
    assert main(["quantize", "~/post", "--base", "~/base", "--out", "~/fp8", *quick]) == 0
    chained = ["--base", "~/fp8", "--parent", "~/fp8", "--chain-from", "deployed"]
    assert main(["quantize", "~/post", *chained, "--out=~/next", *quick]) == 0
    for command in (["inspect", "~/fp8"], ["verify", "~/fp8"], ["chain", "~/next"]):
        assert main(command) == 0
    report = export_checkpoint(
        "~/post", "~/fp8", "~/third", parent="~/fp8", chain_from="deployed", search=QUICK
    )
    assert report.path == str(home / "third")
    assert len(load_checkpoint("~/third")) == len(load_checkpoint(home / "fp8"))
    assert [stage.folder.resolve() for stage in Chain.open("~/third").stages] == [
        home / "fp8",
        home / "third",
    ]
    assert ExportReport.load("~/third").to_dict() == report.to_dict()
    assert verify_checkpoint("~/third") == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["home"]


def test_sizes_of_small_models_are_not_rounded_to_nothing(models, tmp_path, capsys):
    stored = sum(tensor.nbytes for tensor in load_file(Path(models.post) / "model.safetensors").values())
    assert quantize(models, tmp_path / "out", "--dry-run") == 0
    assert f" {stored / 1e3:.3g} kB -> " in capsys.readouterr().out
    assert quantize(models, tmp_path / "out") == 0
    printed = capsys.readouterr()
    assert " kB, " in printed.err
    assert "0.000" not in printed.err


def test_a_star_import_brings_every_public_name():
    names = {}
    exec("from daq_lightning import *", names)
    assert {"export_checkpoint", "DeltaAwareQuantization", "ScaleSearch", "Chain"} <= set(names)
    assert set(daq_lightning.__all__) == set(daq_lightning._HOMES)


def test_an_interrupt_leaves_nothing_behind(models, tmp_path, capsys, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("daq_lightning.checkpoint.writer.CheckpointWriter.write", interrupted)
    assert quantize(models, tmp_path / "out", "--quiet") == 130
    assert "interrupted" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def interruptible():
    """Ctrl-C as a terminal has it: a process that was started by nohup, cron or some CI ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_an_interrupt_during_an_import_is_held_back_until_it_is_done(interruptible):
    steps = []

    def imported():
        with _without_interrupts():
            signal.raise_signal(signal.SIGINT)
            steps.append("imported")

    with pytest.raises(KeyboardInterrupt):
        imported()
    assert steps == ["imported"]
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)


def test_inspect_lists_the_worst_weights_and_recomputes(models, exported, capsys):
    assert main(["inspect", str(exported), "--limit", "2"]) == 0
    assert "and 5 more" in capsys.readouterr().out
    with_models = ["inspect", str(exported), "--base", models.base, "--post", models.post]
    assert main(with_models) == 0
    assert "7 of 7 weights agree" in capsys.readouterr().out
    assert main([*with_models, "--json", "--limit", "3"]) == 0
    content = json.loads(capsys.readouterr().out)
    cosines = [tensor["searched"]["cosine"] for tensor in content["tensors"].values()]
    assert len(cosines) == 3
    assert cosines == sorted(cosines)
    assert content["recomputed"]
    assert content["differences"] == {}


def test_inspect_of_other_models_finds_differences(models, exported, capsys):
    assert main(["inspect", str(exported), "--base", models.post, "--post", models.base]) == 3
    text = capsys.readouterr().out
    assert "0 of 7 weights agree" in text
    assert "and 2 more weights" in text


def test_verify_says_ok_or_what_to_do(exported, tmp_path, capsys):
    assert main(["verify", str(exported)]) == 0
    assert "FAILED" not in capsys.readouterr().out
    (exported / "pytorch_model.bin").touch()
    try:
        assert main(["verify", str(exported)]) == 3
        assert "FAILED  nothing stale" in capsys.readouterr().out
        assert main(["verify", str(exported), "--json"]) == 3
        checks = {check["name"]: check["problems"] for check in json.loads(capsys.readouterr().out)["checks"]}
        assert len(checks.pop("nothing stale")) == 1
        assert not any(checks.values())
    finally:
        (exported / "pytorch_model.bin").unlink()


@pytest.fixture(scope="module")
def second(models, exported, tmp_path_factory):
    """A second stage, made by the command from the deployed weights of `exported`."""
    folder = tmp_path_factory.mktemp("second")
    model = transformers.AutoModelForCausalLM.from_config(CONFIG, dtype=torch.bfloat16)
    model.load_state_dict({name: tensor.bfloat16() for name, tensor in load_checkpoint(exported).items()})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.003 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2)))
    model.save_pretrained(folder / "post")
    command = [
        "quantize",
        str(folder / "post"),
        "--base",
        str(exported),
        "--chain-from",
        "deployed",
        "--quiet",
    ]
    assert main([*command, "--out", str(folder / "fp8")]) == 0
    return folder


def test_quantize_makes_the_stages_that_export_checkpoint_makes(exported, second, capsys):
    (second / "function").mkdir()
    options = {"parent": str(exported), "chain_from": "deployed"}
    export_checkpoint(second / "post", exported, second / "function" / "fp8", **options)
    assert (
        contents(second / "fp8")["daq_report.json"]
        == contents(second / "function" / "fp8")["daq_report.json"]
    )
    lineages = [
        Chain.open(folder / "fp8").stages[1].manifest.lineage for folder in (second, second / "function")
    ]
    assert lineages[0].chain_from == lineages[1].chain_from == "deployed"
    assert lineages[0].parent_fingerprint == lineages[1].parent_fingerprint
    wrong = [
        "quantize",
        str(second / "post"),
        "--base",
        str(exported),
        "--chain-from",
        "weights",
        "--dry-run",
    ]
    assert main([*wrong, "--parent", str(exported)]) == 1
    assert "or --chain-from deployed" in capsys.readouterr().err


def test_chain_shows_every_stage_and_finds_what_was_altered(models, exported, second, capsys):
    def run():
        codes = main(["chain", str(second / "fp8"), "--json"]), main(["chain", str(second / "fp8")])
        printed = capsys.readouterr().out
        content, end = json.JSONDecoder().raw_decode(printed)
        assert codes == (3, 3) if content["problems"] else (0, 0)
        return content, printed[end:]

    content, text = run()
    assert [stage["stage"] for stage in content["stages"]] == [1, 2]
    assert [stage["chain_from"] for stage in content["stages"]] == [None, "deployed"]
    assert content["stages"][1]["totals"]["root"]["cosine"] > 0.5
    assert content["stages"][1]["folder"] == str((second / "fp8").resolve())
    assert text.strip() == Chain.open(second / "fp8").table() + "\nall is as it was exported"
    for name, change in {
        "model.safetensors": lambda file: file[:-9] + bytes([file[-9] ^ 1]) + file[-8:],
        "daq_report.json": lambda file: b"{",
        "daq_manifest.json": lambda file: file.replace(b'"stage": 1', b'"stage": 3'),
    }.items():
        file = exported / name
        before = file.read_bytes()
        file.write_bytes(change(before))
        try:
            content, text = run()
            assert "was altered" in content["problems"][0]
            assert name in content["problems"][0]
            assert f"FAILED  {content['problems'][0]}" in text
        finally:
            file.write_bytes(before)
    assert run()[0]["problems"] == []


class OneMergedWeight:
    """An adapter that doubles one weight."""

    def __init__(self, path):
        self.path, self.name = path, path.name

    def merged(self, name, weight):
        return weight.float() * 2 if name == self.name else None

    def unused(self, names):
        return {self.name} - set(names)

    def unties(self, tied):
        return [name for group in tied for name in group if name == self.name]


@pytest.fixture
def adapter(monkeypatch, tmp_path):
    """Stands in for the reader of adapter folders; the folder's name is the weight that is doubled."""
    for place in ("checkpoint.adapter", "export.source"):
        monkeypatch.setattr(
            f"daq_lightning.{place}.read_adapter", lambda folder: OneMergedWeight(Path(folder))
        )

    def make(name):
        (tmp_path / name).mkdir()
        return str(tmp_path / name)

    return make


def test_an_adapter_is_merged_and_its_base_is_the_base(models, tmp_path, adapter, capsys):
    out, folder = tmp_path / "out", adapter(Q)
    assert main(["quantize", models.base, "--adapter", folder, "--out", str(out)]) == 0
    report = {tensor.name: tensor for tensor in ExportReport.load(out).tensors}
    norm = float(load_checkpoint(models.base)[Q].double().square().sum())
    assert float(report[Q].searched.delta_sq) == pytest.approx(norm)
    assert report[Q].dtype == "float32"
    assert {name for name, tensor in report.items() if tensor.searched.n_changed} == {Q}
    assert verify_checkpoint(out) == []
    assert main(["inspect", str(out), "--base", models.base, "--adapter", folder]) == 0
    assert "7 of 7 weights agree" in capsys.readouterr().out


def test_an_adapter_of_another_model_is_refused(models, tmp_path, adapter, capsys):
    command = ["quantize", models.base, "--adapter", adapter("other.weight"), "--out", str(tmp_path / "out")]
    assert main(command) == 1
    assert "other.weight, which" in capsys.readouterr().err


def test_an_adapter_that_pulls_tied_weights_apart_is_refused(models, tmp_path, adapter, capsys):
    tied = tmp_path / "tied"
    tied.mkdir()
    tensors = load_file(Path(models.base) / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, tied / "model.safetensors", {"format": "pt"})
    config = json.loads((Path(models.base) / "config.json").read_text()) | {"tie_word_embeddings": True}
    (tied / "config.json").write_text(json.dumps(config))
    folder = adapter("model.embed_tokens.weight")
    assert main(["quantize", str(tied), "--adapter", folder, "--out", str(tmp_path / "out")]) == 1
    assert "tie_word_embeddings" in capsys.readouterr().err


def test_an_adapter_folder_as_post_is_explained(models, tmp_path, capsys):
    (tmp_path / "adapter_config.json").write_text("{}")
    assert main(["quantize", str(tmp_path), "--base", models.base, "--out", str(tmp_path / "out")]) == 1
    assert f"--adapter {tmp_path}" in capsys.readouterr().err


def test_a_lora_folder_is_merged_as_peft_merges_it(models, tmp_path):
    pytest.importorskip("daq_lightning.checkpoint.adapter")
    import peft

    model = transformers.AutoModelForCausalLM.from_pretrained(models.base, dtype=torch.float32)
    torch.manual_seed(1)
    adapted = peft.get_peft_model(
        model, peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    )
    adapted.save_pretrained(tmp_path / "adapter")
    out = tmp_path / "out"
    assert (
        main(["quantize", models.base, "--adapter", str(tmp_path / "adapter"), "--out", str(out), "--quiet"])
        == 0
    )
    base, merged = load_checkpoint(models.base), adapted.merge_and_unload().state_dict()
    for tensor in ExportReport.load(out).tensors:
        delta = merged[tensor.name].double() - base[tensor.name].double()
        assert float(tensor.searched.delta_sq) == pytest.approx(float(delta.square().sum()), rel=1e-5)
