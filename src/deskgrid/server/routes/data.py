"""Uploads, blobs and named data."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import re
from collections.abc import AsyncIterator

from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.responses import FileResponse, Response, StreamingResponse

from deskgrid.errors import Conflict, InvalidInput, NotFound
from deskgrid.model import wire
from deskgrid.model.data import Blob, Data
from deskgrid.model.ids import Sha256
from deskgrid.server.repository import Standing
from deskgrid.server.routes.handler import Call, Services, reads, serves, writes
from deskgrid.server.store import data
from deskgrid.server.store.accounts import Caller
from deskgrid.server.store.engine import Transaction

_SILENCE_S = 30.0
"""After which a sender of whom nothing comes has gone: a cut cable sends no goodbye, and its upload could not be continued."""


@serves(wire.BEGIN_UPLOAD)
async def begin_upload(services: Services, call: Call[wire.BeginUpload], _http: HttpRequest) -> wire.Upload:
    wanted = call.body.blob
    most = call.settings.max_bytes
    upload, remote = await services.store.write(lambda tx: data.begin_upload(tx, call.caller, wanted, max_bytes=most))
    if upload.complete and await services.repository.holds(wanted):
        return upload
    standing = await services.repository.standing(upload.id, wanted, remote, direct=call.body.direct)
    if standing.remote != remote and not await _keep_remote(services, upload.id, remote, standing):
        return wire.Upload(id=upload.id, received_bytes=0, complete=False)
    if standing.whole:
        return await _finish(services, upload.id, wanted)
    return wire.Upload(id=upload.id, received_bytes=standing.received_bytes, complete=False, parts=standing.parts)


async def _keep_remote(services: Services, upload_id: int, old: str | None, standing: Standing) -> bool:
    """Note an upload's name at the blob store; return False, and forget the name, if another call has noted one meanwhile."""
    kept = await services.store.write(lambda tx: data.set_remote(tx, upload_id, old, standing.remote))
    if kept != standing.remote and standing.remote is not None:
        await services.repository.abandon(upload_id, standing.remote)
    return kept == standing.remote


@serves(wire.UPLOAD_BYTES)
async def upload_bytes(services: Services, call: Call[bytes], http: HttpRequest) -> wire.Upload:
    upload_id = call.number("upload")
    offset = http.headers.get(wire.UPLOAD_OFFSET_HEADER, "")
    if not re.fullmatch("[0-9]{1,18}", offset):
        raise InvalidInput(f"the header {wire.UPLOAD_OFFSET_HEADER} must say where the bytes go")
    wanted, complete = await services.store.read(lambda tx: data.upload_of(tx, call.caller, upload_id))
    if complete:
        return wire.Upload(id=upload_id, received_bytes=wanted.size_bytes, complete=True)
    received = await services.repository.receive(upload_id, wanted, int(offset), _until_silent(http))
    if received < wanted.size_bytes:
        return wire.Upload(id=upload_id, received_bytes=received, complete=False)
    while (found := await _finish(services, upload_id, wanted)).checking:
        pass  # who sends by this call may know nothing of checking, but waits long for its answer
    return found


async def _until_silent(http: HttpRequest) -> AsyncIterator[bytes]:
    stream = http.stream()
    while True:
        try:
            async with asyncio.timeout(_SILENCE_S):
                piece = await anext(stream, None)
        except TimeoutError as error:
            raise ClientDisconnect from error
        if piece is None:
            return
        yield piece


async def _finish(services: Services, upload_id: int, wanted: Blob) -> wire.Upload:
    if not await services.repository.finish(upload_id, wanted):
        return wire.Upload(id=upload_id, received_bytes=wanted.size_bytes, complete=False, checking=True)
    await services.store.write(lambda tx: data.finish_upload(tx, upload_id, wanted))
    await services.repository.settled(upload_id)
    return wire.Upload(id=upload_id, received_bytes=wanted.size_bytes, complete=True)


async def keep_bytes(services: Services, caller: Caller, content: bytes) -> Blob:
    """Store bytes as if the caller had sent them. Idempotent. Raise what an upload raises."""
    blob = Blob(sha256=Sha256(hashlib.sha256(content).hexdigest()), size_bytes=len(content))
    for _ in range(_MOST_TRIES):
        with contextlib.suppress(Conflict):  # the same bytes are being kept by another call, which ends first
            return await _keep(services, caller, blob, content)
        await services.clock.sleep(_TRY_AGAIN_S)
    return await _keep(services, caller, blob, content)


_MOST_TRIES, _TRY_AGAIN_S = 20, 0.05


async def _keep(services: Services, caller: Caller, blob: Blob, content: bytes) -> Blob:
    most = services.settings.max_bytes
    upload, remote = await services.store.write(lambda tx: data.begin_upload(tx, caller, blob, max_bytes=most))
    if upload.complete and await services.repository.holds(blob):
        return blob
    standing = await services.repository.standing(upload.id, blob, remote, direct=False)
    if not standing.whole:
        await services.repository.receive(upload.id, blob, standing.received_bytes, _piece(content[standing.received_bytes :]))
    while (await _finish(services, upload.id, blob)).checking:
        pass
    return blob


async def _piece(content: bytes) -> AsyncIterator[bytes]:
    yield content


class _BlobResponse(FileResponse):
    """A file with ranges, in pieces large enough that Python's work per piece does not count."""

    chunk_size = 1 << 20


@serves(wire.GET_BLOB)
async def get_blob(services: Services, call: Call[wire.Nothing], http: HttpRequest) -> Response:
    sha256 = data.check_sha256(call.path["sha256"])
    if not await services.store.read(lambda tx: data.may_read_blob(tx, call.caller, sha256)):
        raise NotFound(f"there is no blob {sha256[:12]} for you")
    file = services.repository.file(sha256)
    if file is not None:
        return _BlobResponse(file, media_type=_BYTES)
    link = services.repository.link(sha256) if call.query.get("direct") else None
    if link is not None:
        return Response(status_code=307, headers={"Location": link, "Cache-Control": "no-store"})
    return await _streamed(services, sha256, http.headers.get("range", ""))


_BYTES = "application/octet-stream"
_RANGE = re.compile(r"bytes=(\d{1,18})-(\d{0,18})")


async def _streamed(services: Services, sha256: str, wanted: str) -> Response:
    """Pass a blob through, for programs that know nothing of the blob store. Of ranges, those are served that our programs ask for."""
    size = await services.store.read(lambda tx: data.stored_size(tx, sha256))
    if size is None:
        raise NotFound(f"the bytes of {sha256[:12]} are not in the repository")
    found = _RANGE.fullmatch(wanted)
    if found is None:
        reading = await services.repository.read(sha256, 0, None)
        return StreamingResponse(reading.chunks, headers={"Content-Length": str(size)}, media_type=_BYTES)
    if int(found[1]) >= size:
        return Response(status_code=416, headers={"Content-Range": f"bytes */{size}"})
    reading = await services.repository.read(sha256, int(found[1]), int(found[2]) if found[2] else None)
    headers = {
        "Content-Range": f"bytes {reading.first}-{reading.last}/{size}",
        "Content-Length": str(reading.last - reading.first + 1),
    }
    return StreamingResponse(reading.chunks, status_code=206, headers=headers, media_type=_BYTES)


@writes(wire.REGISTER_DATA)
def register_data(tx: Transaction, call: Call[wire.RegisterData]) -> Data:
    return data.register_data(tx, call.caller, call.body)


@reads(wire.LIST_DATA)
def list_data(tx: Transaction, call: Call[wire.Nothing]) -> wire.DataList:
    return wire.DataList(data.list_data(tx, call.caller, call.query.get("kind")))


@reads(wire.GET_DATA)
def get_data(tx: Transaction, call: Call[wire.Nothing]) -> Data:
    return data.find_data(tx, call.caller, call.path["reference"])


@writes(wire.REMOVE_DATA)
def remove_data(tx: Transaction, call: Call[wire.Nothing]) -> wire.Nothing:
    data.remove_data(tx, call.caller, call.path["reference"])
    return wire.Nothing()
