"""Every way that a stream can take between two PCs, each forced in turn, in a laboratory of NATs and a firewalled server."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from deskgrid.testing.natlab import Nat, NatLab
from tests.system.lab import LabGrid
from tests.system.talk import started

WAYS = {
    "direct": (Nat.NONE, Nat.MASQUERADE),
    "reverse": (Nat.MASQUERADE, Nat.NONE),
    "punched": (Nat.MASQUERADE, Nat.MASQUERADE),
    "relayed": (Nat.FULLY_RANDOM, Nat.FULLY_RANDOM),
}
"""Path -> NAT of the worker's site, and of the user's."""


@contextmanager
def grid_between(folder: Path, worker: Nat, user: Nat, **environment: str) -> Iterator[LabGrid]:
    """A grid with its worker at one site and its user at the other."""
    with NatLab({"a": worker, "b": user}) as lab:
        grid = LabGrid(folder, lab, lab.sites["b"][0], **environment)
        try:
            grid.start_server()
            grid.publish()
            grid.add_worker_at(lab.sites["a"][0])
            yield grid
        finally:
            grid.stop()
            for process in grid.machines():
                process.kill()


@pytest.mark.parametrize("way", [pytest.param(way, marks=pytest.mark.full if way in ("direct", "reverse") else ()) for way in WAYS])
def test_stream_takes_the_path_that_is_forced(tmp_path: Path, way: str):
    worker, user = WAYS[way]
    with grid_between(tmp_path, worker, user, DESKGRID_PEER_PATHS=way) as grid:
        job = grid.submit("serve = [7000]\nhangs = true\n", network='"overlay"', offer='["echo:7000"]')
        _, ready = started(grid, "connect", f"echo.job-{job}")
        for said in ("first", "second", "x" * 50_000):
            assert grid.ask(ready["address"], said) == said, grid.logs()
        assert grid.paths_taken() == {way}, grid.logs()


@pytest.mark.parametrize(
    ("worker", "user", "path"),
    [
        (Nat.NONE, Nat.NONE, {"direct", "reverse", "punched"}),
        pytest.param(Nat.NONE, Nat.FULLY_RANDOM, {"direct", "punched"}, marks=pytest.mark.full),
        pytest.param(Nat.FULLY_RANDOM, Nat.NONE, {"reverse", "punched"}, marks=pytest.mark.full),
        (Nat.MASQUERADE, Nat.MASQUERADE, {"punched"}),
        pytest.param(Nat.REJECTING, Nat.MASQUERADE, {"punched"}, marks=pytest.mark.full),
        (Nat.FULLY_RANDOM, Nat.MASQUERADE, {"relayed"}),
    ],
    ids=lambda value: str(value) if isinstance(value, Nat) else "",
)
@pytest.mark.full
def test_best_path_is_found_by_itself(tmp_path: Path, worker: Nat, user: Nat, path: set[str]):
    """The first stream may be relayed while a better way is found; later ones take that. Where one side is public, dialling at the same
    time works as well as dialling."""
    with grid_between(tmp_path, worker, user) as grid:
        job = grid.submit("serve = [7000]\nhangs = true\n", network='"overlay"', offer='["echo:7000"]')
        _, ready = started(grid, "connect", f"echo.job-{job}")
        for number in range(8):
            assert grid.ask(ready["address"], f"{number}") == f"{number}", grid.logs()
        assert grid.paths_taken() & path, grid.logs()
        assert grid.paths_taken() <= {*path, "relayed"}
