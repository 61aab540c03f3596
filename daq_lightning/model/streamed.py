"""A language model of a folder whose decoder layers have weights one at a time, in float32.

    outside()   embeddings, last norm and head have weights
    layer(i)    one layer has

Names, stacks of experts and tied copies are left to transformers, as where a whole model is loaded.

Source: transformers 5 `core_model_loading` (`convert_and_load_state_dict_in_model`), for parts of a model.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from daq_lightning.checkpoint.tensor_file import CheckpointError
from daq_lightning.model.from_folder import FolderModel, Slice, explained, quiet_and_offline, without_bars
from daq_lightning.model.stack import NotAStackError, Stack, check_predicts

if TYPE_CHECKING:
    from daq_lightning.checkpoint.reader import Checkpoint


class StreamedModel:
    """The model of a folder, without memory for weights but for those of the part in use.

    Args:
        files: The folder, with or without an adapter.
        device: Where it computes.

    Attributes:
        device: Where it computes.
        architecture: Of the model.
        keys: Checkpoint name -> memory name.
        stack: The layers, to be called by themselves.
        depth: How many there are.

    Raises:
        CheckpointError: transformers does not know the model, or it predicts no tokens.
        NotAStackError: Its layers are not in one list, or share weights.
    """

    def __init__(self, files: Checkpoint, device: torch.device | str) -> None:
        self._files, self.device = files, torch.device(device)
        self.architecture = FolderModel(files.path, len(files.raw)).empty(torch.float32)
        self._model: Any = self.architecture.model
        check_predicts(self._model, str(files.path))
        prefix, self._layers = _layers_of(self._model)
        self.depth = len(self._layers)
        self.stack = Stack(self._model, self._layers, self.device)
        self.keys: Mapping[str, str] = self.architecture.keys_of(files)
        self._parts = {name: _layer_in(key, prefix) for name, key in self.keys.items()}
        tied = self.architecture.ties
        if any(_layer_in(key, prefix) is not None for key in (*tied, *tied.values())):
            raise NotAStackError("its layers share weights")
        with explained(files.path), quiet_and_offline(), torch.random.fork_rng(devices=[]):
            _make_buffers(self._model, self.device)

    def layer_of(self, name: str) -> int | None:
        """The layer that has a weight, by its checkpoint name; None for one outside."""
        return self._parts[name]

    @contextlib.contextmanager
    def outside(self) -> Iterator[None]:
        """Everything but the layers has weights, until the end of the block.

        Raises:
            CheckpointError: A tensor is missing, or of another shape.
        """
        try:
            missing = self._fill(name for name, part in self._parts.items() if part is None)
            with quiet_and_offline():
                self._model.tie_weights(missing_keys=missing, recompute_mapping=False)
            yield
        finally:
            _drop(self._model)

    @contextlib.contextmanager
    def layer(self, index: int) -> Iterator[None]:
        """A layer has weights, until the end of the block. Raises as `outside`."""
        layer = self._layers[index]
        try:
            self._fill(name for name, part in self._parts.items() if part == index)
            lacking = [name for name, parameter in layer.named_parameters() if parameter.is_meta]
            if lacking:
                raise CheckpointError(f"{self._files.path} lacks {lacking[0]} of layer {index}.")
            yield
        finally:
            _drop(layer)

    def _fill(self, names: Iterable[str]) -> set[str]:
        """Reads the weights of some names; what is still missing, by memory names."""
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import convert_and_load_state_dict_in_model
        from transformers.modeling_utils import LoadStateDictConfig

        slices = {name: Slice(self._files, name) for name in names}
        with explained(self._files.path), quiet_and_offline(), without_bars():
            how = LoadStateDictConfig(
                dtype=torch.float32,
                device_map={"": self.device},
                weight_mapping=get_model_conversion_mapping(self._model),  # type: ignore[arg-type]
            )
            found, _ = convert_and_load_state_dict_in_model(self._model, slices, how)
            wrong = [*(str(part[0]) for part in found.mismatched_keys), *found.conversion_errors]
            if wrong:
                raise ValueError(f"{wrong[0]} has another shape in its files")
        self._model.requires_grad_(False)
        return found.missing_keys


def _layers_of(model: Any) -> tuple[str, list[nn.Module]]:
    """The beginning of the memory names of decoder layers, and these."""
    decoder = model.get_decoder()
    lists = [child for child in decoder.children() if isinstance(child, nn.ModuleList) and len(child)]
    body = getattr(model, model.base_model_prefix or " ", None)
    if len(lists) != 1 or len(set(map(id, lists[0]))) != len(lists[0]) or body is None:
        raise NotAStackError(f"{type(decoder).__name__} has no one list of layers")
    path = next(path for path, module in model.named_modules() if module is lists[0])
    return f"{path}.", list(lists[0])


def _layer_in(key: str, prefix: str) -> int | None:
    number = key.removeprefix(prefix).partition(".")[0]
    return int(number) if key.startswith(prefix) and number.isdigit() else None


def _make_buffers(model: Any, device: torch.device) -> None:
    """Computes what no checkpoint holds, such as the frequencies of positions."""
    for module in model.modules():
        for name in module._non_persistent_buffers_set:
            buffer = module._buffers.get(name)
            if buffer is not None:
                module._buffers[name] = torch.empty_like(buffer, device=device)
    model.initialize_weights()  # these have no memory yet


def _drop(module: nn.Module) -> None:
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None and not parameter.is_meta:
                outline = torch.empty_like(parameter, device="meta")
                part._parameters[name] = nn.Parameter(outline, requires_grad=False)
