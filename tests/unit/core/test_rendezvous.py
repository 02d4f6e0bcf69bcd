"""The hub's rules: claims, and random histories of hostile peers that must keep them."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable
from typing import Any

import msgspec
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given, settings
from hypothesis import strategies as st

from deskgrid.core import frames
from deskgrid.core.frames import Candidates, Message
from deskgrid.core.paths import plain_host
from deskgrid.core.rendezvous import (
    ANSWER_S,
    MAX_PRIVATE,
    RELAY_S,
    Close,
    Closed,
    CloseLeg,
    Closing,
    Effect,
    Ended,
    Event,
    LegClosed,
    LegOpened,
    Opened,
    Pair,
    Received,
    Refusal,
    Refused,
    Rendezvous,
    Send,
    Tick,
    is_peer_name,
)
from deskgrid.core.trust import Grant, sign_grant
from deskgrid.model.ids import Sha256
from deskgrid.model.overlay import Address
from deskgrid.settings import HubSettings

SERVER = Ed25519PrivateKey.from_private_bytes(b"\x01" * 32)
FORGER = Ed25519PrivateKey.from_private_bytes(b"\x02" * 32)
SMALL = HubSettings(max_peers=4, max_peers_per_name=2, max_streams_per_peer=2, max_connects_per_s=1.0, ping_s=20.0, handshake_s=5.0)
OFFSET = 1e6
"""The server's clock is that much ahead of the hub's monotonic one."""
NAMES = [f"user-{number}.deskgrid" for number in range(1, 7)]
KEYS = [Sha256(f"{number:064x}") for number in range(1, 7)]
ID = "0" * 31 + "1"


def _grant(caller: int, called: int, *, key: Ed25519PrivateKey = SERVER, lifetime_s: float = 1e9, **changes: Any) -> str:
    grant = Grant(
        source=NAMES[caller],
        source_key=KEYS[caller],
        target=NAMES[called],
        target_key=KEYS[called],
        service="web",
        expires_at=OFFSET + lifetime_s,
        nonce="",
    )
    return sign_grant(msgspec.structs.replace(grant, **changes), key)


GRANTS = {(source, target): _grant(source, target) for source in range(6) for target in range(6)}


class Play:
    """A hub, and what the test does to it. Peer n has NAMES[n] and KEYS[n]."""

    def __init__(self, hub_settings: HubSettings = SMALL) -> None:
        self.now = 0.0
        self._tokens = itertools.count(1)
        self._numbers = itertools.count(1)
        self.hub = Rendezvous(
            hub_settings,
            SERVER.public_key(),
            token=lambda: next(self._tokens).to_bytes(frames.TOKEN_BYTES, "big"),
            server_offset_s=OFFSET,
        )

    def do(self, event: Event) -> list[Effect]:
        return self.hub.handle(event, now=self.now)

    def number(self) -> int:
        return next(self._numbers)

    def open(self, peer: int, host: str = "203.0.113.1") -> int:
        connection = self.number()
        assert self.do(Opened(connection, NAMES[peer], KEYS[peer], Address(host, 5000))) == []
        return connection

    def join(self, peer: int, host: str = "203.0.113.1") -> int:
        connection = self.open(peer, host)
        assert isinstance(self.say(connection, frames.Register())[-1].message, frames.Registered)  # type: ignore[union-attr]
        return connection

    def say(self, connection: int, message: Message) -> list[Effect]:
        return self.do(Received(connection, message))

    def connect(
        self,
        connection: int,
        grant: str,
        number: str = ID,
        candidates: Candidates = Candidates(),  # noqa: B008 - frozen
    ) -> list[Effect]:
        return self.say(connection, frames.Connect(id=number, grant=grant, candidates=candidates))

    def call(self) -> tuple[int, int, bytes]:
        """Let peer 0 call peer 1, which accepts. Return both connections and the relay token."""
        caller, target = self.join(0), self.join(1)
        invite = _message(self.connect(caller, GRANTS[0, 1]), target, frames.Invite)
        self.say(target, frames.Accept(id=ID, candidates=Candidates()))
        return caller, target, bytes.fromhex(invite.relay)

    def leg(self, token: bytes) -> tuple[int, list[Effect]]:
        leg = self.number()
        return leg, self.do(LegOpened(leg, token))

    def wait(self, seconds: float) -> list[Effect]:
        self.now += seconds
        return self.do(Tick())


def _message(effects: list[Effect], connection: int, kind: type[Any]) -> Any:
    """Return the only message of a kind that went to a connection."""
    (found,) = [e.message for e in effects if isinstance(e, Send) and e.connection == connection and isinstance(e.message, kind)]
    return found


def _without_logs(effects: list[Effect]) -> list[Effect]:
    return [effect for effect in effects if not isinstance(effect, Refusal)]


def _dismissed(effects: list[Effect], connection: int) -> bool:
    return Close(connection) in effects and isinstance(_message(effects, connection, frames.Goodbye), frames.Goodbye)


# ---- registration


def test_a_peer_learns_its_address_and_how_often_to_ping():
    play = Play()
    effects = play.say(play.open(0, "::ffff:203.0.113.9"), frames.Register())
    assert effects == [Send(1, frames.Registered(observed=Address("203.0.113.9", 5000), ping_s=20.0))]
    assert play.hub.peers == 1


def test_a_peer_that_does_not_register_is_dismissed_in_time():
    play = Play()
    connection = play.open(0)
    assert play.wait(4.9) == []
    assert play.hub.deadline == 5.0
    assert _dismissed(play.wait(0.1), connection)
    assert play.hub.deadline is None


@pytest.mark.parametrize(
    "message",
    [frames.Ping(), frames.Goodbye(""), frames.Connect(id=ID, grant=GRANTS[0, 1], candidates=Candidates()), frames.Register(2)],
)
def test_what_comes_before_register_or_in_another_version_ends_the_connection(message: Message):
    play = Play()
    connection = play.open(0)
    assert _dismissed(play.say(connection, message), connection)
    assert play.say(connection, frames.Register()) == []


@pytest.mark.parametrize("message", [frames.Register(), frames.Pong(), frames.Goodbye(""), frames.Rejected(id=ID, reason="")])
def test_a_message_that_peers_do_not_send_ends_the_connection(message: Message):
    play = Play()
    connection = play.join(0)
    assert _dismissed(play.say(connection, message), connection)
    assert play.hub.peers == 0


@pytest.mark.parametrize(
    "name",
    [
        "hub-1.deskgrid",
        "server.deskgrid",
        "",
        "user-0.deskgrid",
        "user-1.deskgrid.example",
        "xuser-1.deskgrid",
        "*.deskgrid",
        "user-1.deskgrid\n",
        "attempt-1.deskgrid",
        "job-1.deskgrid",
        "user-\u0661.deskgrid",
    ],
)
def test_hubs_and_strangers_may_not_register(name: str):
    assert not is_peer_name(name)
    assert _dismissed(Play().do(Opened(1, name, KEYS[0], Address("203.0.113.1", 1))), 1)


def test_attempts_users_and_workers_may_register():
    assert all(map(is_peer_name, ("attempt-3.job-42.deskgrid", "user-7.deskgrid", "worker-5.deskgrid")))


def test_a_newer_registration_of_a_key_replaces_the_older():
    play = Play()
    older = play.join(0)
    newer = play.open(0)
    effects = play.say(newer, frames.Register())
    assert _dismissed(effects, older)
    assert play.hub.peers == 1
    assert play.say(newer, frames.Ping(3)) == [Send(newer, frames.Pong(3))]
    assert play.do(Closed(older)) == []
    assert play.hub.peers == 1


def test_a_full_hub_refuses_but_lets_a_key_come_back():
    play = Play()
    for peer in range(4):
        play.join(peer)
    late = play.open(4)
    assert _dismissed(play.say(late, frames.Register()), late)
    play.join(3)
    assert play.hub.peers == 4


def test_registrations_with_one_name_are_bounded():
    play = Play()
    for key in KEYS[:3]:
        connection = play.number()
        play.do(Opened(connection, NAMES[0], key, Address("203.0.113.1", 1)))
        effects = play.say(connection, frames.Register())
    assert _dismissed(effects, connection)
    assert play.hub.peers == 2


def test_connections_that_do_not_register_are_bounded_by_name():
    play = Play()
    for _ in range(16):
        play.open(0)
    assert _dismissed(play.do(Opened(99, NAMES[0], KEYS[0], Address("203.0.113.1", 1))), 99)
    play.open(1)


def test_only_whole_messages_are_signs_of_life():
    play = Play()
    connection = play.join(0)
    for _ in range(5):
        assert play.wait(59) == []
        play.say(connection, frames.Ping())
    assert _dismissed(play.wait(60), connection)
    assert play.hub.peers == 0


def test_a_peer_that_talks_without_end_is_dismissed():
    play = Play()
    connection = play.join(0)
    replies = [play.say(connection, frames.Ping()) for _ in range(1000)]
    assert sum(_dismissed(effects, connection) for effects in replies if Close(connection) in effects) == 1


def test_what_is_no_message_is_answered_with_goodbye_and_logged():
    play = Play()
    connection = play.join(0)
    effects = play.do(Refused(connection, "a frame that is no message"))
    assert _dismissed(effects, connection)
    assert Refusal(NAMES[0], "a frame that is no message") in effects


def test_a_hub_that_ends_says_goodbye_to_all():
    play = Play()
    connections = [play.join(0), play.join(1), play.open(2)]
    effects = play.do(Closing("it is late"))
    assert all(_dismissed(effects, connection) for connection in connections)
    assert play.hub.peers == 0


# ---- calls


def test_a_call_is_invited_accepted_and_both_get_the_same_token():
    play = Play()
    caller, target = play.join(0, "203.0.113.1"), play.join(1, "203.0.113.2")
    invite = _message(play.connect(caller, GRANTS[0, 1], candidates=Candidates(port=10)), target, frames.Invite)
    assert invite.candidates == Candidates(observed="203.0.113.1", port=10)
    assert (invite.id, invite.grant) == (ID, GRANTS[0, 1])
    effects = play.say(target, frames.Accept(id=ID, candidates=Candidates(port=20)))
    accepted = frames.Accepted(id=ID, candidates=Candidates(observed="203.0.113.2", port=20), relay=invite.relay)
    assert effects == [Send(caller, accepted)]


WRONG = {
    "forged": _grant(0, 1, key=FORGER),
    "expired": _grant(0, 1, lifetime_s=-1),
    "of another name": _grant(0, 1, source=NAMES[2]),
    "of another key": _grant(0, 1, source_key=KEYS[2]),
    "empty": "",
    "cut": GRANTS[0, 1][:-10],
    "no ASCII": "é.é",
    "without signature": GRANTS[0, 1].partition(".")[0],
}


@pytest.mark.parametrize("grant", WRONG.values(), ids=WRONG)
def test_a_wrong_grant_never_reaches_the_target(grant: str):
    play = Play()
    caller, _target = play.join(0), play.join(1)
    effects = _without_logs(play.connect(caller, grant))
    assert [type(effect.message) for effect in effects] == [frames.Rejected]  # type: ignore[union-attr]
    assert not _message(effects, caller, frames.Rejected).absent


def test_a_grant_that_was_good_is_refused_once_it_expires():
    play = Play()
    caller, _ = play.join(0), play.join(1)
    play.now = 9.0
    grant = _grant(0, 1, lifetime_s=10)
    assert any(isinstance(effect, Send) and isinstance(effect.message, frames.Invite) for effect in play.connect(caller, grant))
    play.now = 10.0
    assert _message(play.connect(caller, grant, "a" * 32), caller, frames.Rejected).reason == "this grant has expired"


@pytest.mark.parametrize("wrong", [{"target": NAMES[2]}, {"target_key": KEYS[2]}])
def test_a_target_that_is_not_here_under_the_grants_name_and_key_is_absent(wrong: dict[str, Any]):
    play = Play()
    caller, _ = play.join(0), play.join(1)
    assert _message(play.connect(caller, _grant(0, 1, **wrong)), caller, frames.Rejected).absent


def test_a_call_that_is_not_answered_is_rejected_in_time():
    play = Play()
    caller, target = play.join(0), play.join(1)
    play.connect(caller, GRANTS[0, 1])
    assert play.wait(ANSWER_S - 1) == []
    assert not _message(play.wait(1), caller, frames.Rejected).absent
    assert play.say(target, frames.Accept(id=ID, candidates=Candidates())) == []


def test_a_targets_refusal_arrives_as_one_short_line():
    play = Play()
    caller, target = play.join(0), play.join(1)
    play.connect(caller, GRANTS[0, 1])
    effects = play.say(target, frames.Reject(id=ID, reason="no\x1b[2J\n" + "x" * 5000))
    reason = _message(effects, caller, frames.Rejected).reason
    assert reason.isprintable() and len(reason) <= 300


def test_a_target_that_leaves_is_absent_to_its_callers():
    play = Play()
    caller, target = play.join(0), play.join(1)
    play.connect(caller, GRANTS[0, 1])
    assert _message(play.do(Closed(target)), caller, frames.Rejected).absent


def test_a_caller_that_leaves_takes_its_calls_along():
    play = Play()
    caller, target = play.join(0), play.join(1)
    invite = _message(play.connect(caller, GRANTS[0, 1]), target, frames.Invite)
    play.do(Closed(caller))
    assert play.say(target, frames.Accept(id=ID, candidates=Candidates())) == []
    leg, effects = play.leg(bytes.fromhex(invite.relay))
    assert CloseLeg(leg) in effects


def test_a_replayed_id_is_refused_while_anything_of_it_may_happen():
    play = Play(msgspec.structs.replace(SMALL, max_connects_per_s=100.0))
    caller, target = play.join(0), play.join(1)
    other = play.join(2)
    play.connect(caller, GRANTS[0, 1])
    for connection, grant in ((caller, GRANTS[0, 1]), (other, GRANTS[2, 1])):
        assert [type(effect.message) for effect in _without_logs(play.connect(connection, grant))] == [frames.Rejected]  # type: ignore[union-attr]
    play.say(target, frames.Reject(id=ID, reason="no"))
    assert _message(play.connect(caller, GRANTS[0, 1]), caller, frames.Rejected).reason == "this id was used before"


@pytest.mark.parametrize("number", ["", "1", "g" * 32, "A" * 32, "0" * 33, "0" * 32 + "\n"])
def test_an_id_of_another_form_ends_the_connection(number: str):
    play = Play()
    caller = play.join(0)
    play.join(1)
    assert _dismissed(play.connect(caller, GRANTS[0, 1], number), caller)


def test_nobody_but_the_target_may_answer():
    play = Play()
    caller, target, third = play.join(0), play.join(1), play.join(2)
    play.connect(caller, GRANTS[0, 1])
    for connection in (caller, third):
        assert play.say(connection, frames.Accept(id=ID, candidates=Candidates())) == []
    assert play.say(target, frames.Accept(id=ID, candidates=Candidates())) != []
    assert play.say(target, frames.Accept(id=ID, candidates=Candidates())) == []


def test_connects_come_at_the_rate_and_in_the_bursts_that_are_allowed():
    play = Play(msgspec.structs.replace(SMALL, max_streams_per_peer=1000))
    caller, target = play.join(0), play.join(1)

    def invited(number: int) -> bool:
        effects = play.connect(caller, GRANTS[0, 1], f"{number:032x}")
        assert len(_without_logs(effects)) == 1
        return _without_logs(effects)[0].connection == target  # type: ignore[union-attr]

    assert [invited(number) for number in range(12)] == [True] * 10 + [False] * 2
    play.now = 1.0
    assert [invited(number) for number in range(12, 14)] == [True, False]


def test_invitations_that_a_target_has_not_answered_are_bounded():
    play = Play()
    caller, target = play.join(0), play.join(1)
    effects = [play.connect(caller, GRANTS[0, 1], f"{number:032x}") for number in range(3)]
    assert [_without_logs(found)[0].connection for found in effects] == [target, target, caller]  # type: ignore[union-attr]


def test_a_peer_may_call_itself_and_leave_meanwhile():
    play = Play()
    peer = play.join(0)
    _message(play.connect(peer, GRANTS[0, 0]), peer, frames.Invite)
    assert play.do(Closed(peer)) == []


# ---- addresses


def _seen(candidates: Candidates, owner: str, other: str) -> Candidates:
    """Return what a peer at `other` is told of what a peer at `owner` said."""
    play = Play()
    caller, target = play.join(0, owner), play.join(1, other)
    found: Candidates = _message(play.connect(caller, GRANTS[0, 1], candidates=candidates), target, frames.Invite).candidates
    return found


def test_observed_is_the_hubs_word():
    assert _seen(Candidates(observed="8.8.8.8"), "203.0.113.1", "203.0.113.2").observed == "203.0.113.1"


@pytest.mark.parametrize("hole", [("203.0.113.2", 9), ("203.0.113.1", 0), ("203.0.113.1", 65536), ("x", 9), ("", 9)])
def test_a_hole_elsewhere_is_not_passed_on(hole: tuple[str, int]):
    assert _seen(Candidates(punch=Address(*hole)), "203.0.113.1", "8.8.8.8").punch is None


@pytest.mark.parametrize("host", ["203.0.113.1", "::ffff:203.0.113.1"])
def test_a_hole_where_the_hub_sees_the_peer_is_passed_on(host: str):
    assert _seen(Candidates(punch=Address(host, 9)), "203.0.113.1", "8.8.8.8").punch == Address("203.0.113.1", 9)


def test_who_hides_is_hidden():
    said = Candidates(port=9, private=("10.0.0.1",), punch=Address("203.0.113.1", 9), relay_only=True)
    assert _seen(said, "203.0.113.1", "203.0.113.1") == Candidates(relay_only=True)


PRIVATE = ("10.0.0.1", "192.168.1.2", "fd00::1", "100.64.0.9", "::ffff:10.0.0.7")
NEVER = ("127.0.0.1", "169.254.1.1", "224.0.0.1", "0.0.0.0", "::1", "fe80::1", "::", "ff02::1", "::ffff:127.0.0.1")
NEVER += ("8.8.8.8", "2a00::1", "240.0.0.1", "255.255.255.255", "x", "", "10.0.0.1/8", "10.0.0", "a" * 10_000, "fd00::1%x'")


@given(st.lists(st.sampled_from(PRIVATE + NEVER[:-1]), max_size=30))
def test_private_addresses_are_private_few_and_proper(said: list[str]):
    seen = _seen(Candidates(private=tuple(said)), "203.0.113.1", "203.0.113.1").private
    assert set(seen) <= {plain_host(text) for text in PRIVATE}
    assert {plain_host(text) for text in said[:MAX_PRIVATE] if text in PRIVATE} == set(seen)


@pytest.mark.parametrize(
    ("owner", "other", "near"),
    [
        ("203.0.114.1", "203.0.114.1", True),
        ("203.0.114.1", "203.0.114.2", False),
        ("10.0.0.1", "10.0.0.2", True),
        ("127.0.0.1", "192.168.0.2", True),
        ("10.0.0.1", "8.8.8.8", False),
    ],
)
def test_private_addresses_go_to_peers_in_the_same_network_only(owner: str, other: str, near: bool):
    assert _seen(Candidates(private=("10.0.0.9",)), owner, other).private == (("10.0.0.9",) if near else ())


def test_a_port_that_is_none_is_dropped():
    for port in (-1, 0, 65536, 2**80):
        assert _seen(Candidates(port=port), "203.0.113.1", "8.8.8.8").port == 0


# ---- relay


def test_two_legs_with_one_token_are_paired_once():
    play = Play()
    _, _, token = play.call()
    first, waiting = play.leg(token)
    second, effects = play.leg(token)
    assert (waiting, effects) == ([], [Pair(first, second)])
    third, refused = play.leg(token)
    assert CloseLeg(third) in refused
    play.do(Ended(first))
    fourth, refused = play.leg(token)
    assert CloseLeg(fourth) in refused


def test_a_leg_alone_is_ended_when_the_token_expires():
    play = Play()
    _, _, token = play.call()
    leg, _ = play.leg(token)
    assert play.wait(RELAY_S - 0.1) == []
    assert play.wait(0.1) == [CloseLeg(leg)]
    late, effects = play.leg(token)
    assert CloseLeg(late) in effects


def test_a_leg_that_left_before_the_other_came_may_be_made_again():
    play = Play()
    _, _, token = play.call()
    lost, _ = play.leg(token)
    play.do(LegClosed(lost))
    first, _ = play.leg(token)
    second, effects = play.leg(token)
    assert effects == [Pair(first, second)]


def test_the_called_peer_may_come_before_it_is_known_that_it_accepted_but_alone():
    play = Play()
    caller, target = play.join(0), play.join(1)
    token = bytes.fromhex(_message(play.connect(caller, GRANTS[0, 1]), target, frames.Invite).relay)
    first, effects = play.leg(token)
    assert effects == []
    twice, effects = play.leg(token)
    assert CloseLeg(twice) in effects
    assert CloseLeg(first) in play.say(target, frames.Reject(id=ID, reason=""))


def test_a_token_nobody_was_given_is_refused():
    leg, effects = Play().leg(b"\xff" * 32)
    assert CloseLeg(leg) in effects


def test_relayed_streams_live_on_without_the_registrations_and_count():
    play = Play(msgspec.structs.replace(SMALL, max_connects_per_s=100.0))
    caller, target = play.join(0), play.join(1)

    def pair(number: int) -> int | None:
        invite = _message(play.connect(caller, GRANTS[0, 1], f"{number:032x}"), target, frames.Invite)
        play.say(target, frames.Accept(id=f"{number:032x}", candidates=Candidates()))
        first, effects = play.leg(bytes.fromhex(invite.relay))
        if CloseLeg(first) in effects:
            return None
        play.leg(bytes.fromhex(invite.relay))
        return first

    streams = [pair(number) for number in range(3)]
    assert streams[2] is None and None not in streams[:2]
    play.do(Closed(caller))
    caller = play.join(0)
    assert pair(3) is None
    play.do(Ended(streams[0] or 0))
    assert pair(4) is not None
    assert play.hub.streams == 2


# ---- histories


hosts = st.sampled_from(["203.0.113.1", "10.0.0.1", "fe80::1%eth0", "", "::ffff:10.0.0.1"])
numbers = st.integers(0, 5)
ids = st.sampled_from([f"{number:032x}" for number in range(3)]) | st.text(max_size=3)
wild_candidates = st.builds(
    Candidates,
    observed=hosts,
    port=st.sampled_from([-1, 0, 80, 70_000, 2**100]),
    private=st.lists(hosts, max_size=3).map(tuple),
    punch=st.none() | st.builds(Address, hosts, st.sampled_from([0, 80, 2**100])),
    relay_only=st.booleans(),
)
grants = st.sampled_from([*GRANTS.values(), *WRONG.values()])
steps = st.one_of(
    st.tuples(st.just("open"), numbers, hosts),
    st.tuples(st.just("say"), numbers, st.builds(frames.Register, st.sampled_from([1, 1, 1, 1, 2]))),
    st.tuples(st.just("join"), numbers, hosts),
    st.tuples(st.just("say"), numbers, st.builds(frames.Connect, id=ids, grant=grants, candidates=wild_candidates)),
    st.tuples(st.just("call"), numbers, numbers),
    st.tuples(st.just("say"), numbers, st.builds(frames.Accept, id=ids, candidates=wild_candidates)),
    st.tuples(st.just("say"), numbers, st.builds(frames.Reject, id=ids, reason=st.text(max_size=5))),
    st.tuples(st.just("accept"), numbers, st.just(None)),
    st.tuples(st.just("say"), numbers, st.sampled_from([frames.Ping(), frames.Pong(), frames.Goodbye("")])),
    st.tuples(st.just("refused"), numbers, st.just(None)),
    st.tuples(st.just("closed"), numbers, st.just(None)),
    st.tuples(st.just("leg"), numbers, st.just(None)),
    st.tuples(st.just("legclosed"), numbers, st.just(None)),
    st.tuples(st.just("ended"), numbers, st.just(None)),
    st.tuples(st.just("wait"), numbers, st.sampled_from([0.0, 0.5, 4.0, 15.0, 31.0, 61.0])),
)


class Watch:
    """Plays a history and checks after each step what must always hold."""

    def __init__(self) -> None:
        self.play = Play()
        self.connections: list[tuple[int, int]] = []
        """Connection and peer."""
        self.alive: set[int] = set()
        self.asked: dict[tuple[int, str], list[float]] = {}
        """When each Connect without an answer was sent, by connection and id; a replayed one is answered first."""
        self.connects = 0
        self.tokens: list[bytes] = []
        self.token_keys: dict[bytes, tuple[int, int]] = {}
        self.paired: Counter[bytes] = Counter()
        self.legs: dict[int, bytes] = {}
        self.waiting: set[int] = set()
        self.streams: dict[int, bytes] = {}
        self.invites: list[tuple[int, str]] = []

    def step(self, kind: str, number: int, value: Any) -> None:
        getattr(self, f"_{kind}")(number, value)

    def _do(self, event: Event, *, allowed: Callable[[Send], bool] = lambda send: False) -> None:
        for effect in self.play.do(event):
            self._check(effect, allowed)
        self._check_limits()

    def _check(self, effect: Effect, allowed: Callable[[Send], bool]) -> None:
        match effect:
            case Send(connection, message):
                assert connection in self.alive
                frames.encode(message)
                if isinstance(message, frames.Invite):
                    assert allowed(effect), "an Invite without a good Connect"
                    self.tokens.append(bytes.fromhex(message.relay))
                    self.invites.append((connection, message.id))
                if isinstance(message, frames.Accepted | frames.Rejected):
                    assert self.asked[connection, message.id], "answered twice"
                    self.asked[connection, message.id].pop()
            case Close(connection):
                self.alive.remove(connection)
            case Pair(first, second):
                assert first in self.waiting and second not in self.waiting
                assert self.legs[first] == self.legs[second]
                self.waiting.remove(first)
                self.paired[self.legs[first]] += 1
                assert self.paired[self.legs[first]] == 1, "a token was used twice"
                self.streams[first] = self.legs[first]
            case CloseLeg(leg):
                self.waiting.discard(leg)

    def _check_limits(self) -> None:
        assert self.play.hub.peers <= SMALL.max_peers
        assert self.play.hub.streams == len(self.streams)
        busy = Counter(key for token in self._busy_tokens() for key in set(self.token_keys[token]))
        assert max(busy.values(), default=0) <= SMALL.max_streams_per_peer
        for (connection, _), times in self.asked.items():
            late = any(self.play.now > at + ANSWER_S for at in times)
            assert not late or connection not in self.alive, "no answer"

    def _busy_tokens(self) -> list[bytes]:
        return [*self.streams.values(), *(self.legs[leg] for leg in self.waiting)]

    def _open(self, peer: int, host: str) -> int:
        connection = self.play.number()
        self.connections.append((connection, peer))
        self.alive.add(connection)
        self._do(Opened(connection, NAMES[peer], KEYS[peer], Address(host, 1)))
        return connection

    def _join(self, peer: int, host: str) -> None:
        self._do(Received(self._open(peer, host), frames.Register()))

    def _pick(self, number: int) -> tuple[int, int] | None:
        living = [pair for pair in self.connections if pair[0] in self.alive]
        return living[number % len(living)] if living else None

    def _say(self, number: int, message: Message) -> None:
        picked = self._pick(number)
        if picked is None:
            return
        connection, peer = picked
        good: Callable[[Send], bool] = lambda send: False  # noqa: E731
        if isinstance(message, frames.Connect):
            self.connects += 1
            self.asked.setdefault((connection, message.id), []).append(self.play.now)
            targets = [target for (source, target), grant in GRANTS.items() if source == peer and grant == message.grant]
            good = lambda send: bool(targets) and (send.connection, targets[0]) in self.connections  # noqa: E731
            for target in targets:
                self.token_keys[(self._next_token())] = (peer, target)
        self._do(Received(connection, message), allowed=good)

    def _next_token(self) -> bytes:
        return (len(self.tokens) + 1).to_bytes(frames.TOKEN_BYTES, "big")

    def _call(self, number: int, target: int) -> None:
        picked = self._pick(number)
        if picked is not None:
            fresh = f"{self.connects + 100:032x}"
            self._say(number, frames.Connect(id=fresh, grant=GRANTS[picked[1], target], candidates=Candidates()))

    def _accept(self, number: int, _: None) -> None:
        if self.invites:
            connection, call = self.invites[-1 - number % len(self.invites)]
            if connection in self.alive:
                self._do(Received(connection, frames.Accept(id=call, candidates=Candidates())))

    def _refused(self, number: int, _: None) -> None:
        picked = self._pick(number)
        if picked is not None:
            self._do(Refused(picked[0], "nonsense"))

    def _closed(self, number: int, _: None) -> None:
        picked = self._pick(number)
        if picked is not None:
            self.alive.remove(picked[0])
            self._do(Closed(picked[0]))

    def _leg(self, number: int, _: None) -> None:
        token = self.tokens[-1 - number % len(self.tokens)] if self.tokens else b"?" * 32
        leg = self.play.number()
        self.legs[leg] = token
        effects = self.play.do(LegOpened(leg, token))
        if CloseLeg(leg) not in effects and not any(isinstance(effect, Pair) for effect in effects):
            self.waiting.add(leg)
        for effect in effects:
            self._check(effect, lambda send: False)
        self._check_limits()

    def _legclosed(self, number: int, _: None) -> None:
        if self.waiting:
            leg = sorted(self.waiting)[number % len(self.waiting)]
            self.waiting.remove(leg)
            self._do(LegClosed(leg))

    def _ended(self, number: int, _: None) -> None:
        if self.streams:
            stream = sorted(self.streams)[number % len(self.streams)]
            del self.streams[stream]
            self._do(Ended(stream))

    def _wait(self, _: int, seconds: float) -> None:
        self.play.now += seconds
        self._do(Tick())

    def finish(self) -> None:
        """Whatever happened, time and the end of all streams leave nothing."""
        while self.streams:
            self._ended(0, None)
        self._wait(0, 1000.0)
        self._wait(0, 1000.0)
        hub = self.play.hub
        assert not self.alive and not self.waiting
        assert hub.peers == 0 and hub.deadline is None
        left = [hub._peers, hub._registered, hub._registered_names, hub._unregistered_names, hub._calls, hub._tokens, hub._legs]
        assert not any(left) and not hub._streams and not hub._streams_of


@given(st.lists(steps, max_size=80))
@settings(max_examples=200, deadline=None)
def test_no_history_breaks_the_rules(history: list[tuple[str, int, Any]]):
    watch = Watch()
    for kind, number, value in history:
        watch.step(kind, number, value)
    watch.finish()


joined = st.integers(0, 2)
proper_ids = st.sampled_from([f"{number:032x}" for number in range(2)])
some_grants = st.sampled_from([GRANTS[0, 1], GRANTS[1, 0], GRANTS[2, 0], GRANTS[2, 3], *WRONG.values()])
joins = st.tuples(st.just("join"), numbers, hosts)
calls = st.tuples(st.just("call"), joined, joined)
claims = st.tuples(
    st.just("say"), numbers, st.builds(frames.Connect, id=proper_ids, grant=some_grants, candidates=st.just(Candidates()))
)
accepts = st.tuples(st.just("accept"), numbers, st.just(None))
legs = st.tuples(st.just("leg"), joined, st.just(None))
leavings = st.tuples(st.sampled_from(["legclosed", "ended", "closed"]), numbers, st.just(None))
waits = st.tuples(st.just("wait"), numbers, st.sampled_from([1.0, 4.0, 29.0]))


def _play_with_four_peers(history: list[tuple[str, int, Any]]) -> None:
    watch = Watch()
    for peer in range(4):
        watch.step("join", peer, "10.0.0.1")
    for kind, number, value in history:
        watch.step(kind, number, value)
    watch.finish()


@given(st.lists(st.one_of(claims, claims, accepts, joins, leavings, waits), min_size=10, max_size=60))
@settings(max_examples=300, deadline=None)
def test_no_history_of_claims_with_wrong_grants_and_used_ids_breaks_the_rules(history: list[tuple[str, int, Any]]):
    _play_with_four_peers(history)


@given(st.lists(st.one_of(calls, accepts, legs, legs, leavings, waits), min_size=20, max_size=100))
@settings(max_examples=300, deadline=None)
def test_no_history_of_relayed_calls_breaks_the_rules(history: list[tuple[str, int, Any]]):
    _play_with_four_peers(history)


@given(
    st.lists(
        st.binary(max_size=40) | st.sampled_from([frames.encode(frames.Register()), frames.encode(frames.Ping())]), max_size=20
    )
)
def test_fuzzed_bytes_through_the_reader_break_nothing(pieces: list[bytes]):
    play, reader = Play(), frames.FrameReader()
    connection = play.open(0)
    for piece in pieces:
        try:
            for message in reader.feed(piece):
                play.say(connection, message)
        except frames.ProtocolError as error:
            play.do(Refused(connection, error.message))
            break
    assert play.hub.peers <= 1
