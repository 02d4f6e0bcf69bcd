"""Systems that are driven by commands: any that a user names, Slurm, hosts by ssh.

A submit command gets the pilot's script on its standard input and prints by what name the system knows it. {name}, {reference}, {minutes}, {cpus} and
{megabytes} are filled in, each as part of one argument: no shell reads them.

The alive command ends with 0 and prints something while the pilot is there, ends with 0 and prints nothing when it is gone. Any other end is no answer:
then nothing is taken for gone. A cancel command ends with 0 also if the pilot is gone already.
"""

from __future__ import annotations

import asyncio
import math
import os
import re
from collections.abc import Mapping, Sequence

from msgspec import Struct

from deskgrid.client.pilots import OWN_BYTES
from deskgrid.core import pilots
from deskgrid.core.pilots import Sent
from deskgrid.errors import InvalidInput, OperatorError
from deskgrid.pilots.system import GIVING_BACK_S, NoAnswer, Order, pilot_script, worker_settings
from deskgrid.units import MIB

__all__ = ["CommandSystem", "Commands", "check_commands", "slurm_commands", "ssh_commands"]

_LIMIT_S = 120.0
_REFERENCE = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.:@/-]{0,199}")
_WORD = re.compile(r"\{([a-z]+)\}")
_ALWAYS = {"name", "cpus", "megabytes"}
_LEFT_OUT = ("DESKGRID_", "SBATCH_", "SCANCEL_", "SQUEUE_")
"""Variables that commands do not get: the user's token and settings, which sbatch would send along; what would make other jobs of pilots; and what people
want to see of Slurm's queue, for what is hidden is taken for gone."""
_MOST_AT_ONCE = 4


class Commands(Struct, frozen=True, kw_only=True):
    """What drives a system."""

    submit: tuple[str, ...]
    """Prints a reference, in its last line."""
    alive: tuple[str, ...]
    cancel: tuple[tuple[str, ...], ...]
    """Run one after the other."""


def slurm_commands(options: Sequence[str]) -> Commands:
    """Return Slurm's, which know a pilot by its name. `options` are further ones of sbatch.

    Only the script is told to end, which tells its worker: a plain scancel sends TERM to the worker's jobs as well, which may fail before they are given
    back. What waits has no script to tell, so it is cancelled before. A pilot that Slurm began again would find its link used.
    """
    own = ("--parsable", "--job-name={name}", "--output=/dev/null", "--no-requeue", "--signal=B:TERM@60")
    return Commands(
        submit=("sbatch", *own, "--time={minutes}", "--cpus-per-task={cpus}", "--mem={megabytes}M", *options),
        alive=("squeue", "--all", "--noheader", "--name={name}", "--format=%T"),
        cancel=(
            ("scancel", "--name={name}", "--state=PENDING"),
            ("scancel", "--name={name}", "--state=RUNNING", "--batch", "--signal=TERM"),
        ),
    )


def ssh_commands(host: str, options: Sequence[str]) -> Commands:
    """Return those for a host that is reached by ssh with a key. What runs there is fixed text, and knows a pilot by its name.

    A pilot's folder is removed by who waits for it, so also if it was killed; and it is in a session of its own, which outlives the connection.
    """
    ssh = ("ssh", "-o", "BatchMode=yes", *options, "-o", "ConnectTimeout=30", host)
    begun = (
        'umask 077; d=$(mktemp -d) || exit 1; trap "rm -rf \\"$d\\"" EXIT; trap "exit 1" HUP INT TERM; '
        'cat >"$d/pilot" && sh -n "$d/pilot" || exit 1; trap - EXIT; '
        '{ TMPDIR="$d" setsid sh "$d/pilot" {name}; rm -rf "$d"; } </dev/null >/dev/null 2>&1 & echo {name}'
    )
    which = '-f "^sh /.*/pilot {name}$" || test $? -eq 1'
    return Commands(
        submit=(*ssh, f"sh -c '{begun}'"),
        alive=(*ssh, f"sh -c 'pgrep {which}'"),
        cancel=((*ssh, f"sh -c 'pkill -TERM {which}'"),),
    )


def check_commands(commands: Commands, *, where: str) -> None:
    """Raise InvalidInput for a command that names what there is not, or cannot be one argument."""
    for name, known, some in (
        ("submit", _ALWAYS | {"minutes"}, (commands.submit,)),
        ("alive", _ALWAYS | {"reference"}, (commands.alive,)),
        ("cancel", _ALWAYS | {"reference"}, commands.cancel),
    ):
        for word in (word for command in some for word in command):
            if "\n" in word or "\0" in word:
                raise InvalidInput(f"{name}: a word of a command has no line ends", where=where)
            if unknown := set(_WORD.findall(word)) - known:
                hint = f"known: {', '.join(sorted(known))}"
                raise InvalidInput(f"{name}: {word[:80]!r} names {sorted(unknown)[0]}", where=where, hint=hint)


class CommandSystem:
    """See pilots.system.System."""

    uses_links = True

    def __init__(
        self,
        plan: pilots.System,
        commands: Commands,
        *,
        idle_s: float,
        command: str = "deskgrid",
        settings: Mapping[str, object] | None = None,
        setup: str = "",
    ) -> None:
        self.plan = plan
        self.idle_s = idle_s
        self._commands, self._command, self._setup = commands, command, setup
        self._settings = worker_settings(plan, settings or {})

    async def send(self, order: Order) -> str:
        script = pilot_script(order, command=self._command, settings=self._settings, setup=self._setup)
        words = {"name": order.name, "minutes": math.ceil((order.lifetime_s + GIVING_BACK_S) / 60)}
        try:
            printed = await self._run(self._commands.submit, words, script)
        except _Failed as error:
            if _needs_reference(self._commands.alive):
                raise
            raise NoAnswer(str(error)) from error  # sbatch fails, too, if the answer to what it sent is late; it can be asked
        reference = printed.strip().rpartition("\n")[2].partition(";")[0].strip()  # Slurm: NUMBER;CLUSTER
        if not _REFERENCE.fullmatch(reference):
            raise NoAnswer(f"{self._commands.submit[0]} said {reference[:80]!r}, which names no pilot")
        return reference

    async def gone(self, pilots: Sequence[Sent]) -> set[str]:
        places = asyncio.Semaphore(_MOST_AT_ONCE)

        async def is_gone(pilot: Sent) -> bool | OperatorError:
            async with places:
                try:
                    return not (await self._run(self._commands.alive, _words(pilot))).strip()
                except OperatorError as error:
                    return error

        asked = [one for one in pilots if _can_tell(self._commands.alive, one)]
        answers = dict(zip(asked, await asyncio.gather(*map(is_gone, asked)), strict=True))
        errors = [one for one in answers.values() if isinstance(one, OperatorError)]
        if errors and len(errors) == len(answers):
            raise errors[0]
        return {pilot.name for pilot, answer in answers.items() if answer is True}

    async def call_back(self, pilot: Sent) -> None:
        for command in self._commands.cancel:
            if _can_tell(command, pilot):
                await self._run(command, _words(pilot))

    async def _run(self, command: Sequence[str], words: Mapping[str, object], said: str = "") -> str:
        """Run a command and return what it prints. Raise OperatorError if it is not there or fails, NoAnswer if it takes too long."""
        known = {**words, "cpus": self.plan.cpus, "megabytes": (self.plan.memory_bytes + OWN_BYTES) // MIB}
        arguments = [_filled(word, known) for word in command]
        try:
            process = await asyncio.create_subprocess_exec(
                *arguments,
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.PIPE,
                env={name: value for name, value in os.environ.items() if not name.startswith(_LEFT_OUT)},
            )
        except OSError as error:
            raise OperatorError(f"{arguments[0]} does not start: {error.strerror}") from error
        try:
            async with asyncio.timeout(_LIMIT_S):
                output, errors = await process.communicate(said.encode())
        except TimeoutError as error:
            raise NoAnswer(f"{arguments[0]} does not end within {_LIMIT_S:.0f} s") from error
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
        if process.returncode:
            raise _Failed(f"{arguments[0]} ended with {process.returncode}: {errors.decode(errors='replace').strip()[-300:]}")
        return output.decode(errors="replace")


class _Failed(OperatorError):
    """A command ended with an error."""


def _words(pilot: Sent) -> dict[str, object]:
    return {"name": pilot.name, "reference": pilot.reference}


def _can_tell(command: Sequence[str], pilot: Sent) -> bool:
    """Tell whether a command can know a pilot: not by a reference that it does not have."""
    return bool(pilot.reference) or not _needs_reference(command)


def _needs_reference(command: Sequence[str]) -> bool:
    return any("{reference}" in word for word in command)


def _filled(word: str, known: Mapping[str, object]) -> str:
    return _WORD.sub(lambda found: str(known[found[1]]), word)
