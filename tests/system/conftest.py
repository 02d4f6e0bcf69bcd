"""A grid of real processes per test."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.system.harness import System


@pytest.fixture
def system(tmp_path: Path) -> Iterator[System]:
    """A running server with an admin logged in; workers are the test's to add."""
    grid = System(tmp_path)
    try:
        grid.start_server()
        yield grid
    finally:
        grid.stop()
        stray = [process for name in grid.workers for process in grid.machines(name)]
        for process in stray:
            process.kill()
        assert not stray, f"machines were left running: {stray}\n{grid.logs()}"
