"""What every store must do. A test class per store inherits from StoreContract and gives it a `store` fixture.

The random history plays workers and users against a store and, step by step, against core/lifecycle.py: the two must agree.
"""

from __future__ import annotations

import asyncio
import random
from functools import partial
from typing import Any

import msgspec
import pytest
import sqlalchemy as sa

from deskgrid.core.lifecycle import FINAL_JOB_STATES, LIVE_STATES, AttemptEvent, Tally, applies, job_state
from deskgrid.core.submission import MOST_DATA_FILES
from deskgrid.core.tes import KeptTask
from deskgrid.errors import Conflict, NotFound, Unauthenticated
from deskgrid.link import hash_secret
from deskgrid.model.data import Blob, DataFile, DataRef, Disk
from deskgrid.model.ids import ArrayId, AttemptId, JobId, Sha256, UserId, WorkerId
from deskgrid.model.jobs import Array, ArrayState, AttemptState, Job, JobSpec, JobState, Limits, Machine
from deskgrid.model.machines import DiskFormat, Network
from deskgrid.model.overlay import Offer, PeerKind, Reach, attempt_peer, parse_service, user_peer
from deskgrid.model.tes import TesTask
from deskgrid.model.users import Role
from deskgrid.model.wire import AskGrant, PeerOffer
from deskgrid.model.workers import Assignment
from deskgrid.server.grants import Waiting, Way, find_way
from deskgrid.server.store import accounts, attempts, data, hubs, jobs, peers, queues, retention, submissions, tasks, workers
from deskgrid.server.store.accounts import Caller
from deskgrid.server.store.attempts import Outcome
from deskgrid.server.store.engine import Store, Transaction
from deskgrid.server.store.peers import NewPeer
from deskgrid.server.store.schema import attempt, job, peer, submission, team
from deskgrid.server.store.submissions import NewSubmission

__all__ = ["StoreContract"]

_DISK_SHA = Sha256("d" * 64)
_DISK = DataRef(
    blob=Blob(sha256=_DISK_SHA, size_bytes=1),
    disk=Disk(sha256=_DISK_SHA, size_bytes=1, virtual_bytes=1, format=DiskFormat.ISO),
)
_SPEC = JobSpec(machine=Machine(disk="d"), limits=Limits(attempts=2, max_lost=3))
_NETWORKED = JobSpec(
    machine=Machine(
        disk="d", network=Network.OVERLAY, offer=(Offer("web", 80),), reach=(Reach("site", parse_service("site.user"), 80),)
    )
)
_PEER_S = 900.0


async def _people(store: Store) -> tuple[Caller, WorkerId]:
    def add(tx: Transaction) -> tuple[Caller, WorkerId]:
        user = accounts.add_account(tx, "ann", admin=False)
        return Caller(Role.USER, "ann", user_id=user.id), workers.add_worker(tx, "pc")

    return await store.write(add)


async def _unused(store: Store, clock: Any) -> list[Sha256]:
    """Return the blobs that can be removed once nothing has referred to them for long enough."""
    await store.write(lambda tx: data.mark_unused(tx, "", 100))
    assert await store.write(lambda tx: data.claim_unused(tx, 100)) == []
    await clock.advance(data.REMOVAL_WAIT_S)
    return await store.write(lambda tx: data.claim_unused(tx, 100))


async def _submit(store: Store, caller: Caller, spec: JobSpec = _SPEC) -> Job:
    def submit(tx: Transaction) -> Job:
        job_id = submissions.submit_job(tx, caller, NewSubmission(spec=spec, disk=_DISK))
        return jobs.get_job(tx, caller, job_id).job

    return await store.write(submit)


async def _lease_one(store: Store, worker_id: WorkerId) -> AttemptId:
    def lease(tx: Transaction) -> AttemptId:
        [waiting] = queues.board(tx).queues()
        [leased] = attempts.lease(tx, worker_id, waiting.id, 1, 60.0)
        return leased.attempt_id

    return await store.write(lease)


async def _sealed(store: Store) -> int:
    """Return how many submissions have secrets still."""
    sealed = sa.select(sa.func.count()).where(submission.c.secrets.is_not(None))
    return int(await store.read(lambda tx: tx.value(sealed)))


async def _submit_array(
    store: Store, caller: Caller, size: int, *, after: tuple[str, ...] = (), any_end: bool = False, **values: Any
) -> ArrayId:
    at_end, well = (after, ()) if any_end else ((), after)
    new = NewSubmission(spec=JobSpec(machine=_SPEC.machine, limits=_SPEC.limits, after=well, after_end=at_end), disk=_DISK)
    return await store.write(lambda tx: submissions.submit_array(tx, caller, new, size, **values))


async def _array(store: Store, caller: Caller, array_id: ArrayId) -> Array:
    return await store.read(lambda tx: submissions.get_array(tx, caller, array_id))


async def _lease(store: Store, worker_id: WorkerId, most: int) -> list[Assignment]:
    def lease(tx: Transaction) -> list[Assignment]:
        [waiting] = queues.board(tx).queues()
        return attempts.lease(tx, worker_id, waiting.id, most, 60.0)

    return await store.write(lease)


async def _end(store: Store, held: AttemptId, event: AttemptEvent = AttemptEvent.SUCCEEDED) -> None:
    assert await store.write(lambda tx: attempts.apply_event(tx, held, event, Outcome(exit_code=0)))


def _key(number: int) -> Sha256:
    return Sha256(f"{number:064x}")


async def _program(store: Store, caller: Caller, key: int, *offers: str, hub_id: int | None = None, most: int = 100) -> int:
    wanted = NewPeer(
        kind=PeerKind.USER,
        name=user_peer(caller.user_id or UserId(0)),
        key=_key(key),
        user_id=caller.user_id,
        offers=tuple(PeerOffer(name) for name in offers),
        hub_id=hub_id,
    )
    return await store.write(lambda tx: peers.register(tx, wanted, lifetime_s=_PEER_S, max_per_user=most))


async def _attempt_peer(store: Store, caller: Caller, worker_id: WorkerId, held: AttemptId, job_id: JobId, hub_id: int) -> int:
    wanted = NewPeer(
        kind=PeerKind.JOB,
        name=attempt_peer(job_id, 1),
        key=_key(held),
        user_id=caller.user_id,
        worker_id=worker_id,
        job_id=job_id,
        attempt_id=held,
        hub_id=hub_id,
    )
    return await store.write(lambda tx: peers.register(tx, wanted, lifetime_s=_PEER_S, max_per_user=100))


async def _hub(store: Store) -> int:
    def add(tx: Transaction) -> int:
        hub_id = hubs.add_hub(tx, "hub")
        hubs.renew_hub(tx, hub_id, key=_key(1), address="hub:1", peers=0, lifetime_s=_PEER_S)
        return hub_id

    return await store.write(add)


async def _way(store: Store, caller: Caller, peer_id: int, service: str) -> Way | Waiting:
    wish = AskGrant(peer_id=peer_id, service=service)
    return await store.read(lambda tx: find_way(tx, caller, wish, grant_s=60.0, max_peers=1000, nonce="n"))


class StoreContract:
    """Inherit and provide an async `store` fixture: an open, migrated, empty store with a FakeClock in `clock`."""

    async def test_tasks_are_listed_newest_first_and_go_with_their_jobs(self, store: Store) -> None:
        ann, worker_id = await _people(store)
        kept = KeptTask(TesTask(name="task"), "mark")

        def add(tx: Transaction) -> JobId:
            job_id = submissions.submit_job(tx, ann, NewSubmission(spec=_SPEC, disk=_DISK))
            assert ann.user_id is not None
            tasks.add_task(tx, job_id, ann.user_id, kept)
            return job_id

        made = [await store.write(add) for _ in range(70)]
        await _submit(store, ann)
        assert ann.user_id is not None
        owner_id = ann.user_id
        listed = await store.read(lambda tx: [one.detail.job.id for one in tasks.tasks_before(tx, owner_id, None)])
        assert listed == made[::-1]
        later = await store.read(lambda tx: [one.detail.job.id for one in tasks.tasks_before(tx, owner_id, made[2])])
        assert later == made[1::-1]
        attempt_id = await _lease_one(store, worker_id)

        def print_and_end(tx: Transaction) -> None:
            for start in range(0, 100, 10):
                jobs.append_log(tx, attempt_id, "stderr", start, b"%010d" % start, 1000)
            jobs.cancel_job(tx, ann, made[0], "enough")

        await store.write(print_and_end)
        found = await store.read(lambda tx: tasks.get_task(tx, ann, made[0]))
        assert (found.kept, [one.id for one in found.detail.attempts]) == (kept, [attempt_id])
        assert await store.read(lambda tx: jobs.read_log_end(tx, attempt_id, "stderr", 15)) == b"000800000000090"[-15:]
        assert await store.read(lambda tx: jobs.read_log_end(tx, attempt_id, "stdout", 15)) == b""
        await store.write(lambda tx: retention.remove_job(tx, ann, made[0]))
        assert await store.read(lambda tx: len(list(tasks.tasks_before(tx, owner_id, None)))) == 69

    async def test_write_that_raises_leaves_nothing_and_does_not_harm_others(self, store: Store) -> None:
        def bad(tx: Transaction) -> None:
            accounts.add_team(tx, "gone")
            raise ValueError("on purpose")

        results = await asyncio.gather(
            store.write(lambda tx: accounts.add_team(tx, "kept")),
            store.write(bad),
            store.write(lambda tx: accounts.add_team(tx, "too")),
            return_exceptions=True,
        )
        assert isinstance(results[1], ValueError)
        names = await store.read(lambda tx: {row.name for row in tx.rows(sa.select(team))})
        assert names == {"kept", "too"}

    async def test_many_writes_at_once_are_all_there(self, store: Store) -> None:
        await asyncio.gather(*[store.write(partial(accounts.add_team, name=f"g{n}")) for n in range(200)])
        assert len(await store.read(lambda tx: tx.rows(sa.select(team)))) == 200

    async def test_read_sees_every_acknowledged_write(self, store: Store) -> None:
        for number in range(20):
            await store.write(partial(accounts.add_team, name=f"g{number}"))
            assert await store.read(lambda tx: tx.value(sa.select(sa.func.count()).select_from(team))) == number + 1

    async def test_ids_are_never_used_twice(self, store: Store) -> None:
        first = await store.write(lambda tx: accounts.add_account(tx, "ann", admin=False))
        await store.write(lambda tx: tx.run(sa.text("delete from account")))
        second = await store.write(lambda tx: accounts.add_account(tx, "ann", admin=False))
        assert second.id > first.id

    async def test_secret_is_used_at_most_as_often_as_allowed_even_at_once(self, store: Store) -> None:
        hashed = hash_secret("s")
        await store.write(lambda tx: accounts.add_secret(tx, hashed, purpose=accounts.JOIN, uses=3, lifetime_s=60))
        uses = [store.write(lambda tx: accounts.use_secret(tx, "s", accounts.JOIN)) for _ in range(10)]
        results = await asyncio.gather(*uses, return_exceptions=True)
        assert sum(isinstance(result, Unauthenticated) for result in results) == 7

    async def test_secret_and_token_end_with_their_time(self, store: Store, clock: Any) -> None:
        caller, _ = await _people(store)
        await store.write(lambda tx: accounts.add_secret(tx, hash_secret("s"), purpose=accounts.JOIN, uses=3, lifetime_s=60))
        await store.write(lambda tx: accounts.add_token(tx, hash_secret("t"), role=Role.USER, label="", user=caller.user_id))
        assert (await store.read(lambda tx: accounts.authenticate(tx, "t"))).name == "ann"
        await clock.advance(61)
        with pytest.raises(Unauthenticated):
            await store.write(lambda tx: accounts.use_secret(tx, "s", accounts.JOIN))
        with pytest.raises(Unauthenticated):
            await store.read(lambda tx: accounts.authenticate(tx, "unknown"))

    async def test_expired_lease_returns_job_to_waiting(self, store: Store, clock: Any) -> None:
        caller, worker_id = await _people(store)
        submitted = await _submit(store, caller)
        await _lease_one(store, worker_id)
        await clock.advance(59)
        assert await store.write(attempts.expire_leases) == 0
        await clock.advance(2)
        assert await store.write(attempts.expire_leases) == 1
        detail = await store.read(lambda tx: jobs.get_job(tx, caller, submitted.id))
        assert detail.job.state is JobState.WAITING
        assert detail.attempts[0].state is AttemptState.LOST

    async def test_late_result_is_accepted_and_newer_attempts_are_cancelled(self, store: Store, clock: Any) -> None:
        caller, worker_id = await _people(store)
        submitted = await _submit(store, caller)
        late = await _lease_one(store, worker_id)
        await clock.advance(61)
        await store.write(attempts.expire_leases)
        newer = await _lease_one(store, worker_id)
        result = Blob(sha256=Sha256("a" * 64), size_bytes=3)
        assert await store.write(
            lambda tx: attempts.apply_event(tx, late, AttemptEvent.SUCCEEDED, Outcome(exit_code=0, result=result))
        )
        detail = await store.read(lambda tx: jobs.get_job(tx, caller, submitted.id))
        assert (detail.job.state, detail.job.result) == (JobState.COMPLETED, result.sha256)
        assert [one.state for one in detail.attempts] == [AttemptState.SUCCEEDED, AttemptState.CANCELLED]
        assert not await store.write(
            lambda tx: attempts.apply_event(tx, newer, AttemptEvent.SUCCEEDED, Outcome(exit_code=0, result=result))
        )

    async def test_two_results_at_once_complete_a_job_once(self, store: Store, clock: Any) -> None:
        caller, worker_id = await _people(store)
        await _submit(store, caller)
        first = await _lease_one(store, worker_id)
        await clock.advance(61)
        await store.write(attempts.expire_leases)
        second = await _lease_one(store, worker_id)
        won = await asyncio.gather(
            *[
                store.write(
                    partial(attempts.apply_event, attempt_id=one, event=AttemptEvent.SUCCEEDED, outcome=Outcome(exit_code=0))
                )
                for one in (first, second)
            ]
        )
        assert sorted(won) == [False, True]

    async def test_output_is_kept_once_in_order_and_bounded(self, store: Store) -> None:
        caller, worker_id = await _people(store)
        await _submit(store, caller)
        held = await _lease_one(store, worker_id)

        async def append(start: int, chunk: bytes) -> None:
            await store.write(lambda tx: jobs.append_log(tx, held, "stdout", start, chunk, 10))

        await append(0, b"hello")
        await append(0, b"hello")
        await append(3, b"lo wo")
        await append(8, b"rld and more")
        assert await store.read(lambda tx: jobs.read_log(tx, held, "stdout", 0, 100)) == (0, b"hello worl")
        assert await store.read(lambda tx: jobs.read_log(tx, held, "stdout", 4, 100)) == (4, b"o worl")

    async def test_blob_goes_only_when_nothing_refers_to_it(self, store: Store, clock: Any) -> None:
        caller, _ = await _people(store)
        blob = Blob(sha256=Sha256("b" * 64), size_bytes=1)

        def send(tx: Transaction) -> None:
            data.finish_upload(tx, data.begin_upload(tx, caller, blob)[0].id, blob)

        await store.write(send)
        await store.write(lambda tx: submissions.submit_job(tx, caller, NewSubmission(spec=_SPEC, disk=_DISK, context=blob)))
        await clock.advance(100)
        await store.write(lambda tx: data.forget_uploads(tx, tx.now, 10))
        assert await _unused(store, clock) == []
        await store.write(lambda tx: tx.run(sa.update(submission).values(context=None)))
        assert await _unused(store, clock) == [blob.sha256]

    async def test_jobs_with_as_much_data_as_they_may_have_are_one_class_and_keep_it(self, store: Store, clock: Any) -> None:
        caller, worker_id = await _people(store)
        files = tuple(
            DataFile(name=f"f{at}", blob=Blob(sha256=Sha256(f"{at:064x}"), size_bytes=at)) for at in range(MOST_DATA_FILES)
        )
        spec = msgspec.structs.replace(_SPEC, data=tuple((file.name, "d") for file in files))
        new = NewSubmission(spec=spec, disk=_DISK, data=files)
        for _ in range(2):
            await store.write(lambda tx: submissions.submit_job(tx, caller, new))
        [waiting] = await store.write(lambda tx: queues.board(tx).queues())
        assert waiting.waiting == 2 and len(waiting.requirement.data) == MOST_DATA_FILES
        leased = await store.write(lambda tx: attempts.lease(tx, worker_id, waiting.id, 1, 60.0))
        assert set(leased[0].data) == set(files)

    async def test_other_users_jobs_are_not_found(self, store: Store) -> None:
        caller, _ = await _people(store)
        submitted = await _submit(store, caller)
        other = await store.write(lambda tx: accounts.add_account(tx, "bob", admin=False))
        bob = Caller(Role.USER, "bob", user_id=other.id)
        with pytest.raises(NotFound):
            await store.read(lambda tx: jobs.get_job(tx, bob, submitted.id))
        with pytest.raises(NotFound):
            await store.write(lambda tx: jobs.cancel_job(tx, bob, submitted.id, ""))

    async def test_same_key_is_the_same_peer_until_it_was_silent_for_too_long(self, store: Store, clock: Any) -> None:
        caller, _ = await _people(store)
        first, other = await _program(store, caller, 1), await _program(store, caller, 2)
        await clock.advance(_PEER_S - 1)
        assert await _program(store, caller, 1, "web") == first != other
        await clock.advance(1)
        found = await store.read(lambda tx: peers.list_peers(tx, caller.user_id))
        assert [(one.id, one.services) for one in found] == [(first, ("web",))]
        assert await _program(store, caller, 2) not in (first, other)
        await clock.advance(_PEER_S)
        await store.write(peers.sweep_peers)
        assert await store.read(lambda tx: tx.rows(sa.select(peer))) == []

    async def test_public_key_of_somebody_else_names_another_peer(self, store: Store) -> None:
        caller, _ = await _people(store)
        added = await store.write(lambda tx: accounts.add_account(tx, "bob", admin=False))
        bob = Caller(Role.USER, "bob", user_id=added.id)
        assert await _program(store, caller, 1) != await _program(store, bob, 1)
        assert len(await store.read(lambda tx: peers.list_peers(tx, None))) == 2

    async def test_user_has_at_most_so_many_peers_at_the_same_time(self, store: Store, clock: Any) -> None:
        caller, _ = await _people(store)
        for key in (1, 2):
            await _program(store, caller, key, most=2)
        with pytest.raises(Conflict):
            await _program(store, caller, 3, most=2)
        await _program(store, caller, 2, most=2)
        await clock.advance(_PEER_S)
        await _program(store, caller, 3, most=2)

    async def test_secrets_come_with_each_lease_and_go_with_the_job(self, store: Store) -> None:
        caller, worker_id = await _people(store)
        spec = msgspec.structs.replace(_SPEC, secrets=("token",), trust=("mine",))
        for number, ends_as in enumerate((AttemptEvent.SUCCEEDED, AttemptEvent.FAILED)):
            new = NewSubmission(spec=spec, disk=_DISK, secrets=b"sealed %d" % number, trust=("user:1",))
            await store.write(lambda tx, new=new: submissions.submit_job(tx, caller, new))  # type: ignore[misc]
            while await _sealed(store):
                [leased] = await _lease(store, worker_id, 1)
                assert (leased.secrets, leased.owner_id) == (new.secrets, caller.user_id)
                [again] = await store.write(
                    lambda tx: attempts.assignments(tx, attempts.held_by(tx, worker_id).values())  # the answer was lost
                )
                assert again.secrets == new.secrets
                await _end(store, leased.attempt_id, ends_as)

    async def test_secrets_of_what_is_cancelled_or_ended_are_removed(self, store: Store) -> None:
        caller, worker_id = await _people(store)
        spec = msgspec.structs.replace(_SPEC, secrets=("token",), trust=("mine",))
        new = NewSubmission(spec=spec, disk=_DISK, secrets=b"sealed", trust=("user:1",))
        after = msgspec.structs.replace(new, spec=msgspec.structs.replace(spec, after=("job-1",)))
        first = await store.write(lambda tx: submissions.submit_job(tx, caller, new))
        await store.write(lambda tx: submissions.submit_job(tx, caller, after))
        assert await _sealed(store) == 2
        await store.write(lambda tx: jobs.cancel_job(tx, caller, first, "not needed"))
        assert await _sealed(store) == 0  # the second one cannot start any more
        array_id = await store.write(lambda tx: submissions.submit_array(tx, caller, new, 3))
        await store.write(lambda tx: submissions.fill(tx, array_id, 10))
        for one in await _lease(store, worker_id, 3):
            assert one.secrets == b"sealed"
            assert await _sealed(store) == 1
            await _end(store, one.attempt_id)
        assert await _sealed(store) == 0
        array_id = await store.write(lambda tx: submissions.submit_array(tx, caller, new, 3))
        await store.write(lambda tx: submissions.fill(tx, array_id, 10))
        await store.write(lambda tx: submissions.cancel_array(tx, caller, array_id, "not needed"))
        while await store.write(lambda tx: jobs.cancel_array_jobs(tx, array_id, 10)):
            pass
        assert await _sealed(store) == 0

    async def test_way_leads_to_the_peer_of_a_live_attempt_and_ends_with_it(self, store: Store, clock: Any) -> None:
        caller, worker_id = await _people(store)
        hub_id = await _hub(store)
        job_id = (await _submit(store, caller, _NETWORKED)).id
        mine = await _program(store, caller, 1)
        assert await _way(store, caller, mine, f"web.job-{job_id}") == Waiting(
            f"job {job_id} to start", (submissions.job_topic(job_id), peers.job_peers_topic(job_id))
        )
        held = await _lease_one(store, worker_id)
        await _attempt_peer(store, caller, worker_id, held, job_id, hub_id)
        way = await _way(store, caller, mine, f"web.job-{job_id}")
        assert isinstance(way, Way)
        assert (way.grant.target, way.grant.target_key, way.hub.address) == (attempt_peer(job_id, 1), _key(held), "hub:1")
        await clock.advance(61)
        await store.write(attempts.expire_leases)
        assert isinstance(await _way(store, caller, mine, f"web.job-{job_id}"), Waiting)
        await store.write(lambda tx: jobs.cancel_job(tx, caller, job_id, ""))
        with pytest.raises(Conflict):
            await _way(store, caller, mine, f"web.job-{job_id}")

    async def test_job_finds_its_users_newest_program_at_a_hub(self, store: Store, clock: Any) -> None:
        caller, worker_id = await _people(store)
        hub_id = await _hub(store)
        job_id = (await _submit(store, caller, _NETWORKED)).id
        held = await _lease_one(store, worker_id)
        source = await _attempt_peer(store, caller, worker_id, held, job_id, hub_id)
        worker = Caller(Role.WORKER, "pc", worker_id=worker_id)
        assert isinstance(await _way(store, worker, source, "site.user"), Waiting)
        for key, offers in ((1, ("site",)), (2, ("site", "db")), (3, ("db",))):
            await _program(store, caller, key, *offers, hub_id=hub_id)
            await clock.advance(1)
        way = await _way(store, worker, source, "site.user")
        assert isinstance(way, Way)
        assert way.grant.target_key == _key(2)
        await store.write(lambda tx: hubs.end_hub(tx, hub_id))
        assert isinstance(await _way(store, worker, source, "site.user"), Waiting)

    async def test_token_of_an_attempt_is_valid_while_that_is_live_and_then_forgotten(self, store: Store, clock: Any) -> None:
        caller, worker_id = await _people(store)
        await _submit(store, caller, _NETWORKED)
        held = await _lease_one(store, worker_id)
        await store.write(lambda tx: accounts.add_token_of_attempt(tx, hash_secret("t"), held))
        found = await store.read(lambda tx: accounts.authenticate(tx, "t"))
        assert (found.role, found.user_id, found.attempt_id) == (Role.JOB, caller.user_id, held)
        await store.write(lambda tx: accounts.drop_tokens_of_ended_attempts(tx, tx.now))
        await clock.advance(61)
        await store.write(attempts.expire_leases)
        with pytest.raises(Unauthenticated, match="while its job ran"):
            await store.read(lambda tx: accounts.authenticate(tx, "t"))
        assert await store.write(lambda tx: attempts.apply_event(tx, held, AttemptEvent.STARTED))
        assert (await store.read(lambda tx: accounts.authenticate(tx, "t"))).role is Role.JOB
        await store.write(lambda tx: attempts.apply_event(tx, held, AttemptEvent.FAILED))
        await clock.advance(1)
        await store.write(lambda tx: accounts.drop_tokens_of_ended_attempts(tx, tx.now))
        with pytest.raises(Unauthenticated, match="not valid"):
            await store.read(lambda tx: accounts.authenticate(tx, "t"))

    # Arrays, and what comes after what

    async def test_array_is_filled_in_parts_and_goes_only_when_it_is_whole(self, store: Store) -> None:
        caller, _ = await _people(store)
        array_id = await _submit_array(store, caller, 10)
        assert await store.write(lambda tx: submissions.fill(tx, array_id, 4)) == 6
        assert await store.write(lambda tx: queues.board(tx).queues()) == []
        assert (await _array(store, caller, array_id)).jobs[JobState.BLOCKED] == 4
        assert await store.write(lambda tx: submissions.fill(tx, array_id, 100)) == 0
        [waiting] = await store.write(lambda tx: queues.board(tx).queues())
        assert waiting.waiting == 10
        assert (await _array(store, caller, array_id)).state is ArrayState.OPEN
        assert await store.read(submissions.chores) == []

    async def test_jobs_of_an_array_have_their_index_and_parameters(self, store: Store) -> None:
        caller, worker_id = await _people(store)
        table = Blob(sha256=Sha256("e" * 64), size_bytes=9)
        lines = ['["a","1"]', '["b","2"]', '["c","3"]']
        array_id = await _submit_array(store, caller, 3, table=table, names=("letter", "number"))
        assert await store.write(lambda tx: submissions.fill_table(tx, array_id, 0, lines[:2], 20)) == 1
        assert await store.write(lambda tx: submissions.fill_table(tx, array_id, 0, lines[:2], 20)) == 1, "read twice, made once"
        [chore] = await store.read(submissions.chores)
        assert (chore.filled, chore.reads_at, chore.table) == (2, 20, table)
        assert await store.write(lambda tx: submissions.fill_table(tx, array_id, 2, [*lines[2:], '["too","many"]'], 30)) == 0
        found = await _lease(store, worker_id, 5)
        assert [(one.index, one.parameters) for one in found] == [
            (0, {"letter": "a", "number": "1"}),
            (1, {"letter": "b", "number": "2"}),
            (2, {"letter": "c", "number": "3"}),
        ]

    async def test_array_ends_with_its_last_job(self, store: Store) -> None:
        caller, worker_id = await _people(store)
        array_id = await _submit_array(store, caller, 3)
        await store.write(lambda tx: submissions.fill(tx, array_id, 3))
        for left in (2, 1, 0):
            [one] = await _lease(store, worker_id, 1)
            await _end(store, one.attempt_id)
            found = await _array(store, caller, array_id)
            assert found.jobs[JobState.COMPLETED] == 3 - left
            assert (found.state is ArrayState.ENDED) == (left == 0)

    async def test_cancelled_array_starts_nothing_more_and_is_swept_in_parts(self, store: Store) -> None:
        caller, worker_id = await _people(store)
        array_id = await _submit_array(store, caller, 20)
        await store.write(lambda tx: submissions.fill(tx, array_id, 100))
        running = await _lease(store, worker_id, 2)
        await _end(store, running[0].attempt_id)
        await store.write(lambda tx: submissions.cancel_array(tx, caller, array_id, "not wanted"))
        assert await store.write(lambda tx: queues.board(tx).queues()) == []
        shown = await _array(store, caller, array_id)
        assert (shown.state, shown.jobs[JobState.CANCELLED], shown.jobs[JobState.WAITING]) == (ArrayState.CANCELLED, 18, 0)
        moved = [await store.write(lambda tx: submissions.sweep_cancelled(tx, array_id, 7)) for _ in range(4)]
        assert moved == [7, 7, 4, 0]
        while await store.write(lambda tx: jobs.cancel_array_jobs(tx, array_id, 7)):
            pass
        assert await store.read(submissions.chores) == []
        assert (await _array(store, caller, array_id)).jobs == {
            **dict.fromkeys(JobState, 0),
            JobState.COMPLETED: 1,
            JobState.CANCELLED: 19,
        }
        assert not await store.write(lambda tx: attempts.apply_event(tx, running[1].attempt_id, AttemptEvent.SUCCEEDED))

    async def test_array_cancelled_while_it_is_filled_has_no_more_jobs(self, store: Store) -> None:
        caller, _ = await _people(store)
        array_id = await _submit_array(store, caller, 100)
        await store.write(lambda tx: submissions.fill(tx, array_id, 10))
        await store.write(lambda tx: submissions.cancel_array(tx, caller, array_id, "not wanted"))
        assert await store.write(lambda tx: submissions.fill(tx, array_id, 10)) == 0
        while await store.write(lambda tx: jobs.cancel_array_jobs(tx, array_id, 7)):
            pass
        found = await store.read(lambda tx: jobs.list_jobs(tx, owner=None, state=None, before=None, limit=200, array=array_id))
        assert [one.state for one in found[0]] == [JobState.CANCELLED] * 10

    @pytest.mark.parametrize("ends_well", [True, False])
    @pytest.mark.parametrize("any_end", [True, False])
    async def test_job_goes_after_what_it_waits_for_or_ends_with_it(self, store: Store, ends_well: bool, any_end: bool) -> None:
        caller, worker_id = await _people(store)
        first = await _submit(store, caller, JobSpec(machine=_SPEC.machine, limits=Limits(attempts=1)))
        array_id = await _submit_array(store, caller, 2, after=(f"job-{first.id}",), any_end=any_end)
        await store.write(lambda tx: submissions.fill(tx, array_id, 2))
        after = (f"array-{array_id}",)
        at_end, well = (after, ()) if any_end else ((), after)
        last = await _submit(store, caller, JobSpec(machine=_SPEC.machine, after=well, after_end=at_end))
        assert last.state is JobState.BLOCKED
        [one] = await _lease(store, worker_id, 5)
        await _end(store, one.attempt_id, AttemptEvent.SUCCEEDED if ends_well else AttemptEvent.FAILED)
        goes = ends_well or any_end
        found = await _array(store, caller, array_id)
        assert found.state is (ArrayState.OPEN if goes else ArrayState.CANCELLED)
        if goes:
            for one in await _lease(store, worker_id, 5):
                await _end(store, one.attempt_id)
        while await store.write(lambda tx: jobs.cancel_array_jobs(tx, array_id, 7)):
            pass
        detail = await store.read(lambda tx: jobs.get_job(tx, caller, last.id))
        assert detail.job.state is (JobState.WAITING if goes else JobState.CANCELLED)

    async def test_counts_are_those_of_the_jobs_also_for_functions_of_the_same_batch(self, store: Store) -> None:
        caller, _ = await _people(store)

        def submit(tx: Transaction) -> int:
            submissions.submit_job(tx, caller, NewSubmission(spec=_SPEC, disk=_DISK))
            return queues.waiting_of(tx, caller.user_id or UserId(0))

        def fail(tx: Transaction) -> None:
            submit(tx)
            raise ValueError("on purpose")

        found = await asyncio.gather(
            *(store.write(one) for one in (submit, fail, submit, fail, fail, submit)), return_exceptions=True
        )
        assert [one for one in found if not isinstance(one, ValueError)] == [1, 2, 3]
        assert (await store.read(queues.count_states))[JobState.WAITING] == 3

    async def test_bound_of_waiting_jobs_holds_for_jobs_and_arrays_together(self, store: Store) -> None:
        caller, _ = await _people(store)
        new = NewSubmission(spec=_SPEC, disk=_DISK)

        def array(tx: Transaction, size: int) -> None:
            array_id = submissions.submit_array(tx, caller, new, size, max_waiting=10)
            submissions.fill(tx, array_id, size)

        await store.write(partial(array, size=9))
        await store.write(lambda tx: submissions.submit_job(tx, caller, new, max_waiting=10))
        with pytest.raises(Conflict, match="10 jobs waiting"):
            await store.write(lambda tx: submissions.submit_job(tx, caller, new, max_waiting=10))
        with pytest.raises(Conflict, match="10 jobs waiting"):
            await store.write(partial(array, size=1))

    @pytest.mark.parametrize("seed", range(6))
    async def test_random_history_agrees_with_the_lifecycle(self, store: Store, clock: Any, seed: int) -> None:
        rng = random.Random(seed)  # noqa: S311 - a replayable history
        caller, worker_id = await _people(store)
        submitted = [(await _submit(store, caller)).id for _ in range(4)]
        states: dict[AttemptId, AttemptState] = {}
        owner: dict[AttemptId, JobId] = {}
        expected = dict.fromkeys(submitted, JobState.WAITING)
        for _ in range(60):
            waiting = [job_id for job_id, state in expected.items() if state is JobState.WAITING]
            if waiting and rng.random() < 0.4:
                held = await _lease_one(store, worker_id)
                states[held], owner[held] = AttemptState.LEASED, min(waiting)
                expected[owner[held]] = JobState.ACTIVE
            elif states:
                held, event = rng.choice(list(states)), rng.choice(list(AttemptEvent))
                applied = await store.write(
                    partial(attempts.apply_event, attempt_id=held, event=event, outcome=Outcome(exit_code=0))
                )
                following = applies(states[held], event, expected[owner[held]])
                assert applied == (following is not None), f"seed {seed}: {states[held]} {event}"
                _follow(states, owner, expected, held, following)
            await self._agree(store, caller, expected, states, seed)

    async def _agree(
        self, store: Store, caller: Caller, expected: dict[JobId, JobState], states: dict[AttemptId, AttemptState], seed: int
    ) -> None:
        def look(tx: Transaction) -> tuple[dict[JobId, JobState], dict[AttemptId, AttemptState], dict[JobState, int]]:
            found = {JobId(row.id): JobState(row.state) for row in tx.rows(sa.select(job))}
            held = {AttemptId(row.id): AttemptState(row.state) for row in tx.rows(sa.select(attempt))}
            return found, held, queues.count_states(tx)

        found, held, counted = await store.read(look)
        assert found == expected, f"seed {seed}"
        assert held == states, f"seed {seed}"
        assert counted == {state: list(expected.values()).count(state) for state in JobState}, f"seed {seed}"


def _follow(
    states: dict[AttemptId, AttemptState],
    owner: dict[AttemptId, JobId],
    expected: dict[JobId, JobState],
    held: AttemptId,
    following: AttemptState | None,
) -> None:
    """Play one event on the model."""
    if following is None or following is states[held]:
        return
    states[held] = following
    job_id = owner[held]
    mine = [states[one] for one in states if owner[one] == job_id]
    tally = Tally(
        live=sum(state in LIVE_STATES for state in mine),
        succeeded=mine.count(AttemptState.SUCCEEDED),
        failed=mine.count(AttemptState.FAILED),
        lost=mine.count(AttemptState.LOST),
        max_failed=_SPEC.limits.attempts,
        max_lost=_SPEC.limits.max_lost,
    )
    before = expected[job_id]
    expected[job_id] = job_state(before, tally)
    if expected[job_id] in FINAL_JOB_STATES and before not in FINAL_JOB_STATES:
        for one in states:
            if owner[one] == job_id and states[one] in LIVE_STATES:
                states[one] = AttemptState.CANCELLED
