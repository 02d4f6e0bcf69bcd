"""Whose turn it is: fair share over groups and users.

Rules:

1. A queue belongs to a party: the group that its jobs are done for or, without one, their user. Among parties the one that has used the
   least for its weight goes first; within a group the same holds among its users.
2. What counts is CPU time, whether it was used well or not. It fades: after `half_life_s` it counts half.
3. What runs now counts as if it had run for `_AHEAD_S` more, so that of two equals the one with more running machines waits, at once.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from msgspec import Struct

from deskgrid.model.ids import UserId

__all__ = ["Party", "Standings", "Use", "faded", "party_of"]

_AHEAD_S = 3600.0

Party = tuple[str, UserId]
"""A group and nobody, or no group and a user."""
_NOBODY = UserId(0)


class Use(Struct, frozen=True):
    """What a user has used for a group ("" for himself): worth `cpu_s` at the time `at`, in seconds since 1970."""

    owner_id: UserId
    team: str
    cpu_s: float
    at: float


def faded(cpu_s: float, at: float, *, now: float, half_life_s: float) -> float:
    """Return what CPU seconds noted at `at` count for at `now`. A clock that went back changes nothing."""
    return float(cpu_s * 0.5 ** (max(0.0, now - at) / half_life_s))


def party_of(team: str, owner_id: UserId) -> Party:
    """Return to which party a user's queue belongs."""
    return (team, _NOBODY) if team else ("", owner_id)


class Standings:
    """Who has used how much; smaller goes first. `take` keeps it true while jobs are given out."""

    def __init__(
        self,
        uses: Iterable[Use],
        running: Mapping[tuple[str, UserId], int],
        *,
        now: float,
        half_life_s: float,
        users: Mapping[UserId, float] | None = None,
        teams: Mapping[str, float] | None = None,
    ) -> None:
        """`running`: CPUs in use now, by group and user. `users` and `teams`: weights, 1 where nothing is said."""
        self._users, self._teams = users or {}, teams or {}
        self._by_user: dict[tuple[str, UserId], float] = {}
        self._by_party: dict[Party, float] = {}
        for use in uses:
            self._add((use.team, use.owner_id), faded(use.cpu_s, use.at, now=now, half_life_s=half_life_s))
        for key, cpus in running.items():
            self._add(key, cpus * _AHEAD_S)

    def order(self, team: str, owner_id: UserId) -> tuple[float, float]:
        """Return the place of a user's queue: of its party, then within it."""
        party = party_of(team, owner_id)
        weight = self._teams.get(team, 1.0) if team else self._users.get(owner_id, 1.0)
        within = self._by_user.get((team, owner_id), 0.0) / self._users.get(owner_id, 1.0)
        return self._by_party.get(party, 0.0) / weight, within

    def take(self, team: str, owner_id: UserId, cpus: int) -> None:
        """Note that a machine with so many CPUs was given out."""
        self._add((team, owner_id), cpus * _AHEAD_S)

    def _add(self, key: tuple[str, UserId], cpu_s: float) -> None:
        party = party_of(*key)
        self._by_user[key] = self._by_user.get(key, 0.0) + cpu_s
        self._by_party[party] = self._by_party.get(party, 0.0) + cpu_s
