"""The Hugging Face Hub: a model by its name as a folder on this machine, and an export as a repository.

    local_folder("org/model")             the snapshot in the Hub's cache; of a folder that exists, the folder
    local_folder("org/model@v1.0")        of a branch, tag or commit
    push_folder("fp8", "org/model-FP8")   one commit, so that nobody sees half a model

Only tensors, JSON and text are fetched: no pickles (.bin, .pt), which can run code when opened, and no code.
The server is that of HF_ENDPOINT, the cache that of HF_HUB_CACHE or HF_HOME; HF_HUB_OFFLINE=1 looks into the
cache alone. A token is taken from HF_TOKEN or `hf auth login`, and never shown.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from daq_lightning.checkpoint.tensor_file import CheckpointError

_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
_REVISION = re.compile(r"[\w./-]{1,200}", re.ASCII)
_FETCHED = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken", "*.spm"]
_FETCHED += ["README.md", "recipe.yaml", "daq_report.html"]  # of an export, all that its manifest lists
_LEFT = ["*/*.safetensors", "*/*.json", "*/*.txt", "*/*.model"]  # other forms of the model, in subfolders
_STALE = (".safetensors", ".safetensors.index.json")
_LOGIN = "log in with `hf auth login`, or set HF_TOKEN"


class HubError(CheckpointError):
    """The Hub does not have something, does not allow it, or cannot be reached."""


def is_repository(name: object) -> bool:
    """Whether this can be the name of a model on the Hub: `org/name`, and no path.

    Example:
        >>> [is_repository(name) for name in ("org/model-7B", "/home/me/model", "model", "../model")]
        [True, False, False, False]
    """
    return (
        isinstance(name, str)
        and _REPOSITORY.fullmatch(name) is not None
        and len(name) <= 96
        and not any(part in name for part in ("--", ".."))
        and not name.endswith((".", "-", ".git"))
    )


def repository_of(folder: Path) -> str:
    """The name on the Hub of a folder in its cache, `models--org--name/snapshots/<commit>`; else ""."""
    if folder.parent.name != "snapshots":
        return ""
    kind, _, name = folder.parent.parent.name.partition("--")
    name = name.replace("--", "/", 1)
    return name if kind == "models" and is_repository(name) else ""


def local_folder(path_or_id: str | os.PathLike[str], revision: str | None = None) -> Path:
    """The folder of a model: the path itself if it exists, else the model of that name on the Hub.

    Args:
        path_or_id: A folder, or `org/name`, or `org/name@revision`.
        revision: Branch, tag or commit; None takes the one in the name, or the main branch.

    Returns:
        The path as it is if it exists or cannot be a name on the Hub; else the snapshot in the Hub's cache.

    Raises:
        HubError: No such model or revision, no access to it, or no connection; the message says what to do.
    """
    given = os.fspath(path_or_id)
    path = Path(given).expanduser()
    repo_id, _, named = given.partition("@")
    if path.exists() or not is_repository(repo_id) or (named and not _REVISION.fullmatch(named)):
        return path
    wanted = revision or named or None
    called = f"{repo_id}@{wanted}" if wanted else repo_id
    import huggingface_hub
    from huggingface_hub import errors

    home = os.environ.get("HF_HOME")
    offline = os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")
    try:
        folder = huggingface_hub.snapshot_download(
            repo_id,
            revision=wanted,
            cache_dir=os.environ.get("HF_HUB_CACHE") or (os.path.join(home, "hub") if home else None),
            allow_patterns=_FETCHED,
            ignore_patterns=_LEFT,
            endpoint=os.environ.get("HF_ENDPOINT") or None,
            local_files_only=offline,
        )
    except errors.GatedRepoError as error:
        raise HubError(
            f"{called} is gated: accept its terms on its page on the Hub, then {_LOGIN}."
        ) from error
    except errors.RevisionNotFoundError as error:
        raise HubError(f"{repo_id} has no revision {wanted}: look at its branches and tags.") from error
    except errors.RepositoryNotFoundError as error:
        raise HubError(
            f"There is no folder {given}, and no model {repo_id} on the Hub that you may read: check the "
            f"name; if it is private, {_LOGIN}."
        ) from error
    except errors.LocalEntryNotFoundError as error:
        why = "HF_HUB_OFFLINE is set" if offline else "the Hub cannot be reached"
        raise HubError(
            f"There is no folder {given}; {called} is not (completely) in the Hub's cache, and {why}: pass a "
            "folder, or run it once with a connection."
        ) from error
    except (errors.HTTPError, OSError) as error:
        raise HubError(f"{called} could not be fetched: {_plain(error)}. {_advice(error)}") from error
    return Path(folder)


def push_folder(
    folder: str | os.PathLike[str], repo_id: str, *, private: bool = False, token: str | None = None
) -> str:
    """Uploads a folder as a model repository, in one commit; the repository is created if it is not there.

    Weight files of an earlier upload that this folder does not have are removed in the same commit: servers
    that read every file would mix the two.

    Args:
        folder: What to upload, with all its files.
        repo_id: `org/name`.
        private: Whether a repository that is created here is private.
        token: To write with; None takes HF_TOKEN or that of `hf auth login`.

    Returns:
        The address of the repository.

    Raises:
        HubError: It cannot be created or written; the folder is as it was, and the message says what to do.
    """
    place = Path(folder).expanduser()
    if not is_repository(repo_id):
        raise HubError(f"{repo_id!r} cannot be a repository on the Hub: expected ORG/NAME.")
    if not place.is_dir():
        raise HubError(f"{place} is not a folder: expected an export to upload.")
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, errors

    api = HfApi(endpoint=os.environ.get("HF_ENDPOINT") or None, token=token)
    files = {file.relative_to(place).as_posix(): file for file in sorted(place.rglob("*")) if file.is_file()}
    additions = [CommitOperationAdd(path_in_repo=name, path_or_fileobj=file) for name, file in files.items()]
    try:
        url = str(api.create_repo(repo_id, private=private, exist_ok=True))
        stale = [
            CommitOperationDelete(path_in_repo=file)
            for file in api.list_repo_files(repo_id)
            if file.endswith(_STALE) and file not in files
        ]
        # not `upload_folder`, which may make several commits of a large folder
        api.create_commit(
            repo_id, operations=[*additions, *stale], commit_message="Quantized export by daq-lightning"
        )
    except (errors.HTTPError, OSError, ValueError) as error:
        raise HubError(
            f"{place} was not uploaded to {repo_id}: {_plain(error, token)}. {_advice(error)} The folder is "
            f"complete and stays; to upload it later: hf upload {repo_id} {place}"
        ) from None  # the cause may hold the headers of a request
    return url


def _plain(error: Exception, token: str | None = None) -> str:
    """What went wrong, on one line, without a token."""
    said = " ".join(str(getattr(error, "server_message", None) or error).split())[:300].rstrip(".")
    for secret in filter(None, (token, os.environ.get("HF_TOKEN"))):
        said = said.replace(secret, "***")
    said = re.sub(r"hf_[A-Za-z0-9]{8,}", "***", said)
    status = _status(error)
    return f"{said} (HTTP {status})" if status and str(status) not in said else said or type(error).__name__


def _status(error: Exception) -> int | None:
    return getattr(getattr(error, "response", None), "status_code", None)


def _advice(error: Exception) -> str:
    status = _status(error)
    if status in (401, 403):
        return f"To get access, {_LOGIN} (with a token that may write, to upload)."
    return "Check the connection and try again." if status is None or status >= 500 else "Check the name."
