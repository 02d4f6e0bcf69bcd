"""Programs put into the cage of a fake machine, where they find what programs in a VM find."""

from __future__ import annotations

import os

import psutil

from tests.system.harness import System, until


def machine(grid: System, worker: str = "pc") -> psutil.Process:
    """Return the process of the worker's only machine, as soon as it runs."""

    def found() -> list[psutil.Process]:
        return [process for process in grid.machines(worker) if any("fake_machine" in word for word in process.cmdline())]

    [one] = until(found, what=f"{worker} has a machine")
    return one


def inside(grid: System, worker: str = "pc") -> tuple[str, ...]:
    """Return what to write in front of a command to run it in the cage of the worker's only machine."""
    user = () if os.geteuid() == 0 else ("-U", "--preserve-credentials")
    return ("nsenter", "-t", str(machine(grid, worker).pid), "-n", *user)
