"""What watches a process job."""

from __future__ import annotations

import subprocess

from deskgrid.machines.sandbox import python_command

SLOW = {"collections", "contextlib", "enum", "functools", "pathlib", "re", "typing", "msgspec"}
"""Modules that take as long to load as all that is needed, or longer."""


def test_it_starts_with_every_job_and_loads_nothing_that_takes_long() -> None:
    [python, *options, boot, folders] = python_command("deskgrid.machines.process_machine", "main")
    boot = f"{boot.rpartition('; ')[0]}; import sys; print(*sys.modules)"
    loaded = subprocess.run([python, *options, boot, folders], capture_output=True, check=True, text=True).stdout.split()
    assert "deskgrid.machines.process_tree" in loaded
    assert not SLOW & set(loaded)
