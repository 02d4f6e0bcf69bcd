"""The owner's rules: hours of the week, and when a PC may work."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deskgrid.core.owner import LOAD_S, QUIET_S, Presence, Rules, Seen, Span, parse_spans
from deskgrid.errors import InvalidInput

DAY = 24 * 60


def seen(**changes: object) -> Seen:
    return Seen(**{"weekday": 2, "minute": 12 * 60, **changes})


def why(rules: Rules, **changes: object) -> str:
    return Presence(rules).why_not(seen(**changes), now=0.0)


@pytest.mark.parametrize(
    ("text", "inside", "outside"),
    [
        ("mon-fri 18:00-08:00", [(0, 18, 0), (4, 23, 59), (5, 7, 59), (1, 3, 0)], [(0, 7, 0), (0, 17, 59), (5, 8, 0), (6, 20, 0)]),
        ("sat,sun", [(5, 0, 0), (6, 23, 59)], [(4, 23, 59), (0, 0, 0)]),
        ("22:00-07:00", [(3, 22, 0), (3, 6, 59), (0, 0, 0)], [(3, 7, 0), (3, 21, 59)]),
        ("Fri-Mon 9:30-10:00", [(4, 9, 30), (0, 9, 59), (6, 9, 45)], [(1, 9, 45), (4, 10, 0), (4, 9, 29)]),
        ("wed 00:00-24:00", [(2, 0, 0), (2, 23, 59)], [(1, 12, 0), (3, 0, 0)]),
        ("sun 20:00-02:00", [(6, 20, 0), (0, 1, 59)], [(0, 2, 0), (5, 20, 0)]),
    ],
)
def test_hours_are_written_for_people(text: str, inside: list[tuple[int, int, int]], outside: list[tuple[int, int, int]]) -> None:
    [span] = parse_spans([text])
    assert all(span.holds(day, hour * 60 + minute) for day, hour, minute in inside)
    assert not any(span.holds(day, hour * 60 + minute) for day, hour, minute in outside)


@pytest.mark.parametrize(
    "text", ["", "always", "mon-", "8-18", "25:00-26:00", "10:60-11:00", "xyz 10:00-11:00", "mon 10:00", "mon;tue"]
)
def test_hours_that_make_no_sense_are_refused_with_an_example(text: str) -> None:
    with pytest.raises(InvalidInput) as error:
        parse_spans([text])
    assert error.value.hint


@given(
    days=st.frozensets(st.integers(0, 6), min_size=1),
    start=st.integers(0, DAY - 1),
    end=st.integers(0, DAY),
    weekday=st.integers(0, 6),
    minute=st.integers(0, DAY - 1),
)
def test_a_span_and_the_time_between_make_up_the_week(
    days: frozenset[int], start: int, end: int, weekday: int, minute: int
) -> None:
    length = (end - start) % DAY or DAY
    begins = [day * DAY + start for day in days]
    at = weekday * DAY + minute
    wanted = any((at - begin) % (7 * DAY) < length for begin in begins)
    assert Span(days, start, end).holds(weekday, minute) == wanted


def test_without_rules_only_battery_and_full_screen_matter() -> None:
    assert why(Rules()) == ""
    assert why(Rules(), idle_s=0.0, busy_cpus=99.0) == ""
    assert "battery" in why(Rules(), on_battery=True)
    assert "screen" in why(Rules(), full_screen=True)
    assert why(Rules(on_battery=True, full_screen=True), on_battery=True, full_screen=True) == ""


def test_work_only_within_the_hours() -> None:
    rules = Rules(hours=parse_spans(["wed 13:00-14:00", "wed 12:00-12:30"]))
    assert why(rules) == ""
    assert "hours" in why(rules, minute=12 * 60 + 30)
    assert why(rules, minute=13 * 60) == ""


def test_work_only_when_keyboard_and_mouse_rest() -> None:
    rules = Rules(idle_s=300.0)
    assert "keyboard" in why(rules, idle_s=299.0)
    assert why(rules, idle_s=300.0) == ""


def test_what_cannot_be_told_counts_against_working() -> None:
    assert "cannot be told" in why(Rules(idle_s=1.0), idle_s=None)
    assert "cannot be told" in why(Rules(busy_cpus=1.0), busy_cpus=None)


def test_other_programs_must_last_to_stop_work_and_rest_to_let_it_go_on() -> None:
    presence = Presence(Rules(busy_cpus=1.0))
    assert presence.why_not(seen(busy_cpus=2.0), now=0.0) == ""
    assert presence.why_not(seen(busy_cpus=0.5), now=1.0) == ""
    assert presence.why_not(seen(busy_cpus=2.0), now=2.0) == ""
    assert "CPUs" in presence.why_not(seen(busy_cpus=2.0), now=2.0 + LOAD_S)
    assert "CPUs" in presence.why_not(seen(busy_cpus=0.0), now=10.0)
    assert "CPUs" in presence.why_not(seen(busy_cpus=0.0), now=9.0 + QUIET_S)
    assert presence.why_not(seen(busy_cpus=0.0), now=10.0 + QUIET_S) == ""


@given(loads=st.lists(st.tuples(st.floats(0, 4), st.floats(0.1, 10)), max_size=60))
def test_a_pc_that_was_busy_for_long_is_left_alone_until_it_was_quiet_for_long(loads: list[tuple[float, float]]) -> None:
    presence, now = Presence(Rules(busy_cpus=1.0)), 0.0
    history: list[tuple[float, bool]] = []
    allowed = True
    for load, step in loads:
        now += step
        history.append((now, load > 1.0))
        before, allowed = allowed, presence.why_not(seen(busy_cpus=load), now=now) == ""
        run = next(
            (len(history) - 1 - index for index in range(len(history) - 1, -1, -1) if history[index][1] != history[-1][1]),
            len(history),
        )
        lasted = now - history[len(history) - run][0]
        if before and not allowed:
            assert history[-1][1] and lasted >= LOAD_S
        if allowed and not before:
            assert not history[-1][1] and lasted >= QUIET_S
