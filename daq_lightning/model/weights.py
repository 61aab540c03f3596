"""The weights of a live model as a lazy mapping under checkpoint names.

Nothing is copied: a plain parameter is handed out as it is, stacked experts as views of their slices, and whatever
has to be computed (a merged LoRA weight, a gathered shard) is computed when it is asked for, one tensor at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import Tensor, nn

from daq_lightning.model.architecture import Architecture


class LiveWeights(Mapping[str, Tensor]):
    """Tensors in memory under the names that a saved checkpoint would give them.

    Args:
        tensors: Memory name -> tensor; may itself be lazy.
        names: Checkpoint name -> memory name, see `Architecture.saved_names`.
        architecture: Splits a tensor in memory into those of the checkpoint.
    """

    def __init__(self, tensors: Mapping[str, Tensor], names: Mapping[str, str], architecture: Architecture) -> None:
        self._tensors, self._names, self._architecture = tensors, names, architecture
        self._last: tuple[str, dict[str, Tensor]] = ("", {})

    def __getitem__(self, name: str) -> Tensor:
        key = self._names[name]
        if key == name:
            return self._tensors[key].detach()
        if self._last[0] != key:
            self._last = (key, self._architecture.split(key, self._tensors[key].detach()))
        return self._last[1][name]

    def __contains__(self, name: object) -> bool:
        return name in self._names and self._names[name] in self._tensors  # type: ignore[index]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def live_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers of a module under their names: references, not copies."""
    return {name: tensor for name, tensor in model.state_dict(keep_vars=True).items() if isinstance(tensor, Tensor)}
