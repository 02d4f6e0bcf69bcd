"""Matching: nothing promised twice, nobody left out, nobody's rule broken."""

from __future__ import annotations

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from deskgrid.core.matching import Ask, Person, Queue, Requirement, Share, requirement_of, suiting, suits
from deskgrid.core.matching import match as match_suiting
from deskgrid.core.shares import Standings
from deskgrid.model.data import Blob
from deskgrid.model.ids import Sha256, UserId, WorkerId
from deskgrid.model.jobs import JobSpec, Limits, Machine
from deskgrid.model.machines import DriverName, Fingerprint, MachineKind, Network
from deskgrid.model.workers import Capacity
from deskgrid.units import GIB

DISKS = [Sha256(letter * 64) for letter in "abcd"]
QEMU = Fingerprint(driver=DriverName.QEMU, kinds=(MachineKind.VM,), usable=True)
PEOPLE = {UserId(1): Person("ann", frozenset({"hep"})), UserId(2): Person("bob"), UserId(3): Person("eve", may_run=2)}
requirements = st.builds(
    Requirement,
    kind=st.just(MachineKind.VM),
    network=st.sampled_from(Network),
    cpus=st.integers(1, 4),
    memory_bytes=st.integers(1, 4).map(lambda n: n * GIB),
    disk_bytes=st.integers(0, 2).map(lambda n: n * GIB),
    disk=st.sampled_from(DISKS),
    platforms=st.sampled_from([(), ("linux-x86_64",), ("windows-x86_64",)]),
    packages=st.sampled_from([(), ("root",)]),
    on=st.sampled_from(["", "", "worker:7", "worker:8", "group:hep"]),
    driver=st.sampled_from(["", "", "qemu", "virtualbox"]),
    trust=st.sampled_from([(), (), ("user:1",), ("group:hep", "user:2"), ("user:2",)]),
    secrets=st.booleans(),
    wall_time_s=st.sampled_from([60.0, 3600.0]),
)
queues = st.lists(
    st.builds(
        Queue,
        id=st.integers(1, 20),
        class_id=st.integers(1, 5),
        owner_id=st.integers(1, 3).map(UserId),
        requirement=requirements,
        waiting=st.integers(0, 6),
        head=st.integers(1, 100),
        team=st.sampled_from(["", "hep"]),
        priority=st.integers(-2, 2),
    ),
    max_size=8,
    unique_by=lambda queue: queue.id,
)
capacities = st.builds(
    Capacity,
    cpus=st.integers(0, 8),
    memory_bytes=st.integers(0, 8).map(lambda n: n * GIB),
    disk_bytes=st.integers(0, 8).map(lambda n: n * GIB),
)
asks = st.builds(
    Ask,
    free=capacities,
    drivers=st.just((QEMU,)),
    cached=st.frozensets(st.sampled_from(DISKS)),
    worker_id=st.just(WorkerId(7)),
    platform=st.just("linux-x86_64"),
    packages=st.sampled_from([frozenset(), frozenset({"root"})]),
    owner_id=st.sampled_from([None, UserId(1)]),
    owner_groups=st.sampled_from([frozenset(), frozenset({"hep"})]),
    accepts=st.sampled_from([("everyone",), ("mine",), ("group:hep",), ("user:bob", "mine"), ()]),
    reserved_for=st.sampled_from(["", "", "group:hep", "user:bob"]),
    has_key=st.booleans(),
)


def match(
    ask: Ask, waiting: list[Queue], standings: Standings, *, limit: int, people: dict[UserId, Person] | None = None
) -> list[Share]:
    return match_suiting(ask, suiting(ask, waiting, people or {}), standings, limit=limit, people=people)


@given(asks, queues, st.floats(0, 4000))
def test_worker_for_a_time_gets_what_ends_before_it_and_nothing_else(ask: Ask, waiting: list[Queue], left_s: float):
    for_a_time = msgspec.structs.replace(ask, left_s=left_s, ahead=dict.fromkeys(range(1, 6), 2))
    short = [one for one in waiting if one.requirement.wall_time_s <= left_s]
    shares = match(for_a_time, waiting, _even(), limit=100, people=PEOPLE)
    assert shares == match(msgspec.structs.replace(for_a_time, left_s=None), short, _even(), limit=100, people=PEOPLE)


@given(st.lists(st.floats(1, 1e7), min_size=1, max_size=300))
def test_there_are_few_classes_of_wall_times_and_none_is_shorter(times: list[float]):
    spec = JobSpec(machine=Machine(kind=MachineKind.PROCESS), command=("true",))
    made = [requirement_of(msgspec.structs.replace(spec, limits=Limits(wall_time_s=one)), None).wall_time_s for one in times]
    assert len(set(made)) <= 80
    assert all(one <= rounded <= max(1.25 * one + 1, one) for one, rounded in zip(times, made, strict=True))
    assert requirement_of(spec, None).wall_time_s == 3600.0


PILOT = Ask(
    free=Capacity(cpus=1, memory_bytes=GIB, disk_bytes=GIB),
    drivers=(QEMU,),
    owner_id=UserId(1),
    owner_groups=frozenset({"hep"}),
    pilot_of=UserId(3),
    pilot_groups=frozenset({"astro"}),
)


def _of_bob(**wanted: object) -> Queue:
    need = Requirement(kind=MachineKind.VM, network=Network.NONE, cpus=1, memory_bytes=0, disk_bytes=0, **wanted)  # type: ignore[arg-type]
    return Queue(id=1, class_id=1, owner_id=UserId(2), requirement=need, waiting=1, team="astro")


def test_pilot_of_a_user_who_is_not_trusted_gets_nothing_that_wants_trust():
    bob = PEOPLE[UserId(2)]
    assert suits(PILOT, _of_bob(), bob)
    assert not suits(PILOT, _of_bob(trust=("user:1",)), bob), "the PC's owner is trusted, the pilot's user is not"
    assert not suits(PILOT, _of_bob(trust=("user:3",)), bob), "the pilot's user is trusted, the PC's owner is not"
    assert suits(PILOT, _of_bob(trust=("user:1", "user:3")), bob)
    assert suits(PILOT, _of_bob(trust=("group:hep", "group:astro")), bob)
    assert not suits(PILOT, _of_bob(pilot=True), bob), "no pilot in a pilot"


def _even() -> Standings:
    return Standings((), {}, now=0.0, half_life_s=1.0)


def _fits(queue: Queue, free: Capacity) -> bool:
    wanted = queue.requirement
    return wanted.cpus <= free.cpus and wanted.memory_bytes <= free.memory_bytes and wanted.disk_bytes <= free.disk_bytes


@given(asks, queues, st.integers(0, 20))
def test_what_is_promised_fits_suits_and_is_there(ask: Ask, waiting: list[Queue], limit: int):
    shares = match(ask, waiting, _even(), limit=limit, people=PEOPLE)
    by_id = {queue.id: queue for queue in waiting}
    taken = [(by_id[share.queue_id], share.count) for share in shares]
    assert sum(count for _, count in taken) <= limit
    assert all(0 < count <= queue.waiting and suits(ask, queue, PEOPLE[queue.owner_id]) for queue, count in taken)
    for field in ("cpus", "memory_bytes", "disk_bytes"):
        assert sum(getattr(queue.requirement, field) * count for queue, count in taken) <= getattr(ask.free, field)
    for owner_id, person in PEOPLE.items():
        assert sum(count for queue, count in taken if queue.owner_id == owner_id) <= person.may_run


@given(asks, queues)
def test_worker_is_not_left_idle_while_something_fits(ask: Ask, waiting: list[Queue]):
    shares = match(ask, waiting, _even(), limit=1, people=PEOPLE)
    fitting = [one for one in waiting if one.waiting and _fits(one, ask.free) and suits(ask, one, PEOPLE[one.owner_id])]
    assert bool(shares) == bool(fitting)


@given(asks, queues, st.dictionaries(st.integers(1, 5), st.integers(0, 5)), capacities)
def test_ahead_gives_so_many_more_of_a_class_and_no_other(ask: Ask, waiting: list[Queue], ahead: dict[int, int], free: Capacity):
    ask = msgspec.structs.replace(ask, ahead=ahead, free=free)
    by_id = {queue.id: queue for queue in waiting}
    taken: dict[int, int] = {}
    for share in match(ask, waiting, _even(), limit=100, people=PEOPLE):
        class_id = by_id[share.queue_id].class_id
        taken[class_id] = taken.get(class_id, 0) + share.count
    for class_id, count in taken.items():
        fit = max(free.cpus // by_id_of.requirement.cpus for by_id_of in waiting if by_id_of.class_id == class_id)
        assert count <= fit + ahead.get(class_id, 0)


def _queue(
    number: int,
    owner: int,
    *,
    disk: Sha256 = DISKS[0],
    data: tuple[Sha256, ...] = (),
    head: int = 1,
    waiting: int = 10,
    team: str = "",
    priority: int = 0,
) -> Queue:
    blobs = [Blob(sha256=one, size_bytes=1) for one in data]
    wanted = requirement_of(JobSpec(machine=Machine(disk="d")), disk, data=blobs)
    return Queue(number, number, UserId(owner), wanted, waiting, head, team, priority)


ROOMY = Ask(free=Capacity(cpus=8, memory_bytes=64 * GIB, disk_bytes=64 * GIB), drivers=(QEMU,))


def test_job_that_names_a_disk_of_the_pc_goes_only_where_it_is() -> None:
    wanted = requirement_of(JobSpec(machine=Machine(disk="installed:cernvm", need=("root",))), None)
    assert (wanted.disk, wanted.packages) == ("", ("installed:cernvm", "root"))


def test_users_get_equal_shares_whoever_came_first():
    assert match(ROOMY, [_queue(1, 1, head=1), _queue(2, 2, head=500)], _even(), limit=8) == [Share(1, 4), Share(2, 4)]


def test_user_with_running_attempts_waits_for_the_others():
    standings = Standings((), {("", UserId(1)): 5}, now=0.0, half_life_s=1.0)
    assert match(ROOMY, [_queue(1, 1), _queue(2, 2)], standings, limit=4) == [Share(2, 4)]


def test_users_of_a_group_share_what_one_user_alone_gets():
    waiting = [_queue(1, 1), _queue(2, 2, team="hep"), _queue(3, 3, team="hep")]
    assert {one.queue_id: one.count for one in match(ROOMY, waiting, _even(), limit=8)} == {1: 4, 2: 2, 3: 2}


def test_weight_is_how_many_times_more_one_gets():
    standings = Standings((), {}, now=0.0, half_life_s=1.0, users={UserId(1): 3.0})
    assert {one.queue_id: one.count for one in match(ROOMY, [_queue(1, 1), _queue(2, 2)], standings, limit=8)} == {1: 6, 2: 2}


def test_higher_priority_goes_first_within_a_user_only():
    waiting = [_queue(1, 1), _queue(2, 1, priority=5, head=99), _queue(3, 2)]
    assert {one.queue_id: one.count for one in match(ROOMY, waiting, _even(), limit=4)} == {2: 2, 3: 2}


def test_cached_disk_comes_first_within_a_user():
    ask = msgspec.structs.replace(ROOMY, cached=frozenset({DISKS[1]}))
    assert match(ask, [_queue(1, 1, disk=DISKS[0], head=1), _queue(2, 1, disk=DISKS[1], head=9)], _even(), limit=1) == [Share(2, 1)]


def test_jobs_of_whose_disk_and_data_least_is_missing_come_first_within_a_user():
    ask = msgspec.structs.replace(ROOMY, cached=frozenset({DISKS[0], DISKS[1]}))
    most = _queue(1, 1, disk=DISKS[0], data=(DISKS[2], DISKS[3]), head=1)
    less = _queue(2, 1, disk=DISKS[0], data=(DISKS[1], DISKS[2]), head=2)
    nothing = _queue(3, 1, disk=DISKS[0], data=(DISKS[1],), head=3)
    assert match(ask, [most, less, nothing], _even(), limit=1) == [Share(3, 1)]
    assert match(ask, [most, less], _even(), limit=1) == [Share(2, 1)]


def test_data_makes_a_class_and_takes_room_in_a_virtual_machine_only():
    blobs = [Blob(sha256=DISKS[1], size_bytes=GIB), Blob(sha256=DISKS[0], size_bytes=1), Blob(sha256=DISKS[1], size_bytes=GIB)]
    for kind, more in ((MachineKind.VM, 2 * GIB + 1), (MachineKind.PROCESS, 0)):
        spec = JobSpec(name="j", machine=Machine(disk="d", kind=kind))
        plain, wanted = requirement_of(spec, disk=None), requirement_of(spec, disk=None, data=blobs)
        assert wanted.data == tuple(sorted(DISKS[:2])) and wanted.disk_bytes == plain.disk_bytes + more


def test_job_that_asks_for_a_driver_goes_to_no_other():
    spec = JobSpec(name="j", machine=Machine(disk="d", driver="virtualbox"))
    wanted = Queue(id=1, class_id=1, owner_id=UserId(1), requirement=requirement_of(spec, disk=DISKS[0]), waiting=1)
    asking = Ask(free=Capacity(cpus=1, memory_bytes=GIB, disk_bytes=8 * GIB), drivers=(QEMU,), platform="linux-x86_64")
    box = Fingerprint(driver=DriverName.VIRTUALBOX, kinds=(MachineKind.VM,), usable=True)
    assert not suits(asking, wanted, PEOPLE[UserId(1)])
    assert suits(msgspec.structs.replace(asking, drivers=(QEMU, box)), wanted, PEOPLE[UserId(1)])


def test_unusable_driver_gets_nothing():
    broken = Fingerprint(driver=DriverName.QEMU, kinds=(MachineKind.VM,), usable=False, reason="not installed")
    assert match(msgspec.structs.replace(ROOMY, drivers=(broken,)), [_queue(1, 1)], _even(), limit=5) == []


def test_reserved_worker_serves_nobody_else():
    waiting = [_queue(1, 1), _queue(2, 2)]
    ask = msgspec.structs.replace(ROOMY, reserved_for="group:hep")
    assert [one.queue_id for one in match(ask, waiting, _even(), limit=8, people=PEOPLE)] == [1]
    assert match(msgspec.structs.replace(ask, accepts=("user:bob",)), waiting, _even(), limit=8, people=PEOPLE) == []


def test_owner_takes_only_whose_jobs_he_says():
    waiting = [_queue(1, 1), _queue(2, 2)]
    ask = msgspec.structs.replace(ROOMY, owner_id=UserId(2), accepts=("mine",))
    assert [one.queue_id for one in match(ask, waiting, _even(), limit=8, people=PEOPLE)] == [2]


SECRET = JobSpec(machine=Machine(disk="d"), secrets=("token",), trust=("mine",))


def _secret_queue(trust: tuple[str, ...], spec: JobSpec = SECRET) -> Queue:
    return Queue(1, 1, UserId(1), requirement_of(spec, DISKS[0], (), trust), 5)


@given(asks, queues)
def test_jobs_run_only_on_pcs_of_owners_that_they_trust(ask: Ask, waiting: list[Queue]):
    by_id = {queue.id: queue for queue in waiting}
    for share in match(ask, waiting, _even(), limit=50, people=PEOPLE):
        wanted = by_id[share.queue_id].requirement
        owner = {f"user:{ask.owner_id}", *(f"group:{group}" for group in ask.owner_groups)} if ask.owner_id else set()
        assert not wanted.trust or owner & set(wanted.trust)
        assert ask.has_key or not wanted.secrets


def test_a_worker_without_key_gets_no_job_with_secrets():
    queue = _secret_queue(("user:1",))
    ask = msgspec.structs.replace(ROOMY, owner_id=UserId(1))
    assert not suits(ask, queue, PEOPLE[UserId(1)])
    assert suits(msgspec.structs.replace(ask, has_key=True), queue, PEOPLE[UserId(1)])


def test_everyone_is_trusted_only_if_that_is_said():
    nobodys = msgspec.structs.replace(ROOMY, has_key=True)
    assert suits(nobodys, _secret_queue(("user:1", "everyone")), PEOPLE[UserId(1)])
    assert not suits(nobodys, _secret_queue(("user:1",)), PEOPLE[UserId(1)])
    assert not suits(msgspec.structs.replace(nobodys, owner_id=UserId(2)), _secret_queue(("user:1",)), PEOPLE[UserId(1)])


def test_a_pc_that_is_reserved_for_a_group_is_not_trusted_for_that():
    ask = msgspec.structs.replace(ROOMY, has_key=True, owner_id=UserId(3), reserved_for="group:hep")
    assert not suits(ask, _secret_queue(("group:hep",)), PEOPLE[UserId(1)])
    assert suits(msgspec.structs.replace(ask, owner_groups=frozenset({"hep"})), _secret_queue(("group:hep",)), PEOPLE[UserId(1)])


def test_jobs_that_trust_others_are_of_another_class():
    keys = {requirement_of(SECRET, DISKS[0], (), trust) for trust in (("user:1",), ("user:2",), ("user:2", "everyone"))}
    assert len(keys) == 3
    assert requirement_of(SECRET, DISKS[0], (), ("group:b", "user:1")) == requirement_of(
        SECRET, DISKS[0], (), ("user:1", "group:b")
    )
