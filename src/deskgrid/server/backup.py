"""Backups of a grid, made while it runs, and grids made from them.

A backup is a tar in one zstd frame (with its checksum), readable by its owner only:

    manifest.json             {"format": 1, "revision", "version", "made_at", "blobs", "keys", "tables": {NAME: [COLUMN, ...]}}
    tables/NAME/000000.jsonl  rows as JSON lists in the order of the columns; bytes in base64; at most some thousands in a member
    authority/FILE            the grid's keys and certificates, if they were asked for
    blobs/SHA256              the repository's bytes, if they were asked for
    end.json                  {"rows": {NAME: COUNT}, "sequences": {NAME: LAST ID}, "sha256": {MEMBER: ..}, "missing": [SHA256, ..]}

Tables come from one snapshot, so the backup is of one moment; blobs never change, and one that was removed since is named in `missing`. The
format knows no database, so a grid that outgrew SQLite is moved to PostgreSQL by it. A restore is one transaction: the grid is there as a whole or
not at all.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import io
import os
import re
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import msgspec
import sqlalchemy as sa
from msgspec import Struct
from sqlalchemy import Connection

from deskgrid import __version__
from deskgrid.clock import SystemClock
from deskgrid.errors import InvalidInput, OperatorError, StoreUnavailable
from deskgrid.files import sync_folder
from deskgrid.server.store.engine import open_engine
from deskgrid.server.store.migrate import check_revision, migrate, revision_of

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

__all__ = ["BackupReport", "back_up", "restore"]

_FORMAT = 1
_ROWS, _LONG_ROWS = 2000, 50
"""Rows in a member: of tables with bytes in them fewer."""
_MOST_MEMBER_BYTES = 1 << 30
"""Of tables and other small members; a line of a table has at most some MiB."""
_CHUNK = 1 << 20
_REVISIONS = "alembic_version"
_PART = re.compile(r"tables/([a-z_]{1,64})/[0-9]{6,12}\.jsonl")
_BLOB = re.compile(r"blobs/([0-9a-f]{64})")
_KEY = re.compile(r"authority/([a-z]{1,32}\.(?:key|pem))")


class BackupReport(Struct, frozen=True):
    """What was written to a backup, or read from one."""

    rows: dict[str, int]
    blobs: int
    blob_bytes: int
    keys: int
    missing: tuple[str, ...]
    """Blobs that were to be in it and had been removed meanwhile."""
    made_at: float
    revision: str


class _Manifest(Struct):
    format: int
    revision: str
    version: str
    made_at: float
    blobs: bool
    keys: bool
    tables: dict[str, list[str]]


class _End(Struct):
    rows: dict[str, int] = {}
    sequences: dict[str, int] = {}
    sha256: dict[str, str] = {}
    missing: list[str] = []


# Writing


def back_up(url: str, home: Path, file: Path, *, blobs: bool = False, keys: bool = False) -> BackupReport:
    """Write a backup of the grid in `home` and the database at `url`, which may run meanwhile. `file` appears once all is on disk.

    Raise InvalidInput if `file` is there already, OperatorError if there is no grid or the file cannot be written, StoreUnavailable.
    """
    if file.exists():
        raise InvalidInput(f"{file} is there already", where=str(file), hint="choose another name, or remove it")
    engine = open_engine(url)
    try:
        with _new_file(file) as output, engine.connect() as connection, _snapshot(connection):
            return _write(connection, home, output, blobs=blobs, keys=keys)
    except sa.exc.SQLAlchemyError as error:
        raise StoreUnavailable(f"the database failed: {getattr(error, 'orig', None) or error}") from error
    except OSError as error:
        raise OperatorError(f"{file} cannot be written: {error.strerror or error}") from error
    finally:
        engine.dispose()


@contextlib.contextmanager
def _snapshot(connection: Connection) -> Iterator[None]:
    if connection.dialect.name == "postgresql":
        connection.execution_options(isolation_level="REPEATABLE READ", postgresql_readonly=True)
    with connection.begin():
        yield


@contextlib.contextmanager
def _new_file(file: Path) -> Iterator[IO[Any]]:
    """Give a file without a name, which gets its name when the block has ended well: not even a kill leaves a part of it."""
    folder = file.absolute().parent
    part = folder / f".{file.name}.part"
    try:
        descriptor, named = os.open(folder, os.O_TMPFILE | os.O_RDWR, 0o600), False
    except (AttributeError, OSError):  # another system, or a file system that cannot: then the next backup of this name removes it
        part.unlink(missing_ok=True)
        descriptor, named = os.open(part, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600), True
    try:
        with open(descriptor, "wb") as output:
            yield output
            output.flush()
            os.fsync(descriptor)
            # Unlike a rename a link never takes the place of what somebody else has put there. With src_dir_fd it follows /proc's link.
            if named:
                os.link(part, file)
            else:
                os.link(f"/proc/self/fd/{descriptor}", file, src_dir_fd=descriptor)
        sync_folder(folder)
    finally:
        part.unlink(missing_ok=True)


def _write(connection: Connection, home: Path, output: IO[Any], *, blobs: bool, keys: bool) -> BackupReport:
    revision = revision_of(connection)
    if revision is None:
        raise OperatorError("there is no grid in the database", hint="deskgrid server init")
    tables = _tables(connection)
    manifest = _Manifest(
        format=_FORMAT,
        revision=revision,
        version=__version__,
        made_at=SystemClock().now(),
        blobs=blobs,
        keys=keys,
        tables={str(table.name): [str(column.name) for column in table.columns] for table in tables},
    )
    end = _End()
    with _opened_for_writing(output) as archive:
        _add(archive, end, "manifest.json", msgspec.json.encode(manifest))
        for table in tables:
            end.rows[str(table.name)] = sum(_add_rows(archive, end, connection, table))
        end.sequences = _sequences(connection, tables)
        wrote = _add_keys(archive, end, home) if keys else 0
        sizes = list(_add_blobs(archive, end, connection, home)) if blobs else []
        _add(archive, _End(), "end.json", msgspec.json.encode(end))
    return BackupReport(
        rows=end.rows,
        blobs=len(sizes),
        blob_bytes=sum(sizes),
        keys=wrote,
        missing=tuple(end.missing),
        made_at=manifest.made_at,
        revision=revision,
    )


@contextlib.contextmanager
def _opened_for_writing(output: IO[Any]) -> Iterator[tarfile.TarFile]:
    options: dict[int, int] = {zstd.CompressionParameter.checksum_flag: 1, zstd.CompressionParameter.compression_level: 3}
    with (
        zstd.ZstdFile(output, "wb", options=options) as packed,
        tarfile.open(fileobj=packed, mode="w|", format=tarfile.PAX_FORMAT) as tar,
    ):
        yield tar


def _tables(connection: Connection) -> list[sa.Table]:
    """Return the tables as they are in the database, each after those that it refers to."""
    found = sa.MetaData()
    found.reflect(connection)
    return [table for table in found.sorted_tables if table.name != _REVISIONS]


def _add(archive: tarfile.TarFile, end: _End, name: str, content: bytes) -> None:
    end.sha256[name] = hashlib.sha256(content).hexdigest()
    member = tarfile.TarInfo(name)
    member.size, member.mode = len(content), 0o600
    archive.addfile(member, io.BytesIO(content))


def _add_rows(archive: tarfile.TarFile, end: _End, connection: Connection, table: sa.Table) -> Iterator[int]:
    at_once = _LONG_ROWS if any(isinstance(column.type, sa.LargeBinary) for column in table.columns) else _ROWS
    rows = connection.execution_options(stream_results=True, yield_per=at_once).execute(sa.select(table))
    for number, part in enumerate(rows.partitions()):
        _add(
            archive, end, f"tables/{table.name}/{number:06}.jsonl", msgspec.json.Encoder().encode_lines([list(row) for row in part])
        )
        yield len(part)


def _sequences(connection: Connection, tables: list[sa.Table]) -> dict[str, int]:
    """Return the last number given out for each table: also of rows that are gone, for none is used twice."""
    if connection.dialect.name == "sqlite":
        rows = connection.exec_driver_sql("SELECT name, seq FROM sqlite_sequence").all()
        return {name: int(last) for name, last in rows if name in {table.name for table in tables}}
    found = {}
    for table, sequence in _sequence_names(connection, tables):
        last, called = connection.exec_driver_sql(f"SELECT last_value, is_called FROM {sequence}").one()  # noqa: S608 - the database's own name
        found[str(table.name)] = int(last) if called else int(last) - 1
    return found


def _sequence_names(connection: Connection, tables: list[sa.Table]) -> Iterator[tuple[sa.Table, str]]:
    for table in tables:
        if "id" in table.columns:
            name = connection.execute(sa.select(sa.func.pg_get_serial_sequence(f'"{table.name}"', "id"))).scalar()
            if name is not None:
                yield table, str(name)


def _add_keys(archive: tarfile.TarFile, end: _End, home: Path) -> int:
    found = sorted(file for file in (home / "authority").glob("*") if _KEY.fullmatch(f"authority/{file.name}"))
    if home / "authority" / "authority.pem" not in found:
        raise OperatorError(f"the keys of the grid are not in {home}", hint="name its folder with --home")
    for file in found:
        _add(archive, end, f"authority/{file.name}", file.read_bytes())
    return len(found)


def _add_blobs(archive: tarfile.TarFile, end: _End, connection: Connection, home: Path) -> Iterator[int]:
    """Add the bytes of all blobs; yield their sizes."""
    table = sa.table("blob", sa.column("sha256"), sa.column("size_bytes"))
    for sha256, size_bytes in connection.execute(sa.select(table)).all():
        try:
            source = (home / "blobs" / sha256[:2] / sha256).open("rb")
        except FileNotFoundError:
            end.missing.append(sha256)
            continue
        with source:
            member = tarfile.TarInfo(f"blobs/{sha256}")
            member.size, member.mode = size_bytes, 0o400
            archive.addfile(member, source)
        yield size_bytes


# Reading


def restore(url: str, home: Path, file: Path) -> BackupReport:
    """Make a grid from a backup, in an empty database; blobs and keys that are in it go to `home`. No server may run there.

    Raise InvalidInput if the file is no backup or the database is not empty, OperatorError if the backup is damaged, is of a newer
    deskgrid, or `home` has other keys. Then nothing has changed.
    """
    try:
        with file.open("rb") as source, zstd.ZstdFile(source) as packed, tarfile.open(fileobj=packed, mode="r|") as archive:
            return _Restore(archive, packed, url, home).run()
    except FileNotFoundError as error:
        raise InvalidInput(f"there is no {file}", where=str(file)) from error
    except (tarfile.TarError, zstd.ZstdError, EOFError, msgspec.DecodeError, UnicodeDecodeError) as error:
        raise OperatorError(f"{file} is damaged, or no backup", hint="take another one") from error
    except sa.exc.SQLAlchemyError as error:
        raise StoreUnavailable(f"the database failed: {getattr(error, 'orig', None) or error}") from error
    except OSError as error:
        raise OperatorError(f"{file} cannot be restored: {error.strerror or error}") from error


class _Restore:
    """One backup on its way into a database and a folder."""

    def __init__(self, archive: tarfile.TarFile, packed: zstd.ZstdFile, url: str, home: Path) -> None:
        self._archive = archive
        self._packed = packed
        self._url = url
        self._home = home
        self._read = _End()
        self._made: list[Path] = []
        """Files that are removed if it fails."""
        self._blob_bytes = self._blobs = self._keys = 0

    def run(self) -> BackupReport:
        members = iter(self._archive)
        manifest = self._manifest(next(members, None))
        engine = open_engine(self._url, foreign_keys=False)
        try:
            with engine.connect() as connection:
                _require_empty(connection)
            migrate(self._url, to=manifest.revision)
            with engine.connect().execution_options(deskgrid_write=True) as connection, connection.begin():
                end = self._fill(connection, manifest, members)
        except BaseException:
            for made in reversed(self._made):
                made.unlink(missing_ok=True)
            raise
        finally:
            engine.dispose()
        migrate(self._url)
        return BackupReport(
            rows=end.rows,
            blobs=self._blobs,
            blob_bytes=self._blob_bytes,
            keys=self._keys,
            missing=tuple(end.missing),
            made_at=manifest.made_at,
            revision=manifest.revision,
        )

    def _manifest(self, member: tarfile.TarInfo | None) -> _Manifest:
        if member is None or member.name != "manifest.json":
            raise InvalidInput("this is not a backup of a grid")
        content = self._content(member)
        if msgspec.json.decode(content, type=dict[str, Any]).get("format") != _FORMAT:
            raise OperatorError("the backup is of a newer deskgrid", hint="update this one")
        manifest = msgspec.json.decode(content, type=_Manifest)
        check_revision(manifest.revision)
        return manifest

    def _fill(self, connection: Connection, manifest: _Manifest, members: Iterator[tarfile.TarInfo]) -> _End:
        tables = {table.name: table for table in _tables(connection)}
        tables = {name: _in_order(tables, name, columns) for name, columns in manifest.tables.items()}
        for member in members:
            if member.name == "end.json":
                end = msgspec.json.decode(self._content(member), type=_End)
                self._check(end)
                if next(members, None) is not None:
                    raise OperatorError("the backup goes on after its end", hint="take another one")
                while self._packed.read(_CHUNK):  # up to the checksum of the whole
                    pass
                _set_sequences(connection, list(tables.values()), end.sequences)
                return end
            self._take(connection, tables, member)
        raise OperatorError("the backup has no end", hint="take another one")

    def _take(self, connection: Connection, tables: dict[str, sa.Table], member: tarfile.TarInfo) -> None:
        if part := _PART.fullmatch(member.name):
            if part[1] not in tables:
                raise OperatorError(f"the backup has an unknown table {part[1]}", hint="take another one")
            self._insert(connection, tables[part[1]], self._content(member))
        elif blob := _BLOB.fullmatch(member.name):
            self._keep_blob(member, blob[1])
        elif key := _KEY.fullmatch(member.name):
            self._keep_key(key[1], self._content(member))
        else:
            raise OperatorError(f"the backup has an unknown member {member.name[:80]!r}", hint="update this deskgrid")

    def _content(self, member: tarfile.TarInfo) -> bytes:
        source = self._archive.extractfile(member) if member.isreg() and member.size <= _MOST_MEMBER_BYTES else None
        content = source.read() if source is not None else b""
        if source is None or len(content) != member.size:
            raise OperatorError("the backup is damaged", hint="take another one")
        self._read.sha256[member.name] = hashlib.sha256(content).hexdigest()
        return content

    def _insert(self, connection: Connection, table: sa.Table, content: bytes) -> None:
        decoders = [_decoder(column) for column in table.columns]
        names = [column.name for column in table.columns]
        rows = [
            {name: decode(value) for name, decode, value in zip(names, decoders, row, strict=True)}
            for row in msgspec.json.Decoder(list[Any]).decode_lines(content)
        ]
        self._read.rows[table.name] = self._read.rows.get(table.name, 0) + len(rows)
        if rows:
            connection.execute(sa.insert(table), rows)

    def _keep_blob(self, member: tarfile.TarInfo, sha256: str) -> None:
        place = self._home / "blobs" / sha256[:2] / sha256
        source = self._archive.extractfile(member)
        if source is None:
            raise OperatorError("the backup is damaged", hint="take another one")
        self._blobs += 1
        self._blob_bytes += member.size
        if place.is_file() and place.stat().st_size == member.size:
            return
        place.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        part = place.with_name(f".{sha256}.part")
        self._made.append(part)
        digest = hashlib.sha256()
        with part.open("wb") as output:
            while chunk := source.read(_CHUNK):
                digest.update(chunk)
                output.write(chunk)
            output.flush()
            os.fsync(output.fileno())
        if digest.hexdigest() != sha256:
            raise OperatorError(f"the backup's bytes of {sha256[:12]} are damaged", hint="take another one")
        part.chmod(0o444)
        self._made.append(place)
        part.replace(place)
        sync_folder(place.parent)

    def _keep_key(self, name: str, content: bytes) -> None:
        file = self._home / "authority" / name
        self._keys += 1
        if file.exists():
            if file.read_bytes() == content:
                return
            raise OperatorError(f"{file} is another key than the backup's", hint="restore into another folder")
        file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._made.append(file)
        with open(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as output:
            output.write(content)
            output.flush()
            os.fsync(output.fileno())

    def _check(self, end: _End) -> None:
        read = {name: digest for name, digest in self._read.sha256.items() if name != "end.json"}
        rows = {name: count for name, count in end.rows.items() if count}
        if read != end.sha256 or self._read.rows != rows:
            raise OperatorError("the backup is damaged: it does not have what its end says", hint="take another one")


def _in_order(tables: dict[str, sa.Table], name: str, columns: list[str]) -> sa.Table:
    """Return a table with its columns in the order of the backup: databases that were upgraded may have another one."""
    if name not in tables or {column.name for column in tables[name].columns} != set(columns):
        raise OperatorError(f"the backup's table {name[:64]!r} does not fit its revision", hint="take another one")
    return sa.Table(name, sa.MetaData(), *(sa.Column(column, tables[name].c[column].type) for column in columns))


def _decoder(column: sa.Column[Any]) -> Any:
    if isinstance(column.type, sa.LargeBinary):
        return lambda value: None if value is None else base64.b64decode(value)
    if isinstance(column.type, sa.Boolean):
        return lambda value: None if value is None else bool(value)
    return lambda value: value


def _require_empty(connection: Connection) -> None:
    """Raise InvalidInput if there is a grid in the database."""
    for table in _tables(connection):
        if connection.execute(sa.select(sa.literal(1)).select_from(table).limit(1)).first() is not None:
            raise InvalidInput("the database is not empty", where="database", hint="restore into a new one")


def _set_sequences(connection: Connection, tables: list[sa.Table], sequences: dict[str, int]) -> None:
    if connection.dialect.name == "sqlite":
        for table in tables:
            if table.name in sequences:
                connection.exec_driver_sql("DELETE FROM sqlite_sequence WHERE name = ?", (table.name,))
                connection.exec_driver_sql(
                    "INSERT INTO sqlite_sequence (name, seq) VALUES (?, ?)", (table.name, sequences[table.name])
                )
        return
    for table, sequence in _sequence_names(connection, tables):
        last = max(sequences.get(table.name, 0), connection.execute(sa.select(sa.func.max(table.c.id))).scalar() or 0)
        if last > 0:
            connection.execute(sa.select(sa.func.setval(sequence, last, True)))
