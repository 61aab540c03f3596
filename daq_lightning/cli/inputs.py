"""What commands take: folders that are there, and what is in them; and the JSON that they print."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from daq_lightning.cli.logs import LOGGER

if TYPE_CHECKING:
    from daq_lightning.checkpoint.reader import Checkpoint

_MOST_CHARACTERS = 1 << 21  # of a recipe that is looked at


class UsageError(ValueError):
    """A command line that says too little, or what cannot be meant; no file was looked at."""


def check_recipe(argv: Sequence[str]) -> None:
    """Refuses a recipe (--config FILE) that would fill the memory while it is read.

    Raises:
        UsageError: It has aliases, or is larger than any recipe.
    """
    from daq_lightning.report.front_matter import check_plain

    named = [part.partition("=")[2] for part in argv if part.startswith("--config=")]
    named += [after for part, after in pairwise(argv) if part == "--config"]
    for name in named:
        try:
            with open(name, encoding="utf-8") as file:
                check_plain(file.read(_MOST_CHARACTERS))
        except OSError:  # the parser says what is wrong with it
            continue
        except ValueError as error:
            raise UsageError(f"--config {name}: {error}.") from error


def weights_of(post: str, adapter: str | None) -> Checkpoint:
    """The fine-tuned weights: of a folder, or of a folder with an adapter merged in."""
    from daq_lightning.checkpoint.adapter import read_adapter
    from daq_lightning.export.source import AdaptedCheckpoint

    if adapter is None:
        return checkpoint_of(post, "POST")
    return AdaptedCheckpoint(model_folder(post, "POST"), read_adapter(model_folder(adapter, "--adapter")))


def checkpoint_of(path: str, role: str) -> Checkpoint:
    """The weights of a folder."""
    from daq_lightning.checkpoint.reader import Checkpoint

    return Checkpoint(model_folder(path, role))


def model_folder(path: str, role: str) -> str:
    """The path, if it is a folder, or that of a model of this name on the Hub; else an error."""
    from daq_lightning.checkpoint.urls import check_local
    from daq_lightning.model.hub import HubError, local_folder

    check_local(path, role)
    if not Path(path).exists() and role not in ("OUT", "FOLDER"):
        try:
            path = str(local_folder(path))
        except HubError as error:
            raise ValueError(f"{role}: {error}") from error
    if not Path(path).is_dir():
        raise ValueError(f"{role}: {path} is {'not a folder' if Path(path).exists() else 'not there'}.")
    if (
        role != "--adapter"
        and (Path(path) / "adapter_config.json").is_file()
        and not (Path(path) / "config.json").is_file()
    ):
        raise ValueError(
            f"{role}: {path} is a LoRA adapter. Pass the model it was trained on as POST, and --adapter "
            f"{path}"
        )
    LOGGER.info("%s is %s", role, Path(path).resolve())
    return path


def export_folder(path: str) -> str:
    """The path, if it is an export; else an error."""
    if not (Path(model_folder(path, "OUT")) / "daq_report.json").is_file():
        raise ValueError(f"{path} has no daq_report.json, so it was not written by `daq-lightning quantize`.")
    return path


def print_json(content: Any) -> None:
    """Prints JSON that the terminal can show."""
    # the escapes of an encoding that cannot hold a name are JSON's own only above 8 bits
    plain = "utf" not in (sys.stdout.encoding or "utf-8").lower()
    print(json.dumps(content, indent=2, ensure_ascii=plain))
