"""A factory of pilots as its user runs it, and jobs that only pilots can run."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from tests.system.harness import Program, System, until

PROCESS = '[machine]\nkind = "process"\nmemory = "64MiB"\nscratch = "64MiB"\n'


class Factory:
    """One with a single system, looked after every second."""

    def __init__(self, system: System, **part: Any) -> None:
        self.system = system
        self.file = system.folder / "factory.toml"
        self.set(**part)
        self.program = Program(["pilot", "factory", str(self.file), "--verbose"], system.environment, system.folder / "factory.log")
        system.programs.append(self.program)

    def set(self, **part: Any) -> None:
        """Write its file."""
        known = {
            "packages": ["root"],
            "memory": "1GiB",
            "jobs_per_pilot": 1,
            "idle": "3s",
            "deskgrid": f"{sys.executable} -m deskgrid",
        }
        lines = [f"{name} = {json.dumps(value)}" for name, value in {**known, **part}.items()]
        self.file.write_text("\n".join(['poll = "1s"', "[[system]]", *lines, ""]))

    def start(self) -> None:
        self.program.start()

    def out(self) -> list[dict[str, Any]]:
        """Return what it keeps of the pilots that are out."""
        file = self.system.folder / "client" / "factory" / "pilots.json"
        return list(json.loads(file.read_text())) if file.exists() else []

    def said(self, event: str) -> int:
        """Return how often it said something."""
        return self.program.said().count(f"event={event}")

    def until_said(self, event: str, count: int = 1) -> None:
        until(lambda: self.said(event) >= count, what=f"{event} in {self.program.log}\n{self.program.said()}")

    def until_none_is_out(self) -> None:
        until(lambda: self.out() == [], what=f"no pilot is out\n{self.program.said()}")


def job_file(system: System, script: str, *, count: int = 1, need: str = "root") -> Path:
    """Write jobs, of a line of shell each, that need a package."""
    file = system.folder / "job.toml"
    file.write_text(f'command = ["sh", "-c", {json.dumps(script)}]\n{PROCESS}need = ["{need}"]\n[array]\ncount = {count}\n')
    return file
