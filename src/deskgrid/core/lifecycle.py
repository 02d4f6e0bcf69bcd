"""What may happen to jobs and attempts: one table, from which the store's SQL guards and the diagram in the docs are made.

Rules:

1. A live attempt (leased, running, suspended) holds a lease. Expiry makes it lost.
2. `failed` attempts count against the job's `attempts`, `lost` ones against `max_lost`, refused ones (never started) against nothing.
3. A lost attempt that is heard of again while its job is not final lives on, and its result is accepted.
4. A job completes once; final states are final; what is still live then is cancelled.
"""

from __future__ import annotations

from enum import StrEnum

from msgspec import Struct

from deskgrid.model.jobs import AttemptState, JobState

__all__ = [
    "FINAL_ATTEMPT_STATES",
    "FINAL_JOB_STATES",
    "LIVE_STATES",
    "TRANSITIONS",
    "AttemptEvent",
    "Tally",
    "applies",
    "event_of_report",
    "job_state",
    "next_state",
    "sources",
]


class AttemptEvent(StrEnum):
    """What can happen to an attempt."""

    RENEWED = "renewed"
    STARTED = "started"
    SUSPENDED = "suspended"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    REFUSED = "refused"
    RETURNED = "returned"
    """The worker that it was leased to does not know it."""
    EXPIRED = "expired"
    CANCELLED = "cancelled"


_S, _E = AttemptState, AttemptEvent

TRANSITIONS: dict[tuple[AttemptState, AttemptEvent], AttemptState] = {
    (_S.LEASED, _E.RENEWED): _S.LEASED,
    (_S.LEASED, _E.STARTED): _S.RUNNING,
    (_S.LEASED, _E.SUSPENDED): _S.SUSPENDED,
    (_S.LEASED, _E.SUCCEEDED): _S.SUCCEEDED,
    (_S.LEASED, _E.FAILED): _S.FAILED,
    (_S.LEASED, _E.REFUSED): _S.REFUSED,
    (_S.LEASED, _E.RETURNED): _S.REFUSED,
    (_S.LEASED, _E.EXPIRED): _S.LOST,
    (_S.LEASED, _E.CANCELLED): _S.CANCELLED,
    (_S.RUNNING, _E.RENEWED): _S.RUNNING,
    (_S.RUNNING, _E.STARTED): _S.RUNNING,
    (_S.RUNNING, _E.SUSPENDED): _S.SUSPENDED,
    (_S.RUNNING, _E.SUCCEEDED): _S.SUCCEEDED,
    (_S.RUNNING, _E.FAILED): _S.FAILED,
    (_S.RUNNING, _E.REFUSED): _S.LOST,
    (_S.RUNNING, _E.RETURNED): _S.LOST,
    (_S.RUNNING, _E.EXPIRED): _S.LOST,
    (_S.RUNNING, _E.CANCELLED): _S.CANCELLED,
    (_S.SUSPENDED, _E.RENEWED): _S.SUSPENDED,
    (_S.SUSPENDED, _E.STARTED): _S.RUNNING,
    (_S.SUSPENDED, _E.SUSPENDED): _S.SUSPENDED,
    (_S.SUSPENDED, _E.SUCCEEDED): _S.SUCCEEDED,
    (_S.SUSPENDED, _E.FAILED): _S.FAILED,
    (_S.SUSPENDED, _E.REFUSED): _S.LOST,
    (_S.SUSPENDED, _E.RETURNED): _S.LOST,
    (_S.SUSPENDED, _E.EXPIRED): _S.LOST,
    (_S.SUSPENDED, _E.CANCELLED): _S.CANCELLED,
    (_S.LOST, _E.RENEWED): _S.LEASED,
    (_S.LOST, _E.STARTED): _S.RUNNING,
    (_S.LOST, _E.SUSPENDED): _S.SUSPENDED,
    (_S.LOST, _E.SUCCEEDED): _S.SUCCEEDED,
}
"""The only ways an attempt changes. Whatever is not here leaves it as it is."""

LIVE_STATES = frozenset({_S.LEASED, _S.RUNNING, _S.SUSPENDED})
FINAL_ATTEMPT_STATES = frozenset({_S.SUCCEEDED, _S.FAILED, _S.REFUSED, _S.CANCELLED})
FINAL_JOB_STATES = frozenset({JobState.COMPLETED, JobState.FAILED, JobState.CANCELLED})

_EVENT_OF_REPORT = {
    _S.LEASED: _E.RENEWED,
    _S.RUNNING: _E.STARTED,
    _S.SUSPENDED: _E.SUSPENDED,
    _S.SUCCEEDED: _E.SUCCEEDED,
    _S.FAILED: _E.FAILED,
    _S.REFUSED: _E.REFUSED,
}


def next_state(state: AttemptState, event: AttemptEvent) -> AttemptState | None:
    """Return the state after `event`, or None if the event does not apply."""
    return TRANSITIONS.get((state, event))


def applies(state: AttemptState, event: AttemptEvent, job: JobState) -> AttemptState | None:
    """Return the state after `event` given the job's state, or None: what is lost stays so once its job is final."""
    if state is AttemptState.LOST and job in FINAL_JOB_STATES:
        return None
    return next_state(state, event)


def sources(event: AttemptEvent) -> tuple[AttemptState, ...]:
    """Return the states in which `event` applies, for the guard of an SQL statement."""
    return tuple(state for state, of in TRANSITIONS if of is event)


def event_of_report(reported: AttemptState) -> AttemptEvent | None:
    """Return what a worker's report means, or None if a worker may not say that."""
    return _EVENT_OF_REPORT.get(reported)


class Tally(Struct, frozen=True):
    """How many attempts of one job are in which kind of state, with the job's bounds."""

    live: int = 0
    succeeded: int = 0
    failed: int = 0
    lost: int = 0
    max_failed: int = 3
    max_lost: int = 20


def job_state(state: JobState, tally: Tally) -> JobState:
    """Return where a job stands, given where it stood and its attempts. Final states stay."""
    if state in FINAL_JOB_STATES:
        return state
    if tally.succeeded:
        return JobState.COMPLETED
    if tally.failed >= tally.max_failed or tally.lost >= tally.max_lost:
        return JobState.FAILED
    return JobState.ACTIVE if tally.live else JobState.WAITING
