"""An S3 server for tests: moto in a process of its own, behind a gate that checks what moto does not.

moto takes any signature, ignores that a URL has expired, and takes bodies of other sizes and sums than announced. The gate refuses as AWS says
that it does (Signature Version 4 in a query, BadDigest), so that tests see what senders are bound to; what it lets through reaches moto.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import hmac
import os
import re
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Iterator
from typing import IO
from urllib.parse import unquote

import aiohttp
from aiohttp import web
from yarl import URL

__all__ = ["ACCESS_KEY", "BUCKET", "SECRET_KEY", "S3Server", "running_moto", "running_s3"]

ACCESS_KEY, SECRET_KEY, BUCKET = "GRIDKEY", "the-secret-of-the-grid", "blobs"
_SHA256 = "x-amz-checksum-sha256"
_DROPPED = {"host", "transfer-encoding", "content-length", "connection", "content-encoding"}


class S3Server:
    """The gate. What it has seen, and what it is to do, are plain attributes."""

    def __init__(self, behind: str, *, checks_sums: bool) -> None:
        self.behind = behind
        self.checks_sums = checks_sums
        self.url = ""
        self.seen: list[tuple[str, str, dict[str, str]]] = []
        """Method, path and headers of calls by signed URLs."""
        self.refused: list[str] = []
        self.late_s = 0.0
        """Seconds that its clock is ahead: URLs expire early."""
        self.broken = 0
        """How many of the next PUTs by signed URLs are cut."""
        self._sums: dict[str, str] = {}
        self._session: aiohttp.ClientSession | None = None

    async def answer(self, request: web.Request) -> web.StreamResponse:
        """Check a call and pass it on."""
        body = await request.read()
        signed = "X-Amz-Signature" in request.query
        if signed:
            self.seen.append((request.method, request.path, {name.lower(): value for name, value in request.headers.items()}))
        if signed and request.method == "PUT" and self.broken:
            self.broken -= 1
            if request.transport is not None:
                request.transport.abort()
            return web.Response(status=500)
        wrong = (self._wrong_signature(request) if signed else "") or self._wrong_body(request, body)
        if wrong:
            self.refused.append(wrong)
            status = 400 if wrong == "BadDigest" else 403
            text = f"<?xml version='1.0'?><Error><Code>{wrong}</Code><Message>refused</Message></Error>"
            return web.Response(status=status, text=text, content_type="application/xml")
        return await self._passed_on(request, body)

    async def _passed_on(self, request: web.Request, body: bytes) -> web.StreamResponse:
        assert self._session is not None
        headers = {name: value for name, value in request.headers.items() if name.lower() not in _DROPPED}
        url = URL(self.behind + request.raw_path, encoded=True)
        async with self._session.request(request.method, url, headers=headers, data=body, allow_redirects=False) as found:
            content = await found.read()
            kept = {name: value for name, value in found.headers.items() if name.lower() not in _DROPPED}
            if request.method == "HEAD":
                kept["Content-Length"] = found.headers.get("Content-Length", "0")
                if request.path in self._sums:
                    kept |= {_SHA256: self._sums[request.path], "x-amz-checksum-type": "FULL_OBJECT"}
            if request.method == "PUT" and found.status == 200:
                self._sums.pop(request.path, None)
                if self.checks_sums and _SHA256 in request.headers:
                    self._sums[request.path] = request.headers[_SHA256]
            return web.Response(status=found.status, headers=kept, body=content)

    def _wrong_body(self, request: web.Request, body: bytes) -> str:
        wanted = request.headers.get(_SHA256)
        if not self.checks_sums or wanted is None:
            return ""
        return "" if base64.b64encode(hashlib.sha256(body).digest()).decode() == wanted else "BadDigest"

    def _wrong_signature(self, request: web.Request) -> str:
        query = request.query
        made = time.mktime(time.strptime(query["X-Amz-Date"], "%Y%m%dT%H%M%SZ")) - time.timezone
        if time.time() + self.late_s > made + int(query["X-Amz-Expires"]):
            return "AccessDenied"  # AWS: Request has expired
        path, _, raw = request.raw_path.partition("?")
        pairs = sorted(pair for pair in raw.split("&") if not pair.startswith("X-Amz-Signature="))
        names = query["X-Amz-SignedHeaders"].split(";")
        lines = "".join(f"{name}:{request.headers.get(name, '').strip()}\n" for name in names)
        canonical = "\n".join([request.method, path, "&".join(pairs), lines, ";".join(names), "UNSIGNED-PAYLOAD"])
        scope = unquote(query["X-Amz-Credential"]).partition("/")[2]
        said = ["AWS4-HMAC-SHA256", query["X-Amz-Date"], scope, hashlib.sha256(canonical.encode()).hexdigest()]
        key = b"AWS4" + SECRET_KEY.encode()
        for part in scope.split("/"):
            key = hmac.digest(key, part.encode(), "sha256")
        right = hmac.digest(key, "\n".join(said).encode(), "sha256").hex()
        return "" if right == query["X-Amz-Signature"] else "SignatureDoesNotMatch"

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[S3Server]:
        """Listen on a free loopback port until the block ends."""
        app = web.Application(client_max_size=1 << 30)
        app.router.add_route("*", "/{path:.*}", self.answer)
        runner = web.AppRunner(app, auto_decompress=False, access_log=None, shutdown_timeout=1)
        async with aiohttp.ClientSession(auto_decompress=False) as self._session:
            await runner.setup()
            try:
                site = web.TCPSite(runner, "127.0.0.1", 0)
                await site.start()
                self.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
                yield self
            finally:
                await runner.cleanup()


@contextlib.asynccontextmanager
async def running_s3(moto: str, *, checks_sums: bool = True) -> AsyncIterator[S3Server]:
    """Run an S3 server with an empty bucket in front of moto until the block ends; what moto had is gone."""
    async with S3Server(moto, checks_sums=checks_sums).running() as gate, aiohttp.ClientSession() as session:
        for method, path in (("POST", "/moto-api/reset"), ("PUT", f"/{BUCKET}")):
            async with session.request(method, moto + path) as answer:
                answer.raise_for_status()
        yield gate


@contextlib.contextmanager
def running_moto() -> Iterator[str]:
    """Run moto until the block ends; yield its address. It starts longer than most tests last, so one serves many."""
    command = [sys.executable, "-u", "-m", "moto.server", "-H", "127.0.0.1", "-p", "0"]
    environment = {**os.environ, "S3_UPLOAD_PART_MIN_SIZE": "1"}  # S3 needs 5 MiB, which tests need not send
    with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as moto:
        try:
            assert moto.stderr is not None
            yield _address_of(moto.stderr)
        finally:
            moto.kill()


def _address_of(said: IO[bytes]) -> str:
    """Return where moto listens; what it says afterwards is thrown away."""
    lines = []
    for line in said:
        lines.append(line)
        if found := re.search(rb"Running on (http://127\.0\.0\.1:[0-9]+)", line):
            threading.Thread(target=lambda: deque(said, maxlen=0), daemon=True).start()
            return found[1].decode()
    raise RuntimeError(f"moto did not start: {b''.join(lines).decode(errors='replace')}")
