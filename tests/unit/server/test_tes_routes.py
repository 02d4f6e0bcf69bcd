"""GA4GH TES at a real server, with workers played by hand: rights, repetition, retention, and what strange clients send."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
import pytest

from deskgrid.client.grid import Grid, describe_file
from deskgrid.client.transport import Credentials, Transport
from deskgrid.errors import Conflict, Forbidden, InvalidInput, NotFound
from deskgrid.link import hash_secret, make_secret
from deskgrid.model import tes, wire
from deskgrid.model.ids import JobId, Sha256
from deskgrid.model.jobs import AttemptState, JobSpec, Machine
from deskgrid.model.machines import MachineKind
from deskgrid.model.tes import TesExecutor, TesInput, TesResources, TesState, TesTask
from deskgrid.model.workers import AttemptReport
from deskgrid.server.store import retention
from deskgrid.settings import ServerSettings
from deskgrid.testing.grids import TestGrid, play_job, played_sync, running_grid

TRUE = TesExecutor(image="process", command=("true",))
SECRET = TesInput(path="/scratch/in", content="s3cr3t")


@pytest.fixture
async def grid(tmp_path: Path) -> AsyncIterator[TestGrid]:
    async with running_grid(tmp_path / "server") as running:
        yield running


async def created(user: Transport, **fields: Any) -> str:
    return str((await user.call(tes.CREATE_TASK, TesTask(executors=(TRUE,), **fields))).id)


async def got(user: Transport, task_id: str, view: str = "FULL") -> TesTask:
    found: TesTask = await user.call(tes.GET_TASK, path={"id": task_id}, query={"view": view})
    return found


async def sent(login: Credentials, method: str, path: str, body: bytes | None = None, **headers: str) -> tuple[int, Any]:
    """Send bytes as a client would that is not ours."""
    given = {"Authorization": f"Bearer {login.token}", **headers}
    async with (
        aiohttp.ClientSession(connector=aiohttp.TCPConnector(ssl=False)) as session,
        session.request(method, f"https://{login.address}/ga4gh/tes/v1/{path}", data=body, headers=given) as answer,
    ):
        return answer.status, json.loads(await answer.read())


async def test_task_is_a_job_and_a_job_is_not_a_task(grid: TestGrid):
    async with Transport(await grid.admin()) as admin:
        task_id = await created(admin, name="one", inputs=(SECRET,))
        job = (await admin.call(wire.GET_JOB, path={"job": task_id})).job
        assert (job.spec.machine.kind, job.spec.name) == (MachineKind.PROCESS, "one")
        native = await admin.call(
            wire.SUBMIT_JOB, wire.SubmitJob(spec=JobSpec(machine=Machine(kind=MachineKind.PROCESS), command=("true",)))
        )
        for path in (native.id, "0", "x", "9" * 30, "-1"):
            with pytest.raises(NotFound):
                await got(admin, str(path))
        with pytest.raises(NotFound):
            await admin.call(tes.CANCEL_TASK, path={"id": native.id})
        assert (await admin.call(wire.GET_JOB, path={"job": native.id})).job.state == "waiting"
        found = await got(admin, task_id)
        assert found.state is TesState.QUEUED and found.inputs is not None and found.inputs[0].content == "s3cr3t"


async def test_same_key_makes_one_task_and_no_key_makes_two(grid: TestGrid):
    login, body = await grid.admin(), msgspec.json.encode(TesTask(executors=(TRUE,), inputs=(SECRET,)))
    answers = [await sent(login, "POST", "tasks", body, **{"Idempotency-Key": key}) for key in ("a", "a", "b")]
    assert answers == [(200, {"id": "1"}), (200, {"id": "1"}), (200, {"id": "2"})]
    assert [await sent(login, "POST", "tasks", body) for _ in range(2)] == [(200, {"id": "3"}), (200, {"id": "4"})]


async def test_same_key_at_the_same_time_makes_one_task(grid: TestGrid):
    login, body = await grid.admin(), msgspec.json.encode(TesTask(executors=(TRUE,), inputs=(SECRET,)))
    answers = await asyncio.gather(*(sent(login, "POST", "tasks", body, **{"Idempotency-Key": "a"}) for _ in range(6)))
    assert answers == [(200, {"id": "1"})] * 6


async def test_members_see_a_task_of_their_group_but_not_its_contents_and_do_not_cancel_it(grid: TestGrid):
    async with Grid(await grid.admin()) as boss:
        for name in ("ann", "bob", "eve"):
            await boss.add_user(name)
        await boss.add_group("hep")
        await boss.set_members("hep", add=["ann", "bob"])
    async with (
        Transport(await grid.user("ann")) as ann,
        Transport(await grid.user("bob")) as bob,
        Transport(await grid.user("eve")) as eve,
    ):
        task_id = await created(ann, inputs=(SECRET,), resources=TesResources(backend_parameters={"group": "hep"}))
        for user, content in ((ann, "s3cr3t"), (bob, None)):
            found = await got(user, task_id)
            assert found.inputs is not None and found.inputs[0].content == content
        with pytest.raises(Forbidden):
            await bob.call(tes.CANCEL_TASK, path={"id": task_id})
        with pytest.raises(NotFound):
            await got(eve, task_id)
        assert [len((await user.call(tes.LIST_TASKS)).tasks) for user in (ann, bob, eve)] == [1, 0, 0]
        with pytest.raises(InvalidInput, match="group"):
            await created(eve, resources=TesResources(backend_parameters={"group": "hep"}))


async def test_token_that_may_not_read_data_gives_it_to_no_task(grid: TestGrid, tmp_path: Path):
    (tmp_path / "events").write_text("1")
    async with Grid(await grid.admin()) as boss, Transport(await grid.admin()) as admin:
        await boss.put(tmp_path / "events", "events")
        token = make_secret()
        await admin.call(wire.ADD_TOKEN, wire.AddToken(token_hash=Sha256(hash_secret(token)), rights=("jobs",), lifetime_s=60))
        wanted = TesInput(path="/scratch/in", url="deskgrid:events")
        async with Transport(msgspec.structs.replace(admin.credentials, token=token)) as small:
            assert await created(small)
            with pytest.raises(Forbidden):
                await created(small, inputs=(wanted,))
        assert await created(admin, inputs=(wanted,))


async def test_image_is_a_disk_of_the_grid_and_data_is_the_grids(grid: TestGrid):
    login = await grid.admin()
    async with Transport(await grid.worker()) as worker:
        await play_job(login, worker)
    async with Transport(login) as admin:
        booted = TesTask(executors=(TesExecutor(image="played", command=("true",)),))
        made = await admin.call(tes.CREATE_TASK, booted)
        assert (await admin.call(wire.GET_JOB, path={"job": made.id})).job.spec.machine.kind is MachineKind.VM
    for wanted, where in (
        ({"executors": [{"image": "docker.io/alpine:3", "command": ["x"]}]}, "executors[0].image"),
        (
            {"executors": [{"image": "process", "command": ["x"]}], "inputs": [{"path": "/tmp/x", "url": "deskgrid:nothing"}]},
            "input-0",
        ),
    ):
        status, told = await sent(login, "POST", "tasks", json.dumps(wanted).encode())
        assert status == 400 and where in told["message"]


PROCESS = '{"image":"process","command":["x"]}'


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"null",
        b"[]",
        b"{",
        b"\xff\xfe",
        b"[" * 100_000,
        b"{}",
        b'{"executors":null}',
        b'{"executors":[null]}',
        b'{"executors":[{}]}',
        b'{"executors":[{"image":"process","command":"x"}]}',
        b'{"executors":[{"image":"process","command":["\\ud800"]}]}',
        b'{"executors":[{"image":"process","command":["\\u0000"]}]}',
        b'{"executors":[{"image":"process","command":["x"],"env":{"A":1}}]}',
        f'{{"executors":[{PROCESS}],"resources":{{"cpu_cores":{"9" * 400}}}}}'.encode(),
        f'{{"executors":[{PROCESS}],"resources":{{"ram_gb":1e308}}}}'.encode(),
        f'{{"executors":[{PROCESS}],"resources":{{"ram_gb":1e999}}}}'.encode(),
        f'{{"executors":[{PROCESS}],"resources":{{"backend_parameters":{{"priority":"{"9" * 5000}"}}}}}}'.encode(),
        f'{{"executors":[{PROCESS}],"state":"DONE"}}'.encode(),
        f'{{"executors":[{PROCESS}],"inputs":[{{"path":"/tmp/x","url":"deskgrid:{"x" * 9000}"}}]}}'.encode(),
        f'{{"executors":[{",".join([PROCESS] * 100_000)}]}}'.encode(),
        b'{"name":"' + b"x" * (9 << 20) + b'"}',
    ],
)
async def test_whatever_is_no_task_is_refused_with_400(grid: TestGrid, body: bytes):
    status, told = await sent(await grid.admin(), "POST", "tasks", body)
    assert (status, told["error"]) == (400, "InvalidInput") and told["message"]
    assert (await sent(await grid.admin(), "GET", "tasks"))[1] == {"tasks": []}


@pytest.mark.parametrize(
    "query",
    [
        "view=ALL",
        "state=DONE",
        "page_size=0",
        "page_size=2048",
        "page_size=x",
        "page_size=" + "9" * 30,
        "page_token=x",
        "page_token=-1",
        "tag_value=x",
        "name_prefix=%00",
    ],
)
async def test_query_that_cannot_be_is_refused_with_400(grid: TestGrid, query: str):
    status, told = await sent(await grid.admin(), "GET", f"tasks?{query}")
    assert status == 400 and told["message"]


async def test_service_says_what_it_is_without_a_token(grid: TestGrid):
    login = await grid.admin()
    status, told = await sent(msgspec.structs.replace(login, token=""), "GET", "service-info")
    assert status == 200
    assert told["type"] == {"group": "org.ga4gh", "artifact": "tes", "version": "1.1.0"}
    assert told["tesResources_backend_parameters"] == ["group", "priority", "wall_time"]
    for method, path in (("GET", "tasks"), ("POST", "tasks"), ("GET", "tasks/1"), ("POST", "tasks/1:cancel")):
        assert (await sent(msgspec.structs.replace(login, token=""), method, path))[0] == 401


async def test_quota_and_room_hold_for_tasks_too(grid: TestGrid):
    async with Grid(await grid.admin()) as boss:
        await boss.add_user("ann")
        await boss.set_user("ann", max_waiting=1)
        async with Transport(await grid.user("ann")) as ann:
            await created(ann)
            with pytest.raises(Conflict):
                await created(ann)
            await boss.set_user("ann", max_waiting=10, max_bytes=1)
            with pytest.raises(Forbidden, match="room"):
                await created(ann)


async def test_list_goes_on_where_a_page_ended_whatever_has_come_since(grid: TestGrid):
    async with Transport(await grid.admin()) as admin:
        made = [await created(admin, name=f"task-{number}") for number in range(70)]
        seen: list[str] = []
        query: dict[str, object] = {"view": "BASIC", "page_size": 2047}
        while True:
            page = await admin.call(tes.LIST_TASKS, query=query)
            seen += [one.id for one in page.tasks]
            if page.next_page_token is None:
                break
            query["page_token"] = page.next_page_token
            await created(admin)
        assert seen == made[::-1]


async def test_log_is_told_and_goes_with_results_and_the_task_with_its_job(tmp_path: Path):
    settings = ServerSettings(listen="127.0.0.1:0", reserve_bytes=0, retain_s=3600)
    async with (
        running_grid(tmp_path / "server", settings) as grid,
        Transport(await grid.admin()) as admin,
        Transport(await grid.worker()) as worker,
    ):
        played = TesTask(executors=(TesExecutor(image="played", command=("true",)),), inputs=(SECRET,))
        await play_job(admin.credentials, worker)
        task_id = (await admin.call(tes.CREATE_TASK, played)).id
        assignments = (await worker.call(wire.SYNC, played_sync(room=True))).assignments
        [leased] = [one for one in assignments if str(one.job_id) == task_id]
        mark = (await worker_context(worker, leased.context, tmp_path)).split(b"mark=")[1].split()[0].decode()
        text = f"\n{mark} begin 0 @5\nhello\n{mark} end 0 2@5-6\n".encode()
        for stream in ("stdout", "stderr"):
            for offset in range(0, len(text), 10):
                said = wire.AppendLog(attempt_id=leased.attempt_id, stream=stream, offset=offset, data=text[offset : offset + 10])
                await worker.call(wire.APPEND_LOG, said)
        await worker.call(wire.SYNC, played_sync(AttemptReport(attempt_id=leased.attempt_id, state=AttemptState.RUNNING)))
        assert (await got(admin, task_id)).state is TesState.RUNNING
        ended = AttemptReport(
            attempt_id=leased.attempt_id, state=AttemptState.FAILED, exit_code=2, reason="context.sh ended with 2"
        )
        await worker.call(wire.SYNC, played_sync(ended))
        found = await got(admin, task_id)
        assert found.state is TesState.EXECUTOR_ERROR and found.logs is not None
        [log] = found.logs[0].logs
        assert (log.exit_code, log.stdout, log.stderr, log.start_time) == (2, "hello", "hello", "1970-01-01T00:00:05.000+00:00")
        await grid.services.store.write(expire_now)
        found = await got(admin, task_id)
        assert found.logs is not None and found.inputs is not None
        assert (found.inputs[0].content, found.logs[0].logs) == (None, (tes.TesExecutorLog(exit_code=2),))
        await admin.call(wire.REMOVE_JOB, path={"job": task_id})
        with pytest.raises(NotFound):
            await got(admin, task_id)
        assert (await admin.call(tes.LIST_TASKS)).tasks == ()


def expire_now(tx: Any) -> None:
    tx.now += 1e9
    assert retention.expire_results(tx, 10) == 1


async def worker_context(worker: Transport, context: Any, folder: Path) -> bytes:
    """Return the script of a job's context, fetched as its worker does."""
    from deskgrid import archive

    await worker.download(context, folder / "context.tar.zst")
    assert describe_file(folder / "context.tar.zst") == context
    archive.unpack(folder / "context.tar.zst", folder / "context")
    assert (folder / "context" / "inputs" / "0").read_text() == "s3cr3t"
    return (folder / "context" / "context.sh").read_bytes()


async def test_cancelled_by_one_api_is_cancelled_in_the_other(grid: TestGrid):
    async with Transport(await grid.admin()) as admin, Grid(await grid.admin()) as boss:
        task_id = await created(admin)
        await boss.cancel(JobId(int(task_id)))
        assert (await got(admin, task_id, "MINIMAL")) == TesTask(id=task_id, state=TesState.CANCELED)
        [entry] = [one for one in (await boss.audit_log()).entries if one.action == "tes_create"]
        assert (entry.object, entry.name) == (f"job {task_id}", "admin")
