"""Transfers over a real server: cut anywhere, they go on where they stopped; wrong bytes are never taken."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from deskgrid.client.grid import Grid, describe_file
from deskgrid.errors import InvalidInput, ProtocolError, Unreachable
from deskgrid.model import wire
from deskgrid.model.data import Blob
from deskgrid.testing.gate import Gate
from deskgrid.testing.grids import TestGrid, running_grid

SIZE = 3_000_000


@pytest.fixture
async def grid(tmp_path: Path):
    async with running_grid(tmp_path / "server") as running:
        yield running


async def stored(user: Grid, file: Path, seed: int) -> Blob:
    file.write_bytes(random.Random(seed).randbytes(SIZE))
    return (await user.put(file, f"data{seed}")).blob


@pytest.mark.parametrize("have", [0, 1, SIZE // 2, SIZE - 1, SIZE])
async def test_download_goes_on_after_the_bytes_that_are_there(grid: TestGrid, tmp_path: Path, have: int):
    async with Grid(await grid.admin()) as user:
        blob = await stored(user, tmp_path / "source", have)
        partial = tmp_path / "partial"
        partial.write_bytes((tmp_path / "source").read_bytes()[:have])
        seen: list[int] = []
        await user.transport.download(blob, partial, seen.append)
        assert partial.read_bytes() == (tmp_path / "source").read_bytes()
        assert not seen or seen[0] > have


async def test_download_over_wrong_bytes_is_refused_and_removed(grid: TestGrid, tmp_path: Path):
    async with Grid(await grid.admin()) as user:
        blob = await stored(user, tmp_path / "source", 7)
        partial = tmp_path / "partial"
        partial.write_bytes(b"something else")
        with pytest.raises(ProtocolError, match="something else"):
            await user.transport.download(blob, partial)
        assert not partial.exists()


@pytest.mark.parametrize("seed", range(4))
async def test_transfers_through_a_line_that_breaks_again_and_again_end_whole(grid: TestGrid, tmp_path: Path, seed: int):
    import msgspec

    rng = random.Random(seed)
    credentials = await grid.admin()
    async with Gate(credentials.address) as gate:
        breaks = iter([rng.randrange(100_000, SIZE) for _ in range(3)])
        async with Grid(msgspec.structs.replace(credentials, address=gate.address)) as user:
            gate.break_after(next(breaks))
            blob = await stored(user, tmp_path / "source", seed)
            gate.break_after(next(breaks))
            await user.transport.download(blob, tmp_path / "target")
            assert (tmp_path / "target").read_bytes() == (tmp_path / "source").read_bytes()
            assert gate.broken == 2


async def test_transfer_without_any_progress_gives_up(grid: TestGrid, tmp_path: Path):
    import msgspec

    credentials = await grid.admin()
    async with Gate(credentials.address) as gate, Grid(msgspec.structs.replace(credentials, address=gate.address)) as user:
        blob = await stored(user, tmp_path / "source", 1)
        gate.shut()
        with pytest.raises(Unreachable):
            await user.transport.download(blob, tmp_path / "target")
        with pytest.raises(Unreachable):
            await user.transport.upload(tmp_path / "source", blob)


async def test_file_that_changed_since_it_was_described_is_refused(grid: TestGrid, tmp_path: Path):
    async with Grid(await grid.admin()) as user:
        file = tmp_path / "file"
        file.write_bytes(b"before")
        blob = describe_file(file)
        file.write_bytes(b"after!")
        with pytest.raises(InvalidInput, match="sha256"):
            await user.transport.upload(file, blob)
        assert (await user.transport.call(wire.LIST_DATA)).data == ()
