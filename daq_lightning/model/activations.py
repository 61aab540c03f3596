"""Modules that see their input as a server of a scheme gives it to them, for as long as a block lasts.

    with quantized_activations(modules, scheme): model(...)

The weights stay as they are: fill the model with the dequantized ones of an export to compute what a server
does. A Linear is reached by a hook before its forward. Stacks of experts are no Linear: their products happen
inside one forward, and there each of them, the first projection and the last, gets its input quantized, as
servers do. How: a mode of torch sees every call of a product while the forward of such a module runs.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from daq_lightning.checkpoint.schemes import Activations, Scheme
from daq_lightning.numerics.activations import quantized_input

_TOKENS_FIRST = {"linear", "matmul", "__matmul__", "mm", "grouped_mm", "_grouped_mm", "grouped_mm_fallback"}
"""Products whose first operand holds tokens as rows, by the names of their functions."""
_UNKNOWN = {"__rmatmul__", "addbmm", "addmm", "baddbmm", "einsum", "tensordot"}
"""Products that do not tell which operand holds the tokens."""


@contextlib.contextmanager
def quantized_activations(modules: Iterable[nn.Module], scheme: Scheme) -> Iterator[None]:
    """Makes modules see their input quantized as servers of a scheme do it, and dequantized at once.

    FP8_DYNAMIC and W8A8 take one scale a token, FP8_BLOCK and MXFP8 one a token and block of features (128,
    32), and schemes that end in A16 none: then nothing is changed. Under autocast the input is cast first, as
    the module would cast it. For use without
    gradients.

    Args:
        modules: Those whose weights are quantized: Linear modules, and modules with stacks of experts, that
            is, parameters of three dimensions. One that comes twice is quantized once.
        scheme: Of the export, from `daq_lightning.checkpoint.schemes.SCHEMES`.

    Raises:
        ValueError: A module is neither (before anything is changed). Or, in a forward: gradients are asked
            for, or experts multiply in a kernel that cannot be seen.

    Example:
        >>> from daq_lightning.checkpoint.schemes import SCHEMES
        >>> linear = nn.Linear(2, 1, bias=False).requires_grad_(False)
        >>> with quantized_activations([linear], SCHEMES["FP8_DYNAMIC"]):
        ...     seen = linear(torch.tensor([[448.0, 5.3]]))
        >>> torch.equal(seen, linear(torch.tensor([[448.0, 5.5]])))
        True
    """
    unique = list({id(module): module for module in modules}.values())
    for module in unique:
        if not isinstance(module, nn.Linear) and not holds_experts(module):
            raise ValueError(
                f"{type(module).__name__} is neither a Linear nor a stack of experts (a parameter of three "
                "dimensions), so where its input meets its weight is not known: leave it out, and say so."
            )
    if scheme.activations is None:
        yield
        return
    quantize = functools.partial(_quantize, activations=scheme.activations)
    with contextlib.ExitStack() as undo:
        for module in unique:
            if isinstance(module, nn.Linear):
                hook = functools.partial(_before_linear, quantize)
                undo.callback(module.register_forward_pre_hook(hook, with_kwargs=True).remove)
            else:
                undo.enter_context(_experts(module, quantize))
        yield


def holds_experts(module: nn.Module) -> bool:
    """Whether a module has stacks of matrices of its own."""
    return any(parameter.ndim == 3 for parameter in module.parameters(recurse=False))


def _quantize(x: Tensor, *, activations: Activations) -> Tensor:
    if torch.is_grad_enabled() and x.requires_grad:
        raise ValueError(
            "Quantized activations have no gradient: run the model under torch.no_grad() or "
            "torch.inference_mode()."
        )
    if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
        x = x.to(torch.get_autocast_dtype(x.device.type))
    return quantized_input(x, activations.group, activations.format, activations.scale_format)


def _before_linear(
    quantize: Callable[[Tensor], Tensor], module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if args:
        return (quantize(args[0]), *args[1:]), kwargs
    return args, kwargs | {"input": quantize(kwargs["input"])}


@contextlib.contextmanager
def _experts(module: nn.Module, quantize: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Lets the forward of a module run in `_Products`."""
    forward, own = module.forward, "forward" in vars(module)

    @functools.wraps(forward)
    def watched(*args: Any, **kwargs: Any) -> Any:
        products = _Products(quantize)
        with products:
            result = forward(*args, **kwargs)
        if not products.seen and any(isinstance(given, Tensor) and given.numel() for given in args):
            raise _cannot_see(f"{type(module).__name__} multiplies in a kernel of its own")
        return result

    module.forward = watched
    try:
        yield
    finally:
        if own:
            module.forward = forward
        else:
            del module.forward


class _Products(TorchFunctionMode):
    """Quantizes the tokens of every product; `seen` counts them."""

    def __init__(self, quantize: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self._quantize, self.seen = quantize, 0

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        name = getattr(func, "__name__", "")
        if name in _UNKNOWN or (name in _TOKENS_FIRST | {"bmm"} and len(args) < 2):
            raise _cannot_see(f"the experts multiply by {name}")
        if name in _TOKENS_FIRST:
            args = (self._quantize(args[0]), *args[1:])
            self.seen += 1
        elif name == "bmm":
            args = (*self._of_batch(args[0], args[1]), *args[2:])
            self.seen += 1
        return func(*args, **(kwargs or {}))

    def _of_batch(self, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
        """A batch of single tokens is the operand of size 1: (S, 1, N) @ (S, N, M), (S, M, N) @ (S, N, 1)."""
        if second.shape[-1] != 1:
            return self._quantize(first), second
        if first.shape[-2] != 1:
            return first, self._quantize(second.transpose(-1, -2)).transpose(-1, -2)
        raise _cannot_see("the experts multiply vectors by vectors")


def _cannot_see(what: str) -> ValueError:
    return ValueError(
        f"{what}, so their input cannot be quantized as servers do. Load the model with "
        'experts_implementation="eager", or leave the experts out and say so.'
    )
