"""Snakemake's executor for deskgrid: `snakemake --executor deskgrid --jobs 100`, with the login of the commands.

Snakemake finds this package by its name. To Snakemake the grid looks like a cluster with a shared file system: inputs are sent with each job, and before
it is told that a job has ended the outputs are at their places. So it handles missing, temporary, protected and touched files itself, and needs no
storage provider (decision 37). What a job is and what comes back: deskgrid/client/snakemake.py.

Calls are made in the loop of a `Grid`; Snakemake calls this from its main thread (`run_jobs`, `cancel`) and from one that looks for jobs that have ended.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import os
import tempfile
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from concurrent.futures import Future, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from snakemake_interface_common.exceptions import WorkflowError
from snakemake_interface_executor_plugins.executors.base import SubmittedJobInfo
from snakemake_interface_executor_plugins.executors.remote import RemoteExecutor
from snakemake_interface_executor_plugins.settings import CommonSettings, ExecutorSettingsBase, SharedFSUsage

from deskgrid import Grid
from deskgrid.archive import UnpackLimits, printable
from deskgrid.client.grid import describe_file
from deskgrid.client.jobfile import JobFile, as_written, read_job
from deskgrid.client.patience import patiently
from deskgrid.client.snakemake import (
    as_option,
    check,
    inputs_of,
    large_inputs,
    mark_of,
    options_of,
    place,
    rules_of,
    running_times,
    write_context,
)
from deskgrid.client.submitting import submit_file
from deskgrid.core.lifecycle import FINAL_JOB_STATES
from deskgrid.errors import CallerError, DeskgridError, InvalidInput, NotFound, StoreUnavailable, Unreachable
from deskgrid.model.data import Data
from deskgrid.model.ids import JobId
from deskgrid.model.jobs import Job, JobState
from deskgrid.units import parse_size

__all__ = ["Executor", "ExecutorSettings", "common_settings"]

T = TypeVar("T")
_AT_ONCE = 8
"""Jobs that are submitted, and results that are fetched, at the same time."""
_END_S = 20.0
"""For a server that is slow or away, when Snakemake ends."""
_LOOK_S = 5.0
"""Time in which small results are there, so that they need not wait for the next look."""
_SHOWN_LINES = 20
_LOGS = ".snakemake/deskgrid_logs"


def _setting(help_text: str, default: str | None = None) -> Any:
    return field(default=default, metadata={"help": help_text, "type": str})


@dataclass
class ExecutorSettings(ExecutorSettingsBase):  # type: ignore[misc]
    """What holds for all jobs. Any key of a job file can be set for a rule, by a resource, as in deskgrid_disk="debian"."""

    kind: str | None = _setting("What jobs run in: vm, process or container. By default a process; with a disk a virtual machine.")
    disk: str | None = _setting("Disk to boot, or image of a container: name, name@version or sha256.")
    app: str | None = _setting("App whose files the jobs find as /app, as name or name@version.")
    need: str | None = _setting("Packages that PCs must declare, separated by commas.")
    group: str | None = _setting("Group that the jobs are done for: its share of the grid counts.")
    trust: str | None = _setting(
        "Whose PCs the jobs may run on: mine, user:NAME, group:NAME, separated by commas. By default anybody's."
    )
    data_from: str = _setting(
        "Inputs of this size or larger are sent as data of the grid: once for all jobs, and kept by PCs.", "16MiB"
    )


common_settings = CommonSettings(
    non_local_exec=True,
    implies_no_shared_fs=False,  # as Snakemake sees it: see above
    can_transfer_local_files=True,
    job_deploy_sources=False,
    pass_default_storage_provider_args=False,
    pass_default_resources_args=False,
    pass_envvar_declarations_to_cmd=False,
    auto_deploy_default_storage_provider=False,
)


class Executor(RemoteExecutor):  # type: ignore[misc]
    """Runs jobs on the grid. Its methods are those that Snakemake's interface asks for."""

    def __post_init__(self) -> None:
        """Refuse what cannot be done before anything is sent. Raise WorkflowError."""
        self._ending = False
        self._is_away = False
        self._jobs: set[int] = set()
        """On the grid, as far as is known."""
        self._sending: list[Future[int]] = []
        self._fetching: dict[int, Future[_Ended | None]] = {}
        """What is being learnt of jobs that may have ended."""
        self._data: dict[tuple[str, int, int], str] = {}
        """The sha256 of large inputs, by path, time of change in ns, and size."""
        self._put: list[Data] = []
        self._places = asyncio.Semaphore(_AT_ONCE)
        with _told():
            self._defaults = self._read_settings()
            self._data_from_bytes = parse_size(self.executor_settings.data_from)
            self._check_workflow()
            self.grid = Grid()
        self._address = self.grid.asynchronous.transport.credentials.address

    def _read_settings(self) -> dict[str, Any]:
        given = dataclasses.asdict(self.executor_settings)
        del given["data_from"]
        found = {name: as_option(name, value) for name, value in given.items() if value is not None}
        if variables := {name: os.environ[name] for name in sorted(self.workflow.envvars)}:
            if "trust" not in found:
                message = f"envvars: owners of PCs would see {', '.join(variables)}"
                raise InvalidInput(message, hint="say whose PCs may, as in --deskgrid-trust mine")
            found["environment"] = variables
        return found

    def _check_workflow(self) -> None:
        if SharedFSUsage.INPUT_OUTPUT not in self.workflow.storage_settings.shared_fs_usage:
            raise InvalidInput("deskgrid brings files to the jobs and back itself", hint="leave out --shared-fs-usage")
        if self.workflow.deployment_settings.deployment_method:
            hint = "leave out --sdm, and name PCs (--deskgrid-need) or a disk (--deskgrid-disk) that have the programs"
            raise InvalidInput("deskgrid does not deploy conda environments, containers and modules to PCs", hint=hint)
        if self.workflow.remote_execution_settings.immediate_submit:
            raise InvalidInput("jobs are sent when their inputs are there", hint="leave out --immediate-submit")
        for job in self.dag.needrun_jobs():
            if not job.is_local:
                check(job)

    # ---- to the grid, in Snakemake's main thread

    def run_jobs(self, jobs: list[Any]) -> None:
        """Submit jobs, some at a time."""
        for begin in range(0, len(jobs), _AT_ONCE):
            batch = jobs[begin : begin + _AT_ONCE]
            with contextlib.ExitStack() as contexts:
                for job, sending in [(job, self._begin(job, contexts)) for job in batch]:
                    self._hear(job, sending)

    def run_job(self, job: Any) -> None:
        """Submit one job."""
        self.run_jobs([job])

    def _begin(self, job: Any, contexts: contextlib.ExitStack) -> Future[int]:
        """Let a job be submitted; return what becomes its number. `contexts` are there until that has been heard."""
        self.run_job_pre(job)
        try:
            sending = self.grid.begin(self._sent(self._prepared(job, contexts), self._known(job)))
        except (DeskgridError, OSError) as error:
            sending = Future()
            sending.set_exception(error)
        self._sending = [*(one for one in self._sending if not one.done()), sending]
        return sending

    def _hear(self, job: Any, sending: Future[int]) -> None:
        try:
            number = sending.result()
        except (DeskgridError, OSError) as error:
            self.report_job_error(SubmittedJobInfo(job=job), msg=f"{error}. ")
        else:
            name = f"job-{number}@{self._address}"
            self.report_job_submission(SubmittedJobInfo(job=job, external_jobid=name, aux={"number": number}))

    def _known(self, job: Any) -> int | None:
        """Return the number of the job on this grid that a run of Snakemake that was killed has submitted for this one."""
        name, _, place = (self.dag.incomplete_external_jobid(job) or "").partition("@")
        number = name.removeprefix("job-")
        return int(number) if place == self._address and number.isdecimal() else None

    def _prepared(self, job: Any, contexts: contextlib.ExitStack) -> JobFile:
        """Return what is submitted, with its context in a folder. Raise InvalidInput, OSError, and Snakemake's own."""
        for one in rules_of(job):
            check(one)
        for one in rules_of(job):
            self.workflow.async_run(_cleared(one))
        files = inputs_of(job)
        large = large_inputs(files, self._data_from_bytes)
        data = {name: self.grid.run(self._published(files[path])) for name, path in large.items()}
        options = as_written(options_of(job, self._defaults, data))
        folder = contexts.enter_context(tempfile.TemporaryDirectory(dir=self.tmpdir))
        prefix, suffix = _around_commands()
        write_context(Path(folder), job, files, large, prefix=prefix, suffix=suffix, mark=mark_of(options))
        return read_job(None, {**options, "context": folder})

    # ---- to the grid, in its loop

    async def _sent(self, wanted: JobFile, known: int | None) -> int:
        """Submit a job, if the one that is known is not the same, and return its number."""
        if known is not None and await self._is_same(known, wanted):
            number = known
        else:
            key = uuid.uuid4().hex  # one for all tries: an answer may have been lost
            number = int((await self._patiently(lambda: submit_file(self.grid.asynchronous, wanted, key=key))).id)
        self._jobs.add(number)
        if self._ending:  # perhaps those that are to be cancelled have been looked up before
            await self.grid.asynchronous.cancel(JobId(number))
        return number

    async def _is_same(self, number: int, wanted: JobFile) -> bool:
        """Tell whether a job is the same, to the machine and whose PCs it may run on, and may yet bring its files. Another one is cancelled."""
        grid, context = self.grid.asynchronous, wanted.context
        assert context is not None
        try:
            found = (await self._patiently(lambda: grid.job(JobId(number)))).job
        except NotFound:
            return False
        blob = await self._patiently(lambda: grid.send_folder(context))
        if found.context == blob.sha256:
            return found.state not in (JobState.FAILED, JobState.CANCELLED)
        with contextlib.suppress(NotFound):
            await self._patiently(lambda: grid.cancel(JobId(number)))
        return False

    async def _published(self, file: Path) -> str:
        """Make a large input data of the grid, for as long as we run, and return its sha256. What the server has is not sent again."""
        status = file.stat()
        mark = (str(file), status.st_mtime_ns, status.st_size)
        if mark not in self._data:
            blob = await asyncio.to_thread(describe_file, file)
            name = f"snakemake-{blob.sha256[:16]}"
            self._put.append(await self._patiently(lambda: self.grid.asynchronous.put(file, name, blob=blob)))
            self._data[mark] = blob.sha256
        return self._data[mark]

    async def _patiently(self, call: Callable[[], Awaitable[T]]) -> T:
        """Make a call that may be made again, until the server has answered or we are ending. Raise its errors."""

        def told(error: DeskgridError | None) -> None:
            if error is not None and self._ending:
                raise error
            self._tell(error)

        return await patiently(call, told)

    def _tell(self, error: DeskgridError | None) -> None:
        """Tell the user, once, that the server is away, or there again."""
        if error is not None and not self._is_away:
            self.logger.warning(f"deskgrid: {error}; trying again until it answers")
        elif error is None and self._is_away:
            self.logger.info("deskgrid: the server is there again")
        self._is_away = error is not None

    # ---- from the grid, in the thread that looks for jobs that have ended

    async def check_active_jobs(self, active_jobs: list[SubmittedJobInfo]) -> AsyncIterator[SubmittedJobInfo]:
        """Yield the jobs that have not ended, or whose files are not here yet; deal with those that have."""
        if not active_jobs:
            return  # that is so before there is a grid, too
        live = await self._asked(self.grid.begin(self._live()))
        for info in active_jobs:
            number = info.aux["number"]
            if live is not None and number not in live and number not in self._fetching:
                self._fetching[number] = self.grid.begin(self._fetched(info.job, number))
        if self._fetching:
            await asyncio.to_thread(wait, list(self._fetching.values()), _LOOK_S)
        for info in active_jobs:
            fetching = self._fetching.get(info.aux["number"])
            if fetching is None or not fetching.done() or not await self._deal(info, fetching):
                yield info

    async def _asked(self, asking: Future[T]) -> T | None:
        """Return what the grid answers; None if it is away, or we are ending. Raise its other errors."""
        try:
            return await asyncio.wrap_future(asking)
        except asyncio.CancelledError:
            if not self._ending:
                raise
            return None
        except (Unreachable, StoreUnavailable) as error:
            self._tell(error)
            return None

    async def _deal(self, info: SubmittedJobInfo, fetching: Future[_Ended | None]) -> bool:
        """Tell Snakemake how a job has ended, and return whether it has."""
        number = info.aux["number"]
        del self._fetching[number]
        try:
            ended = await self._asked(fetching)
        except (DeskgridError, OSError) as error:
            ended = _Ended(f"job-{number}: {error}")
        if ended is None:
            return False
        self._jobs.discard(number)
        if ended.fault:
            self._report_fault(info, ended)
        else:
            self.report_job_success(info)
        return True

    def _report_fault(self, info: SubmittedJobInfo, ended: _Ended) -> None:
        """Tell why a job failed and the end of what it printed; all of that goes to a file."""
        lines = [_harmless(line) for line in ended.output.splitlines()]
        log = Path(_LOGS) / f"job-{info.aux['number']}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        log.write_text("\n".join([*lines, ""]), encoding="utf-8")
        shown = "\n".join(["", *(f"        {line}" for line in lines[-_SHOWN_LINES:]), "    "])
        self.report_job_error(info, msg=f"{ended.fault}.{shown}", aux_logs=[str(log)])

    # ---- from the grid, in its loop

    async def _live(self) -> set[JobId]:
        found = await self.grid.asynchronous.live_jobs()
        self._tell(None)
        return found

    async def _fetched(self, job: Any, number: int) -> _Ended | None:
        """Return how a job has ended, its files being at their places; None if it has not."""
        grid = self.grid.asynchronous
        async with self._places:
            found = (await grid.job(JobId(number))).job
            if found.state not in FINAL_JOB_STATES:
                return None
            if found.state is JobState.COMPLETED:
                await self._bring(job, found)
                with contextlib.suppress(DeskgridError):  # it stays for a while, as any job does
                    await grid.remove_job(found.id)
                return _Ended("")
            with contextlib.suppress(CallerError, OSError):  # of two faults, the job's own counts
                await self._bring(job, found)
            output = await self.grid.read_all(found.id, "stdout")
            return _Ended(f"job-{number} has {found.state.value}: {_harmless(found.message)}", output)

    async def _bring(self, job: Any, found: Job) -> None:
        """Fetch a job's result, and put what the rules declare at its place."""
        size = found.spec.machine.scratch_bytes
        with tempfile.TemporaryDirectory(dir=self.tmpdir, ignore_cleanup_errors=True) as folder:
            result = Path(folder) / "result"
            await self.grid.asynchronous.results_of(found, result, limits=UnpackLimits(bytes=size, apparent_bytes=size))
            await asyncio.to_thread(_place, result, job, completed=found.state is JobState.COMPLETED)

    # ---- the end

    def cancel_jobs(self, active_jobs: list[SubmittedJobInfo]) -> None:
        """Let no job run any more: Snakemake's list lacks those that are being looked at, or submitted."""
        self._ending = True
        wait(self._sending, _END_S)
        for one in list(self._fetching.values()):
            one.cancel()
        with contextlib.suppress(DeskgridError, TimeoutError):
            self.grid.run(self._cancelled(), _END_S)

    async def _cancelled(self) -> None:
        async def cancel(number: int) -> None:
            async with self._places:
                with contextlib.suppress(DeskgridError):  # as of one that was just removed; the others count
                    await self.grid.asynchronous.cancel(JobId(number))

        await asyncio.gather(*(cancel(number) for number in list(self._jobs)))

    def shutdown(self) -> None:
        """End; large inputs are data of the grid no more. Jobs that run go on."""
        super().shutdown()
        with contextlib.suppress(DeskgridError, TimeoutError):
            self.grid.run(self._tidied(), _END_S)
        self.grid.close()

    async def _tidied(self) -> None:
        for data in self._put:
            with contextlib.suppress(NotFound):
                await self.grid.asynchronous.remove_data(f"{data.name}@{data.version}")


@dataclass(frozen=True)
class _Ended:
    """How a job has ended: what was wrong, and what it printed."""

    fault: str
    output: str = ""


async def _cleared(job: Any) -> None:
    """Remove what an earlier run of a job left, as Snakemake does where a job runs. Raise its ProtectedOutputException."""
    await job.check_protected_output()
    await job.remove_existing_output()


def _around_commands() -> tuple[str | None, str]:
    """Return what a Snakefile wants before each command (None: nothing of its own) and after it."""
    from snakemake.shell import shell

    return shell._process_prefix, shell._process_suffix


def _place(result: Path, job: Any, *, completed: bool) -> None:
    place(result, job, completed=completed)
    rules = rules_of(job)
    if completed and any(one.benchmark for one in rules):
        from snakemake.benchmark import BenchmarkRecord, write_benchmark_records

        for one, seconds in zip(rules, running_times(result, job), strict=True):
            if one.benchmark:
                Path(one.benchmark).parent.mkdir(parents=True, exist_ok=True)
                write_benchmark_records([BenchmarkRecord(running_time=seconds)], str(one.benchmark), False)


def _harmless(text: str) -> str:
    """Return what a PC said without what a terminal would obey."""
    return "\t".join(map(printable, text.split("\t")))


@contextlib.contextmanager
def _told() -> Iterator[None]:
    """Let Snakemake tell the user what is wrong."""
    try:
        yield
    except DeskgridError as error:
        raise WorkflowError(f"deskgrid: {error}") from error
