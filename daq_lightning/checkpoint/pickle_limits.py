"""What a pickle may ask of Python's own unpickler, found out before that runs.

The unpickler is native code: no alarm interrupts it, and no limit of recursion holds in all of it. A few
bytes are enough to keep it busy for ever (a tuple that holds a tuple twice, and so on forty times, as the key
of a dict: its hash takes 2^40 steps), to end the process (a tuple in a tuple, and so on a million times, as a
key), or to fill the memory (the number 2^31 of a memo, which is made as long). So its opcodes are followed
first, as sizes alone: nothing is made.

Source: Python's `pickletools` (what each opcode takes and leaves), `Modules/_pickle.c` (the memo).
"""

from __future__ import annotations

import pickletools
from collections.abc import Iterator
from typing import Any

MOST_LEVELS = 100
"""Objects within one another."""

MOST_REPEATED = 100
"""Characters and objects that are used again by their number in the memo, for each byte of the pickle."""

_USED = frozenset(
    [
        "PROTO",
        "FRAME",
        "STOP",
        "MARK",
        "NONE",
        "NEWTRUE",
        "NEWFALSE",
        "BININT",
        "BININT1",
        "BININT2",
        "LONG1",
        "BINFLOAT",
        "SHORT_BINUNICODE",
        "BINUNICODE",
        "EMPTY_TUPLE",
        "TUPLE",
        "TUPLE1",
        "TUPLE2",
        "TUPLE3",
        "EMPTY_LIST",
        "APPEND",
        "APPENDS",
        "EMPTY_DICT",
        "SETITEM",
        "SETITEMS",
        "GLOBAL",
        "STACK_GLOBAL",
        "NEWOBJ",
        "REDUCE",
        "BUILD",
        "MEMOIZE",
        "BINPUT",
        "LONG_BINPUT",
        "BINGET",
        "LONG_BINGET",
    ]
)  # with protocols 2 to 5, for classes, containers, text and numbers
_CHANGES = frozenset(["APPEND", "APPENDS", "SETITEM", "SETITEMS", "BUILD"])


class _Size:
    """Of an object: how many parts it has, theirs included, how deep they lie, whether it is used twice."""

    __slots__ = ("levels", "parts", "shared")

    def __init__(self, parts: int = 1, levels: int = 0) -> None:
        self.parts, self.levels, self.shared = parts, levels, False

    def take(self, parts: list[_Size]) -> None:
        self.parts += sum(part.parts for part in parts)
        self.levels = max((self.levels, *(part.levels + 1 for part in parts)))
        if self.levels > MOST_LEVELS:
            raise ValueError(f"its pickle is more than {MOST_LEVELS} levels deep")


def check_pickle(program: bytes) -> None:
    """Holds a pickle to limits within which the unpickler ends soon.

    With n the length of the program: at most n objects are made, numbered below n and at most `MOST_LEVELS`
    deep; those that are used again count together, with all their parts, at most `MOST_REPEATED` n; integers
    are of 64 bits; and only opcodes are used that a pickler writes for classes, containers, text and numbers.

    Args:
        program: The pickle.

    Raises:
        ValueError: It is damaged, or beyond a limit.

    Example:
        >>> import pickle
        >>> check_pickle(pickle.dumps({"a": (1, [2])}))
        >>> check_pickle(pickle.dumps(1 << 70))
        Traceback (most recent call last):
        ValueError: its pickle has an integer of more than 64 bits
    """
    stack: list[_Size | None] = []  # None is a mark
    memo: dict[int, _Size] = {}
    repeated = 0
    for opcode, argument in _opcodes(program):
        name = opcode.name
        if name == "MARK":
            stack.append(None)
        elif name in ("MEMOIZE", "BINPUT", "LONG_BINPUT"):
            number = len(memo) if argument is None else argument
            if number > len(program):
                raise ValueError(f"its pickle of {len(program)} bytes gives an object the number {number}")
            memo[number] = _top(stack)
        elif name in ("BINGET", "LONG_BINGET"):
            if argument not in memo:
                raise ValueError(f"its pickle uses object {argument}, which it does not have")
            stack.append(memo[argument])
            memo[argument].shared = True
            repeated += memo[argument].parts
            if repeated > MOST_REPEATED * len(program):
                raise ValueError(
                    f"its pickle of {len(program)} bytes repeats what it holds over {MOST_REPEATED} times"
                )
        elif opcode.stack_after:
            operands = _operands(stack, opcode)
            size = operands.pop(0) if name in _CHANGES else _Size(1 + _length(argument))
            if name in _CHANGES and size.shared:
                raise ValueError("its pickle changes an object after it has used it")
            size.take(operands)
            stack.append(size)


def _opcodes(program: bytes) -> Iterator[tuple[pickletools.OpcodeInfo, Any]]:
    for opcode, argument, _ in pickletools.genops(program):
        if opcode.name not in _USED:
            raise ValueError(f"its pickle uses {opcode.name}, which torch does not write")
        yield opcode, argument


def _operands(stack: list[_Size | None], opcode: pickletools.OpcodeInfo) -> list[_Size]:
    """Takes off the stack what an opcode takes; what lies below a mark comes first."""
    before = opcode.stack_before
    items: list[_Size] = []
    if pickletools.markobject in before:
        while stack and stack[-1] is not None:
            items.append(_pop(stack))
        if not stack:
            raise ValueError("its pickle ends a group that it did not begin")
        stack.pop()
        before = before[: before.index(pickletools.markobject)]
    for _ in before:
        items.append(_pop(stack))
    return items[::-1]


def _top(stack: list[_Size | None]) -> _Size:
    if not stack or stack[-1] is None:
        raise ValueError("its pickle takes an operand that is not there")
    return stack[-1]


def _pop(stack: list[_Size | None]) -> _Size:
    top = _top(stack)
    stack.pop()
    return top


def _length(argument: Any) -> int:
    if isinstance(argument, int) and not -(1 << 63) <= argument < 1 << 63:
        raise ValueError("its pickle has an integer of more than 64 bits")
    return len(argument) if isinstance(argument, str) else 0
