"""What the config.json of a folder says of its tensors.

    config.json -> outline known from before
                -> else transformers -> model without memory -> Architecture -> outline
    config.json and tensors -> transformers -> model with weights
    config.json -> model without memory, whose parts get their weights one after the other

transformers takes seconds to import and is asked only where no earlier process has kept its answer.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import re
import sys
import tempfile
import threading
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_module_registration_hook

from daq_lightning.checkpoint.folder import read_json, replace_json
from daq_lightning.checkpoint.tensor_file import CheckpointError, LazyTensors
from daq_lightning.model.architecture import Architecture
from daq_lightning.model.imports import without_collections
from daq_lightning.model.outline import Outline
from daq_lightning.model.outline_cache import outline_key, read_outline, write_outline

# fields of a config.json that name code or a repository to fetch code from; none of them changes a tensor
_NAMES_CODE = re.compile(
    r"auto_map|custom_pipelines|trust_remote_code|code_revision|use_kernels|(_?name_or_path)|"
    r"_?(attn|experts)_implementation(_internal)?"
)
_COUNTS_MODULES = re.compile(r".*(layers?|depths?|experts|blocks|stages)")


class FolderModel:
    """The model that a folder's config.json describes, built at most once, without memory for weights.

    Args:
        folder: A Hugging Face model folder.
        tensors: How many tensors its files hold.
    """

    def __init__(self, folder: Path, tensors: int) -> None:
        self._folder, self._limit = folder, 1000 + 16 * tensors
        self._architecture: Architecture | None = None
        # transformers that is there already is asked itself: no import is saved, and it may have been changed
        self._may_keep = "transformers" not in sys.modules

    def outline(self, names: Iterable[str]) -> Outline:
        """The outline of the model, with the memory names of these checkpoint names.

        Raises:
            CheckpointError: No config.json, or a model that transformers does not know.
        """
        if not (self._folder / "config.json").is_file():
            raise CheckpointError(
                f"{self._folder} has no config.json, which says what the tensors are: pass a Hugging Face "
                "model folder."
            )
        names = list(names)
        content = _without_code(read_json(self._folder / "config.json"))
        key = outline_key(content, self._folder.name) if self._may_keep else None
        known = None if key is None else read_outline(key)
        if known is not None and known.keys.keys() >= set(names) and len(known.modules) <= self._limit:
            return dataclasses.replace(known, keys={name: known.keys[name] for name in names})
        if self._architecture is None:
            with without_collections():
                self._architecture = _build(content, self._folder, self._limit)
        outline = self._architecture.outline(self._architecture.keys_of(names))
        if key is not None and _is_known_code(self._architecture.model):
            write_outline(key, outline)
        return outline

    def load(self, weights: LazyTensors, dtype: torch.dtype) -> nn.Module:
        """The model with its weights, on the CPU, for evaluation.

        Names, stacks of experts, tied copies and computed buffers are left to transformers, which reads the
        tensors one at a time, in threads.

        Args:
            weights: Tensors under checkpoint names.
            dtype: Of the parameters.

        Raises:
            CheckpointError: A model that transformers does not know, or tensors that are missing or of
                another shape.
        """
        content = _without_code(read_json(self._folder / "config.json"))
        slices = {name: Slice(weights, name) for name in weights}
        with explained(self._folder), quiet_and_offline(), without_bars():
            model_class, config = _described(content, self._folder, self._limit)
            if not hasattr(model_class, "_from_config"):
                raise ValueError("it names no architecture")
            with _at_most_modules(self._limit):
                model, found = model_class.from_pretrained(
                    None,
                    config=config,
                    state_dict=slices,
                    dtype=dtype,
                    experts_implementation="eager",
                    output_loading_info=True,
                )
            absent = sorted(found["missing_keys"])
            if absent:
                raise ValueError(
                    f"{len(absent)} parameters are not in its files: {', '.join(absent[:4])}"
                    + (", ..." if len(absent) > 4 else "")
                )
        return model.eval()

    def empty(self, dtype: torch.dtype) -> Architecture:
        """The model in evaluation without memory for weights, its attention and experts the plain ones.

        Args:
            dtype: Of the parameters.

        Raises:
            CheckpointError: A model that transformers does not know, or that has no class of its own.
        """
        content = _without_code(read_json(self._folder / "config.json"))
        architecture = _build(content, self._folder, self._limit, dtype)
        architecture.model.eval().requires_grad_(False)
        return architecture


class Slice:
    """A tensor that is read when transformers slices it, as those of safetensors are."""

    def __init__(self, weights: LazyTensors, name: str) -> None:
        self._weights, self._name = weights, name

    def __getitem__(self, index: Any) -> Tensor:
        return self._weights[self._name][index]

    def get_shape(self) -> list[int]:
        return list(self._weights.spec(self._name).shape)


def _build(
    content: Mapping[str, Any], folder: Path, limit: int, dtype: torch.dtype | None = None
) -> Architecture:
    """The architecture that a config.json describes.

    It is foreign input: nothing that it names is imported or downloaded, attention is the plain one, and a
    model of many more modules than the files hold tensors is not built.
    """
    chosen = {} if dtype is None else {"dtype": dtype, "experts_implementation": "eager"}
    with explained(folder), quiet_and_offline():
        model_class, config = _described(content, folder, limit)
        build = getattr(model_class, "_from_config", None) or model_class.from_config
        with torch.device("meta"), _at_most_modules(limit):
            model = build(config, attn_implementation="eager", **chosen)
        return Architecture(model)


def _described(content: Mapping[str, Any], folder: Path, limit: int) -> tuple[Any, Any]:
    """The class and the configuration that a config.json's content stands for, without quantization."""
    import transformers

    _check_counts(content, limit)
    config = _read_config(content, folder.name)
    names = config.architectures or []
    model_class = getattr(transformers, names[0]) if names else transformers.AutoModelForCausalLM
    if names and not issubclass(model_class, transformers.PreTrainedModel):
        raise ValueError(f"{names[0]} is not a model class")
    # a quantized folder is described by its config too: the plain architecture is asked for here
    vars(config).pop("quantization_config", None)
    return model_class, config


@contextlib.contextmanager
def explained(folder: Path) -> Iterator[None]:
    import transformers

    try:
        yield
    except Exception as error:  # foreign input: transformers raises whatever it trips over
        raise CheckpointError(
            f"transformers {transformers.__version__} cannot build the model that {folder / 'config.json'} "
            f"describes: {error}. Models with code of their own are not supported."
        ) from error


def _is_known_code(model: nn.Module) -> bool:
    """Whether all modules are of packages whose version is in the key, as those of timm or apex are not."""
    return all(
        type(module).__module__.partition(".")[0] in ("torch", "transformers") for module in model.modules()
    )


def _read_config(content: Mapping[str, Any], name: str) -> Any:
    """The configuration object of a config.json's content, read from a folder of this name."""
    import transformers

    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / (name or "model")
        folder.mkdir()
        replace_json(folder / "config.json", dict(content))
        return transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)


def _without_code(content: Any) -> Any:
    """A config.json without the fields that name code, at any depth."""
    if isinstance(content, dict):
        return {key: _without_code(value) for key, value in content.items() if not _NAMES_CODE.fullmatch(key)}
    return [_without_code(value) for value in content] if isinstance(content, list) else content


def _check_counts(content: Any, limit: int, key: str = "") -> None:
    """Refuses a config.json whose counts of layers and the like its files cannot bear out."""
    if isinstance(content, dict):
        for name, value in content.items():
            _check_counts(value, limit, name)
    elif isinstance(content, list):
        for value in content:
            _check_counts(value, limit, key)
    elif isinstance(content, (int, float)) and content > limit and _COUNTS_MODULES.fullmatch(key):
        raise ValueError(f"{key} is {content:g}, far more than the tensors in its files")


@contextlib.contextmanager
def _at_most_modules(limit: int) -> Iterator[None]:
    """Stops a model that this thread builds when it has more modules than that."""
    thread, count = threading.get_ident(), 0

    def check(parent: nn.Module, name: str, module: nn.Module | None) -> None:
        nonlocal count
        count += threading.get_ident() == thread
        if count > limit:
            raise ValueError(f"it has more than {limit} modules, far more than the tensors in its files")

    hook = register_module_module_registration_hook(check)
    try:
        yield
    finally:
        hook.remove()


@contextlib.contextmanager
def without_bars() -> Iterator[None]:
    from transformers.utils import logging as shown

    if not shown.is_progress_bar_enabled():
        yield
        return
    shown.disable_progress_bar()
    try:
        yield
    finally:
        shown.enable_progress_bar()


@contextlib.contextmanager
def quiet_and_offline() -> Iterator[None]:
    """Without transformers' warnings and the Hub: a config.json may name repositories in many fields."""
    from huggingface_hub import constants

    logger = logging.getLogger("transformers")
    level, offline = logger.level, constants.HF_HUB_OFFLINE
    logger.setLevel(logging.ERROR)
    constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        logger.setLevel(level)
        constants.HF_HUB_OFFLINE = offline
