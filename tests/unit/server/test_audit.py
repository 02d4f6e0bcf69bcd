"""Who did what is kept with what they did, and nothing secret with it."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from deskgrid.client.grid import Grid
from deskgrid.client.transport import Transport
from deskgrid.clock import SystemClock
from deskgrid.errors import Conflict, NotFound
from deskgrid.link import hash_secret, make_secret
from deskgrid.model import wire
from deskgrid.model.ids import Sha256
from deskgrid.model.jobs import JobSpec, Machine
from deskgrid.model.machines import MachineKind
from deskgrid.model.users import AuditEntry
from deskgrid.server.app import sweep_forever
from deskgrid.server.store import audit
from deskgrid.settings import ServerSettings
from deskgrid.testing.grids import TestGrid, played_sync, running_grid


@pytest.fixture
async def grid(tmp_path: Path):
    async with running_grid(tmp_path / "server") as running:
        yield running


async def done(boss: Grid) -> list[AuditEntry]:
    return list((await boss.audit_log()).entries)


async def test_changes_of_people_are_kept_with_who_what_and_request(grid: TestGrid):
    async with Grid(await grid.admin()) as boss:
        user = await boss.add_user("ann")
        await boss.set_user("ann", weight=2.0)
        last, before, *_ = await done(boss)
        assert (last.action, last.object, last.name) == ("set_user", "user ann", "admin")
        assert msgspec.json.decode(last.detail) == {"weight": 2.0}
        assert (before.action, before.object) == ("add_user", f"user {user.id}")
        assert last.principal.startswith("user:")
        assert last.request
        assert abs(last.at - grid.services.clock.now()) < 60


async def test_login_and_join_are_kept_under_the_name_of_the_newcomer(grid: TestGrid):
    async with Grid(await grid.admin()) as boss:
        await grid.worker("lab-7")
        await grid.hub("attic")
        found = {(one.action, one.principal.partition(":")[0], one.name) for one in await done(boss)}
    assert {("login", "user", "admin"), ("join", "worker", "lab-7"), ("join_hub", "hub", "attic")} <= found
    assert ("join-link", "operator", "") in found


async def test_call_that_fails_leaves_no_entry_and_one_that_is_repeated_leaves_one(grid: TestGrid):
    async with Grid(await grid.admin()) as boss:
        await boss.add_group("hep")
        with pytest.raises(Conflict):
            await boss.add_group("hep")
        for _ in range(2):
            await boss.transport.call(wire.ADD_GROUP, wire.AddGroup(name="bio"), key="the-same")
        assert [one.action for one in await done(boss)].count("add_group") == 2


async def test_calls_of_workers_and_reading_are_not_kept(grid: TestGrid):
    async with Grid(await grid.admin()) as boss, Transport(await grid.worker()) as worker:
        before = len(await done(boss))
        await worker.call(wire.SYNC, played_sync())
        await boss.jobs()
        await boss.workers()
        assert len(await done(boss)) == before


async def test_nothing_secret_gets_into_the_log(grid: TestGrid):
    secret = make_secret()
    async with Grid(await grid.admin()) as boss:
        await boss.add_user("ann")
        token, _ = await boss.add_token(("jobs",), lifetime_s=60, label="ci")
        link = await boss.login_link("ann")
        machine = Machine(kind=MachineKind.PROCESS)
        spec = JobSpec(machine=machine, command=("run", secret), environment=(("PASSWORD", secret),))
        await boss.submit(spec)
        await boss.submit_array(spec, count=2)
        kept = msgspec.json.encode(await done(boss)).decode()
        for hidden in (secret, token, hash_secret(token), link.secret, hash_secret(link.secret)):
            assert hidden not in kept


async def test_log_is_asked_for_by_user_and_time_and_read_in_pages(grid: TestGrid):
    async with Grid(await grid.admin()) as boss:
        await boss.add_user("ann")
        async with Grid(await grid.user("ann")) as ann:
            await ann.submit(JobSpec(machine=Machine(kind=MachineKind.PROCESS), command=("true",)))
        mine = (await boss.audit_log(user="ann")).entries
        assert [one.action for one in mine] == ["submit_job", "login"]
        assert not (await boss.audit_log(since=grid.services.clock.now() + 60)).entries
        page = await boss.audit_log(limit=2)
        assert page.more
        following = await boss.audit_log(limit=2, before=page.entries[-1].id)
        assert following.entries[0].id < page.entries[-1].id


async def test_array_that_is_removed_leaves_an_entry(grid: TestGrid):
    async with Grid(await grid.admin()) as boss:
        with pytest.raises(NotFound):
            await boss.transport.call(wire.REMOVE_ARRAY, path={"array": 7})
        assert "remove_array" not in {one.action for one in await done(boss)}


async def test_old_entries_are_swept(tmp_path: Path):
    import asyncio

    settings = ServerSettings(listen="127.0.0.1:0", reserve_bytes=0, audit_s=3600.0, lease_s=0.01, sweep_s=0.01)
    clock = _Later()
    async with running_grid(tmp_path / "server", settings, clock) as grid, Grid(await grid.admin()) as boss:
        assert await done(boss)
        clock.ahead_s = 7200.0
        sweeping = asyncio.create_task(sweep_forever(grid.services))
        async with asyncio.timeout(20):
            while (await boss.audit_log()).entries:
                await asyncio.sleep(0.01)
        sweeping.cancel()


class _Later(SystemClock):
    ahead_s = 0.0

    def now(self) -> float:
        return super().now() + self.ahead_s


async def test_hostile_names_are_kept_as_text_of_one_line(grid: TestGrid):
    await grid.services.store.write(lambda tx: audit.note(tx, "user:1", "x" * 500, "a" * 99, "job\n\x1b[31m1" * 99, "d" * 5000))
    async with Grid(await grid.admin()) as boss:
        [found] = [one for one in await done(boss) if one.action.startswith("aaa")]
    assert found.object.isprintable()
    assert len(found.detail) <= 1000


async def test_reservation_is_kept_with_for_whom(grid: TestGrid):
    async with Grid(await grid.admin()) as boss, Transport(await grid.worker()) as worker:
        await boss.add_group("hep")
        await worker.call(wire.SYNC, played_sync())
        [one] = await boss.workers()
        await boss.reserve_worker(one.id, "group:hep", lifetime_s=60.0)
        assert msgspec.json.decode((await done(boss))[0].detail) == {"reserved_for": "group:hep", "lifetime_s": 60.0}
        hashed = Sha256(hash_secret("t"))
        await boss.transport.call(wire.ADD_TOKEN, wire.AddToken(token_hash=hashed, rights=("jobs",), lifetime_s=5))
        assert "rights" in (await done(boss))[0].detail
