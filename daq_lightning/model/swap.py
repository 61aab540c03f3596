"""Other weights in a live model for a while, and its own back to the last bit.

    with put_back(module) as swap:
        swap.state(state)                   a saved state of the module
        swap.weights(model, written)        an export, dequantized
        ...                                 the module computes with these
    # and here with its own again, whatever happened

Values are written in place, one tensor at a time, so that optimizers, compiled code and shards keep what they
refer to. What was there waits in host memory; of a sharded tensor each rank keeps and writes its own part,
and nothing is communicated. Adapters that are merged in the weights are switched off meanwhile. Writing goes
through `Tensor.data`: autograd's versions and gradients do not notice.

Source: PEFT 0.21 `BaseTunerLayer.disable_adapters`; torch `distribute_tensor` (parts without communication),
`FSDPModule.reshard`, `torch.compiler.set_stance`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from daq_lightning.model.adapters.tree import is_a
from daq_lightning.model.placeholders import Placeholder
from daq_lightning.model.sharded import tensor_on

if TYPE_CHECKING:
    from daq_lightning.model.architecture import Architecture
    from daq_lightning.model.live import LiveModel


class Swap:
    """What a module holds for a while; made by `put_back`.

    Args:
        module: The LightningModule.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._kept: dict[int, tuple[Tensor, Tensor]] = {}  # id of a tensor -> itself, and what was in it
        self._off: list[Any] = []  # layers of PEFT whose adapters are switched off

    @torch.no_grad()
    def state(self, state: Mapping[str, Tensor]) -> None:
        """Puts in a saved `state_dict` of the module; what it lacks stays, as frozen weights do.

        Raises:
            ValueError: A tensor of another shape.
        """
        self._settle()
        places = self._module.state_dict(keep_vars=True)
        for name in state:
            if isinstance(places.get(name), Tensor):
                value = state[name]
                _check_shape(name, value.shape, places[name])
                self._put(places[name], value)

    @torch.no_grad()
    def weights(
        self, model: LiveModel, weights: Mapping[str, Tensor], only: Collection[str] | None = None
    ) -> None:
        """Puts in the weights of a checkpoint, rounded to the dtypes of the live tensors.

        Args:
            model: The model in the module; adapters that it merges are in the weights, and switched off.
            weights: Checkpoint name -> tensor; read one at a time.
            only: The names to put in; None puts in all.

        Raises:
            ValueError: As for `check_swappable`.
        """
        self._settle()
        places = model.places()
        names: dict[str, list[str]] = {}  # what one tensor in memory holds: a stack, several
        for name, key in model.keys.items():
            names.setdefault(key, []).append(name)
        for key, parts in names.items():
            wanted = parts if only is None else [name for name in parts if name in only]
            if not wanted:
                continue
            place = places[key]
            whole = torch.empty(place.shape, dtype=place.dtype, device=place.device)
            if len(wanted) < len(parts):
                whole.copy_(tensor_on(place, None))  # type: ignore[arg-type]
            if parts == [key]:
                value = weights[key]
                _check_shape(key, value.shape, whole)
                whole.copy_(value)
            else:
                _fill(whole, key, weights, wanted, model.architecture)
            self._put(place, whole)
        if model.merges:
            self._switch_off_adapters()

    def buffers(self) -> None:
        """Keeps what all buffers of the module hold, for code that may change them."""
        for buffer in self._module.buffers():
            self._keep(buffer)

    @torch.no_grad()
    def restore(self) -> None:
        """Puts back what was there; may be called again after an interruption."""
        self._settle()
        while self._off:
            self._off[-1]._disable_adapters = False
            self._off.pop()
        while self._kept:
            # taken out only when it is back: an interruption in between repeats it
            key = next(reversed(self._kept))
            place, own = self._kept[key]
            _local(place).copy_(own)
            del self._kept[key]

    def _put(self, place: Tensor, whole: Tensor) -> None:
        self._keep(place)
        _local(place).copy_(_part(place, whole))

    def _keep(self, place: Tensor) -> None:
        if id(place) not in self._kept:
            self._kept[id(place)] = (place, _local(place).to("cpu", copy=True))

    def _switch_off_adapters(self) -> None:
        for layer in self._module.modules():
            if is_a(layer, "BaseTunerLayer") and not layer.disable_adapters:
                self._off.append(layer)
                # the method of PEFT for this would change requires_grad
                layer._disable_adapters = True  # type: ignore[assignment]

    def _settle(self) -> None:
        """FSDP2 may hold whole copies of parameters; what is written into shards would not reach them."""
        for part in self._module.modules():
            if hasattr(part, "reshard") and hasattr(part, "unshard"):
                part.reshard()  # type: ignore[operator]


@contextlib.contextmanager
def put_back(module: nn.Module) -> Iterator[Swap]:
    """Lends a module other values; at the end it has its own, buffers included, to the last bit.

    An interruption (Ctrl-C) during the end is raised when all is back. Compiled modules run as they are
    written meanwhile, since compiled code would not see hooks that are added to it.

    Args:
        module: The LightningModule.

    Example:
        >>> layer = nn.Linear(2, 2)
        >>> with put_back(layer) as swap:
        ...     swap.state({"weight": torch.zeros(2, 2)})
        ...     bool(layer.weight.any())
        False
        >>> bool(layer.weight.any())
        True
    """
    swap = Swap(module)
    with torch.compiler.set_stance("force_eager"):
        try:
            swap.buffers()
            yield swap
        finally:
            _restore(swap)


def check_swappable(model: LiveModel) -> None:
    """Raises ValueError, with what to do, where the weights of a checkpoint cannot be put into the model."""
    places = model.places()
    flat = [key for key in model.keys.values() if isinstance(places.get(key), Placeholder)]
    if flat:
        raise ValueError(
            f"{flat[0]} lies in a flat shard of FSDP1 or DeepSpeed ZeRO-3, which other weights cannot be put "
            "into: train with ModelParallelStrategy (FSDP2), DDP or ZeRO-2; or judge the export afterwards, "
            "with `daq-lightning evaluate`."
        )
    computed = [key for key in model.keys.values() if key not in places]
    if computed:
        raise ValueError(
            f"{computed[0]} is computed (weight norm or the like), so other weights cannot be put in its "
            "place: first remove the parametrization, by torch.nn.utils.parametrize.remove_parametrizations."
        )


def _restore(swap: Swap) -> None:
    interrupted: KeyboardInterrupt | None = None
    while True:
        try:
            swap.restore()
        except KeyboardInterrupt as error:
            interrupted = error
        else:
            break
    if interrupted is not None:
        raise interrupted


def _local(tensor: Tensor) -> Tensor:
    data: Any = tensor.data
    return data.to_local() if hasattr(data, "to_local") else data


def _part(place: Any, whole: Tensor) -> Tensor:
    """This rank's part of a tensor that all ranks have whole."""
    if not hasattr(place, "placements") or hasattr(whole, "placements"):
        return _local(whole)
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(whole, place.device_mesh, place.placements, src_data_rank=None).to_local()


def _fill(
    whole: Tensor, key: str, weights: Mapping[str, Tensor], names: Sequence[str], architecture: Architecture
) -> None:
    """Puts the tensors of a checkpoint where the architecture, splitting the tensor in memory, takes them
    from.

    A split may copy, so where an element comes from is found by splitting the coordinates, one axis at a
    time: an arange that is expanded to the shape.
    """
    axes = []
    for axis, size in enumerate(whole.shape):
        ruler = torch.arange(size, dtype=torch.int32, device=whole.device)
        shape = [size if other == axis else 1 for other in range(whole.ndim)]
        axes.append(architecture.split(key, ruler.reshape(shape).expand(whole.shape)))
    for name in names:
        value = weights[name]  # one at a time
        _check_shape(name, value.shape, axes[0][name])
        whole[tuple(axis[name].long() for axis in axes)] = value.to(whole.device, whole.dtype)


def _check_shape(name: str, shape: torch.Size, place: Tensor) -> None:
    if shape != place.shape:
        raise ValueError(f"{name} has shape {tuple(shape)}, in the model it has {tuple(place.shape)}.")
