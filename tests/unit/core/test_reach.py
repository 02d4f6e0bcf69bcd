"""Who may reach what: the rules as a model, and every answer held against it."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deskgrid.core.console import CONSOLE
from deskgrid.core.reach import Source, TargetJob, check_job, check_named, check_share, may_use
from deskgrid.errors import Forbidden, InvalidInput, NotFound
from deskgrid.model.ids import JobId, UserId
from deskgrid.model.overlay import ServiceRef, parse_service

USERS = {UserId(1): "ann", UserId(2): "bob", UserId(3): "eve"}
GROUPS = ("hep", "astro")
SERVICES = ("web", "db")
WEB = parse_service("web.job-42")

shares = st.lists(
    st.sampled_from([*(f"user:{name}" for name in USERS.values()), *(f"group:{name}" for name in GROUPS), "everyone"]), max_size=3
).map(tuple)
references = st.builds(ServiceRef, st.sampled_from(SERVICES), st.sampled_from(["job-42", "job-41", "user", "user-ann"]))
sources = st.builds(
    lambda user_id, groups, job_id, reach: Source(
        user_id=user_id, user=USERS[user_id], groups=groups, job_id=job_id, reach=reach if job_id else ()
    ),
    st.sampled_from(list(USERS)),
    st.frozensets(st.sampled_from(GROUPS)),
    st.none() | st.just(JobId(7)),
    st.lists(references, max_size=4).map(tuple),
)
targets = st.none() | st.builds(
    lambda owner_id, offers, share: TargetJob(owner_id=owner_id, offers=offers, share=share),
    st.sampled_from(list(USERS)),
    st.lists(st.sampled_from(SERVICES), unique=True).map(tuple),
    shares,
)


def allowed_by_share(source: Source, share: tuple[str, ...]) -> bool:
    return any(
        entry == "everyone" or entry == f"user:{source.user}" or entry.removeprefix("group:") in source.groups for entry in share
    )


@given(sources, references, targets)
def test_a_job_is_reached_exactly_as_the_rules_say(source: Source, service: ServiceRef, target: TargetJob | None):
    named = source.job_id is None or service in source.reach
    known = target is not None and (target.owner_id == source.user_id or allowed_by_share(source, target.share))
    expected = Forbidden if not named else NotFound if not known or service.service not in target.offers else None
    if expected is None:
        check_job(source, service, target)
        return
    with pytest.raises(expected):
        check_job(source, service, target)


@given(sources, st.sampled_from(list(USERS)), shares)
def test_sharing_widens_and_never_narrows(source: Source, owner_id: UserId, share: tuple[str, ...]):
    assert may_use(source, owner_id, share) == (source.user_id == owner_id or allowed_by_share(source, share))
    if may_use(source, owner_id, ()):
        assert may_use(source, owner_id, share)
    assert may_use(source, owner_id, (*share, "everyone"))


@given(sources, targets)
def test_who_may_not_reach_a_job_cannot_tell_it_from_none(source: Source, target: TargetJob | None):
    if source.job_id is not None or (target is not None and may_use(source, target.owner_id, target.share)):
        return
    told = []
    for found in (target, None):
        with pytest.raises(NotFound) as caught:
            check_job(source, WEB, found)
        told.append((caught.value.message, caught.value.hint))
    assert told[0] == told[1]


@given(sources, references)
def test_a_job_reaches_only_what_its_spec_names_whatever_its_owner_may(source: Source, service: ServiceRef):
    if source.job_id is None or service in source.reach:
        check_named(source, service)
        return
    with pytest.raises(Forbidden, match="its spec does not name it"):
        check_named(source, service)


def test_a_group_named_like_a_user_is_not_that_user():
    source = Source(user_id=UserId(2), user="bob", groups=frozenset({"ann"}))
    assert not may_use(source, UserId(1), ("user:ann", "group:bob"))


@pytest.mark.parametrize(
    "text", ["", "hep", "group:", "group:Hep", "user:a b", "everyone ", "all", "group:a\n", "user:" + "a" * 64]
)
def test_nobody_to_share_with_is_refused(text: str):
    with pytest.raises(InvalidInput, match="group:NAME, user:NAME or everyone"):
        check_share(text)


@pytest.mark.parametrize("text", ["everyone", "group:hep", "user:ann.b_c-d"])
def test_groups_users_and_everyone_can_be_shared_with(text: str):
    check_share(text)


consoles = st.builds(
    lambda owner_id, offers, share, has_screen: TargetJob(owner_id=owner_id, offers=offers, share=share, has_screen=has_screen),
    st.sampled_from(list(USERS)),
    st.lists(st.sampled_from([*SERVICES, CONSOLE]), unique=True).map(tuple),
    shares,
    st.booleans(),
)


@given(sources, st.none() | consoles)
def test_a_console_is_for_programs_of_the_jobs_owner_alone_whatever_is_shared_or_named(source: Source, target: TargetJob | None):
    console = parse_service("console.job-42")
    if source.job_id is not None:
        source = msgspec.structs.replace(source, reach=(*source.reach, console))
    is_owner = target is not None and source.user_id == target.owner_id
    if source.job_id is None and is_owner and target.has_screen:
        check_job(source, console, target)
        return
    shared = target is not None and may_use(source, target.owner_id, target.share)
    with pytest.raises(Forbidden if source.job_id is not None or (shared and not is_owner) else NotFound):
        check_job(source, console, target)


def test_a_users_program_may_call_its_service_console():
    service = parse_service("console.user-ann")
    check_named(Source(user_id=UserId(1), user="ann", job_id=JobId(7), reach=(service,)), service)
