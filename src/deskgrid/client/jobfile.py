"""Job files: what a user writes in TOML, or as options, becomes a JobSpec and a context folder.

`KEYS` lists all that can be written; parsing, the options of the command line and the reference page are derived from it.
A file is read without running anything and whole: the first thing that is wrong is refused with its line and what is allowed.
"""

from __future__ import annotations

import difflib
import re
import tomllib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import msgspec
from msgspec import Struct

from deskgrid.core.arrays import placeholders
from deskgrid.core.submission import check_spec
from deskgrid.errors import DeskgridError, InvalidInput
from deskgrid.model.jobs import JobSpec, Limits, Machine, Results
from deskgrid.model.machines import MachineKind, Network
from deskgrid.model.overlay import Offer, Reach, parse_offer, parse_reach
from deskgrid.units import format_duration, format_size, parse_duration, parse_size

N = TypeVar("N", int, float)

__all__ = [
    "KEYS",
    "ArrayPart",
    "JobFile",
    "Key",
    "SetFile",
    "is_set",
    "job_from_options",
    "parse_defaults",
    "parse_job",
    "parse_set",
    "read_file",
    "read_job",
    "spec_reference",
    "with_defaults",
]

_LARGEST_FILE_BYTES = 1 << 20
_LARGEST_NUMBER = 1 << 62


class ArrayPart(Struct, frozen=True, kw_only=True):
    """Many jobs of one file."""

    count: int = 0
    """How many; 0: one for each line of the table."""
    table: Path | None = None
    """A CSV file, on the user's PC: one job a line, the columns named by the first."""


class JobFile(Struct, frozen=True, kw_only=True):
    """A job, or an array of jobs, as a user wrote it."""

    spec: JobSpec
    context: Path | None = None
    """The context folder, on the user's PC."""
    array: ArrayPart | None = None
    written: frozenset[str] = frozenset()
    """Of a job with an app, the keys that the user wrote: what the app says does not go before them."""


class SetFile(Struct, frozen=True, kw_only=True):
    """Several jobs of one file that belong together, as a user wrote them."""

    name: str
    together: bool
    members: tuple[tuple[str, JobFile], ...]


class Kind(Struct, frozen=True):
    """A kind of value: how it is called, how it is read, how a default is shown."""

    name: str
    read: Callable[[Any], Any]
    show: Callable[[Any], str] = str


class Key(Struct, frozen=True, kw_only=True):
    """One key of a job file."""

    section: str
    """The TOML table; "" for the top of the file."""
    name: str
    field: str
    """Of the struct of the section; "" for the context, which is no part of what is submitted as the spec."""
    kind: Kind
    doc: str

    @property
    def path(self) -> str:
        """The key with its section, as in machine.memory."""
        return f"{self.section}.{self.name}" if self.section else self.name

    @property
    def option(self) -> str:
        """The key as an option of the command line, as in --wall-time."""
        return "--" + self.name.replace("_", "-")


# ---- kinds of values: each takes what TOML or an option gave, and raises InvalidInput


def _text(value: Any) -> str:
    if not isinstance(value, str) or not _encodable(value):
        raise InvalidInput(f"{_shown(value)} is not a text", hint='in quotes, as in "tiny"')
    return value


def _encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _size(value: Any) -> int:
    if not isinstance(value, str):
        raise InvalidInput(f"{_shown(value)} is not a size", hint='a text with a unit, as in "8GiB"')
    return _bounded(parse_size, value)


def _duration(value: Any) -> float:
    if not isinstance(value, str):
        raise InvalidInput(f"{_shown(value)} is not a duration", hint='a text with a unit, as in "10m" or "1h30m"')
    return _bounded(parse_duration, value)


def _bounded(parse: Callable[[str], N], text: str) -> N:
    try:
        number = parse(text)
    except OverflowError as error:
        raise InvalidInput(f"{_shown(text)} is too large") from error
    if number > _LARGEST_NUMBER:
        raise InvalidInput(f"{_shown(text)} is too large")
    return number


def _integer(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise InvalidInput(f"{_shown(value)} is not a whole number", hint="without quotes, as in 2")
    if abs(value) > _LARGEST_NUMBER:
        raise InvalidInput("the number is too large")
    return value


def _texts(value: Any) -> tuple[str, ...]:
    if not isinstance(value, list | tuple):
        raise InvalidInput(f"{_shown(value)} is not a list", hint='as in ["**"]')
    return tuple(_text(item) for item in value)


def _variables(value: Any) -> tuple[tuple[str, str], ...]:
    """Read a table, or what several options gave: NAME=VALUE."""
    if isinstance(value, list | tuple):
        pairs = [_text(item).partition("=") for item in value]
        wrong = next((name for name, equals, _ in pairs if not equals), None)
        if wrong is not None:
            raise InvalidInput(f"{_shown(wrong)} is not NAME=VALUE", hint="as in SEED=7")
        return tuple((name, text) for name, _, text in pairs)
    if not isinstance(value, dict):
        raise InvalidInput(f"{_shown(value)} is not a table", hint='as in { SEED = "7" }')
    return tuple((name, _text(text)) for name, text in value.items())


def _flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise InvalidInput(f"{_shown(value)} is neither true nor false")
    return value


def _offers(value: Any) -> tuple[Offer, ...]:
    if not isinstance(value, list | tuple):
        raise InvalidInput(f"{_shown(value)} is not a list", hint='as in ["ssh:22"]')
    return tuple(parse_offer(_text(item)) for item in value)


def _reaches(value: Any) -> tuple[Reach, ...]:
    """Read a table, or what several options gave: NAME=SERVICE.PEER:PORT."""
    if isinstance(value, list | tuple):
        return tuple(_reach_option(_text(item)) for item in value)
    if not isinstance(value, dict):
        raise InvalidInput(f"{_shown(value)} is not a table", hint='as in { db = "db.job-41:5432" }')
    return tuple(_reach(name, service) for name, service in value.items())


def _reach_option(text: str) -> Reach:
    name, equals, service = text.partition("=")
    if not equals:
        raise InvalidInput(f"{_shown(text)} is not NAME=SERVICE.PEER:PORT", hint="as in db=db.job-41:5432")
    return _reach(name.strip(), service)


def _reach(name: str, service: Any) -> Reach:
    """Read one entry. The error's place is the entry's name, so that it can be told by its own line."""
    try:
        return parse_reach(name, _text(service))
    except InvalidInput as error:
        raise InvalidInput(error.message, where=name, hint=error.hint or 'as in db = "db.job-41:5432"') from error


def _shown_reaches(value: tuple[Reach, ...]) -> str:
    return "{" + ", ".join(f'{reach.name} = "{reach}"' for reach in value) + "}"


def _choice(allowed: type[MachineKind] | type[Network]) -> Callable[[Any], Any]:
    names = [str(member) for member in allowed]

    def read(value: Any) -> Any:
        if value not in names:
            raise InvalidInput(f"{_shown(value)} is not known", hint=_allowed(value, names))
        return allowed(value)

    return read


def _folder(value: Any) -> Path:
    text = _text(value)
    if not text or "\0" in text:
        raise InvalidInput(f"{_shown(value)} is not the name of a folder", hint='as in "context/"')
    try:
        return Path(text).expanduser()
    except RuntimeError as error:  # ~somebody who is not here
        raise InvalidInput(f"{_shown(value)}: {error}", hint='as in "context/"') from error


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:
        return False


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except OSError:  # too long a name, or a folder that we may not look into
        return False


TEXT = Kind("text", _text, lambda value: f'"{value}"')
SIZE = Kind("size", _size, lambda value: f'"{format_size(value)}"')
DURATION = Kind("duration", _duration, lambda value: f'"{format_duration(value)}"')
INTEGER = Kind("whole number", _integer)
TEXTS = Kind("list of texts", _texts, lambda value: str(list(value)).replace("'", '"'))
OFFERS = Kind("list of NAME:PORT", _offers, lambda value: TEXTS.show([str(offer) for offer in value]))
REACHES = Kind("table of NAME = SERVICE.PEER:PORT", _reaches, _shown_reaches)
FOLDER = Kind("folder", _folder)
FILE = Kind("file", _folder)
FLAG = Kind("true or false", _flag, lambda value: str(value).lower())
VARIABLES = Kind(
    "table of NAME = VALUE", _variables, lambda value: "{" + ", ".join(f'{name} = "{text}"' for name, text in value) + "}"
)

KEYS: tuple[Key, ...] = (
    Key(section="", name="name", field="name", kind=TEXT, doc="Name of the job, for people."),
    Key(
        section="",
        name="app",
        field="app",
        kind=TEXT,
        doc="App to run: name or name@version (`deskgrid app list`). What it says holds where this file says nothing.",
    ),
    Key(
        section="",
        name="command",
        field="command",
        kind=TEXTS,
        doc="Program and arguments that run in the place of /context/context.sh. In an array, `{index}` and the names of the table's columns are filled in.",
    ),
    Key(section="", name="environment", field="environment", kind=VARIABLES, doc="Variables of the command, filled in likewise."),
    Key(
        section="",
        name="fill",
        field="fill",
        kind=TEXTS,
        doc="Files of the context that are filled in likewise (`{{` for a brace).",
    ),
    Key(section="", name="group", field="group", kind=TEXT, doc="Group that the job is done for: its share of the grid counts."),
    Key(
        section="",
        name="priority",
        field="priority",
        kind=INTEGER,
        doc="Among your jobs the one with the higher number goes first.",
    ),
    Key(
        section="",
        name="after",
        field="after",
        kind=TEXTS,
        doc="Jobs and arrays that must have completed before, as `job-41` or `array-3`; if one fails, this one is cancelled.",
    ),
    Key(section="", name="after_end", field="after_end", kind=TEXTS, doc="Jobs and arrays that must have ended before, however."),
    Key(
        section="",
        name="retain",
        field="retain_s",
        kind=DURATION,
        doc="Time that results are kept; `0s`: as long as the server says.",
    ),
    Key(
        section="machine",
        name="kind",
        field="kind",
        kind=Kind('"vm", "process" or "container"', _choice(MachineKind), lambda value: f'"{value}"'),
        doc="What the job runs in: a virtual machine, a native program in a sandbox, or a container.",
    ),
    Key(
        section="machine",
        name="disk",
        field="disk",
        kind=TEXT,
        doc="Disk to boot, or image of a container: name, name@version or sha256 (`deskgrid disk list`). A process has none.",
    ),
    Key(
        section="machine",
        name="context",
        field="",
        kind=FOLDER,
        doc="Folder whose files are mounted on /context; its context.sh runs at the end of the boot. Relative to the job file.",
    ),
    Key(
        section="machine",
        name="scratch",
        field="scratch_bytes",
        kind=SIZE,
        doc="Size of the empty disk mounted on /scratch. Only what is written to it takes space.",
    ),
    Key(section="machine", name="memory", field="memory_bytes", kind=SIZE, doc="Memory of the machine."),
    Key(section="machine", name="cpus", field="cpus", kind=INTEGER, doc="CPUs of the machine."),
    Key(
        section="machine",
        name="platforms",
        field="platforms",
        kind=TEXTS,
        doc="Where a process or container may run, as `linux-x86_64`; by default anywhere that its app has files for.",
    ),
    Key(section="machine", name="need", field="need", kind=TEXTS, doc="Packages that the PC must declare."),
    Key(
        section="machine",
        name="on",
        field="on",
        kind=TEXT,
        doc="Only on this worker, as `worker:7`, or on a group's, as `group:hep`.",
    ),
    Key(
        section="machine",
        name="warm",
        field="warm",
        kind=FLAG,
        doc="Of a process: the command is a program that stays and is given one job after the other, for many short jobs.",
    ),
    Key(
        section="machine",
        name="network",
        field="network",
        kind=Kind('"none", "overlay" or "internet"', _choice(Network), lambda value: f'"{value}"'),
        doc="What the machine can reach: nothing; the services below; or public addresses besides, on PCs whose owner allows it.",
    ),
    Key(
        section="machine",
        name="offer",
        field="offer",
        kind=OFFERS,
        doc="Services of the job, as `ssh:22`: others reach them as `ssh.job-N`. Your own programs and jobs may; see `share`.",
    ),
    Key(
        section="machine",
        name="share",
        field="share",
        kind=TEXTS,
        doc="Who else may reach what is offered: `group:NAME`, `user:NAME` or `everyone`.",
    ),
    Key(
        section="machine",
        name="reach",
        field="reach",
        kind=REACHES,
        doc="Services that the job may reach, by the name and port that they have in it: `db = db.job-41:5432` of a job, "
        "`site = web.user:8000` of a program of yours (`deskgrid offer`), `grid = api.server` the grid itself, "
        "with your rights over jobs and data.",
    ),
    Key(
        section="machine",
        name="reach_wait",
        field="reach_wait_s",
        kind=DURATION,
        doc="Time that a connection waits for a service that is not there yet.",
    ),
    Key(
        section="machine",
        name="ssh_keys",
        field="ssh_keys",
        kind=TEXTS,
        doc="Public keys, lines as in authorized_keys, that may log in as root. By default your own, if the job offers `ssh`.",
    ),
    Key(
        section="limits",
        name="wall_time",
        field="wall_time_s",
        kind=DURATION,
        doc="Time that one attempt may run, from the start of its machine; time suspended does not count.",
    ),
    Key(
        section="limits",
        name="boot_time",
        field="boot_time_s",
        kind=DURATION,
        doc="Time from the start of the machine to the first sign of the agent in it.",
    ),
    Key(section="limits", name="attempts", field="attempts", kind=INTEGER, doc="Failed attempts after which the job has failed."),
    Key(
        section="limits",
        name="max_lost",
        field="max_lost",
        kind=INTEGER,
        doc="Lost attempts (a PC went away) after which the job has failed.",
    ),
    Key(
        section="limits",
        name="max_suspend",
        field="max_suspend_s",
        kind=DURATION,
        doc="Time that a suspended attempt (the PC's owner needs it) is waited for.",
    ),
    Key(
        section="limits",
        name="processes",
        field="processes",
        kind=INTEGER,
        doc="Processes and threads at the same time; not of a vm.",
    ),
    Key(
        section="limits",
        name="file_size",
        field="file_bytes",
        kind=SIZE,
        doc="Largest file that may be written; not of a vm. By default what scratch holds.",
    ),
    Key(
        section="results",
        name="paths",
        field="paths",
        kind=TEXTS,
        doc="Which files of /scratch come back: globs, `**` for all. A process may bring none.",
    ),
    Key(section="array", name="count", field="count", kind=INTEGER, doc="So many jobs, with `{index}` from 0."),
    Key(
        section="array",
        name="table",
        field="table",
        kind=FILE,
        doc="CSV file with a job a line; the first line names the columns. Relative to the job file.",
    ),
)
"""All that can be written in a job file."""

_STRUCTS: dict[str, type[Struct]] = {"": JobSpec, "machine": Machine, "limits": Limits, "results": Results, "array": ArrayPart}
_BY_PATH = {key.path: key for key in KEYS}
_BY_NAME = {key.name: key for key in KEYS}


class _Written(Struct, frozen=True):
    """A value as it was read, and where it stands, for messages about it."""

    value: Any
    where: str


# ---- what others call


def read_job(file: Path | None, options: Mapping[str, Any] | None = None) -> JobFile:
    """Read a job file; `options` (see job_from_options) win over it. Without a file, options are all there is."""
    if file is None:
        return job_from_options(options or {})
    text = _read_text(file)
    return parse_job(text, str(file), folder=file.parent, options=options)


def parse_job(text: str, source_name: str, *, folder: Path | None = None, options: Mapping[str, Any] | None = None) -> JobFile:
    """Read the text of a job file. Raise InvalidInput with `source_name`, the line and what is allowed.

    The context is looked for in `folder` (by default where `source_name` is).
    """
    lines = text.splitlines()
    beside = Path(source_name).parent if folder is None else folder

    def where(section: str, name: str) -> str:
        return f"{source_name}:{_line_of(lines, section, name)}"

    return _read_tables(_tables(text, source_name), where, beside, options)


def read_file(file: Path | None, options: Mapping[str, Any] | None = None) -> JobFile | SetFile:
    """Read a file with a job or with a set of jobs, which has [job.NAME] and takes no options."""
    if file is not None and is_set(text := _read_text(file), str(file)):
        given = [name for name, value in (options or {}).items() if value is not None]
        if given:
            raise InvalidInput("options are for one job, and this file has several", where=f"--{given[0].replace('_', '-')}")
        return parse_set(text, str(file), folder=file.parent)
    return read_job(file, options)


def is_set(text: str, source_name: str) -> bool:
    """Tell whether a file has several jobs."""
    return isinstance(_tables(text, source_name).get("job"), dict)


def parse_set(text: str, source_name: str, *, folder: Path | None = None) -> SetFile:
    """Read the text of a file with several jobs. Raise InvalidInput with `source_name`, the line and what is allowed."""
    lines, tables = text.splitlines(), _tables(text, source_name)
    beside = Path(source_name).parent if folder is None else folder
    head = tables.get("set", {})
    for name in tables.keys() - {"set", "job"}:
        place = f"{source_name}:{_line_of(lines, '', name)}"
        raise InvalidInput(
            f"unknown key {_shown(name)}", where=place, hint="in a file of several jobs each key belongs to one: [job.NAME]"
        )
    for name in head if isinstance(head, dict) else ("set",):
        if name not in ("name", "together"):
            place = f"{source_name}:{_line_of(lines, 'set', name)}"
            raise InvalidInput(f"unknown key {_shown(name)} in [set]", where=place, hint="allowed: name, together")
    members = tuple((name, _member(lines, name, table, source_name, beside)) for name, table in tables["job"].items())
    where = f"{source_name}:{_line_of(lines, 'set', 'together')}"
    try:
        together = _flag(head.get("together", False))
        return SetFile(name=_text(head.get("name", Path(source_name).stem)), together=together, members=members)
    except InvalidInput as error:
        raise InvalidInput(error.message, where=where, hint=error.hint) from error


def _member(lines: list[str], name: str, table: Any, source_name: str, beside: Path) -> JobFile:
    """Read one [job.NAME] with its sections."""

    def where(section: str, key: str) -> str:
        inside = f"job.{name}.{section}" if section else f"job.{name}"
        return f"{source_name}:{_line_of(lines, inside, key)}"

    if not isinstance(table, dict):
        raise InvalidInput(f"job.{name} is a section", where=where("", ""), hint=f"write [job.{name}] on a line of its own")
    return _read_tables(table, where, beside)


def _read_tables(
    tables: Mapping[str, Any], where: Callable[[str, str], str], beside: Path, options: Mapping[str, Any] | None = None
) -> JobFile:
    written = dict(_written(tables, where))
    for path in ("machine.context", "array.table"):
        if path in written:
            found = written[path]
            written[path] = _Written(beside / found.value, found.where)
    written.update(_from_options(options or {}))
    return _assemble(written, lambda path: where(*_split(path)))


def _tables(text: str, source_name: str) -> dict[str, Any]:
    try:
        return tomllib.loads(text)
    except RecursionError as error:
        raise InvalidInput("this is nested too deeply", where=source_name) from error
    except ValueError as error:  # TOMLDecodeError, and numbers of thousands of digits
        raise _syntax_error(error, source_name) from error


def _read_text(file: Path) -> str:
    try:
        if file.stat().st_size > _LARGEST_FILE_BYTES:
            raise InvalidInput("this is too large for a job file", where=str(file))
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InvalidInput("this is not a text in UTF-8", where=str(file)) from error
    except OSError as error:
        raise InvalidInput(f"cannot read the job file: {error.strerror}", where=str(file)) from error


def job_from_options(options: Mapping[str, Any]) -> JobFile:
    """Make a job of options: names of KEYS without section ("wall_time": "10m"); None stands for an option not given."""
    return _assemble(_from_options(options), lambda path: _BY_PATH[path].option)


def parse_defaults(tables: Mapping[str, Any], source_name: str) -> dict[str, Any]:
    """Return what a job file says as an app's defaults: keys by path, values as written. Raise InvalidInput for what cannot be one."""
    found: dict[str, Any] = {}
    for name, value in tables.items():
        if isinstance(value, dict) and name in _STRUCTS:
            found |= {f"{name}.{inner}": inner_value for inner, inner_value in value.items()}
        else:
            found[name] = value
    for path in found:
        if path not in _BY_PATH or path.startswith("array.") or path in ("app", "machine.context"):
            raise InvalidInput(
                f"{_shown(path)} cannot be a default", where=source_name, hint="keys of a job file but app, context and [array]"
            )
        _read(_BY_PATH[path], found[path], source_name, lambda _: source_name)
    return found


def with_defaults(job: JobFile, defaults: Mapping[str, Any], source_name: str) -> JobFile:
    """Return a job with an app's defaults (keys by path, values as in a file) where its user wrote nothing. Raise InvalidInput."""
    written = {}
    for path, value in defaults.items():
        if path not in _BY_PATH or path.startswith("array.") or path in ("app", "machine.context"):
            raise InvalidInput(f"{source_name} says {_shown(path)}, which is no key for that", where=source_name)
        if path not in job.written:
            key = _BY_PATH[path]
            written[key] = _read(key, value, source_name, lambda _: source_name)
    spec = job.spec
    parts = {"machine": spec.machine, "limits": spec.limits, "results": spec.results}
    top: dict[str, Any] = {}
    for key, value in written.items():
        if key.section:
            parts[key.section] = msgspec.structs.replace(parts[key.section], **{key.field: value})
        else:
            top[key.field] = value
    spec = msgspec.structs.replace(spec, **parts, **top)
    check_spec(spec, in_set=True)
    return msgspec.structs.replace(job, spec=spec)


def spec_reference() -> str:
    """Return the reference of the job file, in Markdown."""
    parts = [
        "# The job file",
        "",
        "A job file is [TOML](https://toml.io). Sizes are written as `8GiB`, durations as `10m` or `1h30m`.",
    ]
    for section in _STRUCTS:
        parts += [
            "",
            f"## [{section}]" if section else "## At the top",
            "",
            "| key | value | default | |",
            "| --- | --- | --- | --- |",
        ]
        parts += [
            f"| `{key.name}` | {key.kind.name} | {_default_text(key)} | {key.doc} |" for key in KEYS if key.section == section
        ]
    return "\n".join(parts) + "\n"


# ---- from tables and options to values


def _written(tables: Mapping[str, Any], where: Callable[[str, str], str]) -> Iterator[tuple[str, _Written]]:
    """Yield path and value of all keys. Raise InvalidInput for a key that is not known or has a wrong value."""
    for name, value in tables.items():
        if name in _STRUCTS and name:
            if not isinstance(value, dict):
                raise InvalidInput(f"{name} is a section", where=where("", name), hint=f"write [{name}] on a line of its own")
            for inner, inner_value in value.items():
                yield _value(name, inner, inner_value, where)
        else:
            yield _value("", name, value, where)


def _value(section: str, name: str, value: Any, where: Callable[[str, str], str]) -> tuple[str, _Written]:
    path = f"{section}.{name}" if section else name
    key = _BY_PATH.get(path)
    if key is None:
        place = where(section, name)
        raise InvalidInput(f"unknown key {_shown(name)}{_inside(section)}", where=place, hint=_instead(section, name))
    place = where(section, name)
    return path, _Written(_read(key, value, place, lambda entry: where(path, entry)), place)


def _read(key: Key, value: Any, where: str, entry_where: Callable[[str], str]) -> Any:
    """Read a value. An error about an entry of a table is placed at the entry."""
    try:
        return key.kind.read(value)
    except InvalidInput as error:
        message = error.message.removeprefix(f"{error.where}: ")
        place = entry_where(error.where) if error.where else where
        raise InvalidInput(_named(key, message, place), where=place, hint=error.hint) from error


def _from_options(options: Mapping[str, Any]) -> dict[str, _Written]:
    given = {_BY_NAME[name]: value for name, value in options.items() if value is not None}
    return {key.path: _from_option(key, value) for key, value in given.items()}


def _from_option(key: Key, value: Any) -> _Written:
    return _Written(_read(key, value, key.option, lambda _: key.option), key.option)


def _assemble(written: Mapping[str, _Written], where: Callable[[str], str]) -> JobFile:
    """Make the job of values that are of the right kind. Raise InvalidInput for what is missing or out of bounds."""
    kind = written["machine.kind"].value if "machine.kind" in written else MachineKind.VM
    if "machine.disk" not in written and kind is not MachineKind.PROCESS and "app" not in written:
        raise InvalidInput("a disk is needed", where=where("machine.disk"), hint='machine.disk = "tiny", or --disk tiny')
    context = written.get("machine.context")
    if context is not None and not _is_folder(context.value):
        raise InvalidInput(f"there is no folder {_shown(str(context.value))}", where=context.where, hint="with context.sh in it")
    parts: dict[str, dict[str, Any]] = {section: {} for section in _STRUCTS}
    for path, found in written.items():
        key = _BY_PATH[path]
        if key.field:
            parts[key.section][key.field] = found.value
    spec = JobSpec(
        **parts[""],
        machine=Machine(**parts["machine"]),
        limits=Limits(**parts["limits"]),
        results=Results(**parts["results"]),
    )
    try:
        if not spec.app:  # what an app says is not known yet
            check_spec(spec, in_set=True)
    except InvalidInput as error:
        raise _placed(error, written, where) from error
    array = ArrayPart(**parts["array"]) if parts["array"] else None
    _check_array(array, spec, written, where)
    return JobFile(
        spec=spec, context=context.value if context else None, array=array, written=frozenset(written) if spec.app else frozenset()
    )


def _check_array(array: ArrayPart | None, spec: JobSpec, written: Mapping[str, _Written], where: Callable[[str], str]) -> None:
    """Check what can be checked without reading the table. Raise InvalidInput."""
    if array is None:
        return
    if array.table is None and array.count < 1:
        raise InvalidInput("an array has at least one job", where=where("array.count"), hint="count = 1000, or a table")
    if array.table is not None and not _is_file(array.table):
        raise InvalidInput(
            f"there is no file {_shown(str(array.table))}", where=written["array.table"].where, hint="CSV with a line of names"
        )
    texts = (("command", spec.command), ("environment", tuple(text for _, text in spec.environment)))
    for path, values in texts:
        for text in values if not spec.machine.warm else ():
            try:
                names = placeholders(text)
            except InvalidInput as error:
                raise InvalidInput(error.message, where=where(path), hint=error.hint) from error
            unknown = [name for name in names if name != "index"] if array.table is None else []
            if unknown:
                raise InvalidInput(
                    f"nothing fills in {{{unknown[0]}}}", where=where(path), hint="{index}, or a table with that column"
                )


def _placed(error: InvalidInput, written: Mapping[str, _Written], where: Callable[[str], str]) -> DeskgridError:
    """Return an error about a field as one about the place where the user wrote it."""
    path = error.where
    message = error.message.removeprefix(f"{path}: ")
    if path not in _BY_PATH:
        return error
    place = written[path].where if path in written else where(path)
    return InvalidInput(_named(_BY_PATH[path], message, place), where=place, hint=error.hint)


def _named(key: Key, message: str, where: str) -> str:
    """Return a message that names the key, unless the place does already."""
    return message if where == key.option else f"{key.name}: {message}"


# ---- messages


def _shown(value: Any) -> str:
    """Return a value short enough for a message."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, dict):
        return "a table"
    # Python refuses to print a number of thousands of digits.
    text = "the number" if isinstance(value, int) and abs(value) > _LARGEST_NUMBER else ascii(value)
    if isinstance(value, str) and value.isprintable():
        text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _allowed(given: Any, names: Iterable[str]) -> str:
    names = list(names)
    close = difflib.get_close_matches(str(given)[:60], names, n=1)
    guess = f"did you mean {close[0]}? " if close else ""
    return f"{guess}allowed: {', '.join(names)}"


def _inside(section: str) -> str:
    return f" in [{section}]" if section else ""


def _instead(section: str, name: str) -> str:
    """Return what is allowed in a section; a key that belongs to another section is told so."""
    if name in _BY_NAME:
        key = _BY_NAME[name]
        return f"{name} belongs in [{key.section}]" if key.section else f"{name} belongs at the top of the file"
    names = [key.name for key in KEYS if key.section == section]
    return _allowed(name, names if section else [*names, *(f"[{other}]" for other in _STRUCTS if other)])


def _default_text(key: Key) -> str:
    if not key.field:
        return "none"
    default = next(field.default for field in msgspec.structs.fields(_STRUCTS[key.section]) if field.name == key.field)
    return "required" if default is msgspec.NODEFAULT else f"`{key.kind.show(default)}`"


def _syntax_error(error: ValueError, source_name: str) -> InvalidInput:
    """Return tomllib's error with the line in front, where editors and people look for it."""
    match = re.fullmatch(r"(.*) \(at line (\d+), column (\d+)\)", str(error), re.DOTALL)
    if match:
        return InvalidInput(f"not TOML: {match[1]} (column {match[3]})", where=f"{source_name}:{match[2]}")
    return InvalidInput(f"not TOML: {error}", where=source_name)


# ---- where a key stands: tomllib does not tell


_HEADER = re.compile(r"\s*\[\[?\s*(?P<name>[^\]]*?)\s*\]\]?\s*(?:#.*)?")


def _split(path: str) -> tuple[str, str]:
    section, _, name = path.rpartition(".")
    return section, name


def _line_of(lines: list[str], section: str, name: str) -> int:
    """Return the line (from 1) of a key: `name =` below [section], or section.name, else the section's, else the first.

    Good for TOML as people write it; a text over several lines that looks like TOML can mislead it.
    """
    now, section_line = "", 0
    for number, line in enumerate(lines, start=1):
        header = _HEADER.fullmatch(line)
        if header:
            now = _bare(header["name"])
            if section and now == f"{section}.{name}":
                return number
            if now == (section or name) and not section_line:
                section_line = number
            continue
        key = _bare(line.partition("=")[0]) if "=" in line else ""
        path = f"{now}.{key}" if now else key
        if key and (path == (f"{section}.{name}" if section else name) or path.startswith(f"{section or name}.{name}.")):
            return number
        if key and (path == section or path.split(".")[0] == (section or name)) and not section_line:
            section_line = number
    return section_line or 1


def _bare(name: str) -> str:
    """Return a key without quotes and spaces around its parts."""
    return ".".join(part.strip().strip("\"'") for part in name.split("."))
