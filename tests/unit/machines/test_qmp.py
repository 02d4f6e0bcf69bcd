"""The journal says why a machine ended; commands fail in our words."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deskgrid.errors import MachineFailed
from deskgrid.machines.driver import ExitCause
from deskgrid.machines.qmp import JOURNAL_OUTPUT, SOCKET_NAME, Journal, create_journal, execute, journal_event, read_journal

GREETING = b'{"QMP": {"version": {}, "capabilities": []}}\n'


def journal_of(folder: Path, *lines: bytes) -> Journal:
    (folder / JOURNAL_OUTPUT).write_bytes(b"".join(lines))
    return read_journal(folder)


def test_missing_or_empty_journal_says_nothing(tmp_path: Path) -> None:
    assert read_journal(tmp_path) == Journal()
    create_journal(tmp_path)
    assert read_journal(tmp_path) == Journal()


@pytest.mark.parametrize(
    ("reason", "cause"),
    [
        ("guest-shutdown", ExitCause.POWERED_OFF),
        ("guest-reset", ExitCause.RESET),
        ("guest-panic", ExitCause.RESET),
        ("host-signal", ExitCause.KILLED),
        ("host-qmp-quit", ExitCause.KILLED),
    ],
)
def test_reason_of_shutdown_becomes_the_cause(tmp_path: Path, reason: str, cause: ExitCause) -> None:
    end = journal_of(tmp_path, GREETING, journal_event("SHUTDOWN", guest=True, reason=reason)).exit()
    assert end is not None
    assert end.cause is cause


def test_first_shutdown_counts(tmp_path: Path) -> None:
    lines = [journal_event("SHUTDOWN", reason=reason) for reason in ("guest-shutdown", "host-signal")]
    assert journal_of(tmp_path, *lines).shutdown_reason == "guest-shutdown"


def test_disk_error_that_froze_the_machine_goes_before_its_shutdown(tmp_path: Path) -> None:
    error = journal_event("BLOCK_IO_ERROR", action="stop", operation="write", nospace=True)
    end = journal_of(tmp_path, GREETING, error, journal_event("SHUTDOWN", reason="host-signal")).exit()
    assert end is not None
    assert end.cause is ExitCause.IO_ERROR
    assert "full" in end.detail


def test_disk_error_that_was_only_reported_to_the_guest_is_the_guests_affair(tmp_path: Path) -> None:
    assert journal_of(tmp_path, journal_event("BLOCK_IO_ERROR", action="report", operation="read")).exit() is None


def test_line_that_is_not_whole_yet_counts_as_not_said(tmp_path: Path) -> None:
    line = journal_event("SHUTDOWN", reason="guest-shutdown")
    assert journal_of(tmp_path, GREETING, line[: len(line) // 2]) == Journal(began=True)


def test_end_is_found_behind_days_of_chatter(tmp_path: Path) -> None:
    chatter = journal_event("RTC_CHANGE", offset=1) * 100_000
    journal = journal_of(tmp_path, GREETING, chatter, journal_event("SHUTDOWN", reason="guest-shutdown"))
    assert len(chatter) > 3 << 20
    assert journal == Journal(began=True, shutdown_reason="guest-shutdown")


@given(st.binary(max_size=400))
def test_any_bytes_can_be_read(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    journal = journal_of(tmp_path_factory.mktemp("journal"), GREETING, data)
    assert journal.began


# ---- commands


class Monitor:
    """Speaks QMP well enough for one command."""

    def __init__(self, answer: bytes | None, first: bytes = b"") -> None:
        self.answer = answer
        self.first = first
        """What is said before the greeting of the first connection."""
        self.commands: list[dict[str, object]] = []

    async def __call__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(self.first)
        self.first = b""
        writer.write(b'{"QMP": {"version": {"qemu": {"micro": 0, "minor": 2, "major": 7}, "package": ""}, "capabilities": []}}\n')
        try:
            # A client need not end a command with a newline; each comes in one piece here.
            while data := await reader.read(4096):
                command = json.loads(data)
                if command["execute"] == "qmp_capabilities":
                    writer.write(b'{"return": {}}\n')
                    continue
                self.commands.append(command)
                if self.answer is None:
                    break
                writer.write(self.answer.replace(b"ID", json.dumps(command["id"]).encode()) + b"\n")
        finally:
            writer.close()


async def ask(folder: Path, monitor: Monitor, limit_s: float = 5.0) -> object:
    server = await asyncio.start_unix_server(monitor, folder / SOCKET_NAME)
    try:
        return await execute(folder, "query-status", {"a": 1}, limit_s=limit_s)
    finally:
        server.close()


async def test_command_returns_its_answer(tmp_path: Path) -> None:
    monitor = Monitor(b'{"return": {"running": true}, "id": ID}')
    assert await ask(tmp_path, monitor) == {"running": True}
    assert monitor.commands[0]["arguments"] == {"a": 1}


async def test_event_before_the_greeting_does_no_harm(tmp_path: Path) -> None:
    event = b'{"timestamp": {"seconds": 1, "microseconds": 2}, "event": "RESUME"}\n'
    assert await ask(tmp_path, Monitor(b'{"return": {"running": true}, "id": ID}', event)) == {"running": True}


async def test_refused_command_raises_machine_failed_with_qemus_words(tmp_path: Path) -> None:
    with pytest.raises(MachineFailed, match="nothing of the sort"):
        await ask(tmp_path, Monitor(b'{"error": {"class": "GenericError", "desc": "nothing of the sort"}, "id": ID}'))


async def test_qemu_that_ends_in_mid_command_raises_machine_failed(tmp_path: Path) -> None:
    with pytest.raises(MachineFailed):
        await ask(tmp_path, Monitor(None))


async def test_qemu_that_never_answers_raises_machine_failed(tmp_path: Path) -> None:
    with pytest.raises(MachineFailed):
        await ask(tmp_path, Monitor(b"\n"), limit_s=0.2)


async def test_socket_that_comes_late_is_waited_for(tmp_path: Path) -> None:
    asking = asyncio.create_task(execute(tmp_path, "query-status"))
    await asyncio.sleep(0)
    async with await asyncio.start_unix_server(Monitor(b'{"return": {}, "id": ID}'), tmp_path / SOCKET_NAME):
        assert await asking == {}


async def test_machine_that_was_removed_raises_at_once(tmp_path: Path) -> None:
    with pytest.raises(MachineFailed):
        await execute(tmp_path / "gone", "query-status", limit_s=60)
