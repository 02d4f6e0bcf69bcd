"""Which waiting jobs a worker gets: by requirement class, in fair order over groups and users.

Waiting jobs are counted per queue: one requirement class, user, group and priority. A worker's ask is matched with the queues, so the
work does not depend on how many jobs wait. Rules:

1. A queue suits a worker if a usable driver of it runs that kind of machine in that network, its platform and packages are right, its owner
   takes such a user's jobs, one whom he asks for vouches for the disk (core/manifests.py), and nobody else has reserved it. If the jobs say whose
   PCs they trust, its owner is one of those; if they have secrets, it has a key to which these can be sealed.
2. Among queues that suit and fit into what is free, the order is: the group or user that has used least (core/shares.py), the higher
   priority, those of whose disk and data the least is missing in the worker's cache, the one whose next job was submitted first.
3. A worker that is one for a time gets no job whose wall time is longer than what is left of that.
4. Nothing is promised twice: each job taken lessens what is free, and the user's quota of running jobs.
5. A worker that ends many jobs of a class a second gets some more than fit at once, as many as it asks for (`ahead`): they wait there.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from msgspec import Struct

from deskgrid.core.manifests import is_accepted
from deskgrid.core.reach import EVERYONE
from deskgrid.core.sealing import is_sealing_key
from deskgrid.core.shares import Standings
from deskgrid.model.data import Blob
from deskgrid.model.ids import Sha256, UserId, WorkerId
from deskgrid.model.jobs import JobSpec, Limits
from deskgrid.model.machines import Fingerprint, MachineKind, Network
from deskgrid.model.workers import Capacity, Profile
from deskgrid.units import GIB

__all__ = [
    "Ask",
    "Person",
    "Queue",
    "Requirement",
    "Share",
    "ask_of",
    "fits",
    "match",
    "need_of",
    "requirement_of",
    "runs",
    "suiting",
    "suits",
    "without",
]

_SCRATCH_PROMISE_BYTES = GIB
_USUAL_S, _STEP = Limits().wall_time_s, 1.25


class Requirement(Struct, frozen=True, order=True, omit_defaults=True):
    """What a job needs of a worker; jobs with equal requirements form a class."""

    kind: MachineKind
    network: Network
    cpus: int
    memory_bytes: int
    disk_bytes: int
    disk: Sha256 = Sha256("")
    """The unpacked disk; empty for a process."""
    disk_owner: int = 0
    """Whose disk it is: he may revoke his, not those of others that say they are the same."""
    platforms: tuple[str, ...] = ()
    """OS-ARCH; empty: any."""
    packages: tuple[str, ...] = ()
    on: str = ""
    """worker:NUMBER or group:NAME, or empty."""
    driver: str = ""
    """Empty: any."""
    trust: tuple[str, ...] = ()
    """Owners of PCs: user:NUMBER or group:NAME. Empty: everyone."""
    secrets: bool = False
    """The jobs have secrets."""
    data: tuple[Sha256, ...] = ()
    """Blobs that the jobs find as files."""
    pilot: bool = False
    """The jobs are pilots: none runs in another one."""
    wall_time_s: float = _USUAL_S
    """How long one may take, rounded up: each value is a class."""


class Queue(Struct, frozen=True):
    """The waiting jobs of one class, user, group and priority; an array has its own."""

    id: int
    class_id: int
    owner_id: UserId
    requirement: Requirement
    waiting: int
    head: int = 0
    """No job with a smaller id waits in it; the smaller one goes first."""
    team: str = ""
    priority: int = 0
    endorsers: frozenset[str] = frozenset()
    """Who vouches for the disk."""


class Ask(Struct, frozen=True, kw_only=True):
    """What a worker offers."""

    free: Capacity
    drivers: tuple[Fingerprint, ...]
    cached: frozenset[Sha256] = frozenset()
    """Disks and data that it has."""
    ahead: Mapping[int, int] = {}
    """Of these classes, so many jobs more than fit."""
    worker_id: WorkerId = WorkerId(0)
    platform: str = ""
    packages: frozenset[str] = frozenset()
    owner_id: UserId | None = None
    """The user whose PC it is."""
    owner_groups: frozenset[str] = frozenset()
    pilot_of: UserId | None = None
    """Of a pilot: whose it is. It gets what he may see: his own jobs and those done for `pilot_groups`."""
    pilot_groups: frozenset[str] = frozenset()
    accepts: tuple[str, ...] = ("everyone",)
    endorsers: tuple[str, ...] = ()
    """One of them must vouch for a disk; none: no matter who."""
    reserved_for: str = ""
    """user:NAME or group:NAME, or empty."""
    has_key: bool = False
    """Secrets can be sealed to it."""
    left_s: float | None = None
    """How long it is a worker yet; None: no bound."""


def ask_of(profile: Profile, free: Capacity, **more: Any) -> Ask:
    """Return the ask of a worker with this profile; `more` are fields of Ask that its profile does not say."""
    return Ask(
        free=free,
        drivers=profile.drivers,
        platform=f"{profile.os}-{profile.arch}",
        packages=frozenset(profile.packages),
        accepts=profile.accepts,
        endorsers=profile.endorsers,
        has_key=is_sealing_key(profile.secrets_key),
        **more,
    )


class Share(Struct, frozen=True):
    """Take `count` jobs of a queue, the oldest first."""

    queue_id: int
    count: int


class Person(Struct, frozen=True):
    """What matching must know of a user with waiting jobs."""

    name: str = ""
    groups: frozenset[str] = frozenset()
    may_run: int = 1 << 62
    """Jobs that he may have running besides those that are."""


_NOBODY = Person()


def need_of(spec: JobSpec, data: Iterable[Blob] = ()) -> Capacity:
    """Return what a job takes of a worker's bounds while it runs. `data`: what its spec's is.

    A scratch disk is sparse: of its size only the first GiB is promised. A job that writes more gets it while the owner's
    bound allows it.
    """
    machine = spec.machine
    return Capacity(
        cpus=machine.cpus,
        memory_bytes=machine.memory_bytes,
        # A virtual machine has a copy of its data on its context disk; others see what is in the cache.
        disk_bytes=min(machine.scratch_bytes, _SCRATCH_PROMISE_BYTES)
        + (sum(one.size_bytes for one in data) if machine.kind is MachineKind.VM else 0),
    )


def requirement_of(
    spec: JobSpec,
    disk: Sha256 | None,
    platforms: tuple[str, ...] = (),
    trust: tuple[str, ...] = (),
    *,
    disk_owner: int = 0,
    data: Iterable[Blob] = (),
) -> Requirement:
    """Return the class key of a job; `platforms`: those that its app has files for, if it has an app; `trust`: the spec's, with users by
    number: a class is shared between users, and a name may be somebody else's one day; `data`: what its spec's is."""
    blobs = list(data)
    need = need_of(spec, blobs)
    machine = spec.machine
    return Requirement(
        kind=machine.kind,
        network=machine.network,
        cpus=need.cpus,
        memory_bytes=need.memory_bytes,
        disk_bytes=need.disk_bytes,
        disk=disk or Sha256(""),
        disk_owner=disk_owner,
        platforms=tuple(sorted(platforms or machine.platforms)),
        packages=tuple(sorted({*machine.need, *((machine.disk,) if machine.installed_disk else ())})),
        on=machine.on,
        driver=machine.driver,
        trust=() if EVERYONE in trust else tuple(sorted(set(trust))),
        secrets=bool(spec.secrets),
        data=tuple(sorted({one.sha256 for one in blobs})),
        pilot=spec.pilot,
        wall_time_s=_rounded_up(spec.limits.wall_time_s),
    )


def _rounded_up(wall_time_s: float) -> float:
    """Return the next of the few wall times of which there are classes; the usual one is one of them."""
    steps = math.ceil(math.log(max(wall_time_s, 1.0) / _USUAL_S, _STEP) - 1e-9)
    return max(wall_time_s, float(math.ceil(_USUAL_S * _STEP**steps)))


def match(
    ask: Ask,
    queues: Sequence[Queue],
    standings: Standings,
    *,
    limit: int,
    people: Mapping[UserId, Person] | None = None,
) -> list[Share]:
    """Return which jobs the worker gets of queues that suit it, at most `limit` in all. `standings` is brought up to date with them."""
    people = people or {}
    taking = _Taking(ask, people)
    lines = _lines(ask, queues)
    order = [(*standings.order(*key), key) for key in lines]
    heapq.heapify(order)
    while order and taking.count < limit and taking.has_room():
        *then, key = heapq.heappop(order)
        now = standings.order(*key)
        if now > tuple(then):  # others of his group have got something since
            heapq.heappush(order, (*now, key))
            continue
        queue = taking.first_of(lines[key])
        if queue is None:
            continue  # nothing of his fits: he is out for this ask
        taking.take(queue)
        standings.take(*key, queue.requirement.cpus)
        heapq.heappush(order, (*standings.order(*key), key))
    return [Share(queue_id, count) for queue_id, count in taking.taken.items()]


def _lines(ask: Ask, queues: Sequence[Queue]) -> dict[tuple[str, UserId], list[Queue]]:
    """Return the queues of which a job fits by group and user, each line in the order in which they go."""
    lines: dict[tuple[str, UserId], list[Queue]] = {}
    for queue in queues:
        has_time = ask.left_s is None or queue.requirement.wall_time_s <= ask.left_s
        if queue.waiting > 0 and has_time and (fits(queue.requirement, ask.free) or ask.ahead.get(queue.class_id, 0) > 0):
            lines.setdefault((queue.team, queue.owner_id), []).append(queue)
    for line in lines.values():
        line.sort(
            key=lambda queue: (
                -queue.priority,
                _missing(queue.requirement, ask.cached),
                queue.head,
            )
        )
    return lines


def _missing(wanted: Requirement, cached: frozenset[Sha256]) -> int:
    """Return how many of the disk and the data of a class are not in a cache."""
    return sum(bool(one) and one not in cached for one in (wanted.disk, *wanted.data))


class _Taking:
    """What is left of an ask while jobs are taken."""

    def __init__(self, ask: Ask, people: Mapping[UserId, Person]) -> None:
        self._free = ask.free
        self._ahead = dict(ask.ahead)
        self._people = people
        self._of_user: dict[UserId, int] = {}
        self.taken: dict[int, int] = {}
        self.count = 0

    def has_room(self) -> bool:
        """Tell whether anything could fit at all: every job needs a CPU."""
        return self._free.cpus > 0 or any(number > 0 for number in self._ahead.values())

    def first_of(self, line: list[Queue]) -> Queue | None:
        """Return the first queue that has a job which fits; what does not fit now will not fit later in this ask, so it goes."""
        while line:
            queue = line[0]
            left = queue.waiting - self.taken.get(queue.id, 0)
            may_run = self._people.get(queue.owner_id, _NOBODY).may_run - self._of_user.get(queue.owner_id, 0)
            if left > 0 and may_run > 0 and (fits(queue.requirement, self._free) or self._ahead.get(queue.class_id, 0) > 0):
                return queue
            line.pop(0)
        return None

    def take(self, queue: Queue) -> None:
        if fits(queue.requirement, self._free):
            self._free = without(self._free, [_needed(queue.requirement)])
        else:
            self._ahead[queue.class_id] -= 1
        self._of_user[queue.owner_id] = self._of_user.get(queue.owner_id, 0) + 1
        self.taken[queue.id] = self.taken.get(queue.id, 0) + 1
        self.count += 1


def suiting(ask: Ask, queues: Iterable[Queue], people: Mapping[UserId, Person]) -> list[Queue]:
    """Return the queues whose jobs a worker may run at all. That depends on what it is, not on what is free."""
    return [queue for queue in queues if suits(ask, queue, people.get(queue.owner_id, _NOBODY))]


def runs(driver: Fingerprint, kind: MachineKind, network: Network, name: str) -> bool:
    """Tell whether a driver runs machines of a kind in a network; `name` is the driver that the job asks for, or empty."""
    return driver.usable and kind in driver.kinds and network in driver.networks and name in ("", driver.driver)


def suits(ask: Ask, queue: Queue, person: Person) -> bool:
    """Tell whether a worker may run the jobs of a queue at all, whatever is free."""
    wanted = queue.requirement
    return (
        any(runs(driver, wanted.kind, wanted.network, wanted.driver) for driver in ask.drivers)
        and (not wanted.platforms or ask.platform in wanted.platforms)
        and ask.packages.issuperset(wanted.packages)
        and _is_meant(ask, wanted.on)
        and (not wanted.disk or is_accepted(ask.endorsers, queue.endorsers))
        and (not wanted.trust or _is_trusted(ask, queue))
        and (ask.has_key or not wanted.secrets)
        and (ask.pilot_of in (None, queue.owner_id) or queue.team in ask.pilot_groups)
        and (ask.pilot_of is None or not wanted.pilot)
        and _accepts(ask, queue, person)
    )


def _is_meant(ask: Ask, on: str) -> bool:
    kind, _, name = on.partition(":")
    if kind == "worker":
        return name == str(ask.worker_id)
    return not on or name in ask.owner_groups or ask.reserved_for == on


def _is_trusted(ask: Ask, queue: Queue) -> bool:
    """Tell whether the owner of a PC is trusted, and whoever runs a pilot on it; of a PC whose owner nobody said, nobody knows that."""
    if ask.pilot_of not in (None, queue.owner_id) and not _is_named(ask.pilot_of, ask.pilot_groups, queue):
        return False
    return _is_named(ask.owner_id, ask.owner_groups, queue)


def _is_named(user_id: UserId | None, groups: frozenset[str], queue: Queue) -> bool:
    trust = queue.requirement.trust
    return user_id is not None and (f"user:{user_id}" in trust or any(f"group:{group}" in trust for group in groups))


def _accepts(ask: Ask, queue: Queue, person: Person) -> bool:
    mine = queue.owner_id == (ask.pilot_of if ask.pilot_of is not None else ask.owner_id)
    if ask.reserved_for and not (_names(ask.reserved_for, queue, person)):
        return False
    return any(rule == "everyone" or (rule == "mine" and mine) or _names(rule, queue, person) for rule in ask.accepts)


def _names(rule: str, queue: Queue, person: Person) -> bool:
    """Tell whether user:NAME is this user, or group:NAME a group of his."""
    kind, _, name = rule.partition(":")
    return (kind == "user" and name == person.name) or (kind == "group" and name in person.groups)


def fits(wanted: Requirement, free: Capacity) -> bool:
    """Tell whether a job fits into what is free."""
    return wanted.cpus <= free.cpus and wanted.memory_bytes <= free.memory_bytes and wanted.disk_bytes <= free.disk_bytes


def _needed(wanted: Requirement) -> Capacity:
    return Capacity(cpus=wanted.cpus, memory_bytes=wanted.memory_bytes, disk_bytes=wanted.disk_bytes)


def without(free: Capacity, needs: Iterable[Capacity]) -> Capacity:
    """Return what is left of `free` once all needs are met."""
    for need in needs:
        free = Capacity(
            cpus=free.cpus - need.cpus,
            memory_bytes=free.memory_bytes - need.memory_bytes,
            disk_bytes=free.disk_bytes - need.disk_bytes,
        )
    return free
