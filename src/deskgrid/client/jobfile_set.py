"""Files with several jobs that belong together: a [job.NAME] each, with sections of its own, and [set] for all."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from msgspec import Struct
from msgspec.structs import replace

from deskgrid.client.jobfile import JobFile, read_job, read_tables, read_text_file, read_toml
from deskgrid.client.jobfile_keys import BY_OPTION, read_flag, read_text, shown
from deskgrid.client.jobfile_places import line_of
from deskgrid.errors import InvalidInput

__all__ = ["SetFile", "parse_set", "read_file", "read_set"]

_MEMBER = re.compile(r"(?!(?:job|array|set)-[0-9]+$)[a-z][a-z0-9-]{0,30}")
"""Not what `after` calls a job or an array of the grid."""
_MOST_MEMBERS = 100


class SetFile(Struct, frozen=True, kw_only=True):
    """Several jobs of one file that belong together, as a user wrote them."""

    name: str
    together: bool
    members: tuple[tuple[str, JobFile], ...]


def read_file(file: Path | None, options: Mapping[str, Any] | None = None) -> JobFile | SetFile:
    """Read a file with a job or with a set of jobs, which has [job.NAME] and takes no options."""
    if file is None or not _is_set(read_toml(text := read_text_file(file), str(file))):
        return read_job(file, options)
    given = [name for name, value in (options or {}).items() if value is not None]
    if given:
        raise InvalidInput("options are for one job, and this file has several", where=BY_OPTION[given[0]].option)
    return parse_set(text, str(file), folder=file.parent)


def read_set(file: Path) -> SetFile:
    """Read a file with several jobs. Raise InvalidInput for a file with one."""
    return parse_set(read_text_file(file), str(file), folder=file.parent)


def parse_set(text: str, source_name: str, *, folder: Path | None = None) -> SetFile:
    """Read the text of a file with several jobs. Raise InvalidInput with `source_name`, the line and what is allowed."""
    return _Parser(text, source_name, Path(source_name).parent if folder is None else folder).read()


def _is_set(tables: Mapping[str, Any]) -> bool:
    return isinstance(tables.get("job"), dict)


class _Parser:
    """One file. `where` tells the line of a key in a section."""

    def __init__(self, text: str, source_name: str, beside: Path) -> None:
        self._source_name, self._beside = source_name, beside
        self._lines, self._tables = text.splitlines(), read_toml(text, source_name)

    def where(self, section: str, name: str) -> str:
        return f"{self._source_name}:{line_of(self._lines, section, name)}"

    def read(self) -> SetFile:
        if not _is_set(self._tables):
            raise InvalidInput("this is not a set of jobs", where=self._source_name, hint="it has [job.NAME] for each")
        for name in self._tables:
            if name not in ("set", "job"):
                hint = "in a file of several jobs each key belongs to one: [job.NAME]"
                raise InvalidInput(f"unknown key {shown(name)}", where=self.where("", name), hint=hint)
        name, together = self._head()
        jobs = self._tables["job"]
        if not 1 <= len(jobs) <= _MOST_MEMBERS:
            hint = f"1 to {_MOST_MEMBERS}; use [job.NAME.array] for more"
            raise InvalidInput(f"a set of {len(jobs)} jobs", where=self.where("", "job"), hint=hint)
        members = tuple((member, self._member(member, table, jobs)) for member, table in jobs.items())
        self._check_reach(members)
        return SetFile(name=name, together=together, members=members)

    def _head(self) -> tuple[str, bool]:
        head = self._tables.get("set", {})
        if not isinstance(head, dict):
            raise InvalidInput("set is a section", where=self.where("", "set"), hint="write [set] on a line of its own")
        for key in head:
            if key not in ("name", "together"):
                where = self.where("set", key)
                raise InvalidInput(f"unknown key {shown(key)} in [set]", where=where, hint="allowed: name, together")
        name = self._value(head, "name", read_text, Path(self._source_name).stem or "set")
        return name, self._value(head, "together", read_flag, False)

    def _value(self, head: Mapping[str, Any], key: str, read: Any, default: Any) -> Any:
        try:
            return read(head.get(key, default))
        except InvalidInput as error:
            raise InvalidInput(f"{key}: {error.message}", where=self.where("set", key), hint=error.hint) from error

    def _member(self, name: str, table: Any, names: Collection[str]) -> JobFile:
        """Read one [job.NAME] with its sections."""

        def where(section: str, key: str) -> str:
            return self.where(f"job.{name}.{section}" if section else f"job.{name}", key)

        here = self.where("job", name)
        if not _MEMBER.fullmatch(name):
            raise InvalidInput(
                f"{shown(name)} is not a name for a job of a set", where=here, hint="a letter, then letters, digits and -"
            )
        if not isinstance(table, dict):
            raise InvalidInput(f"job.{name} is a section", where=here, hint=f"write [job.{name}] on a line of its own")
        found = read_tables(table, where, self._beside, members=names)
        return found if "name" in table else _named(found, name)

    def _check_reach(self, members: Collection[tuple[str, JobFile]]) -> None:
        """Check that what members reach of each other is there. What an app offers is known only to the server."""
        known = dict(members)
        for name, job in members:
            for reach in job.spec.machine.reach:
                if reach.service.member is not None:
                    where = self.where(f"job.{name}.machine.reach", reach.name)
                    _check_offered(reach.service.service, reach.service.member, known, where)


def _named(job: JobFile, name: str) -> JobFile:
    """Return a job with the name that it has in its set."""
    return replace(job, spec=replace(job.spec, name=name), written=job.written | {"name"} if job.written else job.written)


def _check_offered(service: str, member: str, known: Mapping[str, JobFile], where: str) -> None:
    if member not in known:
        raise InvalidInput(f"reach: there is no {member} in this set", where=where, hint=f"one of {', '.join(sorted(known))[:200]}")
    target = known[member]
    if target.array is not None:
        raise InvalidInput(f"reach: {member} is an array, so it is not clear which of its jobs is meant", where=where)
    offers = [offer.name for offer in target.spec.machine.offer]
    if service not in offers and not target.spec.app:
        raise InvalidInput(
            f"reach: {member} does not offer {service}", where=where, hint=f"it offers {', '.join(offers)[:200] or 'nothing'}"
        )
