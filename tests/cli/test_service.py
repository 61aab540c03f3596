"""The command in scripts: exit codes as documented, JSON as its schema says, logs, completion, help."""

import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import text_models
import tiny_models

from daq_lightning import ScaleSearch, export_checkpoint
from daq_lightning.checkpoint.writer import CheckpointWriter
from daq_lightning.cli import main
from daq_lightning.cli.arguments import make_parser
from daq_lightning.cli.words import EXIT_CODES
from daq_lightning.export import scales as module

ROOT = Path(__file__).resolve().parents[2]
COMMANDS = make_parser()._subcommands_action._name_parser_map  # type: ignore[union-attr]
SCHEMA = json.loads((ROOT / "docs" / "output.schema.json").read_text())


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """base, post with a tokenizer, and exports of two stages."""
    folder = tmp_path_factory.mktemp("made")
    base, post = tiny_models.make_pair(folder, lambda: tiny_models.llama(num_hidden_layers=1), size=0.02)
    text_models.save_tokenizer(post)
    text_models.write_text(folder / "text.txt")
    search = ScaleSearch(n_coarse=2, n_fine=1)
    export_checkpoint(post, base, folder / "fp8", search=search)
    export_checkpoint(post, folder / "fp8", folder / "next", search=search, chain_from="deployed")
    return folder


def test_help_fits_80_columns(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    for parser in (make_parser(), *COMMANDS.values()):
        text = parser.format_help()
        assert [line for line in text.splitlines() if len(line) > 80] == []


@pytest.mark.parametrize("name", COMMANDS)
def test_each_help_has_words_an_example_that_parses_and_exit_codes(monkeypatch, name):
    monkeypatch.setenv("COLUMNS", "80")
    text = COMMANDS[name].format_help()
    before, options, codes = re.fullmatch(
        r"(.*)\noptions:\n(.*)\nexit codes:\n(.*)", text, re.DOTALL
    ).groups()
    joined = before.replace("\\\n", " ")
    examples = re.findall(r"^  daq-lightning (.*)$", joined, re.MULTILINE)
    assert examples
    for example in examples:
        words = example.partition(" > ")[0].split()
        assert words[0] == name
        make_parser().parse_args(words)
    assert len(before.split("positional")[0].split()) > 20  # says what it does
    assert {0, 1, 2, 130} <= {int(code) for code in re.findall(r"^ +(\d+)  ", codes, re.MULTILINE)}
    assert "--json" in options


def test_exit_codes_are_one_table_in_help_and_in_the_page():
    shown = " ".join(make_parser().format_help().split())
    page = (ROOT / "docs" / "command.md").read_text()
    rows = dict(re.findall(r"^\| (\d+) \| (.+) \|$", page, re.MULTILINE))
    assert {int(code): words for code, words in rows.items()} == dict(EXIT_CODES)
    for code, words in EXIT_CODES.items():
        assert f"{code} {words}" in shown


JSON = {
    "quantize": ["quantize", "post", "--base", "base", "--out", "out", "--quiet", "--n-coarse", "2"],
    "quantize, codes along the curvature": [
        "quantize", "post", "--base", "base", "--out", "rounded", "--quiet", "--rounding", "curvature",
    ],
    "quantize-dry-run": ["quantize", "post", "--base", "base", "--dry-run"],
    "inspect": ["inspect", "fp8", "--base", "base", "--post", "post"],
    "inspect, of a chain": ["inspect", "next"],
    "inspect, of other models": ["inspect", "fp8", "--base", "post", "--post", "base"],
    "evaluate": ["evaluate", "fp8", "--post", "post", "--base", "base", "--text", "text.txt", "--quiet"],
    "evaluate, without a base": ["evaluate", "fp8", "--post", "post", "--text", "text.txt", "--quiet"],
    "chain": ["chain", "next"],
    "chain, of a part": ["chain", "fp8"],
    "verify": ["verify", "fp8"],
    "completion": ["completion", "bash"],
}  # fmt: skip


@pytest.mark.parametrize("case", JSON)
def test_json_is_as_its_schema_says(made, monkeypatch, capsys, case):
    jsonschema = pytest.importorskip("jsonschema")
    if case == "completion":
        pytest.importorskip("shtab")
    monkeypatch.chdir(made)
    assert main([*JSON[case], "--json"]) == (3 if case == "inspect, of other models" else 0)
    content = json.loads(capsys.readouterr().out)
    schema = {"$ref": f"#/$defs/{case.partition(',')[0]}", "$defs": SCHEMA["$defs"]}
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.validate(content, schema)
    for name in SCHEMA["$defs"][case.partition(",")[0]].get("required", []):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate({key: value for key, value in content.items() if key != name}, schema)


def test_every_command_prints_json_and_has_a_schema():
    assert COMMANDS.keys() <= SCHEMA["$defs"].keys()
    for name, parser in COMMANDS.items():
        options = {option for action in parser._actions for option in action.option_strings}
        assert {"--json", "--log-level", "--debug"} <= options, name


def test_a_refused_input_prints_no_json(made, capsys):
    assert main(["verify", str(made / "nothing"), "--json"]) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.count("\n") == 1


def test_logs_go_to_stderr_and_leave_the_process_as_it_was(made, capsys, monkeypatch):
    def state():
        loggers = [logging.getLogger("daq_lightning"), logging.getLogger("py.warnings")]
        return [(one.level, one.propagate, list(one.handlers)) for one in loggers], warnings.showwarning

    before = state()
    assert main(["inspect", str(made / "fp8"), "--json", "--log-level", "info"]) == 0
    printed = capsys.readouterr()
    json.loads(printed.out)
    assert re.search(rf"^\S+ \S+ INFO daq_lightning\.cli: OUT is {made / 'fp8'}$", printed.err, re.MULTILINE)
    assert re.search(r"inspect: exit code 0 after \d+\.\d s$", printed.err, re.MULTILINE)
    assert "DEBUG" not in printed.err

    def warns(*_):
        warnings.warn(f"look out at {level}", stacklevel=1)
        raise ValueError("no")

    monkeypatch.setattr("daq_lightning.audit.verify.run_checks", warns)
    for level, seen in (("error", False), ("warning", True)):
        assert main(["verify", str(made / "fp8"), "--log-level", level]) == 1
        assert (f"look out at {level}" in capsys.readouterr().err) == seen
    assert main(["verify", str(made / "fp8"), "--log-level", "debug"]) == 1
    said = capsys.readouterr().err
    assert "DEBUG daq_lightning.cli: daq_lightning " in said
    assert "Traceback" in said
    assert state() == before


def test_a_shell_completes_commands_options_and_choices(capsys, tmp_path):
    pytest.importorskip("shtab")
    assert main(["completion", "bash"]) == 0
    script = capsys.readouterr().out
    lines = {"insp": "inspect", "quantize --metr": "--metric", "quantize --metric co": "cosine"}
    for typed, expected in lines.items():
        words = ["daq-lightning", *typed.split()]
        ask = f"COMP_WORDS=({' '.join(words)}); COMP_CWORD={len(words) - 1}; _shtab_daq_lightning"
        code = f"{script}\n{ask}; echo ${{COMPREPLY[@]}}"
        done = subprocess.run(["bash", "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.stdout.split() == [expected], (typed, done.stderr)
    assert "_shtab_compgen_dirs" in script  # folders, for POST and --base


@pytest.mark.parametrize("shell", ["zsh", "tcsh", "fish"])
def test_other_shells_are_given_every_command(capsys, shell):
    shtab = pytest.importorskip("shtab")
    if shell not in shtab.SUPPORTED_SHELLS:
        pytest.skip(f"shtab {shtab.__version__} has no {shell}")
    assert main(["completion", shell]) == 0
    script = capsys.readouterr().out
    assert all(name in script for name in COMMANDS)
    assert "scale-format" in script
    program = shutil.which(shell)
    if program is not None and shell != "tcsh":  # whose -n does not read a script that is sourced
        done = subprocess.run([program, "-n"], input=script, text=True, capture_output=True, check=False)
        assert done.returncode == 0, done.stderr


def test_without_shtab_completion_says_what_to_install(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "shtab", None)
    assert main(["completion", "zsh"]) == 1
    assert "pip install 'daq-lightning[cli]'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("number", "code", "what"), [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")]
)
def test_an_export_that_is_ended_by_a_signal_is_gone_on_with(
    made, tmp_path, capsys, monkeypatch, request, number, code, what
):
    if number == signal.SIGINT:  # ignored in a background job of a shell
        ignored = signal.signal(number, signal.default_int_handler)
        request.addfinalizer(lambda: signal.signal(number, ignored))
    out, before = tmp_path / "out", signal.getsignal(number)
    inputs = ["quantize", str(made / "post"), "--base", str(made / "base"), "--quiet", "--n-coarse", "2"]
    inputs += ["--max-shard-bytes", "20000", "--out"]
    assert main([*inputs, str(tmp_path / "whole")]) == 0
    original = CheckpointWriter.write_json

    def written(self, file, content):
        original(self, file, content)
        if file.startswith(".model-00003"):
            os.kill(os.getpid(), number)

    monkeypatch.setattr(CheckpointWriter, "write_json", written)
    assert main([*inputs, str(out)]) == code
    monkeypatch.undo()
    said = capsys.readouterr().err
    assert f"daq-lightning: {what}; nothing was published. " in said
    complete, total = re.search(
        r" (\d+) of (\d+) files are complete in .*: run again with --resume", said
    ).groups()
    assert 3 <= int(complete) < int(total)
    assert not out.exists()
    assert signal.getsignal(number) is before
    read = []
    search = module.search_batch
    monkeypatch.setattr(module, "search_batch", lambda *a, **k: (read.append(1), search(*a, **k))[1])
    assert main([*inputs, str(out), "--resume"]) == 0
    assert 0 < len(read) < int(total)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == {
        path.name: path.read_bytes() for path in (tmp_path / "whole").iterdir()
    }
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "whole"]
