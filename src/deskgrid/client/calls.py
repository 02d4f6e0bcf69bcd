"""Calls of Python functions as jobs: how they travel, and how their answers are read.

    context/run.py            call_runner.py
    context/cloudpickle/      of this PC, so that both ends have the same
    context/functions/HASH    each function once
    context/calls/N           the Python it was packed by, then a pickle of (HASH, arguments, keywords)
    context/whole             if the answer may be a pickle
    scratch/answer            see call_runner.py

To read a pickle is to run what it says, and an answer is written by a PC that its owner can make write anything. So answers are JSON: plain values,
containers, dates, and numpy's arrays as numpy.save writes them. Only PCs whose owners the user trusts send pickles.
"""

from __future__ import annotations

import base64
import builtins
import collections
import contextlib
import datetime
import decimal
import fractions
import functools
import hashlib
import io
import math
import pickle
import shutil
import sys
import sysconfig
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

import msgspec

from deskgrid.archive import printable
from deskgrid.client import call_runner
from deskgrid.client.call_runner import checked_key
from deskgrid.errors import DeskgridError, InvalidInput, OperatorError
from deskgrid.units import format_size

__all__ = ["ANSWER", "CallFailed", "Packed", "of_module", "pack_call", "read_answer", "write_calls"]

ANSWER = call_runner.ANSWER
F = TypeVar("F", bound=Callable[..., Any])
_MOST_ANSWER_BYTES = 1 << 28
_MOST_PARTS = 4_000_000
"""Of an answer: each takes some thirty times its bytes in memory."""
_MOST_ALIKE = 1000
"""Keys of one hash: some there are of honest ones, for -1 and -2 have the same."""
_MOST_DIGITS = 4000
_DEEPEST = 100


class CallFailed(DeskgridError):
    """A call did not return: its job failed, or its function raised what cannot be raised here."""


class Packed:
    """A call on its way: the function's bytes and the arguments'."""

    __slots__ = ("arguments", "function")

    def __init__(self, function: bytes, arguments: bytes) -> None:
        self.function, self.arguments = function, arguments


# ---- calls


def pack_call(
    function: Callable[..., Any], arguments: Sequence[Any], keywords: Mapping[str, Any], modules: Sequence[ModuleType] = ()
) -> Packed:
    """Pack a call. What stands in `modules`, or in the function's own module, goes with it; unless that is installed, as a library is.

    Raise InvalidInput if something of it cannot be packed, OperatorError without cloudpickle.
    """
    try:
        import cloudpickle
    except ImportError as error:
        raise OperatorError("functions as jobs need cloudpickle", hint="pip install 'deskgrid[executor]'") from error
    own = _module_of(function)
    going = {one for one in (*modules, own) if one is not None and (one in modules or _is_users(one))}
    with _PACKING, contextlib.ExitStack() as stack:
        for module in going:
            if module.__name__ not in cloudpickle.list_registry_pickle_by_value():
                cloudpickle.register_pickle_by_value(module)
                stack.callback(cloudpickle.unregister_pickle_by_value, module)
        try:
            text = cloudpickle.dumps(function)
            name = hashlib.sha256(text).hexdigest()
            return Packed(text, cloudpickle.dumps((name, tuple(arguments), dict(keywords))))
        except Exception as error:
            raise InvalidInput(f"this call cannot be packed: {error}") from error


_PACKING = threading.Lock()
"""What goes by value is a setting of cloudpickle's for all threads."""


def of_module(wrapper: F, function: Callable[..., Any]) -> F:
    """Return a wrapper that is packed as if it stood where a function stands that it calls."""
    module = _module_of(function)
    if module is not None:
        wrapper.__module__ = module.__name__
    return wrapper


def _module_of(function: Callable[..., Any]) -> ModuleType | None:
    while isinstance(function, functools.partial):
        function = function.func
    return sys.modules.get(getattr(function, "__module__", None) or "")


def _is_users(module: ModuleType) -> bool:
    """Tell whether a module is the user's own, and no library that is installed: that one the PC has, or does not."""
    file = getattr(module, "__file__", None)
    if file is None or {"site-packages", "dist-packages"} & set(Path(file).parts):
        return False
    return not any(Path(file).is_relative_to(sysconfig.get_path(name)) for name in ("stdlib", "platstdlib"))


def write_calls(folder: Path, calls: Sequence[Packed], *, trusted: bool) -> None:
    """Write the context of an array whose jobs make these calls."""
    import cloudpickle

    version = f"{sys.version_info[0]}.{sys.version_info[1]}\n".encode()
    shutil.copy(call_runner.__file__, folder / "run.py")
    shutil.copytree(Path(cloudpickle.__file__).parent, folder / "cloudpickle", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("functions", "calls"):
        (folder / name).mkdir()
    if trusted:
        (folder / call_runner.WHOLE).touch()
    for function in {call.function for call in calls}:
        (folder / "functions" / hashlib.sha256(function).hexdigest()).write_bytes(function)
    for number, call in enumerate(calls):
        (folder / "calls" / str(number)).write_bytes(version + call.arguments)


# ---- answers


def read_answer(file: Path, *, trusted: bool) -> Any:
    """Return what a call returned, or raise what it raised.

    `trusted`: the answer is a pickle. Otherwise raise CallFailed for what is not plain, and for exceptions that are not Python's own.
    """
    if file.stat().st_size > _MOST_ANSWER_BYTES:
        raise CallFailed(
            "its answer is too large", hint=f"at most {format_size(_MOST_ANSWER_BYTES)}; put more where you can fetch it"
        )
    data = file.read_bytes()
    return _read_whole(data) if trusted else _read_plain(data)


def _read_whole(data: bytes) -> Any:
    try:
        what, *rest = pickle.loads(data)  # noqa: S301 - of a PC that the user trusts
    except Exception as error:
        raise CallFailed(f"its answer cannot be read: {type(error).__name__}: {error}") from error
    if what == "value":
        return rest[0]
    told, raised = rest
    if isinstance(raised, Exception):
        raised.add_note(f"In the job:\n{told['text'][-20_000:]}")
        raise raised
    raise _error(told)


def _read_plain(data: bytes) -> Any:
    if sum(data.count(mark) for mark in (b"[", b"{", b",")) > _MOST_PARTS:
        raise CallFailed("its answer has too many parts", hint=f"at most {_MOST_PARTS:,}; return an array of numpy's, or bytes")
    try:
        answer = msgspec.json.decode(data, type=dict[str, Any])
        if "value" in answer:
            return _value(answer["value"], _DEEPEST)
        error = _error(answer["error"])
    except CallFailed:
        raise
    except Exception as wrong:  # whatever the PC made of it
        raise CallFailed(f"its answer cannot be read: {type(wrong).__name__}") from wrong
    raise error


def _error(told: Any) -> Exception:
    """Return what a function raised, with where it raised it."""
    module, name = (printable(str(told[part])[:100]) for part in ("module", "name"))
    text = "\n".join(map(printable, str(told["text"])[-20_000:].splitlines()))
    arguments = [_value(one, _DEEPEST) for one in told["arguments"]]
    found: Exception | None = None
    kind = getattr(builtins, name, None) if module == "builtins" else None
    if isinstance(kind, type) and issubclass(kind, Exception):
        with contextlib.suppress(Exception):
            found = kind(*arguments)
    if name == "NotPlainError":
        found = CallFailed(
            f"its answer holds {printable(str(arguments[0])[:200]) if arguments else 'something'}, and to read that could run code of the PC's owner here",
            hint="return plain values and arrays, or name whose PCs you trust: trust=['mine']",
        )
    if found is None:
        found = CallFailed(f"{module}.{name}: {printable(', '.join(map(str, arguments))[:2000])}")
    found.add_note(f"In the job:\n{text}")
    return found


def _value(told: Any, depth: int) -> Any:
    """Return the value that `call_runner.plain` told so. Raise ValueError, TypeError, KeyError for what is none."""
    if not isinstance(told, dict):
        if isinstance(told, list):
            raise TypeError("a list says what it is")
        return told
    if depth <= 0:
        raise ValueError("too deep")
    [(kind, inside)] = told.items()
    return _READERS[kind](inside, depth - 1)


def _values(inside: Any, depth: int) -> list[Any]:
    return [_value(one, depth) for one in inside]


def _keys(inside: Any, depth: int) -> list[Any]:
    """Return values that may be keys. Many tuples of one hash can be made, and looking each up takes as long as there are others."""
    found = [checked_key(one) for one in _values(inside, depth)]
    alike = collections.Counter(hash(one) for one in found if isinstance(one, (tuple, frozenset)))
    if max(alike.values(), default=0) > _MOST_ALIKE:
        raise ValueError("too many keys of one hash")
    return found


def _dict(inside: Any, depth: int) -> dict[Any, Any]:
    keys = _keys([key for key, _ in inside], depth)
    return dict(zip(keys, (_value(one, depth) for _, one in inside), strict=True))


def _bytes(inside: Any, _depth: int) -> bytes:
    return base64.b64decode(inside, validate=True)


def _of_text(read: Callable[[str], Any]) -> Callable[[Any, int], Any]:
    def short(inside: Any, _depth: int) -> Any:
        if not isinstance(inside, str) or len(inside) > _MOST_DIGITS:
            raise ValueError("too long")
        return read(inside)

    return short


def _array(inside: Any, _depth: int) -> Any:
    """Read what numpy.save wrote: the header, and as many bytes as it says."""
    from numpy import frombuffer
    from numpy.lib import format as npy

    file = io.BytesIO(base64.b64decode(inside, validate=True))
    read_header = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}[npy.read_magic(file)]
    shape, is_fortran, dtype = read_header(file, max_header_size=10_000)
    data = file.read()
    if dtype.hasobject or math.prod(shape) * dtype.itemsize != len(data):
        raise ValueError("the header does not fit the bytes")
    array = frombuffer(bytearray(data), dtype).reshape(shape[::-1] if is_fortran else shape)
    return array.T if is_fortran else array


_READERS: dict[str, Callable[[Any, int], Any]] = {
    "str": lambda inside, depth: _bytes(inside, depth).decode("utf-8", "surrogatepass"),
    "int": _of_text(lambda text: int(text, 16)),
    "float": _of_text(float),
    "list": _values,
    "tuple": lambda inside, depth: tuple(_values(inside, depth)),
    "set": lambda inside, depth: set(_keys(inside, depth)),
    "frozenset": lambda inside, depth: frozenset(_keys(inside, depth)),
    "dict": _dict,
    "bytes": _bytes,
    "bytearray": lambda inside, depth: bytearray(_bytes(inside, depth)),
    "complex": lambda inside, depth: complex(*(float(one) for one in _values(inside, depth))),
    "range": lambda inside, depth: range(*(int(one) for one in _values(inside, depth))),
    "datetime": _of_text(datetime.datetime.fromisoformat),
    "date": _of_text(datetime.date.fromisoformat),
    "time": _of_text(datetime.time.fromisoformat),
    "timedelta": lambda inside, _depth: datetime.timedelta(*(int(one) for one in inside)),
    "Decimal": _of_text(decimal.Decimal),
    "Fraction": lambda inside, depth: fractions.Fraction(*(int(one) for one in _values(inside, depth))),
    "ndarray": _array,
    "scalar": lambda inside, depth: _array(inside, depth)[()],
}
