"""The arguments of the command `daq-lightning`, and what is said about them.

Built on jsonargparse, as LightningCLI is: every option can stand in a YAML file (`--config`), and `--print_config`
prints such a file. The choices and defaults are those of `ExportSettings` and `ScaleSearch`, written out because
importing them would import torch; a test holds the two together.
"""

from __future__ import annotations

import re
from importlib import metadata
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

ABOUT = """Makes FP8 checkpoints that keep what fine-tuning changed, for vLLM, SGLang and transformers. Rounding to FP8
is coarser than most fine-tuning updates; each scale is searched so that the update survives it.
Exit codes: 0 fine, 1 problems were found, 2 wrong arguments or input, 70 an error in this program, 130 interrupted."""
ABOUT_QUANTIZE = """Writes an FP8 checkpoint of a fine-tuned model. POST and BASE are Hugging Face model folders
(safetensors; FP8 folders too). Example: daq-lightning quantize my-model --base its-base --out my-model-fp8"""
ABOUT_INSPECT = """Shows how much of the update each weight of an export kept, worst first. With --base and --post
every figure is computed again from the files and compared with the report (exit code 1 if they differ)."""
ABOUT_CHAIN = """Shows the exports that led to this one, each fine-tuned from the one before, and what is left of the
change since its base and since the root. Exit code 1 if a file of any of them was altered, is missing or foreign."""
ABOUT_VERIFY = """Checks an FP8 folder against what vLLM, SGLang and transformers need but do not check themselves.
Exit code 1 if there are problems; each comes with what to do."""


def make_parser() -> ArgumentParser:
    """The parser of the command and its subcommands.

    Raises:
        ImportError: The extra `cli` is not installed.
    """
    try:
        import jsonargparse
    except ImportError as error:
        raise ImportError("the command line needs jsonargparse: pip install daq-lightning[cli]") from error

    class Formatter(jsonargparse.DefaultHelpFormatter):
        def _get_help_string(self, action: Any) -> str:
            shown = action.default not in (None, False, []) and action.option_strings and action.dest != "help"
            return (action.help or "") + (
                " (default: %(default)s)" if shown and "==" not in str(action.default) else ""
            )

    def new(about: str, **kinds: Any) -> ArgumentParser:
        return jsonargparse.ArgumentParser(description=about, allow_abbrev=False, formatter_class=Formatter, **kinds)

    parser = new(ABOUT, prog="daq-lightning", version=_version())
    commands = parser.add_subcommands(title="commands", metavar="COMMAND", description="Each has a --help of its own.")

    quantize = new(ABOUT_QUANTIZE, usage="daq-lightning quantize POST --base FOLDER --out FOLDER [options]")
    quantize.add_argument("post", metavar="POST", help="folder of the fine-tuned model (with --adapter: of its base)")
    quantize.add_argument("--base", metavar="FOLDER", help="model that POST was trained from (with --adapter: POST)")
    quantize.add_argument("--out", metavar="FOLDER", help="where to write; an earlier export there is replaced")
    quantize.add_argument("--adapter", metavar="FOLDER", help="LoRA adapter (PEFT), merged into POST in float32")
    quantize.add_argument(
        "--dry-run", action="store_true", help="print what would be done to each tensor, write nothing"
    )
    layout = quantize.add_argument_group("how it is stored")
    layout.add_argument(
        "--scheme",
        choices=["auto", "FP8_BLOCK", "FP8_DYNAMIC", "FP8A16"],
        default="auto",
        help="FP8_BLOCK: a scale per 128 x 128 block. FP8_DYNAMIC: a scale per row. FP8A16: a scale per row, and "
        "activations stay in 16 bit. auto: FP8_BLOCK if all sizes are multiples of 128, else FP8_DYNAMIC",
    )
    layout.add_argument(
        "--ignore",
        action="append",
        default=[],
        metavar="NAME",
        help="keep this module in high precision: a full name, or re:PATTERN of full names; can be repeated",
    )
    layout.add_argument(
        "--container",
        choices=["fp8", "compressed-tensors"],
        help="naming of scales and config; left out, the scheme's usual one",
    )
    layout.add_argument(
        "--scale-format",
        choices=["ue8m0"],
        help="scales that are powers of two, for servers that would round them so (vLLM with DeepGEMM)",
    )
    search = quantize.add_argument_group("how scales are searched")
    search.add_argument(
        "--metric",
        choices=["sign", "cosine", "mse", "hybrid"],
        default="hybrid",
        help="what is kept. sign: the sign of each change. cosine: the direction of the update. hybrid: its strength "
        "along its own direction. mse: the weights themselves, without a look at the base",
    )
    search.add_argument(
        "--range",
        type=float,
        nargs=2,
        default=[0.5, 2.0],
        metavar=("LOW", "HIGH"),
        help="range of the multiples of the plain (absmax) scale that are tried",
    )
    search.add_argument("--n-coarse", type=int, default=5, metavar="N", help="scales tried over the whole range")
    search.add_argument("--n-fine", type=int, default=10, metavar="N", help="scales then tried around the best of them")
    search.add_argument(
        "--alpha-scope",
        choices=["group", "layer"],
        default="group",
        help="one multiple for each scale (group) or for each weight (layer)",
    )
    search.add_argument("--tau", type=float, default=0.01, help="weight of the noise in the hybrid metric")
    search.add_argument(
        "--missing-base",
        choices=["error", "absmax"],
        default="error",
        help="a weight that the base lacks is an error, or gets a plain scale (absmax)",
    )
    chain = quantize.add_argument_group("as a stage of a chain, where each model is trained from the export before")
    chain.add_argument("--parent", metavar="FOLDER", help="the export before; left out, BASE if it is one")
    chain.add_argument(
        "--chain-from",
        choices=["weights", "deployed"],
        help="what POST was trained from: the high-precision weights that the parent was made of, or its deployed "
        "(dequantized FP8) ones. It is checked against the parent; left out, this export begins a chain",
    )
    search.add_argument("--device", metavar="DEVICE", help="where to search, such as cuda; left out, the CPU")
    quantize.add_argument("--config", action="config", metavar="FILE", help="YAML of options, as --print_config prints")
    _add_output(quantize)
    quantize.add_argument("--quiet", action="store_true", help="no progress bar and no summary")
    commands.add_subcommand("quantize", quantize, help="write an FP8 checkpoint of a fine-tuned model")

    inspect = new(ABOUT_INSPECT, usage="daq-lightning inspect OUT [--base FOLDER --post FOLDER] [options]")
    inspect.add_argument("out", metavar="OUT", help="folder of an export")
    inspect.add_argument("--base", metavar="FOLDER", help="the base that was given to quantize")
    inspect.add_argument("--post", metavar="FOLDER", help="the fine-tuned model that was given to quantize")
    inspect.add_argument("--adapter", metavar="FOLDER", help="the adapter that was given to quantize")
    inspect.add_argument("--limit", type=int, metavar="N", help="show only the N worst weights")
    _add_output(inspect)
    commands.add_subcommand("inspect", inspect, help="show what an export kept of the update, weight by weight")

    chain = new(ABOUT_CHAIN, usage="daq-lightning chain FOLDER [options]")
    chain.add_argument("folder", metavar="FOLDER", help="the last export of the chain")
    _add_output(chain)
    commands.add_subcommand("chain", chain, help="show the stages that led to an export, and whether all are intact")

    verify = new(ABOUT_VERIFY, usage="daq-lightning verify OUT [options]")
    verify.add_argument("out", metavar="OUT", help="FP8 checkpoint folder")
    _add_output(verify)
    commands.add_subcommand("verify", verify, help="check that servers will load an FP8 folder as it is meant")
    return parser


def _add_output(parser: ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")


def normalized(argv: list[str]) -> list[str]:
    """Accepts underscores in the names of options, and reads --config first, so that other options go before it."""
    options = [part if not part.startswith("--") or part.startswith("--print") else _dashed(part) for part in argv]
    for index, part in enumerate(options[1:], 1):
        width = 2 if part == "--config" else 1
        if part.partition("=")[0] == "--config":
            return [options[0], *options[index : index + width], *options[1:index], *options[index + width :]]
    return options


def _dashed(option: str) -> str:
    name, equals, value = option.partition("=")
    return name.replace("_", "-") + equals + value


def in_options(message: str) -> str:
    """A message that speaks of arguments (scheme='auto') in the words of the command line (--scheme auto)."""
    named = r"\b(scheme|container|scale_format|missing_base|parent|chain_from|device)='([^']*)'"
    return re.sub(named, lambda match: f"--{match[1].replace('_', '-')} {match[2]}", message)


def _version() -> str:
    try:
        return metadata.version("daq-lightning")
    except metadata.PackageNotFoundError:  # run from a checkout
        return "unknown"
