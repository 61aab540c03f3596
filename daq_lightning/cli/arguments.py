"""The arguments of the command `daq-lightning`, and what is said about them.

Built on jsonargparse, as LightningCLI is: every option can stand in a YAML file (`--config`), and
`--print_config` prints such a file. Choices, defaults and help of the settings are those of the fields of
`ExportSettings` and `ScaleSearch`, which import no torch.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin, get_type_hints

from daq_lightning import __version__
from daq_lightning.cli import words
from daq_lightning.export.settings import ExportSettings
from daq_lightning.numerics.search.settings import ScaleSearch

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

_COLUMNS = 80


def make_parser() -> ArgumentParser:
    """The parser of the command and its subcommands."""
    import jsonargparse

    class Formatter(jsonargparse.DefaultHelpFormatter):
        def _fill_text(self, text: str, width: int, indent: str) -> str:
            fill = super()._fill_text
            parts = text.split("\n\n")
            return "\n\n".join(part if part[:2] == "  " else fill(part, width, indent) for part in parts)

        def _get_help_string(self, action: Any) -> str:
            shown = (
                action.default not in (None, False, []) and action.option_strings and action.dest != "help"
            )
            return (action.help or "") + (
                " (default: %(default)s)" if shown and "==" not in str(action.default) else ""
            )

    def new(about: str, **kinds: Any) -> ArgumentParser:
        return jsonargparse.ArgumentParser(
            description=about, allow_abbrev=False, formatter_class=Formatter, **kinds
        )

    parser = new(words.about(), prog="daq-lightning", version=__version__)
    commands = parser.add_subcommands(
        title="commands", metavar="COMMAND", description="Each has a --help of its own."
    )

    quantize = new(
        words.ABOUT_QUANTIZE, usage="daq-lightning quantize POST --base FOLDER --out FOLDER [options]"
    )
    quantize.add_argument(
        "post", metavar="POST", help="folder of the fine-tuned model (with --adapter: of its base)"
    )
    quantize.add_argument(
        "--base", metavar="FOLDER", help="model that POST was trained from (with --adapter: POST)"
    )
    quantize.add_argument(
        "--out",
        metavar="FOLDER",
        help="where to write, or a URL such as s3://bucket/fp8; an earlier export there is replaced",
    )
    quantize.add_argument(
        "--adapter", metavar="FOLDER", help="LoRA adapter (PEFT), merged into POST in float32"
    )
    quantize.add_argument(
        "--dry-run",
        action="store_true",
        help="print what would be done to each tensor, write nothing; with --budget all weights are read and "
        "measured",
    )
    layout = quantize.add_argument_group("how it is stored")
    _add_setting(layout, ExportSettings, "scheme")
    layout.add_argument(
        "--ignore",
        action="append",
        default=list(ExportSettings().ignore),
        metavar="NAME",
        help=f"{_help_of(ExportSettings, 'ignore')}; can be repeated",
    )
    _add_setting(layout, ExportSettings, "container")
    _add_setting(layout, ExportSettings, "scale_format")
    _add_setting(layout, ExportSettings, "kv_cache")
    layout.add_argument(
        "--kv-text",
        metavar="FILE",
        help="text that POST reads to find the scales of --kv-cache fp8-calibrated: UTF-8, .txt or .jsonl as "
        "for evaluate; all of it is read, and POST is in memory meanwhile",
    )
    _add_setting(layout, ExportSettings, "max_shard_bytes")
    layout.add_argument(
        "--budget", type=str, default=None, metavar="B", help=_help_of(ExportSettings, "budget")
    )
    layout.add_argument(
        "--ladder", nargs="+", default=[], metavar="S", help=_help_of(ExportSettings, "ladder")
    )
    search = quantize.add_argument_group("how scales are searched, and codes rounded")
    _add_setting(search, ScaleSearch, "metric")
    search.add_argument(
        "--range",
        type=float,
        nargs=2,
        default=[ScaleSearch().alpha_min, ScaleSearch().alpha_max],
        metavar=("LOW", "HIGH"),
        help="range of the multiples of the plain (absmax) scale that are tried",
    )
    for name in ("n_coarse", "n_fine", "alpha_scope", "tau", "spacing"):
        _add_setting(search, ScaleSearch, name)
    _add_setting(search, ExportSettings, "rounding")
    search.add_argument(
        "--calibrate",
        metavar="FILE",
        help="with --rounding curvature: UTF-8 text (.txt, or .jsonl as for evaluate) whose first 16,384 "
        "tokens show where the model is sensitive; one layer is in memory at a time. 'self': a text that the "
        "model writes, for which it has to be in memory whole",
    )
    search.add_argument(
        "--calibrate-sha256", metavar="HEX", help="what the SHA-256 of that file must be, as in a recipe.yaml"
    )
    _add_setting(search, ExportSettings, "missing_base")
    chain = quantize.add_argument_group(
        "as a stage of a chain, where each model is trained from the export before"
    )
    chain.add_argument("--parent", metavar="FOLDER", help="the export before; left out, BASE if it is one")
    chain.add_argument(
        "--chain-from",
        choices=["weights", "deployed"],
        help="what POST was trained from: the high-precision weights that the parent was made of, or its "
        "deployed (dequantized) ones. It is checked against the parent; left out, this begins a chain",
    )
    search.add_argument(
        "--device",
        metavar="DEVICE",
        help="where to search: cuda (all GPUs of this machine), cuda:1, ...; left out, the CPU",
    )
    quantize.add_argument(
        "--max-memory",
        type=str,
        metavar="B",
        help="what tensors on their way may take at a time in each process, such as 2GB, beyond what it has "
        "already; not what --calibrate and --kv-text need. Left out, a few of the largest",
    )
    quantize.add_argument(
        "--resume",
        action="store_true",
        help="go on from the files that an export to OUT completed before it was cut off",
    )
    hub = quantize.add_argument_group("on the Hugging Face Hub")
    hub.add_argument(
        "--push-to-hub",
        metavar="ORG/NAME",
        help="upload the export there, once `verify` finds no problem; OUT stays in any case",
    )
    hub.add_argument(
        "--private", action="store_true", help="a repository that --push-to-hub creates is private"
    )
    quantize.add_argument(
        "--config", action="config", metavar="FILE", help="YAML of options, as --print_config prints"
    )
    _add_output(quantize)
    quantize.add_argument("--quiet", action="store_true", help="no progress bar and no summary")
    commands.add_subcommand("quantize", quantize, help="write a quantized checkpoint of a fine-tuned model")

    inspect = new(
        words.ABOUT_INSPECT, usage="daq-lightning inspect OUT [--base FOLDER --post FOLDER] [options]"
    )
    _add_export_and_its_inputs(inspect)
    inspect.add_argument("--limit", type=int, metavar="N", help="show only the N worst weights")
    inspect.add_argument(
        "--html",
        metavar="FILE",
        help="write the report as a page too: one file that needs no network; an earlier page is replaced",
    )
    _add_output(inspect)
    commands.add_subcommand(
        "inspect", inspect, help="show what an export kept of the update, weight by weight"
    )

    evaluate = new(
        words.ABOUT_EVALUATE, usage="daq-lightning evaluate OUT --post FOLDER --text FILE [options]"
    )
    _add_export_and_its_inputs(evaluate)
    evaluate.add_argument(
        "--text",
        metavar="FILE",
        help='UTF-8: .txt, one text; or .jsonl, {"text": ...} or {"messages": [...]} a line',
    )
    evaluate.add_argument(
        "--tokenizer", metavar="FOLDER", help="where the tokenizer is; left out, OUT, else POST"
    )
    evaluate.add_argument("--limit", type=int, metavar="N", help="read only the first N tokens of the text")
    evaluate.add_argument(
        "--context",
        type=int,
        metavar="N",
        help="tokens that are read together; left out, 512 or as many as the model takes",
    )
    evaluate.add_argument(
        "--batch-size", type=int, default=8, metavar="N", help="texts of that length at a time"
    )
    evaluate.add_argument(
        "--device", metavar="DEVICE", help="where to compute: cuda, cuda:1, ...; left out, the CPU"
    )
    evaluate.add_argument(
        "--weights-only",
        action="store_true",
        help="leave activations, keys and values in 16 bit, to see what the weights alone cost",
    )
    evaluate.add_argument(
        "--dataset",
        metavar="ORG/NAME",
        help="the dataset of the Hub that FILE is a text of: the figures go to OUT/.eval_results as well",
    )
    evaluate.add_argument("--quiet", action="store_true", help="no progress bar")
    _add_output(evaluate, checks=False)
    commands.add_subcommand("evaluate", evaluate, help="judge the served model on a text")

    chain = new(words.ABOUT_CHAIN, usage="daq-lightning chain FOLDER [options]")
    chain.add_argument("folder", metavar="FOLDER", help="the last export of the chain")
    _add_output(chain)
    commands.add_subcommand(
        "chain", chain, help="show the stages that led to an export, and whether all are intact"
    )

    verify = new(words.ABOUT_VERIFY, usage="daq-lightning verify OUT [options]")
    verify.add_argument("out", metavar="OUT", help="quantized checkpoint folder")
    _add_output(verify)
    commands.add_subcommand(
        "verify", verify, help="check that servers will load a quantized folder as it is meant"
    )

    completion = new(words.ABOUT_COMPLETION, usage="daq-lightning completion {bash,zsh,tcsh,fish} [options]")
    completion.add_argument(
        "shell", choices=["bash", "zsh", "tcsh", "fish"], help="the shell that is to complete"
    )
    _add_output(completion, checks=False)
    commands.add_subcommand("completion", completion, help="print a script for a shell to complete commands")
    return parser


def _add_export_and_its_inputs(parser: ArgumentParser) -> None:
    parser.add_argument("out", metavar="OUT", help="folder of an export")
    parser.add_argument("--base", metavar="FOLDER", help="the base that was given to quantize")
    parser.add_argument("--post", metavar="FOLDER", help="the fine-tuned model that was given to quantize")
    parser.add_argument("--adapter", metavar="FOLDER", help="the adapter that was given to quantize")


def _add_setting(group: Any, settings: type, name: str) -> None:
    """An option with the choices or type, the default and the words of a field of the settings."""
    (field,) = (field for field in dataclasses.fields(settings) if field.name == name)
    kind = get_type_hints(settings)[name]
    allowed = [
        choice for part in (kind, *get_args(kind)) if get_origin(part) is Literal for choice in get_args(part)
    ]
    option, words = f"--{name.replace('_', '-')}", _help_of(settings, name)
    if allowed:
        listed = f"{{{','.join(map(str, allowed))}}}"
        short = "NAME" if len(f"  {option} {listed}") > _COLUMNS else None  # the words say which there are
        group.add_argument(option, choices=allowed, default=field.default, help=words, metavar=short)
    else:
        group.add_argument(option, type=kind, default=field.default, help=words, metavar=name[0].upper())


@functools.cache
def _words(settings: type) -> dict[str, str]:
    """The section "Attributes:" of a docstring: field -> what it says."""
    import docstring_parser  # jsonargparse comes with it

    parsed = docstring_parser.parse(settings.__doc__ or "", docstring_parser.DocstringStyle.GOOGLE)
    return {field.arg_name: " ".join((field.description or "").split()) for field in parsed.params}


def _help_of(settings: type, name: str) -> str:
    words = _words(settings)[name].rstrip(".").replace("`", "").replace('"', "")
    return words[0].lower() + words[1:]


def _add_output(parser: ArgumentParser, *, checks: bool = True) -> None:
    parser.epilog = words.ends_of(checks)
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")
    parser.add_argument(
        "--log-level",
        choices=words.LOG_LEVELS,
        help="what is logged to stderr, in lines with a time: error hides warnings, info says what was read "
        "and how long it took, debug adds versions and tracebacks. Left out, warnings come as they are",
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
