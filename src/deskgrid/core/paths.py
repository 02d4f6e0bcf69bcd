"""Which ways to another peer are tried, when, and in which order; what is remembered of those that worked.

Rules:

1. A peer must not turn others into scanners. Loopback, link-local, multicast, unspecified and reserved addresses are never dialled,
   nor addresses that hide an IPv4 address. Private ones are dialled only if our owner allows it and both peers are behind the same
   router (the hub sees the same address) or both in the hub's own network (it sees private addresses).
2. Everything is tried at once, but for the relay: it starts a round trip to the hub later, at once if nothing else can be tried or
   if nothing else worked the last time, and later still if something better did.
3. A peer whose owner hides his address dials hubs only, and nobody dials it.
4. Where a hole could not be punched between two routers, it is not tried again for ten minutes.

No IO: `now` is in monotonic seconds.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Collection
from typing import Protocol

from msgspec import Struct

from deskgrid.core.frames import Candidates
from deskgrid.model.ids import Sha256
from deskgrid.model.overlay import Address, ConnectionPath

__all__ = [
    "MAX_ADDRESSES",
    "REMEMBER_S",
    "MayDial",
    "PathMemory",
    "Remembered",
    "Step",
    "dialable",
    "is_near",
    "plain_host",
    "plan",
]

MAX_ADDRESSES = 4
"""Addresses of one peer that are dialled."""
REMEMBER_S = 600.0
_MOST_REMEMBERED = 4096
_UNKNOWN_RTT_S = 0.1
_LEAST_RELAY_DELAY_S, _MOST_RELAY_DELAY_S = 0.01, 1.0
_LITTLE_S = 0.05

IpAddress = ipaddress.IPv4Address | ipaddress.IPv6Address
_PRIVATE = tuple(
    ipaddress.ip_network(text) for text in ("10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "100.64.0.0/10", "fc00::/7")
)  # 100.64/10: between a provider's NAT and its customers (RFC 6598)
_NEVER = tuple(
    ipaddress.ip_network(text)
    for text in ("0.0.0.0/8", "240.0.0.0/4", "::/96", "64:ff9b::/96", "64:ff9b:1::/48", "2001::/32", "2002::/16", "fec0::/10")
)  # nobody's; and IPv4 inside of IPv6: compatible, NAT64, Teredo, 6to4


class MayDial(Protocol):
    """Tells where `own` may dial `other`; `dialable` is the one that is used."""

    def __call__(self, own: Candidates, other: Candidates, *, private: bool) -> tuple[Address, ...]: ...


class Step(Struct, frozen=True):
    """One way to be tried, `delay_s` after the race began."""

    path: ConnectionPath
    delay_s: float = 0.0
    address: Address | None = None
    """To be dialled; None: wait for the other peer, or go to the relay."""


class Remembered(Struct, frozen=True):
    """The best way that worked."""

    path: ConnectionPath
    at: float
    address: Address | None = None
    """What was dialled, of a direct path."""
    rtt_s: float = 0.0
    """How long that took to connect."""


def plan(
    own: Candidates,
    other: Candidates,
    *,
    calling: bool,
    allowed: Collection[ConnectionPath],
    private: bool,
    hub_rtt_s: float | None = None,
    last: Remembered | None = None,
    punch: bool = True,
    may_dial: MayDial | None = None,
) -> tuple[Step, ...]:
    """Return what to try, in the order of time. `calling` tells which end we are; `punch` whether a hole may be tried.

    `last` is what worked the last time. Both ends make their own plan, and their plans fit. `may_dial` stands in for `dialable` in tests.
    """
    may_dial = may_dial or dialable
    dialling, waiting = (
        (ConnectionPath.DIRECT, ConnectionPath.REVERSE) if calling else (ConnectionPath.REVERSE, ConnectionPath.DIRECT)
    )
    steps = [Step(dialling, 0.0, address) for address in may_dial(own, other, private=private) if dialling in allowed]
    if waiting in allowed and may_dial(other, own, private=True):
        steps.append(Step(waiting))
    if punch and ConnectionPath.PUNCHED in allowed and own.punch is not None:
        steps += [Step(ConnectionPath.PUNCHED, 0.0, hole) for hole in may_dial(own, _as_candidates(other), private=private)]
    if ConnectionPath.RELAYED in allowed:
        steps.append(Step(ConnectionPath.RELAYED, _relay_delay_s(hub_rtt_s, last) if steps else 0.0))
    return tuple(steps)


def _relay_delay_s(hub_rtt_s: float | None, last: Remembered | None) -> float:
    round_trip_s = _UNKNOWN_RTT_S if hub_rtt_s is None else hub_rtt_s
    if last is None:
        delay_s = max(round_trip_s, _LEAST_RELAY_DELAY_S)
    elif last.path is ConnectionPath.RELAYED:
        delay_s = 0.0
    else:
        delay_s = 2.0 * round_trip_s + _LITTLE_S
    return min(delay_s, _MOST_RELAY_DELAY_S)


def dialable(own: Candidates, other: Candidates, *, private: bool) -> tuple[Address, ...]:
    """Return where `own` may dial `other`, likeliest first. `private`: our owner allows private addresses."""
    if own.relay_only or other.relay_only or not 1 <= other.port <= 65535:
        return ()
    near = private and is_near(own.observed, other.observed)
    hosts = [host for host in other.private[:MAX_ADDRESSES] if near and _is_private(_parsed(host))]
    hosts.append(other.observed)
    may = dict.fromkeys(plain_host(host) for host in hosts if _may_dial(_parsed(host), near=near))
    return tuple(Address(host, other.port) for host in may)[:MAX_ADDRESSES]


def _as_candidates(other: Candidates) -> Candidates:
    """Return the other's hole as the only thing that may be dialled, if it is where the hub sees that peer."""
    if other.punch is None or plain_host(other.punch.host) != plain_host(other.observed):
        return Candidates()
    return Candidates(observed=other.observed, port=other.punch.port, relay_only=other.relay_only)


def is_near(one: str, other: str) -> bool:
    """Tell whether a hub sees two peers at the same address, or both in its own network."""
    first, second = _parsed(one), _parsed(other)
    if first is None or second is None:
        return False
    return first == second or (_is_own_network(first) and _is_own_network(second))


def _is_own_network(address: IpAddress) -> bool:
    return _is_private(address) or address.is_loopback


def _may_dial(address: IpAddress | None, *, near: bool) -> bool:
    if address is None or address.is_loopback or address.is_link_local or address.is_multicast or address.is_unspecified:
        return False
    if any(address in network for network in _NEVER if network.version == address.version):
        return False
    return near or not _is_private(address)


def _is_private(address: IpAddress | None) -> bool:
    return address is not None and any(address in network for network in _PRIVATE if network.version == address.version)


def _parsed(host: str) -> IpAddress | None:
    try:
        address = ipaddress.ip_address(host[:64])
    except ValueError:
        return None
    if isinstance(address, ipaddress.IPv6Address):
        return None if address.scope_id else address.ipv4_mapped or address
    return address


def plain_host(host: str) -> str:
    """Return an IP address as it is always written: IPv4 as such where IPv6 wraps it. "" for what is none."""
    address = _parsed(host)
    return str(address) if address is not None else ""


class PathMemory:
    """What worked, by peer, and between which routers no hole could be punched. Bounded: the oldest goes first."""

    def __init__(self) -> None:
        self._worked: dict[Sha256, Remembered] = {}
        self._unpunched: dict[tuple[str, str], float] = {}

    def best(self, peer: Sha256, *, now: float) -> Remembered | None:
        """Return the best way to a peer that worked in the last ten minutes."""
        found = self._worked.get(peer)
        return found if found is not None and now - found.at < REMEMBER_S else None

    def worked(self, peer: Sha256, path: ConnectionPath, *, now: float, address: Address | None = None, rtt_s: float = 0.0) -> None:
        """Note which way was taken."""
        _keep(self._worked, peer, Remembered(path, now, address, rtt_s))

    def worked_too(
        self, peer: Sha256, path: ConnectionPath, *, now: float, address: Address | None = None, rtt_s: float = 0.0
    ) -> None:
        """Note a way that came too late, if it is better than the one that was taken."""
        last = self.best(peer, now=now)
        if last is None or _RANK[path] < _RANK[last.path]:
            self.worked(peer, path, now=now, address=address, rtt_s=rtt_s)

    def failed(self, peer: Sha256) -> None:
        """Note that what worked does not any more."""
        self._worked.pop(peer, None)

    def may_punch(self, own: str, other: str, *, now: float) -> bool:
        """Tell whether a hole may be tried between two observed addresses."""
        failed_at = self._unpunched.get((own, other))
        return failed_at is None or now - failed_at >= REMEMBER_S

    def not_punched(self, own: str, other: str, *, now: float) -> None:
        """Note that no hole could be punched between two observed addresses."""
        _keep(self._unpunched, (own, other), now)


_RANK = {path: rank for rank, path in enumerate(ConnectionPath)}


def _keep(memory: dict, key: object, value: object) -> None:  # type: ignore[type-arg]
    memory.pop(key, None)
    memory[key] = value
    if len(memory) > _MOST_REMEMBERED:
        del memory[next(iter(memory))]
