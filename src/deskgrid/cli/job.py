"""deskgrid job: submit and follow jobs; deskgrid run: all of it in one."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import msgspec
from cyclopts import App, Parameter
from msgspec import Struct

from deskgrid.cli.array import array_number, array_summary, exit_code, fetch_results, follow_array
from deskgrid.cli.connection import connected
from deskgrid.cli.follow import attempt_summary, decoder, follow_job, job_summary, stream_log
from deskgrid.cli.output import NO_NEGATIVES, Json, Reporter, age, clean, make_reporter, print_json, print_lines, print_table, warn
from deskgrid.cli.set import fetch_set, follow_set, set_code
from deskgrid.client.jobfile import KEYS, JobFile, SetFile, read_file, read_job
from deskgrid.client.submitting import submit_file, submit_set_file
from deskgrid.errors import Conflict, InvalidInput
from deskgrid.model.ids import JobId
from deskgrid.model.jobs import Array, ArrayState, Job, JobSpec, JobState
from deskgrid.model.wire import JobDetail, JobList, JobSet
from deskgrid.settings import client_home
from deskgrid.units import format_duration, format_size

if TYPE_CHECKING:
    from deskgrid.archive import UnpackReport
    from deskgrid.client.grid import Grid

__all__ = ["JobOptions", "RunReport", "app", "finish_job", "read_wanted", "run", "submit_job", "tell_end"]

app = App(default_parameter=NO_NEGATIVES, name="job", help="Submit and follow jobs.")

_LAST_LINES = 10
"""Of stderr, shown with a job that failed."""


def _key(name: str) -> Any:
    doc = next(key.doc for key in KEYS if key.name == name)
    return Parameter(help=doc.replace("`", "").replace(" Relative to the job file.", ""))


@Parameter(name="*")
@dataclass(frozen=True)
class JobOptions:
    """A job as options; each wins over the job file."""

    disk: Annotated[str | None, _key("disk")] = None
    context: Annotated[str | None, _key("context")] = None
    name: Annotated[str | None, _key("name")] = None
    kind: Annotated[str | None, _key("kind")] = None
    memory: Annotated[str | None, _key("memory")] = None
    cpus: Annotated[int | None, _key("cpus")] = None
    scratch: Annotated[str | None, _key("scratch")] = None
    network: Annotated[str | None, _key("network")] = None
    offer: Annotated[tuple[str, ...] | None, _key("offer")] = None
    reach: Annotated[tuple[str, ...] | None, _key("reach")] = None
    share: Annotated[tuple[str, ...] | None, _key("share")] = None
    reach_wait: Annotated[str | None, _key("reach_wait")] = None
    ssh_keys: Annotated[tuple[str, ...] | None, _key("ssh_keys")] = None
    wall_time: Annotated[str | None, _key("wall_time")] = None
    boot_time: Annotated[str | None, _key("boot_time")] = None
    attempts: Annotated[int | None, _key("attempts")] = None
    max_lost: Annotated[int | None, _key("max_lost")] = None
    max_suspend: Annotated[str | None, _key("max_suspend")] = None
    processes: Annotated[int | None, _key("processes")] = None
    file_size: Annotated[str | None, _key("file_size")] = None
    app: Annotated[str | None, _key("app")] = None
    command: Annotated[tuple[str, ...] | None, _key("command")] = None
    environment: Annotated[tuple[str, ...] | None, _key("environment")] = None
    fill: Annotated[tuple[str, ...] | None, _key("fill")] = None
    group: Annotated[str | None, _key("group")] = None
    priority: Annotated[int | None, _key("priority")] = None
    after: Annotated[tuple[str, ...] | None, _key("after")] = None
    after_end: Annotated[tuple[str, ...] | None, _key("after_end")] = None
    retain: Annotated[str | None, _key("retain")] = None
    platforms: Annotated[tuple[str, ...] | None, _key("platforms")] = None
    need: Annotated[tuple[str, ...] | None, _key("need")] = None
    on: Annotated[str | None, _key("on")] = None
    warm: Annotated[bool | None, _key("warm")] = None
    count: Annotated[int | None, _key("count")] = None
    table: Annotated[str | None, _key("table")] = None
    paths: Annotated[tuple[str, ...] | None, _key("paths")] = None


class RunReport(Struct, frozen=True, kw_only=True):
    """How a job ended, and where its result is."""

    job: JobDetail
    folder: str | None
    unpacked: UnpackReport | None


_NO_OPTIONS = JobOptions()
Spec = Annotated[Path | None, Parameter(help="Job file in TOML. Options win over it.")]
JobNumber = Annotated[int, Parameter(help="Number of the job.")]
OutputFolder = Annotated[
    Path | None, Parameter(name=["--output", "-o"], help="Folder to make for the result; ./results-JOB by default.")
]


@app.command
async def submit(spec: Spec = None, /, *, options: JobOptions = _NO_OPTIONS, json: Json = False) -> None:
    """Submit a job and print its number; of a file with [array] or several jobs that of the array or set, as in array-7.

    For example:

        deskgrid job submit hello.toml
        deskgrid job submit hello.toml --memory 1GiB
        deskgrid job submit --disk tiny --context context/ --wall-time 10m
    """
    wanted = read_any(spec, options)
    async with connected() as grid:
        with make_reporter(json) as reporter:
            submitted = await submit_any(grid, wanted, reporter)
    if json:
        print_json(submitted)
    elif isinstance(submitted, Job):
        print_lines(str(submitted.id))
    else:
        print_lines(f"{'array' if isinstance(submitted, Array) else 'set'}-{submitted.id}")


def read_any(spec: Path | None, options: JobOptions) -> JobFile | SetFile:
    """Return the job, array or set of a file and options."""
    return read_file(spec, dataclasses.asdict(options))


async def submit_any(grid: Grid, wanted: JobFile | SetFile, reporter: Reporter) -> Job | Array | JobSet:
    """Submit a job, an array or a set; an array is waited for until its jobs are there."""
    phase = reporter.begin("submit")
    if isinstance(wanted, SetFile):
        return await submit_set_file(grid, wanted, progress=phase.done, prepare=with_own_key)
    submitted = await submit_file(grid, wanted, progress=phase.done, prepare=with_own_key)
    if isinstance(submitted, Array):
        async for array in grid.array_changes(submitted.id):
            if array.state is not ArrayState.FILLING:
                return array
            phase.note(f"{sum(array.jobs.values()):,} of {array.count:,} jobs")
    return submitted


def read_wanted(spec: Path | None, options: JobOptions) -> JobFile:
    """Return the job of a file and options. One that offers ssh lets this user's own key in, unless it names keys."""
    wanted = read_job(spec, dataclasses.asdict(options))
    return msgspec.structs.replace(wanted, spec=with_own_key(wanted.spec))


def with_own_key(spec: JobSpec) -> JobSpec:
    """Return a spec that, if the job offers ssh and names no keys, lets this user's own key in."""
    machine = spec.machine
    if machine.ssh_keys or not any(offer.name == "ssh" for offer in machine.offer):
        return spec
    from deskgrid.client.sshkeys import ensure_ssh_key

    _, public = ensure_ssh_key(client_home())
    return msgspec.structs.replace(spec, machine=msgspec.structs.replace(machine, ssh_keys=(public,)))


async def submit_job(grid: Grid, wanted: JobFile, reporter: Reporter) -> Job:
    """Submit a job with its context. Raise InvalidInput for an array."""
    if wanted.array is not None:
        raise InvalidInput("this is an array of jobs", where="array", hint="deskgrid job submit, or deskgrid run")
    phase = reporter.begin("submit the job")
    submitted = await submit_file(grid, wanted, progress=phase.done)
    assert isinstance(submitted, Job)
    return submitted


async def run(spec: Spec = None, /, *, options: JobOptions = _NO_OPTIONS, output: OutputFolder = None, json: Json = False) -> int:
    """Submit a job (or an array, or a set), wait for it and fetch its result.

    The exit code is 0 if the job completed, or all of them, and 1 if not. Interrupted, the jobs themselves go on.

    For example:

        deskgrid run hello.toml
        deskgrid run --disk tiny --context context/ -o out
        deskgrid run hello.toml --json | jq .folder
    """
    file = read_any(spec, options)
    _require_new(output)
    if isinstance(file, SetFile) or file.array is not None:
        return await _run_many(file, output, json=json)
    wanted = read_wanted(spec, options)
    async with connected() as grid:
        with make_reporter(json) as reporter:
            job = await submit_job(grid, wanted, reporter)
            with _told_that_it_goes_on(job.id):
                folder = output or Path(f"results-{job.id}")
                _require_new(folder)
                report = await finish_job(grid, job.id, folder, reporter)
            await tell_end(grid, report, reporter)
    if json:
        print_json(report)
    elif report.folder is not None:
        print_lines(report.folder)
    return _code(report.job)


async def _run_many(file: JobFile | SetFile, output: Path | None, *, json: bool) -> int:
    """Submit an array or a set, wait for it and fetch all results."""
    async with connected() as grid:
        with make_reporter(json) as reporter:
            submitted = await submit_any(grid, file, reporter)
            if isinstance(submitted, Array):
                with _told_that_it_goes_on(submitted.id, "array"):
                    folder = output or Path(f"results-array-{submitted.id}")
                    ended = await follow_array(grid, submitted.id, reporter)
                    await fetch_results(grid, submitted.id, folder, reporter)
                report, code, lines = {"array": ended, "folder": str(folder)}, exit_code(ended), [array_summary(ended), str(folder)]
            elif isinstance(submitted, JobSet):
                with _told_that_it_goes_on(submitted.id, "set"):
                    folder = output or Path(f"results-set-{submitted.id}")
                    found = await follow_set(grid, submitted.id, reporter)
                    await fetch_set(grid, found, folder, reporter)
                report, code, lines = {"set": found, "folder": str(folder)}, set_code(found), [str(folder)]
            else:
                raise InvalidInput("this is one job")
    if json:
        print_json(report)
    else:
        print_lines(*lines)
    return code


@contextmanager
def _told_that_it_goes_on(number: int, noun: str = "job") -> Iterator[None]:
    try:
        yield
    except BaseException:
        warn(f"{noun} {number} goes on: deskgrid {noun} wait {number}, or deskgrid {noun} cancel {number}")
        raise


async def finish_job(grid: Grid, job_id: JobId, folder: Path, reporter: Reporter) -> RunReport:
    """Show a job's phases until it is final, and fetch its result into a new folder if there is one."""
    detail = await follow_job(grid, job_id, reporter)
    if detail.job.result is None:
        return RunReport(job=detail, folder=None, unpacked=None)
    unpacked = await _fetch(grid, detail, folder, reporter)
    return RunReport(job=detail, folder=str(folder), unpacked=unpacked)


async def _fetch(grid: Grid, detail: JobDetail, folder: Path, reporter: Reporter) -> UnpackReport:
    phase = reporter.begin("fetch the result", detail.job.result_bytes)
    return await grid.results(detail.job.id, folder, phase.done)


async def tell_end(grid: Grid, report: RunReport, reporter: Reporter) -> None:
    """Tell how a job ended: why it failed, what of its result was left out."""
    reporter.end()
    reporter.say(job_summary(report.job))
    if report.job.job.state is JobState.FAILED:
        await _tell_failure(grid, report.job, reporter)
    if report.unpacked is not None:
        _tell_left_out(report.unpacked, reporter)


def _code(detail: JobDetail) -> int:
    return 0 if detail.job.state is JobState.COMPLETED else 1


async def _tell_failure(grid: Grid, detail: JobDetail, reporter: Reporter) -> None:
    """Tell every attempt's reason, and the last words of the last one."""
    for attempt in detail.attempts:
        reporter.say(f"  attempt {attempt.number} on {attempt.worker}: {attempt_summary(attempt)}")
    chunk = await grid.read_log(detail.job.id, stream="stderr")
    lines = chunk.data.decode(errors="replace").splitlines()
    for line in lines[-_LAST_LINES:]:
        reporter.say(f"  stderr: {line}")


def _tell_left_out(report: UnpackReport, reporter: Reporter) -> None:
    for name, target in report.refused_links:
        reporter.say(f"  link not made, it leads out of the folder: {name} -> {target}")
    for name, reason in report.dropped:
        reporter.say(f"  left out: {name}: {reason}")
    unnamed = report.left_out - len(report.refused_links) - len(report.dropped)
    if unnamed > 0:
        reporter.say(f"  and {unnamed} more")


def _require_new(folder: Path | None) -> None:
    if folder is not None and folder.exists():
        raise InvalidInput(f"{folder} exists already", where="--output", hint="results go to a new folder: choose another name")


@app.command(name="list")
async def list_(
    *,
    state: JobState | None = None,
    array: str | None = None,
    everyone: bool = False,
    limit: int = 100,
    before: int | None = None,
    json: Json = False,
) -> None:
    """List jobs, newest first: those submitted by themselves, or those of an array.

    For example:

        deskgrid job list
        deskgrid job list --array 7 --state failed
        deskgrid job list --state failed
        deskgrid job list --everyone --limit 20 --json

    Parameters
    ----------
    state
        Only jobs in this state.
    array
        The jobs of this array.
    everyone
        Also the jobs of others (admins).
    limit
        At most so many.
    before
        Only jobs with a smaller number: the next page.
    """
    async with connected() as grid:
        found = await grid.jobs(
            state=state,
            everyone=everyone,
            limit=limit,
            before=JobId(before) if before else None,
            array=array_number(array) if array else None,
        )
    if json:
        print_json(found.jobs)
        return
    _print_jobs(found)


def _print_jobs(found: JobList) -> None:
    rows = [(job.id, job.spec.name, job.owner, job.state.value, age(job.created_at), job.message) for job in found.jobs]
    print_table(("job", "name", "owner", "state", "submitted", "message"), rows, empty="no jobs")
    if found.more:
        warn(f"there are older ones: deskgrid job list --before {found.jobs[-1].id}")


@app.command
async def show(job: JobNumber, /, *, json: Json = False) -> None:
    """Show a job with all its attempts.

    For example:

        deskgrid job show 42
        deskgrid job show 42 --json | jq .attempts
    """
    async with connected() as grid:
        detail = await grid.job(JobId(job))
    if json:
        print_json(detail)
    else:
        _print_job(detail)


def _print_job(detail: JobDetail) -> None:
    job, machine = detail.job, detail.job.spec.machine
    parameters = ", ".join(f"{name}={value}" for name, value in {"index": job.index, **job.parameters}.items())
    print_lines(
        job_summary(detail),
        *([f"array      array-{job.array_id}, {parameters}"] if job.array_id is not None else []),
        f"name       {job.spec.name}, of {job.owner}, submitted {age(job.created_at)}",
        f"machine    {machine.kind.value}, {machine.cpus} CPUs, {format_size(machine.memory_bytes)} memory, "
        f"{format_size(machine.scratch_bytes)} scratch, network {machine.network.value}",
        f"disk       {f'{machine.disk} (sha256 {job.disk_sha256[:12]})' if job.disk_sha256 else 'none'}",
        f"wall time  {format_duration(job.spec.limits.wall_time_s)}",
        f"result     {'none' if job.result_bytes is None else format_size(job.result_bytes)}",
        *([f"value      {job.value.decode(errors='replace')}"] if job.value is not None else []),
        "",
    )
    rows = [
        (a.number, a.worker, a.state.value, age(a.leased_at), _took(a.started_at, a.ended_at), _or_dash(a.exit_code), a.reason)
        for a in detail.attempts
    ]
    print_table(("attempt", "worker", "state", "leased", "ran", "exit", "reason"), rows, empty="no attempts yet")


def _took(started_at: float | None, ended_at: float | None) -> str:
    return "-" if started_at is None or ended_at is None else format_duration(max(ended_at - started_at, 0))


def _or_dash(value: object) -> object:
    return "-" if value is None else value


@app.command
async def wait(*jobs: JobNumber, json: Json = False) -> int:
    """Wait until jobs are final; the exit code is 0 if all completed.

    For example:

        deskgrid job wait 42
        deskgrid job wait 42 43 44 && echo all good
    """
    _require_jobs(jobs)
    async with connected() as grid:
        details = await grid.wait([JobId(job) for job in jobs])
    if json:
        print_json(details)
    else:
        for detail in details:
            print_lines(job_summary(detail))
    return max(_code(detail) for detail in details)


def _require_jobs(jobs: tuple[int, ...]) -> None:
    if not jobs:
        raise InvalidInput("no job is named", hint="numbers of jobs, as deskgrid job list shows them")


@app.command
async def cancel(*jobs: JobNumber, json: Json = False) -> None:
    """Cancel jobs; those that are final stay as they are.

    For example:

        deskgrid job cancel 42
        deskgrid job cancel 42 43 44
    """
    _require_jobs(jobs)
    async with connected() as grid:
        cancelled = [await grid.cancel(JobId(job)) for job in jobs]
    if json:
        print_json(cancelled)
    else:
        for job in cancelled:
            print_lines(f"job {job.id}: {job.state.value}")


@app.command
async def remove(*jobs: JobNumber, json: Json = False) -> None:
    """Remove jobs that have ended, with their results and all that was kept of them.

    For example:

        deskgrid job remove 42
        deskgrid job remove 42 43 44
    """
    _require_jobs(jobs)
    async with connected() as grid:
        for job in jobs:
            await grid.remove_job(JobId(job))
    if json:
        print_json({"removed": jobs})
    else:
        print_lines(*(f"removed job {job}" for job in jobs))


@app.command
async def logs(
    job: JobNumber,
    /,
    *,
    follow: Annotated[bool, Parameter(name=["--follow", "-f"], show_default=False)] = False,
    stderr: Annotated[bool, Parameter(show_default=False)] = False,
    console: Annotated[bool, Parameter(show_default=False)] = False,
    attempt: int | None = None,
    json: Json = False,
) -> None:
    """Print what a job has printed so far: its stdout, or with an option its stderr or the machine's console.

    For example:

        deskgrid job logs 42
        deskgrid job logs 42 --follow
        deskgrid job logs 42 --console --attempt 1

    Parameters
    ----------
    follow
        Go on until the job ends.
    stderr
        Its stderr.
    console
        The console of its machine: what kernel and boot say.
    attempt
        Of this attempt; the newest by default.
    """
    if stderr and console:
        raise InvalidInput("--stderr and --console exclude each other", hint="ask for one after the other")
    stream: Literal["stdout", "stderr", "console"] = "stderr" if stderr else "console" if console else "stdout"
    async with connected() as grid:
        if not json:
            await _print_log(grid, JobId(job), stream, attempt, follow)
            return
        pieces = [chunk async for chunk in stream_log(grid, JobId(job), stream=stream, attempt=attempt, follow=follow)]
    text = b"".join(chunk.data for chunk in pieces).decode(errors="replace")
    print_json({"job": job, "attempt": pieces[-1].number if pieces else attempt, "stream": stream, "text": text})


async def _print_log(grid: Grid, job_id: JobId, stream: str, attempt: int | None, follow: bool) -> None:
    """Print output as it comes; into a file or pipe byte by byte as the job wrote it."""
    number, expected, text = attempt, 0, decoder()
    terminal = sys.stdout.isatty()
    async for chunk in stream_log(grid, job_id, stream=stream, attempt=attempt, follow=follow):
        if number is not None and chunk.number != number:
            warn(f"-- attempt {chunk.number}")
            expected = 0
        if chunk.offset > expected:
            warn(f"-- {chunk.offset - expected} bytes are not kept")
        number, expected = chunk.number, chunk.offset + len(chunk.data)
        if terminal:
            lines = text.decode(chunk.data).split("\n")
            sys.stdout.write("\n".join(clean(line.replace("\t", "    ").rstrip("\r")) for line in lines))
        else:
            sys.stdout.buffer.write(chunk.data)
        sys.stdout.flush()


@app.command
async def results(job: JobNumber, /, *, output: OutputFolder = None, json: Json = False) -> None:
    """Fetch a job's result into a new folder.

    For example:

        deskgrid job results 42
        deskgrid job results 42 -o out
    """
    folder = output or Path(f"results-{job}")
    _require_new(folder)
    async with connected() as grid:
        detail = await grid.job(JobId(job))
        if detail.job.result is None:
            raise Conflict(f"{job_summary(detail)}; it has no result", hint=f"deskgrid job show {job}")
        with make_reporter(json) as reporter:
            unpacked = await _fetch(grid, detail, folder, reporter)
            reporter.end()
            _tell_left_out(unpacked, reporter)
    if json:
        print_json(RunReport(job=detail, folder=str(folder), unpacked=unpacked))
    else:
        print_lines(str(folder))
