"""Bytes straight to and from the grid's blob store, by URLs that the server has signed for one call each.

That host is another one than the grid's server: it is checked with the system's trust, it gets no token of the grid's, and what comes from it
counts only once its sha256 is right.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from urllib.parse import urlsplit

import aiohttp
from yarl import URL

from deskgrid.client.pace import Pace
from deskgrid.errors import DeskgridError, InvalidInput, NotFound, ProtocolError, Unreachable
from deskgrid.model.wire import UploadPart

__all__ = ["BlobStore"]

_CHUNK = 1 << 20
_AT_ONCE = 4
"""Parts that are sent at the same time."""
_SILENCE_S = 60.0


class BlobStore:
    """Calls to a blob store. Use as an async context manager."""

    def __init__(self, pace: Pace | None = None) -> None:
        self._pace = pace
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> BlobStore:
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(ssl=ssl.create_default_context()),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=10, sock_read=_SILENCE_S),
            cookie_jar=aiohttp.DummyCookieJar(),
            auto_decompress=False,
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._session is not None:
            await self._session.close()

    async def send(self, file: Path, parts: Sequence[UploadPart], sent: Callable[[int], None]) -> None:
        """Send parts of a file; `sent` gets the bytes of each part that has arrived.

        Raise InvalidInput if the store finds them to be others than announced, Unreachable (also when a URL has expired: ask for new ones).
        """
        free = asyncio.Semaphore(_AT_ONCE)

        async def put(part: UploadPart) -> None:
            async with free:
                await self._put(file, part)
            sent(part.size_bytes)

        # All are waited for: those that arrive need not be sent again when another fails.
        ends = await asyncio.gather(*[put(part) for part in parts], return_exceptions=True)
        failed = [end for end in ends if isinstance(end, BaseException)]
        for end in sorted(failed, key=lambda end: isinstance(end, DeskgridError)):
            raise end

    async def _put(self, file: Path, part: UploadPart) -> None:
        headers = {**part.headers, "Content-Length": str(part.size_bytes)}
        async with self._request("PUT", part.url, headers, _read(file, part.offset, part.size_bytes, self._pace)):
            return

    @asynccontextmanager
    async def get(self, url: str, offset: int, size_bytes: int | None = None) -> AsyncIterator[aiohttp.ClientResponse]:
        """Read an object from a byte on, `size_bytes` or to its end. Raise NotFound, Unreachable (also when the URL has expired: ask for a new one)."""
        ranged = offset or size_bytes is not None
        last = "" if size_bytes is None else offset + size_bytes - 1
        headers = {"Range": f"bytes={offset}-{last}"} if ranged else {}
        async with self._request("GET", url, headers) as answer:
            if ranged and answer.status != 206:
                raise ProtocolError("the blob store does not serve ranges")
            yield answer

    @asynccontextmanager
    async def _request(
        self, method: str, url: str, headers: dict[str, str], data: AsyncIterator[bytes] | None = None
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        if self._session is None:
            raise RuntimeError("use BlobStore as an async context manager")
        host = urlsplit(url).hostname
        if urlsplit(url).scheme not in ("http", "https"):
            raise ProtocolError("the server names a blob store that is not reached by HTTP")
        try:
            async with self._session.request(
                method,
                URL(url, encoded=True),  # as it was signed
                headers=headers,
                data=data,
                allow_redirects=False,
                skip_auto_headers=("Content-Type",),
            ) as answer:
                if answer.status >= 300:
                    raise _refusal(answer.status, host)
                yield answer
        except aiohttp.ClientConnectorCertificateError as error:
            raise ProtocolError(f"the blob store {host} is not trusted: {error.certificate_error}") from error
        except (aiohttp.ClientError, ConnectionError, TimeoutError, ssl.SSLError) as error:
            raise Unreachable(f"no answer from the blob store {host}: {type(error).__name__}") from error


def _refusal(status: int, host: str | None) -> DeskgridError:
    """Return what a status means. The URL is in no message: who has it may do what it was signed for."""
    if status == 400:
        return InvalidInput("the blob store finds other bytes than announced", hint="was the file changed meanwhile?")
    if status == 404:
        return NotFound(f"the blob store {host} does not have that")
    return Unreachable(f"the blob store {host} answers {status}")


async def _read(file: Path, offset: int, size: int, pace: Pace | None) -> AsyncIterator[bytes]:
    with file.open("rb") as source:
        source.seek(offset)
        while size and (chunk := await asyncio.to_thread(source.read, min(_CHUNK, size))):
            yield chunk
            size -= len(chunk)
            if pace is not None:
                await pace.keep(len(chunk))
