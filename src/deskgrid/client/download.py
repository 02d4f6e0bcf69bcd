"""Fetching a file from the web: it goes on where it stopped, and is checked against the sha256 that the user gives.

A partial file is named by the address, and beside it lies what the web server called that state of the file (ETag or Last-Modified, RFC 9110):
sent as If-Range, it makes the server begin anew if the file has changed since.
"""

from __future__ import annotations

import asyncio
import hashlib
import random
import shutil
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from urllib.parse import unquote, urljoin, urlsplit

import aiohttp

from deskgrid.archive import out_of_space
from deskgrid.core.backoff import delay_s
from deskgrid.errors import BadImage, InvalidInput, NoSpace, NotFound, ProtocolError, Unreachable
from deskgrid.model.ids import is_sha256

__all__ = ["download", "forget_download", "is_url", "name_in", "sha256_of"]

Progress = Callable[[int, int | None], None]
_CHUNK = 1 << 20
_TRIES = 6
"""Failures in a row without a byte of progress."""
_SILENCE_S = 60.0
_SPARE_BYTES = 1 << 30
_MOST_REDIRECTS = 5
_TRANSIENT = (aiohttp.ClientError, TimeoutError, ConnectionError)


def is_url(source: str) -> bool:
    """Tell whether a source is an address on the web and not a file."""
    return source.startswith(("https://", "http://"))


def name_in(url: str) -> str:
    """Return the name of the file that an address ends with; "disk" if there is none."""
    return PurePosixPath(unquote(urlsplit(url).path)).name.replace("\0", "") or "disk"


async def download(url: str, folder: Path, *, sha256: str = "", progress: Progress | None = None, first_s: float = 0.5) -> Path:
    """Fetch `url` into `folder` and return the file. What an earlier call left there is used.

    Without TLS a sha256 must be given. `first_s` is the pause after a first failure. Raise InvalidInput, NotFound, Unreachable after some tries,
    NoSpace if less than a GiB would be left, BadImage if the sha256 is another.
    """
    if sha256 and not is_sha256(sha256):
        raise InvalidInput(f"{sha256[:80]!r} is not a sha256", where="--sha256", hint="64 digits 0-9 and a-f")
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{hashlib.sha256(url.encode()).hexdigest()[:32]}.part"
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=20, sock_read=_SILENCE_S)
    async with aiohttp.ClientSession(timeout=timeout, trust_env=True, auto_decompress=False) as session:
        failures = 0
        while True:
            before = _size(file)
            try:
                await _fetch(session, url, file, progress, checked=bool(sha256))
                break
            except _TRANSIENT as error:
                failures = failures + 1 if _size(file) <= before else 1
                if failures >= _TRIES:
                    words = str(error) or type(error).__name__
                    raise Unreachable(f"{url} cannot be fetched: {words}", hint="try again: it goes on where it stopped") from error
                await asyncio.sleep(delay_s(failures, first_s=first_s, max_s=20.0, rng=random.SystemRandom()))
    if sha256 and await asyncio.to_thread(sha256_of, file) != sha256:
        forget_download(file)
        raise BadImage("is not the file that was wanted: its sha256 is another", where=url)
    return file


async def _fetch(session: aiohttp.ClientSession, url: str, file: Path, progress: Progress | None, *, checked: bool) -> None:
    """Fetch what is missing. Raise what aiohttp raises, and errors of our own for what no other try would change."""
    tag = file.with_suffix(".tag")
    have = _size(file)
    known = tag.read_text() if tag.exists() else ""
    # Nobody could tell whether what follows belongs to what is there; a sha256 tells at the end.
    if have and not known and not checked:
        have = 0
    headers = {"Range": f"bytes={have}-", **({"If-Range": known} if known else {})} if have else {}
    async with await _get(session, url, headers, checked=checked) as answer:
        if answer.status == 416 and answer.headers.get("Content-Range") == f"bytes */{have}":
            return
        if answer.status not in (200, 206):
            _refuse(answer.status, url, file)
        have = have if answer.status == 206 else 0
        if answer.status == 206 and not answer.headers.get("Content-Range", "").startswith(f"bytes {have}-"):
            raise ProtocolError(f"{url} answers with other bytes than asked for")
        tag.write_text(_validator(answer.headers))
        whole = have + answer.content_length if answer.content_length is not None else None
        if (whole or 0) - have > (room := shutil.disk_usage(file.parent).free - _SPARE_BYTES):
            raise NoSpace("no space for the file: less than 1 GiB would be left free", hint=f"free some space in {file.parent}")
        with out_of_space("the file"), file.open("r+b" if have else "wb") as output:
            output.seek(have)
            output.truncate()
            async for data in answer.content.iter_chunked(_CHUNK):
                room -= len(data)
                if room < 0:
                    raise NoSpace(
                        "no space for the file: less than 1 GiB would be left free", hint=f"free some space in {file.parent}"
                    )
                output.write(data)
                have += len(data)
                if progress is not None:
                    progress(have, whole)


async def _get(session: aiohttp.ClientSession, url: str, headers: dict[str, str], *, checked: bool) -> aiohttp.ClientResponse:
    """Ask for a file, and where that sends us. Raise InvalidInput where the way leaves TLS and nothing would check what comes."""
    for _ in range(_MOST_REDIRECTS + 1):
        if not checked and not url.startswith("https://"):
            raise InvalidInput(
                f"{url} is without TLS, so what comes must be checked",
                where="--sha256",
                hint="an https address, or the file's sha256",
            )
        answer = await session.get(url, headers=headers, allow_redirects=False)
        if answer.status not in (301, 302, 303, 307, 308):
            return answer
        url = urljoin(url, answer.headers.get("Location", ""))
        answer.release()
        if not is_url(url):
            break
    raise ProtocolError(f"{url} leads nowhere")


def _refuse(status: int, url: str, file: Path) -> None:
    if status == 416:
        forget_download(file)  # it has become shorter
    if status in (416, 408, 425, 429) or status >= 500:
        raise aiohttp.ClientPayloadError(f"the answer is {status}")  # another try may help
    raise NotFound(f"{url} cannot be had: the answer is {status}")


def _validator(headers: aiohttp.typedefs.LooseHeaders) -> str:
    """Return what stands for this state of the file; a weak ETag does not."""
    found = {str(key).lower(): str(value) for key, value in dict(headers).items()}
    etag = found.get("etag", "")
    return etag if etag and not etag.startswith("W/") else found.get("last-modified", "")


def _size(file: Path) -> int:
    return file.stat().st_size if file.exists() else 0


def forget_download(file: Path) -> None:
    """Remove what `download` fetched."""
    file.unlink(missing_ok=True)
    file.with_suffix(".tag").unlink(missing_ok=True)


def sha256_of(file: Path) -> str:
    """Return the sha256 of a file."""
    with file.open("rb") as source:
        return hashlib.file_digest(source, "sha256").hexdigest()
