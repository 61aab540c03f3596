"""Outlines that are known from before, so that a folder can be read without transformers, whose import takes seconds.

    config.json (what matters of it), versions -> key -> `outline_KEY.json` in the user's cache folder

An outline follows from config.json, from transformers and from this package alone, so these make the key, and an
entry is never out of date. It holds every checkpoint name that was ever asked for. The folder is that of the compiled
kernels, under the same rules: what others could have written is not read. What is read is held against its digest
and its form; whatever does not fit counts as nothing there, and is written anew.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib.util
import json
import os
import tempfile
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any, get_args

import daq_lightning
from daq_lightning.model.outline import Outline, Role
from daq_lightning.numerics.backends.library import cache_folder, why_not_ours

_MOST_BYTES = 1 << 24  # of an entry; the 45,000 expert weights of a model of 671B parameters take a third of it
_SOURCES = ("outline.py", "architecture.py", "from_folder.py")
# fields that say how tensors are stored, not which there are; an export differs from its source in them
_STORAGE = ("quantization_config", "dtype", "torch_dtype", "_name_or_path", "transformers_version")


def outline_key(config: Mapping[str, Any], folder: str) -> str | None:
    """What an outline follows from, as a digest.

    Args:
        config: The content of config.json.
        folder: Name of its folder, from which transformers guesses the kind of a model that does not say it.

    Returns:
        The key; None where it would say too little: a development version of transformers changes under one number.
    """
    try:
        version = metadata.version("transformers")
        found = importlib.util.find_spec("transformers")
    except (metadata.PackageNotFoundError, ValueError):
        return None
    if found is None or "dev" in version:
        return None
    sources = [hashlib.sha256(Path(__file__).with_name(name).read_bytes()).hexdigest() for name in _SOURCES]
    guessed_from = "" if "model_type" in config else folder
    described = [_without_storage(config), guessed_from, version, found.origin, daq_lightning.__version__, sources]
    return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()[:32]


def read_outline(key: str) -> Outline | None:
    """The outline of a key, with all names that are known; None if there is none that can be trusted."""
    folder, _ = cache_folder()
    if folder is None:
        return None
    path = folder / f"outline_{key}.json"
    try:
        if why_not_ours(path) is not None or not path.is_file() or path.stat().st_size > _MOST_BYTES:
            return None
        content = json.loads(path.read_bytes())
        if set(content) != {"key", "digest", "outline"} or content["key"] != key:
            return None
        if content["digest"] != _digest(key, content["outline"]):
            return None
        return _outline(content["outline"])
    except (OSError, ValueError, TypeError, LookupError, AttributeError, RecursionError):  # bytes, JSON or form
        return None


def write_outline(key: str, outline: Outline) -> None:
    """Keeps an outline, and the names that an earlier one of the same model had; nothing where that cannot be."""
    folder, _ = cache_folder()
    if folder is None:
        return
    known = read_outline(key)
    if known is not None and dataclasses.replace(known, keys={}) == dataclasses.replace(outline, keys={}):
        outline = dataclasses.replace(outline, keys={**known.keys, **outline.keys})
    plain = _plain(outline)
    content = json.dumps({"key": key, "digest": _digest(key, plain), "outline": plain}).encode()
    if len(content) > _MOST_BYTES:
        return
    with contextlib.suppress(OSError):  # read-only or full: it is asked of transformers again next time
        handle, unfinished = tempfile.mkstemp(dir=folder, suffix=".tmp")
        try:
            with open(handle, "wb") as file:
                file.write(content)
            os.replace(unfinished, folder / f"outline_{key}.json")  # nobody ever sees half a file
        finally:
            Path(unfinished).unlink(missing_ok=True)


def _without_storage(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json as an export and its source have it in common, in the parts of the model too."""
    return {
        name: _without_storage(value) if isinstance(value, Mapping) and name.endswith("_config") else value
        for name, value in config.items()
        if name not in _STORAGE
    }


def _digest(key: str, plain: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps([key, plain]).encode()).hexdigest()


def _plain(outline: Outline) -> dict[str, Any]:
    fields = {field.name: getattr(outline, field.name) for field in dataclasses.fields(outline)}
    return {name: sorted(value) if isinstance(value, frozenset) else value for name, value in fields.items()}


def _outline(plain: Mapping[str, Any]) -> Outline:
    """The outline that plain values describe.

    Raises:
        KeyError: A field is missing.
        TypeError: A field of another form.
        ValueError: A role that there is not.
    """
    if not isinstance(plain["is_transformers"], bool):
        raise TypeError(plain["is_transformers"])
    roles = _names_to_names(plain["roles"])
    if not set(roles.values()) <= set(get_args(Role)):
        raise ValueError(roles)
    return Outline(
        model=_name(plain["model"]),
        is_transformers=plain["is_transformers"],
        parameters={_name(name): _shape(shape) for name, shape in plain["parameters"].items()},
        copies=_names(plain["copies"]),
        tensors=frozenset(_names(plain["tensors"])),
        modules=frozenset(_names(plain["modules"])),
        linear_modules=_names(plain["linear_modules"]),
        roles=roles,  # type: ignore[arg-type]
        ties=_names_to_names(plain["ties"]),
        may_lack=_names(plain["may_lack"]),
        may_add=_names(plain["may_add"]),
        keys=_names_to_names(plain["keys"]),
    )


def _name(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(value)
    return value


def _names(values: object) -> tuple[str, ...]:
    if not isinstance(values, list):
        raise TypeError(values)
    return tuple(map(_name, values))


def _names_to_names(values: object) -> dict[str, str]:
    if not isinstance(values, dict):
        raise TypeError(values)
    return {_name(name): _name(value) for name, value in values.items()}


def _shape(values: object) -> tuple[int, ...]:
    if not isinstance(values, list) or any(type(size) is not int or size < 0 for size in values):
        raise TypeError(values)
    return tuple(values)
