"""The model of a folder as it is served: inputs of its layers and its cache quantized as config.json says."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from daq_lightning.checkpoint.kv_cache import is_cache_scale, scale_names
from daq_lightning.model.activations import holds_experts, served_activations
from daq_lightning.model.architecture import Architecture
from daq_lightning.model.from_folder import FolderModel
from daq_lightning.model.halves import Halves
from daq_lightning.model.in_front import rounded
from daq_lightning.model.outline import owner_of

if TYPE_CHECKING:
    from daq_lightning.checkpoint.layouts import Layouts
    from daq_lightning.checkpoint.reader import Checkpoint
    from daq_lightning.checkpoint.schemes import Scheme


class ServedModel:
    """The model of a folder, computed with as a server does.

    Args:
        files: The folder.
        dtype: What it runs in.
        device: Where.
        layouts: In which its quantized modules see their input, while keys and values are cached as the
            folder says; None leaves both as they are.

    Attributes:
        vocabulary: Tokens that it knows, once it was tried.
        cache: The layers whose keys and values are cached in FP8.
        unseen: Quantized modules whose input cannot be quantized.
    """

    def __init__(
        self,
        files: Checkpoint,
        dtype: torch.dtype,
        device: torch.device | str,
        layouts: Layouts | None = None,
    ) -> None:
        model = FolderModel(files.path, len(files.raw)).load(files, dtype).to(device)
        self._halves = Halves(model, str(files.path))
        self._modules: list[tuple[nn.Module, Scheme]] = []
        self.cache = None if layouts is None else ServedCache(model, files)
        self.unseen: tuple[str, ...] = ()
        if layouts is not None:
            self._modules, self.unseen = _quantized_modules(model, files, layouts)

    def try_on(self, tokens: Sequence[int]) -> None:
        """Raises `CheckpointError` if the model does not work in halves."""
        with self._as_served():
            self.vocabulary = self._halves.try_on(tokens)

    def hidden(self, tokens_BT: Tensor) -> Tensor:
        """What the body makes of tokens."""
        with self._as_served():
            return self._halves.hidden(tokens_BT)

    def logits(self, hidden_RH: Tensor) -> Tensor:
        """What the head makes of hidden states."""
        with self._as_served():
            return self._halves.logits(hidden_RH)

    def drop_body(self) -> None:
        """Lets go of all but the head."""
        self._halves.drop_body()
        if self.cache is not None:
            self.cache.drop()
        left = set(map(id, self._halves.model.modules()))
        self._modules = [(module, scheme) for module, scheme in self._modules if id(module) in left]

    @contextmanager
    def _as_served(self) -> Iterator[None]:
        with ExitStack() as stack:
            stack.enter_context(served_activations(self._modules))
            if self.cache is not None:
                stack.enter_context(self.cache.rounding())
            yield


def _quantized_modules(
    model: nn.Module, files: Checkpoint, layouts: Layouts
) -> tuple[list[tuple[nn.Module, Scheme]], tuple[str, ...]]:
    """The modules whose servers quantize their input, and the names of those where it cannot be done."""
    codes = [name for name in files if files.stored(name) is not None]
    keys = Architecture(model).keys_of(codes)
    schemes: dict[str, Scheme] = {}
    for name in codes:
        layout = layouts.of(name.removesuffix(".weight"), keys[name].removesuffix(".weight"))
        if layout is not None and layout.scheme.quantized_activations:
            schemes.setdefault(owner_of(keys[name]), layout.scheme)
    modules = {name: model.get_submodule(name) for name in schemes}
    fit = {name for name, one in modules.items() if isinstance(one, nn.Linear) or holds_experts(one)}
    seen = [(modules[name], schemes[name]) for name in modules if name in fit]
    return seen, tuple(name for name in modules if name not in fit)


class ServedCache:
    """The layers of a model that cache keys and values in FP8, and their scales.

    Args:
        model: Built from the files.
        files: Of the export; without a `kv_cache_scheme` no layer does.
    """

    def __init__(self, model: nn.Module, files: Checkpoint) -> None:
        names = [name for name in files.raw.entries if is_cache_scale(name)]
        architecture = Architecture(model)
        on_disk = {key: name for name, key in architecture.keys_of(names).items()}
        self._scales: dict[str, tuple[float, float]] = {}
        if files.raw.quantization.get("kv_cache_scheme") is not None:
            for module in dict.fromkeys(map(owner_of, on_disk)):
                keys, values = (files.raw[on_disk[key]].float().item() for key in scale_names(module))
                self._scales[module] = (keys, values)
        self._modules = architecture.modules(self._scales)

    def __bool__(self) -> bool:
        """Whether there is any."""
        return bool(self._scales)

    def drop(self) -> None:
        """Lets go of the layers."""
        self._modules = {}

    def rounding(self) -> AbstractContextManager[None]:
        """Lets the model attend to keys and values as its server has cached them."""
        return rounded(self._modules, self._scales) if self else nullcontext()
