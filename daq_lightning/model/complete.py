"""Whether an export would hold all that its readers expect, known before the first step.

The reader builds the model of config.json and fills it by name; a name that the export lacks is left at
random values. The names of the model in training differ from those where somebody replaced, wrapped or untied
a layer.
"""

from __future__ import annotations

import copy
import logging
from typing import Any

import torch
from torch import nn

from daq_lightning.model.architecture import Architecture, class_of
from daq_lightning.model.live import LiveModel
from daq_lightning.model.outline import Outline


def check_complete(model: LiveModel) -> None:
    """Compares what would be exported with what the model of its config.json has.

    Raises:
        ValueError: Names that the export would lack, or tied weights that are not tied in the model.
    """
    if not model.architecture.is_transformers:
        return  # nobody else but the module itself says what its names are
    _check_ties(model)
    reference = _built_from_config(model.model)
    if reference is None:
        return
    keys = set(model.keys.values())
    missing = reference.missing(keys)
    if missing:
        foreign = [key for key in model.keys.values() if key not in reference.tensors]
        instead = f" It has {_listed(foreign)} instead." if foreign else ""
        raise ValueError(
            f"The export would lack {_listed(missing)}, which the {class_of(model.model).__name__} of its "
            f"config.json has and readers would leave at random values.{instead} Expected a model with the "
            "layers and names that its config describes: put the original layers back before the export, or "
            "merge what was added into them."
        )


def _check_ties(model: LiveModel) -> None:
    names = {key: name for name, key in model.keys.items()}
    for key, name in names.items():
        source = model.architecture.ties.get(key)
        # of one tensor only the source is written
        if source is not None and source != key and source in names:
            raise ValueError(
                f"{name} and {names[source]} are tied by config.json, but are two tensors in the model: "
                "readers would use one of them for both. Set tie_word_embeddings=False in the config before "
                "the model is made, or tie them again with tie_weights()."
            )


def _built_from_config(model: nn.Module) -> Outline | None:
    """Of the model that a reader builds, without weights; None if its class cannot be built so."""
    config = copy.deepcopy(model.config)
    vars(config).pop("quantization_config", None)
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        # some models draw random numbers on the CPU when they are built: those of the training stay what they
        # were
        with torch.random.fork_rng(devices=[]), torch.device("meta"):
            kind: Any = class_of(model)
            built = kind._from_config(config, attn_implementation="eager")
            return Architecture(built).outline({})
    except Exception:
        # a class of the user's whose constructor takes more than a config: its readers are the user's too
        return None
    finally:
        logger.setLevel(level)


def _listed(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
