"""Inputs of layers as FP8 servers see them: rounded, with a scale for each token, or 128 values of it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from daq_lightning.checkpoint.schemes import Scheme
from daq_lightning.numerics.formats import PerBlock, PerChannel
from daq_lightning.numerics.quantize import absmax_scale, dequantize, quantize


@contextmanager
def fp8_inputs(layers: Iterable[nn.Module], scheme: Scheme) -> Iterator[None]:
    """Rounds what goes into the layers to FP8 while it is open: dynamic absmax scales in float32.

    A token is a row of its own; under a block scheme it has a scale for every 128 values, as wide as a block.
    """
    block = scheme.granularity if isinstance(scheme.granularity, PerBlock) else None
    granularity = PerChannel() if block is None else PerBlock(1, block.cols)

    def rounded(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        rows = args[0].flatten(0, -2)
        scale = absmax_scale(rows, granularity, fmt=scheme.format)
        codes = quantize(rows, scale, granularity, scheme.format)
        return (dequantize(codes, scale, granularity).view_as(args[0]), *args[1:])

    hooks = [layer.register_forward_pre_hook(rounded) for layer in layers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
