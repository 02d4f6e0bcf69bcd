"""Whose fault it is: how an attempt ends, from what was found and what went wrong. Pure functions and tables.

The job's fault is `failed`, which counts against its attempts; this PC's is `refused`, which does not.
"""

from __future__ import annotations

import errno

import msgspec

from deskgrid.errors import BadArchive, BadImage, DeskgridError, InvalidInput
from deskgrid.machines.driver import ExitCause, Exited
from deskgrid.machines.results import ResultReport
from deskgrid.model.jobs import AttemptState
from deskgrid.model.workers import AttemptReport
from deskgrid.worker.journal import Verdict

__all__ = ["NOT_THE_JOB", "fault_of", "judge", "without_result"]

NOT_THE_JOB = {
    ExitCause.START_FAILED: "the machine could not be started",
    ExitCause.IO_ERROR: "the disk of the PC could not take what the machine wrote",
    ExitCause.KILLED: "the machine was killed (out of memory?)",
}
"""Ends of a machine that are never the doing of the job in it."""
_BEFORE_THE_END = {
    ExitCause.RESET: "the guest reset or panicked",
    ExitCause.POWERED_OFF: "the guest powered off",
}


def judge(exited: Exited, found: ResultReport, verdict: Verdict | None, *, program: str = "context.sh") -> tuple[AttemptState, str]:
    """Return state and reason of an attempt whose scratch could be read. `program`: what to call the one that ran.

    The exit code that the agent wrote counts most: it was written after everything that context.sh wrote was on the disk, so a guest
    that hangs or panics while it powers off has done its work.
    """
    if found.exit_code == 0:
        return AttemptState.SUCCEEDED, f"{found.dropped_count} entries of the result were left out" if found.dropped_count else ""
    if found.exit_code is not None:
        return AttemptState.FAILED, f"{program} ended with {found.exit_code}"
    if verdict is not None:
        return verdict.state, verdict.reason
    if exited.cause is ExitCause.LIMIT:
        return AttemptState.FAILED, f"it went past a limit of the job: {exited.detail or 'the end of its stderr says which'}"
    return AttemptState.FAILED, f"{_BEFORE_THE_END.get(exited.cause, 'the machine ended')} before {program} ended"


_JOBS_FAULTS: tuple[tuple[type[DeskgridError], str], ...] = (
    (BadImage, "bad disk image"),
    (BadArchive, "bad context"),
    (InvalidInput, "the machine cannot be made"),
)


def fault_of(error: Exception) -> tuple[AttemptState, str]:
    """Return whose fault an error is, and what to say."""
    for kind, words in _JOBS_FAULTS:
        if isinstance(error, kind):
            return AttemptState.FAILED, f"{words}: {error}"
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return AttemptState.REFUSED, "no space is left on the PC"
    if isinstance(error, DeskgridError):
        return AttemptState.REFUSED, str(error)
    return AttemptState.REFUSED, f"the worker failed: {type(error).__name__}: {error}"


def without_result(report: AttemptReport, state: AttemptState, reason: str) -> AttemptReport:
    """Return a report without result; one of success cannot do without, a failure keeps its own reason."""
    if report.state is AttemptState.SUCCEEDED:
        return msgspec.structs.replace(report, state=state, reason=reason, result=None)
    return msgspec.structs.replace(report, result=None)
