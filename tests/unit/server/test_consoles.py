"""Consoles of jobs at the server: who may ask for one, what its worker is told, which peer it becomes for it."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from tests.unit.server.test_overlay import attempt_peer, grid, people, program, start_hub
from tests.unit.server.test_rights import narrowed

from deskgrid.client.grid import Grid
from deskgrid.client.transport import Transport
from deskgrid.core.console import RENEW_S, WANTED_S
from deskgrid.core.trust import verify_grant
from deskgrid.errors import Conflict, Forbidden, NotFound
from deskgrid.model import wire
from deskgrid.model.ids import AttemptId
from deskgrid.model.jobs import AttemptState
from deskgrid.model.machines import MachineKind, Network
from deskgrid.model.overlay import Offer, Reach, parse_service
from deskgrid.model.workers import AttemptReport
from deskgrid.server.store.attempts import worker_topic
from deskgrid.server.store.schema import attempt
from deskgrid.settings import ServerSettings
from deskgrid.testing.grids import PlayedJob, TestGrid, play_job, played_sync, running_grid

__all__ = ["grid"]


async def consoles(job: PlayedJob) -> tuple[AttemptId, ...]:
    """Return whose screen is wanted, as the job's worker is told."""
    return (await job.report(AttemptState.RUNNING)).consoles


async def wanted_for(grid: TestGrid, job: PlayedJob) -> float:
    """Return the seconds for which an attempt's screen is wanted."""
    where = attempt.c.id == job.assignment.attempt_id
    until = await grid.services.store.read(
        lambda tx: tx.value(attempt.select().with_only_columns(attempt.c.console_until).where(where))
    )
    now = await grid.services.store.read(lambda tx: tx.now)
    return (until or 0.0) - now


async def set_wanted(grid: TestGrid, job: PlayedJob, seconds: float) -> None:
    where = attempt.c.id == job.assignment.attempt_id
    await grid.services.store.write(lambda tx: tx.run(attempt.update().where(where).values(console_until=tx.now + seconds)))


async def test_wish_to_see_a_job_without_a_network_reaches_its_worker_and_is_granted_once_that_is_a_peer(grid: TestGrid):
    [ann] = await people(grid, "ann")
    hub = await start_hub(grid)
    async with Transport(await grid.worker()) as worker, program(ann) as user:
        job = await play_job(ann, worker)
        assert await consoles(job) == ()
        await user.register()
        with pytest.raises(Forbidden, match="no network"):
            await attempt_peer(job, hub)
        assert (await user.ask(f"console.job-{job.id}")).waiting_for == f"attempt 1 of job {job.id} to show its screen"
        assert await consoles(job) == (job.assignment.attempt_id,)
        asking = asyncio.create_task(user.ask(f"console.job-{job.id}", wait_s=30))
        peer = await attempt_peer(job, hub)
        answer = await asking
        assert (answer.target, answer.hub) == (peer.answer.name, hub)
        assert job.assignment.spec.machine.network is Network.NONE
        async with Grid(ann) as owner:
            assert [one.services for one in await owner.peers() if one.job_id == job.id] == [("console",)]


@pytest.mark.parametrize("network", [Network.NONE, Network.OVERLAY])
async def test_who_waits_for_a_job_that_may_not_take_part_is_told_what_is_in_the_way(tmp_path: Path, network: Network):
    settings = ServerSettings(listen="127.0.0.1:0", reserve_bytes=0, max_peers_per_user=2)
    async with running_grid(tmp_path / "server", settings) as grid:
        [ann] = await people(grid, "ann")
        async with Transport(await grid.worker()) as worker, program(ann) as user, program(ann) as other:
            job = await play_job(ann, worker, network=network)
            await user.register()
            console = f"console.job-{job.id}"
            assert ";" not in (await user.ask(console)).waiting_for
            await other.register()
            with pytest.raises(Conflict, match="2 programs and jobs"):
                await attempt_peer(job)
            told = (await user.ask(console)).waiting_for
            assert told.endswith("; 2 programs and jobs of its user take part already, and no more may")


async def test_worker_that_waits_for_news_is_woken_by_the_first_wish_only(grid: TestGrid):
    [ann] = await people(grid, "ann")
    async with Transport(await grid.worker()) as worker, program(ann) as user:
        job = await play_job(ann, worker)
        await user.register()
        topic = worker_topic(1)
        before = grid.services.live.mark(topic)
        await user.ask(f"console.job-{job.id}")
        told = grid.services.live.mark(topic)
        assert told != before
        await set_wanted(grid, job, RENEW_S - 1.0)
        await user.ask(f"console.job-{job.id}")
        assert grid.services.live.mark(topic) == told


async def test_wish_is_noted_anew_only_when_it_is_half_over_and_ends_by_itself(grid: TestGrid):
    [ann] = await people(grid, "ann")
    async with Transport(await grid.worker()) as worker, program(ann) as user:
        job = await play_job(ann, worker)
        await user.register()
        for left_s, renewed in ((RENEW_S - 1.0, True), (RENEW_S + 20.0, False), (-5.0, True)):
            await set_wanted(grid, job, left_s)
            assert bool(await consoles(job)) is (left_s > 0)
            await user.ask(f"console.job-{job.id}")
            assert (await wanted_for(grid, job) > RENEW_S + 25.0) is renewed
            assert await wanted_for(grid, job) <= WANTED_S


async def test_peer_for_a_screen_may_renew_when_the_wish_is_over_but_offers_nothing_else(grid: TestGrid):
    """An open console goes on for as long as its owner looks at it."""
    [ann] = await people(grid, "ann")
    hub = await start_hub(grid)
    async with Transport(await grid.worker()) as worker, program(ann) as user:
        job = await play_job(ann, worker)
        await user.register()
        await user.ask(f"console.job-{job.id}")
        peer = await attempt_peer(job, hub)
        await set_wanted(grid, job, -1.0)
        await peer.register(attempt_id=job.assignment.attempt_id)
        with pytest.raises(NotFound, match="offers no service ssh"):
            await user.ask(f"ssh.job-{job.id}")
        with pytest.raises(Forbidden, match="its spec does not name it"):
            await peer.ask("db.user")


async def test_job_in_the_overlay_shows_its_screen_by_the_peer_that_it_has(grid: TestGrid):
    [ann] = await people(grid, "ann")
    hub = await start_hub(grid)
    async with Transport(await grid.worker()) as worker, program(ann) as user:
        job = await play_job(ann, worker, network=Network.OVERLAY, offer=(Offer("web", 8080),))
        await user.register()
        await attempt_peer(job, hub)
        answer = await user.ask(f"console.job-{job.id}")
        public = serialization.load_pem_public_key(grid.services.authority.grant_key_pem.encode())
        assert verify_grant(answer.grant, public, now=user.answer.now).service == "console"
        assert await consoles(job) == ()


async def test_nobody_but_its_owners_programs_may_see_a_job(grid: TestGrid):
    ann, bob, eve = await people(grid, "ann", "bob", "eve")
    hub = await start_hub(grid)
    async with Transport(await grid.worker("a")) as first, Transport(await grid.worker("b")) as second:
        shared = await play_job(ann, first, network=Network.OVERLAY, offer=(Offer("web", 8080),), share=("user:bob",))
        await attempt_peer(shared, hub)
        console = f"console.job-{shared.id}"
        async with program(bob) as friend, program(eve) as stranger, program(await grid.admin()) as admin:
            for one in (friend, stranger, admin):
                await one.register()
            with pytest.raises(Forbidden, match="for its owner only"):
                await friend.ask(console)
            for one in (stranger, admin):
                with pytest.raises(NotFound, match="there is no job"):
                    await one.ask(console)
        reach = (Reach("web", parse_service(f"web.job-{shared.id}"), 80),)
        own = await attempt_peer(await play_job(ann, second, network=Network.OVERLAY, reach=reach), hub)
        with pytest.raises(Forbidden, match="only programs of its owner"):
            await own.ask(console)
        assert await consoles(shared) == ()


@pytest.mark.parametrize(
    ("rights", "sees"), [(("overlay",), False), (("overlay", "jobs:read"), False), (("overlay", "jobs"), True)]
)
async def test_token_narrowed_to_the_overlay_sees_no_screen(grid: TestGrid, rights: tuple[str, ...], sees: bool):
    [ann] = await people(grid, "ann")
    hub = await start_hub(grid)
    async with Transport(await grid.worker("a")) as worker, Transport(ann) as whole:
        job = await play_job(ann, worker, network=Network.OVERLAY)
        await attempt_peer(job, hub)
        async with program(await narrowed(whole, *rights)) as user:
            await user.register()
            if sees:
                assert (await user.ask(f"console.job-{job.id}")).grant
            else:
                with pytest.raises(Forbidden, match="needs the right: jobs"):
                    await user.ask(f"console.job-{job.id}")


async def test_job_that_is_over_or_has_no_screen_is_not_waited_for(grid: TestGrid):
    [ann] = await people(grid, "ann")
    async with Transport(await grid.worker()) as worker, program(ann) as user:
        job = await play_job(ann, worker)
        await user.register()
        async with Grid(ann) as owner:
            await owner.cancel(job.id)
        with pytest.raises(Conflict, match="is cancelled"):
            await user.ask(f"console.job-{job.id}", wait_s=30)
        assert (await worker.call(wire.SYNC, played_sync())).consoles == ()


async def test_job_that_waits_has_its_screen_asked_for_when_it_starts_and_so_has_its_next_attempt(grid: TestGrid):
    [ann] = await people(grid, "ann")
    hub = await start_hub(grid)
    async with Transport(await grid.worker("a")) as first, program(ann) as user, Grid(ann) as owner:
        job = await play_job(ann, first)
        await user.register()
        asking = asyncio.create_task(user.ask(f"console.job-{job.id}", wait_s=30))
        while not await consoles(job):
            await asyncio.sleep(0.01)
        await attempt_peer(job)  # at no hub yet
        refused = AttemptReport(attempt_id=job.assignment.attempt_id, state=AttemptState.REFUSED, reason="no")
        async with Transport(await grid.worker("b")) as second:
            await first.call(wire.SYNC, played_sync(refused))
            [again] = (await second.call(wire.SYNC, played_sync(room=True))).assignments
            later = PlayedJob((await owner.job(job.id)).job, second, again)
            while not await consoles(later):
                await asyncio.sleep(0.01)
            peer = await attempt_peer(later, hub)
            assert (await asking).target == peer.answer.name == f"attempt-2.job-{job.id}.deskgrid"


async def test_pc_whose_machines_have_no_network_at_all_is_said_to_be_the_reason(grid: TestGrid):
    [ann] = await people(grid, "ann")
    async with Transport(await grid.worker()) as worker, program(ann) as user:
        job = await play_job(ann, worker)
        report = AttemptReport(attempt_id=job.assignment.attempt_id, state=AttemptState.RUNNING)
        await worker.call(wire.SYNC, played_sync(report, networks=(Network.NONE,)))
        await user.register()
        assert "its PC's owner may not allow" in (await user.ask(f"console.job-{job.id}")).waiting_for
    assert job.assignment.spec.machine.kind is MachineKind.VM
