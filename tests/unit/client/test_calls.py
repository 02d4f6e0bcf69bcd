"""Calls as they travel, and answers of PCs that write what they like."""

from __future__ import annotations

import base64
import datetime
import decimal
import fractions
import itertools
import json
import math
import os
import pickle
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deskgrid.client.call_runner import NotPlainError, plain
from deskgrid.client.calls import ANSWER, CallFailed, pack_call, read_answer, write_calls
from deskgrid.errors import InvalidInput

SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text()
    | st.binary()
    | st.complex_numbers(allow_nan=False)
)
KEYS = st.none() | st.booleans() | st.integers(-(2**52), 2**52) | st.floats(allow_nan=False) | st.text() | st.binary()
TIMES = st.dates() | st.datetimes() | st.times() | st.timedeltas()
HASHABLE = KEYS | TIMES | st.tuples(KEYS, TIMES) | st.frozensets(KEYS, max_size=3)
VALUES = st.recursive(
    HASHABLE | SCALARS | st.fractions() | st.decimals(allow_nan=False),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(HASHABLE, inner, max_size=4) | st.tuples(inner),
    max_leaves=12,
)


def answer(folder: Path, content: bytes | Any) -> Path:
    file = folder / "answer"
    file.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    return file


@given(value=VALUES)
def test_plain_values_come_back_as_they_were(value: Any, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.getbasetemp()
    found = read_answer(answer(folder, {"value": plain(value)}), trusted=False)
    assert found == value and type(found) is type(value)


def test_special_numbers_and_long_ones_come_back(tmp_path: Path) -> None:
    values = [math.inf, -math.inf, 10**4500, -(2**63), range(1, 10, 2), bytearray(b"x"), {1, 2}, "\udc80.root"]
    assert read_answer(answer(tmp_path, {"value": plain(values)}), trusted=False) == values
    assert math.isnan(read_answer(answer(tmp_path, {"value": plain(math.nan)}), trusted=False))
    exact = [decimal.Decimal("0.1"), fractions.Fraction(1, 3), datetime.datetime.now(datetime.UTC)]
    assert read_answer(answer(tmp_path, {"value": plain(exact)}), trusted=False) == exact


@pytest.mark.parametrize(
    "array", [numpy.arange(6.0).reshape(2, 3), numpy.asfortranarray(numpy.ones((2, 3), "i2")), numpy.float32(1.5)]
)
def test_arrays_of_numpy_come_back(array: Any, tmp_path: Path) -> None:
    found = read_answer(answer(tmp_path, {"value": plain(array)}), trusted=False)
    assert found.dtype == array.dtype and (found == array).all()


@pytest.mark.parametrize(
    "value",
    [
        numpy.array([object()]),
        numpy.ma.masked_array([1, 2], mask=[True, False]),
        {1j: 1},
        {2**61 - 1},
        {fractions.Fraction(1, 3): 1},
        {(1, 2**70): 1},
        object(),
        type("Text", (str,), {})("x"),
    ],
)
def test_what_would_not_come_back_the_same_is_not_plain(value: Any) -> None:
    with pytest.raises(NotPlainError):
        plain(value)


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch /tmp/deskgrid-was-here",)


ZEROS = base64.b64encode(
    b"\x93NUMPY\x01\x00v\x00{'descr': '|O', 'fortran_order': False, 'shape': (1,), }".ljust(128) + b"\0" * 8
).decode()
HUGE = base64.b64encode(
    b"\x93NUMPY\x01\x00v\x00{'descr': '<f8', 'fortran_order': False, 'shape': (1000000000000,), }".ljust(128)
).decode()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"nonsense",
        pickle.dumps(("value", Evil())),
        b"[" * 100_000,
        {"value": [1]},
        {"value": {"list": 3}},
        {"value": {"os.system": "true"}},
        {"value": {"list": [], "tuple": []}},
        {"value": {"int": "9" * 1_000_000}},
        {"value": {"bytes": "!"}},
        {"value": {"dict": [[{"list": []}, 1]]}},
        {"value": {"range": [0, 1, 0]}},
        {"value": {"date": "yesterday"}},
        {"value": {"set": [{"tuple": list(key)} for key in itertools.product((-1, -2), repeat=11)]}},
        {"value": {"dict": [[{"tuple": list(key)}, 1] for key in itertools.product((-1, -2), repeat=11)]}},
        b'{"value": {"list": [' + b",".join([b"0"] * 4_000_001) + b"]}}",
        {"value": {"Fraction": "1e999999999"}},
        {"value": {"set": [{"int": hex(number * (2**61 - 1))} for number in range(1, 4)]}},
        {"value": {"dict": [[{"complex": [0, 1]}, 1]]}},
        {"value": {"ndarray": ZEROS}},
        {"value": {"ndarray": HUGE}},
        {"value": {"ndarray": "AAAA"}},
        {"error": {}},
        {"error": {"module": "builtins", "name": "SystemExit", "arguments": [0], "text": ""}},
        {"error": {"module": "os", "name": "system", "arguments": ["true"], "text": ""}},
        {"error": {"module": "builtins", "name": "exec", "arguments": ["1"], "text": ""}},
        {"neither": 1},
    ],
)
def test_answer_that_is_none_is_a_failed_call_and_runs_nothing(content: bytes | Any, tmp_path: Path) -> None:
    with pytest.raises(CallFailed):
        read_answer(answer(tmp_path, content), trusted=False)
    assert not Path("/tmp/deskgrid-was-here").exists()


def test_what_a_pc_says_of_an_error_does_nothing_to_a_terminal(tmp_path: Path) -> None:
    text = "Traceback\n\x1b]0;title\x07\x1b[2J"
    told = {"module": "lab\x1b[2J", "name": "Odd", "arguments": ["\x1b[2J"], "text": text}
    with pytest.raises(CallFailed) as caught:
        read_answer(answer(tmp_path, {"error": told}), trusted=False)
    assert "\x1b" not in str(caught.value) + caught.value.__notes__[0] and "Traceback\n" in caught.value.__notes__[0]


def test_answer_too_deep_is_refused(tmp_path: Path) -> None:
    value: Any = 1
    for _ in range(200):
        value = [value]
    with pytest.raises(CallFailed):
        read_answer(answer(tmp_path, {"value": plain(value)}), trusted=False)


def run(folder: Path, function: Any, *arguments: Any, trusted: bool = False) -> Any:
    context, scratch = folder / "context", folder / "scratch"
    context.mkdir()
    scratch.mkdir()
    write_calls(context, [pack_call(function, arguments, {})], trusted=trusted)
    subprocess.run([sys.executable, "-I", str(context / "run.py"), "0"], cwd=scratch, check=True)
    assert [path.name for path in scratch.iterdir()] == [ANSWER]
    return read_answer(scratch / ANSWER, trusted=trusted)


def double(number: int) -> int:
    return 2 * number


class Odd(Exception):
    pass


def odd() -> None:
    raise Odd("seven", 7)


class Unspeakable:
    def __repr__(self) -> str:
        raise ValueError("no words")


def stop() -> None:
    raise StopIteration(1)


def unspeakable() -> None:
    raise ValueError(Unspeakable())


@pytest.mark.parametrize(("function", "kind"), [(stop, StopIteration), (unspeakable, ValueError)])
def test_odd_exceptions_come_back(function: Any, kind: type[Exception], tmp_path: Path) -> None:
    with pytest.raises(kind):
        run(tmp_path, function)


def test_function_of_a_module_of_the_users_own_goes_with_the_call(tmp_path: Path) -> None:
    assert run(tmp_path, double, 21) == 42


@pytest.mark.parametrize("trusted", [False, True])
def test_what_is_raised_comes_with_its_traceback(trusted: bool, tmp_path: Path) -> None:
    with pytest.raises(Exception, match="seven") as caught:
        run(tmp_path, odd, trusted=trusted)
    assert (type(caught.value).__name__ == "Odd") is trusted
    assert isinstance(caught.value, CallFailed) is not trusted
    assert "in odd" in caught.value.__notes__[0]


def test_what_is_not_plain_comes_only_from_pcs_that_are_trusted(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    with pytest.raises(CallFailed, match="trust"):
        run(tmp_path / "a", Odd, "x")
    assert type(run(tmp_path / "b", Odd, "x", trusted=True)).__name__ == "Odd"


def test_what_cannot_be_packed_is_told() -> None:
    with pytest.raises(InvalidInput, match="cannot be packed"):
        pack_call(double, [socket.socket()], {})
