"""Which ways are tried, and which addresses never are."""

from __future__ import annotations

import ipaddress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deskgrid.core.frames import Candidates
from deskgrid.core.paths import MAX_ADDRESSES, PathMemory, Remembered, dialable, is_near, plain_host, plan
from deskgrid.model.ids import Sha256
from deskgrid.model.overlay import Address, ConnectionPath

DIRECT, REVERSE, PUNCHED, RELAYED = ConnectionPath
ALL = frozenset(ConnectionPath)
HOME, OFFICE = "203.0.113.7", "198.51.100.9"

NEVER = [
    "127.0.0.1", "127.9.9.9", "::1", "0.0.0.0", "0.1.2.3", "::", "169.254.1.1", "fe80::1", "fe80::1%eth0", "224.0.0.1", "ff02::1",
    "255.255.255.255", "240.0.0.1", "::ffff:127.0.0.1", "64:ff9b::7f00:1", "2002:7f00:1::", "2001:0:1::1", "::7f00:1", "fec0::1",
    "localhost", "", "1.2.3", "evil.example", "127.1",
]  # fmt: skip
PRIVATE = ["10.0.0.5", "172.16.3.4", "172.31.255.1", "192.168.1.5", "100.64.0.1", "fd00::5", "::ffff:192.168.1.5"]

hosts = st.one_of(st.sampled_from(NEVER + PRIVATE + [HOME, OFFICE, "2a02::1"]), st.ip_addresses().map(str), st.text(max_size=70))
addresses = st.builds(Address, hosts, st.integers(-1, 70_000))
candidates = st.builds(
    Candidates,
    observed=hosts,
    port=st.integers(-1, 70_000),
    private=st.lists(hosts, max_size=6).map(tuple),
    punch=st.none() | addresses,
    relay_only=st.booleans(),
)
paths = st.frozensets(st.sampled_from(ConnectionPath))
memories = st.none() | st.builds(Remembered, st.sampled_from(ConnectionPath), st.just(0.0))


@pytest.mark.parametrize("host", NEVER)
def test_some_addresses_are_never_dialled(host: str) -> None:
    for own in (HOME, host, "192.168.1.2"):
        other = Candidates(observed=host, port=5000, private=(host,), punch=Address(host, 6000))
        assert dialable(Candidates(observed=own), other, private=True) == ()
        steps = plan(Candidates(observed=own, punch=Address(own, 1)), other, calling=True, allowed=ALL, private=True)
        assert [step for step in steps if step.address] == []


@pytest.mark.parametrize("host", PRIVATE)
def test_private_addresses_are_dialled_only_behind_the_same_router_and_only_if_the_owner_allows(host: str) -> None:
    other = Candidates(observed=HOME, port=5000, private=(host,))
    assert dialable(Candidates(observed=HOME), other, private=True) == (Address(plain_host(host), 5000), Address(HOME, 5000))
    assert dialable(Candidates(observed=HOME), other, private=False) == (Address(HOME, 5000),)
    assert dialable(Candidates(observed=OFFICE), other, private=True) == (Address(HOME, 5000),)


@pytest.mark.parametrize("host", PRIVATE)
def test_private_observed_addresses_are_dialled_within_the_hubs_own_network(host: str) -> None:
    other = Candidates(observed=host, port=5000)
    assert dialable(Candidates(observed="192.168.9.9"), other, private=True) == (Address(plain_host(host), 5000),)
    assert dialable(Candidates(observed="127.0.0.1"), other, private=True) != (), "a peer on the hub's own PC"
    assert dialable(Candidates(observed=HOME), other, private=True) == ()
    assert dialable(Candidates(observed="192.168.9.9"), other, private=False) == ()


@given(own=candidates, other=candidates, private=st.booleans())
def test_whatever_is_said_no_forbidden_address_is_dialled(own: Candidates, other: Candidates, private: bool) -> None:
    found = dialable(own, other, private=private)
    assert len(found) <= MAX_ADDRESSES
    for address in found:
        host = ipaddress.ip_address(address.host)
        assert 1 <= address.port <= 65535
        assert not (host.is_loopback or host.is_link_local or host.is_multicast or host.is_unspecified)
        assert not (own.relay_only or other.relay_only)
        if str(host) in PRIVATE:
            assert private and is_near(own.observed, other.observed)
        assert plain_host(other.observed) == str(host) or is_near(own.observed, other.observed)


@given(
    own=candidates, other=candidates, calling=st.booleans(), allowed=paths, private=st.booleans(), last=memories,
    rtt=st.none() | st.floats(0, 100), punch=st.booleans(),
)  # fmt: skip
def test_plans_keep_to_what_is_allowed(
    own: Candidates, other: Candidates, calling: bool, allowed: frozenset[ConnectionPath], private: bool, last: Remembered | None,
    rtt: float | None, punch: bool,
) -> None:  # fmt: skip
    steps = plan(own, other, calling=calling, allowed=allowed, private=private, hub_rtt_s=rtt, last=last, punch=punch)
    assert {step.path for step in steps} <= allowed
    assert (RELAYED in allowed) == (RELAYED in {step.path for step in steps})
    assert [step.delay_s for step in steps] == sorted(step.delay_s for step in steps)
    assert all(0.0 <= step.delay_s <= 1.0 for step in steps)
    if own.relay_only or other.relay_only:
        assert {step.path for step in steps} <= {RELAYED}
    dialled = {step.address for step in steps if step.path in (DIRECT, REVERSE) and step.address}
    assert dialled <= set(dialable(own, other, private=private))


@given(own=candidates, other=candidates)
def test_the_plans_of_both_ends_fit(own: Candidates, other: Candidates) -> None:
    caller = plan(own, other, calling=True, allowed=ALL, private=True)
    called = plan(other, own, calling=False, allowed=ALL, private=True)
    for path in ConnectionPath:
        assert (path in {step.path for step in caller}) == (path in {step.path for step in called}) or path is PUNCHED


def test_the_relay_starts_at_once_if_there_is_nothing_else_or_nothing_else_worked() -> None:
    own, other = Candidates(observed=HOME), Candidates(observed=OFFICE, port=5000)
    assert plan(own, Candidates(), calling=True, allowed=ALL, private=True)[0].delay_s == 0.0

    def relay_delay_s(last: ConnectionPath | None) -> float:
        remembered = Remembered(last, 0.0) if last else None
        return plan(own, other, calling=True, allowed=ALL, private=True, hub_rtt_s=0.1, last=remembered)[-1].delay_s

    assert relay_delay_s(RELAYED) == 0.0
    assert relay_delay_s(None) == pytest.approx(0.1)
    assert relay_delay_s(PUNCHED) > 0.1


def test_a_hole_elsewhere_than_its_peer_is_not_tried() -> None:
    own = Candidates(observed=HOME, punch=Address(HOME, 1))
    here = Candidates(observed=OFFICE, punch=Address(OFFICE, 6000))
    elsewhere = Candidates(observed=OFFICE, punch=Address("203.0.113.200", 6000))
    assert PUNCHED in {step.path for step in plan(own, here, calling=True, allowed=ALL, private=True)}
    assert PUNCHED not in {step.path for step in plan(own, elsewhere, calling=True, allowed=ALL, private=True)}
    assert PUNCHED not in {step.path for step in plan(own, here, calling=True, allowed=ALL, private=True, punch=False)}


def test_what_worked_is_remembered_for_ten_minutes() -> None:
    memory, peer = PathMemory(), Sha256("aa")
    memory.worked(peer, RELAYED, now=0.0)
    memory.worked_too(peer, DIRECT, now=1.0, address=Address(HOME, 5000))
    memory.worked_too(peer, PUNCHED, now=2.0)
    best = memory.best(peer, now=3.0)
    assert best is not None and best.path is DIRECT
    assert memory.best(peer, now=602.0) is None
    memory.failed(peer)
    assert memory.best(peer, now=3.0) is None


def test_a_hole_that_could_not_be_punched_is_not_tried_for_ten_minutes() -> None:
    memory = PathMemory()
    assert memory.may_punch(HOME, OFFICE, now=0.0)
    memory.not_punched(HOME, OFFICE, now=0.0)
    assert not memory.may_punch(HOME, OFFICE, now=599.0)
    assert memory.may_punch(OFFICE, HOME, now=1.0)
    assert memory.may_punch(HOME, OFFICE, now=600.0)


def test_memory_is_bounded() -> None:
    memory = PathMemory()
    for number in range(10_000):
        memory.worked(Sha256(str(number)), DIRECT, now=0.0)
    assert memory.best(Sha256("9999"), now=1.0) is not None
    assert memory.best(Sha256("0"), now=1.0) is None
