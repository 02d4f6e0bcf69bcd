"""GA4GH TES: other people's clients submit, watch and cancel jobs. What a task is here: core/tes.py."""

from __future__ import annotations

import asyncio
import hashlib
import io
import itertools
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from msgspec import Struct
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

import deskgrid
from deskgrid.archive import ArchiveWriter, zstd
from deskgrid.core.tes import INPUTS_FOLDER, PARAMETERS, PROCESS, TaskJob, image_of, job_of, matches, shown, state_of, with_contents
from deskgrid.errors import InvalidInput, NotFound
from deskgrid.model import tes, wire
from deskgrid.model.data import Blob
from deskgrid.model.ids import JobId
from deskgrid.model.jobs import INSTALLED, Job
from deskgrid.model.machines import DiskFormat, MachineKind
from deskgrid.model.tes import TesState, TesTask, TesView
from deskgrid.server.routes.data import keep_bytes
from deskgrid.server.routes.handler import Call, Services, once, serves, writes
from deskgrid.server.routes.jobs import resolved
from deskgrid.server.store import audit, data, jobs, submissions, tasks
from deskgrid.server.store.engine import Transaction
from deskgrid.server.store.tasks import FoundTask

_PAGE = {TesView.MINIMAL: 2047, TesView.BASIC: 64, TesView.FULL: 16}
"""Tasks in one answer at most: it is a snapshot of the store, and what they printed is read for it."""
_DEFAULT_PAGE = 256
_MOST_LOOKED_AT = 2048
"""Tasks that are looked at for one page, whatever of them is wanted."""


@serves(tes.SERVICE_INFO)
async def service_info(_services: Services, call: Call[wire.Nothing], http: HttpRequest) -> tes.TesServiceInfo:
    name = call.settings.name
    return tes.TesServiceInfo(
        id=f"deskgrid.{name}",
        name=name,
        version=deskgrid.__version__,
        organization=tes.TesOrganization(name=name, url=str(http.base_url)),
        storage=("deskgrid:",),
        backend_parameters=PARAMETERS,
    )


# ---- submitting


@serves(tes.CREATE_TASK)
async def create_task(services: Services, call: Call[TesTask], _http: HttpRequest) -> Response:
    image = image_of(call.body)
    kind = await services.store.read(lambda tx: _kind(tx, call, image))
    made = job_of(call.body, kind, _mark(call))
    packed = await asyncio.to_thread(_packed, made.files)
    context = await keep_bytes(services, call.caller, packed)
    key = f"{tes.CREATE_TASK.name}:{call.key}"[:64]
    answer = await services.store.write(lambda tx: once(tx, call.caller.principal, key, lambda: _submit(tx, call, made, context)))
    return Response(answer, media_type="application/json")


def _kind(tx: Transaction, call: Call[TesTask], image: str) -> MachineKind:
    if image == PROCESS:
        return MachineKind.PROCESS
    if image.startswith(INSTALLED):
        return MachineKind.VM
    try:
        found = data.find_disk(tx, call.caller, image)
    except NotFound as error:
        raise InvalidInput(
            f"there is no disk {image[:80]!r}",
            where="executors[0].image",
            hint=f"one that `deskgrid disk list` shows, or {PROCESS}; podman save and deskgrid disk import make one of an image",
        ) from error
    return MachineKind.CONTAINER if found.disk is not None and found.disk.format is DiskFormat.OCI else MachineKind.VM


def _mark(call: Call[TesTask]) -> str:
    """Return what no other task is marked with, and this one again if it is submitted again. So no two contexts are the same."""
    return f"deskgrid-task-{hashlib.sha256(f'{call.caller.principal} {call.key}'.encode()).hexdigest()[:16]}"


def _packed(files: Mapping[str, bytes]) -> bytes:
    packed = io.BytesIO()
    with ArchiveWriter(packed) as writer:
        writer.add_folder(INPUTS_FOLDER.encode())
        for name, content in files.items():
            writer.add_file(name.encode(), len(content), [content])
        writer.close()
    return packed.getvalue()


def _submit(tx: Transaction, call: Call[TesTask], made: TaskJob, context: Blob) -> tes.TesCreated:
    try:
        new = resolved(tx, call, wire.SubmitJob(spec=made.spec, context=context))
    except NotFound as error:  # to clients of TES that were a task, or the call itself
        raise InvalidInput(error.message, hint=error.hint) from error
    job_id = submissions.submit_job(tx, call.caller, new, max_waiting=call.settings.max_waiting)
    tasks.add_task(tx, job_id, jobs.get_job(tx, call.caller, job_id).job.owner_id, made.kept)
    answer = tes.TesCreated(id=str(job_id))
    audit.note_call(tx, call.caller, tes.CREATE_TASK.name, call.path, call.body, answer, call.request)
    return answer


@writes(tes.CANCEL_TASK)
def cancel_task(tx: Transaction, call: Call[wire.Nothing]) -> wire.Nothing:
    job_id = _job_id(call)
    tasks.get_task(tx, call.caller, job_id, "cancel_job")
    jobs.cancel_job(tx, call.caller, job_id, f"cancelled by {call.caller.name}")
    return wire.Nothing()


# ---- looking


@serves(tes.GET_TASK)
async def get_task(services: Services, call: Call[wire.Nothing], _http: HttpRequest) -> TesTask:
    view, job_id = _view(call), _job_id(call)
    seen = await services.store.read(lambda tx: _seen(tx, call, tasks.get_task(tx, call.caller, job_id), view))
    return await _whole(services, seen)


@serves(tes.LIST_TASKS)
async def list_tasks(services: Services, call: Call[wire.Nothing], _http: HttpRequest) -> tes.TesTaskList:
    view = _view(call)
    found, token = await services.store.read(lambda tx: _page(tx, call, view))
    return tes.TesTaskList(tasks=tuple([await _whole(services, seen) for seen in found]), next_page_token=token)


class _Seen(Struct, frozen=True):
    """A task as it is told, but for the contents of its inputs."""

    task: TesTask
    context: Blob | None
    """Where they are."""


def _seen(tx: Transaction, call: Call[wire.Nothing], found: FoundTask, view: TesView) -> _Seen:
    job, attempts = found.detail.job, found.detail.attempts
    printed = tasks.printed_of(tx, attempts, whole=view is TesView.FULL) if view is not TesView.MINIMAL else {}
    context = _context(tx, call, job) if view is TesView.FULL and found.kept.task.inputs else None
    return _Seen(shown(found.kept, job, attempts, view, printed), context)


def _context(tx: Transaction, call: Call[wire.Nothing], job: Job) -> Blob | None:
    """Return a task's context, if it is still there and the caller may read it: contents of inputs are their submitter's alone."""
    if job.context is None or not data.may_read_blob(tx, call.caller, job.context):
        return None
    size = data.stored_size(tx, job.context)
    return Blob(sha256=job.context, size_bytes=size) if size is not None else None


async def _whole(services: Services, seen: _Seen) -> TesTask:
    if seen.context is None:
        return seen.task
    file = await services.repository.local_path(seen.context)
    return with_contents(seen.task, await asyncio.to_thread(_contents, file))


def _contents(context: Path) -> dict[int, str]:
    """Return what came with a task, from the context that was made of it."""
    found = {}
    with zstd.open(context, "rb") as file, tarfile.open(fileobj=file, mode="r|") as archive:
        for member in archive:
            folder, _, number = member.name.partition("/")
            content = archive.extractfile(member) if folder == INPUTS_FOLDER and number else None
            if content is not None:
                found[int(number)] = content.read().decode()
    return found


def _page(tx: Transaction, call: Call[wire.Nothing], view: TesView) -> tuple[list[_Seen], str | None]:
    """Return a page of the caller's tasks, and the token of the next one."""
    size = min(_page_size(call), _PAGE[view])
    wanted = _wanted(call)
    found: list[_Seen] = []
    owner_id, last = call.caller.user_id, None
    if owner_id is None:
        return [], None
    for looked_at, one in enumerate(tasks.tasks_before(tx, owner_id, _before(call))):
        if len(found) == size or looked_at == _MOST_LOOKED_AT:
            return found, str(last)
        last = one.detail.job.id
        if _is_wanted(one, *wanted):
            found.append(_seen(tx, call, one, view))
    return found, None


def _is_wanted(one: FoundTask, state: TesState | None, name_prefix: str, tags: list[tuple[str, str]]) -> bool:
    if state is not None and state_of(one.detail.job, one.detail.attempts) is not state:
        return False
    return matches(one.kept, name_prefix=name_prefix, tags=tags)


# ---- what is asked for


def _job_id(call: Call[Any]) -> JobId:
    text = call.path["id"]
    if not text.isdecimal() or len(text) > 18:
        raise NotFound(f"there is no task {text[:40]!r}")
    return JobId(int(text))


def _view(call: Call[Any]) -> TesView:
    return TesView(_chosen(call, "view", TesView.MINIMAL, list(TesView)))


def _wanted(call: Call[Any]) -> tuple[TesState | None, str, list[tuple[str, str]]]:
    state = _chosen(call, "state", "", list(TesState)) if call.query.get("state") else ""
    keys, values = call.query.get("tag_key", []), call.query.get("tag_value", [])
    if len(values) > len(keys):
        raise InvalidInput("a tag_value belongs to a tag_key", where="tag_value")
    return (
        TesState(state) if state else None,
        call.query.get("name_prefix", ""),
        list(itertools.zip_longest(keys, values, fillvalue="")),
    )


def _chosen(call: Call[Any], name: str, default: str, allowed: list[Any]) -> str:
    text = str(call.query.get(name) or default)
    if text not in allowed:
        raise InvalidInput(f"{text[:40]!r} is none", where=name, hint=f"one of {', '.join(allowed)}")
    return text


def _page_size(call: Call[Any]) -> int:
    size = int(call.query.get("page_size", _DEFAULT_PAGE))
    if not 1 <= size < 2048:
        raise InvalidInput(f"{size} tasks are no page", where="page_size", hint="1 to 2047")
    return size


def _before(call: Call[Any]) -> int | None:
    token = call.query.get("page_token", "")
    if token and (not token.isdecimal() or len(token) > 18):
        raise InvalidInput("this token was not given out here", where="page_token")
    return int(token) if token else None
