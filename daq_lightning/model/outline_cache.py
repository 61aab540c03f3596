"""Outlines known from before, so that a folder is read without transformers, whose import takes seconds.

    config.json (what matters of it), versions -> key -> outline, with every name that was ever asked for

An outline follows from config.json, from transformers and from this package alone. They make the key, so no
entry is ever out of date. What is damaged or of another form counts as not there, and is written anew.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib.util
import json
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any, get_args

import daq_lightning
from daq_lightning.checkpoint.cache import read_cached, write_cached
from daq_lightning.checkpoint.folder import sha256_of
from daq_lightning.model.outline import CacheKind, Outline, Role

# fields that say how tensors are stored, not which there are; an export differs from its source in them
_STORAGE = ("quantization_config", "dtype", "torch_dtype", "_name_or_path", "transformers_version")


def outline_key(config: Mapping[str, Any], folder: str) -> str | None:
    """What an outline follows from, as a digest.

    Args:
        config: The content of config.json.
        folder: Name of its folder, from which transformers guesses the kind of a model that does not say it.

    Returns:
        The key; None where it would say too little: a development version changes under one number.
    """
    try:
        version = metadata.version("transformers")
        found = importlib.util.find_spec("transformers")
    except (metadata.PackageNotFoundError, ValueError):
        return None
    if found is None or "dev" in version:
        return None
    guessed_from = "" if "model_type" in config else folder
    described = [
        _without_storage(config),
        guessed_from,
        version,
        found.origin,
        daq_lightning.__version__,
        _code(),
    ]
    return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()[:32]


def read_outline(key: str) -> Outline | None:
    """The outline of a key, with all names that are known; None if there is none that can be trusted."""
    content = read_cached(f"outline_{key}")
    try:
        return None if content is None else _outline(content)
    except (LookupError, TypeError, ValueError):
        return None


def write_outline(key: str, outline: Outline) -> None:
    """Keeps an outline, and the names that an earlier one of the same model had."""
    known = read_outline(key)
    if known is not None and dataclasses.replace(known, keys={}) == dataclasses.replace(outline, keys={}):
        outline = dataclasses.replace(outline, keys={**known.keys, **outline.keys})
    fields = {field.name: getattr(outline, field.name) for field in dataclasses.fields(outline)}
    plain = {name: sorted(value) if isinstance(value, frozenset) else value for name, value in fields.items()}
    write_cached(f"outline_{key}", plain)


@functools.cache
def _code() -> list[str]:
    """The code that makes outlines, which changes under one version number where it is developed."""
    names = ("outline.py", "architecture.py", "attention.py", "served.py", "from_folder.py")
    return [sha256_of(Path(__file__).with_name(name)) for name in names]


def _without_storage(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json as an export and its source have it in common, in the parts of the model too."""
    return {
        name: _without_storage(value) if isinstance(value, Mapping) and name.endswith("_config") else value
        for name, value in config.items()
        if name not in _STORAGE
    }


def _outline(plain: Any) -> Outline:
    """The outline that plain values describe.

    Raises:
        LookupError, TypeError, ValueError: Values of another form.
    """
    roles = _strings(plain["roles"], dict)
    caches = _strings(plain["caches"], dict)
    known = set(roles.values()) <= set(get_args(Role)) and set(caches.values()) <= set(get_args(CacheKind))
    if not known or not isinstance(plain["is_transformers"], bool):
        raise ValueError("not an outline")
    return Outline(
        model=str(plain["model"]),
        is_transformers=plain["is_transformers"],
        parameters={name: _shape(shape) for name, shape in _is(plain["parameters"], dict).items()},
        copies=tuple(_strings(plain["copies"], list)),
        tensors=frozenset(_strings(plain["tensors"], list)),
        modules=frozenset(_strings(plain["modules"], list)),
        linear_modules=tuple(_strings(plain["linear_modules"], list)),
        roles=roles,
        ties=_strings(plain["ties"], dict),
        may_lack=tuple(_strings(plain["may_lack"], list)),
        may_add=tuple(_strings(plain["may_add"], list)),
        caches=caches,
        keys=_strings(plain["keys"], dict),
    )


def _is(value: Any, kind: type) -> Any:
    if not isinstance(value, kind):
        raise TypeError(f"expected {kind.__name__}, got {type(value).__name__}")
    return value


def _strings(values: Any, kind: type[list] | type[dict]) -> Any:
    """A list of strings, or a dict from strings to strings."""
    for value in values.values() if isinstance(_is(values, kind), dict) else values:
        _is(value, str)
    return values


def _shape(values: Any) -> tuple[int, ...]:
    return tuple(_is(size, int) for size in _is(values, list))
