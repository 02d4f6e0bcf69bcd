"""One call of a worker, decided in one transaction: what it holds, what it reports, what it gets.

A call that is repeated because its answer was lost does no harm, and needs no stored answer: what was reported is known, and what was leased is
given out again, since `worker.call` says that this very call leased it.
"""

from __future__ import annotations

import msgspec
from msgspec import Struct

from deskgrid.core.lifecycle import FINAL_JOB_STATES, AttemptEvent, event_of_report
from deskgrid.core.matching import Ask, ask_of, match, need_of, without
from deskgrid.core.pacing import Pace, Terms, pace
from deskgrid.core.placement import Host
from deskgrid.errors import Conflict, InvalidInput
from deskgrid.model.data import Blob
from deskgrid.model.ids import AttemptId, WorkerId
from deskgrid.model.jobs import AttemptState
from deskgrid.model.wire import Sync, SyncAnswer
from deskgrid.model.workers import MOST_VALUE_BYTES, Assignment, AttemptReport, Capacity
from deskgrid.server.store import attempts, data, manifests, pilots, placement, queues, sets, swarm, workers
from deskgrid.server.store.accounts import Caller
from deskgrid.server.store.attempts import Held, Outcome
from deskgrid.server.store.engine import Transaction
from deskgrid.settings import ServerSettings

__all__ = ["leave", "sync"]

_MOST_PER_CALL = 500
_MOST_ATTEMPTS, _MOST_PROFILE_BYTES = 4000, 1 << 16
"""One worker must not keep the writer busy, nor make everybody's list of workers long."""
_MOST_OF_A_PC = 1 << 50
"""Of CPUs and bytes, far below what databases take for a number."""
_FINAL_REPORTS = frozenset({AttemptState.SUCCEEDED, AttemptState.FAILED, AttemptState.REFUSED})


class _Verdict(Struct):
    """What becomes of the attempts that a worker listed."""

    lease_s: float
    acknowledged: list[AttemptId] = []
    cancelled: list[AttemptId] = []
    renewed: list[tuple[AttemptId, float]] = []
    started: list[AttemptId] = []


def sync(tx: Transaction, caller: Caller, request: Sync, settings: ServerSettings, key: str = "") -> SyncAnswer:
    """Handle one call of a worker."""
    worker_id = _worker_of(caller)
    if len(request.attempts) > _MOST_ATTEMPTS or len(msgspec.json.encode(request.profile)) > _MOST_PROFILE_BYTES:
        raise InvalidInput("this is more than a worker has to say", hint=f"at most {_MOST_ATTEMPTS} attempts")
    if not _is_credible(request.profile.lent) or not _is_credible(request.free):
        raise InvalidInput("no PC has that much")
    known = workers.seen(tx, worker_id, request)
    held = attempts.held_by(tx, worker_id)
    told = _pace(tx, worker_id, settings, is_busy=bool(request.attempts))
    verdict = _Verdict(lease_s=told.lease_s)
    for report in request.attempts:
        _take_report(tx, caller, worker_id, held, report, verdict)
    attempts.renew_leases(tx, verdict.renewed)
    unlisted = [held[attempt_id] for attempt_id in held.keys() - {report.attempt_id for report in request.attempts}]
    assignments: list[Assignment] = []
    if unlisted and key and known.call == key:
        ask = _ask_of(worker_id, request, known)
        assignments = [_completed(tx, one, ask, one.class_id) for one in attempts.assignments(tx, unlisted)]
    else:
        for one in unlisted:  # an answer that it never got, or a journal that it lost
            attempts.apply_event(tx, one, AttemptEvent.RETURNED)
        if not request.paused:
            assignments = _lease(tx, worker_id, request, known, settings, told.lease_s)
            if assignments and key:
                workers.note_call(tx, worker_id, key)
            for set_id in attempts.sets_of(tx, assignments):
                sets.start_if_complete(tx, set_id)
    orders = placement.find_orders(tx, _host(worker_id, request, known, held, assignments), _ask_of(worker_id, request, known))
    return SyncAnswer(
        keep=orders.keep,
        remove=orders.remove,
        fetch=orders.fetch,
        guard=orders.guard,
        share=swarm.fetched_now(tx, request.held[:1000]) if request.profile.shares else (),
        assignments=tuple(assignments),
        acknowledged=tuple(verdict.acknowledged),
        cancelled=tuple(verdict.cancelled),
        started=tuple(verdict.started),
        lease_s=told.lease_s,
        interval_s=told.interval_s,
        hold_s=told.hold_s,
        consoles=tuple(attempt_id for attempt_id, one in held.items() if attempts.is_console_wanted(tx, one)),
    )


def _host(
    worker_id: WorkerId, request: Sync, known: workers.Known, held: dict[AttemptId, Held], assignments: list[Assignment]
) -> Host:
    profile = request.profile
    jobs = {f"job-{one.job.id}" for one in held.values()} | {f"job-{one.job_id}" for one in assignments}
    arrays = {f"array-{one.job.submission_id}" for one in held.values() if one.job.position is not None}
    return Host(
        worker_id=worker_id,
        tags=frozenset(profile.tags),
        owner_id=known.owner_id,
        owner_groups=known.owner_groups,
        accepts=profile.accepts,
        shares=profile.shares,
        lends_bytes=min(max(profile.keeps_bytes, 0), _MOST_OF_A_PC) if known.pilot_of is None else 0,
        has=frozenset((*request.cached[:1000], *request.held[:1000])),
        works=frozenset(jobs | arrays),
    )


def _is_credible(amount: Capacity) -> bool:
    return all(abs(number) <= _MOST_OF_A_PC for number in (amount.cpus, amount.memory_bytes, amount.disk_bytes))


def _pace(tx: Transaction, worker_id: WorkerId, settings: ServerSettings, *, is_busy: bool) -> Pace:
    terms = Terms(
        interval_s=settings.interval_s,
        max_interval_s=settings.max_interval_s,
        lease_s=settings.lease_s,
        calls_per_s=settings.calls_per_s,
        max_held=settings.max_workers_held,
    )
    online, busy = workers.how_many(tx, settings.max_interval_s)
    return pace(terms, online=online, busy=busy, is_busy=is_busy, number=worker_id, now=tx.now)


def leave(tx: Transaction, caller: Caller) -> None:
    """Give back all that a worker holds and let it go. Idempotent."""
    pilots.let_go(tx, _worker_of(caller))


def _worker_of(caller: Caller) -> WorkerId:
    if caller.worker_id is None:
        raise ValueError("only a worker syncs")
    return caller.worker_id


def _take_report(
    tx: Transaction,
    caller: Caller,
    worker_id: WorkerId,
    live: dict[AttemptId, Held],
    report: AttemptReport,
    verdict: _Verdict,
) -> None:
    """Apply one report. What does not apply any more is acknowledged if it was final, else cancelled."""
    held = live.get(report.attempt_id) or attempts.attempt_row(tx, report.attempt_id, worker_id)
    event = event_of_report(report.state)
    if held is None or event is None:
        verdict.cancelled.append(report.attempt_id)
        return
    if (
        report.state is AttemptState.SUSPENDED
        and held.state is AttemptState.LOST
        and held.job.state not in FINAL_JOB_STATES
        and _lease_end(tx, held, report.state, verdict.lease_s) <= tx.now
    ):
        return  # it was lost because it was suspended for too long: it stays so, but may come back running or with its result
    report = _with_proof(tx, caller, held, report)
    event = event_of_report(report.state) or event
    exit_code = None if report.exit_code is None else max(-(1 << 31), min(report.exit_code, (1 << 31) - 1))
    outcome = Outcome(exit_code=exit_code, reason=report.reason, result=report.result, value=report.value)
    applied = attempts.apply_event(tx, held, event, outcome)
    if report.state in _FINAL_REPORTS:
        verdict.acknowledged.append(report.attempt_id)
        if report.result is not None and not applied:
            data.give_up_upload(tx, caller.principal, report.result.sha256)
    elif applied:
        verdict.renewed.append((report.attempt_id, _lease_end(tx, held, report.state, verdict.lease_s)))
        if sets.may_start(tx, held):
            verdict.started.append(report.attempt_id)
    else:
        verdict.cancelled.append(report.attempt_id)


def _with_proof(tx: Transaction, caller: Caller, held: Held, report: AttemptReport) -> AttemptReport:
    """Return the report without a result that is not in the repository. A success without the result that its job wants gives the job back:
    whatever became of the bytes, it was not the job's doing."""
    if report.value is not None and len(report.value) > MOST_VALUE_BYTES:
        return msgspec.structs.replace(report, state=AttemptState.FAILED, value=None, result=None, reason="its value is too long")
    if report.result is None and (report.state is not AttemptState.SUCCEEDED or not attempts.wants_files(tx, held)):
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


def _lease_end(tx: Transaction, held: Held, state: AttemptState, lease_s: float) -> float:
    """Return until when an attempt is leased; a suspended one up to its job's bound, however long its PC is silent."""
    if state is not AttemptState.SUSPENDED:
        return tx.now + lease_s
    return float(held.suspended_at or tx.now) + attempts.max_suspend_s(tx, held)


def _lease(
    tx: Transaction, worker_id: WorkerId, request: Sync, known: workers.Known, settings: ServerSettings, lease_s: float
) -> list[Assignment]:
    """Lease what fits, until nothing does or enough has been leased."""
    if request.free.cpus <= 0 and not request.ahead:
        return []
    tx.memo["max_running"] = settings.max_running
    board = queues.board(tx)
    ask = _ask_of(worker_id, request, known)
    whose = (known.owner_id, known.owner_groups, known.pilot_of, known.pilot_groups)
    alike = (known.told, whose, known.reserved_for, worker_id if board.names_workers else 0)
    waiting = board.suiting(ask, alike)
    leased: list[Assignment] = []
    exhausted: set[int] = set()
    while waiting and len(leased) < _MOST_PER_CALL:
        shares = match(ask, waiting, board.standings, limit=_MOST_PER_CALL - len(leased), people=board.people)
        short = False
        for share in shares:
            queue = board.queue(share.queue_id)
            found = attempts.lease(tx, worker_id, queue.id, share.count, lease_s, head=queue.head)
            leased += [_completed(tx, one, ask, queue.class_id) for one in found]
            board.took(queue.id, found)
            ask = _less(ask, found, queue.class_id)
            if len(found) < share.count:
                # The rest are jobs that this worker refused a moment ago, or another process has them; what they would have taken goes
                # to other queues.
                exhausted.add(queue.id)
                short = True
        if not short:
            break
        waiting = [queue for queue in board.suiting(ask, alike) if queue.id not in exhausted]
    return leased


def _ask_of(worker_id: WorkerId, request: Sync, known: workers.Known) -> Ask:
    return ask_of(
        request.profile,
        request.free,
        cached=frozenset((*request.cached, *request.held[:1000])),
        ahead=request.ahead,
        left_s=request.left_s,
        worker_id=worker_id,
        owner_id=known.owner_id,
        owner_groups=known.owner_groups,
        pilot_of=known.pilot_of,
        pilot_groups=known.pilot_groups,
        reserved_for=known.reserved_for,
    )


def _completed(tx: Transaction, assignment: Assignment, ask: Ask, class_id: int) -> Assignment:
    """Return an assignment with the files of its app for the worker's platform, and what its owner wants to be told of the disk."""
    program = assignment.programs.get(ask.platform) or assignment.programs.get("any")
    said: tuple[str, ...] = ()
    if ask.endorsers and assignment.disk is not None and assignment.disk.disk is not None:
        said = manifests.statements_for(tx, assignment.disk.disk.sha256, ask.endorsers)
    return msgspec.structs.replace(assignment, class_id=class_id, program=program, programs={}, statements=said)


def _less(ask: Ask, found: list[Assignment], class_id: int) -> Ask:
    """Return an ask after some jobs were leased: what fits comes out of what is free, the rest of what was asked ahead."""
    free, ahead = ask.free, dict(ask.ahead)
    for one in found:
        left = without(free, [need_of(one.spec, [file.blob for file in one.data])])
        if min(left.cpus, left.memory_bytes, left.disk_bytes) >= 0:
            free = left
        else:
            ahead[class_id] = ahead.get(class_id, 0) - 1
    return msgspec.structs.replace(ask, free=free, ahead=ahead)
