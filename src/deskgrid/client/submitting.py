"""From what a user wrote to what is submitted: apps' defaults, contexts, tables, arrays and sets."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import msgspec

from deskgrid.client.jobfile import JobFile, with_defaults
from deskgrid.client.jobfile_set import SetFile
from deskgrid.client.secret_files import read_files
from deskgrid.errors import InvalidInput
from deskgrid.model import wire
from deskgrid.model.jobs import Array, Job, JobSpec

if TYPE_CHECKING:
    from deskgrid.client.grid import Grid, Progress

__all__ = ["Stage", "prepared", "submit_file", "submit_set_file"]

Prepare = Callable[[JobSpec], JobSpec]
Stage = Callable[[str, int | None], "Progress"]
"""Told what begins, and how many bytes it has; returns what is told how many are done."""


def _as_it_is(spec: JobSpec) -> JobSpec:
    return spec


def _quiet(title: str, size_bytes: int | None) -> Progress:
    return lambda _: None


async def prepared(grid: Grid, wanted: JobFile, *, in_set: bool = False) -> JobFile:
    """Return a job with what its app says where the user said nothing, and the app's version named. Raise NotFound, InvalidInput."""
    if not wanted.spec.app:
        return wanted
    app = await grid.app(wanted.spec.app)
    whole = with_defaults(wanted, app.defaults, f"app {app.name}@{app.version}", in_set=in_set)
    return msgspec.structs.replace(whole, spec=msgspec.structs.replace(whole.spec, app=f"{app.name}@{app.version}"))


async def submit_file(
    grid: Grid, wanted: JobFile, *, stage: Stage = _quiet, prepare: Prepare = _as_it_is, key: str | None = None
) -> Job | Array:
    """Submit what a user wrote: a job, or an array. `prepare` has the last word on the spec. Made again with the same `key`, it happens once."""
    whole = await prepared(grid, wanted)
    spec = prepare(whole.spec)
    if whole.array is None:
        secrets = await asyncio.to_thread(read_files, whole.secrets)
        return await grid.submit(spec, context=whole.context, secrets=secrets, progress=stage("submit the job", None), key=key)
    parts = await _parts(grid, whole, stage)
    stage("submit the array", None)
    return await grid.transport.call(wire.SUBMIT_ARRAY, wire.SubmitArray(spec=spec, **parts), key=key)


async def submit_set_file(grid: Grid, wanted: SetFile, *, stage: Stage = _quiet, prepare: Prepare = _as_it_is) -> wire.JobSet:
    """Submit a set as a user wrote it, all of it or nothing."""
    # All apps before the first upload: what cannot be is told at once.
    whole = [(name, await prepared(grid, job, in_set=True)) for name, job in wanted.members]
    members = [
        wire.SetMember(name=name, spec=prepare(job.spec), **await _parts(grid, job, stage, f" of {name}")) for name, job in whole
    ]
    stage("submit the set", None)
    return await grid.submit_set(wanted.name, members, together=wanted.together)


async def _parts(grid: Grid, whole: JobFile, stage: Stage, of: str = "") -> dict[str, Any]:
    """Upload the context and the table of a job, seal its secrets; return what the call that submits it says of them. Raise InvalidInput."""
    parts: dict[str, Any] = {}
    array = whole.array
    if array is not None and array.table is not None:
        reading = stage(f"read the table{of}", array.table.stat().st_size)
        parts["table"], parts["count"], parts["names"] = await grid.send_table(
            array.table, _begun_later(stage, f"send the table{of}"), reading
        )
        if array.count and array.count != parts["count"]:
            raise InvalidInput(f"the table has {parts['count']} lines, not {array.count}", where="array.count")
    elif array is not None:
        parts["count"] = array.count
    if whole.context is not None:
        parts["context"] = await grid.send_folder(whole.context, _begun_later(stage, f"send the context{of}"))
    if whole.secrets:
        parts["secrets"] = await grid.seal(await asyncio.to_thread(read_files, whole.secrets))
    return parts


def _begun_later(stage: Stage, title: str) -> Progress:
    """Return what is told of a stage that begins with the first byte: what comes before it takes time, too."""
    begun: list[Progress] = []

    def tell(amount: int) -> None:
        if not begun:
            begun.append(stage(title, None))
        begun[0](amount)

    return tell
