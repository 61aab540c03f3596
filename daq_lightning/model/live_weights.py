"""Tensors in memory under the names of a checkpoint, read one at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch.distributed as dist
from torch import Tensor

from daq_lightning.checkpoint.tensor_file import LazyTensors, TensorSpec, spec_of
from daq_lightning.model.architecture import Architecture
from daq_lightning.model.sharded import tensor_on


class LiveWeights(LazyTensors):
    """Tensors in memory under the names that a saved checkpoint would give them.

    Nothing is copied: a plain parameter is handed out as it is, stacked experts as views of their slices, and
    whatever has to be computed (a merged LoRA weight) is computed when it is asked for, one tensor at a time.

    Args:
        tensors: Memory name -> tensor; may itself be lazy.
        names: Checkpoint name -> memory name, see `Architecture.saved`.
        architecture: Splits a tensor in memory into those of the checkpoint.
        specs: Descriptions of tensors that have to be computed; None where all are at hand.
        collective: Whether the tensors are sharded, and read by `on`.
    """

    def __init__(
        self,
        tensors: Mapping[str, Tensor],
        names: Mapping[str, str],
        architecture: Architecture,
        specs: Mapping[str, TensorSpec] | None = None,
        *,
        collective: bool = False,
    ) -> None:
        self._tensors, self._names, self._architecture, self._specs = tensors, names, architecture, specs
        self._last: tuple[str, dict[str, Tensor]] = ("", {})
        self.collective = collective
        self._final = {key: name for name, key in names.items()}
        self._given: dict[int, str] = {}  # rank -> memory name of the stack that it got last

    def __getitem__(self, name: str) -> Tensor:
        key = self._names[name]
        if key == name:
            return self._tensors[key].detach()
        if self._last[0] != key:
            self._last = (key, self._architecture.split(key, self._tensors[key].detach()))
        return self._last[1][name]

    def on(self, name: str, owner: int) -> Tensor | None:
        """See `LazyTensors`. The slices of a stack come out of one gathering."""
        key = self._names[name]
        if key == name or self._given.get(owner) != key:
            whole = _on(self._tensors, key, owner)
            if key == name:
                return whole
            self._given[owner] = key
            if whole is not None:
                self._last = (key, self._architecture.split(key, whole))
        here = self._last[1].get(name) if self._last[0] == key and dist.get_rank() == owner else None
        if self._final[key] == name:  # nobody asks for this stack again
            self._given = {rank: other for rank, other in self._given.items() if other != key}
            self._last = ("", {}) if self._last[0] == key else self._last
        return here

    def __contains__(self, name: object) -> bool:
        return name in self._names and self._names[name] in self._tensors  # type: ignore[index]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def spec(self, name: str) -> TensorSpec:
        """dtype and shape of a tensor."""
        return spec_of(name, self[name]) if self._specs is None else self._specs[name]


def _on(tensors: Any, key: str, owner: int) -> Tensor | None:
    return tensors.on(key, owner) if hasattr(tensors, "on") else tensor_on(tensors[key], owner)
