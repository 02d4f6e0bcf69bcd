"""The SDK: what a program can do on a grid. The command line is written on it.

async with Grid(credentials) as grid:
    job = await grid.submit(spec, context=Path("context"))
    detail = await grid.wait(job.id)
    report = await grid.results(job.id, Path("out"))
"""

from __future__ import annotations

import asyncio
import hashlib
import tempfile
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

from deskgrid import archive
from deskgrid.client.arrays import ArrayResults, fetch_results
from deskgrid.client.entering import join, join_hub, login, make_link
from deskgrid.client.pilots import Pilot, pilot_spec, write_pilot
from deskgrid.client.secret_files import sealed, with_secrets
from deskgrid.client.tables import write_rows, write_table
from deskgrid.client.transport import Credentials, Transport
from deskgrid.client.watching import until_ended
from deskgrid.core.lifecycle import FINAL_JOB_STATES
from deskgrid.errors import BadArchive, Conflict, InvalidInput
from deskgrid.link import Link, hash_secret, make_secret
from deskgrid.model import wire
from deskgrid.model.apps import App
from deskgrid.model.data import Blob, Data, DataKind, Delta, Disk, Visibility
from deskgrid.model.ids import ArrayId, JobId, SetId, Sha256, WorkerId
from deskgrid.model.jobs import Array, ArrayState, Job, JobSpec, JobState
from deskgrid.model.manifests import Bundle, DiskDetail, Revocation
from deskgrid.model.overlay import Peer
from deskgrid.model.placement import Attributes, CopyState, Holder, Placement
from deskgrid.model.users import Group, Token, User
from deskgrid.model.workers import Worker

__all__ = ["Grid", "describe_file", "join", "join_hub", "login"]

Progress = Callable[[int], None]


def _ignore(_: int) -> None:
    """Hear of progress that nobody asked for."""


def _job_ended(detail: wire.JobDetail) -> bool:
    return detail.job.state in FINAL_JOB_STATES


def _array_ended(array: Array) -> bool:
    return array.state in (ArrayState.ENDED, ArrayState.CANCELLED)


def describe_file(file: Path) -> Blob:
    """Return size and sha256 of a file."""
    with file.open("rb") as source:
        return Blob(sha256=Sha256(hashlib.file_digest(source, "sha256").hexdigest()), size_bytes=file.stat().st_size)


_MOST_WATCHED = 50
"""Jobs for each of which a call is held."""
_MOST_AT_ONCE, _PAGE = 8, 1000
_LOOK_S, _LISTED_PER_S = 1.0, 1000.0
_PACKING_BYTES = 64 << 20
"""By which an archive may be larger than what is in it."""


class Grid:
    """A user's view of one grid. Use as an async context manager; all methods raise DeskgridError."""

    def __init__(self, credentials: Credentials) -> None:
        self.transport = Transport(credentials)

    async def __aenter__(self) -> Grid:
        await self.transport.__aenter__()
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        await self.transport.__aexit__(kind, error, trace)

    # Jobs

    async def submit(
        self,
        spec: JobSpec,
        *,
        context: Path | None = None,
        secrets: Mapping[str, bytes] | None = None,
        progress: Progress | None = None,
        key: str | None = None,
    ) -> Job:
        """Submit a job with a context folder; returns once the server has stored it durably. Made again with the same `key`, it happens once.

        `secrets`: the job finds them as files /context/secrets/NAME, on PCs of those whom `spec.trust` names: if nobody, the caller's own.
        """
        blob = await self.send_folder(context, progress) if context is not None else None
        spec = with_secrets(spec, secrets or {})
        private = await self.seal(secrets)
        return await self.transport.call(wire.SUBMIT_JOB, wire.SubmitJob(spec=spec, context=blob, secrets=private), key=key)

    async def seal(self, secrets: Mapping[str, bytes] | None) -> bytes:
        """Return secrets of a job of the caller's as they are submitted: only the server can read them. None: nothing."""
        return sealed(secrets, await self.who()) if secrets else b""

    async def send_folder(self, folder: Path, progress: Progress | None = None) -> Blob:
        """Pack and upload a folder, for a job's context or an app's files; return its blob."""
        with tempfile.TemporaryDirectory(prefix="deskgrid-") as place:
            packed = Path(place) / "folder.tar.zst"
            await asyncio.to_thread(archive.pack_folder, folder, packed)
            return await self._send(packed, progress)

    async def _send(self, file: Path, progress: Progress | None) -> Blob:
        blob = await asyncio.to_thread(describe_file, file)
        await self.transport.upload(file, blob, progress)
        return blob

    async def job(self, job_id: JobId) -> wire.JobDetail:
        """Return a job with its attempts."""
        return await self.transport.call(wire.GET_JOB, path={"job": job_id})

    async def jobs(
        self,
        *,
        state: JobState | None = None,
        everyone: bool = False,
        before: JobId | None = None,
        limit: int = 100,
        array: ArrayId | None = None,
        group: str = "",
    ) -> wire.JobList:
        """Return jobs, newest first: one's own, a group's, or everyone's (admins); those submitted by themselves, or those of an array."""
        query: dict[str, object] = {"state": state, "before": before, "limit": limit, "all": everyone or None, "array": array}
        query["group"] = group or None
        return await self.transport.call(wire.LIST_JOBS, query=query)

    async def changes(self, job_id: JobId) -> AsyncIterator[wire.JobDetail]:
        """Yield a job now and whenever it changed, until it is final."""
        async for detail in until_ended(self.transport, wire.GET_JOB, {"job": job_id}, wire.change_mark, _job_ended):
            yield detail

    async def wait(self, job_ids: Iterable[JobId]) -> list[wire.JobDetail]:
        """Return the jobs once all are final, in this order."""
        wanted = list(job_ids)
        ended = {detail.job.id: detail async for detail in self.as_completed(wanted)}
        return [ended[job_id] for job_id in wanted]

    async def as_completed(self, job_ids: Iterable[JobId]) -> AsyncGenerator[wire.JobDetail, None]:
        """Yield the jobs as they become final, each once. Few are watched by held calls; of many it is looked which are left."""
        waiting = set(job_ids)
        while len(waiting) > _MOST_WATCHED:
            live = await self.live_jobs()
            for begin in range(0, len(gone := sorted(waiting - live)), _MOST_AT_ONCE):
                for detail in await asyncio.gather(*(self.job(one) for one in gone[begin : begin + _MOST_AT_ONCE])):
                    if _job_ended(detail):
                        waiting.discard(detail.job.id)
                        yield detail
            await asyncio.sleep(max(_LOOK_S, len(live) / _LISTED_PER_S))
        watching = [asyncio.ensure_future(self._ended(job_id)) for job_id in waiting]
        try:
            for ending in asyncio.as_completed(watching):
                yield await ending
        finally:
            for one in watching:
                one.cancel()

    async def _ended(self, job_id: JobId) -> wire.JobDetail:
        async for detail in self.changes(job_id):
            final = detail
        return final

    async def live_jobs(self) -> set[JobId]:
        """Return the caller's jobs that are not final, arrays' aside: a call for each thousand. One that goes back to the queue meanwhile may be missed."""
        found: set[JobId] = set()
        for state in (JobState.BLOCKED, JobState.WAITING, JobState.ACTIVE):
            page = await self.jobs(state=state, limit=_PAGE)
            found |= {one.id for one in page.jobs}
            while page.more:
                page = await self.jobs(state=state, limit=_PAGE, before=page.jobs[-1].id)
                found |= {one.id for one in page.jobs}
        return found

    async def cancel(self, job_id: JobId) -> Job:
        """Cancel a job; one that is final already is returned as it is."""
        return await self.transport.call(wire.CANCEL_JOB, path={"job": job_id})

    async def remove_job(self, job_id: JobId) -> None:
        """Remove a job that has ended, with its result. Raise Conflict if it has not."""
        await self.transport.call(wire.REMOVE_JOB, path={"job": job_id})

    async def read_log(
        self, job_id: JobId, *, stream: str = "stdout", attempt: int | None = None, offset: int = 0
    ) -> wire.LogChunk:
        """Return output of an attempt (the newest by default) from `offset`."""
        return await self.transport.call(
            wire.READ_LOG, path={"job": job_id}, query={"stream": stream, "attempt": attempt, "offset": offset}
        )

    async def results(self, job_id: JobId, destination: Path, progress: Progress | None = None) -> archive.UnpackReport:
        """Fetch and unpack a job's result into a new folder, whole or not at all. Raise Conflict if there is none (yet)."""
        return await self.results_of((await self.job(job_id)).job, destination, progress)

    async def results_of(
        self,
        job: Job,
        destination: Path,
        progress: Progress | None = None,
        *,
        limits: archive.UnpackLimits = archive.UnpackLimits(),  # noqa: B008 - frozen
    ) -> archive.UnpackReport:
        """Fetch the result of a job whose state is known already, as `results` does."""
        if job.result is None or job.result_bytes is None:
            raise Conflict(f"job {job.id} is {job.state} and has no result", hint=f"deskgrid job wait {job.id}")
        if job.result_bytes > limits.bytes + _PACKING_BYTES:
            raise BadArchive(f"the result of job {job.id} is of {job.result_bytes} bytes: too large")
        with tempfile.TemporaryDirectory(prefix="deskgrid-") as folder:
            packed = Path(folder) / "result.tar.zst"
            await self.transport.download(Blob(sha256=job.result, size_bytes=job.result_bytes), packed, progress)
            return await asyncio.to_thread(partial(archive.unpack, packed, destination, limits=limits))

    # Arrays and sets

    async def submit_array(
        self,
        spec: JobSpec,
        *,
        count: int = 0,
        table: Path | Iterable[Mapping[str, object]] | None = None,
        context: Path | None = None,
        secrets: Mapping[str, bytes] | None = None,
        progress: Progress | None = None,
    ) -> Array:
        """Submit many jobs of one spec in one call: `count` of them, or one for each line of a CSV file, or for each row (names and values).

        All have the same secrets (see submit).

        Returns once the server has stored it durably; the jobs are made from then on. Raise InvalidInput with file and line.
        """
        blob = await self.send_folder(context, progress) if context is not None else None
        rows, found, names = await self.send_table(table, progress) if table is not None else (None, count, ())
        if count and count != found:
            raise InvalidInput(f"the table has {found} lines, not {count}", where="array.count")
        spec = with_secrets(spec, secrets or {})
        private = await self.seal(secrets)
        request = wire.SubmitArray(spec=spec, count=found, context=blob, table=rows, names=names, secrets=private)
        return await self.transport.call(wire.SUBMIT_ARRAY, request)

    async def send_table(
        self, table: Path | Iterable[Mapping[str, object]], progress: Progress | None = None, reading: Progress | None = None
    ) -> tuple[Blob, int, tuple[str, ...]]:
        """Upload a CSV file, or rows, as a table of parameters; return its blob, how many lines it has, and the names of the columns.

        `reading` gets the bytes of the file read, `progress` those sent. Raise InvalidInput with file and line.
        """
        with tempfile.TemporaryDirectory(prefix="deskgrid-") as place:
            lines = Path(place) / "table"
            if isinstance(table, Path):
                count, names = await asyncio.to_thread(write_table, table, lines, reading)
            else:
                count, names = await asyncio.to_thread(write_rows, table, lines)
            return await self._send(lines, progress), count, names

    async def array(self, array_id: ArrayId) -> Array:
        """Return an array with its counts."""
        return await self.transport.call(wire.GET_ARRAY, path={"array": array_id})

    async def arrays(self, *, everyone: bool = False, before: ArrayId | None = None, limit: int = 100) -> wire.ArrayList:
        """Return arrays, newest first: one's own, or everyone's (admins)."""
        query: dict[str, object] = {"before": before, "limit": limit, "all": everyone or None}
        return await self.transport.call(wire.LIST_ARRAYS, query=query)

    async def array_changes(self, array_id: ArrayId) -> AsyncIterator[Array]:
        """Yield an array now and whenever its counts changed, until it has ended."""
        async for found in until_ended(self.transport, wire.GET_ARRAY, {"array": array_id}, wire.array_mark, _array_ended):
            yield found

    async def wait_array(self, array_id: ArrayId) -> Array:
        """Return an array once it has ended."""
        async for found in self.array_changes(array_id):
            last = found
        return last

    async def cancel_array(self, array_id: ArrayId) -> Array:
        """Cancel what has not ended of an array."""
        return await self.transport.call(wire.CANCEL_ARRAY, path={"array": array_id})

    async def remove_array(self, array_id: ArrayId) -> None:
        """Remove an array that has ended, with its results. Raise Conflict if it has not."""
        await self.transport.call(wire.REMOVE_ARRAY, path={"array": array_id})

    async def array_results(
        self,
        array_id: ArrayId,
        folder: Path,
        *,
        failed_too: bool = False,
        by: str = "",
        progress: Callable[[int, int], None] | None = None,
    ) -> ArrayResults:
        """Fetch the results of an array's jobs into folders named by index or by a column's value; what is there is left alone.

        `progress` gets how many jobs are done with, and of how many. Values that jobs answered go to values.jsonl.
        """
        return await fetch_results(self, array_id, folder, failed_too=failed_too, by=by, progress=progress)

    async def jobs_of(self, array_id: ArrayId, *, state: JobState | None = None) -> AsyncIterator[Job]:
        """Yield the jobs of an array, the last first."""
        before: JobId | None = None
        while True:
            query: dict[str, object] = {"array": array_id, "state": state, "before": before, "limit": 1000}
            page = await self.transport.call(wire.LIST_JOBS, query=query)
            for job in page.jobs:
                yield job
            if not page.more:
                return
            before = page.jobs[-1].id

    async def submit_set(self, name: str, members: Iterable[wire.SetMember], *, together: bool = False) -> wire.JobSet:
        """Submit several jobs and arrays that belong together, all or none. Contexts and tables are uploaded already."""
        return await self.transport.call(wire.SUBMIT_SET, wire.SubmitSet(name=name, members=tuple(members), together=together))

    async def job_set(self, set_id: SetId) -> wire.JobSet:
        """Return a set with its members."""
        return await self.transport.call(wire.GET_SET, path={"set": set_id})

    async def sets(self, *, everyone: bool = False, before: SetId | None = None, limit: int = 100) -> wire.SetList:
        """Return sets, newest first: one's own, or everyone's (admins)."""
        query: dict[str, object] = {"before": before, "limit": limit, "all": everyone or None}
        return await self.transport.call(wire.LIST_SETS, query=query)

    async def set_changes(self, set_id: SetId) -> AsyncIterator[wire.JobSet]:
        """Yield a set now and whenever a member of it changed, until all have ended."""
        async for found in until_ended(self.transport, wire.GET_SET, {"set": set_id}, wire.set_mark, wire.set_ended):
            yield found

    async def wait_set(self, set_id: SetId) -> wire.JobSet:
        """Return a set once all of it has ended."""
        async for found in self.set_changes(set_id):
            last = found
        return last

    async def cancel_set(self, set_id: SetId) -> wire.JobSet:
        """Cancel all that has not ended of a set."""
        return await self.transport.call(wire.CANCEL_SET, path={"set": set_id})

    # Apps

    async def publish_app(
        self,
        name: str,
        folders: Mapping[str, Path],
        *,
        defaults: Mapping[str, Any] | None = None,
        visibility: Visibility = Visibility.PRIVATE,
        group: str = "",
        progress: Progress | None = None,
    ) -> App:
        """Publish an app with a folder of files for each platform (OS-ARCH, or any); a name that exists gets a new version."""
        files = {platform: await self.send_folder(folder, progress) for platform, folder in folders.items()}
        request = wire.RegisterApp(name=name, visibility=visibility, group=group, defaults=dict(defaults or {}), files=files)
        return await self.transport.call(wire.REGISTER_APP, request)

    async def app(self, reference: str) -> App:
        """Find an app by name or name@version."""
        return await self.transport.call(wire.GET_APP, path={"reference": reference})

    async def apps(self) -> tuple[App, ...]:
        """Return the apps that the caller may use."""
        return (await self.transport.call(wire.LIST_APPS)).apps

    async def remove_app(self, reference: str) -> None:
        """Remove one version of an app. Raise Conflict while jobs run it."""
        await self.transport.call(wire.REMOVE_APP, path={"reference": reference})

    # Data

    async def put(
        self,
        file: Path,
        name: str,
        *,
        kind: DataKind = DataKind.FILE,
        visibility: Visibility = Visibility.PRIVATE,
        group: str = "",
        disk: Disk | None = None,
        delta: tuple[Path, Delta] | None = None,
        blob: Blob | None = None,
        progress: Progress | None = None,
    ) -> Data:
        """Upload a file and name it; a name that exists gets a new version. `delta`: a file, and what it is."""
        sent = await asyncio.to_thread(describe_file, file) if blob is None else blob
        await self.transport.upload(file, sent, progress)
        if delta is not None:
            await self.transport.upload(delta[0], delta[1].blob)
        parts: dict[str, Any] = {"disk": disk, "delta": delta[1] if delta is not None else None}
        request = wire.RegisterData(name=name, kind=kind, blob=sent, visibility=visibility, group=group, **parts)
        return await self.transport.call(wire.REGISTER_DATA, request)

    async def get(self, reference: str, file: Path, progress: Progress | None = None) -> Data:
        """Fetch data by name, name@version or sha256 into `file`; an interrupted download is continued.

        Large data comes from workers that have it, too, if libtorrent is installed.
        """
        from deskgrid.client.together import fetch_together  # here: what it needs takes a fifth of the time of a command to import

        data = await self.data(reference)
        partial = file.with_name(file.name + ".part")
        if partial.exists() or not await fetch_together(self.transport, data.blob, partial, progress or _ignore):
            await self.transport.download(data.blob, partial, progress)
        partial.replace(file)
        return data

    async def place(self, pattern: str, attributes: Attributes, *, lifetime_s: float = 0.0) -> Placement:
        """Say on how many workers, where and for how long your data of these names should be; the same names again: instead of before."""
        return await self.transport.call(
            wire.PLACE_DATA, wire.PlaceData(pattern=pattern, attributes=attributes, lifetime_s=lifetime_s)
        )

    async def placements(self) -> tuple[Placement, ...]:
        """Return the caller's placements."""
        return (await self.transport.call(wire.LIST_PLACEMENTS)).placements

    async def remove_placement(self, placement_id: int) -> None:
        """Forget a placement: workers hold nothing any more for it."""
        await self.transport.call(wire.REMOVE_PLACEMENT, path={"placement": placement_id})

    async def holders(self, reference: str) -> tuple[Holder, ...]:
        """Return the workers that have data, or are to have it."""
        return (await self.transport.call(wire.LIST_HOLDERS, path={"reference": reference})).holders

    async def copies(self, reference: str) -> AsyncIterator[tuple[Holder, ...]]:
        """Yield the workers that have data, now and whenever that has changed, for ever."""
        path: dict[str, object] = {"reference": reference}
        async for found in until_ended(self.transport, wire.LIST_HOLDERS, path, wire.holders_mark, lambda _: False):
            yield found.holders

    async def on_placed(self, reference: str, call: Callable[[Holder], object]) -> None:
        """Call `call` with each worker that holds data, those that do already, too, until cancelled."""
        before: frozenset[WorkerId] = frozenset()
        async for found in self.copies(reference):
            held = {one.worker_id: one for one in found if one.state is CopyState.HELD}
            for worker_id in sorted(held.keys() - before):
                call(held[worker_id])
            before = frozenset(held)

    async def on_removed(self, reference: str, call: Callable[[Holder], object]) -> None:
        """Call `call` with each worker that held data and does not any more, until cancelled."""
        before: dict[WorkerId, Holder] = {}
        async for found in self.copies(reference):
            held = {one.worker_id: one for one in found if one.state is CopyState.HELD}
            for worker_id in sorted(before.keys() - held.keys()):
                call(before[worker_id])
            before = held

    async def data(self, reference: str) -> Data:
        """Find data by name, name@version or sha256."""
        return await self.transport.call(wire.GET_DATA, path={"reference": reference})

    async def list_data(self, kind: DataKind | None = None) -> tuple[Data, ...]:
        """Return the data that the caller may see."""
        return (await self.transport.call(wire.LIST_DATA, query={"kind": kind})).data

    async def remove_data(self, reference: str) -> None:
        """Remove one version of data; jobs that were submitted with it keep it."""
        await self.transport.call(wire.REMOVE_DATA, path={"reference": reference})

    # Disks

    async def disk(self, reference: str) -> DiskDetail:
        """Find a disk, with all that is said of it."""
        return await self.transport.call(wire.GET_DISK, path={"reference": reference})

    async def disks(self, *, words: str = "", os: str = "", arch: str = "", endorser: str = "") -> tuple[DiskDetail, ...]:
        """Return the disks that the caller may use: with these words, of this system and kind of CPU, that `endorser` vouches for."""
        query = {"words": words, "os": os, "arch": arch, "endorser": endorser}
        return (await self.transport.call(wire.LIST_DISKS, query={name: text for name, text in query.items() if text})).disks

    async def endorse_disk(self, reference: str, endorser: str = "", *, lifetime_s: float) -> DiskDetail:
        """Vouch for a disk: the caller himself (empty), `group:NAME` of his, or `grid` (an admin)."""
        request = wire.EndorseDisk(endorser=endorser, lifetime_s=lifetime_s)
        return await self.transport.call(wire.ENDORSE_DISK, request, path={"reference": reference})

    async def withdraw_disk(self, reference: str, endorser: str) -> DiskDetail:
        """Vouch for a disk no more."""
        return await self.transport.call(wire.WITHDRAW_DISK, path={"reference": reference, "endorser": endorser})

    async def revoke_disk(self, reference: str, reason: str) -> Revocation:
        """Let a disk not be started any more."""
        return await self.transport.call(wire.REVOKE_DISK, wire.RevokeDisk(reason=reason), path={"reference": reference})

    async def disk_bundle(self, reference: str) -> Bundle:
        """Return what this grid says of a disk, to carry to another."""
        return await self.transport.call(wire.GET_BUNDLE, path={"reference": reference})

    async def take_bundle(self, bundle: Bundle) -> tuple[DiskDetail, ...]:
        """Let this grid keep what another, which it trusts, says of disks that are here; return those."""
        return (await self.transport.call(wire.TAKE_BUNDLE, bundle)).disks

    # The grid and its people

    async def status(self) -> wire.GridStatus:
        """Return the grid at a glance."""
        return await self.transport.call(wire.STATUS)

    async def waiting(self) -> tuple[wire.WaitingClass, ...]:
        """Return what the caller's waiting jobs need, and those of his groups."""
        return (await self.transport.call(wire.LIST_WAITING)).classes

    async def workers(self) -> tuple[Worker, ...]:
        """Return all workers that have not left."""
        return (await self.transport.call(wire.LIST_WORKERS)).workers

    async def add_user(self, name: str, *, admin: bool = False) -> User:
        """Add a user (admins)."""
        return await self.transport.call(wire.ADD_USER, wire.AddUser(name=name, admin=admin))

    async def users(self) -> tuple[User, ...]:
        """Return all users."""
        return (await self.transport.call(wire.LIST_USERS)).users

    async def login_link(self, user: str, *, lifetime_s: float = 7 * 86400.0) -> Link:
        """Make a one-use link by which a user logs in (admins)."""
        return await make_link(self.transport, "login", wire.ADD_LOGIN_SECRET, lifetime_s=lifetime_s, path={"user": user})

    async def join_link(self, *, uses: int = 1, lifetime_s: float = 7 * 86400.0, owner: str = "") -> Link:
        """Make a link by which `uses` PCs may join. They are the caller's own; an admin's are `owner`'s, or nobody's."""
        return await make_link(self.transport, "join", wire.ADD_JOIN_SECRET, lifetime_s=lifetime_s, uses=uses, owner=owner)

    async def pilot_link(self, *, pilot_s: float, lifetime_s: float = 86400.0, uses: int = 1) -> Link:
        """Make a link by which `uses` pilots of the caller's may join, each for `pilot_s`. Raise InvalidInput for no time: that were a worker's."""
        if pilot_s <= 0:
            raise InvalidInput("a pilot lives for some time", where="pilot_s", hint="as in 14400.0, four hours")
        return await make_link(
            self.transport, "join", wire.ADD_JOIN_SECRET, lifetime_s=lifetime_s, uses=uses, owner="", pilot_s=pilot_s
        )

    async def submit_pilot(self, pilot: Pilot) -> Job:
        """Submit a job that is a worker for the caller (client/pilots.py)."""
        with tempfile.TemporaryDirectory(prefix="deskgrid-") as folder:
            write_pilot(Path(folder), pilot)
            return await self.submit(pilot_spec(pilot), context=Path(folder))

    async def reserve_worker(self, worker_id: int, reserved_for: str, *, lifetime_s: float = 0.0) -> Worker:
        """Keep a worker for user:NAME or group:NAME, for a time or until cleared; for nobody any more with "" (admins)."""
        request = wire.ReserveWorker(reserved_for=reserved_for, lifetime_s=lifetime_s)
        return await self.transport.call(wire.RESERVE_WORKER, request, path={"worker": worker_id})

    async def remove_worker(self, worker_id: int) -> None:
        """Forget a worker of the caller's (admins: any): its token ends, its jobs go back."""
        await self.transport.call(wire.REMOVE_WORKER, path={"worker": worker_id})

    async def set_user(
        self,
        name: str,
        *,
        weight: float | None = None,
        max_waiting: int | None = None,
        max_running: int | None = None,
        max_bytes: int | None = None,
    ) -> User:
        """Change a user's part of the grid; what is None stays, a bound below 0 is the server's (admins)."""
        request = wire.SetUser(weight=weight, max_waiting=max_waiting, max_running=max_running, max_bytes=max_bytes)
        return await self.transport.call(wire.SET_USER, request, path={"user": name})

    async def set_group(self, name: str, *, weight: float) -> Group:
        """Change a group's part of the grid (admins)."""
        return await self.transport.call(wire.SET_GROUP, wire.SetGroup(weight=weight), path={"group": name})

    async def audit_log(
        self, *, user: str = "", since: float | None = None, before: int | None = None, limit: int = 100
    ) -> wire.AuditLog:
        """Return who did what, newest first (admins)."""
        query: dict[str, object] = {"user": user or None, "since": since, "before": before, "limit": limit}
        return await self.transport.call(wire.LIST_AUDIT, query=query)

    async def hub_link(self, *, uses: int = 1, lifetime_s: float = 7 * 86400.0) -> Link:
        """Make a link by which `uses` machines may become hubs (admins)."""
        return await make_link(self.transport, "hub", wire.ADD_HUB_SECRET, lifetime_s=lifetime_s, uses=uses)

    # The overlay

    async def peers(self, *, everyone: bool = False) -> tuple[Peer, ...]:
        """Return the peers of one's own programs and jobs, with what they offer and carry; or everyone's (admins)."""
        return (await self.transport.call(wire.LIST_PEERS, query={"all": everyone or None})).peers

    async def hubs(self) -> tuple[wire.HubDetail, ...]:
        """Return all hubs, also those that are not there any more."""
        return (await self.transport.call(wire.LIST_HUBS)).hubs

    async def remove_hub(self, hub_id: int) -> None:
        """Forget a hub: its token ends, and peers go elsewhere (admins). The number is that in its name."""
        await self.transport.call(wire.REMOVE_HUB, path={"hub": hub_id})

    # Tokens and groups

    async def tokens(self) -> tuple[Token, ...]:
        """Return the caller's tokens."""
        return (await self.transport.call(wire.LIST_TOKENS)).tokens

    async def add_token(self, rights: Iterable[str], *, lifetime_s: float, label: str = "") -> tuple[str, Token]:
        """Make a token of the caller's that is narrowed to some rights; return it, which nobody can do a second time, and what is known of it."""
        secret = make_secret()
        request = wire.AddToken(token_hash=Sha256(hash_secret(secret)), rights=tuple(rights), lifetime_s=lifetime_s, label=label)
        return secret, await self.transport.call(wire.ADD_TOKEN, request)

    async def renew(self) -> wire.WhoAmI:
        """Let the token that is used live on, as after a login."""
        return await self.transport.call(wire.RENEW_TOKEN)

    async def who(self) -> wire.WhoAmI:
        """Return whose token this is, what it may, and until when."""
        return await self.transport.call(wire.WHO)

    async def revoke_token(self, token_id: int) -> None:
        """Revoke one of the caller's tokens."""
        await self.transport.call(wire.REVOKE_TOKEN, path={"token": token_id})

    async def add_group(self, name: str) -> Group:
        """Add a group (admins)."""
        return await self.transport.call(wire.ADD_GROUP, wire.AddGroup(name=name))

    async def groups(self) -> tuple[Group, ...]:
        """Return all groups."""
        return (await self.transport.call(wire.LIST_GROUPS)).groups

    async def set_members(self, group: str, *, add: Iterable[str] = (), remove: Iterable[str] = ()) -> Group:
        """Change a group's members (admins)."""
        return await self.transport.call(
            wire.SET_MEMBERS, wire.SetMembers(add=tuple(add), remove=tuple(remove)), path={"group": group}
        )
