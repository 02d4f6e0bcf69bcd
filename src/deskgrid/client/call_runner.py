"""What runs in a job for calls.py: one call, read from the context, with its answer left in scratch. Nothing but the standard library and the
cloudpickle that stands beside it."""

from __future__ import annotations

import base64
import datetime
import decimal
import fractions
import hashlib
import json
import math
import pickle
import sys
import traceback
from pathlib import Path
from typing import Any

ANSWER = "answer"
WHOLE = "whole"
"""A file of the context: the answer is to be a pickle, for somebody who trusts this PC."""
_LONG = 1 << 53
_KEYS = (type(None), bool, str, bytes, float, datetime.datetime, datetime.date, datetime.time, datetime.timedelta)


def main(folder: Path, number: str) -> None:
    """Make a call and leave its answer: JSON as `plain` writes it or, if it is to be whole, a pickle."""
    sys.path.insert(0, str(folder))
    is_whole = (folder / WHOLE).exists()
    try:
        value = _called(folder, number)
        answer = _dumps(("value", value)) if is_whole else _json({"value": plain(value)})
    except BaseException as error:
        answer = _whole_error(error) if is_whole else _json({"error": _told(error)})
    unfinished = Path(f"{ANSWER}.new")
    unfinished.write_bytes(answer)
    unfinished.replace(ANSWER)


def _called(folder: Path, number: str) -> Any:
    wanted, _, call = (folder / "calls" / number).read_bytes().partition(b"\n")
    own = f"{sys.version_info[0]}.{sys.version_info[1]}"
    if wanted.decode() != own:
        raise RuntimeError(
            f"the call was packed by Python {wanted.decode()} and this PC has {own}: need a package that says which it has"
        )
    function, arguments, keywords = pickle.loads(call)  # noqa: S301 - the user's own
    text = (folder / "functions" / function).read_bytes()
    if hashlib.sha256(text).hexdigest() != function:
        raise RuntimeError("the function did not come as it was packed")
    return pickle.loads(text)(*arguments, **keywords)  # noqa: S301


class NotPlainError(TypeError):
    """A value that cannot be told without running code where it is read."""


def plain(value: Any) -> Any:
    """Return a value as JSON has it: scalars as they are, all else as an object with one member that says what it is. Raise NotPlainError."""
    kind = type(value)
    if value is None or kind is bool:
        return value
    if kind is str:
        return value if _is_utf8(value) else {"str": _base64(value.encode("utf-8", "surrogatepass"))}
    if kind is int:
        return value if -_LONG < value < _LONG else {"int": hex(value)}
    if kind is float:
        return value if math.isfinite(value) else {"float": repr(value)}
    if kind in (list, tuple):
        return {kind.__name__: [plain(one) for one in value]}
    if kind in (set, frozenset):
        return {kind.__name__: [plain(checked_key(one)) for one in value]}
    if kind is dict:
        return {"dict": [[plain(checked_key(key)), plain(one)] for key, one in value.items()]}
    if kind in (bytes, bytearray):
        return {kind.__name__: _base64(value)}
    if kind is complex:
        return {"complex": [plain(value.real), plain(value.imag)]}
    if kind is range:
        return {"range": [plain(value.start), plain(value.stop), plain(value.step)]}
    if kind in (datetime.datetime, datetime.date, datetime.time):
        return {kind.__name__: value.isoformat()}
    if kind is datetime.timedelta:
        return {"timedelta": [value.days, value.seconds, value.microseconds]}
    if kind is decimal.Decimal:
        return {"Decimal": str(value)}
    if kind is fractions.Fraction:
        return {"Fraction": [plain(value.numerator), plain(value.denominator)]}
    return _array(value)


def checked_key(value: Any) -> Any:
    """Return a value if it may be a key: not one of those of which a great many with the same hash are easily made. Raise NotPlainError."""
    if type(value) in (tuple, frozenset):
        for one in value:
            checked_key(one)
    elif not (type(value) in _KEYS or (type(value) is int and -_LONG < value < _LONG)):
        raise NotPlainError(f"a key of the type {type(value).__qualname__}")
    return value


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:  # as a file's name may be
        return False
    return True


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def _array(value: Any) -> Any:
    """Return numpy's arrays and scalars, as numpy.save writes them."""
    numpy = sys.modules.get("numpy")
    if numpy is None or not (type(value) is numpy.ndarray or isinstance(value, numpy.generic)) or value.dtype.hasobject:
        # Not what only looks like an array: the mask of a masked one, or a unit, would be lost.
        raise NotPlainError(f"{type(value).__module__}.{type(value).__qualname__}")
    import io

    file = io.BytesIO()
    numpy.save(file, numpy.asarray(value), allow_pickle=False)
    return {"ndarray" if isinstance(value, numpy.ndarray) else "scalar": _base64(file.getvalue())}


def _told(error: BaseException) -> dict[str, Any]:
    try:
        arguments = [plain(one if type(one) in (int, float, str, bool, type(None)) else repr(one)) for one in error.args]
    except Exception:  # a repr that raises
        arguments = []
    text = "".join(traceback.format_exception(error))
    return {
        "module": type(error).__module__,
        "name": type(error).__qualname__,
        "arguments": arguments,
        "text": text,
    }


def _whole_error(error: BaseException) -> bytes:
    told = _told(error)
    try:
        return _dumps(("error", told, error))
    except Exception:
        return _dumps(("error", told, None))


def _json(value: Any) -> bytes:
    return json.dumps(value).encode()


def _dumps(value: Any) -> bytes:
    import cloudpickle

    packed: bytes = cloudpickle.dumps(value)
    return packed


if __name__ == "__main__":
    main(Path(__file__).parent, sys.argv[1])
