"""What the pages say can be done, can be done: Python blocks run, commands parse, links lead somewhere.

Blocks of a page run one after the other in one namespace, in a folder with the models that the pages speak
of: base/, fine-tuned/, fp8/ and held-out.txt; `module` and `data` are a tiny model in training. A block that
cannot run here has a comment before it: <!-- not run: why -->.
"""

from __future__ import annotations

import contextlib
import inspect
import io
import re
import shlex
from pathlib import Path

import lightning.pytorch as L
import live
import pytest
import text_models
import tiny_models

from daq_lightning import DeltaAwareQuantization, ScaleSearch, export_checkpoint
from daq_lightning.cli.arguments import make_parser
from daq_lightning.cli.normalized import normalized

pytestmark = pytest.mark.filterwarnings("ignore:.*no `val_dataloader`.*")
ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted((ROOT / "docs").glob("*.md"))
OF_PAGES = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
BLOCK = re.compile(r"(<!-- not run: .+ -->\n)?^```(\w*)[^\n]*\n(.*?)^```$", re.DOTALL | re.MULTILINE)
PROGRAM = re.compile(r"^(?:torchrun .* -m daq_lightning|python -m daq_lightning|daq-lightning)(?= )")


def blocks(page: Path, language: str) -> list[str]:
    """The code blocks of a page that are not marked."""
    found = BLOCK.findall(page.read_text(encoding="utf-8"))
    return [code for marked, kind, code in found if kind == language and not marked]


def command_lines(page: Path) -> list[str]:
    """The arguments of every command of ours in shell blocks and between backticks.

    Not of a name alone (`daq-lightning quantize`), nor where "..." stands for the rest.
    """
    shell = "\n".join(blocks(page, "bash")).replace("\\\n", " ").splitlines()
    inline = re.findall(r"`([^`]+)`", re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.M | re.S))
    lines = [" ".join(line.split()) for line in (*shell, *inline)]
    whole = [PROGRAM.sub("", line) for line in lines if PROGRAM.match(line) and "..." not in line]
    return [line.strip() for line in whole if len(line.split()) > 1 or line.strip().startswith("-")]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("docs")
    base, post = tiny_models.make_pair(folder, lambda: tiny_models.llama(num_hidden_layers=1), size=0.02)
    for path in (base, post):
        text_models.save_tokenizer(path)
    post.rename(folder / "fine-tuned")
    text_models.write_text(folder / "held-out.txt")
    (folder / "recipe.yaml").write_text("post: fine-tuned\nmetric: cosine\n")
    search = ScaleSearch(n_coarse=2, n_fine=1)
    export_checkpoint(folder / "fine-tuned", base, folder / "fp8", search=search)
    return folder


@OF_PAGES
def test_python_blocks_run(page: Path, models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(models)
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
    original = L.Trainer.__init__
    monkeypatch.setattr(
        L.Trainer, "__init__", lambda self, **given: original(self, accelerator="cpu", **(quiet | given))
    )
    names: dict[str, object] = {"module": live.Tuning(), "data": live.data()}
    for code in blocks(page, "python"):
        with contextlib.redirect_stdout(io.StringIO()):
            exec(compile(code, str(page), "exec"), names)


@OF_PAGES
def test_commands_parse(page: Path, models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(models)
    for line in command_lines(page):
        arguments = shlex.split(line.partition(" > ")[0], comments=True)
        if {"--help", "--version", "--print_config"} & set(arguments):
            with pytest.raises(SystemExit) as end, contextlib.redirect_stdout(io.StringIO()):
                make_parser().parse_args(normalized(arguments))
            assert end.value.code == 0, line
        else:
            make_parser().parse_args(normalized(arguments))


def test_there_are_blocks_and_commands() -> None:
    assert sum(len(blocks(page, "python")) for page in PAGES) >= 15
    assert sum(len(command_lines(page)) for page in PAGES) >= 25


def test_the_cookbook_has_every_argument_of_the_callback() -> None:
    page = (ROOT / "docs" / "callback.md").read_text()
    named = set(re.findall(r"^\| `(\w+)` \|", page, re.MULTILINE))
    assert named >= set(inspect.signature(DeltaAwareQuantization).parameters)


def test_the_page_of_the_command_has_every_option() -> None:
    page = (ROOT / "docs" / "command.md").read_text()
    named = set(re.findall(r"--[a-z][a-z0-9-]*", page))
    commands = make_parser()._subcommands_action._name_parser_map  # type: ignore[union-attr]
    options = {name for one in commands.values() for action in one._actions for name in action.option_strings}
    said_by_all = {"--help", "--print_config", "--print_shtab"}
    assert {name for name in options if name.startswith("--")} - said_by_all <= named
    assert {f"## {name}" for name in commands} - {"## completion"} <= set(page.splitlines())


def test_every_page_is_in_the_navigation() -> None:
    listed = set(re.findall(r"\w+\.md", (ROOT / "mkdocs.yml").read_text().partition("\nnav:")[2]))
    assert listed == {page.name for page in PAGES} | {"kernels.md", "changelog.md"}


@OF_PAGES
def test_links_to_files_of_the_repository_hold(page: Path) -> None:
    for target in re.findall(r"\]\((\.\./[^)#]+)", page.read_text()):
        assert (page.parent / target).resolve().exists(), target
