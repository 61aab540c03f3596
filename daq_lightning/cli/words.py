"""What `--help` says of the command, of each subcommand and of exit codes. Imports nothing of the package.

A paragraph that begins with two spaces is shown as it stands; others are filled to the width of the terminal.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

DONE, REFUSED, USAGE, PROBLEMS, MISTAKE, INTERRUPTED, NO_READER, TERMINATED = 0, 1, 2, 3, 70, 130, 141, 143
EXIT_CODES: Mapping[int, str] = {
    DONE: "done; where something was checked, all is well",
    REFUSED: "an input, device or package that is missing or does not fit, or a place that cannot be written",
    USAGE: "the command line itself: an unknown option, a value out of range, one that is missing",
    PROBLEMS: "a check found problems: verify, chain, inspect with --base, before an upload",
    MISTAKE: "a mistake in this program; please report it",
    INTERRUPTED: "interrupted; nothing was published",
    NO_READER: "the reader of a pipe went away",
    TERMINATED: "terminated (SIGTERM); nothing was published",
}
LOG_LEVELS = ("debug", "info", "warning", "error")

ABOUT = """Makes FP8, INT8 and 4-bit checkpoints that keep what fine-tuning changed, for vLLM, SGLang and
transformers. Rounding is coarser than most fine-tuning updates; each scale is searched so that the update
survives.

Results go to stdout (with --json as one JSON object), progress and errors to stderr. Exit codes:

"""
ABOUT_QUANTIZE = """Writes a quantized checkpoint of a fine-tuned model. POST and BASE are Hugging Face model
folders (safetensors; quantized ones too), or names on the Hub: ORG/NAME, ORG/NAME@REVISION.

  daq-lightning quantize my-model --base its-base --dry-run
  daq-lightning quantize my-model --base its-base --out my-model-fp8
  daq-lightning quantize its-base --adapter my-lora --out my-model-int4 \\
      --scheme W4A16

On several processes or nodes:

  torchrun --nproc-per-node 8 -m daq_lightning quantize ..."""
ABOUT_INSPECT = """Shows how much of the update each weight of an export kept, worst first. With --base and
--post every figure is computed again from the files and compared with the report (exit code 3 if they
differ). --html FILE writes a page for people: a verdict in words, what is worst and why, and what to do.

  daq-lightning inspect my-model-fp8 --limit 10
  daq-lightning inspect my-model-fp8 --base its-base --post my-model"""
ABOUT_EVALUATE = """Judges the model that an export makes a server serve, on a text: how far its predictions
are from those of POST, and, with --base, how many of the tokens whose first choice training changed keep the
new one, fall back to the base's, or go elsewhere. One model is in memory at a time; hidden states go to a
temporary folder (TMPDIR).

  daq-lightning evaluate my-model-fp8 --post my-model --base its-base \\
      --text held-out.txt"""
ABOUT_CHAIN = """Shows the exports that led to this one, each fine-tuned from the one before, and what is left
of the change since its base and since the root. Exit code 3 if a file of any of them was altered, is missing
or foreign.

  daq-lightning chain stage-2"""
ABOUT_VERIFY = """Checks a quantized folder against what vLLM, SGLang and transformers need but do not check
themselves. Exit code 3 if there are problems; each comes with what to do.

  daq-lightning verify my-model-fp8
  daq-lightning verify my-model-fp8 --json > checks.json"""
ABOUT_COMPLETION = """Prints a script with which a shell completes commands, options, their choices and
folders. It needs shtab: pip install 'daq-lightning[cli]'.

  daq-lightning completion bash > daq.bash && source daq.bash

With --json the script is the field "script" of an object."""


def about() -> str:
    """What the command is, with its exit codes."""
    return ABOUT + _table(EXIT_CODES)


def ends_of(checks: bool) -> str:
    """The exit codes of one command, as the last words of its help.

    Args:
        checks: Whether it checks something, and so can find problems.
    """
    codes = {code: meaning for code, meaning in EXIT_CODES.items() if checks or code != PROBLEMS}
    return "exit codes:\n\n" + _table(codes)


def _table(codes: Mapping[int, str]) -> str:
    """Codes and what they mean, in lines that fit 80 columns."""
    import textwrap

    lines: list[str] = []
    for code, meaning in codes.items():
        lines += textwrap.wrap(meaning, 76, initial_indent=f"  {code:>3}  ", subsequent_indent=" " * 7)
    return "\n".join(lines)


def in_options(message: str) -> str:
    """A message that speaks of arguments (scheme='auto') in the words of the command line (--scheme auto)."""
    names = "scheme|rounding|calibrate|container|scale_format|kv_cache|kv_text|missing_base|parent|chain_from"
    named = rf"\b({names}|budget|device|max_memory)='([^']*)'"
    return re.sub(named, lambda match: f"--{match[1].replace('_', '-')} {match[2]}", message)
