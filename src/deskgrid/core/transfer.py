"""How a blob gets to many workers at once: who fetches which pieces from the server, and who gets pieces from whom. Pure.

The members of a blob's swarm are workers that have it or fetch it. Each says again and again which pieces it has. Rules:

1. The server sends a piece that no member has, and that no other fetches just now, to one of them. They give it to each other (BitTorrent), so
   it sends each piece once, as fast as its network goes.
2. At most MOST_FEEDS members fetch from the server at the same time; the others live on what these have.
3. A member that has got nothing from others for STUCK_S is stuck: it is behind a router or a filter, or those that had the pieces have gone. It
   fetches what it lacks from the server, rare pieces first, whatever rules 1 and 2 say. So no member waits for another for ever.
4. A member counts for what `lifetime_s` says after its last word; what it fetches, for TAKEN_S. One that has all counts for much longer: it has no
   reason to call often.
5. A member is told at most MOST_NEIGHBOURS others: those at the same public address first, by their private addresses; then members that can be
   reached from anywhere; then, if it lacks something and cannot be reached itself, MOST_JOINED of those that cannot, through the overlay, if both take
   part in it. There the one with the smaller name calls, or the only one that lacks something. A member is not told of others that it cannot reach.

Sets of pieces are whole numbers, piece 0 in the lowest bit; they travel as bytes, 8 pieces each, the lowest bit first.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Sequence

from msgspec import Struct

from deskgrid.core.backoff import Chance
from deskgrid.model.swarm import Neighbour

__all__ = [
    "LONGEST_LIFETIME_S",
    "MOST_FEEDS",
    "MOST_JOINED",
    "MOST_NEIGHBOURS",
    "STUCK_S",
    "SWARM",
    "TAKEN_S",
    "Member",
    "all_pieces",
    "hand_out",
    "interval_s",
    "lifetime_s",
    "neighbours",
    "pieces_of",
    "private_addresses",
    "set_from",
    "set_to",
]

MOST_FEEDS = 8
MOST_NEIGHBOURS = 30
MOST_JOINED = 12
"""Each costs both sides a try to get through their routers."""
SWARM = "swarm"
"""The service of a worker in the overlay by which others reach its engine."""
STUCK_S = 6.0
TAKEN_S = 30.0
_CALLS_PER_S = 20.0
"""Of the members of one swarm together, those aside that fetch from the server."""
_SHORTEST_INTERVAL_S, _LONGEST_INTERVAL_S = 1.0, 60.0
LONGEST_LIFETIME_S = 3 * _LONGEST_INTERVAL_S + 10.0


class Member(Struct, frozen=True, kw_only=True):
    """A worker, or a user's program, in the swarm of a blob."""

    have: int = 0
    """Pieces that it has."""
    taken: int = 0
    """Pieces that it fetches from the server."""
    seen_at: float = 0.0
    public: str = ""
    """The address that it calls the server from."""
    private: tuple[str, ...] = ()
    """Its own private addresses, as it says."""
    reachable: bool = False
    """`public` is its own: no router is between."""
    port: int = 0
    """Where it takes others' connections; 0: nowhere."""
    peer: str = ""
    """Its name in the overlay, if it takes part."""


def hand_out(count: int, me: Member, others: Iterable[Member], *, wanted: int, stuck: bool, now: float) -> int:
    """Return which of `count` pieces a member is to fetch from the server now, at most `wanted`."""
    had = fetched = feeds = 0
    seen: list[int] = []
    for other in others:
        had |= other.have
        seen.append(other.have)
        if other.taken & ~other.have and now < other.seen_at + TAKEN_S:
            fetched |= other.taken
            feeds += 1
    lacking = all_pieces(count) & ~me.have & ~me.taken
    fresh = lacking & ~had & ~fetched
    if fresh and (feeds < MOST_FEEDS or stuck):
        return _lowest(fresh, wanted)
    if not stuck:
        return 0
    unseen = lacking & ~had
    if unseen:  # others fetch these, and may be slow: two copies are better than to wait
        return _lowest(unseen, wanted)
    return _rarest(lacking, seen, wanted)


def interval_s(members: int) -> float:
    """Return the seconds between a member's calls."""
    return min(max(members / _CALLS_PER_S, _SHORTEST_INTERVAL_S), _LONGEST_INTERVAL_S)


def lifetime_s(members: int, *, complete: bool) -> float:
    """Return for how long a silent member still counts."""
    return LONGEST_LIFETIME_S if complete else 3 * interval_s(members) + 10.0


def neighbours(me: Member, others: Sequence[Member], *, count: int, rng: Chance) -> tuple[Neighbour, ...]:
    """Return whom a member may connect to, of a blob with `count` pieces."""
    near = [one for one in others if one.port and one.public == me.public]
    far = [one for one in others if one.port and one.public != me.public and one.reachable]
    chosen = [*_shuffled(near, rng), *_shuffled(far, rng)]
    found: dict[Neighbour, None] = {}
    for one in chosen[:MOST_NEIGHBOURS]:
        addresses = (one.public,) if one.reachable else one.private
        found |= dict.fromkeys(Neighbour(address, one.port) for address in addresses)
    whole = all_pieces(count)
    if me.peer and not me.reachable and me.have != whole:
        hidden = [one for one in others if one.peer and not one.reachable and one.public != me.public]
        mine = [one for one in hidden if one.have == whole or me.peer < one.peer]
        found |= dict.fromkeys(Neighbour(peer=one.peer) for one in _shuffled(mine, rng)[:MOST_JOINED])
    return tuple(found)


def _shuffled(members: Sequence[Member], rng: Chance) -> list[Member]:
    order = [(rng.random(), at) for at in range(len(members))]
    return [members[at] for _, at in sorted(order)]


def private_addresses(addresses: Iterable[str]) -> tuple[str, ...]:
    """Return which addresses are private ones of a network: what a member says of itself must not make others call anybody else."""
    found = []
    for text in addresses:
        try:
            address = ipaddress.ip_address(text)
        except ValueError:
            continue
        if address.is_private and not (
            address.is_loopback or address.is_link_local or address.is_unspecified or address.is_multicast
        ):
            found.append(str(address))
    return tuple(found)


def all_pieces(count: int) -> int:
    """Return the set of all pieces."""
    return (1 << count) - 1


def pieces_of(pieces: int) -> list[int]:
    """Return the pieces of a set in order."""
    found = []
    while pieces:
        lowest = pieces & -pieces
        found.append(lowest.bit_length() - 1)
        pieces ^= lowest
    return found


def set_from(data: bytes, count: int) -> int:
    """Return the set that travelled as `data`; what is beyond `count` pieces is not in it."""
    return int.from_bytes(data, "little") & all_pieces(count)


def set_to(pieces: int, count: int) -> bytes:
    """Return a set as it travels."""
    return pieces.to_bytes((count + 7) // 8, "little")


def _lowest(pieces: int, wanted: int) -> int:
    chosen = 0
    while pieces and wanted > 0:
        lowest = pieces & -pieces
        chosen |= lowest
        pieces ^= lowest
        wanted -= 1
    return chosen


def _rarest(lacking: int, seen: Sequence[int], wanted: int) -> int:
    order = sorted(pieces_of(lacking), key=lambda piece: (sum(one >> piece & 1 for one in seen), piece))
    chosen = 0
    for piece in order[: max(wanted, 0)]:
        chosen |= 1 << piece
    return chosen
