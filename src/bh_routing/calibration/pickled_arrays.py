"""Arrays out of a pickle, without unpickling it: an interpreter that knows a dict of numpy arrays and nothing else.

Python's own unpickler runs what a file asks for. Even one that admits numpy's names alone can be made to read freed
memory, to follow a pointer from the file, or to take terabytes. Here nothing of numpy is called for what the file
says: opcodes are read by `pickletools`, a dtype and an array are records of ours, and at the end each array is
copied from the bytes that stand in the file. Protocols 0 to 5, the layouts of numpy 1 and 2.
"""

from __future__ import annotations

import io
import math
import os
import pickletools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import CalibrationFileError

LARGEST = 64 << 20  # bytes of a file; the original work's have 32 kB

_CORE = ("numpy.core.multiarray", "numpy._core.multiarray")
_NUMERIC = ("numpy.core.numeric", "numpy._core.numeric")
_NUMBERS = frozenset(["f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8"])


class _Refused(Exception):
    """The file asks for something else than arrays; the argument says for what."""


class _Damaged(Exception):
    """The file is not what a pickled dict of arrays looks like."""


class _Name(str):
    """A name that the file refers to, one of `_CALLS` or a class that is only an argument."""


class _Dtype:
    def __init__(self, code: str) -> None:
        self.code, self.order = code, "<"


class _Array:
    """What an array was made of: dtype, shape, order and bytes; an array once all of it is known."""

    def __init__(self) -> None:
        self.value: np.ndarray | None = None

    def fill(self, data: Any, dtype: Any, shape: Any, fortran: bool) -> None:
        if not (
            isinstance(data, (bytes, bytearray)) and isinstance(dtype, _Dtype) and isinstance(shape, tuple)
        ):
            raise _Damaged("an array that is not made of a dtype, a shape and bytes")
        if dtype.code not in _NUMBERS:
            raise _Damaged("an array of something else than numbers")
        if not all(type(n) is int and 0 <= n <= LARGEST for n in shape) or len(shape) > 8:
            raise _Damaged("an array of no possible shape")
        held = np.frombuffer(data, dtype=dtype.order + dtype.code) if data else np.zeros(0, dtype=dtype.code)
        if math.prod(shape) != held.size:
            raise _Damaged(f"an array of {held.size} numbers where its shape says {math.prod(shape)}")
        self.value = held.reshape(shape, order="F" if fortran else "C").astype(dtype.code)


def _dtype(code: Any, *_: Any) -> _Dtype:
    if not isinstance(code, str):
        raise _Damaged("a dtype without a code")
    made = _Dtype(code.lstrip("<>|="))
    made.order = ">" if code.startswith(">") else "<"
    return made


def _reconstruct(*_: Any) -> _Array:
    return _Array()


def _frombuffer(data: Any, dtype: Any, shape: Any, order: Any) -> _Array:
    made = _Array()
    made.fill(data, dtype, shape, order == "F")
    return made


def _scalar(dtype: Any, data: Any) -> float:
    made = _Array()
    made.fill(data, dtype, (1,), False)
    assert made.value is not None
    return float(made.value[0])


def _encode(text: Any, codec: Any) -> bytes:  # how protocols 0 to 2 write bytes
    if not isinstance(text, str) or codec != "latin1":
        raise _Damaged("bytes in another encoding than latin1")
    return text.encode("latin1")


def _no_bytes() -> bytes:  # how protocols 0 to 2 write bytes of length 0
    return b""


_CALLS: dict[str, Callable[..., Any] | None] = {
    "numpy.dtype": _dtype,
    "numpy.ndarray": None,
    "_codecs.encode": _encode,
    "__builtin__.bytes": _no_bytes,
    **{f"{module}._reconstruct": _reconstruct for module in _CORE},
    **{f"{module}.scalar": _scalar for module in _CORE},
    **{f"{module}._frombuffer": _frombuffer for module in _NUMERIC},
}


def _name(module: Any, name: Any) -> _Name:
    full = f"{module}.{name}"
    if full not in _CALLS:
        raise _Refused(f"it asks for {full[:100]}")
    return _Name(full)


def _state(target: Any, state: Any) -> None:
    """``__setstate__`` of an array or a dtype, as numpy writes it."""
    if not isinstance(state, tuple):
        raise _Damaged("a state that numpy does not write")
    if isinstance(target, _Array) and len(state) == 5:
        _, shape, dtype, fortran, data = state
        target.fill(data, dtype, shape, bool(fortran))
    elif isinstance(target, _Dtype) and len(state) >= 2 and state[1] in ("<", ">", "|", "="):
        target.order = ">" if state[1] == ">" else "<"
    else:
        raise _Damaged("a state that numpy does not write")


class _Machine:
    """The stack and the memo. Each method is one opcode, by its name in `pickletools`."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}
        self.encoded = 0  # bytes made by `_encode`: a file could ask for the same ones again and again

    def since_mark(self) -> list[Any]:
        mark = self.marks.pop()
        items, self.stack[mark:] = self.stack[mark:], []
        return items

    def step(self, opcode: str, argument: Any) -> None:
        stack = self.stack
        if opcode in _CONSTANTS:
            stack.append(_CONSTANTS[opcode])
        elif opcode in _LITERALS:
            stack.append(argument)
        elif opcode == "MARK":
            self.marks.append(len(stack))
        elif opcode in ("EMPTY_DICT", "EMPTY_LIST"):
            stack.append({} if opcode == "EMPTY_DICT" else [])
        elif opcode in ("TUPLE", "LIST"):
            items = self.since_mark()
            stack.append(tuple(items) if opcode == "TUPLE" else items)
        elif opcode in _TUPLES:
            items = [stack.pop() for _ in range(_TUPLES[opcode])]
            stack.append(tuple(reversed(items)))
        elif opcode in ("DICT", "SETITEMS", "SETITEM"):
            items = [stack.pop(-2), stack.pop()] if opcode == "SETITEM" else self.since_mark()
            if opcode == "DICT":
                stack.append({})
            self.set_items(stack[-1], items)
        elif opcode in ("APPEND", "APPENDS"):
            items = [stack.pop()] if opcode == "APPEND" else self.since_mark()
            if not isinstance(stack[-1], list):
                raise _Damaged("an item for something that is no list")
            stack[-1].extend(items)
        elif opcode in ("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"):
            self.memo[len(self.memo) if opcode == "MEMOIZE" else argument] = stack[-1]
        elif opcode in ("GET", "BINGET", "LONG_BINGET"):
            stack.append(self.memo[argument])
        elif opcode == "GLOBAL":
            stack.append(_name(*argument.split(" ", 1)))
        elif opcode == "STACK_GLOBAL":
            stack.append(_name(stack.pop(-2), stack.pop()))
        elif opcode == "REDUCE":
            stack.append(self.call(stack.pop(-2), stack.pop()))
        elif opcode == "BUILD":
            state = stack.pop()
            _state(stack[-1], state)
        elif opcode == "POP":
            stack.pop()
        elif opcode not in ("PROTO", "FRAME"):
            raise _Refused(f"it uses the opcode {opcode}")

    def set_items(self, target: Any, items: list[Any]) -> None:
        if not isinstance(target, dict) or len(items) % 2:
            raise _Damaged("an item for something that is no dict")
        for key, value in zip(items[::2], items[1::2], strict=True):
            if type(key) is not str:
                raise _Damaged("a key that is no string")
            target[key] = value

    def call(self, name: Any, arguments: Any) -> Any:
        function = _CALLS.get(name) if isinstance(name, _Name) else None
        if function is None or not isinstance(arguments, tuple):
            raise _Damaged("a call of something that is no function")
        made = function(*arguments)
        if isinstance(made, bytes):
            self.encoded += len(made)
            if self.encoded > LARGEST:
                raise _Damaged(f"more than {LARGEST} bytes of arrays")
        return made


_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_LITERALS = frozenset([
    "INT", "LONG", "BININT", "BININT1", "BININT2", "LONG1", "LONG4", "FLOAT", "BINFLOAT",
    "STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8",
    "BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8",
])  # fmt: skip


def read_arrays(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """The numpy arrays and numbers of a pickled dict, by its string keys; other values are left out.

    Raises
    ------
    CalibrationFileError
        If the file asks for anything but numpy arrays (which is named), is larger than 64 MiB, is damaged, or holds
        something else.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            content = file.read(LARGEST + 1)
    except OSError as error:
        raise CalibrationFileError(f"{path} cannot be read as a pickled dict of arrays: {error}.") from None
    return arrays_of(content, str(path))


def arrays_of(content: bytes, path: str) -> dict[str, np.ndarray]:
    """`read_arrays` of a file's content; ``path`` is what errors call it."""
    if len(content) > LARGEST:
        raise CalibrationFileError(
            f"{path} was refused: expected at most {LARGEST} bytes, got a larger file."
        )
    machine = _Machine()
    try:
        for opcode, argument, _ in pickletools.genops(io.BytesIO(content)):
            if opcode.name == "STOP":
                break
            machine.step(opcode.name, argument)
        value = machine.stack.pop()
    except _Refused as error:
        raise CalibrationFileError(
            f"{path} was refused: {error}; only numpy arrays are read from pickles."
        ) from None
    except (_Damaged, ValueError, TypeError, IndexError, KeyError, AttributeError) as error:
        known = isinstance(error, (_Damaged, ValueError))
        reason = str(error)[:200] if known else "its opcodes do not fit together"
        raise CalibrationFileError(f"{path} cannot be read as a pickled dict of arrays: {reason}.") from None
    if not isinstance(value, dict):
        raise CalibrationFileError(
            f"{path} must hold a dict with the arrays 'x' and 'cdf', got {type(value).__name__}."
        )
    found = {key: item.value if isinstance(item, _Array) else item for key, item in value.items()}
    return {
        key: np.asarray(item, dtype=None if isinstance(item, np.ndarray) else np.float64)
        for key, item in found.items()
        if isinstance(item, (np.ndarray, float)) or (type(item) is int and abs(item) < 2**53)
    }


__all__ = ["LARGEST", "arrays_of", "read_arrays"]
