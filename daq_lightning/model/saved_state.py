"""Where the tensors of a module in training are read: in the module itself, or in a saved state of it.

A saved state is what `state_dict` of the LightningModule was when a checkpoint was written. Reading it
through the live module, which knows the adapters and their scaling, leaves the live module alone: nothing is
lent or put back.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from daq_lightning.checkpoint.tensor_file import CheckpointError
from daq_lightning.model.architecture import name_without_peft
from daq_lightning.model.placeholders import state_names
from daq_lightning.model.sharded import is_sharded


class Values:
    """The tensors of a module, by owner and key, since training may replace a tensor itself.

    Args:
        module: The module.
        state: A saved `state_dict` of it. What is frozen may be left out, as in checkpoints of adapters
            alone: it is then read from the module. None reads the module.

    Raises:
        CheckpointError: As for `check_adapters`.
    """

    def __init__(self, module: nn.Module, state: Mapping[str, Tensor] | None = None) -> None:
        self._state = state
        self._names = {
            part: name.replace("_checkpoint_wrapped_module.", "") for name, part in module.named_modules()
        }
        check_adapters(module, state or {})

    def __call__(self, owner: nn.Module, key: str) -> Tensor:
        """The value of one parameter or buffer, detached.

        Raises:
            CheckpointError: The state lacks a tensor that is trained, or holds one of another shape.
        """
        live = getattr(owner, key)
        if self._state is None:
            return live.detach()
        return _saved(f"{self._names[owner]}.{key}".removeprefix("."), live, self._state)


class InFull(Mapping[str, Tensor]):
    """The tensors of a module with the values of a saved state, read on access.

    Args:
        live: Name -> tensor of the module.
        state: The saved state; what is frozen may be missing in it.

    Raises:
        CheckpointError: On access: the state lacks a tensor that is trained, or holds one of another shape.
    """

    def __init__(self, live: Mapping[str, Any], state: Mapping[str, Tensor]) -> None:
        self._live, self._state = live, state

    def __getitem__(self, name: str) -> Tensor:
        return _saved(name, self._live[name], self._state)

    def __iter__(self) -> Iterator[str]:
        return iter(self._live)

    def __len__(self) -> int:
        return len(self._live)


def _saved(name: str, live: Tensor, state: Mapping[str, Tensor]) -> Tensor:
    saved = state.get(name)
    if saved is None and not live.requires_grad and not is_sharded(live):
        return live.detach()
    if saved is None or saved.shape != live.shape:
        how = "trained" if live.requires_grad else "sharded"
        found = "lacks it" if saved is None else f"has the shape {tuple(saved.shape)}"
        raise CheckpointError(
            f"{name} is {how} and has the shape {tuple(live.shape)} in the model, but the checkpoint "
            f"{found}: expected a checkpoint of the same module with the same adapters."
        )
    return saved.detach()


def check_adapters(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Compares the adapters in a saved state with those of the module.

    Raises:
        CheckpointError: The state has PEFT adapters that the module does not have.
    """
    adapters = adapters_in(state)
    own = set(state_names(module)) if adapters else set()
    foreign = [name for name in adapters if name not in own]
    if foreign:
        more = f" and {len(foreign) - 3} more" if len(foreign) > 3 else ""
        raise CheckpointError(
            "The checkpoint holds adapters that the model in training does not have: "
            f"{', '.join(foreign[:3])}{more}. Expected a checkpoint of the same module with the same "
            "adapters. Merge the adapters of the other run first, with merge_and_unload() and "
            "save_pretrained(), and pass that folder."
        )


def adapters_in(state: Mapping[str, Tensor]) -> list[str]:
    """The names in a state that belong to PEFT adapters and trained copies."""
    return [name for name in state if name_without_peft(name) is None]
