"""`daq_manifest.json`: what an export was made from and what it consists of.

    stage, parent, chain_from, base      where it stands in a chain of exports
    tensors                              fingerprints of base, weights, codes and scale of every quantized
    tensor kept                                 fingerprints of every other tensor, as stored files
    every other file with size and SHA-256 fingerprint                          SHA-256 of all of this

A manifest holds no time and no absolute path (but where an export is uploaded elsewhere, there are no
others): the same weights give the same bytes in any place, on one machine. Another processor, or a machine
without the compiled kernels, adds float sums in another order: for one scale, codes and counts are equal and
sums agree to 2e-6 of their size; but of two candidates that are as good as equal either may win, so the
scales of a few groups, and with them codes and fingerprints, may differ.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from importlib import metadata
from pathlib import Path, PurePosixPath
from typing import Any, Literal, TypeAlias

from daq_lightning.checkpoint.folder import CARD, INDEX, MANIFEST, SINGLE, read_index, read_json, sha256_of
from daq_lightning.checkpoint.layouts.parts import CODES, GLOBAL_SCALE, SCALE, SHAPE, ZERO
from daq_lightning.checkpoint.patterns import BoundedMatcher
from daq_lightning.checkpoint.tensor_file import CheckpointError, read_header

FORMAT_VERSION = 1
KEPT = "kept"
"""The one part of a tensor that is not quantized."""
ChainFrom: TypeAlias = Literal["weights", "deployed"]


@dataclass(frozen=True, kw_only=True)
class Lineage:
    """Where an export stands in a chain.

    Attributes:
        stage: 1 for the first.
        parent: Folder of the stage before; empty for the first.
        parent_fingerprint: Fingerprint of that stage's manifest.
        chain_from: What this stage was trained from: the parent's high-precision "weights", or its
            "deployed", dequantized ones. None for the first stage.
        base_kind: Where the base came from: "folder", "snapshot", ...
        base_path: Its folder or file; empty for weights in memory.
        base_fingerprint: One fingerprint of the base's quantized tensors.
        root: Folder or file of the first stage's base.
    """

    stage: int = 1
    parent: str = ""
    parent_fingerprint: str = ""
    chain_from: ChainFrom | None = None
    base_kind: str = "folder"
    base_path: str = ""
    base_fingerprint: str = ""
    root: str = ""


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The content of a manifest; paths are relative to its folder.

    Attributes:
        scheme: Of the layout.
        dtype: Of the kept tensors.
        quantization_config: As in config.json.
        settings: Of the search and the plan.
        versions: Of the packages that made it.
        lineage: Its place in a chain.
        tensors: Name -> fingerprints: "base" (or ""), "weights" (dtype -> fingerprint), and the parts of its
            layout: "codes", "scale", and what else there is.
        kept: Name -> fingerprint of the stored tensor.
        files: Name -> size and SHA-256 of every file that holds no tensors.
        training: Where in a training run it was made: step, epoch, checkpoint.
    """

    scheme: str
    dtype: str
    quantization_config: Mapping[str, Any]
    settings: Mapping[str, Any]
    versions: Mapping[str, str]
    lineage: Lineage
    tensors: Mapping[str, Mapping[str, Any]]
    kept: Mapping[str, str]
    files: Mapping[str, Mapping[str, Any]]
    training: Mapping[str, Any] = field(default_factory=dict)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the content."""
        return _fingerprint(self._content())

    def stored(self) -> dict[str, str]:
        """Name -> fingerprint of every tensor in the files: kept ones, codes and scales.

        Raises:
            CheckpointError: Several schemes that cannot be told apart.
        """
        inverse = self.quantization_config.get("quant_method") == "fp8"
        packed = self._packed()
        suffixes = {
            SCALE: "_scale_inv" if inverse else "_scale",
            ZERO: "_zero_point",
            GLOBAL_SCALE: "_global_scale",
            SHAPE: "_shape",
        }
        parts = {
            name + ("_packed" * (name in packed) if part == CODES else suffixes[part]): prints[part]
            for name, prints in self.tensors.items()
            for part in (CODES, *suffixes)
            if part in prints
        }
        return {**self.kept, **parts}

    def _packed(self) -> set[str]:
        """The weights whose codes are packed."""
        form = str(self.quantization_config.get("format"))
        if form != "mixed-precision":
            return set(self.tensors) if "pack" in form else set()
        matcher, forms = BoundedMatcher(MANIFEST), dict[str, str]()
        try:
            for group in self.quantization_config["config_groups"].values():
                forms |= dict.fromkeys(group["targets"], str(group["format"]))
        except (AttributeError, KeyError, TypeError) as error:
            raise CheckpointError(f"{MANIFEST} describes several schemes, but not which is where.") from error
        patterns = [target for target in forms if target.startswith("re:")]

        def form_of(module: str) -> str:
            found = (target for target in patterns if matcher.matches(target[3:], module))
            return forms[module] if module in forms else forms.get(next(found, ""), "")

        return {name for name in self.tensors if "pack" in form_of(name.removesuffix(".weight"))}

    def to_dict(self) -> dict[str, Any]:
        """The content of the file."""
        content = self._content()
        return content | {"fingerprint": _fingerprint(content)}

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> Manifest:
        """Reads the manifest of an export.

        Raises:
            CheckpointError: There is none, it is of another format, or it was altered.
        """
        path = Path(folder) / MANIFEST
        content = read_json(path)
        if content.get("format_version") != FORMAT_VERSION:
            raise CheckpointError(
                f"{path} does not exist or has another format than version {FORMAT_VERSION}: expected the "
                "folder of an export by this package."
            )
        claimed = content.pop("fingerprint", "")
        if _fingerprint(content) != claimed:
            raise CheckpointError(f"{path} was altered: its content does not have the fingerprint it claims.")
        del content["format_version"]
        _check_shape(content, path)
        content["lineage"] = Lineage(**content["lineage"])
        return cls(**content)

    def _content(self) -> dict[str, Any]:
        return json.loads(json.dumps({"format_version": FORMAT_VERSION, **asdict(self)}))


def _check_shape(content: Mapping[str, Any], path: Path) -> None:
    """Refuses a manifest whose fields are not as declared; anybody may have written it."""

    def check(holds: bool, what: str) -> None:
        if not holds:
            raise CheckpointError(f"{path} is not the manifest of an export: expected {what}.")

    for kind, level in ((Manifest, content), (Lineage, content.get("lineage"))):
        names = {field.name for field in fields(kind)}
        found = set(level) if isinstance(level, dict) else {type(level).__name__}
        check(found == names, f"the fields {sorted(names)}, got {sorted(found)}")
    lineage = content["lineage"]
    for name in ("parent", "parent_fingerprint", "base_kind", "base_path", "base_fingerprint", "root"):
        check(_is_text(lineage[name]), f"text in lineage {name}")
    check(type(lineage["stage"]) is int and lineage["stage"] > 0, "a positive stage")
    check(lineage["chain_from"] in (None, "weights", "deployed"), "chain_from 'weights', 'deployed' or null")
    check(_is_text(content["scheme"]) and _is_text(content["dtype"]), "text in scheme and dtype")
    for name in ("quantization_config", "settings", "versions", "tensors", "kept", "files", "training"):
        check(isinstance(content[name], dict), f"an object in {name}")
    check(all(map(_is_text, content["kept"].values())), "a fingerprint for every kept tensor")
    needed = (CODES, SCALE)
    known = {"base", "weights", *needed, ZERO, GLOBAL_SCALE, SHAPE}
    for name, prints in content["tensors"].items():
        described = isinstance(prints, dict) and {"base", "weights", *needed} <= set(prints) <= known
        check(described, f"base, weights, codes and scale of {name}")
        check(all(_is_text(prints[key]) for key in set(prints) - {"weights"}), f"fingerprints of {name}")
        forms = prints["weights"]
        check(
            isinstance(forms, dict) and all(map(_is_text, forms.values())),
            f"fingerprints of the weights of {name}",
        )
    for name, described in content["files"].items():
        inside = (
            _is_text(name) and not PurePosixPath(name).is_absolute() and ".." not in PurePosixPath(name).parts
        )
        check(inside, f"files inside the folder, got {name!r}")
        check(isinstance(described, dict) and _is_text(described.get("sha256")), f"size and sha256 of {name}")


def _is_text(value: object) -> bool:
    return isinstance(value, str) and "\0" not in value


def foreign_files(folder: Path) -> list[str]:
    """The files of an export's folder that the export did not write, by the lists of its manifest.

    A link is foreign unless the manifest lists it; a weight file is the export's own if it has the name of
    one and holds its tensors in their dtypes; the model card is, until somebody writes in it.

    Raises:
        CheckpointError: The folder has no valid manifest.
    """
    manifest = Manifest.load(folder)
    found = []
    for place, folders, files in os.walk(folder):
        links = [name for name in folders if (Path(place) / name).is_symlink()]
        found += [(Path(place) / name).relative_to(folder).as_posix() for name in (*files, *links)]
    known, shards = own_files(folder, manifest)
    return sorted(
        name
        for name in found
        if name not in known and not (name in shards and _holds_only(folder / name, manifest))
    )


def own_files(folder: Path, manifest: Manifest) -> tuple[set[str], set[str]]:
    """The files that an export may have written: those that its manifest lists, and those of its weights.

    Args:
        folder: Where its index and model card are.
        manifest: Of the export.
    """
    index = read_index(folder)
    shards = set(index["weight_map"].values()) if index else {SINGLE}
    known = {*manifest.files, MANIFEST, INDEX}
    card = folder / CARD
    if CARD in known and card.is_file() and sha256_of(card) != manifest.files[CARD]["sha256"]:
        known.remove(CARD)
    return known, shards


def _holds_only(file: Path, manifest: Manifest) -> bool:
    """Whether a file holds only tensors of an export; in a damaged one nothing can be lost."""
    try:
        entries = read_header(file)
    except CheckpointError:
        return file.suffix == ".safetensors"
    stored = manifest.stored()
    return all(
        name in stored and (name not in manifest.tensors or entry.dtype.itemsize == 1)
        for name, entry in entries.items()
    )


def relative_to(path: str, folder: Path | None) -> str:
    """A path as a manifest in `folder` holds it: relative, or empty; absolute in one of another machine."""
    if folder is None:
        return os.path.abspath(path) if path else ""
    return os.path.relpath(path, folder) if path else ""


def describe_files(folder: Path, skip: frozenset[str]) -> dict[str, dict[str, Any]]:
    """Size and SHA-256 of the files of a folder, hidden ones and `skip` left out."""
    result = {}
    for file in sorted(folder.rglob("*")):
        name = file.relative_to(folder).as_posix()
        if file.is_file() and name not in skip and not name.startswith("."):
            result[name] = {"size": file.stat().st_size, "sha256": sha256_of(file)}
    return result


def package_version(package: str) -> str:
    """The version of an installed package."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:  # run from a checkout
        return "unknown"


def _fingerprint(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
