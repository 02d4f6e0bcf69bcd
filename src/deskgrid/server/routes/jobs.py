"""Jobs and what they printed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import msgspec
from starlette.requests import Request as HttpRequest

from deskgrid.core.lifecycle import LIVE_STATES
from deskgrid.core.rights import Right, check_job_token, holds
from deskgrid.core.submission import check_array, check_data_size, check_spec
from deskgrid.errors import Forbidden, InvalidInput, NotFound
from deskgrid.model import wire
from deskgrid.model.data import DataFile, DataRef
from deskgrid.model.ids import ArrayId, JobId, UserId
from deskgrid.model.jobs import Array, Job, JobSpec, JobState
from deskgrid.model.overlay import API_SERVICE
from deskgrid.model.users import Role
from deskgrid.server.routes.handler import Call, Services, reads, serves, writes
from deskgrid.server.store import accounts, apps, data, jobs, manifests, submissions
from deskgrid.server.store.engine import Transaction
from deskgrid.server.store.submissions import NewSubmission

Found = TypeVar("Found")
Submitted = wire.SubmitJob | wire.SubmitArray | wire.SetMember
_LONGEST_HOLD_S = 60.0
_LOG_CHUNK_BYTES = 1 << 18
_STREAMS = ("stdout", "stderr", "console")


@writes(wire.SUBMIT_JOB)
def submit_job(tx: Transaction, call: Call[wire.SubmitJob]) -> Job:
    new = resolved(tx, call, call.body)
    job_id = submissions.submit_job(tx, call.caller, new, max_waiting=call.settings.max_waiting)
    return jobs.get_job(tx, call.caller, job_id).job


@writes(wire.SUBMIT_ARRAY)
def submit_array(tx: Transaction, call: Call[wire.SubmitArray]) -> Array:
    check_array(call.body.count, call.body.names, has_table=call.body.table is not None)
    if call.body.table is not None:
        data.require_upload(tx, call.caller, call.body.table)
    new = resolved(tx, call, call.body)
    array_id = submissions.submit_array(
        tx,
        call.caller,
        new,
        call.body.count,
        table=call.body.table,
        names=call.body.names,
        max_waiting=call.settings.max_waiting,
    )
    return submissions.get_array(tx, call.caller, array_id)


def resolved(tx: Transaction, call: Call[Any], wanted: Submitted, *, in_set: bool = False) -> NewSubmission:
    """Check what is submitted and find what it refers to. Raise InvalidInput, NotFound, Conflict or Forbidden (no room)."""
    caller, spec, context = call.caller, wanted.spec, wanted.context
    check_spec(spec, in_set=in_set)
    if any(reach.service == API_SERVICE for reach in spec.machine.reach):
        check_job_token(caller.rights)
    if not spec.retain_s:
        # What holds now is kept with the job: a promise that later settings do not change.
        spec = msgspec.structs.replace(spec, retain_s=call.settings.retain_s)
    if caller.user_id is not None:
        data.check_room(tx, caller.user_id, 0, call.settings.max_bytes)
    accounts.check_shares(tx, spec.machine.share, "machine.share")
    accounts.check_group(tx, caller, spec.group)
    of_grid = spec.machine.disk and not spec.machine.installed_disk
    found = data.find_disk(tx, caller, spec.machine.disk) if of_grid else None
    if found is not None:
        manifests.check_not_revoked(tx, found)
    if context is not None:
        data.require_upload(tx, caller, context)
    _check_secrets(call, spec, wanted.secrets)
    trust = accounts.trusted(tx, caller, spec.trust)
    files = tuple(_data_file(tx, caller, name, reference) for name, reference in spec.data)
    check_data_size(spec, files)
    new = NewSubmission(
        spec=spec,
        data=files,
        disk=DataRef(blob=found.blob, disk=found.disk, delta=found.delta) if found is not None else None,
        disk_owner=found.owner_id if found is not None else 0,
        context=context,
        secrets=wanted.secrets,
        trust=trust,
    )
    if not spec.app:
        return new
    app = apps.find_app(tx, caller, spec.app)
    return msgspec.structs.replace(new, app_id=app.id, programs=app.files)


def _data_file(tx: Transaction, caller: accounts.Caller, name: str, reference: str) -> DataFile:
    """Find the data of a file of a job. Raise NotFound; Forbidden if the caller's token may not read data: the job would do so for him."""
    if not holds(caller.rights, Right.DATA_READ):
        raise Forbidden("this token may not read data, so its jobs may not, either", hint="one with the right data:read")
    try:
        found = data.find_data(tx, caller, reference)
    except NotFound as error:
        raise NotFound(f"data.{name}: {error.message}", hint=error.hint) from error
    return DataFile(name=name, blob=found.blob)


def _check_secrets(call: Call[Any], spec: JobSpec, sealed: bytes) -> None:
    """Check that the secrets that come with a spec are those that it names, and can be opened here. Raise InvalidInput."""
    if not sealed and not spec.secrets:
        return
    if call.caller.user_id is None:
        raise InvalidInput("only users' jobs have secrets", where="secrets")
    try:
        found = call.authority.open_secrets(sealed, call.caller.user_id)
    except InvalidInput as error:
        raise InvalidInput(f"the secrets cannot be opened: {error.message}", where="secrets", hint="submit anew") from error
    if set(found) != set(spec.secrets):
        raise InvalidInput("what was sealed are not the secrets that the job names", where="secrets")


@reads(wire.LIST_ARRAYS)
def list_arrays(tx: Transaction, call: Call[wire.Nothing]) -> wire.ArrayList:
    group = call.query.get("group", "")
    found, more = submissions.list_arrays(
        tx,
        owner=_whose(tx, call, group),
        group=group,
        before=call.query.get("before"),
        limit=min(max(call.query.get("limit", 100), 1), 1000),
    )
    return wire.ArrayList(arrays=found, more=more)


@serves(wire.GET_ARRAY)
async def get_array(services: Services, call: Call[wire.Nothing], _http: HttpRequest) -> Array:
    array_id = ArrayId(call.number("array"))
    return await changed(
        services,
        call,
        [submissions.array_topic(array_id)],
        lambda tx: submissions.get_array(tx, call.caller, array_id),
        wire.array_mark,
    )


@writes(wire.CANCEL_ARRAY)
def cancel_array(tx: Transaction, call: Call[wire.Nothing]) -> Array:
    array_id = ArrayId(call.number("array"))
    return submissions.cancel_array(tx, call.caller, array_id, f"cancelled by {call.caller.name}")


@reads(wire.LIST_JOBS)
def list_jobs(tx: Transaction, call: Call[wire.Nothing]) -> wire.JobList:
    group, array = call.query.get("group", ""), call.query.get("array")
    if array is not None:
        submissions.get_array(tx, call.caller, ArrayId(array))
    found, more = jobs.list_jobs(
        tx,
        owner=None if array is not None else _whose(tx, call, group),
        group=group,
        state=_state(call.query.get("state")),
        before=call.query.get("before"),
        limit=min(max(call.query.get("limit", 100), 1), 1000),
        array=array,
    )
    return wire.JobList(jobs=found, more=more)


@serves(wire.GET_JOB)
async def get_job(services: Services, call: Call[wire.Nothing], _http: HttpRequest) -> wire.JobDetail:
    job_id = JobId(call.number("job"))
    return await changed(
        services, call, [submissions.job_topic(job_id)], lambda tx: jobs.get_job(tx, call.caller, job_id), wire.change_mark
    )


async def changed(
    services: Services,
    call: Call[wire.Nothing],
    topics: Sequence[str],
    read: Callable[[Transaction], Found],
    mark_of: Callable[[Found], str],
) -> Found:
    """Return what `read` finds, at the latest after `wait_s`, but before only once its mark is not the one that the caller has seen."""
    deadline = services.clock.monotonic() + min(call.query.get("wait_s", 0.0), _LONGEST_HOLD_S)
    while True:
        marks = {topic: services.live.mark(topic) for topic in topics}
        found = await services.store.read(read)
        remaining_s = deadline - services.clock.monotonic()
        if remaining_s <= 0 or mark_of(found) != call.query.get("seen"):
            return found
        await services.live.wait(marks, remaining_s)


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


def _whose(tx: Transaction, call: Call[wire.Nothing], group: str) -> UserId | None:
    """Return whose jobs are listed: the caller's, or everybody's of a group that he is in, or everybody's (admins). Raise InvalidInput."""
    is_admin = call.caller.role is Role.ADMIN
    if group and not is_admin:
        accounts.check_group(tx, call.caller, group)
    return None if group or (call.query.get("all", False) and is_admin) else call.caller.user_id


def _state(text: str | None) -> JobState | None:
    if text is None:
        return None
    try:
        return JobState(text)
    except ValueError as error:
        raise InvalidInput(f"there is no job state {text!r}", hint=f"one of {', '.join(JobState)}") from error
