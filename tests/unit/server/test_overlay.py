"""Peers, grants and hubs over real TLS: who becomes which peer, who may reach whom, and what ends with what."""

from __future__ import annotations

import asyncio
import ssl
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID

from deskgrid.client.grid import Grid, join, join_hub
from deskgrid.client.peers import ServerCalls
from deskgrid.client.transport import Credentials, Transport
from deskgrid.core.rights import ROLES
from deskgrid.core.trust import key_hash, verify_grant
from deskgrid.errors import Conflict, Forbidden, InvalidInput, NotFound, Unauthenticated
from deskgrid.link import hash_secret, make_secret, parse_link
from deskgrid.model import wire
from deskgrid.model.data import DataKind
from deskgrid.model.ids import Sha256
from deskgrid.model.jobs import AttemptState, JobSpec, Machine
from deskgrid.model.machines import Network
from deskgrid.model.overlay import API_SERVICE, Connection, ConnectionPath, Hub, Offer, PeerKind, Reach, parse_service
from deskgrid.model.users import Role
from deskgrid.server.store import attempts, hubs
from deskgrid.server.store.schema import attempt, peer
from deskgrid.server.store.schema import hub as hub_table
from deskgrid.settings import ServerSettings
from deskgrid.testing.grids import PlayedJob, TestGrid, play_job, played_sync, running_grid

WEB = (Offer("web", 8080),)


@pytest.fixture
async def grid(tmp_path: Path):
    async with running_grid(tmp_path / "server") as running:
        yield running


class Key:
    """A key of a peer's or hub's own."""

    def __init__(self) -> None:
        self.private = ec.generate_private_key(ec.SECP256R1())
        public = self.private.public_key()
        info = serialization.PublicFormat.SubjectPublicKeyInfo
        self.pem = public.public_bytes(serialization.Encoding.PEM, info).decode()
        self.hash = key_hash(public.public_bytes(serialization.Encoding.DER, info))

    @property
    def private_pem(self) -> bytes:
        return self.private.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )


async def people(grid: TestGrid, *names: str) -> list[Credentials]:
    async with Grid(await grid.admin()) as admin:
        for name in names:
            await admin.add_user(name)
    return [await grid.user(name) for name in names]


async def start_hub(grid: TestGrid, address: str = "127.0.0.1:1") -> Hub:
    async with Transport(await grid.hub()) as transport:
        answer = await transport.call(wire.RENEW_HUB, wire.RenewHub(key=Key().pem, address=address, peers=0))
    return Hub(name=answer.name, address=address)


class Program:
    """A peer played by hand: one key, one way to the server."""

    def __init__(self, transport: Transport, hub: Hub | None = None) -> None:
        self.calls = ServerCalls(transport)
        self.hub = hub
        self.key = Key()
        self.answer: wire.PeerAnswer

    async def register(self, **request) -> wire.PeerAnswer:
        at = self.hub.name if self.hub else ""
        self.answer = await self.calls.register(wire.RegisterPeer(**{"key": self.key.pem, "hub": at, **request}))
        return self.answer

    async def offer(self, name: str, *share: str) -> wire.PeerAnswer:
        return await self.register(offers=(wire.PeerOffer(name, share),))

    async def ask(self, service: str, wait_s: float = 0.0) -> wire.GrantAnswer:
        return await self.calls.ask_grant(wire.AskGrant(peer_id=self.answer.peer_id, service=service), wait_s)


@asynccontextmanager
async def program(credentials: Credentials, hub: Hub | None = None):
    async with Transport(credentials) as transport:
        yield Program(transport, hub)


async def attempt_peer(job: PlayedJob, hub: Hub | None = None, **request) -> Program:
    found = Program(job.worker, hub)
    await found.register(attempt_id=job.assignment.attempt_id, **request)
    return found


# ---- becoming a peer


async def test_each_peer_gets_a_certificate_with_its_own_name_for_its_own_key(grid: TestGrid):
    [ann] = await people(grid, "ann")
    async with Transport(await grid.worker()) as worker, program(ann) as user:
        job = await play_job(ann, worker, network=Network.OVERLAY, offer=WEB)
        of_job, of_worker = await attempt_peer(job), Program(worker)
        await of_worker.register()
        await user.register()
        names = [(one.answer.name, one) for one in (user, of_job, of_worker)]
        assert [name for name, _ in names] == ["user-2.deskgrid", f"attempt-1.job-{job.id}.deskgrid", "worker-1.deskgrid"]
        for name, one in names:
            certificate = x509.load_pem_x509_certificate(one.answer.certificate.encode())
            alternatives = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
            usages = certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
            assert alternatives == x509.SubjectAlternativeName([x509.DNSName(name)])
            assert set(usages) == {ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH}
            assert certificate.public_key() == one.key.private.public_key()


async def test_same_key_is_the_same_peer_and_another_key_of_a_user_another(grid: TestGrid):
    [ann] = await people(grid, "ann")
    async with program(ann) as first, program(ann) as second, Grid(ann) as user:
        one = await first.register()
        again = await first.register(connections=(_connection(),))
        other = await second.register()
        assert one.peer_id == again.peer_id != other.peer_id
        peers = await user.peers()
        assert [(found.id, found.kind, found.owner) for found in peers] == [
            (one.peer_id, PeerKind.USER, "ann"),
            (other.peer_id, PeerKind.USER, "ann"),
        ]
        assert peers[0].connections == (_connection(),)


def _connection() -> Connection:
    return Connection(
        service="web", peer="x.deskgrid", outgoing=True, path=ConnectionPath.DIRECT, since=1.0, sent_bytes=2, received_bytes=3
    )


async def test_what_a_peer_tells_of_its_connections_is_bounded(grid: TestGrid):
    async with program(await grid.admin()) as mine, Grid(await grid.admin()) as user:
        wild = msgspec.structs.replace(_connection(), service="x" * 1000, sent_bytes=10**40, received_bytes=-1)
        await mine.register(connections=(wild,) * 1000)
        [found] = await user.peers()
        assert len(found.connections) < 1000
        assert len(found.connections[0].service) == 100
        assert (found.connections[0].sent_bytes, found.connections[0].received_bytes) == (2**63 - 1, 0)


async def test_new_key_of_an_attempt_takes_the_place_of_the_old_one(grid: TestGrid):
    [ann] = await people(grid, "ann")
    async with Transport(await grid.worker()) as worker, Grid(ann) as user:
        job = await play_job(ann, worker, network=Network.OVERLAY)
        await attempt_peer(job)
        newer = await attempt_peer(job)
        assert [one.id for one in await user.peers()] == [newer.answer.peer_id]


async def test_worker_registers_only_attempts_that_it_holds_and_that_are_live(grid: TestGrid):
    [ann] = await people(grid, "ann")
    async with Transport(await grid.worker("a")) as worker, Transport(await grid.worker("b")) as thief:
        job = await play_job(ann, worker, network=Network.OVERLAY)
        for attempt_id in (job.assignment.attempt_id, 0, -1, 1 << 70):
            with pytest.raises(Forbidden, match="not this worker's"):
                await Program(thief).register(attempt_id=attempt_id)
        async with program(ann) as user:
            with pytest.raises(Forbidden, match="only a worker"):
                await user.register(attempt_id=job.assignment.attempt_id)
        await job.report(AttemptState.FAILED)
        with pytest.raises(Conflict, match="attempt 1 of job 1 is failed"):
            await attempt_peer(job)


async def test_job_without_a_network_is_no_peer(grid: TestGrid):
    [ann] = await people(grid, "ann")
    async with Transport(await grid.worker()) as worker:
        job = await play_job(ann, worker)
        with pytest.raises(Forbidden, match="no network"):
            await attempt_peer(job)


@pytest.mark.parametrize("key", ["", "x" * 2000, "ä", "-----BEGIN PUBLIC KEY-----\nAAAA\n-----END PUBLIC KEY-----\n"])
async def test_what_is_no_key_is_refused(grid: TestGrid, key: str):
    async with program(await grid.admin()) as user:
        with pytest.raises(InvalidInput, match="P-256"):
            await user.register(key=key)


async def test_user_may_have_only_so_many_peers(tmp_path: Path):
    settings = ServerSettings(listen="127.0.0.1:0", reserve_bytes=0, max_peers_per_user=2)
    async with running_grid(tmp_path / "server", settings) as grid:
        admin = await grid.admin()
        async with program(admin) as one, program(admin) as two, program(admin) as three:
            await one.register()
            await two.register()
            with pytest.raises(Conflict, match="2 programs and jobs"):
                await three.register()
            await two.register()
            await one.calls.remove(one.answer.peer_id)
            await three.register()


@pytest.mark.parametrize(
    "offers",
    [
        (wire.PeerOffer("Web"),),
        (wire.PeerOffer("web"), wire.PeerOffer("web", ("everyone",))),
        (wire.PeerOffer("web", ("hep",)),),
        (wire.PeerOffer("web", ("group:nobody",)),),
        tuple(wire.PeerOffer(f"web{number}") for number in range(65)),
    ],
)
async def test_offer_that_makes_no_sense_is_refused(grid: TestGrid, offers: tuple[wire.PeerOffer, ...]):
    async with program(await grid.admin()) as user:
        with pytest.raises(InvalidInput):
            await user.register(offers=offers)


async def test_peer_at_what_is_no_hub_is_refused(grid: TestGrid):
    async with program(await grid.admin()) as user:
        for name in ("hub-x.deskgrid", "server.deskgrid", "x" * 500):
            with pytest.raises(InvalidInput, match="there is no hub"):
                await user.register(hub=name)


async def test_peer_at_a_hub_that_was_removed_is_told_of_the_others(grid: TestGrid):
    removed, other = await start_hub(grid), await start_hub(grid, "127.0.0.1:2")
    async with Grid(await grid.admin()) as admin, program(await grid.admin()) as user:
        await user.register(hub=removed.name)
        await admin.remove_hub(int(removed.name.removeprefix("hub-").removesuffix(".deskgrid")))
        answer = await user.register(hub=removed.name)
        assert answer.hubs == (other,)
        assert [peer.hub for peer in await admin.peers()] == [""]


async def test_peer_is_removed_by_its_holder_only(grid: TestGrid):
    ann, bob = await people(grid, "ann", "bob")
    async with program(ann) as mine, program(bob) as other, program(await grid.worker()) as worker:
        await mine.register()
        for calls in (other.calls, worker.calls):
            with pytest.raises(NotFound):
                await calls.remove(mine.answer.peer_id)
        await mine.calls.remove(mine.answer.peer_id)
        with pytest.raises(NotFound, match="any more"):
            await mine.ask("web.user")


async def test_everybody_sees_his_own_peers_and_the_admin_all(grid: TestGrid):
    ann, bob = await people(grid, "ann", "bob")
    hub = await start_hub(grid)
    async with Transport(await grid.worker()) as worker, program(bob) as bobs, Grid(await grid.admin()) as admin:
        job = await play_job(ann, worker, network=Network.OVERLAY, offer=WEB)
        await attempt_peer(job, hub)
        await Program(worker).register()
        await bobs.register()
        async with Grid(ann) as user, Grid(bob) as other:
            [found] = await user.peers()
            assert (found.kind, found.owner, found.job_id, found.services, found.hub) == (
                PeerKind.JOB,
                "ann",
                job.id,
                ("web", "console"),
                hub.name,
            )
            assert [one.owner for one in await other.peers(everyone=True)] == ["bob"]
        assert [one.owner for one in await admin.peers(everyone=True)] == ["ann", "pc", "bob"]
        assert await admin.peers() == ()


async def test_peer_goes_with_its_attempt_whatever_ends_it(grid: TestGrid):
    [ann] = await people(grid, "ann")
    async with Transport(await grid.worker()) as worker, Grid(ann) as user:
        for end in (
            lambda job: job.report(AttemptState.FAILED),
            lambda job: user.cancel(job.id),
            lambda _: worker.call(wire.SYNC, played_sync()),
            lambda job: age_lease(grid, job),
        ):
            job = await play_job(ann, worker, network=Network.OVERLAY)
            await attempt_peer(job)
            assert len(await user.peers()) == 1
            await end(job)
            assert await user.peers() == ()
            await user.cancel(job.id)


async def age_lease(grid: TestGrid, job: PlayedJob) -> None:
    def age(tx):
        tx.run(attempt.update().where(attempt.c.id == job.assignment.attempt_id).values(lease_expires_at=tx.now - 1))
        attempts.expire_leases(tx)

    await grid.services.store.write(age)


async def test_silent_peer_is_forgotten(grid: TestGrid):
    async with program(await grid.admin()) as mine, Grid(await grid.admin()) as user:
        await mine.register()
        await grid.services.store.write(lambda tx: tx.run(peer.update().values(expires_at=tx.now)))
        assert await user.peers() == ()
        with pytest.raises(NotFound):
            await mine.ask("web.user")
        await mine.register()
        assert len(await user.peers()) == 1


# ---- grants


async def test_grant_names_both_peers_their_keys_and_the_service(grid: TestGrid):
    [ann] = await people(grid, "ann")
    hub = await start_hub(grid)
    async with Transport(await grid.worker()) as worker, program(ann) as user:
        job = await play_job(ann, worker, network=Network.OVERLAY, offer=WEB)
        target = await attempt_peer(job, hub)
        await user.register()
        answer = await user.ask(f"web.job-{job.id}")
        public = serialization.load_pem_public_key(target.answer.grant_key.encode())
        grant = verify_grant(answer.grant, public, now=user.answer.now)
        assert (grant.source, grant.source_key) == (user.answer.name, user.key.hash)
        assert (grant.target, grant.target_key, grant.service) == (target.answer.name, target.key.hash, "web")
        assert (answer.target, answer.hub, answer.waiting_for) == (target.answer.name, hub, "")
        with pytest.raises(Forbidden, match="expired"):
            verify_grant(answer.grant, public, now=grant.expires_at)
        assert 0 < grant.expires_at - user.answer.now < answer.lifetime_s + 5


async def test_job_reaches_what_its_spec_names_and_nothing_else(grid: TestGrid):
    [ann] = await people(grid, "ann")
    hub = await start_hub(grid)
    async with Transport(await grid.worker("a")) as first, Transport(await grid.worker("b")) as second, program(ann, hub) as user:
        target = await play_job(ann, first, network=Network.OVERLAY, offer=(*WEB, Offer("db", 5432)))
        await attempt_peer(target, hub)
        await user.offer("site")
        reach = (Reach("web", parse_service(f"web.job-{target.id}"), 80), Reach("site", parse_service("site.user"), 81))
        source = await attempt_peer(await play_job(ann, second, network=Network.OVERLAY, reach=reach), hub)
        assert (await source.ask(f"web.job-{target.id}")).target == f"attempt-1.job-{target.id}.deskgrid"
        assert (await source.ask("site.user")).target == user.answer.name
        for service in (f"db.job-{target.id}", "site.user-ann", "other.user", "web.job-999"):
            with pytest.raises(Forbidden, match="its spec does not name it"):
                await source.ask(service)


async def test_other_users_jobs_are_not_found_unless_they_are_shared(grid: TestGrid):
    ann, bob, eve = await people(grid, "ann", "bob", "eve")
    hub = await start_hub(grid)
    async with Grid(await grid.admin()) as admin:
        await admin.add_group("hep")
        await admin.set_members("hep", add=["bob"])
    async with Transport(await grid.worker()) as worker, program(bob) as member, program(eve) as stranger:
        await member.register()
        await stranger.register()
        job = await play_job(ann, worker, network=Network.OVERLAY, offer=WEB, share=("group:hep",))
        await attempt_peer(job, hub)
        assert (await member.ask(f"web.job-{job.id}")).grant
        with pytest.raises(NotFound, match="offers no service db"):
            await member.ask(f"db.job-{job.id}")
        refusals = [await refusal(stranger, f"{service}.job-{number}") for service in ("web", "db") for number in (job.id, 99)]
        assert len({text.replace("99", str(job.id)) for text in refusals}) == 1
    async with Grid(ann) as user:
        await user.cancel(job.id)
    async with program(bob) as member:
        await member.register()
        with pytest.raises(Conflict, match=f"job {job.id} is cancelled"):
            await member.ask(f"web.job-{job.id}", wait_s=30)


async def refusal(one: Program, service: str) -> str:
    with pytest.raises(NotFound) as caught:
        await one.ask(service)
    return str(caught.value)


async def test_share_with_somebody_who_does_not_exist_is_refused_at_submission(grid: TestGrid):
    async with Transport(await grid.worker()) as worker:
        for share in ("group:hpe", "user:an"):
            with pytest.raises(InvalidInput, match="there is no"):
                await play_job(await grid.admin(), worker, network=Network.OVERLAY, offer=WEB, share=(share,))


async def test_service_of_a_user_is_the_newest_program_that_offers_it_to_the_caller(grid: TestGrid):
    ann, bob = await people(grid, "ann", "bob")
    hub = await start_hub(grid)
    async with program(ann, hub) as old, program(ann, hub) as new, program(ann, hub) as other, program(bob) as stranger:
        await old.offer("web", "user:bob")
        await new.offer("web")
        await other.offer("db")
        await stranger.register()
        assert await target_key(grid, other, "web.user") == new.key.hash
        assert await target_key(grid, other, "web.user-ann") == new.key.hash
        assert await target_key(grid, stranger, "web.user-ann") == old.key.hash
        not_shared, not_offered = await stranger.ask("db.user-ann"), await stranger.ask("ftp.user-ann")
        assert not_shared.waiting_for == not_offered.waiting_for.replace("ftp", "db") == "a program of ann's that offers db to bob"
        assert (await stranger.ask("web.user")).waiting_for == "a program of bob's that offers web"
        with pytest.raises(NotFound, match="no user"):
            await stranger.ask("web.user-nobody")
        with pytest.raises(Conflict, match="this peer itself"):
            await new.ask("web.user")


async def target_key(grid: TestGrid, one: Program, service: str) -> str:
    answer = await one.ask(service)
    public = serialization.load_pem_public_key(grid.services.authority.grant_key_pem.encode())
    return verify_grant(answer.grant, public, now=one.answer.now).target_key


async def test_worker_reaches_nothing_for_itself(grid: TestGrid):
    async with program(await grid.worker()) as worker:
        await worker.register()
        with pytest.raises(Forbidden, match="a worker reaches nothing"):
            await worker.ask("web.user")


@pytest.mark.parametrize(
    "service", ["", "web", "web.", "web.job-0", "api.server", "web.server", "cache.worker", "x" * 10_000, "web.job-1.grid"]
)
async def test_what_is_no_service_of_a_peer_is_refused(grid: TestGrid, service: str):
    async with program(await grid.admin()) as user:
        await user.register()
        with pytest.raises(InvalidInput):
            await user.ask(service)


async def test_nobody_asks_with_a_peer_of_somebody_elses(grid: TestGrid):
    ann, bob = await people(grid, "ann", "bob")
    async with program(ann) as mine, program(bob) as other, Transport(await grid.worker()) as worker:
        await mine.register()
        for calls in (other.calls, ServerCalls(worker)):
            for peer_id in (mine.answer.peer_id, 0, -1, 1 << 70):
                with pytest.raises(NotFound, match="you have no peer"):
                    await calls.ask_grant(wire.AskGrant(peer_id=peer_id, service="web.user"), 0)


async def test_who_waits_for_a_job_gets_the_grant_as_soon_as_its_peer_is_at_a_hub(grid: TestGrid):
    [ann] = await people(grid, "ann")
    hub = await start_hub(grid)
    async with Transport(await grid.worker()) as worker, program(ann) as user:
        await user.register()
        job = await play_job(ann, worker, network=Network.OVERLAY, offer=WEB)
        service = f"web.job-{job.id}"
        assert (await user.ask(service)).waiting_for == f"attempt 1 of job {job.id} to take part in the overlay"
        async with asyncio.timeout(20):
            waiting = asyncio.create_task(user.ask(service, wait_s=60))
            peer_of_job = await attempt_peer(job)
            assert (await user.ask(service)).waiting_for == f"the peer of {service} to come to a hub"
            assert not waiting.done()
            await peer_of_job.register(hub=hub.name, attempt_id=job.assignment.attempt_id)
            assert (await waiting).grant


async def test_who_waits_for_a_job_hears_at_once_that_it_is_over(grid: TestGrid):
    [ann] = await people(grid, "ann")
    async with Transport(await grid.worker()) as worker, program(ann) as user, Grid(ann) as owner:
        await user.register()
        job = await play_job(ann, worker, network=Network.OVERLAY, offer=WEB)
        async with asyncio.timeout(20):
            waiting = asyncio.create_task(user.ask(f"web.job-{job.id}", wait_s=60))
            await job.report(AttemptState.FAILED)
            assert (await user.ask(f"web.job-{job.id}")).waiting_for == f"job {job.id} to start"
            await owner.cancel(job.id)
            with pytest.raises(Conflict, match=f"job {job.id} is cancelled"):
                await waiting


async def test_who_waits_for_a_program_gets_it_when_it_offers(grid: TestGrid):
    [ann] = await people(grid, "ann")
    hub = await start_hub(grid)
    async with program(ann) as user, program(ann, hub) as server:
        await user.register()
        await server.register()
        async with asyncio.timeout(20):
            waiting = asyncio.create_task(user.ask("web.user", wait_s=60))
            await asyncio.sleep(0)
            await server.offer("web")
            assert (await waiting).target == server.answer.name


async def test_peer_of_a_dead_hub_is_waited_for_until_it_is_at_another(grid: TestGrid):
    admin = await grid.admin()
    hub, other = await start_hub(grid), await start_hub(grid, "127.0.0.1:2")
    async with program(admin) as user, program(admin, hub) as server:
        await user.register()
        await server.offer("web")
        await grid.services.store.write(lambda tx: hubs.end_hub(tx, 1))
        assert (await user.ask("web.user")).waiting_for == "the peer of web.user to come to a hub"
        assert (await server.offer("web")).hubs == (other,)
        server.hub = other
        await server.offer("web")
        assert (await user.ask("web.user")).hub == other


async def test_service_of_a_job_is_that_of_its_newest_live_attempt(grid: TestGrid):
    [ann] = await people(grid, "ann")
    hub = await start_hub(grid)
    async with Transport(await grid.worker("a")) as first, Transport(await grid.worker("b")) as second, program(ann) as user:
        await user.register()
        job = await play_job(ann, first, network=Network.OVERLAY, offer=WEB)
        await attempt_peer(job, hub)
        await age_lease(grid, job)
        [newer] = (await second.call(wire.SYNC, played_sync(room=True))).assignments
        await job.report(AttemptState.RUNNING)  # the first was only out of reach
        service = f"web.job-{job.id}"
        assert "attempt 2" in (await user.ask(service)).waiting_for
        late = Program(second, hub)
        await late.register(attempt_id=newer.attempt_id)
        assert (await user.ask(service)).target == f"attempt-2.job-{job.id}.deskgrid"


async def test_asking_for_a_grant_writes_nothing(grid: TestGrid, monkeypatch: pytest.MonkeyPatch):
    async with program(await grid.admin()) as user:
        await user.register()

        async def refused(_function):
            raise AssertionError("a write")

        monkeypatch.setattr(grid.services.store, "write", refused)
        assert (await user.ask("web.user")).waiting_for


# ---- jobs with tokens of their own


async def job_with_token(owner: Credentials, worker: Transport, **machine) -> tuple[PlayedJob, Credentials]:
    reach = (Reach("grid", API_SERVICE, 8470),)
    job = await play_job(owner, worker, network=Network.OVERLAY, reach=reach, **machine)
    token = make_secret()
    await attempt_peer(job, job_token_hash=Sha256(hash_secret(token)))
    return job, msgspec.structs.replace(owner, token=token)


async def test_job_acts_for_its_owner_with_the_rights_of_a_user(grid: TestGrid, tmp_path: Path):
    admin = await grid.admin()
    [ann] = await people(grid, "ann")
    async with Transport(await grid.worker()) as worker, Grid(ann) as other:
        _, credentials = await job_with_token(admin, worker)
        (tmp_path / "file").write_bytes(b"x")
        hers = await other.put(tmp_path / "file", "hers")
        async with Grid(credentials) as job:
            who = await job.transport.call(wire.WHO)
            assert (who.role, who.name) == (Role.JOB, "admin")
            found = await job.jobs(everyone=True)
            assert {one.owner for one in found.jobs} == {"admin"}
            (tmp_path / "mine").write_bytes(b"mine")
            await job.put(tmp_path / "mine", "mine")
            assert (await job.data("mine")).owner == "admin"
            submitted = await job.submit(_spec_of("played"))
            assert submitted.owner == "admin"
            assert (await job.cancel(submitted.id)).message == "cancelled by admin"
            with pytest.raises(NotFound):
                await job.data(hers.blob.sha256)
            with pytest.raises(NotFound):
                await job.transport.download(hers.blob, tmp_path / "stolen")


def _spec_of(disk: str) -> JobSpec:
    return JobSpec(machine=Machine(disk=disk))


def test_job_may_call_exactly_these():
    allowed = {name for name, roles in ROLES.items() if Role.JOB in roles}
    assert allowed == {
        "who",
        "status",
        "begin_upload",
        "take_turn",
        "upload_bytes",
        "get_blob",
        "register_data",
        "list_data",
        "get_data",
        "list_disks",
        "get_disk",
        "submit_job",
        "list_jobs",
        "get_job",
        "cancel_job",
        "read_log",
        "remove_job",
        "remove_array",
        "submit_array",
        "list_arrays",
        "get_array",
        "cancel_array",
        "submit_set",
        "list_sets",
        "get_set",
        "cancel_set",
        "join_pilot",
        "tes_create",
        "tes_list",
        "tes_get",
        "tes_cancel",
        "register_app",
        "list_apps",
        "get_app",
    }
    assert {name for name, roles in ROLES.items() if Role.HUB in roles} == {"who", "renew_hub"}


async def test_token_of_a_job_is_valid_only_while_its_attempt_is_live(grid: TestGrid):
    [ann] = await people(grid, "ann")
    async with Transport(await grid.worker()) as worker:
        job, credentials = await job_with_token(ann, worker)
        async with Transport(credentials) as inside:
            await inside.call(wire.WHO)
            await age_lease(grid, job)
            with pytest.raises(Unauthenticated, match="while its job ran"):
                await inside.call(wire.WHO)
            await job.report(AttemptState.RUNNING)
            await inside.call(wire.WHO)
            await job.report(AttemptState.FAILED)
            with pytest.raises(Unauthenticated):
                await inside.call(wire.WHO)


async def test_newer_token_of_an_attempt_ends_the_older_one(grid: TestGrid):
    [ann] = await people(grid, "ann")
    async with Transport(await grid.worker()) as worker, Transport(await grid.worker("b")) as thief:
        job, credentials = await job_with_token(ann, worker)
        taken = Sha256(hash_secret(credentials.token))
        other, _ = await job_with_token(ann, thief)
        with pytest.raises(Conflict, match="somebody else"):
            await attempt_peer(other, job_token_hash=taken)
        await attempt_peer(job, job_token_hash=taken)
        async with Transport(credentials) as inside:
            await inside.call(wire.WHO)
            await attempt_peer(job, job_token_hash=Sha256(hash_secret("another")))
            with pytest.raises(Unauthenticated):
                await inside.call(wire.WHO)


async def test_job_that_does_not_reach_the_grid_gets_no_token(grid: TestGrid):
    [ann] = await people(grid, "ann")
    async with Transport(await grid.worker()) as worker, program(ann) as user:
        job = await play_job(ann, worker, network=Network.OVERLAY)
        hashed = Sha256(hash_secret("token"))
        with pytest.raises(Forbidden, match=r"does not reach api\.server"):
            await attempt_peer(job, job_token_hash=hashed)
        with pytest.raises(Forbidden):
            await user.register(job_token_hash=hashed)


async def test_keys_and_uploads_of_two_jobs_and_their_owner_do_not_meet(grid: TestGrid, tmp_path: Path):
    [ann] = await people(grid, "ann")
    (tmp_path / "file").write_bytes(b"bytes")
    async with Transport(await grid.worker("a")) as first, Transport(await grid.worker("b")) as second, Grid(ann) as owner:
        _, one = await job_with_token(ann, first)
        _, two = await job_with_token(ann, second)
        async with Grid(one) as job, Grid(two) as other:
            made = [
                await caller.transport.call(wire.SUBMIT_JOB, wire.SubmitJob(spec=_spec_of("played")), key="same")
                for caller in (owner, job, other, job)
            ]
            assert len({one.id for one in made}) == 3
            assert made[1] == made[3]
            data = await job.put(tmp_path / "file", "file")
            request = wire.RegisterData(name="again", kind=DataKind.FILE, blob=data.blob)
            with pytest.raises(Conflict, match="upload them first"):
                await other.transport.call(wire.REGISTER_DATA, request)


# ---- hubs


async def test_hub_joins_renews_and_is_told_to_peers_while_it_is_alive(grid: TestGrid):
    admin = await grid.admin()
    key = Key()
    async with Transport(await grid.hub("north")) as transport, program(admin) as user, Grid(admin) as people:
        assert (await user.register()).hubs == ()
        assert [one.alive for one in await people.hubs()] == [False]
        answer = await transport.call(wire.RENEW_HUB, wire.RenewHub(key=key.pem, address="hub.example.org:8471", peers=7))
        hub = Hub(name="hub-1.deskgrid", address="hub.example.org:8471")
        assert (answer.name, (await user.register()).hubs) == (hub.name, (hub,))
        assert await people.hubs() == (wire.HubDetail(hub=hub, label="north", peers=7, alive=True),)
        who = await transport.call(wire.WHO)
        assert (who.role, who.name) == (Role.HUB, "north")
        await grid.services.store.write(lambda tx: tx.run(hub_table.update().values(expires_at=tx.now)))
        assert (await user.register()).hubs == ()
        assert await people.hubs() == (wire.HubDetail(hub=hub, label="north", peers=0, alive=False),)


async def test_nobody_is_sent_to_a_hub_that_leaves(grid: TestGrid):
    admin = await grid.admin()
    renewal = wire.RenewHub(key=Key().pem, address="hub.example.org:8471", peers=7)
    async with Transport(await grid.hub()) as transport, program(admin) as user:
        await transport.call(wire.RENEW_HUB, renewal)
        assert len((await user.register()).hubs) == 1
        await transport.call(wire.RENEW_HUB, msgspec.structs.replace(renewal, leaving=True))
        assert (await user.register()).hubs == ()


@pytest.mark.parametrize("address", ["", "hub", "hub:0", "hub:65536", "0.0.0.0:1", "[::]:1", "a b:1", "x" * 400 + ":1", "-a:1"])
async def test_hub_that_nobody_could_dial_is_refused(grid: TestGrid, address: str):
    async with Transport(await grid.hub()) as transport:
        with pytest.raises(InvalidInput, match="nothing that peers can dial"):
            await transport.call(wire.RENEW_HUB, wire.RenewHub(key=Key().pem, address=address, peers=0))


async def test_hub_link_of_an_admin_works_once_and_for_hubs_only(grid: TestGrid):
    async with Grid(await grid.admin()) as admin:
        link = await admin.hub_link()
    assert parse_link(str(link), "hub") == link
    with pytest.raises(InvalidInput, match="deskgrid hub join LINK"):
        parse_link(str(link), "join")
    with pytest.raises(Unauthenticated):
        await join(link, "pc")
    await join_hub(link, "hub")
    with pytest.raises(Unauthenticated):
        await join_hub(link, "hub")


async def test_hub_that_an_admin_removes_is_one_no_more(grid: TestGrid):
    admin = await grid.admin()
    async with Transport(await grid.hub()) as transport, program(admin) as user, Grid(admin) as people:
        renewal = wire.RenewHub(key=Key().pem, address="h:1", peers=0)
        name = (await transport.call(wire.RENEW_HUB, renewal)).name
        await user.register(hub=name)
        await people.remove_hub(1)
        with pytest.raises(Unauthenticated):
            await transport.call(wire.RENEW_HUB, renewal)
        assert await people.hubs() == ()
        assert [one.hub for one in await people.peers()] == [""]
        with pytest.raises(NotFound):
            await people.remove_hub(1)


# ---- certificates among themselves


async def test_no_certificate_passes_for_the_server_or_for_another_peer(grid: TestGrid, tmp_path: Path):
    admin = await grid.admin()
    user_key, hub_key = Key(), Key()
    async with program(admin) as user, Transport(await grid.hub()) as transport:
        user.key = user_key
        of_user = (await user.register()).certificate
        of_hub = (await transport.call(wire.RENEW_HUB, wire.RenewHub(key=hub_key.pem, address="h:1", peers=0))).certificate
    holders = {"user-1.deskgrid": (of_user, user_key), "hub-1.deskgrid": (of_hub, hub_key)}
    names = [*holders, wire.SERVER_NAME, "user-11.deskgrid", "hub-2.deskgrid", "localhost", "deskgrid"]
    for own_name, (certificate, key) in holders.items():
        for asked in names:
            passed = shake_hands(tmp_path, admin.authority_pem, certificate, key.private_pem, asked)
            assert passed == (asked == own_name), f"{own_name} as {asked}"


def shake_hands(folder: Path, authority_pem: str, certificate: str, key_pem: bytes, name: str) -> bool:
    """Say whether a client that wants `name` believes this certificate, over TLS 1.3 with certificates of both."""
    (folder / "chain.pem").write_text(certificate)
    (folder / "key.pem").write_bytes(key_pem)
    client, server = ssl.create_default_context(cadata=authority_pem), ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_verify_locations(cadata=authority_pem)
    server.verify_mode = ssl.CERT_REQUIRED
    for context in (client, server):
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        context.verify_flags |= ssl.VERIFY_X509_STRICT
        context.load_cert_chain(folder / "chain.pem", folder / "key.pem")
    up, down = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = [client.wrap_bio(down, up, server_hostname=name), server.wrap_bio(up, down, server_side=True)]
    done = [False, False]
    while not all(done):
        for index, end in enumerate(ends):
            if done[index]:
                continue
            try:
                end.do_handshake()
                done[index] = True
            except ssl.SSLWantReadError:
                continue
            except ssl.SSLCertVerificationError:
                return False
    return True


async def test_grid_made_by_an_earlier_version_gets_its_grant_key(tmp_path: Path):
    async with running_grid(tmp_path / "server"):
        pass
    key = tmp_path / "server" / "authority" / "grants.key"
    key.unlink()
    async with running_grid(tmp_path / "server") as grid, program(await grid.admin()) as user:
        await user.register()
        assert key.stat().st_mode & 0o777 == 0o600
        first = user.answer.grant_key
    async with running_grid(tmp_path / "server") as grid, program(await grid.admin()) as user:
        assert (await user.register()).grant_key == first
