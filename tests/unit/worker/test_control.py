"""Commands to a worker that runs, and to one that does not."""

from __future__ import annotations

import asyncio
import stat
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import msgspec
import pytest

from deskgrid.client.transport import Credentials, save_credentials
from deskgrid.errors import Conflict, InvalidInput
from deskgrid.model.jobs import AttemptState
from deskgrid.worker.agent import run_worker
from deskgrid.worker.control import ask
from deskgrid.worker.home import locked
from tests.unit.overlay.certificates import Authority
from tests.unit.worker.play import SETTINGS, Rig, publish_iso

CREDENTIALS = Credentials(address="grid:1", authority_pem=Authority().pem.decode(), token="t", name="pc")
# The process that runs the tests keeps its priority.
GENTLE = msgspec.structs.replace(SETTINGS, nice=0)


@asynccontextmanager
async def program(rig: Rig) -> AsyncIterator[asyncio.Task[None]]:
    """Run the whole worker program during the block."""
    save_credentials(rig.home.credentials, CREDENTIALS)

    @asynccontextmanager
    async def connect(credentials: Credentials) -> AsyncIterator[object]:
        assert credentials == CREDENTIALS
        yield rig.server

    task = asyncio.create_task(
        run_worker(rig.home.folder, GENTLE, clock=rig.clock, drivers=[rig.driver], transport_factory=connect)  # type: ignore[arg-type]
    )
    await rig.until(lambda: rig.server.syncs)
    try:
        yield task
    finally:
        task.cancel()
        await rig.until(task.done)


async def asked(rig: Rig, command: str) -> object:
    """Ask while the worker's time goes on."""
    return await rig.through(asyncio.create_task(ask(rig.home.folder, command)))


async def test_running_worker_carries_out_commands(rig: Rig) -> None:
    async with program(rig):
        status = await ask(rig.home.folder, "status")
        assert (status.running, status.name, status.address, status.connected) == (True, "pc", "grid:1", True)
        assert (await ask(rig.home.folder, "pause")).paused
        assert rig.home.paused.exists()
        assert not (await ask(rig.home.folder, "resume")).paused
        assert stat.S_IMODE(rig.home.control.stat().st_mode) == 0o600
    assert not rig.home.control.exists()


async def test_leave_is_answered_when_all_is_gone(rig: Rig) -> None:
    async with program(rig) as task:
        await rig.running(disk=publish_iso(rig.server))
        assert any(rig.home.cache.iterdir()) and rig.journalled()
        answer = await asked(rig, "leave")
        assert str(answer) == "left the grid"
        assert not rig.pc.machines and rig.server.left
        await rig.through(task)
    assert [path.name for path in rig.home.folder.iterdir()] == ["lock"]


async def test_wrong_token_is_refused(rig: Rig) -> None:
    async with program(rig):
        address = msgspec.json.decode(rig.home.control.read_bytes())
        reader, writer = await asyncio.open_connection("127.0.0.1", address["port"])
        writer.write(msgspec.json.encode({"token": "guessed", "command": "leave"}) + b"\n")
        assert b"Unauthenticated" in await reader.readline()
        writer.close()
        assert not rig.server.left


async def test_nonsense_on_the_control_port_does_no_harm(rig: Rig) -> None:
    async with program(rig):
        address = msgspec.json.decode(rig.home.control.read_bytes())
        for nonsense in (b"\n", b"\xff" * 100 + b"\n", b"[]\n"):
            reader, writer = await asyncio.open_connection("127.0.0.1", address["port"])
            writer.write(nonsense)
            assert b"InvalidInput" in await reader.readline()
            writer.close()
        assert (await ask(rig.home.folder, "status")).running


async def test_second_worker_of_a_folder_is_refused(rig: Rig) -> None:
    save_credentials(rig.home.credentials, CREDENTIALS)
    with locked(rig.home):
        second = asyncio.create_task(run_worker(rig.home.folder, GENTLE, clock=rig.clock, drivers=[rig.driver]))
        with pytest.raises(Conflict, match="already"):
            await rig.through(second)


async def test_worker_without_credentials_says_what_to_do(rig: Rig) -> None:
    with pytest.raises(InvalidInput, match="worker join LINK"):
        await run_worker(rig.home.folder, GENTLE, clock=rig.clock, drivers=[rig.driver])


async def test_pause_and_status_without_a_running_worker(rig: Rig) -> None:
    async with rig.working(keep=True):
        attempt = await rig.running()
    save_credentials(rig.home.credentials, CREDENTIALS)
    assert (await ask(rig.home.folder, "pause")).paused
    status = await ask(rig.home.folder, "status")
    assert (status.running, status.name, status.paused, status.cached) == (False, "pc", True, 1)
    assert [one.attempt_id for one in status.attempts] == [attempt]
    async with rig.working():
        await rig.until(lambda: rig.server.state(attempt) is AttemptState.SUSPENDED)
        assert rig.pc.machine.frozen
    assert not (await ask(rig.home.folder, "resume")).paused


async def test_control_file_of_a_killed_worker_does_not_mislead(rig: Rig) -> None:
    rig.home.create()
    rig.home.control.write_text('{"port": 1, "token": "old"}')
    assert not (await ask(rig.home.folder, "status")).running


async def test_unknown_command_and_folder_are_named(rig: Rig) -> None:
    with pytest.raises(InvalidInput, match="no command 'dance'"):
        await ask(rig.home.folder, "dance")
    with pytest.raises(InvalidInput, match="no worker"):
        await ask(rig.home.folder, "status")
