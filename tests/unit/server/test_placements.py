"""Placements on a real server: what users may want, and what workers are told."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from tests.unit.overlay.small_grid import key_pair

from deskgrid.client.grid import Grid, describe_file
from deskgrid.client.transport import Transport
from deskgrid.clock import FakeClock
from deskgrid.errors import Conflict, DeskgridError, Forbidden, InvalidInput, NotFound
from deskgrid.link import hash_secret, make_secret
from deskgrid.model import wire
from deskgrid.model.data import Data, DataFile, DataKind, Disk, Visibility
from deskgrid.model.ids import Sha256
from deskgrid.model.jobs import JobSpec, Machine
from deskgrid.model.machines import DiskFormat, DriverName, Fingerprint, MachineKind
from deskgrid.model.placement import ALL, Attributes, CopyState, Holder
from deskgrid.model.swarm import Turn
from deskgrid.server.chores import do_chores
from deskgrid.server.store.placement import GONE_S
from deskgrid.server.torrents import make_torrents
from deskgrid.testing.grids import TestGrid, played_sync, running_grid
from deskgrid.units import GIB, MIB


class Pc:
    """A worker, played by hand, that lends room."""

    def __init__(self, transport: Transport, **profile: Any) -> None:
        self.transport = transport
        self.held: list[Sha256] = []
        self.cached: list[Sha256] = []
        self._profile = {"shares": True, "keeps_bytes": GIB, **profile}

    async def sync(self, *, cpus: int = 64, **more: Any) -> wire.SyncAnswer:
        asked = played_sync(**more)
        asked = msgspec.structs.replace(asked, free=msgspec.structs.replace(asked.free, cpus=min(cpus, asked.free.cpus)))
        profile = msgspec.structs.replace(asked.profile, **self._profile)
        return await self.transport.call(
            wire.SYNC, msgspec.structs.replace(asked, profile=profile, held=tuple(self.held), cached=tuple(self.cached))
        )

    async def obey(self) -> set[str]:
        """Call, fetch at once what is to be held, and say so; return its names."""
        answer = await self.sync()
        self.held = sorted({*self.held, *(one.content for one in answer.keep)} - set(answer.remove))
        await self.sync()
        return {one.name for one in answer.keep}


class Play:
    def __init__(self, grid: TestGrid, stack: contextlib.AsyncExitStack, clock: FakeClock, folder: Path) -> None:
        self.grid, self.clock = grid, clock
        self._stack, self._folder = stack, folder

    async def user(self, name: str = "admin") -> Grid:
        return await self._stack.enter_async_context(Grid(await self.grid.user(name)))

    async def pc(self, **profile: Any) -> Pc:
        return Pc(await self._stack.enter_async_context(Transport(await self.grid.worker())), **profile)

    async def put(self, user: Grid, name: str, **more: Any) -> Data:
        file = self._folder / name
        file.write_bytes(f"{name} {len(list(self._folder.iterdir()))}".encode())
        return await user.put(file, name, **more)

    async def later(self, seconds: float = 6.0) -> None:
        """Let what the server keeps for some seconds grow old."""
        await self.clock.advance(seconds)


@pytest.fixture
async def play(tmp_path: Path) -> AsyncIterator[Play]:
    clock = FakeClock()
    files = tmp_path / "files"
    files.mkdir()
    async with running_grid(tmp_path / "server", clock=clock) as grid, contextlib.AsyncExitStack() as stack:
        yield Play(grid, stack, clock, files)


async def test_as_many_workers_hold_data_as_are_wanted(play: Play) -> None:
    user, pcs = await play.user(), [await play.pc() for _ in range(4)]
    data = await play.put(user, "events")
    placement = await user.place("events", Attributes(replicas=2))
    assert (placement.data, placement.holders) == (1, 0)
    assert [await pc.obey() for pc in pcs] == [{"events"}, {"events"}, set(), set()]
    holders = await user.holders("events")
    assert [one.state for one in holders] == [CopyState.HELD] * 2
    [placement] = await user.placements()
    assert placement.holders == 2
    # Who holds it may fetch it, and nobody else may.
    assert (await pcs[0].transport.call(wire.GET_BLOB, path={"sha256": data.blob.sha256})) == (play._folder / "events").read_bytes()
    with pytest.raises(NotFound):
        await pcs[3].transport.call(wire.GET_BLOB, path={"sha256": data.blob.sha256})


async def test_another_takes_the_place_of_one_that_is_gone(play: Play) -> None:
    user, first, second = await play.user(), await play.pc(), await play.pc()
    await play.put(user, "events")
    await user.place("events", Attributes(replicas=1))
    assert await first.obey() == {"events"}
    assert await second.obey() == set()
    await play.later(GONE_S + 1)
    assert await second.obey() == {"events"}
    assert await first.obey() == set()  # it has it for now, and there are never more than wanted
    assert {one.state for one in await user.holders("events")} == {CopyState.HELD, CopyState.CACHED}


async def test_without_fault_tolerance_it_counts_until_it_leaves(play: Play) -> None:
    user, first, second = await play.user(), await play.pc(), await play.pc()
    await play.put(user, "events")
    await user.place("events", Attributes(replicas=1, fault_tolerant=False))
    assert await first.obey() == {"events"}
    await play.later(GONE_S + 1)
    assert await second.obey() == set()
    await first.transport.call(wire.LEAVE)
    assert await second.obey() == {"events"}


async def test_what_is_over_is_removed_and_held_by_nobody(play: Play) -> None:
    user, pc = await play.user(), await play.pc()
    await play.put(user, "events")
    await user.place("events", Attributes(replicas=1), lifetime_s=100)
    assert await pc.obey() == {"events"}
    await play.later(101)
    answer = await pc.sync()
    assert not answer.keep and len(answer.remove) == 1
    pc.held = []
    await pc.sync()
    assert await user.holders("events") == ()


async def test_data_lives_as_long_as_a_job_or_other_data(play: Play) -> None:
    user, pc = await play.user(), await play.pc()
    await play.put(user, "disk", visibility=Visibility.PRIVATE)
    await play.put(user, "events")
    job = await user.submit(JobSpec(machine=Machine(kind="process"), command=("true",)))  # type: ignore[arg-type]
    await user.place("events", Attributes(replicas=1, lives_with=f"job-{job.id}"))
    await play.put(user, "more")
    await user.place("more", Attributes(replicas=1, lives_with="data:disk"))
    assert await pc.obey() == {"events", "more"}
    await user.cancel(job.id)
    await user.remove_data("disk")
    await play.later()
    assert await pc.obey() == set()
    assert not pc.held


async def test_a_pattern_is_for_data_that_comes_later_and_a_name_goes_before_it(play: Play) -> None:
    user, first, second = await play.user(), await play.pc(tags=("lab",)), await play.pc()
    await play.put(user, "run-1")
    await user.place("run-*", Attributes(replicas=ALL))
    await user.place("run-2", Attributes(replicas=ALL, where=("tag:lab",)))
    assert await second.obey() == {"run-1"}
    await play.put(user, "run-2")
    await play.later()
    assert await first.obey() == {"run-1", "run-2"}
    assert await second.obey() == {"run-1"}


async def test_of_a_new_version_the_old_one_is_not_held_any_more(play: Play) -> None:
    user, pc = await play.user(), await play.pc()
    old = await play.put(user, "events")
    await user.place("events", Attributes(replicas=1))
    await pc.obey()
    new = await play.put(user, "events")
    assert new.version == 2
    await play.later()
    [keep] = (await pc.sync()).keep
    assert keep.content == new.blob.sha256 != old.blob.sha256
    await user.place("events@1", Attributes(replicas=1))
    assert {one.content for one in (await pc.sync()).keep} == {old.blob.sha256, new.blob.sha256}


async def test_data_follows_data_and_jobs(play: Play) -> None:
    user, first, second = await play.user(), await play.pc(), await play.pc()
    await play.put(user, "events")
    await play.put(user, "index")
    await user.place("events", Attributes(replicas=1))
    await user.place("index", Attributes(affinity="data:events"))
    assert await first.obey() == {"events"}
    assert await first.obey() == {"events", "index"}
    assert await second.obey() == set()


async def test_an_order_that_is_not_fulfilled_is_somebody_elses(play: Play) -> None:
    user, lazy, second = await play.user(), await play.pc(), await play.pc()
    await play.put(user, "events")
    await user.place("events", Attributes(replicas=1))
    assert len((await lazy.sync()).keep) == 1
    for _ in range(4):
        await play.later(600)
        await lazy.sync()
    assert await second.obey() == {"events"}


async def test_without_consent_nothing_is_to_be_held(play: Play) -> None:
    user, pc = await play.user(), await play.pc(keeps_bytes=0)
    await play.put(user, "events")
    await user.place("events", Attributes(replicas=ALL))
    assert await pc.obey() == set()


async def test_removed_placement_is_held_by_nobody_and_its_copies_stay(play: Play) -> None:
    user, pc = await play.user(), await play.pc()
    await play.put(user, "events")
    placement = await user.place("events", Attributes(replicas=1))
    await pc.obey()
    await user.remove_placement(placement.id)
    answer = await pc.sync()
    assert not answer.keep and not answer.remove
    assert [one.state for one in await user.holders("events")] == [CopyState.CACHED]
    with pytest.raises(NotFound):
        await user.remove_placement(placement.id)


async def test_placed_and_removed_are_told_as_they_happen(play: Play) -> None:
    user, pc = await play.user(), await play.pc()
    await play.put(user, "events")
    placed: asyncio.Queue[Holder] = asyncio.Queue()
    removed: asyncio.Queue[Holder] = asyncio.Queue()
    tasks = [
        asyncio.create_task(user.on_placed("events", placed.put_nowait)),
        asyncio.create_task(user.on_removed("events", removed.put_nowait)),
    ]
    try:
        placement = await user.place("events", Attributes(replicas=1))
        await pc.obey()
        holder = await asyncio.wait_for(placed.get(), 20)
        await user.remove_placement(placement.id)
        await pc.sync()
        assert (await asyncio.wait_for(removed.get(), 20)).worker_id == holder.worker_id
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def test_what_others_fetch_is_to_be_given_to_them(play: Play) -> None:
    # See tests/unit/worker/test_sharing.py for the bytes themselves.
    user, first, second = await play.user(), await play.pc(), await play.pc()
    file = play._folder / "large"
    file.write_bytes(bytes(5 << 20))
    data = await user.put(file, "large")
    assert await make_torrents(play.grid.services) == 1
    await user.place("large", Attributes(replicas=2))
    await first.obey()
    assert (await first.sync()).share == ()
    await second.sync()
    path: dict[str, object] = {"sha256": data.blob.sha256}
    await second.transport.call(wire.TAKE_TURN, Turn(port=7000), path=path)
    await play.later()
    assert (await first.sync()).share == (data.blob.sha256,)
    await second.transport.call(wire.TAKE_TURN, Turn(port=7000, have=b"\xff" * 9), path=path)
    await play.later()
    assert (await first.sync()).share == ()


async def test_workers_of_a_swarm_reach_each_others_engine_and_nobody_elses(play: Play) -> None:
    user, pcs = await play.user(), [await play.pc() for _ in range(3)]
    file = play._folder / "large"
    file.write_bytes(bytes(8 * MIB))
    data = await user.put(file, "large")
    await make_torrents(play.grid.services)
    await user.place("large", Attributes(replicas=ALL))
    peers, names = [], []
    for pc in pcs:
        await pc.sync()
        answer = await pc.transport.call(wire.REGISTER_PEER, wire.RegisterPeer(key=key_pair()[1]))
        peers.append(answer.peer_id)
        names.append(answer.name.removesuffix(".deskgrid"))
    first, second, third = pcs
    for pc in (first, second):
        answer = await pc.transport.call(wire.TAKE_TURN, Turn(port=5, joined=True), path={"sha256": data.blob.sha256})
        assert not any(one.peer for one in answer.neighbours)  # they have the same public address
    wish = wire.AskGrant(peer_id=peers[0], service=f"swarm.{names[1]}")
    assert "hub" in (await first.transport.call(wire.ASK_GRANT, wish)).waiting_for
    for service in (
        f"swarm.{names[2]}",
        f"web.{names[1]}",
        "swarm.worker-0",
        "web.user",
        "swarm.job-1",
        "swarm.worker-" + "9" * 30,
    ):
        with pytest.raises(Forbidden):
            await first.transport.call(wire.ASK_GRANT, wire.AskGrant(peer_id=peers[0], service=service))
    with pytest.raises(Forbidden):
        await third.transport.call(wire.ASK_GRANT, msgspec.structs.replace(wish, peer_id=peers[2]))
    await play.later(1000.0)
    with pytest.raises((Forbidden, NotFound)):
        await first.transport.call(wire.ASK_GRANT, wish)


async def test_of_what_no_torrent_is_made_nobody_waits_for_one(play: Play) -> None:
    user, pc = await play.user(), await play.pc()
    data = await play.put(user, "small")
    await user.place("small", Attributes(replicas=1))
    await pc.sync()
    with pytest.raises(Conflict, match="torrent"):
        await pc.transport.call(wire.TAKE_TURN, Turn(torrent=True), path={"sha256": data.blob.sha256})


@pytest.mark.parametrize(
    "attributes",
    [
        Attributes(),
        Attributes(replicas=-2),
        Attributes(replicas=1, affinity="data:"),
        Attributes(affinity="moon"),
        Attributes(replicas=1, lives_with="tag:x"),
        Attributes(replicas=1, where=("worker:x",)),
        Attributes(replicas=1, where=("moon:x",)),
        Attributes(replicas=1, max_per_worker=-1),
    ],
)
async def test_what_means_nothing_is_refused(play: Play, attributes: Attributes) -> None:
    with pytest.raises(InvalidInput):
        await (await play.user()).place("events", attributes)


async def test_names_and_lifetimes_that_mean_nothing_are_refused(play: Play) -> None:
    user = await play.user()
    for pattern in ("", "a b", "a/b", "x" * 201, "x@y"):
        with pytest.raises(InvalidInput):
            await user.place(pattern, Attributes(replicas=1))
    for lifetime_s in (-1.0, 1e300):
        with pytest.raises(DeskgridError):
            await user.place("x", Attributes(replicas=1), lifetime_s=lifetime_s)


async def test_others_see_neither_placements_nor_holders(play: Play) -> None:
    user = await play.user()
    await user.add_user("ann")
    ann = await play.user("ann")
    await play.put(user, "secret")
    await play.put(user, "shown", visibility=Visibility.PUBLIC)
    placement = await user.place("s*", Attributes(replicas=1))
    assert await ann.placements() == ()
    with pytest.raises(NotFound):
        await ann.remove_placement(placement.id)
    with pytest.raises(NotFound):
        await ann.holders("secret")
    with pytest.raises(Forbidden):
        await ann.holders("shown")


async def test_a_placement_is_for_ones_own_data_only(play: Play) -> None:
    user, pc = await play.user(), await play.pc()
    await user.add_user("ann")
    ann = await play.user("ann")
    await play.put(user, "shown", visibility=Visibility.PUBLIC)
    assert (await ann.place("*", Attributes(replicas=ALL))).data == 0
    assert await pc.obey() == set()


async def test_removed_data_is_held_by_nobody(play: Play) -> None:
    user, pc = await play.user(), await play.pc()
    await play.put(user, "events")
    await user.place("events", Attributes(replicas=1))
    await pc.obey()
    await user.remove_data("events")
    await play.later()
    assert await pc.obey() == set()


async def test_the_same_names_again_go_in_the_place_of_before(play: Play) -> None:
    user = await play.user()
    await play.put(user, "events")
    first = await user.place("events", Attributes(replicas=1))
    again = await user.place("events", Attributes(replicas=ALL))
    assert first.id == again.id and [one.attributes.replicas for one in await user.placements()] == [ALL]


async def put_disk(play: Play, user: Grid) -> Data:
    file = play._folder / "disk"
    file.write_bytes(b"disk")
    blob = describe_file(file)
    disk = Disk(sha256=blob.sha256, size_bytes=4, virtual_bytes=4, format=DiskFormat.ISO)
    return await user.put(file, "disk", kind=DataKind.DISK, disk=disk)


async def test_a_disk_that_many_jobs_wait_for_is_spread_before_they_come(play: Play) -> None:
    user, pcs = await play.user(), [await play.pc() for _ in range(3)]
    data = await put_disk(play, user)
    first = await user.submit(JobSpec(machine=Machine(disk="disk", on="worker:99")))
    await user.submit_array(JobSpec(machine=Machine(disk="disk"), after=(f"job-{first.id}",)), count=2)
    await do_chores(play.grid.services)
    await play.later()
    answers = [await pc.sync() for pc in pcs]
    assert [len(answer.fetch) for answer in answers] == [1, 1, 0]
    assert answers[0].fetch[0].ref.blob == data.blob
    # Whom it was told may fetch it, and is told again until it has it.
    assert await pcs[0].transport.call(wire.GET_BLOB, path={"sha256": data.blob.sha256}) == b"disk"
    with pytest.raises(NotFound):
        await pcs[2].transport.call(wire.GET_BLOB, path={"sha256": data.blob.sha256})
    assert len((await pcs[0].sync()).fetch) == 1
    pcs[0].cached = [data.blob.sha256]
    assert not (await pcs[0].sync()).fetch
    assert not (await pcs[2].sync()).fetch


async def test_data_of_many_jobs_is_spread_before_they_come(play: Play) -> None:
    user, pcs = await play.user(), [await play.pc(drivers=RUNS_PROCESSES) for _ in range(2)]
    data = await play.put(user, "events")
    await user.submit_array(process(data=(("e", "events"),), on="worker:99"), count=1)
    first = await user.submit(process(on="worker:99"))
    await user.submit_array(process(data=(("e", "events"),), after=(f"job-{first.id}",)), count=1)
    await do_chores(play.grid.services)
    await play.later()
    [told], nobody = [(await pc.sync()).fetch for pc in pcs]
    assert (told.ref.blob, told.content, told.ref.disk) == (data.blob, data.blob.sha256, None) and not nobody
    assert await pcs[0].transport.call(wire.GET_BLOB, path={"sha256": data.blob.sha256})
    with pytest.raises(NotFound):
        await pcs[1].transport.call(wire.GET_BLOB, path={"sha256": data.blob.sha256})


def process(*, data: tuple[tuple[str, str], ...] = (), after: tuple[str, ...] = (), on: str = "") -> JobSpec:
    return JobSpec(machine=Machine(kind=MachineKind.PROCESS, on=on), command=("run",), data=data, after=after)


RUNS_PROCESSES = (Fingerprint(driver=DriverName.PROCESS, kinds=(MachineKind.PROCESS,), usable=True),)


async def test_job_gets_the_data_that_it_names_as_it_was_then(play: Play) -> None:
    user, pc, other = await play.user(), await play.pc(drivers=RUNS_PROCESSES), await play.pc()
    data = await play.put(user, "events")
    await user.submit(process(data=(("in.root", "events"), ("again", "events@1"))))
    await play.put(user, "events")
    await user.remove_data("events@1")
    [assignment] = (await pc.sync(room=True)).assignments
    assert assignment.data == (DataFile(name="again", blob=data.blob), DataFile(name="in.root", blob=data.blob))
    assert await pc.transport.call(wire.GET_BLOB, path={"sha256": data.blob.sha256})
    with pytest.raises(NotFound):
        await other.transport.call(wire.GET_BLOB, path={"sha256": data.blob.sha256})


async def test_to_say_that_one_has_data_is_no_way_to_get_it(play: Play) -> None:
    user, liar = await play.user(), await play.pc()
    data, disk = await play.put(user, "events"), await put_disk(play, user)
    await user.submit(process(data=(("e", "events"),), on="worker:99"))
    await user.submit(JobSpec(machine=Machine(disk="disk", on="worker:99")))
    liar.held, liar.cached = [data.blob.sha256], [disk.blob.sha256]
    await liar.sync()
    for one in (data, disk):
        with pytest.raises(NotFound):
            await liar.transport.call(wire.GET_BLOB, path={"sha256": one.blob.sha256})


async def test_jobs_go_first_to_who_has_their_data(play: Play) -> None:
    user, pc = await play.user(), await play.pc(drivers=RUNS_PROCESSES)
    await play.put(user, "missing")
    there = await play.put(user, "there")
    await user.submit(process(data=(("e", "missing"),)))
    second = await user.submit(process(data=(("e", "there"),)))
    pc.held = [there.blob.sha256]
    await pc.sync()
    [assignment] = (await pc.sync(room=True, cpus=1)).assignments
    assert assignment.job_id == second.id


async def test_who_may_not_have_data_gets_no_job_with_it(play: Play) -> None:
    user = await play.user()
    await user.add_user("bob")
    bob = await play.user("bob")
    await play.put(user, "secret")
    with pytest.raises(NotFound, match=r"data\.e"):
        await bob.submit(process(data=(("e", "secret"),)))
    token = make_secret()
    request = wire.AddToken(token_hash=Sha256(hash_secret(token)), rights=("jobs",), lifetime_s=60.0)
    await user.transport.call(wire.ADD_TOKEN, request)
    async with Grid(msgspec.structs.replace(user.transport.credentials, token=token)) as jobs_only:
        await jobs_only.submit(process())
        with pytest.raises(Forbidden, match="data"):
            await jobs_only.submit(process(data=(("e", "secret"),)))


@pytest.mark.parametrize(
    "name, reference", [("", "events"), ("../x", "events"), ("a/b", "events"), ("a", ""), ("a", "run-{index}")]
)
async def test_files_of_data_have_plain_names(play: Play, name: str, reference: str) -> None:
    with pytest.raises(InvalidInput, match="data"):
        await (await play.user()).submit(process(data=((name, reference),)))


async def test_the_last_worker_that_has_something_wanted_does_not_evict_it(play: Play) -> None:
    user, first, second = await play.user(), await play.pc(), await play.pc()
    data = await put_disk(play, user)
    job = await user.submit(JobSpec(machine=Machine(disk="disk", on="worker:99")))
    await user.submit_array(JobSpec(machine=Machine(disk="disk"), after=(f"job-{job.id}",)), count=5)
    await do_chores(play.grid.services)
    first.cached = [data.blob.sha256]
    await play.later()
    assert (await first.sync()).guard == (data.blob.sha256,)
    second.cached = [data.blob.sha256]
    await second.sync()
    assert (await first.sync()).guard == ()
    await second.transport.call(wire.LEAVE)
    assert (await first.sync()).guard == (data.blob.sha256,)


async def test_who_lends_no_room_is_not_told_to_fetch(play: Play) -> None:
    user, pc = await play.user(), await play.pc(keeps_bytes=0)
    await put_disk(play, user)
    await user.submit_array(JobSpec(machine=Machine(disk="disk", on="worker:99")), count=5)
    await do_chores(play.grid.services)
    assert not (await pc.sync()).fetch
