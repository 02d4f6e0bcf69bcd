"""Snakemake's jobs as jobs of the grid: what is sent with one, what runs on the PC, and how its files get to their places.

A job is a rule's shell command, or those of a group, one after the other. PCs need no Snakemake, and no file system is shared. The context:

    run.sh          makes the working folder /scratch/work, runs the commands, keeps what they are to bring
    commands/0      a rule's command
    files/          the inputs, at their paths relative to the user's folder; they are copied, so a command may write beside and over them
    data/input-0    a large input, as data of the grid (decision 33); it is linked
    asked           a hash of what was asked for, so that jobs with equal contexts are the same

and what comes back:

    out/            outputs and log files, at the same paths; of a command that failed the log files only
    times/0         seconds of some clock before and after a command, for Snakemake's benchmark files

What a PC sends is hostile: `place` takes what the rules declare, and nothing that is of another kind or leads out of its place.
`src/snakemake_executor_plugin_deskgrid` has the executor. Jobs are Snakemake's own objects (snakemake/jobs.py), which have no types.
"""

from __future__ import annotations

import hashlib
import os
import shlex
import shutil
import stat
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec

from deskgrid.archive import links_that_leave, printable
from deskgrid.client.jobfile_keys import BY_OPTION
from deskgrid.core.submission import MOST_DATA_FILES
from deskgrid.errors import InvalidInput
from deskgrid.files import sync_folder

__all__ = [
    "as_option",
    "check",
    "inputs_of",
    "large_inputs",
    "mark_of",
    "options_of",
    "place",
    "rules_of",
    "running_times",
    "write_context",
]

_OWN = "deskgrid_"
"""Begins the names of resources that are keys of a job file."""
_NOT_ASKED = frozenset({"array", "command", "context", "fill", "paths", "pilot", "secret", "table", "warm"})
_KINDS = ("run", "script", "notebook", "wrapper", "cwl")
_FLAGS = ("pipe", "service", "update")
_PATHS = ("out/**", "times/*")
_LONGEST_S = 366 * 86400.0
"""Of a job: a PC may say anything."""

_SCRIPT = """\
# Runs commands of rules in a working folder with their inputs, and keeps what they are to bring.
exec 2>&1
context=${DESKGRID_CONTEXT:-/context}
scratch=${DESKGRID_SCRATCH:-/scratch}
mkdir -p "$scratch/work" "$scratch/out" "$scratch/times" "$scratch/tmp"
cd "$scratch/work" || exit 1
export TMPDIR="$scratch/tmp" TMP="$scratch/tmp" TEMPDIR="$scratch/tmp" TEMP="$scratch/tmp"

now() {
    if read -r up _ </proc/uptime; then echo "$up"; else date +%s; fi
}

# NUMBER THREADS BASH'S-OPTIONS
rule() {
    for name in OMP GOTO OPENBLAS MKL NUMEXPR; do export "${name}_NUM_THREADS=$2"; done
    export VECLIB_MAXIMUM_THREADS="$2"
    began=$(now)
    if command -v bash >/dev/null 2>&1; then
        bash $3 "$context/commands/$1"
    else
        sh -eu "$context/commands/$1"
    fi
    code=$?
    echo "$began $(now)" >"$scratch/times/$1"
    return "$code"
}

keep() {
    for file do
        [ -e "$file" ] || [ -L "$file" ] || continue
        case $file in */*) mkdir -p "$scratch/out/${file%/*}" ;; esac
        mv "./$file" "$scratch/out/$file"
    done
}

"""


# ---- what can be sent


def rules_of(job: Any) -> list[Any]:
    """Return the jobs of a group in an order in which they can run; of a job, itself."""
    return [one for level in job.toposorted for one in level] if job.is_group() else [job]


def check(job: Any) -> None:
    """Check that a job of one rule can be sent. Raise InvalidInput that says what to do instead."""
    rule = job.rule.name
    for kind in _KINDS:
        if getattr(job, f"is_{kind}"):
            raise InvalidInput(
                f"rule {rule} is a `{kind}:`, and PCs have no Snakemake to run that",
                hint=f"write it as `shell:`, or let it run here: `localrules: {rule}`",
            )
    for output in job.output:
        for flag in _FLAGS:
            if flag in output.flags:
                raise InvalidInput(f"rule {rule} has an output that is {flag}()", hint=f"let it run here: `localrules: {rule}`")
    for file in (*job.input, *job.output, *job.log, *_benchmark_of(job)):
        _relative(file, rule)


def _relative(file: Any, rule: str) -> str:
    """Return the path of a file in the user's folder. Raise InvalidInput for one outside."""
    path = Path(os.path.normpath(file))
    if path.is_absolute() or path.parts[:1] in ((), ("..",)):
        raise InvalidInput(
            f"rule {rule} has {printable(str(file))!r}, which is not below the folder that Snakemake works in",
            hint=f"name it relative to that, below a link if need be, or let the rule run here: `localrules: {rule}`",
        )
    return path.as_posix()


def _benchmark_of(job: Any) -> tuple[Any, ...]:
    return (job.benchmark,) if job.benchmark is not None else ()


def _name_of(job: Any) -> str:
    """Return a name for people."""
    wildcards = [] if job.is_group() else [f"{name}={value}" for name, value in job.wildcards_dict.items()]
    return printable(" ".join([job.name, *wildcards]))[:200]


def options_of(job: Any, defaults: Mapping[str, Any], data: Mapping[str, str]) -> dict[str, Any]:
    """Return what a job asks for, as options of Grid.submit: Snakemake's own resources, and those that begin with deskgrid_, which win.

    `data`: what large inputs are sent as. Raise InvalidInput for a resource that is no key of a job file.
    """
    resources = dict(job.resources.items())
    asked = dict(_asked(resources))
    found: dict[str, Any] = {
        "name": _name_of(job),
        "attempts": 1,  # whether to try again is said by `retries` and --retries; lost PCs do not count
        "priority": max(-1000, min(1000, int(job.priority))),
        "cpus": max(1, int(job.threads)),
        **{name: f"{resources[given]}{unit}" for given, name, unit in _RESOURCES if isinstance(resources.get(given), int)},
        **defaults,
        **asked,
    }
    found.setdefault("kind", "vm" if "disk" in found else "process")
    sent = tuple(f"{name}={sha256}" for name, sha256 in data.items())
    return {**found, "command": ("sh", "/context/run.sh"), "paths": _PATHS, "data": (*found.get("data", ()), *sent)}


_RESOURCES = (("mem_mb", "memory", "MB"), ("disk_mb", "scratch", "MB"), ("runtime", "wall_time", "m"))


def _asked(resources: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for resource, value in resources.items():
        if resource.startswith(_OWN):
            yield resource.removeprefix(_OWN), as_option(resource.removeprefix(_OWN), value)


def as_option(name: str, value: Any) -> Any:
    """Return a resource's or setting's value as the option of a job file; lists are separated by commas. Raise InvalidInput."""
    if name not in BY_OPTION or name in _NOT_ASKED:
        raise InvalidInput(f"{_OWN}{name} is not known", hint=f"{_OWN} and a key of a job file, as in {_OWN}disk")
    is_list = BY_OPTION[name].kind.name.startswith(("list", "table"))
    return tuple(part for part in value.split(",") if part) if is_list and isinstance(value, str) else value


# ---- what is sent


def inputs_of(job: Any) -> dict[str, Path]:
    """Return the inputs that a job must be given: path in its working folder, and where it is. Raise InvalidInput."""
    made = {str(file) for one in rules_of(job) for file in one.output}
    wanted = ((one, file) for one in rules_of(job) for file in one.input if str(file) not in made)
    return {_relative(file, one.rule.name): Path(file) for one, file in wanted}


def large_inputs(files: Mapping[str, Path], from_bytes: int) -> dict[str, str]:
    """Return those inputs that are sent as data of the grid: names there, and paths in the working folder."""
    large = [path for path, file in files.items() if file.is_file() and file.stat().st_size >= from_bytes]
    return {f"input-{index}": path for index, path in enumerate(large[:MOST_DATA_FILES])}


def mark_of(options: Mapping[str, Any]) -> str:
    """Return what is the same for jobs that ask for the same, name and priority aside."""
    asked = {name: value for name, value in options.items() if name not in ("name", "priority")}
    return hashlib.sha256(msgspec.json.encode(asked, order="deterministic")).hexdigest()


def write_context(
    folder: Path, job: Any, files: Mapping[str, Path], data: Mapping[str, str], *, prefix: str | None, suffix: str, mark: str
) -> None:
    """Write the context of a job into a folder. `prefix`, `suffix`: what the user wants around each command; `mark`: see `mark_of`. Raise OSError."""
    (folder / "asked").write_text(f"{mark}\n")
    (folder / "commands").mkdir()
    (folder / "files").mkdir()
    rules = rules_of(job)
    for number, one in enumerate(rules):
        text = f"{prefix or ''} {_command_of(one)} {suffix}".strip()
        (folder / "commands" / str(number)).write_bytes(os.fsencode(f"{text}\n"))
    for path in files.keys() - set(data.values()):
        _copy(files[path], folder / "files" / path)
    (folder / "run.sh").write_bytes(os.fsencode(_script(rules, data, "-euo pipefail" if prefix is None else "")))


def _command_of(job: Any) -> str:
    """Return the command, with a folder for temporary files that is on the PC: Snakemake leaves that open."""
    resources = type(job.resources)(fromdict={**dict(job.resources.items()), "tmpdir": "$TMPDIR"})
    return str(job.format_wildcards(job.rule.shellcmd or "", resources=resources))


def _copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    if source.is_dir():
        # Links as they are: a PC may have made this folder, and links to their own folder would be followed without end. Packing refuses those that leave.
        shutil.copytree(source, target, symlinks=True, dirs_exist_ok=True)
    else:
        shutil.copy(source, target)


def _script(rules: Iterable[Any], data: Mapping[str, str], bash_options: str) -> str:
    outputs = [_relative(file, one.rule.name) for one in rules for file in one.output]
    logs = [_relative(file, one.rule.name) for one in rules for file in one.log]
    folders = {str(Path(path).parent) for path in (*outputs, *logs, *data.values())}
    lines = [
        'cp -R "$context/files/." . && chmod -R u+w . || exit 1',
        *(f"mkdir -p {shlex.quote(f'./{path}')} || exit 1" for path in sorted(folders)),
        *(f'ln -sf "$context/data/{name}" {shlex.quote(f"./{path}")} || exit 1' for name, path in data.items()),
        "status=0",
        *(f"[ $status = 0 ] && {{ rule {number} {one.threads} '{bash_options}'; status=$?; }}" for number, one in enumerate(rules)),
        *_keeping(logs),
        "[ $status = 0 ] || exit $status",
        *_keeping(outputs),
        "exit 0",
    ]
    return _SCRIPT + "\n".join(lines) + "\n"


def _keeping(paths: Iterable[str]) -> Iterator[str]:
    return (f"keep {shlex.quote(path)}" for path in paths)


# ---- what comes back


def place(result: Path, job: Any, *, completed: bool) -> None:
    """Put the log files of a job that has ended, and the outputs of one that completed, at their places, each whole or not at all.

    `result`: what was unpacked, on any file system; it is used up. A file that is there is replaced. Nothing but what the rules declare is
    touched. Raise InvalidInput for what is missing or is of another kind, before any output is placed; OSError.
    """
    kept = result / "out"
    for source, file, _ in _sources(kept, job, "log"):
        if _is_file(source):
            _put(source, Path(file))
    if not completed:
        return
    # In the order in which they were made, so that their times tell which is newer.
    outputs = _sources(kept, job, "output")
    wanted = [(source, file, one) for source, file, one in outputs if "touch" not in file.flags or os.path.lexists(source)]
    for source, file, _ in wanted:
        _check_output(source, str(file), is_folder="directory" in file.flags)
    for source, file, one in wanted:
        _put(source, Path(one.shadowed_path(file)))


def _sources(kept: Path, job: Any, what: str) -> list[tuple[Path, Any, Any]]:
    return [(kept / _relative(file, one.rule.name), file, one) for one in rules_of(job) for file in getattr(one, what)]


def _is_file(path: Path) -> bool:
    return path.is_file() and not path.is_symlink()


def _check_output(source: Path, file: str, *, is_folder: bool) -> None:
    if not os.path.lexists(source):
        raise InvalidInput(f"the job did not make {printable(file)}")
    if source.is_symlink() or (not source.is_dir() if is_folder else not source.is_file()):
        raise InvalidInput(f"what the job made as {printable(file)} is not a {'folder' if is_folder else 'file'}")
    if is_folder:
        links = {path.relative_to(source).as_posix(): str(path.readlink()) for path in _below(source) if path.is_symlink()}
        for name in sorted(links_that_leave(links)):
            raise InvalidInput(f"in {printable(file)}, {printable(name)} is a link that leads out of it")


def _below(folder: Path) -> Iterator[Path]:
    """Yield all that is below a folder, which is made such that it can be looked through and removed."""
    folder.chmod(_tame(folder.stat().st_mode) | stat.S_IRWXU)
    for path in folder.iterdir():
        yield path
        if path.is_dir() and not path.is_symlink():
            yield from _below(path)


def _tame(mode: int) -> int:
    """Return a mode that leaves its owner his file, and others no right to write."""
    return (mode & 0o755) | stat.S_IRUSR | stat.S_IWUSR


def _put(source: Path, target: Path) -> None:
    """Move a file or folder to its place by one rename, with all of it on the disk, and times of here."""
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f".{target.name[:100]}.{os.urandom(4).hex()}.part")
    try:
        shutil.move(source, part)
        for path in (*_below(part), part) if part.is_dir() else (part,):
            if not path.is_symlink():
                _settle(path)
        part.replace(target)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True) if part.is_dir() else part.unlink(missing_ok=True)
        raise
    sync_folder(target.parent)


def _settle(path: Path) -> None:
    os.utime(path)
    if path.is_dir():
        sync_folder(path)
        return
    path.chmod(_tame(path.stat().st_mode))
    with path.open("rb") as file:
        os.fsync(file.fileno())


def running_times(result: Path, job: Any) -> list[float]:
    """Return how long the command of each rule took on the PC, as that says, in seconds. Raise InvalidInput."""
    found = []
    for number, one in enumerate(rules_of(job)):
        file = result / "times" / str(number)
        try:
            began, ended = map(float, _beginning(file).split())
            found.append(min(max(0.0, ended - began), _LONGEST_S))
        except ValueError as error:
            raise InvalidInput(f"the job does not tell how long rule {one.rule.name} took") from error
    return found


def _beginning(file: Path) -> bytes:
    if not _is_file(file):
        return b""
    with file.open("rb") as source:
        return source.read(100)
