"""Which state in a training checkpoint is a callback's own, after anything about the callback has changed.

A state is {"base": reference to the base, "root": ..., "callback": what the callback was}. A resumed run may
have moved to another folder, asks for another metric, or uses another release, so the state is not looked up
under a key that all of these would change. Of all states in the checkpoint the one is taken

    that fits          the same model; a base that did not move with the run, unless this callback's moves too
    that is most like  most fields of "callback" equal; then the same place among the callbacks

Fields that only one side knows do not count.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from lightning.pytorch import Callback, LightningModule, Trainer
from typing_extensions import override

if TYPE_CHECKING:
    from daq_lightning.training.run_settings import RunSettings

State = Mapping[str, Any]


class KeepsReference(Callback):
    """The part of a callback that training checkpoints hold: the reference to the base of its run."""

    _settings: RunSettings

    def __init__(self) -> None:
        super().__init__()
        self._place: int | None = None  # among the callbacks of this class in the Trainer
        self._state: dict[str, Any] | None = None
        self._states: list[dict[str, Any]] = []
        self._referenced = False  # by a checkpoint, which needs the base to be resumed

    @property
    @override
    def state_key(self) -> str:
        """The class, numbered from the second of a Trainer on; settings may change."""
        name = type(self).__qualname__
        if self._place is None:  # no Trainer yet: only the settings tell two callbacks apart
            return self._generate_state_key(
                **self._settings.description(model=self._settings.module, place=None)
            )
        return f"{name}[{self._place}]" if self._place else name

    @override
    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Adds the reference to the base, in primitives."""
        self._referenced = True
        if self._state is not None:
            checkpoint.setdefault("callbacks", {})[self.state_key] = dict(self._state)

    @override
    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Keeps the references that the checkpoint holds; the own one is found in `on_fit_start`."""
        self._states = states_in(checkpoint.get("callbacks", {}))


def states_in(callbacks: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The states of callbacks of this package among those of a checkpoint, whatever key they are under.

    Args:
        callbacks: `checkpoint["callbacks"]`.
    """
    found = []
    for key, state in callbacks.items():
        base = state.get("base") if isinstance(state, Mapping) else None
        if isinstance(base, Mapping) and "fingerprints" in base:
            found.append({**state, "callback": state.get("callback") or _fields_in_key(str(key))})
    return found


def own_state(states: list[dict[str, Any]], own: Mapping[str, Any]) -> dict[str, Any] | None:
    """The state that belongs to a callback, or None.

    Args:
        states: As `states_in` returns them.
        own: What the callback is now.
    """
    fitting = [state for state in states if _fits(state["callback"], own)]
    return max(fitting, key=lambda state: _likeness(state["callback"], own), default=None)


def reference_of(state: State | None, base: str, names: tuple[str, ...]) -> tuple[str, dict[str, Any] | None]:
    """Where a resumed run looks for its base, and the reference that it compares with what it finds.

    Args:
        state: Its state, or None.
        base: What the user says now.
        names: The weights that are quantized now.
    """
    if state is None:
        return base, None
    saved, said_before = dict(state["base"]), state["callback"].get("base", base)
    if base not in ("auto", "snapshot", "memory"):
        if base != said_before:
            return base, None  # the user says where the base is now
    elif base != "memory" and saved["kind"] in ("folder", "ckpt"):
        base = saved["path"]  # where the run had it from
    if saved["kind"] != "snapshot":  # a snapshot is compared as a whole
        known = saved["fingerprints"]
        saved["fingerprints"] = {name: known[name] for name in names if name in known}
    return base, saved


def _fits(other: Mapping[str, Any], own: Mapping[str, Any]) -> bool:
    same_model = other.get("model", own["model"]) == own["model"]
    return same_model and other.get("reference", "initial") in ("initial", own["reference"])


def _likeness(other: Mapping[str, Any], own: Mapping[str, Any]) -> tuple[int, bool]:
    equal = sum(name in other and other[name] == value for name, value in own.items() if name != "place")
    return equal, other.get("place") == own["place"]


def _fields_in_key(key: str) -> dict[str, Any]:
    """The settings that the first release wrote into the key: `DeltaAwareQuantization{'dirpath': ...}`."""
    try:
        fields = ast.literal_eval(key[key.index("{") :])
    except (ValueError, SyntaxError):
        return {}
    return fields if isinstance(fields, dict) else {}
