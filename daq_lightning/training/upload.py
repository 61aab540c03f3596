"""The last export of a run, uploaded to the Hub when training is over."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lightning.pytorch.utilities.rank_zero import rank_zero_info

from daq_lightning.model.hub import HubError, push_folder

if TYPE_CHECKING:
    from pathlib import Path

    from daq_lightning.export.ranks import Ranks


def upload_last(exports: list[Path | str], repository: str | None, ranks: Ranks) -> HubError | None:
    """Uploads the last export in one commit, from rank 0. A collective.

    Args:
        exports: Folders of the exports of the run, oldest first.
        repository: `org/name`, or None for no upload.
        ranks: Of the run.

    Returns:
        What went wrong, on all ranks; the export stays where it is.
    """
    if repository is None or not exports:
        return None

    def push() -> str:
        try:
            rank_zero_info(f"Uploaded {exports[-1]} to {push_folder(exports[-1], repository)}.")
        except HubError as error:
            return f"{error} The export is complete in {exports[-1]}."
        return ""

    problem = ranks.first(push)
    return HubError(problem) if problem else None
