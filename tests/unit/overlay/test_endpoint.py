"""Where peers listen."""

from __future__ import annotations

import resource
from collections.abc import Iterator

import pytest

from tests.unit.overlay.small_grid import SmallGrid


@pytest.fixture
def few_files() -> Iterator[int]:
    """A limit of open files as most systems set it, lower than what is allowed, which is returned."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(256, hard), hard))
    yield hard
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


async def test_endpoint_may_open_as_many_files_as_the_system_allows(few_files: int):
    async with SmallGrid() as grid:
        await grid.endpoint()
        assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] == few_files
