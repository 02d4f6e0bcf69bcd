"""Jobs and what they printed."""

from __future__ import annotations

from starlette.requests import Request as HttpRequest

from deskgrid.core.lifecycle import LIVE_STATES
from deskgrid.core.submission import check_spec
from deskgrid.errors import InvalidInput
from deskgrid.model import wire
from deskgrid.model.ids import JobId
from deskgrid.model.jobs import Job, JobState
from deskgrid.model.users import Role
from deskgrid.server.routes.handler import Call, Services, reads, serves, writes
from deskgrid.server.store import accounts, data, jobs
from deskgrid.server.store.engine import Transaction

_LONGEST_HOLD_S = 60.0
_LOG_CHUNK_BYTES = 1 << 18
_STREAMS = ("stdout", "stderr", "console")


@writes(wire.SUBMIT_JOB)
def submit_job(tx: Transaction, call: Call[wire.SubmitJob]) -> Job:
    check_spec(call.body.spec)
    accounts.check_shares(tx, call.body.spec.machine.share, "machine.share")
    disk = data.find_disk(tx, call.caller, call.body.spec.machine.disk)
    if call.body.context is not None:
        data.require_upload(tx, call.caller, call.body.context)
    return jobs.add_job(tx, call.caller, call.body.spec, disk, call.body.context)


@reads(wire.LIST_JOBS)
def list_jobs(tx: Transaction, call: Call[wire.Nothing]) -> wire.JobList:
    everyone = call.query.get("all", False) and call.caller.role is Role.ADMIN
    found, more = jobs.list_jobs(
        tx,
        owner=None if everyone else call.caller.user_id,
        state=_state(call.query.get("state")),
        before=call.query.get("before"),
        limit=min(max(call.query.get("limit", 100), 1), 1000),
    )
    return wire.JobList(jobs=found, more=more)


@serves(wire.GET_JOB)
async def get_job(services: Services, call: Call[wire.Nothing], _http: HttpRequest) -> wire.JobDetail:
    job_id = JobId(call.number("job"))
    topic = jobs.job_topic(job_id)
    deadline = services.clock.monotonic() + min(call.query.get("wait_s", 0.0), _LONGEST_HOLD_S)
    while True:
        mark = services.live.mark(topic)
        detail = await services.store.read(lambda tx: jobs.get_job(tx, call.caller, job_id))
        remaining_s = deadline - services.clock.monotonic()
        if remaining_s <= 0 or wire.change_mark(detail) != call.query.get("seen"):
            return detail
        await services.live.wait({topic: mark}, remaining_s)


@writes(wire.CANCEL_JOB)
def cancel_job(tx: Transaction, call: Call[wire.Nothing]) -> Job:
    return jobs.cancel_job(tx, call.caller, JobId(call.number("job")), f"cancelled by {call.caller.name}")


@reads(wire.READ_LOG)
def read_log(tx: Transaction, call: Call[wire.Nothing]) -> wire.LogChunk:
    stream = call.query.get("stream", "stdout")
    if stream not in _STREAMS:
        raise InvalidInput(f"there is no stream {stream!r}", hint=f"one of {', '.join(_STREAMS)}")
    offset = max(call.query.get("offset", 0), 0)
    attempts = jobs.get_job(tx, call.caller, JobId(call.number("job"))).attempts
    wanted = call.query.get("attempt")
    chosen = [attempt for attempt in attempts if wanted in (None, attempt.number)]
    if not chosen:
        return wire.LogChunk(attempt_id=None, number=0, offset=offset, data=b"", ended=False)
    attempt = chosen[-1]
    begin, found = jobs.read_log(tx, attempt.id, stream, offset, _LOG_CHUNK_BYTES)
    over = attempt.state not in LIVE_STATES and not found
    return wire.LogChunk(attempt_id=attempt.id, number=attempt.number, offset=begin, data=found, ended=over)


def _state(text: str | None) -> JobState | None:
    if text is None:
        return None
    try:
        return JobState(text)
    except ValueError as error:
        raise InvalidInput(f"there is no job state {text!r}", hint=f"one of {', '.join(JobState)}") from error
