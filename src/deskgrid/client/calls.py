"""Calls of Python functions as jobs: how they travel, and how their answers are read.

    context/run.py            call_runner.py
    context/cloudpickle/      of this PC, so that both ends have the same
    context/functions/HASH    each function once
    context/calls/N           the Python it was packed by, then a pickle of (HASH, arguments, keywords)
    scratch/answer.pickle     see call_runner.py

To read a pickle is to run what it says, and an answer is written by a PC that its owner can make write anything. So an answer is read with a list of
what may be in it: plain values, containers, dates and numpy's arrays. Only of PCs whose owners the user trusts it is read whole.
"""

from __future__ import annotations

import builtins
import contextlib
import functools
import hashlib
import io
import pickle
import shutil
import sys
import sysconfig
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

from deskgrid.client import call_runner
from deskgrid.errors import DeskgridError, InvalidInput, OperatorError

__all__ = ["ANSWER", "CallFailed", "Packed", "of_module", "pack_call", "read_answer", "write_calls"]

ANSWER = call_runner.ANSWER
F = TypeVar("F", bound=Callable[..., Any])
_MOST_ANSWER_BYTES = 1 << 30
_ALLOWED = {
    "builtins": {"bytearray", "complex", "frozenset", "range", "set", "slice"},
    "collections": {"OrderedDict", "deque", "Counter"},
    "datetime": {"date", "datetime", "time", "timedelta", "timezone"},
    "decimal": {"Decimal"},
    "fractions": {"Fraction"},
    "numpy": {"dtype", "ndarray"},
    "numpy._core.multiarray": {"_reconstruct", "scalar"},
    "numpy.core.multiarray": {"_reconstruct", "scalar"},
    "numpy._core.numeric": {"_frombuffer"},
    "numpy.core.numeric": {"_frombuffer"},
}


class CallFailed(DeskgridError):
    """A call did not return: its job failed, or its function raised what cannot be raised here."""


class Packed:
    """A call on its way: the function's bytes and the arguments'."""

    __slots__ = ("arguments", "function")

    def __init__(self, function: bytes, arguments: bytes) -> None:
        self.function, self.arguments = function, arguments


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


_PACKING = threading.Lock()
"""What goes by value is a setting of cloudpickle's for all threads."""


def _is_users(module: ModuleType) -> bool:
    """Tell whether a module is the user's own, and no library that is installed: that one the PC has, or does not."""
    file = getattr(module, "__file__", None)
    libraries = {sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")}
    return file is not None and not any(library and Path(file).is_relative_to(library) for library in libraries)


def write_calls(folder: Path, calls: Sequence[Packed]) -> None:
    """Write the context of an array whose jobs make these calls."""
    import cloudpickle

    version = f"{sys.version_info[0]}.{sys.version_info[1]}\n".encode()
    shutil.copy(call_runner.__file__, folder / "run.py")
    shutil.copytree(Path(cloudpickle.__file__).parent, folder / "cloudpickle", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("functions", "calls"):
        (folder / name).mkdir()
    for function in {call.function for call in calls}:
        (folder / "functions" / hashlib.sha256(function).hexdigest()).write_bytes(function)
    for number, call in enumerate(calls):
        (folder / "calls" / str(number)).write_bytes(version + call.arguments)


def read_answer(file: Path, *, trusted: bool) -> Any:
    """Return what a call returned, or raise what it raised.

    `trusted`: the answer may run code here. Otherwise raise CallFailed for what is not plain, and for exceptions that are not Python's own.
    """
    if file.stat().st_size > _MOST_ANSWER_BYTES:
        raise CallFailed("its answer is too large", hint="let it leave a file, and fetch the job's results")
    with file.open("rb") as source:
        answer = _load(source, trusted=trusted)
    if isinstance(answer, tuple) and len(answer) == 2 and answer[0] == "value":
        return answer[1]
    if isinstance(answer, tuple) and len(answer) == 6 and answer[0] == "error":
        raise _error(*answer[1:], trusted=trusted)
    raise CallFailed("what came is no answer")


def _load(source: Any, *, trusted: bool) -> Any:
    try:
        return (pickle.Unpickler if trusted else _Plain)(source).load()
    except CallFailed:
        raise
    except Exception as error:
        raise CallFailed(f"its answer cannot be read: {type(error).__name__}: {error}") from error


class _Plain(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name in _ALLOWED.get(module, ()):
            return super().find_class(module, name)
        raise CallFailed(
            f"its answer holds {module[:80]}.{name[:80]}, and to read that could run code of the owner of the PC here",
            hint="return plain values and arrays, or name whose PCs you trust: trust=['mine']",
        )


def _error(module: Any, name: Any, arguments: Any, text: Any, whole: Any, *, trusted: bool) -> BaseException:
    """Return what a function raised, with where it raised it."""
    found: BaseException | None = None
    if trusted and isinstance(whole, bytes) and whole:
        loaded = _load(io.BytesIO(whole), trusted=True)
        found = loaded if isinstance(loaded, Exception) else None
    kind = getattr(builtins, str(name), None) if module == "builtins" else None
    if found is None and isinstance(kind, type) and issubclass(kind, Exception) and isinstance(arguments, tuple):
        try:
            found = kind(*arguments)
        except Exception:
            found = None
    if found is None:
        found = CallFailed(
            f"{str(module)[:100]}.{str(name)[:100]}: {', '.join(map(str, arguments)) if isinstance(arguments, tuple) else ''}"
        )
    found.add_note(f"In the job:\n{str(text)[-20_000:]}")
    return found
