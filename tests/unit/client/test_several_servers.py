"""A grid with several server processes: whoever calls finds one that answers."""

from __future__ import annotations

import random
import socket
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import msgspec
import pytest

from deskgrid.client.grid import login
from deskgrid.client.transport import Transport
from deskgrid.errors import InvalidInput, Unreachable
from deskgrid.link import parse_link
from deskgrid.model import wire
from deskgrid.server.setup import make_login_link
from deskgrid.testing.grids import TestGrid, running_grid


@pytest.fixture
async def grid(tmp_path: Path) -> AsyncIterator[TestGrid]:
    async with running_grid(tmp_path / "server") as found:
        yield found


@pytest.fixture
def closed() -> Iterator[str]:
    """An address at which nobody listens."""
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        yield f"127.0.0.1:{holder.getsockname()[1]}"


@pytest.mark.parametrize("seed", range(4))
async def test_call_goes_to_the_server_that_answers(grid: TestGrid, closed: str, seed: int):
    known = await grid.admin()
    both = msgspec.structs.replace(known, address=f"{closed},{known.address},{closed}")
    async with Transport(both, tries=1, rng=random.Random(seed)) as transport:
        for _ in range(3):
            await transport.call(wire.STATUS)


async def test_no_server_that_answers_is_unreachable(grid: TestGrid, closed: str):
    known = msgspec.structs.replace(await grid.admin(), address=f"{closed},{closed}")
    async with Transport(known, tries=1) as transport:
        with pytest.raises(Unreachable):
            await transport.call(wire.STATUS)


async def test_link_with_several_addresses_leads_in_and_they_are_kept(grid: TestGrid, closed: str):
    link = await make_login_link(grid.home, grid.settings, "admin")
    both = msgspec.structs.replace(link, address=f"{closed},{link.address}")
    credentials = await login(parse_link(str(both), "login"))
    assert credentials.address == both.address


def test_addresses_of_the_newer_internet_protocol_pass_through_links():
    text = f"deskgrid://[::1]:1,[::2]:2/join?authority={'a' * 64}&secret=s"
    assert parse_link(text, "join").address == "[::1]:1,[::2]:2"
    with pytest.raises(InvalidInput):
        parse_link(f"deskgrid://[::1:1/join?authority={'a' * 64}&secret=s", "join")
