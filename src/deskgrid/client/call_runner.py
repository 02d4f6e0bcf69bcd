"""What runs in a job for calls.py: one call, read from the context, with its answer left in scratch. Nothing but the standard library and the
cloudpickle that stands beside it."""

from __future__ import annotations

import hashlib
import pickle
import sys
import traceback
from pathlib import Path
from typing import Any

ANSWER = "answer.pickle"
_PLAIN = (int, float, str, bytes, bool, type(None))


def main(folder: Path, number: str) -> None:
    """Make a call and leave its answer: a pickle of ("value", VALUE) or ("error", MODULE, NAME, ARGUMENTS, TRACEBACK, PICKLE)."""
    sys.path.insert(0, str(folder))
    try:
        answer = _dumps(("value", _called(folder, number)))
    except BaseException as error:
        answer = _dumps(_told(error))
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


def _told(error: BaseException) -> tuple[Any, ...]:
    arguments = tuple(one if isinstance(one, _PLAIN) else repr(one) for one in error.args)
    text = "".join(traceback.format_exception(error))
    try:
        whole = _dumps(error)
    except Exception:
        whole = b""
    return ("error", type(error).__module__, type(error).__qualname__, arguments, text, whole)


def _dumps(value: Any) -> bytes:
    import cloudpickle

    packed: bytes = cloudpickle.dumps(value)
    return packed


if __name__ == "__main__":
    main(Path(__file__).parent, sys.argv[1])
