"""The four connections in real virtual machines, typed as their README says: two sites behind NAT and a firewalled server."""

from __future__ import annotations

from pathlib import Path

import pytest

from deskgrid.testing.natlab import Nat, NatLab
from tests.system.lab import LabGrid
from tests.system.newcomer import Newcomer, commands

pytestmark = [pytest.mark.full, pytest.mark.timeout(900)]  # disks are built, and three machines boot, in software emulation


def test_the_four_connections_work_as_their_readme_says(tmp_path: Path):
    with NatLab(dict.fromkeys("ab", Nat.MASQUERADE), hosts=2) as lab:
        pc, (here, pc2) = lab.sites["a"][0], lab.sites["b"]
        grid = LabGrid(tmp_path, lab, here)
        user = Newcomer(tmp_path / "home", here.prefix, DESKGRID_CLIENT_HOME=grid.environment["DESKGRID_CLIENT_HOME"])
        try:
            grid.start_server()
            one_job = {"DESKGRID_WORKER_DRIVERS": "qemu", "DESKGRID_WORKER_ACCELERATOR": "tcg", "DESKGRID_WORKER_CPUS": "1"}
            for host, name in ((pc, "pc"), (pc2, "pc2")):
                grid.add_worker_at(host, name, **one_job)
            for line in commands("examples/four-connections/README.md"):
                user.type(line)
            workers = {grid.job(number)["attempts"][0]["worker_id"] for number in (1, 3)}
            assert len(workers) == 2
        finally:
            user.leave()
            grid.stop()
            for process in [process for name in grid.workers for process in grid.machines(name)]:
                process.kill()
