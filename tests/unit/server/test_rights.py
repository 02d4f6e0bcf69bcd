"""Who may do what: every call against every kind of caller and every relation to what it is about, from the table in core/rights.py."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import msgspec
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from deskgrid.client.grid import Grid, describe_file, join, login
from deskgrid.client.transport import Credentials, Transport
from deskgrid.clock import SystemClock
from deskgrid.core.rights import ROLES, RULES, Kind, Right, Rule, Who, covers
from deskgrid.errors import DeskgridError, Forbidden, InvalidInput, NotFound, Unauthenticated
from deskgrid.link import hash_secret, make_secret
from deskgrid.model import tes, wire
from deskgrid.model.data import Visibility
from deskgrid.model.ids import AttemptId, Sha256
from deskgrid.model.jobs import AttemptState, JobSpec, Machine
from deskgrid.model.machines import Network
from deskgrid.model.overlay import API_SERVICE, Reach, parse_service
from deskgrid.model.placement import Attributes
from deskgrid.model.users import Role
from deskgrid.model.workers import AttemptReport
from deskgrid.testing.grids import PlayedJob, TestGrid, play_job, played_sync, running_grid

_SHUT = (Unauthenticated, Forbidden, NotFound)
_NUMBER = itertools.count(1)
TASK = "task"
"""A job, submitted by another protocol, whose calls have rights of their own."""


@pytest.fixture
async def grid(tmp_path: Path):
    async with running_grid(tmp_path / "server") as running:
        yield running


_ROLE_OF: dict[str, Role | None] = {
    **dict.fromkeys(("ann", "bob", "eve"), Role.USER),
    "admin": Role.ADMIN,
    "job": Role.JOB,
    **dict.fromkeys(("lease", "worker"), Role.WORKER),
    "hub": Role.HUB,
    "nobody": None,
}
"""The cast."""


@dataclasses.dataclass
class Cast:
    """Everybody who may call. Ann owns what calls are about; bob is in her group; eve is nobody special."""

    ann: Transport
    bob: Transport
    eve: Transport
    admin: Transport
    job: Transport
    """The own token of a job of ann's."""
    lease: Transport
    """The worker that has that job."""
    worker: Transport
    hub: Transport
    nobody: Transport
    played: PlayedJob
    admin_credentials: Credentials
    ann_credentials: Credentials


async def cast_of(grid: TestGrid, running: AsyncExitStack) -> Cast:
    async def opened(known: Credentials) -> Transport:
        return await running.enter_async_context(Transport(known, tries=1))

    admin = await grid.admin()
    async with Grid(admin) as boss:
        for name in ("ann", "bob", "eve"):
            await boss.add_user(name)
        await boss.add_group("hep")
        await boss.set_members("hep", add=["ann", "bob"])
    ann, lease = await grid.user("ann"), await opened(await grid.worker())
    token, key = make_secret(), new_key()
    reach = (Reach("grid", API_SERVICE, 8470), Reach("web", parse_service("web.user"), 80))
    played = await play_job(ann, lease, network=Network.OVERLAY, reach=reach)
    request = wire.RegisterPeer(key=key, attempt_id=played.assignment.attempt_id, job_token_hash=Sha256(hash_secret(token)))
    await lease.call(wire.REGISTER_PEER, request)
    nobody = Credentials(address=admin.address, authority_pem=admin.authority_pem)
    return Cast(
        ann=await opened(ann),
        bob=await opened(await grid.user("bob")),
        eve=await opened(await grid.user("eve")),
        admin=await opened(admin),
        job=await opened(msgspec.structs.replace(nobody, token=token)),
        lease=lease,
        worker=await opened(await grid.worker("other")),
        hub=await opened(await grid.hub()),
        nobody=await opened(nobody),
        played=played,
        admin_credentials=admin,
        ann_credentials=ann,
    )


def new_key() -> str:
    public = ec.generate_private_key(ec.SECP256R1()).public_key()
    return public.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo).decode()


# What calls are about, made by ann unless a variant says otherwise


class Things:
    """Makes objects; each one that is not consumed by a call is made once."""

    def __init__(self, cast: Cast, folder: Path) -> None:
        self.cast = cast
        self._folder = folder
        self._known: dict[tuple[str, str], dict[str, object]] = {}
        self._makers: dict[str, Callable[[str], Awaitable[dict[str, object]]]] = {
            Kind.DATA: self._data,
            Kind.PLACEMENT: self._placement,
            Kind.APP: self._app,
            Kind.JOB: self._job,
            Kind.ARRAY: self._array,
            Kind.SET: self._set,
            Kind.BLOB: self._blob,
            Kind.WORKER: self._worker,
            Kind.TOKEN: self._token,
            Kind.UPLOAD: self._upload,
            Kind.PEER: self._peer,
            Kind.HUB: self._hub,
            TASK: self._task,
        }

    async def path(self, kind: str, variant: str, *, fresh: bool) -> dict[str, object]:
        """Return the parameters of a path that lead to an object."""
        if kind not in self._makers:
            return {"user": "ann", "group": "hep"}
        if fresh:
            return await self._makers[kind](variant)
        if (kind, variant) not in self._known:
            self._known[kind, variant] = await self._makers[kind](variant)
        return self._known[kind, variant]

    def _file(self) -> Path:
        file = self._folder / f"file-{next(_NUMBER)}"
        file.write_bytes(file.name.encode())
        return file

    async def _put(self, variant: str) -> Any:
        file = self._file()
        blob = describe_file(file)
        await self.cast.ann.upload(file, blob)
        visibility = Visibility(variant)
        group = "hep" if visibility is Visibility.GROUP else ""
        request = wire.RegisterData(name=file.name, kind="file", blob=blob, visibility=visibility, group=group)
        return await self.cast.ann.call(wire.REGISTER_DATA, request)

    async def _data(self, variant: str) -> dict[str, object]:
        return {"reference": (await self._put(variant)).name, "endorser": "user:ann"}

    async def _placement(self, _variant: str) -> dict[str, object]:
        request = wire.PlaceData(pattern=f"none-{next(_NUMBER)}", attributes=Attributes(replicas=1))
        return {"placement": (await self.cast.ann.call(wire.PLACE_DATA, request)).id}

    async def _app(self, variant: str) -> dict[str, object]:
        visibility, name = Visibility(variant), f"app-{next(_NUMBER)}"
        group = "hep" if visibility is Visibility.GROUP else ""
        await self.cast.ann.call(wire.REGISTER_APP, wire.RegisterApp(name=name, visibility=visibility, group=group))
        return {"reference": name}

    def _spec(self, variant: str) -> JobSpec:
        return JobSpec(machine=Machine(disk="played"), group="hep" if variant == "group" else "")

    async def _job(self, variant: str) -> dict[str, object]:
        return {"job": (await self.cast.ann.call(wire.SUBMIT_JOB, wire.SubmitJob(spec=self._spec(variant)))).id}

    async def _task(self, variant: str) -> dict[str, object]:
        resources = tes.TesResources(backend_parameters={"group": "hep"} if variant == "group" else None)
        task = tes.TesTask(executors=(tes.TesExecutor(image="played", command=("true",)),), resources=resources)
        return {"id": (await self.cast.ann.call(tes.CREATE_TASK, task)).id}

    async def _array(self, variant: str) -> dict[str, object]:
        request = wire.SubmitArray(spec=self._spec(variant), count=2)
        return {"array": (await self.cast.ann.call(wire.SUBMIT_ARRAY, request)).id}

    async def _set(self, variant: str) -> dict[str, object]:
        members = (wire.SetMember(name="a", spec=self._spec(variant)), wire.SetMember(name="b", spec=self._spec(variant), count=2))
        return {"set": (await self.cast.ann.call(wire.SUBMIT_SET, wire.SubmitSet(name="set", members=members))).id}

    async def _blob(self, variant: str) -> dict[str, object]:
        if variant == "lease":
            assert self.cast.played.assignment.disk is not None
            return {"sha256": self.cast.played.assignment.disk.blob.sha256}
        if variant.startswith("result of "):
            return {"sha256": await self._result(variant.removeprefix("result of "))}
        return {"sha256": (await self._put(variant)).blob.sha256}

    async def _result(self, variant: str) -> str:
        """Let the worker do a job and report a result."""
        await self._job(variant)
        held = AttemptReport(attempt_id=self.cast.played.assignment.attempt_id, state=AttemptState.RUNNING)
        leased = await self.cast.lease.call(wire.SYNC, played_sync(held, room=True))
        file = self._file()
        blob = describe_file(file)
        await self.cast.lease.upload(file, blob)
        reports = [
            AttemptReport(attempt_id=one.attempt_id, state=AttemptState.SUCCEEDED, exit_code=0, result=blob)
            for one in leased.assignments
        ]
        assert len(reports) == 1, "only the job that was made for this waits"
        await self.cast.lease.call(wire.SYNC, played_sync(held, *reports))
        return blob.sha256

    async def _worker(self, variant: str) -> dict[str, object]:
        async with Grid(self.cast.ann_credentials) as grid:
            link = await grid.join_link()
        await join(link, "hers")
        return {"worker": (await self.cast.ann.call(wire.LIST_WORKERS)).workers[-1].id}

    async def _token(self, variant: str) -> dict[str, object]:
        request = wire.AddToken(token_hash=Sha256(hash_secret(make_secret())), rights=("jobs",), lifetime_s=60)
        return {"token": (await self.cast.ann.call(wire.ADD_TOKEN, request)).id}

    async def _upload(self, variant: str) -> dict[str, object]:
        blob = describe_file(self._file())
        holder: Transport = getattr(self.cast, variant)
        return {"upload": (await holder.call(wire.BEGIN_UPLOAD, wire.BeginUpload(blob=blob))).id}

    async def _peer(self, variant: str) -> dict[str, object]:
        holder: Transport = getattr(self.cast, variant)
        attempt_id = self.cast.played.assignment.attempt_id if variant == "lease" else None
        return {"peer": (await holder.call(wire.REGISTER_PEER, wire.RegisterPeer(key=new_key(), attempt_id=attempt_id))).peer_id}

    async def _hub(self, variant: str) -> dict[str, object]:
        return {"hub": 0}


_VARIANTS: dict[Kind, tuple[str, ...]] = {
    Kind.DATA: ("private", "group", "public"),
    Kind.APP: ("private", "group", "public"),
    Kind.JOB: ("private", "group"),
    Kind.ARRAY: ("private", "group"),
    Kind.SET: ("private", "group"),
    Kind.BLOB: ("result of private", "result of group", "private", "group", "public", "lease"),
    Kind.UPLOAD: ("ann", "job", "lease"),
    Kind.PEER: ("ann", "lease"),
}
_IN_THE_MESSAGE = frozenset({"append_log", "ask_grant"})
"""These say in their message what they are about, not in their path."""
_CONSUMING = ("remove_", "revoke_")
_LAST = ("sync", "leave")
"""They end the job's and the worker's own tokens."""
_SEE = {
    Kind.DATA: "get_data",
    Kind.APP: "get_app",
    Kind.JOB: "get_job",
    Kind.ARRAY: "get_array",
    Kind.SET: "get_set",
    Kind.WORKER: "list_workers",
}


def standing(name: str, kind: Kind, variant: str) -> frozenset[Who]:
    """Return in which relations one of the cast stands to an object, told apart from the code that decides it."""
    if kind in (Kind.UPLOAD, Kind.PEER):
        return frozenset({Who.OWNER} if name == variant else ())
    of_people = {Who.USER} | ({Who.PUBLIC} if variant == "public" else set())
    found: dict[str, set[Who]] = {
        "ann": {Who.OWNER, *of_people},
        "job": {Who.OWNER, *of_people},
        "bob": {*of_people, *({Who.MEMBER} if variant.endswith("group") else ())},
        "eve": of_people,
        "admin": {Who.ADMIN, *of_people},
        "lease": {Who.WORKER, *({Who.LEASE} if variant == "lease" or kind is Kind.WORKER else ())},
        "worker": {Who.WORKER},
        "hub": {Who.HUB},
        "nobody": set(),
    }
    return frozenset(found[name])


def thing_of(route: wire.Route[Any, Any]) -> str:
    """Return what is made for a call to be about."""
    return TASK if "{id}" in route.path else RULES[route.name].kind


def has_object(route: wire.Route[Any, Any]) -> bool:
    return "{" in route.path or route.name in _IN_THE_MESSAGE


def expected(route: wire.Route[Any, Any], name: str, variant: str) -> tuple[type[DeskgridError], ...]:
    """Return how the table says that a call is refused; nothing if it is not."""
    rule: Rule = RULES[route.name]
    if not ROLES[route.name]:
        return ()
    if _ROLE_OF[name] is None:
        return (Unauthenticated,)
    if _ROLE_OF[name] not in ROLES[route.name]:
        return (Forbidden,)
    relations = standing(name, rule.kind, variant)
    if not has_object(route) or rule.who & relations:
        return ()
    if route.name == "append_log":
        return (Forbidden, NotFound)  # attempts have no page of their own on which they could be seen
    seen = rule.kind in _SEE and RULES[_SEE[rule.kind]].who & relations
    return (Forbidden,) if seen else (NotFound,)


async def refusal(
    transport: Transport, route: wire.Route[Any, Any], path: dict[str, object], body: Any = None
) -> type[DeskgridError] | None:
    """Return how a call was refused; one that fails behind the door for another reason was let in."""
    content = msgspec.json.encode(body) if body is not None else b"{}"
    headers = {wire.UPLOAD_OFFSET_HEADER: "0", wire.IDEMPOTENCY_HEADER: f"test-{next(_NUMBER)}"}
    try:
        async with transport._request(route, path, headers=headers, data=content) as answer:
            await answer.read()
    except DeskgridError as error:
        return type(error) if isinstance(error, _SHUT) else None
    return None


async def body_of(route: wire.Route[Any, Any], things: Things, path: dict[str, object]) -> Any:
    if route.name == "append_log":
        attempt_id = AttemptId(things.cast.played.assignment.attempt_id)
        return wire.AppendLog(attempt_id=attempt_id, stream="stdout", offset=0, data=b"x")
    if route.name == "revoke_disk":
        return wire.RevokeDisk(reason="a hole")
    return wire.AskGrant(peer_id=int(str(path["peer"])), service="web.user") if route.name == "ask_grant" else None


async def test_every_call_is_open_to_exactly_those_of_the_table(grid: TestGrid, tmp_path: Path):
    async with AsyncExitStack() as running:
        cast = await cast_of(grid, running)
        things = Things(cast, tmp_path)
        await things.path(Kind.BLOB, "result of private", fresh=False)  # while nothing else waits for a worker
        await things.path(Kind.BLOB, "result of group", fresh=False)
        wrong, tried = [], 0
        for route in sorted(wire.ROUTES.values(), key=lambda route: _LAST.index(route.name) if route.name in _LAST else -1):
            kind = RULES[route.name].kind
            for variant in _VARIANTS.get(kind, ("private",)) if has_object(route) else ("private",):
                for name in _ROLE_OF:
                    wanted = expected(route, name, variant)
                    consumed = route.name.startswith(_CONSUMING) and not wanted
                    fresh = consumed or (kind is Kind.PEER and variant == "lease")  # an attempt has one peer only: the newest
                    path = await things.path(thing_of(route), variant, fresh=fresh) if has_object(route) else {}
                    body = await body_of(route, things, path)
                    found = await refusal(getattr(cast, name), route, path, body)
                    tried += 1
                    if route.name in ("join", "login", "join_hub") or (kind is Kind.HUB and found is NotFound and not wanted):
                        continue  # the secret is the key, not the token; that hub is not there
                    if found not in wanted and (found, wanted) != (None, ()):
                        wrong.append(f"{route.name} of {variant} by {name}: {found}, not {wanted}")
        assert not wrong, "\n".join(wrong)
        assert tried > 700


async def test_lists_show_exactly_what_the_table_lets_see(grid: TestGrid, tmp_path: Path):
    async with AsyncExitStack() as running:
        cast = await cast_of(grid, running)
        things = Things(cast, tmp_path)
        names = {
            (kind, variant): (await things.path(kind, variant, fresh=False))["reference"]
            for kind in (Kind.DATA, Kind.APP)
            for variant in _VARIANTS[kind]
        }
        for person in ("ann", "bob", "eve", "admin", "job"):
            caller: Transport = getattr(cast, person)
            shown = {one.name for one in (await caller.call(wire.LIST_DATA)).data}
            shown |= {one.name for one in (await caller.call(wire.LIST_APPS)).apps}
            for (kind, variant), name in names.items():
                seen = bool(RULES[f"list_{kind}s" if kind is Kind.APP else "list_data"].who & standing(person, kind, variant))
                assert (name in shown) == seen, f"{person}: {kind} {variant}"


async def test_members_find_the_jobs_of_their_group_and_read_them_only(grid: TestGrid, tmp_path: Path):
    async with AsyncExitStack() as running:
        cast = await cast_of(grid, running)
        things = Things(cast, tmp_path)
        job, array = await things.path(Kind.JOB, "group", fresh=False), await things.path(Kind.ARRAY, "group", fresh=False)
        await things.path(Kind.JOB, "private", fresh=False)
        listed = await cast.bob.call(wire.LIST_JOBS, query={"group": "hep"})
        assert [one.id for one in listed.jobs] == [job["job"]]
        assert [one.id for one in (await cast.bob.call(wire.LIST_ARRAYS, query={"group": "hep"})).arrays] == [array["array"]]
        assert not (await cast.bob.call(wire.LIST_JOBS)).jobs
        with pytest.raises(InvalidInput, match="not in a group"):
            await cast.eve.call(wire.LIST_JOBS, query={"group": "hep"})
        with pytest.raises(NotFound):
            await cast.eve.call(wire.LIST_JOBS, query={"array": array["array"]})


# Narrowed tokens


async def narrowed(user: Transport, *rights: str, lifetime_s: float = 60.0) -> Credentials:
    token = make_secret()
    await user.call(wire.ADD_TOKEN, wire.AddToken(token_hash=Sha256(hash_secret(token)), rights=rights, lifetime_s=lifetime_s))
    return msgspec.structs.replace(user.credentials, token=token)


_NO_PATH: dict[str, object] = {
    **dict.fromkeys(("token", "upload", "job", "id", "peer", "hub", "array", "set", "worker"), 0),
    "user": "none",
    "group": "none",
    "reference": "none",
    "endorser": "none",
    "placement": 999_999,
    "sha256": "0" * 64,
}


@pytest.mark.parametrize("right", [right for right in Right if right is not Right.PILOT])
async def test_narrowed_token_opens_the_calls_of_its_right_and_no_other(grid: TestGrid, right: Right):
    async with Transport(await grid.admin()) as admin, Transport(await narrowed(admin, right)) as small:
        role = Role.ADMIN if right in (Right.ADMIN, Right.METRICS) else Role.USER
        for route in wire.ROUTES.values():
            if route.name in ("join", "login", "join_hub"):
                continue
            opens = not ROLES[route.name] or (covers(frozenset({right}), route.name) and role in ROLES[route.name])
            assert (await refusal(small, route, _NO_PATH) is not Forbidden) == opens, route.name


async def test_narrowed_token_makes_no_wider_one_and_none_that_outlives_it(grid: TestGrid):
    async with Transport(await grid.admin()) as admin:
        small_one = await narrowed(admin, "account", "jobs:read", lifetime_s=60)
        async with Transport(small_one) as small:
            for wider in (("jobs",), ("admin",), ("metrics",), ("jobs:read", "data:read")):
                with pytest.raises(Forbidden):
                    await narrowed(small, *wider)
            await narrowed(small, "jobs:read", lifetime_s=3600)
            tokens = (await admin.call(wire.LIST_TOKENS)).tokens
            made = [one for one in tokens if one.rights == ("jobs:read",)]
            assert made[0].expires_at == next(one.expires_at for one in tokens if len(one.rights) == 2)
            with pytest.raises(Forbidden):
                await small.call(wire.RENEW_TOKEN)
    async with Grid(await grid.admin()) as boss:
        await boss.add_user("ann")
    async with Transport(await grid.user("ann")) as ann:
        with pytest.raises(Forbidden):
            await narrowed(ann, "admin")
        with pytest.raises(InvalidInput):
            await narrowed(ann, "everything")
        with pytest.raises(InvalidInput):
            await narrowed(ann)


async def test_narrowed_admin_without_the_right_admin_sees_what_a_user_sees(grid: TestGrid, tmp_path: Path):
    async with AsyncExitStack() as running:
        cast = await cast_of(grid, running)
        job = await Things(cast, tmp_path).path(Kind.JOB, "private", fresh=False)
        await cast.admin.call(wire.GET_JOB, path=job)
        async with Transport(await narrowed(cast.admin, "jobs")) as small:
            with pytest.raises(NotFound):
                await small.call(wire.GET_JOB, path=job)


async def test_narrowed_token_gets_nothing_more_by_a_job_or_a_link(grid: TestGrid, tmp_path: Path):
    async with AsyncExitStack() as running:
        cast = await cast_of(grid, running)
        reaching = JobSpec(machine=Machine(disk="played", network=Network.OVERLAY, reach=(Reach("grid", API_SERVICE, 8470),)))
        for rights in (("jobs",), ("jobs", "data", "overlay")):  # the job's would outlive it, and so would its jobs'
            async with Transport(await narrowed(cast.ann, *rights)) as small:
                with pytest.raises(Forbidden, match="narrowed"):
                    await small.call(wire.SUBMIT_JOB, wire.SubmitJob(spec=reaching))
        async with Transport(await narrowed(cast.admin, "admin")) as small:
            request = wire.SecretRequest(secret_hash=Sha256(hash_secret("x")))
            with pytest.raises(Forbidden):
                await small.call(wire.ADD_LOGIN_SECRET, request, path={"user": "admin"})


async def test_narrowed_token_fetches_only_the_kind_of_bytes_it_may_read(grid: TestGrid, tmp_path: Path):
    async with AsyncExitStack() as running:
        cast = await cast_of(grid, running)
        things = Things(cast, tmp_path)
        blobs = {
            "jobs:read": await things.path(Kind.BLOB, "result of private", fresh=False),
            "data:read": await things.path(Kind.BLOB, "private", fresh=False),
        }
        for right in blobs:
            async with Transport(await narrowed(cast.ann, right)) as small:
                for of, path in blobs.items():
                    assert (await refusal(small, wire.GET_BLOB, path) is None) == (of == right), (right, of)


async def test_login_ends_after_its_time_and_can_be_renewed_before(tmp_path: Path):
    clock = _Later()
    async with running_grid(tmp_path / "server", clock=clock) as grid, Transport(await grid.admin()) as admin:
        clock.ahead_s = 89 * 86400.0
        assert (await admin.call(wire.RENEW_TOKEN)).expires_at == pytest.approx(clock.now() + 90 * 86400, abs=60)
        clock.ahead_s = 178 * 86400.0
        assert (await admin.call(wire.WHO)).name == "admin"
        clock.ahead_s = 180 * 86400.0
        with pytest.raises(Unauthenticated):
            await admin.call(wire.WHO)


async def test_login_can_be_for_a_shorter_time_but_not_for_a_longer_one(grid: TestGrid):
    from deskgrid.server.setup import make_login_link

    for wanted_s, found_s in ((60.0, 60.0), (1e9, 90 * 86400.0)):
        known = await login(await make_login_link(grid.home, grid.settings, "admin"), "test", lifetime_s=wanted_s)
        async with Transport(known) as admin:
            ends = (await admin.call(wire.WHO)).expires_at
            assert ends is not None
            assert ends - grid.services.clock.now() == pytest.approx(found_s, abs=30)


class _Later(SystemClock):
    ahead_s = 0.0

    def now(self) -> float:
        return super().now() + self.ahead_s


async def test_without_a_token_only_the_open_routes_answer(grid: TestGrid):
    admin = await grid.admin()
    wrong = Credentials(address=admin.address, authority_pem=admin.authority_pem, token="x" * 43)
    async with Transport(wrong) as transport:
        for route in wire.ROUTES.values():
            found = await refusal(transport, route, _NO_PATH)
            if route.name in ("join", "login", "join_hub"):
                continue
            assert (found is Unauthenticated) == bool(ROLES[route.name]), route.name


async def test_server_of_another_grid_is_not_believed(grid: TestGrid, tmp_path: Path):
    async with running_grid(tmp_path / "other") as other:
        mine, theirs = await grid.admin(), await other.admin()
        mixed = Credentials(address=theirs.address, authority_pem=mine.authority_pem, token=mine.token)
        async with Transport(mixed, tries=1) as transport:
            with pytest.raises(DeskgridError, match="not this grid's"):
                await transport.call(wire.WHO)
        link = await other.join_link()
        from deskgrid.client.grid import join
        from deskgrid.link import Link

        forged = Link(purpose="join", address=mine.address, authority=link.authority, secret=link.secret)
        with pytest.raises(DeskgridError, match="not the one of this link"):
            await join(forged, "pc")
