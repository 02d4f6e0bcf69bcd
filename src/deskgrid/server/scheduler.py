"""One call of a worker, decided in one transaction: what it holds, what it reports, what it gets."""

from __future__ import annotations

import msgspec
from msgspec import Struct

from deskgrid.core.lifecycle import AttemptEvent, event_of_report
from deskgrid.core.matching import Ask, match, need_of, without
from deskgrid.errors import Conflict, InvalidInput
from deskgrid.model.data import Blob
from deskgrid.model.ids import AttemptId, Sha256, UserId, WorkerId
from deskgrid.model.jobs import AttemptState, JobSpec
from deskgrid.model.wire import Sync, SyncAnswer
from deskgrid.model.workers import Assignment, AttemptReport
from deskgrid.server.store import data, jobs, workers
from deskgrid.server.store.accounts import Caller
from deskgrid.server.store.engine import Transaction
from deskgrid.settings import ServerSettings

__all__ = ["leave", "sync"]

_MOST_PER_CALL = 100
_MOST_ATTEMPTS, _MOST_PROFILE_BYTES = 2000, 1 << 16
"""One worker must not keep the writer busy, nor make everybody's list of workers long."""
_FINAL_REPORTS = frozenset({AttemptState.SUCCEEDED, AttemptState.FAILED, AttemptState.REFUSED})


class _Verdict(Struct):
    """What becomes of the attempts that a worker listed."""

    acknowledged: list[AttemptId] = []
    cancelled: list[AttemptId] = []
    freed: list[Sha256] = []
    """Results that came too late; the repository may remove their bytes."""


def sync(tx: Transaction, caller: Caller, request: Sync, settings: ServerSettings) -> tuple[SyncAnswer, list[Sha256]]:
    """Handle one call of a worker; return the answer and the blobs whose bytes nobody needs any more."""
    worker_id = _worker_of(caller)
    if len(request.attempts) > _MOST_ATTEMPTS or len(msgspec.json.encode(request.profile)) > _MOST_PROFILE_BYTES:
        raise InvalidInput("this is more than a worker has to say", hint=f"at most {_MOST_ATTEMPTS} attempts")
    workers.seen(tx, worker_id, request)
    verdict = _Verdict()
    for report in request.attempts:
        _take_report(tx, caller, worker_id, report, settings, verdict)
    _return_unlisted(tx, worker_id, {report.attempt_id for report in request.attempts})
    assignments = () if request.paused else tuple(_lease(tx, worker_id, request, settings))
    answer = SyncAnswer(
        assignments=assignments,
        acknowledged=tuple(verdict.acknowledged),
        cancelled=tuple(verdict.cancelled),
        lease_s=settings.lease_s,
        interval_s=settings.interval_s,
    )
    return answer, verdict.freed


def leave(tx: Transaction, caller: Caller) -> None:
    """Give back all that a worker holds and let it go. Idempotent."""
    worker_id = _worker_of(caller)
    _return_unlisted(tx, worker_id, set())
    workers.leave(tx, worker_id)


def _worker_of(caller: Caller) -> WorkerId:
    if caller.worker_id is None:
        raise ValueError("only a worker syncs")
    return caller.worker_id


def _take_report(
    tx: Transaction, caller: Caller, worker_id: WorkerId, report: AttemptReport, settings: ServerSettings, verdict: _Verdict
) -> None:
    """Apply one report. What does not apply any more is acknowledged if it was final, else cancelled."""
    event = event_of_report(report.state)
    row = jobs.attempt_row(tx, report.attempt_id, worker_id)
    if row is None or event is None:
        verdict.cancelled.append(report.attempt_id)
        return
    if (
        report.state is AttemptState.SUSPENDED
        and row.state == AttemptState.LOST
        and _lease_end(tx, row, report.state, settings) <= tx.now
    ):
        return  # it was lost because it was suspended for too long: it stays so, but may come back running or with its result
    report = _with_proof(tx, caller, report)
    event = event_of_report(report.state) or event
    applied = jobs.apply_event(tx, report.attempt_id, event, exit_code=report.exit_code, reason=report.reason, result=report.result)
    if report.state in _FINAL_REPORTS:
        verdict.acknowledged.append(report.attempt_id)
        if report.result is not None and not applied:
            verdict.freed += data.drop_unreferenced(tx, tx.now, only=report.result.sha256, holder=caller.principal)
    elif applied:
        jobs.renew_lease(tx, report.attempt_id, _lease_end(tx, row, report.state, settings))
    else:
        verdict.cancelled.append(report.attempt_id)


def _with_proof(tx: Transaction, caller: Caller, report: AttemptReport) -> AttemptReport:
    """Return the report without a result that is not in the repository. A success without its result gives the job back:
    whatever became of the bytes, it was not the job's doing."""
    if report.result is None and report.state is not AttemptState.SUCCEEDED:
        return report
    if report.result is not None and _was_sent(tx, caller, report.result):
        return report
    if report.state is AttemptState.SUCCEEDED:
        return msgspec.structs.replace(report, state=AttemptState.REFUSED, result=None, reason="its result did not arrive")
    return msgspec.structs.replace(report, result=None)


def _was_sent(tx: Transaction, caller: Caller, result: Blob) -> bool:
    try:
        data.require_upload(tx, caller, result)
    except Conflict:
        return False
    return True


def _lease_end(tx: Transaction, row: object, state: AttemptState, settings: ServerSettings) -> float:
    """Return until when an attempt is leased; a suspended one up to its job's bound, however long its PC is silent."""
    if state is not AttemptState.SUSPENDED:
        return tx.now + settings.lease_s
    suspended_at = getattr(row, "suspended_at", None)
    spec = msgspec.json.decode(getattr(row, "job_spec", "{}"), type=JobSpec)
    return float(suspended_at or tx.now) + spec.limits.max_suspend_s


def _return_unlisted(tx: Transaction, worker_id: WorkerId, listed: set[AttemptId]) -> None:
    """Take back what the worker does not know of: an answer that it never got, or a journal that it lost."""
    for row in jobs.live_attempts(tx, worker_id):
        if row.id not in listed:
            jobs.apply_event(tx, row.id, AttemptEvent.RETURNED)


def _lease(tx: Transaction, worker_id: WorkerId, request: Sync, settings: ServerSettings) -> list[Assignment]:
    if request.free.cpus <= 0:
        return []
    leased: list[Assignment] = []
    ask = Ask(free=request.free, drivers=request.profile.drivers, cached=frozenset(request.cached))
    exhausted: set[tuple[int, UserId]] = set()
    while True:
        queues = [queue for queue in jobs.waiting_queues(tx) if (queue.class_id, queue.owner_id) not in exhausted]
        if not queues:
            return leased
        shares = match(ask, queues, jobs.live_by_owner(tx), limit=_MOST_PER_CALL - len(leased))
        short = False
        for share in shares:
            found = jobs.lease_jobs(tx, worker_id, [share], settings.lease_s)
            leased += found
            ask = msgspec.structs.replace(ask, free=without(ask.free, [need_of(one.spec) for one in found]))
            if len(found) < share.count:
                # The rest are jobs that this worker refused a moment ago; what they would have taken goes to other queues.
                exhausted.add((share.class_id, share.owner_id))
                short = True
        if not short:
            return leased
