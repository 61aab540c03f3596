"""The FP8 cache of an export, as its server has it, for a model that was built from the files."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

from torch import nn

from daq_lightning.checkpoint.kv_cache import is_cache_scale, scale_names
from daq_lightning.checkpoint.reader import Checkpoint
from daq_lightning.model.architecture import Architecture
from daq_lightning.model.in_front import rounded
from daq_lightning.model.outline import owner_of


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
