"""A pickle read as data: the containers, numbers and tensors that it describes; nothing in it is executed.

A pickle is a program for a stack machine that imports classes and calls functions, any of them. Here it is
followed without that: a name stays a name, a call that rebuilds a tensor is recognised by name and gives the
tensor, and every other object, whatever its construction would have done, becomes `_OBJECT`, which takes all
and does nothing.

Sources: Python's `pickletools` (opcodes), torch 2.13 `_utils` (`_rebuild_*`) and `serialization` (persistent
    ids).
"""

from __future__ import annotations

import math
import pickletools
from collections.abc import Callable, Mapping
from reprlib import repr as shown  # that of Python fills the memory where tuples hold one another many times
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

FindStorage: TypeAlias = Callable[[str, int], torch.UntypedStorage]
"""The storage of a key and of a size in bytes; raises ValueError if there is none."""

_DTYPES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "ComplexDoubleStorage": torch.complex128,
    "ComplexFloatStorage": torch.complex64,
    "UntypedStorage": torch.uint8,
}

_MOST_REPEATED = 1 << 30  # bytes of a tensor that shows the bytes of its storage several times (stride 0)


def run_pickle(program: bytes, find_storage: FindStorage) -> Any:
    """The object that a pickle describes, made of containers, numbers, strings, tensors and stand-ins.

    Args:
        program: The pickle.
        find_storage: Where tensors find their bytes.

    Raises:
        ValueError: The program is damaged, or a tensor does not fit its storage.
    """
    return _Machine(find_storage).run(program)


class _Global(NamedTuple):
    """A class or function that a pickle names. It is never imported."""

    module: str
    name: str


class _Storage(NamedTuple):
    data: torch.UntypedStorage
    dtype: torch.dtype


class _Object:
    """Stands for any object that is neither a tensor nor a plain container: takes all and does nothing."""


class _Mark:
    """Where a group of operands begins on the stack."""


_OBJECT, _MARK = _Object(), _Mark()


class _Machine:
    """Follows the program of a pickle on a stack of its own.

    Args:
        find_storage: See `run_pickle`.
    """

    def __init__(self, find_storage: FindStorage) -> None:
        self._find_storage = find_storage
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}

    def run(self, program: bytes) -> Any:
        """The object that a pickle describes.

        Raises:
            ValueError: The program is damaged.
        """
        for opcode, argument, _ in pickletools.genops(program):
            if opcode.name == "STOP":
                return self._pop()
            if opcode.name in _LITERALS:
                self._stack.append(_LITERALS[opcode.name](argument))
            elif opcode.name in _BUILDS:
                count, build = _BUILDS[opcode.name]
                operands = self._pop_mark() if count is None else [self._pop() for _ in range(count)][::-1]
                self._stack.append(build(self, operands))
            else:
                self._follow(opcode.name, argument)
        raise ValueError("its pickle has no end")  # genops raises before

    def _follow(self, name: str, argument: Any) -> None:
        """The opcodes that do something else than to replace operands by a result."""
        if name in ("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"):
            self._memo[len(self._memo) if argument is None else argument] = self._peek()
        elif name in ("GET", "BINGET", "LONG_BINGET"):
            if argument not in self._memo:
                raise ValueError(f"its pickle refers to object {argument}, which it does not have")
            self._stack.append(self._memo[argument])
        elif name == "MARK":
            self._stack.append(_MARK)
        elif name == "POP":
            del self._stack[-1:]
        elif name == "POP_MARK":
            self._pop_mark()
        elif name == "DUP":
            self._stack.append(self._peek())
        elif name in ("APPEND", "APPENDS", "ADDITEMS"):
            items = [self._pop()] if name == "APPEND" else self._pop_mark()
            target = self._peek()
            if isinstance(target, list):
                target.extend(items)
        elif name in ("SETITEM", "SETITEMS"):
            items = [self._pop(), self._pop()][::-1] if name == "SETITEM" else self._pop_mark()
            target = self._peek()
            if isinstance(target, dict):  # only keys whose hash runs no code and does not recurse
                target |= {
                    key: value for key, value in zip(items[::2], items[1::2], strict=False) if _is_key(key)
                }
        elif name == "BUILD":
            self._pop()  # the state of an object: attributes, which no tensor or container needs
            self._peek()
        elif name not in ("PROTO", "FRAME", "READONLY_BUFFER"):
            raise ValueError(f"its pickle uses {name}, which torch.save does not write")

    def _peek(self) -> Any:
        if not self._stack or self._stack[-1] is _MARK:
            raise ValueError("its pickle takes an operand that is not there")
        return self._stack[-1]

    def _pop(self) -> Any:
        top = self._peek()
        del self._stack[-1]
        return top

    def _pop_mark(self) -> list[Any]:
        for position in range(len(self._stack) - 1, -1, -1):
            if self._stack[position] is _MARK:
                items = self._stack[position + 1 :]
                del self._stack[position:]
                return items
        raise ValueError("its pickle ends a group that it did not begin")

    def persistent(self, operands: list[Any]) -> _Storage | _Object:
        """The storage of a persistent id: `("storage", class, key, device, number of elements)`."""
        reference = operands[0]
        if not (isinstance(reference, tuple) and len(reference) == 5 and reference[0] == "storage"):
            return _OBJECT
        _, kind, key, _, count = reference
        dtype = (
            _DTYPES.get(kind.name) if isinstance(kind, _Global) and kind.module.startswith("torch") else None
        )
        if dtype is None or not isinstance(key, str) or type(count) is not int:
            return _OBJECT
        return _Storage(self._find_storage(key, count * dtype.itemsize), dtype)


def _is_key(key: Any) -> bool:
    return isinstance(key, (str, int, float, bytes, type(None)))


def _unchanged(argument: Any) -> Any:
    return argument


def _global(argument: str) -> _Global:
    module, _, name = argument.partition(" ")
    return _Global(module, name)


_VALUES = (
    "INT BININT BININT1 BININT2 LONG LONG1 LONG4 FLOAT BINFLOAT STRING BINSTRING SHORT_BINSTRING UNICODE "
    "SHORT_BINUNICODE BINUNICODE BINUNICODE8 BINBYTES SHORT_BINBYTES BINBYTES8 BYTEARRAY8"
)
_LITERALS: Mapping[str, Callable[[Any], Any]] = {
    **dict.fromkeys(_VALUES.split(), _unchanged),
    "NONE": lambda _: None,
    "NEWTRUE": lambda _: True,
    "NEWFALSE": lambda _: False,
    "EMPTY_LIST": lambda _: [],
    "EMPTY_DICT": lambda _: {},
    "EMPTY_TUPLE": lambda _: (),
    "EMPTY_SET": lambda _: _OBJECT,
    "GLOBAL": _global,
    "PERSID": lambda _: _OBJECT,
}
"""Opcodes that push one thing, given the opcode's own argument."""


def _call(_: _Machine, operands: list[Any]) -> Any:
    function, arguments = operands
    return _rebuilt(function, arguments) if isinstance(arguments, tuple) else _OBJECT


def _stack_global(_: _Machine, operands: list[Any]) -> _Global | _Object:
    module, name = operands
    return _Global(module, name) if isinstance(module, str) and isinstance(name, str) else _OBJECT


def _object(_: _Machine, operands: list[Any]) -> _Object:
    return _OBJECT


_BUILDS: Mapping[str, tuple[int | None, Callable[[_Machine, list[Any]], Any]]] = {
    "TUPLE": (None, lambda _, operands: tuple(operands)),
    "TUPLE1": (1, lambda _, operands: tuple(operands)),
    "TUPLE2": (2, lambda _, operands: tuple(operands)),
    "TUPLE3": (3, lambda _, operands: tuple(operands)),
    "LIST": (None, lambda _, operands: list(operands)),
    "DICT": (None, _object),
    "FROZENSET": (None, _object),
    "STACK_GLOBAL": (2, _stack_global),
    "REDUCE": (2, _call),
    "NEWOBJ": (2, _object),
    "NEWOBJ_EX": (3, _object),
    "INST": (None, _object),
    "OBJ": (None, _object),
    "BINPERSID": (1, _Machine.persistent),
}
"""Opcodes that replace operands by a result: how many (None: back to the mark), and the result."""


# The calls that rebuild a tensor


def _rebuilt(function: Any, arguments: tuple[Any, ...]) -> Any:
    """What a call gives: a tensor or an empty dict, where that is known by the name of the function."""
    if function == ("collections", "OrderedDict") and not arguments:
        return {}
    if not isinstance(function, _Global) or not function.module.startswith("torch."):
        return _OBJECT
    if function.name == "_rebuild_tensor_v2" and len(arguments) in (6, 7):
        storage, offset, size, stride = arguments[:4]
        return _tensor(storage, None, offset, size, stride) if not any(arguments[6:]) else _OBJECT
    if function.name == "_rebuild_tensor_v3" and len(arguments) in (7, 8):
        storage, offset, size, stride, _, _, dtype = arguments[:7]
        return _tensor(storage, dtype, offset, size, stride) if not any(arguments[7:]) else _OBJECT
    if function.name in ("_rebuild_parameter", "_rebuild_parameter_with_state") and arguments:
        return arguments[0] if isinstance(arguments[0], Tensor) else _OBJECT
    # a tensor with attributes of its own
    if function.name == "_rebuild_from_type_v2" and len(arguments) == 4:
        inner, kind, inner_arguments, _ = arguments
        plain = kind in (
            ("torch", "Tensor"),
            ("torch._tensor", "Tensor"),
            ("torch.nn.parameter", "Parameter"),
        )
        if plain and isinstance(inner_arguments, tuple) and inner != function:
            return _rebuilt(inner, inner_arguments)
    return _OBJECT


def _tensor(storage: Any, dtype: Any, offset: Any, size: Any, stride: Any) -> Any:
    """A view of a storage.

    Raises:
        ValueError: It reaches beyond the storage.
    """
    if not isinstance(storage, _Storage):
        return _OBJECT
    if dtype is not None:
        known = (
            vars(torch).get(dtype.name) if isinstance(dtype, _Global) and dtype.module == "torch" else None
        )
        if not isinstance(known, torch.dtype):
            return _OBJECT
        storage = storage._replace(dtype=known)
    shaped = isinstance(size, tuple) and isinstance(stride, tuple) and len(size) == len(stride) <= 64
    if not shaped or not all(type(n) is int and 0 <= n < 1 << 63 for n in (offset, *size, *stride)):
        raise ValueError(
            f"a tensor has size {shown(size)[:80]}, stride {shown(stride)[:80]}, offset {shown(offset)[:80]}"
        )
    last = offset + sum((count - 1) * step for count, step in zip(size, stride, strict=True))
    if 0 not in size and (last + 1) * storage.dtype.itemsize > storage.data.nbytes():
        raise ValueError(
            f"a tensor of size {shown(size)[:80]} reaches beyond its storage of {storage.data.nbytes()} bytes"
        )
    if math.prod(size) * storage.dtype.itemsize > max(storage.data.nbytes(), _MOST_REPEATED):
        raise ValueError(f"a tensor of size {shown(size)[:80]} repeats its storage too often")
    return torch.empty(0, dtype=storage.dtype, device="cpu").set_(storage.data, offset, size, stride)
