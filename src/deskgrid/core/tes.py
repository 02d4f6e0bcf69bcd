"""What a task of GA4GH TES 1.1 is as a job, and what a job is as a task.

Rules:

1. A task is one job. Its commands run in one machine, one after the other (core/tes_script.py), and so all have one image.
2. The image is a disk of the grid, as `disk` in a job file: an image of a container, or a disk that boots. `process` is none: a native program.
3. A path is absolute. A process writes below /scratch and /tmp only; other machines anywhere but below /proc, /sys, /dev, /context and /app.
4. Data comes from the repository and results stay at the job: the only URLs are those of `deskgrid:`.
5. A command that fails is not tried again, a machine that is lost is: each attempt is a log of the task.
6. What the specification lets a server bound is bounded here, and said with its place in the message.
"""

from __future__ import annotations

import datetime
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TypeVar

import msgspec
from msgspec import Struct

from deskgrid.core.submission import MOST_DATA_FILES, check_spec
from deskgrid.core.tes_script import Ended, Plan, Staged, Wanted, ended_of, printed_by, script_of, sizes_of
from deskgrid.errors import InvalidInput
from deskgrid.model.jobs import Attempt, AttemptState, Job, JobSpec, JobState, Limits, Machine, Results
from deskgrid.model.machines import MachineKind
from deskgrid.model.tes import (
    TesExecutor,
    TesExecutorLog,
    TesFileType,
    TesInput,
    TesOutput,
    TesOutputFileLog,
    TesResources,
    TesState,
    TesTask,
    TesTaskLog,
    TesView,
)
from deskgrid.units import parse_duration

__all__ = [
    "INPUTS_FOLDER",
    "PARAMETERS",
    "PROCESS",
    "KeptTask",
    "Printed",
    "TaskJob",
    "image_of",
    "job_of",
    "matches",
    "shown",
    "state_of",
    "told_of",
    "with_contents",
]

PROCESS = "process"
"""The image of a task that is a native program."""
INPUTS_FOLDER = "inputs"
"""Of the context: the files whose contents came with the task, by their numbers."""
PARAMETERS = ("group", "priority", "wall_time")
"""Of `backend_parameters`, those that we know."""
_SCHEME = "deskgrid:"
_MOST_EXECUTORS, _MOST_OUTPUTS, _MOST_VOLUMES, _MOST_TAGS, _MOST_VARIABLES = 64, 100, 100, 100, 100
_MOST_COMMAND_BYTES = 32_000
_MOST_LOGS = 8
_MOST_CONTENT_BYTES = 4 << 20
"""Of all inputs of a task."""
_MOST_KEPT_BYTES = 1 << 17
"""Of a task without the contents of its inputs."""
_LONGEST_PATH, _LONGEST_NAME, _LONGEST_KEY = 1000, 1000, 200
_LONGEST_TEXT = 10_000
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,127}")
File = TypeVar("File", TesInput, TesOutput)
_GIGABYTE = 10**9
_MOST_GIGABYTES = 10**7


class KeptTask(Struct, frozen=True):
    """What the server keeps of a task: what its job does not say."""

    task: TesTask
    """Without the contents of its inputs: they are in the job's context."""
    mark: str
    ignored: tuple[str, ...] = ()
    """Backend parameters that are not known."""


class TaskJob(Struct, frozen=True):
    """What is submitted for a task."""

    spec: JobSpec
    files: dict[str, bytes]
    """Its context."""
    kept: KeptTask


class Printed(Struct, frozen=True):
    """The end of what an attempt printed."""

    stdout: bytes = b""
    stderr: bytes = b""


# ---- a task as a job


def image_of(task: TesTask) -> str:
    """Return the image of all commands of a task. Raise InvalidInput."""
    executors = task.executors or ()
    _check_count(executors, _MOST_EXECUTORS, "executors", least=1)
    image = executors[0].image
    for number, executor in enumerate(executors):
        if executor.image != image:
            raise InvalidInput(
                f"{executor.image[:60]!r} is another image than {image[:60]!r}",
                where=f"executors[{number}].image",
                hint="all commands of a task run in one machine: make it several tasks",
            )
    if not image:
        raise InvalidInput("an image is needed", where="executors[0].image", hint=f"a disk of the grid, or {PROCESS}")
    return image


def job_of(task: TesTask, kind: MachineKind, mark: str) -> TaskJob:
    """Return the job of a task whose image is of this kind. `mark`: not another task's. Raise InvalidInput.

    What the server alone can know is left to it: whether the image, data and group exist and the caller may use them.
    """
    _check_texts(task)
    image = image_of(task)
    plan = Plan(
        mark=mark,
        executors=tuple(_executor(one, kind, f"executors[{number}]") for number, one in enumerate(task.executors or ())),
        inputs=_staged(task, kind),
        outputs=_wanted(task, kind),
        volumes=_volumes(task, kind),
    )
    resources, ignored = _known_resources(task.resources or TesResources())
    spec = _spec(task, image, kind, plan, resources)
    check_spec(spec)
    files = {"context.sh": script_of(plan).encode(), **_contents(task)}
    return TaskJob(spec, files, _kept(task, resources, mark, ignored))


def _spec(task: TesTask, image: str, kind: MachineKind, plan: Plan, resources: TesResources) -> JobSpec:
    parameters = resources.backend_parameters or {}
    # A virtual machine has results; nothing is called so.
    paths = tuple(output.name for output in plan.outputs) or (("outputs",) if kind is MachineKind.VM else ())
    return JobSpec(
        machine=_machine(image, kind, resources),
        name="".join(letter for letter in task.name or "" if letter.isprintable())[:200] or "task",
        data=tuple(
            (f"input-{number}", _reference(one)) for number, one in enumerate(task.inputs or ()) if not one.content and one.url
        ),
        group=parameters.get("group", ""),
        priority=_priority(parameters.get("priority", "0")),
        limits=_limits(parameters),
        results=Results(paths=paths),
    )


def _machine(image: str, kind: MachineKind, resources: TesResources) -> Machine:
    asked = {
        "cpus": resources.cpu_cores,
        "memory_bytes": _bytes(resources.ram_gb, "resources.ram_gb"),
        "scratch_bytes": _bytes(resources.disk_gb, "resources.disk_gb"),
    }
    machine = Machine(disk="" if kind is MachineKind.PROCESS else image, kind=kind)
    # 0 is what clients say that say nothing.
    return msgspec.structs.replace(machine, **{name: value for name, value in asked.items() if value})


def _bytes(gigabytes: float | None, where: str) -> int:
    if gigabytes is None:
        return 0
    if not math.isfinite(gigabytes) or not 0 <= gigabytes <= _MOST_GIGABYTES:
        raise InvalidInput(f"{gigabytes} GB are out of bounds", where=where, hint=f"0 to {_MOST_GIGABYTES}")
    return int(gigabytes * _GIGABYTE)


def _priority(text: str) -> int:
    if not re.fullmatch(r"-?[0-9]{1,9}", text):
        raise InvalidInput(f"{text[:40]!r} is no number", where=_parameter("priority"))
    return int(text)


def _limits(parameters: Mapping[str, str]) -> Limits:
    if "wall_time" not in parameters:
        return Limits(attempts=1)
    try:
        return Limits(attempts=1, wall_time_s=parse_duration(parameters["wall_time"][:100]))
    except InvalidInput as error:
        raise InvalidInput(error.message, where=_parameter("wall_time"), hint=error.hint) from error


def _parameter(name: str) -> str:
    return f"resources.backend_parameters.{name}"


def _known_resources(resources: TesResources) -> tuple[TesResources, tuple[str, ...]]:
    """Return resources with the parameters that we know, by their names here, and the names of the others. Raise InvalidInput."""
    given = {name.lower(): text for name, text in (resources.backend_parameters or {}).items()}
    ignored = tuple(sorted(name for name in given if name not in PARAMETERS))
    if ignored and resources.backend_parameters_strict:
        raise InvalidInput(
            f"{ignored[0][:60]!r} is not known here", where=_parameter("")[:-1], hint=f"only {', '.join(PARAMETERS)}"
        )
    if resources.backend_parameters is None:
        return resources, ()
    known = {name: text for name, text in given.items() if name in PARAMETERS}
    return msgspec.structs.replace(resources, backend_parameters=known), ignored


def _kept(task: TesTask, resources: TesResources, mark: str, ignored: tuple[str, ...]) -> KeptTask:
    plain = msgspec.structs.replace(
        with_contents(task, {}),
        **dict.fromkeys(("id", "state", "logs", "creation_time"), None),
        outputs=tuple(_typed(one) for one in task.outputs) if task.outputs is not None else None,
        resources=resources if task.resources is not None else None,
    )
    kept = KeptTask(plain, mark, ignored)
    if len(msgspec.json.encode(kept)) > _MOST_KEPT_BYTES:
        raise InvalidInput("the task is too large", hint=f"at most {_MOST_KEPT_BYTES} bytes without the contents of its inputs")
    return kept


def _check_texts(task: TesTask) -> None:
    """Check the texts that nothing else is said of. Raise InvalidInput."""
    for where, text, most in (("name", task.name, _LONGEST_NAME), ("description", task.description, _LONGEST_TEXT)):
        if len(text or "") > most:
            raise InvalidInput(f"{len(text or '')} characters are too many", where=where, hint=f"at most {most}")
    tags = task.tags or {}
    _check_count(tags, _MOST_TAGS, "tags")
    for key, value in tags.items():
        if len(key) > _LONGEST_KEY or len(value) > _LONGEST_TEXT:
            raise InvalidInput(
                f"{key[:40]!r} is too long", where="tags", hint=f"at most {_LONGEST_KEY} characters, its value {_LONGEST_TEXT}"
            )


def _check_count(given: Sequence[object] | Mapping[str, str], most: int, where: str, *, least: int = 0) -> None:
    if not least <= len(given) <= most:
        raise InvalidInput(f"{len(given)} of them", where=where, hint=f"{least} to {most}")


# ---- commands


def _executor(executor: TesExecutor, kind: MachineKind, where: str) -> TesExecutor:
    """Return a command with its paths in their normal form. Raise InvalidInput."""
    _check_command(executor.command, f"{where}.command")
    _check_variables(executor.env or {}, f"{where}.env")
    return msgspec.structs.replace(
        executor,
        workdir=_path(executor.workdir, f"{where}.workdir", folder=True) if executor.workdir else None,
        stdin=_path(executor.stdin, f"{where}.stdin") if executor.stdin else None,
        stdout=_own_path(executor.stdout, kind, f"{where}.stdout") if executor.stdout else None,
        stderr=_own_path(executor.stderr, kind, f"{where}.stderr") if executor.stderr else None,
    )


def _check_command(command: tuple[str, ...], where: str) -> None:
    if not command or not command[0]:
        raise InvalidInput("a command begins with a program", where=where)
    if command[0].startswith("-") or "=" in command[0]:
        raise InvalidInput(
            f"{command[0][:60]!r} is not a program", where=where, hint="an image's entrypoint is not used: name the program"
        )
    if sum(len(word.encode()) + 1 for word in command) > _MOST_COMMAND_BYTES:
        raise InvalidInput("the command is too long", where=where, hint=f"at most {_MOST_COMMAND_BYTES} bytes; give it as an input")
    if any("\0" in word for word in command):
        raise InvalidInput("the character 0 is not allowed in a command", where=where)


def _check_variables(variables: Mapping[str, str], where: str) -> None:
    _check_count(variables, _MOST_VARIABLES, where)
    for name, value in variables.items():
        if not _VARIABLE.fullmatch(name) or name.startswith("DESKGRID_"):
            raise InvalidInput(f"{name[:40]!r} is not a variable", where=where, hint="letters, digits and _, not DESKGRID_...")
        if "\0" in value:
            raise InvalidInput(f"the character 0 is not allowed in {name}", where=where)
    if sum(len(value.encode()) for value in variables.values()) > _MOST_COMMAND_BYTES:
        raise InvalidInput("the variables are too long", where=where, hint=f"at most {_MOST_COMMAND_BYTES} bytes")


# ---- files


def _staged(task: TesTask, kind: MachineKind) -> tuple[Staged, ...]:
    inputs = task.inputs or ()
    _check_count(inputs, MOST_DATA_FILES, "inputs")
    found = [_input(number, one, kind) for number, one in enumerate(inputs)]
    _check_distinct([one.path for one in found], "inputs")
    return tuple(found)


def _input(number: int, one: TesInput, kind: MachineKind) -> Staged:
    where = f"inputs[{number}]"
    if one.type is TesFileType.DIRECTORY:
        raise InvalidInput("data of the grid is files, no folders", where=f"{where}.type", hint="an archive, unpacked by a command")
    path = _own_path(one.path, kind, f"{where}.path")
    if one.content or not one.url:
        if one.content is None:
            raise InvalidInput("neither url nor content", where=where)
        return Staged(f"/context/{INPUTS_FOLDER}/{number}", path, False)
    if not one.url.startswith(_SCHEME):
        raise InvalidInput(
            f"{one.url[:80]!r} is not fetched from here",
            where=f"{where}.url",
            hint=f"{_SCHEME}NAME, {_SCHEME}NAME@VERSION or {_SCHEME}sha256:HEX: data of the grid (deskgrid data put FILE)",
        )
    return Staged(f"/context/data/input-{number}", path, True)


def _reference(one: TesInput) -> str:
    return (one.url or "").removeprefix(_SCHEME).removeprefix("sha256:")


def _contents(task: TesTask) -> dict[str, bytes]:
    found = {
        f"{INPUTS_FOLDER}/{number}": (one.content or "").encode()
        for number, one in enumerate(task.inputs or ())
        if one.content or not one.url
    }
    if sum(map(len, found.values())) > _MOST_CONTENT_BYTES:
        raise InvalidInput(
            "the contents are too large",
            where="inputs",
            hint=f"at most {_MOST_CONTENT_BYTES} bytes; put them as data and give its url",
        )
    return found


def _wanted(task: TesTask, kind: MachineKind) -> tuple[Wanted, ...]:
    outputs = task.outputs or ()
    _check_count(outputs, _MOST_OUTPUTS, "outputs")
    found = [_output(one, kind, f"outputs[{number}]") for number, one in enumerate(outputs)]
    _check_distinct([one.name for one in found], "outputs")
    return tuple(found)


def _output(one: TesOutput, kind: MachineKind, where: str) -> Wanted:
    folder, some = one.type is TesFileType.DIRECTORY, any(letter in one.path for letter in "*?[")
    path = _own_path(one.path, kind, f"{where}.path", folder=folder)
    if some and (not path.startswith("/scratch/") or "[" in path):
        raise InvalidInput("wildcards are * and ?, below /scratch", where=f"{where}.path", hint="or name the folder")
    name = "**" if path == "/scratch" else path.removeprefix("/scratch/").removeprefix("/")
    if one.url.strip("/") not in (_SCHEME, f"{_SCHEME}{name}"):
        raise InvalidInput(
            f"{one.url[:80]!r} is not written to from here",
            where=f"{where}.url",
            hint=f"{_SCHEME}{name}: it stays with the job's results (deskgrid job results)",
        )
    return Wanted(path, name, folder, some)


def _volumes(task: TesTask, kind: MachineKind) -> tuple[str, ...]:
    volumes = task.volumes or ()
    _check_count(volumes, _MOST_VOLUMES, "volumes")
    return tuple(_own_path(one, kind, f"volumes[{number}]", folder=True) for number, one in enumerate(volumes))


def _check_distinct(names: Sequence[str], where: str) -> None:
    twice = [name for number, name in enumerate(names) if name in names[:number]]
    if twice:
        raise InvalidInput(f"two are at {twice[0]}", where=where)


_NOT_OWN = ("proc", "sys", "dev", "context", "app")
_OF_PROCESS = ("scratch", "tmp")


def _own_path(text: str, kind: MachineKind, where: str, *, folder: bool = False) -> str:
    """Return the normal form of a path where a task may write. Raise InvalidInput."""
    path = _path(text, where, folder=folder)
    top = path.split("/")[1]
    if kind is MachineKind.PROCESS and top not in _OF_PROCESS:
        raise InvalidInput(f"a process has no {path}", where=where, hint="below /scratch or /tmp")
    if not top or top in _NOT_OWN or (path in ("/scratch", "/tmp") and not folder):  # noqa: S108 the machine's own
        raise InvalidInput(f"{path} is not a task's", where=where, hint=f"not below {', '.join(f'/{name}' for name in _NOT_OWN)}")
    return path


def _path(text: str, where: str, *, folder: bool = False) -> str:
    """Return the normal form of a path. Raise InvalidInput."""
    if not text.startswith("/") or len(text) > _LONGEST_PATH or not text.isprintable():
        raise InvalidInput(
            f"{text[:80]!r} will not do as a path", where=where, hint=f"absolute, of at most {_LONGEST_PATH} printable characters"
        )
    parts = [part for part in text.split("/") if part]
    if "." in parts or ".." in parts or (text.endswith("/") and not folder):
        raise InvalidInput(f"{text[:80]!r} is not the name of a {'folder' if folder else 'file'}", where=where)
    return "/" + "/".join(parts)


# ---- a job as a task


_RUNNING = {
    AttemptState.RUNNING: TesState.RUNNING,
    AttemptState.SUSPENDED: TesState.PAUSED,
    AttemptState.LEASED: TesState.INITIALIZING,
}
"""Of several live attempts the first of these counts."""
_STATES = {
    JobState.BLOCKED: TesState.QUEUED,
    JobState.WAITING: TesState.QUEUED,
    JobState.COMPLETED: TesState.COMPLETE,
    JobState.CANCELLED: TesState.CANCELED,
}


def state_of(job: Job, attempts: Sequence[Attempt]) -> TesState:
    """Return the state of a task."""
    if job.state is JobState.ACTIVE:
        live = {one.state for one in attempts}
        return next((state for of_attempt, state in _RUNNING.items() if of_attempt in live), TesState.QUEUED)
    if job.state is JobState.FAILED:
        return TesState.EXECUTOR_ERROR if job.exit_code else TesState.SYSTEM_ERROR
    return _STATES[job.state]


def matches(kept: KeptTask, *, name_prefix: str, tags: Iterable[tuple[str, str]]) -> bool:
    """Tell whether a task has such a name and these tags; an empty value stands for any."""
    own = kept.task.tags or {}
    return (kept.task.name or "").startswith(name_prefix) and all(key in own and value in ("", own[key]) for key, value in tags)


def shown(
    kept: KeptTask,
    job: Job,
    attempts: Sequence[Attempt],
    view: TesView,
    printed: Mapping[int, Printed],
) -> TesTask:
    """Return a task as it is told, without the contents of its inputs. `printed`: by attempts' numbers."""
    state = state_of(job, attempts)
    if view is TesView.MINIMAL:
        return TesTask(id=str(job.id), state=state)
    return msgspec.structs.replace(
        kept.task,
        id=str(job.id),
        state=state,
        logs=tuple(_log(kept, job, one, printed.get(one.number, Printed()), view) for one in told_of(attempts)),
        creation_time=_time(job.created_at),
    )


def told_of(attempts: Sequence[Attempt]) -> list[Attempt]:
    """Return the attempts that are told of: the last ones that started."""
    return [one for one in attempts if one.started_at is not None][-_MOST_LOGS:]


def with_contents(task: TesTask, contents: Mapping[int, str]) -> TesTask:
    """Return a task with these contents of its inputs, by their numbers, and no others."""
    inputs = [msgspec.structs.replace(_typed(one), content=contents.get(number)) for number, one in enumerate(task.inputs or ())]
    return msgspec.structs.replace(task, inputs=tuple(inputs) if task.inputs is not None else None)


def _typed(one: File) -> File:
    return msgspec.structs.replace(one, type=one.type or TesFileType.FILE)


def _log(kept: KeptTask, job: Job, attempt: Attempt, printed: Printed, view: TesView) -> TesTaskLog:
    whole = view is TesView.FULL
    system = [attempt.reason, *(f"backend parameter {name[:60]} is not known here" for name in kept.ignored)]
    return TesTaskLog(
        logs=tuple(_executor_logs(kept, attempt, printed, whole=whole)),
        outputs=tuple(_output_logs(kept, printed)) if attempt.state is AttemptState.SUCCEEDED else (),
        metadata={"attempt": str(attempt.number), "worker": attempt.worker, "state": attempt.state.value, "job": str(job.id)},
        start_time=_time(attempt.started_at),
        end_time=_time(attempt.ended_at),
        system_logs=tuple(filter(None, system)) if whole else None,
    )


def _executor_logs(kept: KeptTask, attempt: Attempt, printed: Printed, *, whole: bool) -> Iterable[TesExecutorLog]:
    commands = len(kept.task.executors or ())
    found = ended_of(printed.stderr, kept.mark, commands)
    if not found and commands == 1 and attempt.exit_code is not None:
        found = [Ended(attempt.exit_code)]  # it printed more than is kept
    stdout, stderr = (printed_by(told, kept.mark) if whole else {} for told in (printed.stdout, printed.stderr))
    for number, one in enumerate(found):
        yield TesExecutorLog(
            start_time=_time(one.begun_at),
            end_time=_time(one.ended_at),
            stdout=stdout.get(number),
            stderr=stderr.get(number),
            exit_code=one.exit_code,
        )


def _output_logs(kept: KeptTask, printed: Printed) -> Iterable[TesOutputFileLog]:
    """Yield the files whose sizes the script told: those that are named one by one."""
    outputs = kept.task.outputs or ()
    for number, size in sorted(sizes_of(printed.stderr, kept.mark).items()):
        if number < len(outputs):
            path = _path(outputs[number].path, "", folder=True)
            name = path.removeprefix("/scratch/").removeprefix("/")
            yield TesOutputFileLog(url=f"{_SCHEME}{name}", path=path, size_bytes=str(size))


def _time(at: float | None) -> str | None:
    return datetime.datetime.fromtimestamp(at, datetime.UTC).isoformat(timespec="milliseconds") if at is not None else None
