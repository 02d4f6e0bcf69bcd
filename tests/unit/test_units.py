"""Sizes and durations as people write them."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deskgrid.errors import InvalidInput
from deskgrid.units import format_duration, format_size, parse_duration, parse_size


@pytest.mark.parametrize(("text", "size"), [("8GiB", 8 << 30), ("1.5 GB", 1_500_000_000), ("0B", 0), ("12kB", 12_000)])
def test_sizes(text: str, size: int):
    assert parse_size(text) == size


@pytest.mark.parametrize(("text", "seconds"), [("10m", 600), ("1h30m", 5400), ("0.5s", 0.5), ("2d", 172800)])
def test_durations(text: str, seconds: float):
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "8", "8 gib", "-1GiB", "1e9B", "9" * 400 + "TiB", "nanGiB", "8GiBx"])
def test_what_is_no_size_is_refused(text: str):
    with pytest.raises(InvalidInput):
        parse_size(text)


@given(st.text())
def test_any_text_is_a_value_or_refused(text: str):
    for parse in (parse_size, parse_duration):
        with contextlib.suppress(InvalidInput):
            assert parse(text) >= 0


@given(st.integers(0, 1 << 62))
def test_sizes_are_shown_short(size: int):
    assert len(format_size(size)) <= 11
    assert format_duration(size % 10**8)
