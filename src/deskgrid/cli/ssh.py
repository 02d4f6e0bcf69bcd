"""deskgrid ssh, scp, shell: the system's own ssh and scp, led through the overlay, with the keys taken care of."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import os
import re
import shutil
import signal
import tempfile
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from deskgrid.cli.connection import connected
from deskgrid.cli.job import JobOptions, read_wanted, submit_job
from deskgrid.cli.logs import configure_logs
from deskgrid.cli.output import Json, make_reporter, warn
from deskgrid.cli.overlay import Verbose, Wait, job_of, listen, wait_of
from deskgrid.cli.signals import terminated_like_interrupted
from deskgrid.client.connecting import peer_of
from deskgrid.errors import InvalidInput
from deskgrid.model.ids import JobId
from deskgrid.settings import client_home

if TYPE_CHECKING:
    from deskgrid.client.grid import Grid

__all__ = ["command_apart", "scp", "shell", "ssh"]

_USER = re.compile(r"[A-Za-z0-9_][\w.-]*", re.ASCII)
_REMOTE = re.compile(r"(?:([A-Za-z_][\w.-]*)@)?(job-[1-9][0-9]{0,17}):(.*)", re.DOTALL)
_STAY = "#!/bin/sh\n# Stay until the job is cancelled or its time is over.\nwhile :; do sleep 3600; done\n"
_TINY = JobOptions(disk="tiny")
User = Annotated[str, Parameter(name=["--login", "-l"], help="User in the machine.")]


_WITH_VALUE = frozenset({"-l", "--login", "--wait"})


def command_apart(arguments: Sequence[str]) -> list[str]:
    """Return the arguments of `deskgrid ssh` such that what follows the job is the command, whatever it looks like: as ssh itself does,
    and as rsync relies on."""
    words = iter(enumerate(arguments))
    for index, word in words:
        if word == "--":
            break
        if word in _WITH_VALUE:
            next(words, None)
        elif not word.startswith("-"):
            return [*arguments[: index + 1], "--", *arguments[index + 1 :]]
    return list(arguments)


async def ssh(
    job: Annotated[str, Parameter(help="The job, as job-42 or 42.")],
    /,
    *command: Annotated[str, Parameter(allow_leading_hyphen=True, help="Command to run; without one, a shell.")],
    login: User = "root",
    wait: Wait = "5m",
    verbose: Verbose = False,
) -> int:
    """Log in to the machine of a job that offers ssh (`offer = ["ssh:22"]`). The exit code is that of the command.

    For example:

        deskgrid ssh job-42
        deskgrid ssh job-42 tail -f /scratch/log
        rsync -e "deskgrid ssh" -a folder/ job-42:/scratch/folder/
    """
    configure_logs(json=False, verbose=verbose, quiet=True)
    user, _, host = job.rpartition("@")  # as programs that call ssh write it
    async with connected() as grid, _door(grid, job_of(host), wait_of(wait)) as port:
        return await _run([_program("ssh"), "-p", str(port), *_options(), "--", f"{_user_of(user or login)}@127.0.0.1", *command])


async def scp(
    *files: Annotated[str, Parameter(help="Files; those in the machine of a job as job-42:PATH. The last one is where they go.")],
    recursive: Annotated[bool, Parameter(name=["--recursive", "-r"], show_default=False, help="Folders, too.")] = False,
    login: User = "root",
    wait: Wait = "5m",
    verbose: Verbose = False,
) -> int:
    """Copy files to and from the machine of a job that offers ssh.

    For example:

        deskgrid scp input.dat job-42:/scratch/
        deskgrid scp -r job-42:/scratch/plots .
    """
    configure_logs(json=False, verbose=verbose, quiet=True)
    _user_of(login)
    found = {match[2] for file in files if (match := _REMOTE.fullmatch(file))}
    if len(files) < 2 or len(found) != 1:
        raise InvalidInput("files and one job are needed", hint="as in: deskgrid scp input.dat job-42:/scratch/")
    async with connected() as grid, _door(grid, job_of(found.pop()), wait_of(wait)) as port:
        named = [_REMOTE.sub(lambda match: f"{match[1] or login}@127.0.0.1:{match[3]}", file) for file in files]
        return await _run([_program("scp"), "-P", str(port), *_options(), *(["-r"] if recursive else []), "--", *named])


async def shell(
    *,
    options: JobOptions = _TINY,
    wait: Wait = "1h",
    verbose: Verbose = False,
    json: Json = False,
) -> int:
    """Start a machine on the grid, log in to it, and cancel the job at the end.

    For example:

        deskgrid shell
        deskgrid shell --disk debian --memory 1GiB --wall-time 4h
    """
    configure_logs(json=json, verbose=verbose, quiet=True)
    with tempfile.TemporaryDirectory(prefix="deskgrid-") as folder:
        context = Path(folder)
        (context / "context.sh").write_text(_STAY)
        wanted = read_wanted(None, _with_ssh(options, context))
        async with connected() as grid:
            with make_reporter(json) as reporter:
                job = await submit_job(grid, wanted, reporter)
                reporter.say(f"job {job.id}; the machine is on its way")
            try:
                with terminated_like_interrupted():
                    async with _door(grid, job.id, wait_of(wait)) as port:
                        return await _run([_program("ssh"), "-p", str(port), *_options(), "root@127.0.0.1"])
            finally:
                await grid.cancel(job.id)
                warn(f"job {job.id} is cancelled")


def _with_ssh(options: JobOptions, context: Path) -> JobOptions:
    return dataclasses.replace(
        options,
        context=str(context),
        network=options.network or "overlay",
        offer=(*(options.offer or ()), "ssh:22"),
        name=options.name or "shell",
    )


def _user_of(text: str) -> str:
    """Return the name of a user in a machine. Raise InvalidInput for what ssh could take for something else."""
    if not _USER.fullmatch(text):
        raise InvalidInput(f"{text[:60]!r} is not a user", where="--login")
    return text


def _program(name: str) -> str:
    found = shutil.which(name)
    if found is None:
        raise InvalidInput(f"{name} is not installed", hint="on Debian: sudo apt-get install openssh-client")
    return found


def _options() -> list[str]:
    """Return ssh's options: our key and no other. The overlay knows by certificate that it is that job, so ssh need not ask."""
    from deskgrid.client.sshkeys import ensure_ssh_key

    key, _ = ensure_ssh_key(client_home())
    settings = {
        "IdentityFile": f'"{key}"',
        "IdentitiesOnly": "yes",
        "IdentityAgent": "none",
        "StrictHostKeyChecking": "no",
        "UserKnownHostsFile": os.devnull,
        "GlobalKnownHostsFile": os.devnull,
        "LogLevel": "ERROR",
        "ServerAliveInterval": "30",
    }
    return ["-F", os.devnull, *(f"-o{name}={value}" for name, value in settings.items())]


@asynccontextmanager
async def _door(grid: Grid, job_id: JobId, wait_s: float) -> AsyncIterator[int]:
    """Lead a free port of this PC to the ssh server of a job, while the block lasts."""
    from deskgrid.overlay.proxy import serve_port

    detail = await grid.job(job_id)
    if not any(offer.name == "ssh" for offer in detail.job.spec.machine.offer):
        raise InvalidInput(f"job {job_id} does not offer ssh", hint='in its [machine]: network = "overlay", offer = ["ssh:22"]')
    with listen("0") as listener:
        async with peer_of(grid) as peer:
            # No TaskGroup: it would hide an error of the block in a group.
            serving = asyncio.create_task(serve_port(peer, f"ssh.job-{job_id}", listener, wait_s=wait_s))
            try:
                yield listener.getsockname()[1]
            finally:
                serving.cancel()
                await asyncio.wait([serving])


async def _run(command: Sequence[str]) -> int:
    """Run a program on our terminal and return its exit code. Ctrl-C is for the program."""
    loop = asyncio.get_running_loop()
    with contextlib.suppress(NotImplementedError):
        loop.add_signal_handler(signal.SIGINT, lambda: None)
    process = await asyncio.create_subprocess_exec(*command)
    try:
        return await process.wait()
    finally:
        if process.returncode is None:
            process.terminate()
            await process.wait()
