"""From what a user wrote to what is submitted: apps' defaults, contexts, tables, arrays and sets."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import msgspec

from deskgrid.client.jobfile import JobFile, SetFile, with_defaults
from deskgrid.model import wire
from deskgrid.model.jobs import Array, Job, JobSpec

if TYPE_CHECKING:
    from deskgrid.client.grid import Grid, Progress

__all__ = ["prepared", "submit_file", "submit_set_file"]

Prepare = Callable[[JobSpec], JobSpec]


def _as_it_is(spec: JobSpec) -> JobSpec:
    return spec


async def prepared(grid: Grid, wanted: JobFile) -> JobFile:
    """Return a job with what its app says where the user said nothing, and the app's version named. Raise NotFound, InvalidInput."""
    if not wanted.spec.app:
        return wanted
    app = await grid.app(wanted.spec.app)
    whole = with_defaults(wanted, app.defaults, f"app {app.name}@{app.version}")
    return msgspec.structs.replace(whole, spec=msgspec.structs.replace(whole.spec, app=f"{app.name}@{app.version}"))


async def submit_file(
    grid: Grid, wanted: JobFile, *, progress: Progress | None = None, prepare: Prepare = _as_it_is
) -> Job | Array:
    """Submit what a user wrote: a job, or an array. `prepare` has the last word on the spec."""
    whole = await prepared(grid, wanted)
    spec = prepare(whole.spec)
    if whole.array is None:
        return await grid.submit(spec, context=whole.context, progress=progress)
    return await grid.submit_array(spec, count=whole.array.count, table=whole.array.table, context=whole.context, progress=progress)


async def submit_set_file(
    grid: Grid, wanted: SetFile, *, progress: Progress | None = None, prepare: Prepare = _as_it_is
) -> wire.JobSet:
    """Submit a set as a user wrote it, all of it or nothing."""
    members = [await _member(grid, name, job, progress, prepare) for name, job in wanted.members]
    return await grid.submit_set(wanted.name, members, together=wanted.together)


async def _member(grid: Grid, name: str, wanted: JobFile, progress: Progress | None, prepare: Prepare) -> wire.SetMember:
    whole = await prepared(grid, wanted)
    context = await grid.send_folder(whole.context, progress) if whole.context is not None else None
    more: dict[str, Any] = {}
    if whole.array is not None and whole.array.table is not None:
        more["table"], more["count"], more["names"] = await grid.send_table(whole.array.table, progress)
    elif whole.array is not None:
        more["count"] = whole.array.count
    return wire.SetMember(name=name, spec=prepare(whole.spec), context=context, **more)
