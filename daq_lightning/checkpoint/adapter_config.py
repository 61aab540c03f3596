"""`adapter_config.json` of a PEFT adapter folder: what it says, and what would be merged wrongly."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from daq_lightning.checkpoint.folder import read_json
from daq_lightning.checkpoint.tensor_file import CheckpointError

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."

MERGE = (
    "Load it with PEFT, call merge_and_unload(), save the model, and pass that folder as the fine-tuned one."
)
# fields of a LoRA configuration under which B @ A is not the update of X.weight
_OTHER_UPDATES = (
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "layer_replication",
    "megatron_config",
    "monteclora_config",
    "target_parameters",
    "trainable_token_indices",
    "use_bdlora",
    "use_qalora",
    "velora_config",
)
_MOVES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


def moves_base(init_lora_weights: object) -> bool:
    """Whether an initialisation of LoRA subtracts the first update from the frozen weight, which is then not
    the base.

    Example:
        >>> moves_base("pissa_niter_4"), moves_base(True), moves_base("gaussian")
        (True, False, False)
    """
    return isinstance(init_lora_weights, str) and init_lora_weights.lower().startswith(_MOVES_BASE)


def read_config(folder: Path) -> dict[str, Any]:
    """The configuration of an adapter folder.

    Raises:
        CheckpointError: No adapter, another kind than LoRA, or a field under which B @ A is not the update.
    """
    if not (folder / CONFIG).is_file():
        raise CheckpointError(f"{folder} is not an adapter folder: expected {CONFIG} and {WEIGHTS} in it.")
    if not (folder / WEIGHTS).is_file():
        found = (
            "adapter_model.bin, a pickle, which is never opened"
            if (folder / "adapter_model.bin").exists()
            else "none"
        )
        raise CheckpointError(
            f"{folder} has no {WEIGHTS} (found {found}): save the adapter with save_pretrained(..., "
            "safe_serialization=True)."
        )
    config = read_json(folder / CONFIG)
    if config.get("peft_type") != "LORA":
        raise CheckpointError(
            f"{folder} is an adapter of kind {config.get('peft_type')!r}, expected 'LORA'. {MERGE}"
        )
    for field in ("rank_pattern", "alpha_pattern"):
        patterns = config.get(field) or {}
        if not isinstance(patterns, dict) or not all(map(is_number, patterns.values())):
            raise CheckpointError(
                f"{folder / CONFIG}: expected {field} from patterns to numbers, got {patterns!r:.80}."
            )
    for field in _OTHER_UPDATES:
        if config.get(field):
            raise CheckpointError(
                f"{folder / CONFIG} has {field}, which is not supported without the model. {MERGE}"
            )
    if moves_base(config.get("init_lora_weights")):
        raise CheckpointError(
            f"{folder} was initialised by {config['init_lora_weights']!r}, which moved the frozen weights: "
            "the adapter does not fit the original base. Save it with save_pretrained(..., "
            "path_initial_model_for_weight_conversion=...), or merge it where it was trained."
        )
    return config


def is_number(value: object) -> bool:
    """Whether a value is a number to compute with, not NaN nor beyond 1e300; True and False are none."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e300
