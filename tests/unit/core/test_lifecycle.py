"""The lifecycle: claims about the table, and random histories that must keep its rules."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from deskgrid.core.lifecycle import (
    FINAL_ATTEMPT_STATES,
    FINAL_JOB_STATES,
    LIVE_STATES,
    TRANSITIONS,
    AttemptEvent,
    Tally,
    applies,
    event_of_report,
    job_state,
    next_state,
    sources,
)
from deskgrid.model.jobs import AttemptState, JobState

events = st.sampled_from(AttemptEvent)
tallies = st.builds(
    Tally,
    live=st.integers(0, 5),
    succeeded=st.integers(0, 2),
    failed=st.integers(0, 5),
    lost=st.integers(0, 25),
    max_failed=st.integers(1, 5),
    max_lost=st.integers(1, 25),
)


@given(st.lists(events, max_size=30))
def test_final_attempt_states_are_never_left(history: list[AttemptEvent]):
    state = AttemptState.LEASED
    for event in history:
        following = next_state(state, event)
        if state in FINAL_ATTEMPT_STATES:
            assert following is None
        state = following or state


def test_every_live_state_can_expire_be_cancelled_and_returned():
    for state in LIVE_STATES:
        assert next_state(state, AttemptEvent.EXPIRED) is AttemptState.LOST
        assert next_state(state, AttemptEvent.CANCELLED) is AttemptState.CANCELLED
        assert next_state(state, AttemptEvent.RETURNED) in {AttemptState.REFUSED, AttemptState.LOST}


def test_lost_attempt_may_come_back_and_succeed_but_not_fail():
    assert next_state(AttemptState.LOST, AttemptEvent.STARTED) is AttemptState.RUNNING
    assert next_state(AttemptState.LOST, AttemptEvent.SUCCEEDED) is AttemptState.SUCCEEDED
    assert next_state(AttemptState.LOST, AttemptEvent.FAILED) is None


def test_lost_attempt_of_a_job_that_is_over_stays_lost():
    for event in AttemptEvent:
        assert applies(AttemptState.LOST, event, JobState.COMPLETED) is None
        assert applies(AttemptState.LOST, event, JobState.WAITING) is next_state(AttemptState.LOST, event)


def test_attempt_that_never_started_is_refused_and_a_started_one_is_lost():
    assert next_state(AttemptState.LEASED, AttemptEvent.REFUSED) is AttemptState.REFUSED
    assert next_state(AttemptState.RUNNING, AttemptEvent.REFUSED) is AttemptState.LOST


def test_guards_are_the_table_read_the_other_way():
    for event in AttemptEvent:
        assert set(sources(event)) == {state for state, of in TRANSITIONS if of is event}


def test_a_worker_may_not_report_lost_or_cancelled():
    assert event_of_report(AttemptState.LOST) is None
    assert event_of_report(AttemptState.CANCELLED) is None


@given(st.sampled_from(sorted(FINAL_JOB_STATES)), tallies)
def test_final_jobs_stay(state: JobState, tally: Tally):
    assert job_state(state, tally) is state


@given(st.sampled_from([JobState.WAITING, JobState.ACTIVE]), tallies)
def test_job_follows_its_attempts(state: JobState, tally: Tally):
    found = job_state(state, tally)
    if tally.succeeded:
        assert found is JobState.COMPLETED
    elif tally.failed >= tally.max_failed or tally.lost >= tally.max_lost:
        assert found is JobState.FAILED
    else:
        assert found is (JobState.ACTIVE if tally.live else JobState.WAITING)
