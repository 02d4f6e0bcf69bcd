"""The way to the server: HTTPS, checked against the grid's own authority, one method per kind of call.

A grid may have several server processes, each with an address. Calls go to one of them, and when that does not answer to the next.

Foreign exceptions end here: what leaves this module is DeskgridError. Calls that change something are repeated with the same
idempotency key when an answer was lost, so that each happens once.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import random
import ssl
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import aiohttp
import msgspec
from msgspec import Struct

from deskgrid import errors
from deskgrid.client.direct import BlobStore
from deskgrid.client.pace import Pace
from deskgrid.errors import Conflict, DeskgridError, InvalidInput, NotFound, ProtocolError, StoreUnavailable, Unreachable
from deskgrid.files import write_durably
from deskgrid.link import Link
from deskgrid.model import wire
from deskgrid.model.data import Blob

__all__ = ["Credentials", "Transport", "fetch_authority", "load_credentials", "save_credentials"]

A = TypeVar("A")
_CHUNK = 1 << 20
_MOST_CONNECTIONS = 1000
"""Each job or array that is waited for holds one."""
_ANSWER_LIMIT_S = 30.0
_CONNECT_LIMIT_S, _NEXT_LIMIT_S = 10.0, 4.0
"""How long a server may take to accept; the second if there is another one."""
_REMOVAL_PAUSES_S = (1.0, 2.0, 4.0, 8.0, 15.0, 30.0, 30.0, 60.0, 60.0)
"""Between tries to begin an upload whose old bytes are just being removed; that takes minutes only if a server was killed at it."""


class Credentials(Struct, frozen=True, kw_only=True):
    """Where a grid is, its authority's certificate, and a token; kept in a file only its owner can read."""

    address: str
    """HOST:PORT, or several with commas between."""
    authority_pem: str
    token: str = ""
    name: str = ""
    """Of the user or worker that the token stands for."""

    @property
    def authority(self) -> str:
        """The sha256 of the authority's certificate, as it stands in links."""
        return hashlib.sha256(ssl.PEM_cert_to_DER_cert(self.authority_pem)).hexdigest()


def load_credentials(file: Path) -> Credentials:
    """Read credentials. Raise InvalidInput if there are none."""
    try:
        return msgspec.json.decode(file.read_bytes(), type=Credentials)
    except FileNotFoundError as error:
        raise InvalidInput(
            f"no grid is known here ({file} is missing)", hint="deskgrid login LINK, or deskgrid worker join LINK"
        ) from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise InvalidInput(str(error), where=str(file)) from error


def save_credentials(file: Path, credentials: Credentials) -> None:
    """Write credentials, readable by their owner only, so that a power cut leaves them whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    write_durably(file, msgspec.json.format(msgspec.json.encode(credentials)))


async def fetch_authority(link: Link) -> Credentials:
    """Get the authority's certificate and check it against the link. Raise ProtocolError if another server answers."""
    addresses = _addresses(link.address)
    for address in addresses[:-1]:
        try:
            return await _fetch_authority(link, address)
        except Unreachable:
            continue
    return await _fetch_authority(link, addresses[-1])


async def _fetch_authority(link: Link, address: str) -> Credentials:
    unchecked = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    unchecked.check_hostname, unchecked.verify_mode = False, ssl.CERT_NONE  # what comes is checked by its sha256 below
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=_ANSWER_LIMIT_S)) as session:
        try:
            async with session.get(f"https://{address}{wire.AUTHORITY.path}", ssl=unchecked) as answer:
                pem = (await answer.content.read(1 << 16)).decode("ascii", "replace")
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            raise Unreachable(f"no deskgrid server at {address}: {error}") from error
    try:
        found = hashlib.sha256(ssl.PEM_cert_to_DER_cert(pem)).hexdigest()
    except ValueError as error:
        raise ProtocolError(f"what answers at {address} is not a deskgrid server") from error
    if found != link.authority:
        raise ProtocolError(
            f"the server at {address} is not the one of this link", hint="ask for a new link; somebody may be listening in"
        )
    return Credentials(address=link.address, authority_pem=pem)


def _addresses(text: str) -> list[str]:
    """Return each HOST:PORT of an address."""
    return [one.strip() for one in text.split(",") if one.strip()] or [text]


class Transport:
    """Calls to one grid as one holder of a token. Use as an async context manager."""

    def __init__(
        self, credentials: Credentials, *, tries: int = 3, rng: random.Random | None = None, pace: Pace | None = None
    ) -> None:
        self.credentials = credentials
        self._pace = pace
        self._tries = tries
        self._rng = rng or random.Random()  # noqa: S311 - jitter
        self._addresses = _addresses(credentials.address)
        self._at = self._rng.randrange(len(self._addresses))  # so that not all use the first server
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Transport:
        context = ssl.create_default_context(cadata=self.credentials.authority_pem)
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        headers = {wire.WIRE_VERSION_HEADER: "{}.{}".format(*wire.WIRE_VERSION)}
        if self.credentials.token:
            headers["Authorization"] = f"Bearer {self.credentials.token}"
        self._session = aiohttp.ClientSession(
            base_url=f"https://{self._addresses[0]}",
            headers=headers,
            connector=aiohttp.TCPConnector(ssl=context, limit=_MOST_CONNECTIONS),
        )
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._session is not None:
            await self._session.close()

    async def call(
        self,
        route: wire.Route[Any, A],
        body: Any = None,
        *,
        path: dict[str, object] | None = None,
        query: dict[str, object] | None = None,
        wait_s: float = 0.0,
        key: str | None = None,
    ) -> A:
        """Make one call and return its answer.

        `wait_s` is how long the server may hold the answer. Lost connections are tried again (`tries` times in all, and each server once
        more) with the same idempotency key. Raise the server's DeskgridError, Unreachable, or ProtocolError.
        """
        headers = {wire.IDEMPOTENCY_HEADER: key or uuid.uuid4().hex} if route.method is not wire.Method.GET else {}
        data = msgspec.json.encode(body) if body is not None else None
        if wait_s:
            query = {**(query or {}), "wait_s": wait_s}
        tries = self._tries + len(self._addresses) - 1
        for attempt in range(1, tries + 1):
            try:
                async with self._request(route, path, query, headers=headers, data=data, wait_s=wait_s) as answer:
                    return _decode(route, await answer.read())
            except (Unreachable, StoreUnavailable) as error:
                # A server that has lost its database may not be the only one.
                if attempt == tries or (isinstance(error, StoreUnavailable) and len(self._addresses) == 1):
                    raise
                await asyncio.sleep(self._rng.uniform(0.1, 0.3) * attempt)
        raise AssertionError

    def _go_on(self, at: int) -> None:
        """Use the next server, unless another call has gone on already."""
        if self._at == at:
            self._at = (at + 1) % len(self._addresses)

    @asynccontextmanager
    async def _request(
        self,
        route: wire.Route[Any, Any],
        path: dict[str, object] | None = None,
        query: dict[str, object] | None = None,
        *,
        headers: dict[str, str] | None = None,
        data: Any = None,
        wait_s: float = 0.0,
        allow_redirects: bool = True,
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        if self._session is None:
            raise RuntimeError("use Transport as an async context manager")
        url = route.path.format(**{name: str(value) for name, value in (path or {}).items()})
        params = {name: _query_text(value) for name, value in (query or {}).items() if value is not None}
        at = self._at
        address = self._addresses[at]
        connect_s = _CONNECT_LIMIT_S if len(self._addresses) == 1 else _NEXT_LIMIT_S
        try:
            async with self._session.request(
                route.method,
                f"https://{address}{url}",
                params=params,
                headers=headers,
                data=data,
                server_hostname=wire.SERVER_NAME,
                allow_redirects=allow_redirects,
                timeout=aiohttp.ClientTimeout(total=None, sock_connect=connect_s, sock_read=_ANSWER_LIMIT_S + wait_s),
            ) as answer:
                if answer.status >= 400:
                    raise _error_of(answer.status, await answer.read())
                yield answer
        except aiohttp.ClientConnectorCertificateError as error:
            raise ProtocolError(f"the server at {address} is not this grid's: {error}") from error
        except (aiohttp.ClientError, ConnectionError, TimeoutError, ssl.SSLError) as error:
            self._go_on(at)
            raise Unreachable(f"no answer from {address}: {error or type(error).__name__}") from error
        except (Unreachable, StoreUnavailable):
            self._go_on(at)
            raise

    async def upload(self, file: Path, blob: Blob, progress: Callable[[int], None] | None = None) -> None:
        """Send a file as `blob`, going on where an earlier try stopped. `progress` gets the bytes that the server has.

        Raise InvalidInput if the file is not what `blob` says (the server checks), FileNotFoundError if it is not there (and the server
        has not all of it), Unreachable after `tries` without progress.
        """
        failures, last = 0, -1
        while True:
            upload = await self._begin_upload(blob)
            if progress:
                progress(upload.received_bytes)
            if upload.complete:
                return
            if upload.checking:
                continue  # the server holds that answer for a while
            if file.stat().st_size != blob.size_bytes:
                raise InvalidInput(
                    f"{file.name} does not have the {blob.size_bytes} bytes announced", hint="it was changed meanwhile"
                )
            failures = failures + 1 if upload.received_bytes <= last else 0
            if failures >= self._tries:
                raise Unreachable(f"the upload of {file.name} stops at {last} of {blob.size_bytes} bytes")
            last = upload.received_bytes
            try:
                await self._send(file, blob, upload, progress)
            except (Unreachable, Conflict, NotFound):
                # Conflict: the server had more from the broken connection, or notices only now that it is broken. NotFound: of parts, another
                # program has completed this upload.
                await asyncio.sleep(self._rng.uniform(0.2, 0.6))

    async def _begin_upload(self, blob: Blob) -> wire.Upload:
        """Ask how an upload stands, while old bytes of the same blob are being removed again and again."""
        for pause_s in (*_REMOVAL_PAUSES_S, None):
            try:
                return await self.call(wire.BEGIN_UPLOAD, wire.BeginUpload(blob=blob, direct=True))
            except Conflict:
                if pause_s is None:
                    raise
                await asyncio.sleep(self._rng.uniform(0.5, 1.0) * pause_s)
        raise AssertionError

    async def _send(self, file: Path, blob: Blob, upload: wire.Upload, progress: Callable[[int], None] | None) -> None:
        """Send what comes next: to the blob store if the server names it, otherwise all the rest to the server."""
        if upload.parts:
            arrived = upload.received_bytes

            def note(size_bytes: int) -> None:
                nonlocal arrived
                arrived += size_bytes
                if progress:
                    progress(arrived)

            async with BlobStore(self._pace) as outside:
                await outside.send(file, upload.parts, note)
            return
        headers = {wire.UPLOAD_OFFSET_HEADER: str(upload.received_bytes), wire.IDEMPOTENCY_HEADER: uuid.uuid4().hex}
        body = _read_from(file, upload.received_bytes, progress, self._pace)
        async with self._request(wire.UPLOAD_BYTES, {"upload": upload.id}, headers=headers, data=body, wait_s=600) as answer:
            await answer.read()

    async def download(self, blob: Blob, file: Path, progress: Callable[[int], None] | None = None) -> None:
        """Fetch `blob` into `file`, going on after the bytes that `file` has already, and check size and sha256.

        Raise ProtocolError (and remove the file) if it is not what was asked for, Unreachable after `tries` without progress.
        """
        digest, have = hashlib.sha256(), 0
        if file.exists():
            have = await asyncio.to_thread(_hash_into, digest, file)
        elif blob.size_bytes == 0:
            file.touch()
        failures = 0
        while have < blob.size_bytes:
            before = have
            try:
                have = await self._fetch_from(blob, file, have, digest, progress)
            except Unreachable:
                have = file.stat().st_size if file.exists() else 0
                failures = failures + 1 if have == before else 0
                if failures >= self._tries:
                    raise
                digest = hashlib.sha256()
                if file.exists():
                    await asyncio.to_thread(_hash_into, digest, file)
                await asyncio.sleep(self._rng.uniform(0.2, 0.6))
        if have != blob.size_bytes or digest.hexdigest() != blob.sha256:
            file.unlink(missing_ok=True)
            raise ProtocolError(
                f"what came for {blob.sha256[:12]} is something else ({have} bytes, sha256 {digest.hexdigest()[:12]})"
            )

    async def read(self, blob: Blob, first: int, size_bytes: int) -> AsyncIterator[bytes]:
        """Yield `size_bytes` of a blob from byte `first` on. They are not checked. Raise Unreachable, or the server's DeskgridError."""
        headers = {"Range": f"bytes={first}-{first + size_bytes - 1}"}
        async with self._request(
            wire.GET_BLOB,
            {"sha256": blob.sha256},
            {"direct": True},
            headers=headers,
            allow_redirects=False,
        ) as answer:
            if not 300 <= answer.status < 400:
                async for chunk in self._ranged(answer):
                    yield chunk
                return
            place = answer.headers.get("Location", "")
        async with BlobStore(self._pace) as outside, outside.get(place, first, size_bytes) as answer:
            async for chunk in self._ranged(answer):
                yield chunk

    async def _ranged(self, answer: aiohttp.ClientResponse) -> AsyncIterator[bytes]:
        if answer.status != 206:
            raise ProtocolError("the server does not serve ranges")
        async for chunk in answer.content.iter_chunked(_CHUNK):
            if self._pace is not None:
                await self._pace.keep(len(chunk))
            yield chunk

    async def _fetch_from(self, blob: Blob, file: Path, offset: int, digest: Any, progress: Callable[[int], None] | None) -> int:
        headers = {"Range": f"bytes={offset}-"} if offset else {}
        path, query = {"sha256": blob.sha256}, {"direct": True}
        async with self._request(wire.GET_BLOB, path, query, headers=headers, allow_redirects=False) as answer:  # type: ignore[arg-type]
            if not 300 <= answer.status < 400:
                if offset and answer.status != 206:
                    raise ProtocolError("the server does not serve ranges")
                return await self._keep(answer, blob, file, offset, digest, progress)
            place = answer.headers.get("Location", "")
        async with BlobStore(self._pace) as outside, outside.get(place, offset) as answer:
            return await self._keep(answer, blob, file, offset, digest, progress)

    async def _keep(
        self,
        answer: aiohttp.ClientResponse,
        blob: Blob,
        file: Path,
        offset: int,
        digest: Any,
        progress: Callable[[int], None] | None,
    ) -> int:
        with file.open("ab") as output:
            async for chunk in answer.content.iter_chunked(_CHUNK):
                await asyncio.to_thread(_take, output, digest, chunk)
                offset += len(chunk)
                if self._pace is not None:
                    await self._pace.keep(len(chunk))
                if offset > blob.size_bytes:
                    raise ProtocolError(f"more bytes came for {blob.sha256[:12]} than it has")
                if progress:
                    progress(offset)
        return offset


def _take(output: Any, digest: Any, chunk: bytes) -> None:
    try:
        output.write(chunk)
    except OSError as error:
        raise errors.NoSpace(f"cannot write {output.name}: {error.strerror}") from error
    digest.update(chunk)


def _hash_into(digest: Any, file: Path) -> int:
    size = 0
    with file.open("rb") as source:
        while chunk := source.read(_CHUNK):
            digest.update(chunk)
            size += len(chunk)
    return size


async def _read_from(file: Path, offset: int, progress: Callable[[int], None] | None, pace: Pace | None) -> AsyncIterator[bytes]:
    with file.open("rb") as source:
        source.seek(offset)
        while chunk := await asyncio.to_thread(source.read, _CHUNK):
            yield chunk
            offset += len(chunk)
            if progress:
                progress(offset)
            if pace is not None:
                await pace.keep(len(chunk))


def _query_text(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _decode(route: wire.Route[Any, A], body: bytes) -> A:
    if route.answer is bytes:
        return body  # type: ignore[return-value]
    try:
        return msgspec.json.decode(body, type=route.answer)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ProtocolError(f"the answer to {route.name} is not understood: {error}") from error


def _error_of(status: int, body: bytes) -> DeskgridError:
    """Return the server's error as the class that it names, if that is one of ours."""
    try:
        answer = msgspec.json.decode(body, type=wire.ErrorAnswer)
    except (msgspec.DecodeError, json.JSONDecodeError):
        return Unreachable(f"the server answers {status}") if status >= 500 else ProtocolError(f"the server answers {status}")
    kind = getattr(errors, answer.error, None) if answer.error in errors.__all__ else None
    return (kind or ProtocolError)(answer.message, hint=answer.hint)
