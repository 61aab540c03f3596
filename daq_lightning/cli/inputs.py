"""What commands take: folders that are there, and what is in them; and the JSON that they print."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from daq_lightning.cli.logs import LOGGER

if TYPE_CHECKING:
    from daq_lightning.checkpoint.reader import Checkpoint


class UsageError(ValueError):
    """A command line that says too little, or what cannot be meant; no file was looked at."""


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
