"""Which data is held on which workers (after BitDew's attributes: Fedak, He, Cappello 2009). Pure.

Whenever a worker calls, it is decided what that worker is to hold; nobody else is asked. To hold data is more than to have it in the cache: what
is held is not evicted. What is not held any more stays in the cache until its room is needed, so when a holder comes and goes no bytes move.

Rules, for one worker and each piece of data that is to be placed:

1. When its lifetime has ended, it is not held, and it is removed from the PC unless a job uses it.
2. It may be on the worker if the worker is one of `where`, takes jobs of the data's owner, lends room for it, and shares if `protocol` is swarm.
3. With an affinity it is held where that leads, and `replicas` does not matter.
4. With `replicas` ALL every worker that may holds it.
5. With `replicas` n it is held by n workers: by those that hold it longest. Who may and does not hold it is to, if fewer than n others hold it or
   are about to. A worker that is not heard of for long does not count if the data is fault tolerant; otherwise it counts until it leaves the grid.
   Once another has taken its place it holds nothing any more, so there are never more than n.
6. Of the data of one placement a worker holds `max_per_worker` at most, and of all data as much as its owner lends; what it holds already goes first.
7. At most MOST_NEW pieces are new at a time, and an order that is not fulfilled in ORDER_S is somebody else's.
"""

from __future__ import annotations

from collections.abc import Sequence

from msgspec import Struct

from deskgrid.core.reach import EVERYONE
from deskgrid.model.ids import DataId, Sha256, WorkerId
from deskgrid.model.placement import ALL, Attributes, Protocol

__all__ = ["MOST_NEW", "ORDER_S", "Decision", "Hold", "Host", "Wanted", "decide", "is_over", "may_hold"]

MOST_NEW = 5
ORDER_S = 1800.0


class Hold(Struct, frozen=True, order=True):
    """Another worker that holds data or is about to, and counts."""

    since: float
    worker_id: WorkerId


class Wanted(Struct, frozen=True, kw_only=True):
    """Data that is to be placed."""

    data_id: DataId
    placement_id: int
    content: Sha256
    size_bytes: int
    """That it takes on a worker."""
    owner_id: int
    owner: str
    owner_groups: frozenset[str] = frozenset()
    attributes: Attributes
    companion_is_gone: bool = False
    """That what it lives with has ended."""
    affinity_content: Sha256 | None = None
    """With an affinity to data: what that is."""


class Host(Struct, frozen=True, kw_only=True):
    """The worker that calls."""

    worker_id: WorkerId
    tags: frozenset[str] = frozenset()
    owner_id: int | None = None
    owner_groups: frozenset[str] = frozenset()
    accepts: tuple[str, ...] = (EVERYONE,)
    shares: bool = False
    lends_bytes: int = 0
    """That held data may take."""
    holds: dict[DataId, float] = {}
    """What it holds or is about to, with the time since when."""
    has: frozenset[Sha256] = frozenset()
    """Contents in its cache."""
    works: frozenset[str] = frozenset()
    """The jobs that it has leased and the arrays of which they are, as in job-42 and array-7."""


class Decision(Struct, frozen=True):
    """What a worker is to hold, and what to remove."""

    hold: tuple[Wanted, ...]
    remove: tuple[Wanted, ...]
    """Whose lifetime has ended, of what it has."""


def decide(host: Host, wanted: Sequence[Wanted], others: dict[DataId, Sequence[Hold]], *, now: float) -> Decision:
    """Return what a worker is to hold of `wanted`. `others`: the other workers that count, for data with a number of replicas."""
    remove = tuple(one for one in wanted if is_over(one, now=now) and (one.data_id in host.holds or one.content in host.has))
    lasting = [one for one in wanted if not is_over(one, now=now) and may_hold(host, one)]
    # What it holds goes first, then what it has already, for that costs nothing; then the rest as it comes.
    lasting.sort(key=lambda one: (one.data_id not in host.holds, one.content not in host.has))
    hold: list[Wanted] = []
    room_bytes, new = host.lends_bytes, 0
    of_placement: dict[int, int] = {}
    for one in lasting:
        most = one.attributes.max_per_worker
        is_new = one.data_id not in host.holds
        if (most and of_placement.get(one.placement_id, 0) >= most) or one.size_bytes > room_bytes:
            continue
        if (is_new and new >= MOST_NEW) or not _is_its_turn(host, one, others.get(one.data_id, ()), now=now):
            continue
        hold.append(one)
        room_bytes -= one.size_bytes
        new += is_new
        of_placement[one.placement_id] = of_placement.get(one.placement_id, 0) + 1
    return Decision(tuple(hold), remove)


def is_over(one: Wanted, *, now: float) -> bool:
    """Tell whether the lifetime of data has ended."""
    expires_at = one.attributes.expires_at
    return one.companion_is_gone or (expires_at is not None and expires_at <= now)


def may_hold(host: Host, one: Wanted) -> bool:
    """Tell whether data may be on a worker at all."""
    attributes = one.attributes
    return (
        (not attributes.where or any(_is_at(host, place) for place in attributes.where))
        and _accepts(host, one)
        and one.size_bytes <= host.lends_bytes
        and (host.shares or attributes.protocol is not Protocol.SWARM)
    )


def _is_at(host: Host, place: str) -> bool:
    kind, _, name = place.partition(":")
    if kind == "tag":
        return name in host.tags
    if kind == "group":
        return name in host.owner_groups
    return kind == "worker" and name == str(host.worker_id)


def _accepts(host: Host, one: Wanted) -> bool:
    for rule in host.accepts:
        kind, _, name = rule.partition(":")
        if (
            rule == EVERYONE
            or (rule == "mine" and host.owner_id is not None and host.owner_id == one.owner_id)
            or (kind == "user" and name == one.owner)
            or (kind == "group" and name in one.owner_groups)
        ):
            return True
    return False


def _is_its_turn(host: Host, one: Wanted, others: Sequence[Hold], *, now: float) -> bool:
    attributes = one.attributes
    if attributes.affinity:
        kind, _, name = attributes.affinity.partition(":")
        if kind == "tag":
            return name in host.tags
        if kind != "data":
            return attributes.affinity in host.works
        return one.affinity_content is not None and one.affinity_content in host.has
    if attributes.replicas == ALL:
        return True
    since = host.holds.get(one.data_id, now)
    mine = Hold(since, host.worker_id)
    is_holder = one.data_id in host.holds
    before = sum(other < mine for other in others) if is_holder else len(others)
    return before < attributes.replicas
