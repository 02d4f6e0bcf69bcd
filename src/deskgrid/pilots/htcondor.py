"""HTCondor as a system, by its Python bindings: the package htcondor, from version 24 on, whose module is htcondor2.

A pilot is a job of the vanilla universe whose executable is the pilot's script. The script is spooled, so that the folder it was written to is needed no
more; and it is told to end by TERM, as any job. A pilot is known by its attribute DeskgridPilot, which is its name.
"""

from __future__ import annotations

import asyncio
import importlib
import math
import re
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from deskgrid.client.pilots import OWN_BYTES
from deskgrid.core import pilots
from deskgrid.core.pilots import Sent
from deskgrid.errors import InvalidInput, OperatorError
from deskgrid.pilots.system import GIVING_BACK_S, NoAnswer, Order, pilot_script, worker_settings
from deskgrid.units import MIB

__all__ = ["HTCondorSystem", "check_lines", "description", "is_there"]

T = TypeVar("T")
_LINE = re.compile(r"(?:MY\.|\+)?[A-Za-z_][A-Za-z0-9_.]*")
_OURS = {
    "executable",
    "arguments",
    "environment",
    "getenv",
    "universe",
    "queue",
    "leave_in_queue",
    "my.deskgridpilot",
    "+deskgridpilot",
}


def check_lines(lines: Iterable[str], *, where: str) -> dict[str, str]:
    """Return further lines of a submit description, as in "accounting_group = physics". Raise InvalidInput for what is none, or ours."""
    found = {}
    for line in lines:
        name, is_one, value = (part.strip() for part in line.partition("="))
        if not is_one or "\n" in line or "\0" in line or not _LINE.fullmatch(name):
            raise InvalidInput(f"{line[:80]!r} is no line of a submit description", where=where, hint="as in 'request_disk = 4GB'")
        if name.lower() in _OURS:
            raise InvalidInput(f"{name} is set by the factory", where=where)
        found[name] = value
    return found


def description(order: Order, plan: pilots.System, executable: Path, further: Mapping[str, str]) -> dict[str, str]:
    """Return the submit description of a pilot, without its queue statement.

    One that was begun and waits again would find its link used, so it is removed; and so is what runs for longer than it lives, or is held for an hour.
    """
    longest_s = math.ceil(order.lifetime_s + GIVING_BACK_S)
    over = f"JobStatus == 2 && time() - EnteredCurrentStatus > {longest_s}"
    held = "JobStatus == 5 && time() - EnteredCurrentStatus > 3600"
    again = "JobStatus == 1 && NumJobStarts > 0"
    return {
        "universe": "vanilla",
        "executable": str(executable),
        "transfer_executable": "true",
        "should_transfer_files": "yes",
        "when_to_transfer_output": "on_exit",
        "transfer_output_files": '""',
        "request_cpus": str(plan.cpus),
        "request_memory": str((plan.memory_bytes + OWN_BYTES) // MIB),
        "job_max_vacate_time": "60",
        "kill_sig": "SIGTERM",
        "leave_in_queue": "false",  # what is spooled stays for days otherwise
        "periodic_remove": f"({over}) || ({held}) || ({again})",
        "notification": "never",
        "batch_name": order.name,
        "My.DeskgridPilot": f'"{order.name}"',
        **further,
    }


def is_there(names: Iterable[str]) -> str:
    """Return the constraint that is true for those of some pilots that wait, run or are held."""
    one_of = " || ".join(f'DeskgridPilot == "{name}"' for name in names)
    return f"({one_of}) && JobStatus != 3 && JobStatus != 4"


class HTCondorSystem:
    """See pilots.system.System."""

    uses_links = True

    def __init__(
        self,
        plan: pilots.System,
        lines: Mapping[str, str],
        *,
        idle_s: float,
        command: str = "deskgrid",
        settings: Mapping[str, object] | None = None,
        setup: str = "",
        bindings: Any = None,
    ) -> None:
        """`bindings`: the module; by default that which is installed. Raise OperatorError if none is."""
        self.plan = plan
        self.idle_s = idle_s
        self._lines, self._command, self._setup = lines, command, setup
        self._settings = worker_settings(plan, settings or {})
        self._condor = bindings or _bindings()

    async def send(self, order: Order) -> str:
        script = pilot_script(order, command=self._command, settings=self._settings, setup=self._setup)
        return await self._ask(lambda: self._submit(order, script))

    async def gone(self, pilots: Sequence[Sent]) -> set[str]:
        names = {one.name for one in pilots}
        found = await self._ask(lambda: self._condor.Schedd().query(is_there(names), projection=["DeskgridPilot"]))
        return names - {str(one["DeskgridPilot"]) for one in found}

    async def call_back(self, pilot: Sent) -> None:
        if await self.gone([pilot]):
            return
        remove = self._condor.JobAction.Remove
        await self._ask(lambda: self._condor.Schedd().act(remove, is_there([pilot.name]), reason="needed no more"))

    def _submit(self, order: Order, script: str) -> str:
        schedd = self._condor.Schedd()
        with tempfile.TemporaryDirectory(prefix="deskgrid-pilot-") as folder:
            executable = Path(folder) / "pilot"
            executable.write_text(script, encoding="utf-8")
            executable.chmod(0o700)
            wanted = self._condor.Submit(description(order, self.plan, executable, self._lines))
            try:
                sent = schedd.submit(wanted, count=1, spool=True)
                schedd.spool(sent)
            except self._condor.HTCondorException as error:
                raise NoAnswer(f"HTCondor does not take it: {error}") from error
        return str(sent.cluster())

    async def _ask(self, what: Callable[[], T]) -> T:
        """Call the bindings, which wait for the schedd, in a thread. Raise OperatorError for what they say."""
        try:
            return await asyncio.to_thread(what)
        except (self._condor.HTCondorException, OSError, TypeError, ValueError) as error:  # of what is in the user's lines, too
            raise OperatorError(f"HTCondor does not answer: {error}") from error


def _bindings() -> Any:
    try:
        return importlib.import_module("htcondor2")
    except ImportError as error:
        raise OperatorError("HTCondor's Python bindings are not installed", hint="pip install 'deskgrid[htcondor]'") from error
