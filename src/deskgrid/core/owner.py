"""When the owner of a PC lets it work: his rules, held against what is seen of the PC. Pure: time and sight are arguments.

Rules:

1. Every rule that is set must allow it; `why_not` names the first that does not, for people.
2. What a rule needs to know and cannot be told counts against working: the owner must never be bothered by a guess.
3. What forbids, forbids at once. Other programs' use of the CPUs must last for LOAD_S first, for every program that starts has its moment, and
   work goes on only when they have been quiet for QUIET_S.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from msgspec import Struct

from deskgrid.errors import InvalidInput

__all__ = ["LOAD_S", "QUIET_S", "Presence", "Rules", "Seen", "Span", "parse_spans"]

LOAD_S = 3.0
QUIET_S = 30.0
_DAYS = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")
_DAY_MINUTES = 24 * 60
_HINT = 'as in "mon-fri 18:00-08:00", "sat,sun" or "22:00-07:00"'
_DAY_WORD = re.compile(r"([a-z]{3})(?:-([a-z]{3}))?")
_TIME_WORD = re.compile(r"(\d{1,2}):(\d{2})-(\d{1,2}):(\d{2})")


class Span(Struct, frozen=True):
    """A part of the week: on each of `days` (0 is Monday) from minute `start` of the day to minute `end`, of the next day if that is not later."""

    days: frozenset[int]
    start: int = 0
    end: int = _DAY_MINUTES

    def holds(self, weekday: int, minute: int) -> bool:
        """Tell whether a moment is within."""
        if self.start < self.end:
            return weekday in self.days and self.start <= minute < self.end
        return (weekday in self.days and minute >= self.start) or ((weekday - 1) % 7 in self.days and minute < self.end)


def parse_spans(texts: Iterable[str]) -> tuple[Span, ...]:
    """Return parts of the week that are written for people. Raise InvalidInput."""
    return tuple(_parse_span(text) for text in texts)


def _parse_span(text: str) -> Span:
    days: set[int] = set()
    times = (0, _DAY_MINUTES)
    for word in re.split(r"[\s,]+", text.strip().lower()):
        if day := _DAY_WORD.fullmatch(word):
            days |= _days_of(day[1], day[2] or day[1], text)
        elif time := _TIME_WORD.fullmatch(word):
            times = _minute(time[1], time[2], text), _minute(time[3], time[4], text)
        else:
            raise InvalidInput(f"{text!r} is no part of the week", where="hours", hint=_HINT)
    return Span(frozenset(days or range(7)), *times)


def _days_of(first: str, last: str, text: str) -> set[int]:
    if first not in _DAYS or last not in _DAYS:
        raise InvalidInput(f"{text!r} names a day that is none", where="hours", hint=f"days are {', '.join(_DAYS)}")
    start, end = _DAYS.index(first), _DAYS.index(last)
    return {(start + offset) % 7 for offset in range((end - start) % 7 + 1)}


def _minute(hour: str, minute: str, text: str) -> int:
    found = int(hour) * 60 + int(minute)
    if int(minute) > 59 or found > _DAY_MINUTES:
        raise InvalidInput(f"{text!r} names a time that is none", where="hours", hint=_HINT)
    return found


class Rules(Struct, frozen=True, kw_only=True):
    """What has to hold for a PC to work."""

    hours: tuple[Span, ...] = ()
    """Local time; none: always."""
    idle_s: float = 0.0
    """Seconds without keyboard and mouse; 0: they do not matter."""
    busy_cpus: float = 0.0
    """CPUs that programs of ordinary priority may use together; 0: they do not matter."""
    on_battery: bool = False
    """Whether to work on battery."""
    full_screen: bool = False
    """Whether to work while a program fills the screen, as a game or a talk does."""


class Seen(Struct, frozen=True, kw_only=True):
    """What is seen of a PC at a moment. None: it cannot be told."""

    weekday: int
    """0 is Monday."""
    minute: int
    """Of the day, local time."""
    idle_s: float | None = None
    """Seconds since keyboard or mouse were used."""
    busy_cpus: float | None = None
    on_battery: bool = False
    full_screen: bool = False


class Presence:
    """One PC's rules and what was seen lately."""

    def __init__(self, rules: Rules) -> None:
        self._rules = rules
        self._busy_since: float | None = None
        self._quiet_since: float | None = None
        self._loaded = False

    def why_not(self, seen: Seen, *, now: float) -> str:
        """Return why the PC may not work now, "" if it may. `now` is monotonic, in seconds."""
        self._note_load(seen.busy_cpus, now)
        return next((words for words in self._objections(seen) if words), "")

    def _objections(self, seen: Seen) -> Iterable[str]:
        rules = self._rules
        if rules.hours and not any(span.holds(seen.weekday, seen.minute) for span in rules.hours):
            yield "it is outside of the hours"
        if not rules.on_battery and seen.on_battery:
            yield "the PC runs on battery"
        if not rules.full_screen and seen.full_screen:
            yield "a program fills the screen"
        if rules.idle_s and seen.idle_s is None:
            yield "it cannot be told whether keyboard and mouse are used (see deskgrid worker doctor)"
        if rules.idle_s and seen.idle_s is not None and seen.idle_s < rules.idle_s:
            yield "keyboard or mouse are used"
        if rules.busy_cpus and seen.busy_cpus is None:
            yield "it cannot be told what other programs use (see deskgrid worker doctor)"
        if self._loaded:
            yield "other programs need the CPUs"

    def _note_load(self, busy_cpus: float | None, now: float) -> None:
        busy = bool(self._rules.busy_cpus) and busy_cpus is not None and busy_cpus > self._rules.busy_cpus
        self._busy_since = (self._busy_since if self._busy_since is not None else now) if busy else None
        self._quiet_since = None if busy else (self._quiet_since if self._quiet_since is not None else now)
        if self._busy_since is not None and now - self._busy_since >= LOAD_S:
            self._loaded = True
        if self._quiet_since is not None and now - self._quiet_since >= QUIET_S:
            self._loaded = False
