"""Pilots on PostgreSQL: the same tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from tests.unit.server.test_pilots import (
    grid,
    test_job_that_is_no_pilot_does_not_join,
    test_pilot_elsewhere_joins_by_a_link_for_a_time,
    test_pilot_ends_with_its_attempt_and_what_it_holds_goes_back,
    test_pilot_gets_what_its_user_may_see_and_nothing_else,
    test_pilot_in_a_pilot_is_none,
    test_pilot_that_ends_soon_gets_no_long_job,
    test_pilot_that_was_lost_is_charged_once_and_not_for_its_jobs,
    test_pilot_whose_attempt_was_lost_may_come_back_with_it_until_the_job_is_over,
    test_pilots_token_opens_nothing_but_the_way_in_and_that_once,
    test_secrets_go_to_a_pilot_only_if_the_pcs_owner_and_its_user_are_trusted,
    test_time_of_a_job_that_was_lost_and_came_back_is_paid_back_once,
    test_time_of_a_pilots_jobs_is_charged_to_who_submitted_them,
    test_token_of_an_attempt_that_has_ended_makes_no_pilot,
    test_what_waits_is_told_with_the_workers_that_could_run_it,
)

from deskgrid.server.store.engine import driver_url
from deskgrid.server.store.migrate import migrate
from deskgrid.testing.postgresql import emptied, running_postgresql

__all__ = [
    "grid",
    "test_job_that_is_no_pilot_does_not_join",
    "test_pilot_elsewhere_joins_by_a_link_for_a_time",
    "test_pilot_ends_with_its_attempt_and_what_it_holds_goes_back",
    "test_pilot_gets_what_its_user_may_see_and_nothing_else",
    "test_pilot_in_a_pilot_is_none",
    "test_pilot_that_ends_soon_gets_no_long_job",
    "test_pilot_that_was_lost_is_charged_once_and_not_for_its_jobs",
    "test_pilot_whose_attempt_was_lost_may_come_back_with_it_until_the_job_is_over",
    "test_pilots_token_opens_nothing_but_the_way_in_and_that_once",
    "test_secrets_go_to_a_pilot_only_if_the_pcs_owner_and_its_user_are_trusted",
    "test_time_of_a_job_that_was_lost_and_came_back_is_paid_back_once",
    "test_time_of_a_pilots_jobs_is_charged_to_who_submitted_them",
    "test_token_of_an_attempt_that_has_ended_makes_no_pilot",
    "test_what_waits_is_told_with_the_workers_that_could_run_it",
]


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with running_postgresql() as url:
        yield url


@pytest.fixture
def database(server: str) -> str:
    url = emptied(server, "pilots")
    migrate(url)
    return driver_url(url)
