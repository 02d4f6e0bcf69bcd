"""What is said of disks, and what follows for jobs: who may say it, which workers get them, what a revocation ends, what grids tell each other."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path

import msgspec
import pytest
import sqlalchemy as sa
from cryptography import x509

from deskgrid.client.grid import Grid, describe_file
from deskgrid.client.transport import Transport
from deskgrid.clock import FakeClock
from deskgrid.core.manifests import endorsers_of, read_own
from deskgrid.errors import Conflict, DeskgridError, Forbidden, InvalidInput, NotFound
from deskgrid.model import wire
from deskgrid.model.data import Data, DataKind, Delta, Disk, Visibility
from deskgrid.model.ids import Sha256
from deskgrid.model.jobs import AttemptState, JobSpec, JobState, Machine
from deskgrid.model.machines import DiskFormat
from deskgrid.model.manifests import Bundle, Manifest
from deskgrid.model.workers import Assignment, AttemptReport
from deskgrid.server.authority import authority_fingerprint
from deskgrid.server.chores import do_chores
from deskgrid.server.store import data as repository
from deskgrid.server.store import manifests, queues, storage
from deskgrid.server.store.schema import attempt, blob, manifest
from deskgrid.settings import ServerSettings
from deskgrid.testing.grids import TestGrid, played_sync, running_grid

DAY_S = 86400.0


class People:
    """An admin, ann and bob of the group hep, and eve of none, each with a way to the grid."""

    def __init__(self, grid: TestGrid, folder: Path, running: AsyncExitStack) -> None:
        self.grid, self.folder, self._running = grid, folder, running

    async def enter(self) -> People:
        self.admin = await self.open("admin")
        for name in ("ann", "bob", "eve"):
            await self.admin.add_user(name)
        await self.admin.add_group("hep")
        await self.admin.set_members("hep", add=["ann", "bob"])
        self.ann, self.bob, self.eve = [await self.open(name) for name in ("ann", "bob", "eve")]
        self.worker = await self._running.enter_async_context(Transport(await self.grid.worker(), tries=1))
        return self

    async def open(self, name: str) -> Grid:
        return await self._running.enter_async_context(Grid(await self.grid.user(name)))

    async def publish(
        self, who: Grid, name: str = "d", *, content: str = "", says: str = "", private: bool = False, **words: str
    ) -> Data:
        """Publish a disk; `says`: the sha256 that its owner says it has."""
        file = self.folder / "image"
        file.write_text(content or name)
        blob = describe_file(file)
        disk = Disk(sha256=Sha256(says or blob.sha256), size_bytes=9, virtual_bytes=9, format=DiskFormat.ISO, **words)
        visibility = Visibility.PRIVATE if private else Visibility.PUBLIC
        return await who.put(file, name, kind=DataKind.DISK, disk=disk, visibility=visibility)

    async def ask(self, *wanted: str, reports: tuple[AttemptReport, ...] = ()) -> tuple[Assignment, ...]:
        """Let a worker whose owner wants these endorsers ask for jobs."""
        request = played_sync(*reports, room=True)
        profile = msgspec.structs.replace(request.profile, endorsers=wanted)
        return (await self.worker.call(wire.SYNC, msgspec.structs.replace(request, profile=profile))).assignments


@pytest.fixture
async def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
async def people(tmp_path: Path, clock: FakeClock) -> AsyncIterator[People]:
    async with running_grid(tmp_path / "lab", clock=clock) as grid, AsyncExitStack() as running:
        yield await People(grid, tmp_path, running).enter()


def job(reference: str = "d") -> JobSpec:
    return JobSpec(machine=Machine(disk=reference))


async def test_everybody_vouches_for_himself_members_for_their_group_and_admins_for_the_grid(people: People):
    await people.publish(people.ann, os="debian 12", about="analysis")
    await people.eve.endorse_disk("d", lifetime_s=DAY_S)
    await people.bob.endorse_disk("d", "group:hep", lifetime_s=DAY_S)
    found = await people.admin.endorse_disk("d", "grid", lifetime_s=DAY_S)
    assert [(said.endorser, said.by) for said in found.manifests] == [("grid", "admin"), ("group:hep", "bob"), ("user:eve", "eve")]
    said = found.manifests[0]
    assert (said.name, said.disk, said.expires_at - said.issued_at) == ("d@1", found.data.disk, DAY_S)
    for who, endorser in ((people.eve, "grid"), (people.ann, "grid"), (people.eve, "user:ann"), (people.admin, "group:hep@cern")):
        with pytest.raises(DeskgridError, match=r"speak for|not in a group"):
            await who.endorse_disk("d", endorser, lifetime_s=DAY_S)
    with pytest.raises(InvalidInput, match="group"):
        await people.eve.endorse_disk("d", "group:hep", lifetime_s=DAY_S)
    for lifetime_s in (0.0, -1.0, 1e9, float("nan")):
        with pytest.raises(InvalidInput):
            await people.ann.endorse_disk("d", lifetime_s=lifetime_s)


async def test_who_does_not_see_a_disk_hears_nothing_of_it(people: People):
    await people.publish(people.ann, private=True)
    for call in (
        people.eve.disk("d"),
        people.eve.endorse_disk("d", lifetime_s=1),
        people.eve.revoke_disk("d", "x"),
        people.eve.disk_bundle("d"),
    ):
        with pytest.raises(NotFound):
            await call
    assert await people.eve.disks() == ()


async def test_what_was_said_is_said_anew_withdrawn_and_ends_by_itself(people: People, clock: FakeClock):
    await people.publish(people.ann)
    await people.bob.endorse_disk("d", "group:hep", lifetime_s=DAY_S)
    again = await people.ann.endorse_disk("d", "group:hep", lifetime_s=2 * DAY_S)
    assert [(said.by, said.expires_at - said.issued_at) for said in again.manifests] == [("ann", 2 * DAY_S)]
    await people.ann.endorse_disk("d", lifetime_s=DAY_S)
    with pytest.raises(Forbidden):
        await people.eve.withdraw_disk("d", "user:ann")
    assert [said.endorser for said in (await people.bob.withdraw_disk("d", "group:hep")).manifests] == ["user:ann"]
    with pytest.raises(NotFound, match="does not vouch"):
        await people.bob.withdraw_disk("d", "group:hep")
    await clock.advance(DAY_S + 1)
    assert (await people.ann.disk("d")).manifests == ()
    await clock.advance(800 * DAY_S)
    await people.grid.services.store.write(manifests.forget_expired)
    assert await people.grid.services.store.read(lambda tx: tx.rows(sa.select(manifest))) == []


async def test_disks_are_found_by_words_system_and_endorser(people: People):
    await people.publish(people.ann, "root", os="Debian 12", about="ROOT and friends")
    await people.publish(people.bob, "alpine", os="alpine 3.20", arch="aarch64")
    await people.bob.endorse_disk("root", "group:hep", lifetime_s=DAY_S)

    async def names(**wanted: str) -> list[str]:
        return [one.data.name for one in await people.eve.disks(**wanted)]

    assert await names() == ["alpine", "root"]
    assert await names(words="FRIENDS ann") == ["root"]
    assert await names(words="friends bob") == []
    assert await names(os="debian") == ["root"]
    assert await names(arch="aarch64") == ["alpine"]
    assert await names(endorser="group:hep") == ["root"]
    assert await names(endorser="grid") == []


async def test_worker_gets_jobs_only_with_disks_that_one_of_those_it_wants_vouches_for(people: People):
    await people.publish(people.ann)
    await people.ann.submit(job())
    await people.ann.endorse_disk("d", lifetime_s=DAY_S)
    assert await people.ask("grid", "group:hep") == ()
    await people.bob.endorse_disk("d", "group:hep", lifetime_s=DAY_S)
    [taken] = await people.ask("grid", "group:hep")
    authority = x509.load_pem_x509_certificate(people.grid.services.authority.pem)
    assert taken.disk is not None and taken.disk.disk is not None
    now = people.grid.services.clock.now()
    assert endorsers_of(taken.statements, taken.disk.disk.sha256, authority, now=now) == {"group:hep"}


async def test_worker_that_does_not_ask_gets_all_jobs_and_no_statements(people: People):
    await people.publish(people.ann)
    await people.ann.endorse_disk("d", lifetime_s=DAY_S)
    await people.ann.submit(job())
    [taken] = await people.ask()
    assert taken.statements == ()


async def test_endorsement_that_has_ended_brings_no_jobs(people: People, clock: FakeClock):
    await people.publish(people.ann)
    await people.ann.endorse_disk("d", lifetime_s=DAY_S)
    await people.ann.submit(job())
    await clock.advance(DAY_S)
    assert await people.ask("user:ann") == ()
    assert len(await people.ask()) == 1


async def test_answer_that_is_lost_is_given_again_with_all_that_was_in_it(people: People):
    await people.publish(people.ann)
    await people.ann.endorse_disk("d", lifetime_s=DAY_S)
    await people.ann.submit(job())
    request = played_sync(room=True)
    request = msgspec.structs.replace(request, profile=msgspec.structs.replace(request.profile, endorsers=("user:ann",)))
    answers = []
    for _ in range(2):
        headers = {wire.IDEMPOTENCY_HEADER: "once"}
        async with people.worker._request(wire.SYNC, {}, headers=headers, data=msgspec.json.encode(request)) as answer:
            answers.append(msgspec.json.decode(await answer.read(), type=wire.SyncAnswer).assignments)
    assert answers[0] == answers[1]
    assert len(answers[0][0].statements) == 1


# Revocations


async def test_revoked_disk_is_refused_waiting_jobs_fail_and_running_ones_go_on(people: People):
    await people.publish(people.ann)
    running = await people.ann.submit(job())
    [taken] = await people.ask()
    held = AttemptReport(attempt_id=taken.attempt_id, state=AttemptState.RUNNING)
    assert await people.ask(reports=(held,)) == ()
    preparing = await people.ann.submit(job())
    [other] = await people.ask(reports=(held,))
    waiting = await people.ann.submit(job())
    array = await people.ann.submit_array(job(), count=3)
    after = await people.ann.submit(msgspec.structs.replace(job(), after=(f"job-{waiting.id}",)))
    said = await people.ann.revoke_disk("d", "a hole")
    assert (said.by, said.reason) == ("ann", "a hole")
    while await do_chores(people.grid.services):
        pass
    for one in (preparing, waiting):
        found = (await people.ann.job(one.id)).job
        assert (found.state, found.message) == (JobState.FAILED, "its disk was revoked by ann: a hole")
    assert (await people.ann.job(after.id)).job.state is JobState.CANCELLED
    assert (await people.ann.array(array.id)).jobs[JobState.FAILED] == 3
    assert (await people.ann.job(running.id)).job.state is JobState.ACTIVE
    answer = await people.worker.call(
        wire.SYNC, played_sync(held, AttemptReport(attempt_id=other.attempt_id, state=AttemptState.LEASED))
    )
    assert answer.cancelled == (other.attempt_id,)
    for submitting in (
        people.ann.submit(job()),
        people.ann.submit_array(job("d@1"), count=2),
        people.ann.endorse_disk("d", lifetime_s=1),
    ):
        with pytest.raises(Conflict, match="revoked by ann: a hole"):
            await submitting
    assert (await people.ann.disk("d")).revocation == said
    # Given back, it does not start again.
    lost = msgspec.structs.replace(held, state=AttemptState.REFUSED, reason="the PC was paused")
    assert await people.ask(reports=(lost,)) == ()
    await do_chores(people.grid.services)
    assert (await people.ann.job(running.id)).job.state is JobState.FAILED


async def test_revocation_is_its_owners_and_an_admins_to_say_in_a_line(people: People):
    await people.publish(people.ann)
    with pytest.raises(Forbidden, match=r"may not"):
        await people.bob.revoke_disk("d", "because")
    for reason in ("", "two\nlines", "x" * 600):
        with pytest.raises(InvalidInput, match="why"):
            await people.admin.revoke_disk("d", reason)
    first = await people.admin.revoke_disk("d", "because")
    assert await people.ann.revoke_disk("d", "another reason") == first


async def test_who_says_that_his_disk_is_the_same_revokes_nothing_of_others(people: People):
    coming = await people.publish(people.bob, "coming", content="d", private=True)
    junk = await people.publish(people.eve, "junk", says=coming.blob.sha256)
    of_eve = await people.eve.submit(job("junk"))
    said = await people.eve.revoke_disk("junk", "because")
    assert (said.disk_sha256, said.owner) == (coming.blob.sha256, "eve")
    real = await people.publish(people.ann)
    assert real.disk is not None
    assert junk.disk is not None
    assert real.disk.sha256 == junk.disk.sha256
    await people.ann.endorse_disk("d", lifetime_s=DAY_S)
    of_ann = await people.ann.submit(job())
    await do_chores(people.grid.services)
    assert (await people.eve.job(of_eve.id)).job.state is JobState.FAILED
    assert [taken.job_id for taken in await people.ask()] == [of_ann.id]
    await do_chores(people.grid.services)
    assert (await people.ann.job(of_ann.id)).job.state is JobState.ACTIVE
    with pytest.raises(Conflict, match="revoked by eve"):
        await people.eve.submit(job("junk"))
    assert {one.data.name: one.revocation for one in await people.ann.disks()} == {"d": None, "junk": said}
    assert len((await people.ann.disk_bundle("d")).statements) == 1
    with pytest.raises(Conflict, match="eve revoked"):
        await people.eve.disk_bundle("junk")


async def test_admin_revokes_a_disk_of_another_by_name_and_everybodys_by_its_sha256(people: People):
    disk = await people.publish(people.ann)
    await people.publish(people.eve, "junk", says=disk.blob.sha256)
    assert (await people.admin.revoke_disk("junk", "malware")).owner == "eve"
    await people.ann.submit(job())
    assert (await people.admin.revoke_disk(disk.blob.sha256, "a hole")).owner == ""
    assert [one.revocation is not None for one in await people.ann.disks()] == [True, True]
    with pytest.raises(Conflict, match="a hole"):
        await people.ann.submit(job())


async def test_admin_revokes_his_own_disk_for_everybody(people: People):
    await people.publish(people.admin)
    await people.publish(people.eve, "same", content="d")
    await people.admin.revoke_disk("d", "a hole")
    with pytest.raises(Conflict, match="a hole"):
        await people.eve.submit(job("same"))


async def test_sha256_of_a_package_revokes_all_that_is_packed_so_and_only_that(people: People):
    real = await people.publish(people.ann, says="a" * 64)
    await people.publish(people.eve, "first", content="d", says="b" * 64)
    await people.publish(people.bob, "other", says="b" * 64)
    waiting = await people.ann.submit(job())
    await people.admin.revoke_disk(real.blob.sha256, "malware")
    await do_chores(people.grid.services)
    assert (await people.ann.job(waiting.id)).job.state is JobState.FAILED
    await people.publish(people.bob, "later", content="d", says="c" * 64)
    for who, name in ((people.ann, "d"), (people.eve, "first"), (people.bob, "later")):
        with pytest.raises(Conflict, match="malware"):
            await who.submit(job(name))
    assert {one.data.name for one in await people.bob.disks() if one.revocation is None} == {"other"}
    await people.bob.submit(job("other"))


async def test_job_leased_by_a_process_that_had_not_seen_the_revocation_fails_also_later(people: People, clock: FakeClock):
    store = people.grid.services.store
    await people.publish(people.ann)
    late = await people.ann.submit(job())
    seen = await store.write(queues.board)
    await people.ann.revoke_disk("d", "a hole")
    await clock.advance(0.5)
    await store.write(lambda tx: tx.memo.update(board=seen))
    [taken] = await people.ask()
    assert taken.job_id == late.id
    await people.ask(reports=(AttemptReport(attempt_id=taken.attempt_id, state=AttemptState.RUNNING),))
    await store.write(lambda tx: tx.run(sa.update(attempt).values(lease_expires_at=tx.now + 2000)))
    await clock.advance(700)
    await do_chores(people.grid.services)
    assert (await people.ann.job(late.id)).job.message == "its disk was revoked by ann: a hole"


async def test_admin_revokes_by_digest_what_is_not_here(people: People):
    said = await people.admin.revoke_disk("e" * 64, "malware")
    assert said.disk_sha256 == "e" * 64
    with pytest.raises(NotFound):
        await people.ann.revoke_disk("f" * 64, "malware")


# Other grids


async def test_grid_believes_another_that_its_admin_trusts(people: People, tmp_path: Path, clock: FakeClock):
    data = await people.publish(people.ann)
    with pytest.raises(NotFound, match="nobody here vouches"):
        await people.ann.disk_bundle("d")
    await people.bob.endorse_disk("d", "group:hep", lifetime_s=DAY_S)
    bundle = await people.eve.disk_bundle("d")
    fingerprint = authority_fingerprint(people.grid.home / "authority")
    settings = ServerSettings(listen="127.0.0.1:0", reserve_bytes=0, name="cern", trusted_grids=(f"lab={fingerprint}",))
    async with running_grid(tmp_path / "cern", settings, clock) as grid, AsyncExitStack() as running:
        here = await People(grid, tmp_path, running).enter()
        with pytest.raises(NotFound):
            await here.ann.take_bundle(bundle)
        await here.publish(here.ann, "from-lab", content="d")
        [found] = await here.ann.take_bundle(bundle)
        assert [(said.grid, said.endorser, said.by) for said in found.manifests] == [("cern", "group:hep@lab", "bob@lab")]
        assert found.manifests[0].expires_at == bundle_end(bundle)
        await here.ann.submit(job("from-lab"))
        assert await here.ask("group:hep") == ()
        assert len(await here.ask("group:hep@lab")) == 1
        with pytest.raises(NotFound):  # what others said is theirs to tell
            await here.ann.disk_bundle("from-lab")
        with pytest.raises(Forbidden):
            await here.ann.withdraw_disk("from-lab", "group:hep@lab")
        # Its news: the disk is revoked.
        await people.admin.revoke_disk(data.blob.sha256, "a hole")
        news = await people.ann.disk_bundle("d")
        with pytest.raises(Forbidden):
            await here.bob.take_bundle(news)
        [found] = await here.ann.take_bundle(news)
        assert found.revocation is not None
        assert found.revocation.reason == "a hole (admin of lab)"
        assert found.revocation.owner == "ann"
    assert data.disk is not None


def bundle_end(bundle: Bundle) -> float:
    said = read_own(bundle.statements[0])
    assert isinstance(said, Manifest)
    return said.expires_at


async def test_grid_that_trusts_nobody_and_one_that_describes_the_disk_otherwise_take_nothing(people: People, tmp_path: Path):
    await people.publish(people.ann)
    await people.ann.endorse_disk("d", lifetime_s=DAY_S)
    bundle = await people.ann.disk_bundle("d")
    with pytest.raises(Forbidden, match="does not trust"):
        await people.ann.take_bundle(bundle)
    fingerprint = authority_fingerprint(people.grid.home / "authority")
    settings = ServerSettings(listen="127.0.0.1:0", reserve_bytes=0, trusted_grids=(f"lab={fingerprint}",))
    async with running_grid(tmp_path / "other", settings, FakeClock()) as grid, AsyncExitStack() as running:
        here = await People(grid, tmp_path, running).enter()
        file = tmp_path / "image"
        file.write_text("d")
        blob = describe_file(file)
        disk = Disk(sha256=blob.sha256, size_bytes=9, virtual_bytes=10, format=DiskFormat.ISO)
        await here.ann.put(file, "d", kind=DataKind.DISK, disk=disk)
        with pytest.raises(NotFound, match="declared differently"):
            await here.ann.take_bundle(bundle)
        assert (await here.ann.disk("d")).manifests == ()
        right = await here.publish(here.ann, "right", content="d")
        assert [(one.data, len(one.manifests)) for one in await here.ann.take_bundle(bundle)] == [(right, 1)]


async def test_what_another_grid_said_earlier_does_not_take_the_place_of_what_it_said_later(
    people: People, tmp_path: Path, clock: FakeClock
):
    await people.publish(people.ann)

    async def said(lifetime_s: float) -> Bundle:
        await clock.advance(1)
        await people.bob.endorse_disk("d", "group:hep", lifetime_s=lifetime_s)
        return await people.ann.disk_bundle("d")

    first, second = await said(DAY_S), await said(700 * DAY_S)
    fingerprint = authority_fingerprint(people.grid.home / "authority")
    settings = ServerSettings(listen="127.0.0.1:0", reserve_bytes=0, trusted_grids=(f"lab={fingerprint}",))
    async with running_grid(tmp_path / "other", settings, clock) as grid, AsyncExitStack() as running:
        here = await People(grid, tmp_path, running).enter()
        await here.publish(here.ann)
        for bundle in (first, second, first):
            [found] = await here.ann.take_bundle(bundle)
        assert found.manifests[0].expires_at == bundle_end(second)
        # Withdrawn here, it does not come back, however late.
        assert (await here.admin.withdraw_disk("d", "group:hep@lab")).manifests == ()
        with pytest.raises(NotFound, match="does not vouch"):
            await here.admin.withdraw_disk("d", "group:hep@lab")
        await clock.advance(600 * DAY_S)
        await grid.services.store.write(manifests.forget_expired)
        here.ann = await here.open("ann")
        [found] = await here.ann.take_bundle(second)
        assert found.manifests == ()
        people.bob, people.ann = await people.open("bob"), await people.open("ann")
        [found] = await here.ann.take_bundle(await said(DAY_S))
        assert len(found.manifests) == 1


async def test_words_of_a_disk_are_lines(people: People):
    for words in ({"os": "a\nb"}, {"about": "x" * 201}, {"arch": "\x1b[1m"}):
        with pytest.raises(InvalidInput, match="line of text"):
            await people.publish(people.ann, **words)


# Deltas


async def publish_next(people: People, base: Data, *, content: bytes = b"delta", sent: bool = True) -> Data:
    """Publish the next version of a disk of ann's, with a delta to `base`."""
    assert base.disk is not None
    file = people.folder / "delta"
    file.write_bytes(content)
    delta = Delta(base=base.disk.sha256, blob=describe_file(file))
    if sent:
        await people.ann.transport.upload(file, delta.blob)
    image = people.folder / "image"
    image.write_text("newer" * 1000)
    sent_image = describe_file(image)
    await people.ann.transport.upload(image, sent_image)
    disk = msgspec.structs.replace(base.disk, sha256=sent_image.sha256)
    request = wire.RegisterData(name=base.name, kind=DataKind.DISK, blob=sent_image, disk=disk, delta=delta)
    return await people.ann.transport.call(wire.REGISTER_DATA, request)


async def readable(transport: Transport, sha256: str) -> bool:
    try:
        async with transport._request(wire.GET_BLOB, {"sha256": sha256}) as answer:
            await answer.read()
    except NotFound:
        return False
    return True


async def test_delta_is_told_with_the_job_and_read_by_who_may_read_the_disk(people: People):
    older = await people.publish(people.ann, private=True)
    newer = await publish_next(people, older)
    assert newer.delta is not None
    digest = newer.delta.blob.sha256
    assert await readable(people.ann.transport, digest)
    assert not await readable(people.eve.transport, digest)
    assert not await readable(people.worker, digest)
    await people.ann.submit(job())
    [taken] = await people.ask()
    assert taken.disk is not None
    assert (taken.disk.delta, taken.disk.blob) == (newer.delta, newer.blob)
    assert newer.delta.base_blob == older.blob.sha256
    assert await readable(people.worker, digest)


async def test_delta_is_kept_and_counted_as_long_as_its_disk(people: People, clock: FakeClock):
    store = people.grid.services.store
    older = await people.publish(people.ann)
    newer = await publish_next(people, older, content=bytes(1000))
    assert newer.delta is not None
    digest = newer.delta.blob.sha256

    async def unused() -> bool:
        await store.write(lambda tx: repository.forget_uploads(tx, tx.now + 1, 100))
        await store.write(lambda tx: repository.mark_unused(tx, "", 100))
        return bool(await store.read(lambda tx: tx.value(sa.select(blob.c.unused_since).where(blob.c.sha256 == digest))))

    assert not await unused()
    assert (await store.read(storage.bytes_by_user))["ann"] >= 1000
    assert (await store.read(storage.bytes_by_kind))["disks"] >= 1000
    await people.ann.remove_data("d@2")
    assert await unused()
    assert (await store.read(storage.bytes_by_user))["ann"] < 1000


async def test_delta_is_one_of_a_disk_that_its_owner_may_use_and_its_bytes_are_there(people: People):
    older = await people.publish(people.ann)
    hidden = await people.publish(people.eve, "hers", private=True)
    assert older.disk is not None
    assert hidden.disk is not None
    with pytest.raises(NotFound):
        await publish_next(people, msgspec.structs.replace(older, disk=hidden.disk))
    with pytest.raises(Conflict, match="upload them first"):
        await publish_next(people, older, content=b"not sent", sent=False)
    with pytest.raises(InvalidInput, match="larger than its disk"):
        await publish_next(people, older, content=bytes(10_000))
    file = people.folder / "notes"
    file.write_text("notes")
    notes = await people.ann.put(file, "notes")
    delta = Delta(base=older.disk.sha256, blob=notes.blob)
    with pytest.raises(InvalidInput, match="only disks have deltas"):
        await people.ann.transport.call(
            wire.REGISTER_DATA, wire.RegisterData(name="n", kind=DataKind.FILE, blob=notes.blob, delta=delta)
        )
