"""The `deskgrid` command: all nouns, and what becomes of errors.

Exit codes: 0 done; 1 the job failed, or anything else did; 2 a usage error or bad value; 3 the other side cannot be reached;
130 interrupted.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
import traceback
from collections.abc import Sequence
from typing import Any

import msgspec
from cyclopts import App, CycloptsError

from deskgrid import __version__
from deskgrid.cli import app as app_noun
from deskgrid.cli import (
    array,
    audit,
    console,
    demo,
    disk_catalog,
    group,
    hub,
    job,
    overlay,
    pilot,
    placement,
    server,
    ssh,
    status,
    user,
    worker,
)
from deskgrid.cli import set as set_noun
from deskgrid.cli.output import NO_NEGATIVES, clean, warn
from deskgrid.errors import DeskgridError, InvalidInput, NotFound, Unreachable

__all__ = ["EXIT_FAILED", "EXIT_INTERRUPTED", "EXIT_UNREACHABLE", "EXIT_USAGE", "app", "main"]

EXIT_FAILED, EXIT_USAGE, EXIT_UNREACHABLE, EXIT_INTERRUPTED = 1, 2, 3, 130

app = App(
    name="deskgrid",
    version=__version__,
    help_format="plaintext",
    default_parameter=NO_NEGATIVES,
    suppress_keyboard_interrupt=False,
    help="""A desktop grid: jobs run in virtual machines created on the fly on volunteers' PCs.

For example:

    deskgrid demo                       see it work on this machine
    deskgrid login LINK                 log in to a grid
    deskgrid run hello.toml             run a job and fetch its result
    deskgrid connect web.job-42         use a program in a job from here
    deskgrid worker join LINK           lend this PC to a grid

Each command has --help. Exit codes: 0 done, 1 failed, 2 usage, 3 cannot reach, 130 interrupted.
""",
)
for part in (
    job.app,
    array.app,
    set_noun.app,
    app_noun.app,
    placement.app,
    disk_catalog.app,
    worker.app,
    pilot.app,
    user.app,
    group.app,
    server.app,
    hub.app,
    overlay.connection_app,
):
    app.command(part)
app.command(job.run)
app.command(user.login)
for function in (overlay.connect, overlay.offer, overlay.proxy, overlay.peers, ssh.ssh, ssh.scp, ssh.shell, console.console):
    app.command(function)
app.command(status.status)
app.command(audit.audit)
app.command(demo.demo)
app.register_install_completion_command(help="Install tab completion for your shell.")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given[:1] == ["ssh"]:
        given[1:] = ssh.command_apart(given[1:])
    try:
        code = app(given, result_action="return_value", exit_on_error=False, print_error=False)
        sys.stdout.flush()
    except (KeyboardInterrupt, asyncio.CancelledError):
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        return _reader_gone()
    except Exception as raised:
        error = _alone(raised)
        _report(error, as_json="--json" in given)
        return _exit_code(error)
    return code if isinstance(code, int) else 0


def _alone(error: Exception) -> Exception:
    """Return the error inside a group of one: tasks that work together raise groups."""
    while isinstance(error, ExceptionGroup) and len(error.exceptions) == 1:
        error = error.exceptions[0]
    return error


def _exit_code(error: Exception) -> int:
    if isinstance(error, CycloptsError | InvalidInput | NotFound):
        return EXIT_USAGE
    return EXIT_UNREACHABLE if isinstance(error, Unreachable) else EXIT_FAILED


def _report(error: Exception, *, as_json: bool) -> None:
    """Tell what happened, why, and what to do; on stderr, whatever the command printed."""
    name, message, hint = _described(error)
    if as_json:
        document: dict[str, Any] = {"error": name, "message": message, "hint": hint, "exit_code": _exit_code(error)}
        sys.stderr.write(msgspec.json.encode(document).decode() + "\n")
        return
    if hint == _BUG:
        traceback.print_exception(error)
    warn(f"deskgrid: {message}")
    if hint:
        warn(f"  {hint}")


_TRY_AGAIN = "is the server running, and the network up? Trying again does no harm"
_BUG = "this is a bug in deskgrid: please report it with the lines above"


def _described(error: Exception) -> tuple[str, str, str]:
    """Return name, message and hint of an error."""
    if isinstance(error, DeskgridError):
        return type(error).__name__, error.message, error.hint or (_TRY_AGAIN if isinstance(error, Unreachable) else "")
    if isinstance(error, CycloptsError):
        return "InvalidInput", clean(str(error)), _usage_hint(error)
    if isinstance(error, OSError) and error.filename is not None:
        return "OSError", f"{error.filename}: {error.strerror}", ""
    return type(error).__name__, f"{type(error).__name__}: {error}", _BUG


def _usage_hint(error: CycloptsError) -> str:
    return " ".join(["deskgrid", *(error.command_chain or ()), "--help"])


def _reader_gone() -> int:
    """End quietly when the reader of our output did, as in `deskgrid job list | head -1`."""
    with contextlib.suppress(OSError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return EXIT_FAILED
