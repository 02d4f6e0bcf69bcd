"""Job files: what a user writes in TOML, or as options, becomes a JobSpec, a context folder and, with [array], many jobs.

`KEYS` (jobfile_keys.py) lists all that can be written. A file is read without running anything and whole: the first thing that is wrong is
refused with its line and what is allowed. Files with several jobs: jobfile_set.py.
"""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec
from msgspec import Struct

from deskgrid.client.filling import check_filling
from deskgrid.client.jobfile_keys import (
    BY_NAME,
    BY_OPTION,
    BY_PATH,
    KEYS,
    STRUCTS,
    ArrayPart,
    Key,
    SecretsPart,
    allowed_names,
    shown,
    spec_reference,
)
from deskgrid.client.jobfile_places import line_of, split_path, syntax_error
from deskgrid.client.secret_files import check_files
from deskgrid.client.tables import read_columns
from deskgrid.core.submission import check_array, check_spec
from deskgrid.errors import DeskgridError, InvalidInput
from deskgrid.model.jobs import JobSpec, Limits, Machine, Results
from deskgrid.model.machines import MachineKind

__all__ = [
    "KEYS",
    "ArrayPart",
    "JobFile",
    "as_written",
    "job_from_options",
    "parse_defaults",
    "parse_job",
    "read_job",
    "read_tables",
    "read_text_file",
    "read_toml",
    "spec_reference",
    "with_defaults",
]

_LARGEST_FILE_BYTES = 1 << 20
_AFTER = re.compile(r"(job|array)-[1-9][0-9]{0,17}")


class JobFile(Struct, frozen=True, kw_only=True):
    """A job, or an array of jobs, as a user wrote it."""

    spec: JobSpec
    context: Path | None = None
    """The context folder, on the user's PC."""
    array: ArrayPart | None = None
    secrets: tuple[tuple[str, Path], ...] = ()
    """Names, as in the spec, and files on the user's PC."""
    written: frozenset[str] = frozenset()
    """Of a job with an app, the keys that the user wrote: what the app says does not go before them."""


class _Written(Struct, frozen=True):
    """A value as it was read, and where it stands, for messages about it."""

    value: Any
    where: str


# ---- what others call


def read_job(file: Path | None, options: Mapping[str, Any] | None = None) -> JobFile:
    """Read a job file; `options` (see job_from_options) win over it. Without a file, options are all there is."""
    if file is None:
        return job_from_options(options or {})
    text = read_text_file(file)
    return parse_job(text, str(file), folder=file.parent, options=options)


def parse_job(text: str, source_name: str, *, folder: Path | None = None, options: Mapping[str, Any] | None = None) -> JobFile:
    """Read the text of a job file. Raise InvalidInput with `source_name`, the line and what is allowed.

    The context is looked for in `folder` (by default where `source_name` is).
    """
    lines = text.splitlines()
    beside = Path(source_name).parent if folder is None else folder

    def where(section: str, name: str) -> str:
        return f"{source_name}:{line_of(lines, section, name)}"

    return read_tables(read_toml(text, source_name), where, beside, options)


def read_tables(
    tables: Mapping[str, Any],
    where: Callable[[str, str], str],
    beside: Path,
    options: Mapping[str, Any] | None = None,
    *,
    members: Collection[str] | None = None,
) -> JobFile:
    """Make a job of TOML's tables. `where` tells the place of a key in a section; files are looked for `beside`; options win.

    `members`: names of the jobs of its set, itself too; None: it is in none. Raise InvalidInput.
    """
    written = dict(_written(tables, where))
    for path in ("machine.context", "array.table"):
        if path in written:
            found = written[path]
            written[path] = _Written(beside / found.value, found.where)
    if "secrets.files" in written:
        found = written["secrets.files"]
        written["secrets.files"] = _Written(tuple((name, beside / file) for name, file in found.value), found.where)
    written.update(_from_options(options or {}))
    return _assemble(written, lambda path: where(*split_path(path)), members)


def read_toml(text: str, source_name: str) -> dict[str, Any]:
    """Return TOML's tables. Raise InvalidInput with the line."""
    try:
        return tomllib.loads(text)
    except RecursionError as error:
        raise InvalidInput("this is nested too deeply", where=source_name) from error
    except ValueError as error:  # TOMLDecodeError, and numbers of thousands of digits
        raise syntax_error(error, source_name) from error


def read_text_file(file: Path) -> str:
    """Return the text of a job file. Raise InvalidInput for what cannot be one."""
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
    return _assemble(_from_options(options), lambda path: BY_PATH[path].option, None)


def as_written(options: dict[str, Any]) -> dict[str, Any]:
    """Return options of a program as those of the command line: lists as tuples of texts, tables as NAME=VALUE."""
    found: dict[str, Any] = {}
    for name, value in options.items():
        if isinstance(value, dict):
            found[name] = tuple(f"{key}={one}" for key, one in value.items())
        elif isinstance(value, (list, tuple)):
            found[name] = tuple(str(one) for one in value)
        else:
            found[name] = str(value) if isinstance(value, Path) else value
    return found


def parse_defaults(tables: Mapping[str, Any], source_name: str) -> dict[str, Any]:
    """Return what a job file says as an app's defaults: keys by path, values as written. Raise InvalidInput for what cannot be one."""
    found: dict[str, Any] = {}
    for name, value in tables.items():
        if isinstance(value, dict) and name in STRUCTS:
            found |= {f"{name}.{inner}": inner_value for inner, inner_value in value.items()}
        else:
            found[name] = value
    for path, value in found.items():
        _read_default(path, value, source_name)
    return found


def _read_default(path: str, value: Any, source_name: str) -> Any:
    if path not in BY_PATH or path.startswith(("array.", "secrets.")) or path in _NO_DEFAULTS:
        hint = "keys of a job file but app, context, [array], [secrets], after and after_end"
        raise InvalidInput(f"{shown(path)} cannot be a default", where=source_name, hint=hint)
    return _read(BY_PATH[path], value, source_name, lambda _: source_name)


_NO_DEFAULTS = ("app", "machine.context", "after", "after_end")


def with_defaults(job: JobFile, defaults: Mapping[str, Any], source_name: str, *, in_set: bool = False) -> JobFile:
    """Return a job with an app's defaults (keys by path, values as in a file) where its user wrote nothing. Raise InvalidInput."""
    fields: dict[str, dict[str, Any]] = {section: {} for section in STRUCTS}
    for path, value in defaults.items():
        read = _read_default(path, value, source_name)
        if path not in job.written:
            fields[BY_PATH[path].section][BY_PATH[path].field] = read
    spec = job.spec
    parts = {name: msgspec.structs.replace(getattr(spec, name), **fields[name]) for name in ("machine", "limits", "results")}
    spec = msgspec.structs.replace(spec, **parts, **fields[""])
    check_spec(spec, in_set=in_set)
    if job.array is not None:
        check_filling(spec, job.array.names, job.context, lambda path: path if _top(path) in job.written else source_name)
    return msgspec.structs.replace(job, spec=spec)


def _top(path: str) -> str:
    """Return the key of environment.NAME."""
    return path.partition(".")[0]


# ---- from tables and options to values


def _written(tables: Mapping[str, Any], where: Callable[[str, str], str]) -> Iterator[tuple[str, _Written]]:
    """Yield path and value of all keys. Raise InvalidInput for a key that is not known or has a wrong value."""
    for name, value in tables.items():
        if name in STRUCTS and name:
            if not isinstance(value, dict):
                raise InvalidInput(f"{name} is a section", where=where("", name), hint=f"write [{name}] on a line of its own")
            for inner, inner_value in value.items():
                yield _value(name, inner, inner_value, where)
        else:
            yield _value("", name, value, where)


def _value(section: str, name: str, value: Any, where: Callable[[str, str], str]) -> tuple[str, _Written]:
    path = f"{section}.{name}" if section else name
    key = BY_PATH.get(path)
    if key is None:
        place = where(section, name)
        raise InvalidInput(f"unknown key {shown(name)}{_inside(section)}", where=place, hint=_instead(section, name))
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
    for name in options.keys() - BY_OPTION.keys():
        raise InvalidInput(f"unknown option {shown(name)}", where=shown(name), hint=f"allowed: {', '.join(sorted(BY_OPTION))}")
    given = {BY_OPTION[name]: value for name, value in options.items() if value is not None}
    return {key.path: _from_option(key, value) for key, value in given.items()}


def _from_option(key: Key, value: Any) -> _Written:
    return _Written(_read(key, value, key.option, lambda _: key.option), key.option)


def _assemble(written: Mapping[str, _Written], where: Callable[[str], str], members: Collection[str] | None) -> JobFile:
    """Make the job of values that are of the right kind. Raise InvalidInput for what is missing or out of bounds."""
    kind = written["machine.kind"].value if "machine.kind" in written else MachineKind.VM
    if "machine.disk" not in written and kind is not MachineKind.PROCESS and "app" not in written:
        raise InvalidInput("a disk is needed", where=where("machine.disk"), hint='machine.disk = "tiny", or --disk tiny')
    context = written.get("machine.context")
    if context is not None and not _is_folder(context.value):
        raise InvalidInput(f"there is no folder {shown(str(context.value))}", where=context.where, hint="with context.sh in it")
    parts: dict[str, dict[str, Any]] = {section: {} for section in STRUCTS}
    for path, found in written.items():
        key = BY_PATH[path]
        if key.field:
            parts[key.section][key.field] = found.value
    private = SecretsPart(**parts["secrets"])
    spec = JobSpec(
        **parts[""],
        secrets=tuple(name for name, _ in private.files),
        trust=private.trust if private.files or "secrets.trust" in written else (),
        machine=Machine(**parts["machine"]),
        limits=Limits(**parts["limits"]),
        results=Results(**parts["results"]),
    )
    array = _array(parts["array"], written) if parts["array"] else None
    job = JobFile(
        spec=spec,
        context=context.value if context else None,
        array=array,
        secrets=private.files,
        written=frozenset(written) if spec.app else frozenset(),
    )
    _check(job, written, where, members)
    if spec.data and job.context is not None and os.path.lexists(job.context / "data"):
        message = f"{job.context} has 'data', which is where the job finds its data"
        raise InvalidInput(message, where=written["data"].where, hint="give it another name")
    check_files(job.secrets, job.context, written["secrets.files"].where if job.secrets else "")
    return job


def _check(job: JobFile, written: Mapping[str, _Written], where: Callable[[str], str], members: Collection[str] | None) -> None:
    """Check what can be without asking the grid. Raise InvalidInput at the place where the user wrote it."""

    def place(path: str) -> str:
        top = written.get(_top(path))
        # An entry of a table has a line of its own, but as an option no other name than the table.
        return written[path].where if path in written else top.where if top and top.where.startswith("--") else where(path)

    spec = job.spec
    try:
        if not spec.app:  # what an app says is not known yet
            check_spec(spec, in_set=members is not None)
    except InvalidInput as error:
        raise _placed(error, written, where) from error
    _check_after(spec, place, members)
    if job.array is None and spec.fill:
        raise InvalidInput("only in an array is something filled in", where=place("fill"), hint="[array] count or table")
    if job.array is not None and not spec.app:
        check_filling(spec, job.array.names, job.context, place)


def _array(values: Mapping[str, Any], written: Mapping[str, _Written]) -> ArrayPart:
    """Return the array with its columns; the lines of its table are read when it is submitted. Raise InvalidInput."""
    array = ArrayPart(**values)
    if array.count or array.table is None:
        try:
            check_array(array.count, (), has_table=False)
        except InvalidInput as error:
            place = written["array.count"].where if "array.count" in written else written["array.table"].where
            message = error.message.removeprefix(f"{error.where}: ")
            raise InvalidInput(message, where=place, hint=error.hint) from error
    if array.table is None:
        return array
    if not _is_file(array.table):
        place = written["array.table"].where
        raise InvalidInput(f"there is no file {shown(str(array.table))}", where=place, hint="CSV with a line of names")
    return msgspec.structs.replace(array, names=read_columns(array.table))


def _check_after(spec: JobSpec, where: Callable[[str], str], members: Collection[str] | None) -> None:
    for path, names in (("after", spec.after), ("after_end", spec.after_end)):
        for name in names:
            if not _AFTER.fullmatch(name) and name not in (members or ()):
                hint = "as in job-41 or array-3" + (f", or one of {', '.join(sorted(members))[:200]}" if members else "")
                raise InvalidInput(f"after: {shown(name)} is neither a job nor an array", where=where(path), hint=hint)


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # too long a name, or a folder that we may not look into
        return False


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except (OSError, ValueError):
        return False


def _placed(error: InvalidInput, written: Mapping[str, _Written], where: Callable[[str], str]) -> DeskgridError:
    """Return an error about a field as one about the place where the user wrote it."""
    path = error.where
    message = error.message.removeprefix(f"{path}: ")
    if path not in BY_PATH:
        return error
    place = written[path].where if path in written else where(path)
    return InvalidInput(_named(BY_PATH[path], message, place), where=place, hint=error.hint)


def _named(key: Key, message: str, where: str) -> str:
    """Return a message that names the key, unless the place does already."""
    return message if where == key.option else f"{key.name}: {message}"


def _inside(section: str) -> str:
    return f" in [{section}]" if section else ""


def _instead(section: str, name: str) -> str:
    """Return what is allowed in a section; a key that belongs to another section is told so."""
    if name in BY_NAME:
        key = BY_NAME[name]
        return f"{name} belongs in [{key.section}]" if key.section else f"{name} belongs at the top of the file"
    names = [key.name for key in KEYS if key.section == section]
    return allowed_names(name, names if section else [*names, *(f"[{other}]" for other in STRUCTS if other)])
