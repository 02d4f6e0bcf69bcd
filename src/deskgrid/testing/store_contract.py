"""What every store must do. A test class per store inherits from StoreContract and gives it a `store` fixture.

The random history plays workers and users against a store and, step by step, against core/lifecycle.py: the two must agree.
"""

from __future__ import annotations

import asyncio
import random
from functools import partial
from typing import Any

import pytest
import sqlalchemy as sa

from deskgrid.core.lifecycle import FINAL_JOB_STATES, LIVE_STATES, AttemptEvent, Tally, applies, job_state
from deskgrid.core.matching import Share
from deskgrid.errors import Conflict, NotFound, Unauthenticated
from deskgrid.link import hash_secret
from deskgrid.model.data import Blob, DataRef, Disk
from deskgrid.model.ids import AttemptId, JobId, Sha256, UserId, WorkerId
from deskgrid.model.jobs import AttemptState, Job, JobSpec, JobState, Limits, Machine
from deskgrid.model.machines import DiskFormat, Network
from deskgrid.model.overlay import Offer, PeerKind, Reach, attempt_peer, parse_service, user_peer
from deskgrid.model.users import Role
from deskgrid.model.wire import AskGrant, PeerOffer
from deskgrid.server.grants import Waiting, Way, find_way
from deskgrid.server.store import accounts, data, hubs, jobs, peers, workers
from deskgrid.server.store.accounts import Caller
from deskgrid.server.store.engine import Store, Transaction
from deskgrid.server.store.peers import NewPeer
from deskgrid.server.store.schema import attempt, job, peer, queue, team

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


async def _submit(store: Store, caller: Caller, spec: JobSpec = _SPEC) -> Job:
    return await store.write(lambda tx: jobs.add_job(tx, caller, spec, _DISK, None))


async def _lease_one(store: Store, worker_id: WorkerId) -> AttemptId:
    def lease(tx: Transaction) -> AttemptId:
        [waiting] = jobs.waiting_queues(tx)
        [leased] = jobs.lease_jobs(tx, worker_id, [Share(waiting.class_id, waiting.owner_id, 1)], 60.0)
        return leased.attempt_id

    return await store.write(lease)


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
    return await store.read(lambda tx: find_way(tx, caller, wish, grant_s=60.0, nonce="n"))


class StoreContract:
    """Inherit and provide an async `store` fixture: an open, migrated, empty store with a FakeClock in `clock`."""

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
        assert await store.write(jobs.expire_leases) == 0
        await clock.advance(2)
        assert await store.write(jobs.expire_leases) == 1
        detail = await store.read(lambda tx: jobs.get_job(tx, caller, submitted.id))
        assert detail.job.state is JobState.WAITING
        assert detail.attempts[0].state is AttemptState.LOST

    async def test_late_result_is_accepted_and_newer_attempts_are_cancelled(self, store: Store, clock: Any) -> None:
        caller, worker_id = await _people(store)
        submitted = await _submit(store, caller)
        late = await _lease_one(store, worker_id)
        await clock.advance(61)
        await store.write(jobs.expire_leases)
        newer = await _lease_one(store, worker_id)
        result = Blob(sha256=Sha256("a" * 64), size_bytes=3)
        assert await store.write(lambda tx: jobs.apply_event(tx, late, AttemptEvent.SUCCEEDED, exit_code=0, result=result))
        detail = await store.read(lambda tx: jobs.get_job(tx, caller, submitted.id))
        assert (detail.job.state, detail.job.result) == (JobState.COMPLETED, result.sha256)
        assert [one.state for one in detail.attempts] == [AttemptState.SUCCEEDED, AttemptState.CANCELLED]
        assert not await store.write(lambda tx: jobs.apply_event(tx, newer, AttemptEvent.SUCCEEDED, exit_code=0, result=result))

    async def test_two_results_at_once_complete_a_job_once(self, store: Store, clock: Any) -> None:
        caller, worker_id = await _people(store)
        await _submit(store, caller)
        first = await _lease_one(store, worker_id)
        await clock.advance(61)
        await store.write(jobs.expire_leases)
        second = await _lease_one(store, worker_id)
        won = await asyncio.gather(
            *[
                store.write(partial(jobs.apply_event, attempt_id=one, event=AttemptEvent.SUCCEEDED, exit_code=0))
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
            data.finish_upload(tx, data.begin_upload(tx, caller, blob).id, blob)

        await store.write(send)
        await store.write(lambda tx: jobs.add_job(tx, caller, _SPEC, _DISK, blob))
        await clock.advance(100)
        assert await store.write(lambda tx: data.drop_unreferenced(tx, tx.now)) == []
        await store.write(lambda tx: tx.run(sa.update(job).values(context=None)))
        assert await store.write(lambda tx: data.drop_unreferenced(tx, tx.now)) == [blob.sha256]

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

    async def test_way_leads_to_the_peer_of_a_live_attempt_and_ends_with_it(self, store: Store, clock: Any) -> None:
        caller, worker_id = await _people(store)
        hub_id = await _hub(store)
        job_id = (await _submit(store, caller, _NETWORKED)).id
        mine = await _program(store, caller, 1)
        assert await _way(store, caller, mine, f"web.job-{job_id}") == Waiting(
            f"job {job_id} to start", (jobs.job_topic(job_id), peers.job_peers_topic(job_id))
        )
        held = await _lease_one(store, worker_id)
        await _attempt_peer(store, caller, worker_id, held, job_id, hub_id)
        way = await _way(store, caller, mine, f"web.job-{job_id}")
        assert isinstance(way, Way)
        assert (way.grant.target, way.grant.target_key, way.hub.address) == (attempt_peer(job_id, 1), _key(held), "hub:1")
        await clock.advance(61)
        await store.write(jobs.expire_leases)
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
        await store.write(jobs.expire_leases)
        with pytest.raises(Unauthenticated, match="while its job ran"):
            await store.read(lambda tx: accounts.authenticate(tx, "t"))
        assert await store.write(lambda tx: jobs.apply_event(tx, held, AttemptEvent.STARTED))
        assert (await store.read(lambda tx: accounts.authenticate(tx, "t"))).role is Role.JOB
        await store.write(lambda tx: jobs.apply_event(tx, held, AttemptEvent.FAILED))
        await clock.advance(1)
        await store.write(lambda tx: accounts.drop_tokens_of_ended_attempts(tx, tx.now))
        with pytest.raises(Unauthenticated, match="not valid"):
            await store.read(lambda tx: accounts.authenticate(tx, "t"))

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
                applied = await store.write(partial(jobs.apply_event, attempt_id=held, event=event, exit_code=0))
                following = applies(states[held], event, expected[owner[held]])
                assert applied == (following is not None), f"seed {seed}: {states[held]} {event}"
                _follow(states, owner, expected, held, following)
            await self._agree(store, caller, expected, states, seed)

    async def _agree(
        self, store: Store, caller: Caller, expected: dict[JobId, JobState], states: dict[AttemptId, AttemptState], seed: int
    ) -> None:
        def look(tx: Transaction) -> tuple[dict[JobId, JobState], dict[AttemptId, AttemptState], int]:
            found = {JobId(row.id): JobState(row.state) for row in tx.rows(sa.select(job))}
            held = {AttemptId(row.id): AttemptState(row.state) for row in tx.rows(sa.select(attempt))}
            return found, held, int(tx.value(sa.select(sa.func.coalesce(sa.func.sum(queue.c.waiting), 0))))

        found, held, counted = await store.read(look)
        assert found == expected, f"seed {seed}"
        assert held == states, f"seed {seed}"
        assert counted == sum(state is JobState.WAITING for state in expected.values()), f"seed {seed}"


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
