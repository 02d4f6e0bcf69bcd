"""The table of who may do what, and what a narrowed token can be made of."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deskgrid.core.rights import (
    ROLES,
    RULES,
    Right,
    Thing,
    Viewer,
    Who,
    check_given,
    covers,
    is_allowed,
    is_of_admin,
    parse_rights,
    thing_of_job,
)
from deskgrid.errors import DeskgridError, InvalidInput
from deskgrid.model import wire
from deskgrid.model.data import Visibility
from deskgrid.model.ids import UserId
from deskgrid.model.users import Role

RIGHTS = st.frozensets(st.sampled_from(Right), min_size=1)


def opened(role: Role, held: frozenset[Right] | None) -> set[str]:
    """Return the calls that a person's token opens."""
    acting = Role.ADMIN if role is Role.ADMIN and is_of_admin(held) else Role.USER
    return {name for name in RULES if covers(held, name) and (not ROLES[name] or acting in ROLES[name])}


def test_every_route_has_exactly_one_rule():
    assert RULES.keys() == wire.ROUTES.keys()


def test_what_is_done_to_an_object_can_be_seen_by_who_may_do_it():
    for noun in ("job", "array", "set", "data", "app"):
        for verb in ("cancel", "remove"):
            name = f"{verb}_{noun}"
            assert name not in RULES or RULES[name].who <= RULES[f"get_{noun}"].who


@given(role=st.sampled_from((Role.USER, Role.ADMIN)), held=st.none() | RIGHTS, wanted=RIGHTS)
def test_no_token_makes_one_that_opens_more(role: Role, held: frozenset[Right] | None, wanted: frozenset[Right]):
    try:
        if held is not None:
            parse_rights(tuple(held))
        parse_rights(tuple(wanted))
        acting = Role.ADMIN if role is Role.ADMIN and is_of_admin(held) else Role.USER
        check_given(acting, held, wanted)
    except DeskgridError:
        return
    assert opened(role, wanted) <= opened(role, held)


@given(held=RIGHTS)
def test_narrowed_token_neither_renews_itself_nor_makes_a_login(held: frozenset[Right]):
    assert not opened(Role.ADMIN, held) & {"renew_token", "add_login_secret"}


@given(names=st.lists(st.text(max_size=12) | st.sampled_from(Right)))
def test_unknown_rights_are_refused(names: list[str]):
    try:
        found = parse_rights(tuple(names))
    except InvalidInput:
        assert not names or set(names) - (set(Right) - {Right.PILOT}) or "metrics" in names
    else:
        assert found == frozenset(names)


PEOPLE = st.builds(
    Viewer,
    role=st.sampled_from((Role.USER, Role.JOB)),
    user_id=st.sampled_from((UserId(1), UserId(2), None)),
    groups=st.frozensets(st.sampled_from(("hep", "bio"))),
)


@given(
    viewer=PEOPLE, owner=st.sampled_from((1, 2, None)), visibility=st.sampled_from(Visibility), group=st.sampled_from(("hep", ""))
)
def test_data_is_seen_by_its_owner_its_group_or_everybody_as_its_visibility_says(viewer, owner, visibility, group):
    seen = is_allowed("get_data", viewer, Thing(owner_id=owner, visibility=visibility, group=group))
    mine = owner is not None and owner == viewer.user_id
    shared = visibility is Visibility.GROUP and group in viewer.groups
    assert seen == (mine or shared or visibility is Visibility.PUBLIC)


@given(viewer=PEOPLE)
def test_job_without_a_group_is_its_owners_alone(viewer: Viewer):
    assert is_allowed("get_job", viewer, thing_of_job(1, "")) == (viewer.user_id == 1)


@pytest.mark.parametrize("name", RULES)
def test_what_the_audit_log_tells_is_in_the_message_and_no_secret(name: str):
    fields = wire.ROUTES[name].request.__struct_fields__ if wire.ROUTES[name].request is not bytes else ()
    for told in RULES[name].tells:
        assert told in fields
        assert not any(word in told for word in ("secret", "hash", "token", "spec", "key"))


def test_what_persons_change_is_audited():
    people = {Role.USER, Role.ADMIN, Role.JOB}
    pieces = {"begin_upload", "upload_bytes", "take_turn", "register_peer", "remove_peer", "ask_grant"}
    for name, route in wire.ROUTES.items():
        changes = route.method is not wire.Method.GET and (ROLES[name] & people or Who.ANYBODY in RULES[name].who)
        assert RULES[name].audited == (bool(changes) and name not in pieces), name
