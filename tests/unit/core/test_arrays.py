"""Filling in: exactly what is asked for, once."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deskgrid.core.arrays import fill, placeholders, values_of
from deskgrid.errors import InvalidInput

VALUES = values_of(7, {"alpha": "0.1", "name": "{index}"})


@pytest.mark.parametrize(
    ("text", "filled"),
    [
        ("", ""),
        ("plain", "plain"),
        ("{index}", "7"),
        ("run-{index}-{alpha}.txt", "run-7-0.1.txt"),
        ("{name}", "{index}"),
        ("{{index}}", "{index}"),
        ("{{{index}}}", "{7}"),
        ("a}}b{{c", "a}b{c"),
    ],
)
def test_placeholders_are_filled_in_once(text: str, filled: str):
    assert fill(text, VALUES) == filled


@pytest.mark.parametrize("text", ["{beta}", "{", "}", "a {b", "{}", "{ index }", "{index", "{{}"])
def test_what_cannot_be_filled_in_is_an_error(text: str):
    with pytest.raises(InvalidInput):
        fill(text, VALUES)


@given(st.text())
def test_any_text_is_itself_once_its_braces_are_doubled(text: str):
    assert fill(text.replace("{", "{{").replace("}", "}}"), {}) == text


@given(st.dictionaries(st.from_regex(r"[a-z]{1,5}", fullmatch=True), st.text(), max_size=4), st.integers(0))
def test_values_come_out_as_they_are(parameters: dict[str, str], index: int):
    values = values_of(index, parameters)
    text = "|".join(f"{{{name}}}" for name in values)
    assert fill(text, values) == "|".join(values.values())
    assert placeholders(text) == list(values)


@given(st.text(alphabet="{}ab"))
def test_filling_in_ends_in_a_text_or_in_our_error(text: str):
    with contextlib.suppress(InvalidInput):
        assert isinstance(fill(text, {"a": "x"}), str)
