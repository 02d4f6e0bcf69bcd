"""deskgrid ssh and scp hand to the system's programs what the user meant, and nothing that these take for options."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from deskgrid.cli import ssh as module
from deskgrid.errors import InvalidInput


@pytest.fixture
def commands(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[list[str]]:
    """What was run."""
    found: list[list[str]] = []

    @asynccontextmanager
    async def nothing(*_: object) -> AsyncIterator[int]:
        yield 4711

    async def run(command: Sequence[str]) -> int:
        found.append(list(command))
        return 0

    monkeypatch.setenv("DESKGRID_CLIENT_HOME", str(tmp_path))
    monkeypatch.setattr(module, "connected", nothing)
    monkeypatch.setattr(module, "_door", nothing)
    monkeypatch.setattr(module, "_program", lambda name: name)
    monkeypatch.setattr(module, "_run", run)
    return found


async def test_what_follows_the_job_is_the_command_also_if_it_looks_like_an_option(commands: list[list[str]]) -> None:
    await module.ssh("ann@job-1", "-oProxyCommand=touch x", "y")
    assert commands[0][-4:] == ["--", "ann@127.0.0.1", "-oProxyCommand=touch x", "y"]


@pytest.mark.parametrize("login", ["-oProxyCommand=touch x", "", "a b", "-", "a@b"])
async def test_a_login_that_is_no_user_is_refused(commands: list[list[str]], login: str) -> None:
    with pytest.raises(InvalidInput, match="not a user"):
        await module.ssh("job-1", "true", login=login)
    with pytest.raises(InvalidInput):
        await module.scp("file", "job-1:x", login=login)
    assert commands == []


async def test_an_error_while_the_door_is_open_is_raised_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    class OneJob:
        async def job(self, _number: int) -> object:
            offers = [type("Offer", (), {"name": "ssh"})]
            machine = type("Machine", (), {"offer": offers})
            return type("Detail", (), {"job": type("Job", (), {"spec": type("Spec", (), {"machine": machine})})})

    @asynccontextmanager
    async def peer_of(_grid: object) -> AsyncIterator[None]:
        yield None

    monkeypatch.setattr(module, "peer_of", peer_of)
    with pytest.raises(InvalidInput, match="not installed"):
        async with module._door(OneJob(), 1, 0.0):  # type: ignore[arg-type]
            raise InvalidInput("ssh is not installed")
