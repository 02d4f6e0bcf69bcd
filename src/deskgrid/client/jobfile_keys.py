"""The keys of a job file: where each stands, what kind of value it takes, what it means.

Parsing (jobfile.py), the options of the command line and the reference page are derived from `KEYS`.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import msgspec
from msgspec import Struct

from deskgrid.errors import InvalidInput
from deskgrid.model.jobs import JobSpec, Limits, Machine, Results
from deskgrid.model.machines import MachineKind, Network
from deskgrid.model.overlay import Offer, Reach, parse_offer, parse_reach
from deskgrid.units import format_duration, format_size, parse_duration, parse_size

__all__ = [
    "BY_NAME",
    "BY_OPTION",
    "BY_PATH",
    "KEYS",
    "STRUCTS",
    "ArrayPart",
    "Key",
    "Kind",
    "SecretsPart",
    "allowed_names",
    "read_flag",
    "read_text",
    "shown",
    "spec_reference",
]

N = TypeVar("N", int, float)
T = TypeVar("T")
_LARGEST_NUMBER = 1 << 62


class ArrayPart(Struct, frozen=True, kw_only=True):
    """Many jobs of one file."""

    count: int = 0
    """How many; 0: one for each line of the table."""
    table: Path | None = None
    """A CSV file, on the user's PC: one job a line, the columns named by the first."""
    names: tuple[str, ...] = ()
    """The columns of the table."""


class SecretsPart(Struct, frozen=True, kw_only=True):
    """What only the job and those who are trusted with it may see."""

    files: tuple[tuple[str, Path], ...] = ()
    """Name in the job, and file on the user's PC."""
    trust: tuple[str, ...] = ("mine",)
    """Of a job without secrets, if it is not written: everyone."""


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
    option_name: str = ""
    """As an option, where that is not the key's name."""

    @property
    def given(self) -> str:
        """The key among the options of a program, as in wall_time."""
        return self.option_name or self.name

    @property
    def path(self) -> str:
        """The key with its section, as in machine.memory."""
        return f"{self.section}.{self.name}" if self.section else self.name

    @property
    def option(self) -> str:
        """The key as an option of the command line, as in --wall-time."""
        return "--" + self.given.replace("_", "-")


# ---- kinds of values: each takes what TOML or an option gave, and raises InvalidInput


def read_text(value: Any) -> str:
    """Read a text. Raise InvalidInput."""
    if not isinstance(value, str) or not _encodable(value):
        raise InvalidInput(f"{shown(value)} is not a text", hint='in quotes, as in "tiny"')
    return value


def _encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _size(value: Any) -> int:
    if not isinstance(value, str):
        raise InvalidInput(f"{shown(value)} is not a size", hint='a text with a unit, as in "8GiB"')
    return _bounded(parse_size, value)


def _duration(value: Any) -> float:
    if not isinstance(value, str):
        raise InvalidInput(f"{shown(value)} is not a duration", hint='a text with a unit, as in "10m" or "1h30m"')
    return _bounded(parse_duration, value)


def _bounded(parse: Callable[[str], N], text: str) -> N:
    try:
        number = parse(text)
    except OverflowError as error:
        raise InvalidInput(f"{shown(text)} is too large") from error
    if number > _LARGEST_NUMBER:
        raise InvalidInput(f"{shown(text)} is too large")
    return number


def _integer(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise InvalidInput(f"{shown(value)} is not a whole number", hint="without quotes, as in 2")
    if abs(value) > _LARGEST_NUMBER:
        raise InvalidInput("the number is too large")
    return value


def _texts(value: Any) -> tuple[str, ...]:
    if not isinstance(value, list | tuple):
        raise InvalidInput(f"{shown(value)} is not a list", hint='as in ["**"]')
    return tuple(read_text(item) for item in value)


def _after(value: Any) -> tuple[str, ...]:
    if not isinstance(value, list | tuple):
        raise InvalidInput(f"{shown(value)} is not a list", hint='as in ["job-41"]')
    for item in value:
        number = str(item) if isinstance(item, int) and not isinstance(item, bool) and 0 < item < _LARGEST_NUMBER else item
        if isinstance(number, str) and number.isascii() and number.isdecimal():
            raise InvalidInput(f"{number[:18]} may be a job or an array", hint=f'"job-{number[:18]}" or "array-{number[:18]}"')
    return tuple(read_text(item) for item in value)


def _entries(value: Any, read: Callable[[str, Any], T], *, form: str, option: str, table: str) -> tuple[tuple[str, T], ...]:
    """Read a table, or what several options gave: NAME=SOMETHING, as `form` says. The examples are for the hints."""
    if isinstance(value, list | tuple):
        pairs = [read_text(item).partition("=") for item in value]
        wrong = next((name for name, equals, _ in pairs if not equals), None)
        if wrong is not None:
            raise InvalidInput(f"{shown(wrong)} is not NAME={form}", hint=f"as in {option}")
        return tuple((name, read(name, text)) for name, _, text in pairs)
    if not isinstance(value, dict):
        raise InvalidInput(f"{shown(value)} is not a table", hint=f"as in {{ {table} }}")
    return tuple((read_text(name), read(name, text)) for name, text in value.items())


def _text_of(name: str, text: Any, hint: str) -> str:
    """Read one entry. The error's place is the entry's name, so that it can be told by its own line."""
    try:
        return read_text(text)
    except InvalidInput as error:
        raise InvalidInput(error.message, where=name, hint=hint) from error


def _variables(value: Any) -> tuple[tuple[str, str], ...]:
    return _entries(value, partial(_text_of, hint='as in SEED = "7"'), form="VALUE", option="SEED=7", table='SEED = "7"')


def _data(value: Any) -> tuple[tuple[str, str], ...]:
    hint = 'as in "events.root" = "run-7": a name with a dot stands in quotes'
    table = '"events.root" = "run-7"'
    return _entries(value, partial(_text_of, hint=hint), form="DATA", option="events.root=run-7", table=table)


def read_flag(value: Any) -> bool:
    """Read true or false. Raise InvalidInput."""
    if not isinstance(value, bool):
        raise InvalidInput(f"{shown(value)} is neither true nor false")
    return value


def _offers(value: Any) -> tuple[Offer, ...]:
    if not isinstance(value, list | tuple):
        raise InvalidInput(f"{shown(value)} is not a list", hint='as in ["ssh:22"]')
    return tuple(parse_offer(read_text(item)) for item in value)


def _reaches(value: Any) -> tuple[Reach, ...]:
    form, table = "SERVICE.PEER:PORT", 'db = "db.job-41:5432"'
    return tuple(reach for _, reach in _entries(value, _reach, form=form, option="db=db.job-41:5432", table=table))


def _reach(name: str, service: Any) -> Reach:
    """Read one entry. The error's place is the entry's name, so that it can be told by its own line."""
    try:
        return parse_reach(name.strip(), read_text(service))
    except InvalidInput as error:
        raise InvalidInput(error.message, where=name, hint=error.hint or 'as in db = "db.job-41:5432"') from error


def _shown_reaches(value: tuple[Reach, ...]) -> str:
    return "{" + ", ".join(f'{reach.name} = "{reach}"' for reach in value) + "}"


def _choice(allowed: type[MachineKind] | type[Network]) -> Callable[[Any], Any]:
    names = [str(member) for member in allowed]

    def read(value: Any) -> Any:
        if value not in names:
            raise InvalidInput(f"{shown(value)} is not known", hint=allowed_names(value, names))
        return allowed(value)

    return read


def _folder(value: Any) -> Path:
    text = read_text(value)
    if not text or "\0" in text:
        raise InvalidInput(f"{shown(value)} is not the name of a folder", hint='as in "context/"')
    try:
        return Path(text).expanduser()
    except RuntimeError as error:  # ~somebody who is not here
        raise InvalidInput(f"{shown(value)}: {error}", hint='as in "context/"') from error


def _files(value: Any) -> tuple[tuple[str, Path], ...]:
    return _entries(value, _file_of, form="FILE", option="token=token.txt", table='token = "token.txt"')


def _file_of(name: str, file: Any) -> Path:
    """Read the file of one entry. The error's place is the entry's name, so that it can be told by its own line."""
    try:
        return _folder(file)
    except InvalidInput as error:
        raise InvalidInput(f"{shown(file)} is not the name of a file", where=name, hint='as in token = "token.txt"') from error


TEXT = Kind("text", read_text, lambda value: f'"{value}"')
SIZE = Kind("size", _size, lambda value: f'"{format_size(value)}"')
DURATION = Kind("duration", _duration, lambda value: f'"{format_duration(value)}"')
INTEGER = Kind("whole number", _integer)
TEXTS = Kind("list of texts", _texts, lambda value: str(list(value)).replace("'", '"'))
AFTER = Kind("list of job-N and array-N", _after, TEXTS.show)
OFFERS = Kind("list of NAME:PORT", _offers, lambda value: TEXTS.show([str(offer) for offer in value]))
REACHES = Kind("table of NAME = SERVICE.PEER:PORT", _reaches, _shown_reaches)
FOLDER = Kind("folder", _folder)
FILE = Kind("file", _folder)
FILES = Kind("table of NAME = FILE", _files, lambda value: "{" + ", ".join(f'{name} = "{file}"' for name, file in value) + "}")
DATA = Kind("table of NAME = DATA", _data, lambda value: "{" + ", ".join(f'"{name}" = "{text}"' for name, text in value) + "}")
FLAG = Kind("true or false", read_flag, lambda value: str(value).lower())
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
    Key(
        section="",
        name="data",
        field="data",
        kind=DATA,
        doc="Data of the grid that the job finds as files `/context/data/NAME`; with `name@version` or a sha256 always the same. Workers that have it "
        "go first, and fetch it from each other. All jobs of an array have the same.",
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
        name="pilot",
        field="pilot",
        kind=FLAG,
        doc="The job is a worker: its own token lets it join, once in each attempt, and opens nothing else (`deskgrid pilot submit`).",
    ),
    Key(
        section="",
        name="after",
        field="after",
        kind=AFTER,
        doc="Jobs and arrays that must have completed before, as `job-41` or `array-3`; if one fails, this one is cancelled. "
        "In a set also names of its jobs.",
    ),
    Key(
        section="",
        name="after_end",
        field="after_end",
        kind=AFTER,
        doc="Jobs and arrays that must have ended before, however.",
    ),
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
    Key(
        section="machine",
        name="driver",
        field="driver",
        kind=TEXT,
        doc="Only by this driver: qemu, virtualbox, process or container; without it by the best that a PC has.",
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
        "with your rights over jobs and data, `cache = cache.worker` the cache of the PC, for a worker in the job; in a set `db = db.store.set:5432` of its job `store`.",
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
    Key(
        section="array",
        name="count",
        field="count",
        kind=INTEGER,
        doc="So many jobs, with `{index}` from 0.",
        option_name="array",
    ),
    Key(
        section="array",
        name="table",
        field="table",
        kind=FILE,
        doc="CSV file with a job a line; the first line names the columns. Relative to the job file.",
    ),
    Key(
        section="secrets",
        name="files",
        field="files",
        kind=FILES,
        doc="Files that the job finds as `/context/secrets/NAME`, sealed on the way: no PC but those of `trust` and nothing on the server's disk can "
        "read them. At most 64 KiB together. Relative to the job file.",
        option_name="secret",
    ),
    Key(
        section="secrets",
        name="trust",
        field="trust",
        kind=TEXTS,
        doc="Whose PCs the job may run on: `mine`, `user:NAME`, `group:NAME`, `everyone`. Their owners can see the secrets. "
        "A job without secrets runs anywhere if this is not given.",
    ),
)
"""All that can be written in a job file."""

STRUCTS: dict[str, type[Struct]] = {
    "": JobSpec,
    "machine": Machine,
    "limits": Limits,
    "results": Results,
    "array": ArrayPart,
    "secrets": SecretsPart,
}
BY_PATH = {key.path: key for key in KEYS}
BY_NAME = {key.name: key for key in KEYS}
BY_OPTION = {key.given: key for key in KEYS}


def spec_reference() -> str:
    """Return the reference of the job file, in Markdown."""
    parts = [
        "# The job file",
        "",
        "A job file is [TOML](https://toml.io). Sizes are written as `8GiB`, durations as `10m` or `1h30m`.",
    ]
    for section in STRUCTS:
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


def _default_text(key: Key) -> str:
    if not key.field:
        return "none"
    default = next(field.default for field in msgspec.structs.fields(STRUCTS[key.section]) if field.name == key.field)
    return "required" if default is msgspec.NODEFAULT else f"`{key.kind.show(default)}`"


# ---- messages


def shown(value: Any) -> str:
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


def allowed_names(given: Any, names: Iterable[str]) -> str:
    """Return a hint with what is allowed, and what was meant if that can be guessed."""
    names = list(names)
    close = difflib.get_close_matches(str(given)[:60], names, n=1)
    guess = f"did you mean {close[0]}? " if close else ""
    return f"{guess}allowed: {', '.join(names)}"
