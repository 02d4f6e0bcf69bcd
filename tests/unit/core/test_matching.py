"""Matching: nothing promised twice, nobody left out."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from deskgrid.core.matching import Ask, Queue, Requirement, match, requirement_of
from deskgrid.model.ids import Sha256, UserId
from deskgrid.model.jobs import JobSpec, Machine
from deskgrid.model.machines import DriverName, Fingerprint, MachineKind, Network
from deskgrid.model.workers import Capacity
from deskgrid.units import GIB

DISKS = [Sha256(letter * 64) for letter in "abc"]
QEMU = Fingerprint(driver=DriverName.QEMU, kinds=(MachineKind.VM,), usable=True)
requirements = st.builds(
    Requirement,
    kind=st.just(MachineKind.VM),
    network=st.sampled_from(Network),
    cpus=st.integers(1, 4),
    memory_bytes=st.integers(1, 4).map(lambda n: n * GIB),
    disk_bytes=st.integers(0, 2).map(lambda n: n * GIB),
    disk=st.sampled_from(DISKS),
)
queues = st.lists(
    st.builds(
        Queue,
        class_id=st.integers(1, 5),
        owner_id=st.integers(1, 3).map(UserId),
        requirement=requirements,
        waiting=st.integers(0, 6),
        oldest=st.integers(1, 100),
    ),
    max_size=8,
    unique_by=lambda queue: (queue.class_id, queue.owner_id),
)
asks = st.builds(
    Ask,
    free=st.builds(
        Capacity,
        cpus=st.integers(0, 8),
        memory_bytes=st.integers(0, 8).map(lambda n: n * GIB),
        disk_bytes=st.integers(0, 8).map(lambda n: n * GIB),
    ),
    drivers=st.just((QEMU,)),
    cached=st.frozensets(st.sampled_from(DISKS)),
)


@given(asks, queues, st.integers(0, 20))
def test_what_is_promised_fits_and_is_there(ask: Ask, waiting: list[Queue], limit: int):
    shares = match(ask, waiting, {}, limit=limit)
    by_key = {(queue.class_id, queue.owner_id): queue for queue in waiting}
    taken = [(by_key[share.class_id, share.owner_id], share.count) for share in shares]
    assert sum(count for _, count in taken) <= limit
    assert all(0 < count <= queue.waiting for queue, count in taken)
    assert all(queue.requirement.network is Network.NONE for queue, _ in taken)
    for field in ("cpus", "memory_bytes", "disk_bytes"):
        assert sum(getattr(queue.requirement, field) * count for queue, count in taken) <= getattr(ask.free, field)


@given(asks, queues)
def test_worker_is_not_left_idle_while_something_fits(ask: Ask, waiting: list[Queue]):
    shares = match(ask, waiting, {}, limit=1)
    fitting = [
        queue
        for queue in waiting
        if queue.waiting
        and queue.requirement.network is Network.NONE
        and queue.requirement.cpus <= ask.free.cpus
        and queue.requirement.memory_bytes <= ask.free.memory_bytes
        and queue.requirement.disk_bytes <= ask.free.disk_bytes
    ]
    assert bool(shares) == bool(fitting)


def _queue(class_id: int, owner: int, *, disk: Sha256 = DISKS[0], oldest: int = 1, waiting: int = 10) -> Queue:
    wanted = requirement_of(JobSpec(machine=Machine(disk="d")), disk)
    return Queue(class_id, UserId(owner), wanted, waiting, oldest)


ROOMY = Ask(Capacity(cpus=8, memory_bytes=64 * GIB, disk_bytes=64 * GIB), (QEMU,), frozenset())


def test_users_get_equal_shares_whoever_came_first():
    shares = match(ROOMY, [_queue(1, 1, oldest=1), _queue(1, 2, oldest=500)], {}, limit=8)
    assert {share.owner_id: share.count for share in shares} == {1: 4, 2: 4}


def test_user_with_running_attempts_waits_for_the_others():
    shares = match(ROOMY, [_queue(1, 1), _queue(1, 2)], {UserId(1): 5}, limit=4)
    assert {share.owner_id: share.count for share in shares} == {2: 4}


def test_cached_disk_comes_first_within_a_user():
    ask = Ask(ROOMY.free, ROOMY.drivers, frozenset({DISKS[1]}))
    shares = match(ask, [_queue(1, 1, disk=DISKS[0], oldest=1), _queue(2, 1, disk=DISKS[1], oldest=9)], {}, limit=1)
    assert [share.class_id for share in shares] == [2]


def test_unusable_driver_gets_nothing():
    broken = Fingerprint(driver=DriverName.QEMU, kinds=(MachineKind.VM,), usable=False, reason="not installed")
    assert match(Ask(ROOMY.free, (broken,), frozenset()), [_queue(1, 1)], {}, limit=5) == []
