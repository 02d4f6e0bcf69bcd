"""Systems that are driven by commands: any that a user names, Slurm, hosts by ssh.

A submit command gets the pilot's script on its standard input and prints by what name the system knows it. {name}, {reference}, {minutes}, {cpus} and
{megabytes} are filled in, each as part of one argument: no shell reads them.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import re
from collections.abc import Mapping, Sequence

from msgspec import Struct

from deskgrid.core import pilots
from deskgrid.errors import InvalidInput, OperatorError
from deskgrid.pilots.system import Order, pilot_script
from deskgrid.units import MIB

__all__ = ["CommandSystem", "Commands", "slurm_commands", "ssh_commands"]

_LIMIT_S = 120.0
_REFERENCE = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.:@/-]{0,199}")
_MOST_AT_ONCE = 4


class Commands(Struct, frozen=True, kw_only=True):
    """The three commands."""

    submit: tuple[str, ...]
    """Prints a reference, in its last line."""
    alive: tuple[str, ...]
    """Ends with 0 and prints something while the pilot is there or waits."""
    cancel: tuple[str, ...]


def slurm_commands(options: Sequence[str]) -> Commands:
    """Return Slurm's. `options` are further ones of sbatch."""
    limits = ("--time={minutes}", "--cpus-per-task={cpus}", "--mem={megabytes}M")
    return Commands(
        submit=("sbatch", "--parsable", "--job-name={name}", "--output=/dev/null", "--signal=B:TERM@60", *limits, *options),
        alive=("squeue", "--noheader", "--jobs={reference}", "--format=%T"),
        cancel=("scancel", "--signal=TERM", "--full", "{reference}"),
    )


def ssh_commands(host: str, options: Sequence[str]) -> Commands:
    """Return those for a host that is reached by ssh with a key. What runs there is fixed text."""
    ssh = ("ssh", "-o", "BatchMode=yes", *options, host)
    started = "d=$(mktemp -d) && cat >$d/pilot && { setsid nohup sh -c 'sh $0/pilot; rm -rf $0' $d </dev/null >/dev/null 2>&1 & echo $!; }"
    return Commands(
        submit=(*ssh, started), alive=(*ssh, "kill -0 {reference} && echo alive"), cancel=(*ssh, "kill -TERM -- -{reference}")
    )


class CommandSystem:
    """See pilots.system.System."""

    uses_links = True

    def __init__(
        self,
        plan: pilots.System,
        commands: Commands,
        *,
        lifetime_s: float,
        idle_s: float,
        command: str = "deskgrid",
        settings: Mapping[str, object] | None = None,
        setup: str = "",
    ) -> None:
        self.plan = plan
        self.lifetime_s, self.idle_s = lifetime_s, idle_s
        self._commands, self._command, self._setup = commands, command, setup
        self._settings = {
            "drivers": "process",
            "overlay": False,
            "cpus": plan.cpus,
            "memory_bytes": plan.memory_bytes,
            "packages": sorted(plan.packages),
            **(settings or {}),
        }

    async def send(self, order: Order) -> str:
        script = pilot_script(order, command=self._command, settings=self._settings, setup=self._setup)
        words = {"name": order.name, "minutes": math.ceil(order.lifetime_s / 60) + 5, "reference": ""}
        printed = await self._run(self._commands.submit, words, script)
        reference = printed.strip().rpartition("\n")[2].partition(";")[0].strip()  # Slurm: NUMBER;CLUSTER
        if not _REFERENCE.fullmatch(reference):
            raise OperatorError(f"{self._commands.submit[0]} said {reference[:80]!r}, which names no pilot")
        return reference

    async def gone(self, references: Sequence[str]) -> set[str]:
        places = asyncio.Semaphore(_MOST_AT_ONCE)

        async def is_gone(reference: str) -> bool:
            async with places:
                try:
                    return not (await self._run(self._commands.alive, {"reference": reference})).strip()
                except _Failed:
                    return True

        found = await asyncio.gather(*(is_gone(one) for one in references))
        return {reference for reference, gone in zip(references, found, strict=True) if gone}

    async def call_back(self, reference: str) -> None:
        with contextlib.suppress(_Failed):  # it was gone already
            await self._run(self._commands.cancel, {"reference": reference})

    async def _run(self, command: Sequence[str], words: Mapping[str, object], said: str = "") -> str:
        """Run a command and return what it prints. Raise OperatorError if it is not there, takes too long or fails."""
        known = {**words, "cpus": self.plan.cpus, "megabytes": self.plan.memory_bytes // MIB}
        arguments = [_filled(word, known) for word in command]
        try:
            process = await asyncio.create_subprocess_exec(
                *arguments, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
            )
        except OSError as error:
            raise OperatorError(f"{arguments[0]} does not start: {error.strerror}") from error
        try:
            async with asyncio.timeout(_LIMIT_S):
                output, errors = await process.communicate(said.encode())
        except TimeoutError as error:
            raise OperatorError(f"{arguments[0]} does not end within {_LIMIT_S:.0f} s") from error
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
        if process.returncode:
            raise _Failed(f"{arguments[0]} ended with {process.returncode}: {errors.decode(errors='replace').strip()[-300:]}")
        return output.decode(errors="replace")


class _Failed(OperatorError):
    """A command ended with an error."""


def _filled(word: str, known: Mapping[str, object]) -> str:
    try:
        return re.sub(r"\{([a-z]+)\}", lambda found: str(known[found[1]]), word)
    except KeyError as error:
        raise InvalidInput(f"{word[:80]!r} names {error.args[0]}", hint=f"known: {', '.join(known)}") from error
