"""What is submitted: a job file with the options that win over it, as a job, an array or a set; with this user's own key."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import msgspec
from cyclopts import Parameter

from deskgrid.cli.array import tell_filling
from deskgrid.cli.output import Reporter, make_reporter
from deskgrid.client.jobfile import KEYS, JobFile, read_job
from deskgrid.client.jobfile_set import SetFile, read_file
from deskgrid.client.submitting import Stage, submit_file, submit_set_file
from deskgrid.errors import InvalidInput
from deskgrid.model.jobs import Array, Job, JobSpec
from deskgrid.model.wire import JobSet
from deskgrid.settings import client_home

if TYPE_CHECKING:
    from deskgrid.client.grid import Grid

__all__ = ["NO_OPTIONS", "JobOptions", "Spec", "read_any", "read_wanted", "submit_any", "submit_job", "submit_set"]


def _key(name: str) -> Any:
    doc = next(key.doc for key in KEYS if key.given == name)
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
    data: Annotated[tuple[str, ...] | None, _key("data")] = None
    group: Annotated[str | None, _key("group")] = None
    priority: Annotated[int | None, _key("priority")] = None
    pilot: Annotated[bool | None, _key("pilot")] = None
    after: Annotated[tuple[str, ...] | None, _key("after")] = None
    after_end: Annotated[tuple[str, ...] | None, _key("after_end")] = None
    retain: Annotated[str | None, _key("retain")] = None
    platforms: Annotated[tuple[str, ...] | None, _key("platforms")] = None
    driver: Annotated[str | None, _key("driver")] = None
    need: Annotated[tuple[str, ...] | None, _key("need")] = None
    on: Annotated[str | None, _key("on")] = None
    warm: Annotated[bool | None, _key("warm")] = None
    array: Annotated[int | None, _key("array")] = None
    table: Annotated[str | None, _key("table")] = None
    paths: Annotated[tuple[str, ...] | None, _key("paths")] = None
    secret: Annotated[tuple[str, ...] | None, _key("secret")] = None
    trust: Annotated[tuple[str, ...] | None, _key("trust")] = None


NO_OPTIONS = JobOptions()
Spec = Annotated[Path | None, Parameter(help="Job file in TOML. Options win over it.")]


def read_any(spec: Path | None, options: JobOptions) -> JobFile | SetFile:
    """Return the job, array or set of a file and options."""
    return read_file(spec, dataclasses.asdict(options))


def read_wanted(spec: Path | None, options: JobOptions) -> JobFile:
    """Return the job of a file and options. One that offers ssh lets this user's own key in, unless it names keys."""
    wanted = read_job(spec, dataclasses.asdict(options))
    return msgspec.structs.replace(wanted, spec=_with_own_key(wanted.spec))


def _with_own_key(spec: JobSpec) -> JobSpec:
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
    submitted = await submit_file(grid, wanted, stage=_stages(reporter), prepare=_with_own_key)
    assert isinstance(submitted, Job)
    return submitted


async def submit_any(grid: Grid, wanted: JobFile | SetFile, *, json: bool) -> Job | Array | JobSet:
    """Submit a job, an array or a set, showing how it comes along; an array is waited for until its jobs are there."""
    if isinstance(wanted, SetFile):
        return await submit_set(grid, wanted, json=json)
    with make_reporter(json) as reporter:
        submitted = await submit_file(grid, wanted, stage=_stages(reporter), prepare=_with_own_key)
    return await tell_filling(grid, submitted, json=json) if isinstance(submitted, Array) else submitted


async def submit_set(grid: Grid, wanted: SetFile, *, json: bool) -> JobSet:
    """Submit a set, showing what is sent."""
    with make_reporter(json) as reporter:
        return await submit_set_file(grid, wanted, stage=_stages(reporter), prepare=_with_own_key)


def _stages(reporter: Reporter) -> Stage:
    return lambda title, size_bytes: reporter.begin(title, size_bytes).done
