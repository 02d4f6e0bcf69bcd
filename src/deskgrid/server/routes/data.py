"""Uploads, blobs and named data."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.responses import FileResponse

from deskgrid.errors import InvalidInput, NotFound
from deskgrid.model import wire
from deskgrid.model.data import Blob, Data
from deskgrid.server.routes.handler import Call, Services, reads, serves, writes
from deskgrid.server.store import data
from deskgrid.server.store.engine import Transaction

_SILENCE_S = 30.0
"""After which a sender of whom nothing comes has gone: a cut cable sends no goodbye, and its upload could not be continued."""


@serves(wire.BEGIN_UPLOAD)
async def begin_upload(services: Services, call: Call[wire.BeginUpload], _http: HttpRequest) -> wire.Upload:
    wanted = call.body.blob
    upload = await services.store.write(lambda tx: data.begin_upload(tx, call.caller, wanted))
    if upload.complete and services.repository.holds(wanted):
        return upload
    received = services.repository.received_bytes(upload.id)
    if received == 0:
        services.repository.admit(wanted)
    if received == wanted.size_bytes:
        return await _finish(services, upload.id, wanted)
    return wire.Upload(id=upload.id, received_bytes=received, complete=False)


@serves(wire.UPLOAD_BYTES)
async def upload_bytes(services: Services, call: Call[bytes], http: HttpRequest) -> wire.Upload:
    upload_id = call.number("upload")
    offset = http.headers.get(wire.UPLOAD_OFFSET_HEADER, "")
    if not offset.isdecimal():
        raise InvalidInput(f"the header {wire.UPLOAD_OFFSET_HEADER} must say where the bytes go")
    wanted, complete = await services.store.read(lambda tx: data.upload_of(tx, call.caller, upload_id))
    if complete:
        return wire.Upload(id=upload_id, received_bytes=wanted.size_bytes, complete=True)
    received = await services.repository.receive(upload_id, wanted, int(offset), _until_silent(http))
    if received == wanted.size_bytes:
        return await _finish(services, upload_id, wanted)
    return wire.Upload(id=upload_id, received_bytes=received, complete=False)


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
    await services.repository.finish(upload_id, wanted)
    await services.store.write(lambda tx: data.finish_upload(tx, upload_id, wanted))
    return wire.Upload(id=upload_id, received_bytes=wanted.size_bytes, complete=True)


class _BlobResponse(FileResponse):
    """A file with ranges, in pieces large enough that Python's work per piece does not count."""

    chunk_size = 1 << 20


@serves(wire.GET_BLOB)
async def get_blob(services: Services, call: Call[wire.Nothing], _http: HttpRequest) -> FileResponse:
    sha256 = data.check_sha256(call.path["sha256"])
    if not await services.store.read(lambda tx: data.may_read_blob(tx, call.caller, sha256)):
        raise NotFound(f"there is no blob {sha256[:12]} for you")
    return _BlobResponse(services.repository.path(sha256), media_type="application/octet-stream")


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
