"""Who fetches what from whom."""

from __future__ import annotations

from random import Random

from hypothesis import assume, given, settings
from hypothesis import strategies as st

from deskgrid.core.transfer import (
    MOST_FEEDS,
    MOST_JOINED,
    MOST_NEIGHBOURS,
    TAKEN_S,
    Member,
    all_pieces,
    hand_out,
    interval_s,
    lifetime_s,
    neighbours,
    pieces_of,
    private_addresses,
    set_from,
    set_to,
)
from deskgrid.model.swarm import Neighbour

COUNT = 12
sets = st.integers(0, all_pieces(COUNT))


@st.composite
def members(draw: st.DrawFn) -> Member:
    return Member(have=draw(sets), taken=draw(sets), seen_at=draw(st.floats(0, 100)))


@given(members(), st.lists(members(), max_size=12), st.integers(-1, 20), st.booleans())
def test_a_member_is_sent_for_at_most_what_it_wants_of_what_it_lacks(
    me: Member, others: list[Member], wanted: int, stuck: bool
) -> None:
    take = hand_out(COUNT, me, others, wanted=wanted, stuck=stuck, now=100.0)
    assert take & (me.have | me.taken) == 0 and take & ~all_pieces(COUNT) == 0
    assert take.bit_count() <= max(wanted, 0)


@given(members(), st.lists(members(), max_size=12), st.integers(1, 20))
def test_who_is_not_stuck_is_sent_for_nothing_that_others_have_or_fetch(me: Member, others: list[Member], wanted: int) -> None:
    take = hand_out(COUNT, me, others, wanted=wanted, stuck=False, now=100.0)
    for other in others:
        assert not take & other.have
        if other.seen_at + TAKEN_S > 100.0:
            assert not take & other.taken


@given(members(), st.lists(members(), max_size=12))
def test_who_is_stuck_and_lacks_something_is_sent_for_something(me: Member, others: list[Member]) -> None:
    lacks = all_pieces(COUNT) & ~me.have & ~me.taken
    assert bool(hand_out(COUNT, me, others, wanted=1, stuck=True, now=100.0)) == bool(lacks)


def test_only_some_fetch_from_the_server_at_a_time() -> None:
    me = Member()
    feeding = [Member(taken=1 << at, seen_at=100.0) for at in range(MOST_FEEDS)]
    assert hand_out(COUNT, me, feeding, wanted=1, stuck=False, now=101.0) == 0
    assert hand_out(COUNT, me, feeding[1:], wanted=1, stuck=False, now=101.0) == 1
    assert hand_out(COUNT, me, feeding, wanted=1, stuck=False, now=100.0 + TAKEN_S) == 1


def test_a_stuck_member_gets_what_nobody_has_before_what_is_rare() -> None:
    me = Member()
    others = [Member(have=0b0110, taken=0b1000, seen_at=1.0), Member(have=0b0010)]
    first = hand_out(4, me, others, wanted=1, stuck=True, now=2.0)
    assert first == 0b0001
    me = Member(have=first)
    assert hand_out(4, me, others, wanted=1, stuck=True, now=2.0) == 0b1000
    me = Member(have=0b1001)
    assert hand_out(4, me, others, wanted=1, stuck=True, now=2.0) == 0b0100


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 40), st.integers(1, 20), st.integers(0, 1 << 32))
def test_a_swarm_whose_members_give_gets_each_piece_from_the_server_once(count: int, size: int, seed: int) -> None:
    """Turns in any order; what one has, any other has some turns later."""
    rng = Random(seed)
    have, taken, sent = [0] * size, [0] * size, 0
    for _ in range(100_000):
        if all(one == all_pieces(count) for one in have):
            break
        at = rng.randrange(size)
        have[at] |= taken[at]
        taken[at] = 0
        if rng.random() < 0.5:
            have[at] |= have[rng.randrange(size)]
        others = [Member(have=have[one], taken=taken[one], seen_at=0.0) for one in range(size) if one != at]
        taken[at] = hand_out(count, Member(have=have[at]), others, wanted=rng.randint(1, 3), stuck=False, now=1.0)
        sent += taken[at].bit_count()
    assert all(one == all_pieces(count) for one in have)
    assert sent == count


@given(st.integers(1, 1_000_000))
def test_a_swarm_calls_no_more_than_the_server_bears(size: int) -> None:
    assert 1.0 <= interval_s(size) <= 60.0
    assert size / interval_s(size) <= max(20.001, size / 60.0)
    assert lifetime_s(size, complete=True) >= lifetime_s(size, complete=False) > 3 * interval_s(size)


@given(sets)
def test_sets_travel(pieces: int) -> None:
    assert set_from(set_to(pieces, COUNT), COUNT) == pieces
    assert sum(1 << piece for piece in pieces_of(pieces)) == pieces


def test_of_a_set_with_strange_pieces_those_are_left_out() -> None:
    assert set_from(b"\xff" * 100, 5) == 0b11111


ME = Member(public="9.9.9.9", private=("192.168.1.2",), port=1000)


def test_neighbours_behind_the_same_router_are_met_by_their_private_addresses() -> None:
    beside = Member(public="9.9.9.9", private=("192.168.1.3", "10.0.0.3"), port=2000)
    assert set(neighbours(ME, [beside], count=8, rng=Random(1))) == {Neighbour("192.168.1.3", 2000), Neighbour("10.0.0.3", 2000)}


def test_who_cannot_be_reached_is_not_told_of() -> None:
    elsewhere = Member(public="8.8.8.8", private=("192.168.1.3",), port=2000)
    deaf = Member(public="9.9.9.9", private=("192.168.1.4",), port=0)
    open_ = Member(public="8.8.4.4", reachable=True, port=4000)
    assert neighbours(ME, [elsewhere, deaf, open_], count=8, rng=Random(1)) == (Neighbour("8.8.4.4", 4000),)


members = st.builds(
    Member,
    have=st.sampled_from([0, 3, all_pieces(8)]),
    public=st.sampled_from(["9.9.9.9", "8.8.8.8", "8.8.4.4"]),
    private=st.just(("192.168.1.3",)),
    reachable=st.booleans(),
    port=st.just(5),
    peer=st.sampled_from(["", "worker-1", "worker-2", "worker-3"]),
)


@given(members, members)
def test_of_two_that_need_the_overlay_one_calls_the_other(one: Member, other: Member) -> None:
    assume(not one.peer or one.peer != other.peer)
    told = [neighbours(me, [them], count=8, rng=Random(1)) for me, them in ((one, other), (other, one))]
    callers = [any(neighbour.peer for neighbour in found) for found in told]
    hidden = not one.reachable and not other.reachable and one.public != other.public
    lacking = [one.have != all_pieces(8), other.have != all_pieces(8)]
    if not hidden or not one.peer or not other.peer or not any(lacking):
        assert callers == [False, False]
    else:
        assert callers.count(True) == 1
        assert lacking[callers.index(True)]


@given(st.integers(0, 100), st.integers(0, 1000))
def test_through_the_overlay_few_are_called(count: int, seed: int) -> None:
    others = [Member(public=f"8.8.8.{at}", port=5, peer=f"worker-{at + 2}") for at in range(count)]
    me = Member(public="9.9.9.9", port=5, peer="worker-1")
    assert len(neighbours(me, others, count=8, rng=Random(seed))) == min(count, MOST_JOINED)
    assert not neighbours(Member(public="9.9.9.9", port=5), others, count=8, rng=Random(seed))


@given(st.integers(0, 100), st.integers(0, 100), st.integers(0, 1000))
def test_near_neighbours_come_first_and_all_are_few(near: int, far: int, seed: int) -> None:
    others = [
        *(Member(public="9.9.9.9", private=(f"192.168.2.{at}",), port=5) for at in range(near)),
        *(Member(public=f"8.8.8.{at}", reachable=True, port=5) for at in range(far)),
    ]
    found = neighbours(ME, others, count=8, rng=Random(seed))
    assert len(found) == min(near + far, MOST_NEIGHBOURS)
    assert sum(one.address.startswith("192.168.2.") for one in found) == min(near, MOST_NEIGHBOURS)


def test_only_private_addresses_are_believed() -> None:
    said = (
        "192.168.1.7",
        "127.0.0.1",
        "8.8.8.8",
        "169.254.1.1",
        "fd00::1",
        "fe80::1",
        "::1",
        "0.0.0.0",
        "224.0.0.1",
        "x",
        "10.0.0.1:22",
    )
    assert private_addresses(said) == ("192.168.1.7", "fd00::1")
