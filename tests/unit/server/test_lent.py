"""PCs of users: whose they are, whose jobs they take, for whom they are kept; and users' parts of the grid."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from deskgrid.client.grid import Grid, join
from deskgrid.client.transport import Credentials, Transport
from deskgrid.errors import Conflict, Forbidden, InvalidInput, NotFound, Unauthenticated
from deskgrid.model import wire
from deskgrid.model.jobs import JobSpec, Machine
from deskgrid.settings import ServerSettings, WorkerSettings
from deskgrid.testing.grids import TestGrid, play_job, played_sync, running_grid
from deskgrid.worker.probe import profile_of


@pytest.fixture
async def grid(tmp_path: Path):
    settings = ServerSettings(listen="127.0.0.1:0", reserve_bytes=0, max_workers_per_user=2)
    async with running_grid(tmp_path / "server", settings) as running:
        async with Grid(await running.admin()) as boss:
            for name in ("ann", "bob"):
                await boss.add_user(name)
            await boss.add_group("hep")
            await boss.set_members("hep", add=["bob"])
        yield running


async def own_pc(grid: TestGrid, owner: Credentials) -> Credentials:
    async with Grid(owner) as user:
        return await join(await user.join_link(), "home")


async def test_pc_that_joins_by_a_users_link_is_his(grid: TestGrid):
    ann = await grid.user("ann")
    await own_pc(grid, ann)
    await grid.worker("lab")
    async with Grid(ann) as user:
        assert [(one.name, one.owner) for one in await user.workers()] == [("home", "ann"), ("lab", "")]


async def test_admin_may_make_a_link_for_a_users_pc_but_a_user_only_for_his_own(grid: TestGrid):
    async with Grid(await grid.admin()) as boss:
        await join(await boss.join_link(owner="ann"), "hers")
        await join(await boss.join_link(), "nobodys")
        assert [one.owner for one in await boss.workers()] == ["ann", ""]
        with pytest.raises(NotFound):
            await boss.join_link(owner="nobody")
    async with Grid(await grid.user("bob")) as bob:
        with pytest.raises(Forbidden):
            await bob.join_link(owner="ann")


async def test_user_has_no_more_pcs_than_the_settings_say(grid: TestGrid):
    async with Grid(await grid.user("ann")) as ann:
        link = await ann.join_link(uses=2)
        with pytest.raises(InvalidInput):
            await ann.join_link(uses=3)
        for _ in range(2):
            await join(link, "pc")
        with pytest.raises(Conflict):
            await join(await ann.join_link(), "one more")
        await ann.remove_worker((await ann.workers())[0].id)
        await join(await ann.join_link(), "instead")


async def test_pc_that_takes_its_owners_jobs_only_gets_no_other(grid: TestGrid):
    ann, bob = await grid.user("ann"), await grid.user("bob")
    async with Transport(await own_pc(grid, ann)) as pc:
        sync = played_sync(room=True)
        mine = msgspec.structs.replace(sync, profile=msgspec.structs.replace(sync.profile, accepts=("mine",)))
        async with Grid(bob) as user:
            async with Transport(await grid.worker()) as other:
                await play_job(bob, other)
            await user.submit(JobSpec(machine=Machine(disk="played")))
            assert not (await pc.call(wire.SYNC, mine)).assignments
            assert len((await pc.call(wire.SYNC, sync)).assignments) == 1


async def test_reserved_worker_takes_the_jobs_of_that_group_only_until_it_is_cleared(grid: TestGrid):
    ann, admin = await grid.user("ann"), await grid.admin()
    async with Transport(await grid.worker("first")) as first, Transport(await grid.worker("second")) as second:
        await play_job(ann, first)
        async with Grid(ann) as user, Grid(admin) as boss:
            number = (await boss.workers())[-1].id
            await boss.reserve_worker(number, "group:hep", lifetime_s=3600)
            found = next(one for one in await user.workers() if one.id == number)
            assert found.reserved_for == "group:hep"
            assert found.reserved_until is not None
            await user.submit(JobSpec(machine=Machine(disk="played")))
            assert not (await second.call(wire.SYNC, played_sync(room=True))).assignments
            await boss.reserve_worker(number, "")
            assert len((await second.call(wire.SYNC, played_sync(room=True))).assignments) == 1


@pytest.mark.parametrize("nobody", ["hep", "group:", "group:none", "user:none", "worker:1", ":x", "everyone"])
async def test_worker_is_reserved_for_somebody_who_exists(grid: TestGrid, nobody: str):
    async with Grid(await grid.admin()) as boss, Transport(await grid.worker()):
        with pytest.raises(InvalidInput):
            await boss.reserve_worker((await boss.workers())[0].id, nobody)


async def test_removed_pc_gives_its_jobs_back_and_its_token_ends(grid: TestGrid):
    ann = await grid.user("ann")
    async with Transport(await own_pc(grid, ann)) as pc, Grid(ann) as user:
        job = await play_job(ann, pc)
        await user.remove_worker((await user.workers())[0].id)
        with pytest.raises(Unauthenticated):
            await pc.call(wire.SYNC, played_sync())
        detail = await user.job(job.id)
        assert detail.job.state == "waiting"
        assert not await user.workers()
        with pytest.raises(NotFound):
            await user.remove_worker(1)


async def test_what_the_owner_says_of_his_pc_is_in_its_profile():
    settings = WorkerSettings(accepts=("mine", "group:hep"), packages=("root",))
    profile = profile_of(settings, ())
    assert (profile.accepts, profile.packages) == (("mine", "group:hep"), ("root",))


async def test_parts_and_bounds_of_users_and_groups_are_set_and_given_back(grid: TestGrid):
    async with Grid(await grid.admin()) as boss:
        user = await boss.set_user("ann", weight=2.0, max_waiting=1, max_running=0, max_bytes=1 << 30)
        assert (user.weight, user.max_waiting, user.max_running, user.max_bytes) == (2.0, 1, 0, 1 << 30)
        user = await boss.set_user("ann", max_waiting=-1)
        assert (user.weight, user.max_waiting) == (2.0, None)
        assert (await boss.set_group("hep", weight=3.0)).weight == 3.0
        assert [group.weight for group in await boss.groups()] == [3.0]
        for weight in (0.0, -1.0, 1e9):
            with pytest.raises(InvalidInput):
                await boss.set_group("hep", weight=weight)
        with pytest.raises(InvalidInput):
            await boss.set_user("ann", max_bytes=1 << 63)
        with pytest.raises(NotFound):
            await boss.set_user("nobody", weight=2.0)
