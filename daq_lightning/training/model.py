"""The model inside a LightningModule, as a source for an export.

A Trainer trains a LightningModule; servers load the `PreTrainedModel` inside it. This finds it, and gathers what an
export needs from it: weights under checkpoint names, config, generation config, tokenizer.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from daq_lightning.architecture import Architecture
from daq_lightning.checkpoint.tensor_file import TensorSpec
from daq_lightning.training.weights import LiveWeights, live_tensors


def find_model(module: LightningModule, path: str | None) -> tuple[str, nn.Module]:
    """The model to export and its name in the LightningModule.

    Args:
        module: The LightningModule.
        path: Name of a submodule, or None to look for the one `PreTrainedModel`; a module without any is exported
            itself.

    Raises:
        MisconfigurationException: No such submodule, or several models to choose from.
    """
    if path is not None:
        try:
            return path, module.get_submodule(path)
        except AttributeError as error:
            children = ", ".join(name for name, _ in module.named_children()) or "none"
            raise MisconfigurationException(
                f"module={path!r}: {type(module).__name__} has no such submodule. Its submodules: {children}."
            ) from error
    found = list(_outermost_models(module))
    if len(found) > 1:
        raise MisconfigurationException(
            f"{type(module).__name__} holds {len(found)} models ({', '.join(name for name, _ in found)}): "
            f"say which one to export, for example module={found[0][0]!r}."
        )
    return found[0] if found else ("", module)


class LiveModel:
    """A model in training, under the names of its checkpoint.

    Args:
        model: A `PreTrainedModel` or any other module.
        tensors: Memory name -> tensor; None takes the model's own state.

    Attributes:
        weights: Checkpoint name -> tensor; computed when asked for.
        specs: The same with dtypes and shapes.
        keys: Checkpoint name -> memory name.
        architecture: The modules.
    """

    def __init__(self, model: nn.Module, tensors: Mapping[str, Tensor] | None = None) -> None:
        self.model = model
        self.architecture = Architecture(model)
        self._tensors = live_tensors(model) if tensors is None else tensors
        self.keys = self.architecture.saved_names(self._tensors)
        self.weights = self.view(self._tensors)
        self.specs = tuple(
            TensorSpec(name=name, dtype=tensor.dtype, shape=tuple(tensor.shape))
            for name, tensor in self.weights.items()
        )

    def view(self, tensors: Mapping[str, Tensor]) -> LiveWeights:
        """Other tensors in memory names, such as a base, under checkpoint names."""
        return LiveWeights(tensors, self.keys, self.architecture)

    def config(self) -> dict[str, Any] | None:
        """Content of config.json; None for a model that has none."""
        if not self.architecture.is_transformers:
            return None
        config = json.loads(self.model.config.to_json_string())  # type: ignore[union-attr, operator]
        return config | {"architectures": [type(self.model).__name__]}

    def copy_files(self, folder: Path, *owners: object) -> None:
        """Saves generation config and tokenizer.

        Args:
            folder: Destination.
            owners: Objects (LightningModule, DataModule) whose `tokenizer`, `processor` or `processing_class` is
                saved if there is one.
        """
        if self.architecture.is_transformers and self.model.can_generate():  # type: ignore[operator]
            self.model.generation_config.save_pretrained(folder)  # type: ignore[union-attr, operator]
        for owner in owners:
            for name in ("processor", "processing_class", "tokenizer"):
                candidate = getattr(owner, name, None)
                save = getattr(candidate, "save_pretrained", None)
                if save is not None and not isinstance(candidate, nn.Module):
                    save(folder)
                    return


def owners_of_files(trainer: Trainer) -> tuple[object, ...]:
    """Where a tokenizer may be found."""
    return (trainer.lightning_module, getattr(trainer, "datamodule", None))


def _outermost_models(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    for name, child in module.named_children():
        full = f"{prefix}.{name}" if prefix else name
        if any(cls.__module__ == "transformers.modeling_utils" for cls in type(child).__mro__):
            yield full, child
        else:
            yield from _outermost_models(child, full)
