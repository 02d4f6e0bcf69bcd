"""The jobs of warm programs: what is reported of each, and which of them one program can do."""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable
from typing import TYPE_CHECKING

from deskgrid.core.matching import need_of
from deskgrid.errors import ProtocolError
from deskgrid.model.jobs import AttemptState, JobSpec
from deskgrid.model.machines import Network
from deskgrid.model.workers import Assignment, AttemptReport
from deskgrid.worker.conversation import Answer, value_of
from deskgrid.worker.journal import Verdict

if TYPE_CHECKING:
    from deskgrid.worker.warm_program import WarmProgram

__all__ = ["BACK", "STOPPED", "WarmAttempt", "WarmLine", "fault_of_warm", "settle_by"]

BACK = Verdict(AttemptState.REFUSED, "")
"""Given back without a reason: it was nothing about the job."""
STOPPED = Verdict(AttemptState.REFUSED, "the worker was stopped")
_SUCCESS = Verdict(AttemptState.SUCCEEDED, "")


class WarmAttempt:
    """One job of a warm program. Has the questions of a Runner that the agent asks when it reports."""

    __slots__ = ("assignment", "dropped", "final", "id", "line", "program")

    def __init__(self, assignment: Assignment, line: WarmLine) -> None:
        self.assignment = assignment
        self.id = assignment.attempt_id
        self.line = line
        self.program: WarmProgram | None = None
        """That it was handed to."""
        self.final: AttemptReport | None = None
        self.dropped = False
        """The server does not want it any more."""

    def report(self) -> AttemptReport:
        """Return what the server is told now."""
        if self.final is not None:
            return self.final
        state = AttemptState.LEASED
        if self.program is not None and self.program.head() is self:
            state = AttemptState.SUSPENDED if self.program.frozen else AttemptState.RUNNING
        return AttemptReport(attempt_id=self.id, state=state)

    def settle(self, verdict: Verdict, *, exit_code: int | None = None, value: bytes | None = None) -> None:
        """Decide how it ends, once."""
        if self.final is None:
            self.final = AttemptReport(
                attempt_id=self.id, state=verdict.state, reason=verdict.reason, exit_code=exit_code, value=value
            )


class WarmLine:
    """Jobs that one program can do, one after the other, and the programs that do."""

    def __init__(self, key: Hashable, assignment: Assignment, *, single: bool) -> None:
        self.key = key
        self.assignment = assignment
        self.single = single
        """Its program does one job only."""
        self.need = need_of(assignment.spec)
        self.waiting: deque[WarmAttempt] = deque()
        self.programs: list[WarmProgram] = []
        self.starved_since: float | None = None

    @property
    def spec(self) -> JobSpec:
        return self.assignment.spec

    def next(self) -> WarmAttempt | None:
        """Take the first job that is still wanted."""
        while self.waiting:
            attempt = self.waiting.popleft()
            if not attempt.dropped:
                return attempt
        return None

    def rate(self) -> float:
        """Return how many jobs its programs do in a second."""
        return sum(1.0 / program.job_s for program in self.programs if program.job_s > 0)

    def held(self) -> int:
        """Return how many of its jobs are not done."""
        return len(self.waiting) + sum(len(program.in_hand) for program in self.programs)


def settle_by(attempt: WarmAttempt, answer: Answer) -> None:
    """Make an answer the end of a job."""
    try:
        value = value_of(answer)
    except ProtocolError as error:
        attempt.settle(Verdict(AttemptState.FAILED, error.message), exit_code=answer.exit_code)
        return
    if answer.exit_code:
        attempt.settle(
            Verdict(AttemptState.FAILED, f"the warm program answered {answer.exit_code}"), exit_code=answer.exit_code, value=value
        )
    else:
        attempt.settle(_SUCCESS, exit_code=0, value=value)


def fault_of_warm(assignment: Assignment) -> str:
    """Return why a warm program cannot do a job at all, "" if it can."""
    spec = assignment.spec
    if spec.results.paths:
        return "a warm program answers with values, not with files: results.paths = []"
    if spec.machine.network is not Network.NONE:
        return "a warm program has no network"
    if spec.fill:
        return "files of a warm program are not filled in: it is told index and parameters with each job"
    return ""
