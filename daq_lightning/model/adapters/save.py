"""The active PEFT adapters of a model in training, written to a folder by themselves.

Source: peft, `get_peft_model_state_dict` and `PeftConfig.save_pretrained`.
"""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from daq_lightning.checkpoint.adapter_config import PREFIX, WEIGHTS, moves_base
from daq_lightning.checkpoint.small_file import write_tensors
from daq_lightning.model.adapters.tree import is_a, unwrap
from daq_lightning.model.sharded import tensor_on


def save_adapter(
    module: nn.Module, folder: str | os.PathLike[str], state: Mapping[str, Tensor] | None = None
) -> tuple[Path, ...]:
    """Writes the active adapters as PEFT does, to be loaded with ``PeftModel.from_pretrained`` beside an
    exported base.

    The folder gets adapter_config.json and adapter_model.safetensors; of several active adapters, each gets a
    subfolder with its name. Embeddings that are not trained stay with the base. Where the initialisation
    moved the frozen weights (PiSSA and its like), the saved configuration asks for the default one: the
    exported base is the moved one already.

    Args:
        module: As for `find_adapters`.
        folder: Made if missing.
        state: A saved `state_dict` of the module, to read the values from; None reads the module.

    Returns:
        The folders written, on every rank; the files come from rank 0. With DTensors all ranks take part.

    Raises:
        ValueError: No adapter, or a scaling that was changed by hand and that no configuration can hold.
    """
    found: tuple[str, Any] = next(
        ((name, part) for name, part in module.named_modules() if _holds_adapters(part)),
        ("", module),
    )
    path, holder = found
    layers: list[Any] = [part for part in module.modules() if is_a(part, "BaseTunerLayer")]
    active = [
        name
        for name in getattr(holder, "peft_config", {})
        if any(name in layer.active_adapters for layer in layers)
    ]
    if not active:
        raise ValueError("Expected a model with an active PEFT adapter, found none: call set_adapter(name).")
    from peft import get_peft_model_state_dict  # in sys.modules since a class of peft was found

    start = f"{path}." if path else ""
    values = None
    if state is not None:
        values = holder.state_dict() | {
            key.removeprefix(start): value for key, value in state.items() if key.startswith(start)
        }
    write = not (dist.is_available() and dist.is_initialized()) or dist.get_rank() == 0
    folders = []
    for name in active:
        for layer in layers:
            _check_scaling(layer, name)
        adapter = get_peft_model_state_dict(holder, values, adapter_name=name, save_embedding_layers=False)
        prefix = "" if is_a(holder, "PeftModel", "PeftMixedModel") else PREFIX
        tensors = {prefix + key: _whole(tensor) for key, tensor in adapter.items()}
        target = Path(folder) if len(active) == 1 else Path(folder) / name
        folders.append(target)
        if write:
            target.mkdir(parents=True, exist_ok=True)
            write_tensors(target / WEIGHTS, tensors)
            _saved_config(holder, name).save_pretrained(str(target))
    return tuple(folders)


def _whole(tensor: Tensor) -> Tensor:
    whole = tensor_on(tensor, None)
    assert whole is not None
    return whole.cpu()


def _holds_adapters(module: nn.Module) -> bool:
    return is_a(module, "PeftModel", "PeftMixedModel") or "peft_config" in vars(module)


def _saved_config(holder: Any, name: str) -> Any:
    config = copy.copy(holder.peft_config[name])
    model = unwrap(holder)
    config.inference_mode = True
    for field in vars(config):  # of a set, each process would write another order
        if isinstance(getattr(config, field), set):
            setattr(config, field, sorted(getattr(config, field)))
    config.base_model_name_or_path = (
        config.base_model_name_or_path or getattr(model, "name_or_path", None) or None
    )
    if moves_base(getattr(config, "init_lora_weights", None)):
        config.init_lora_weights = True
    return config


def _check_scaling(layer: Any, name: str) -> None:
    scaling, rank = getattr(layer, "scaling", {}).get(name), getattr(layer, "r", {}).get(name)
    if scaling is None or rank is None:
        return
    expected = layer.lora_alpha[name] / (math.sqrt(rank) if layer.use_rslora[name] else rank)
    if not math.isclose(scaling, expected, rel_tol=1e-9):
        raise ValueError(
            f"The adapter {name!r} has the scaling {scaling}, its configuration gives {expected}: PEFT "
            "cannot save a scaling set by hand. Call unscale_layer() on its layers, or merge the adapter "
            "into the export."
        )
