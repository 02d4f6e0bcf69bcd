"""The repository at an S3 store: bytes go to it and come from it by signed URLs, past the server.

    PREFIX blobs/ab/abcd...      a blob, whole and verified
    PREFIX uploads/17            the bytes of upload 17, whole but not verified (or a multipart upload under that name)
    HOME/uploads/17              what a program sends through the server that does not know of URLs
    HOME/fetched/abcd...         a few blobs that the server itself reads

What a sender may write to is his upload, never a blob: a blob appears by a copy within the store after its bytes were verified. Their sha256
is known without reading them if the store computed it itself (a single PUT, whose signed header has the sum, at a store that was seen at the
start to refuse a wrong one); otherwise the server reads them once. `finish` may be repeated, also after a kill: what is verified stays in
`uploads` until the store knows that the upload is complete.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import os
from collections.abc import AsyncIterator, Iterable
from pathlib import Path
from typing import Any

import structlog

from deskgrid.errors import Conflict, DeskgridError, InvalidInput, NotFound, StoreUnavailable
from deskgrid.model.data import Blob
from deskgrid.model.ids import Sha256
from deskgrid.model.wire import UploadPart
from deskgrid.server.repository import Reading, Standing, check_size
from deskgrid.server.repository_local import LocalRepository
from deskgrid.server.s3 import Bucket, open_bucket, part_bytes

__all__ = ["S3Repository", "open_s3"]

_SINGLE_BYTES = 16 << 20
"""Largest blob that is sent in one piece."""
_PARTS_AT_ONCE = 64
_LINK_S = 900.0
"""Seconds that a URL is good for; then it is asked for anew."""
_HOLD_S = 15.0
_READ_BYTES = 4 << 20
_COPY_BYTES = 5 << 30
"""What S3 copies in one call."""
_MOST_FETCHED_BYTES = 4 << 30
_log = structlog.get_logger("deskgrid.server")


class S3Repository:
    """Blobs at an S3 store; see Repository."""

    def __init__(self, home: Path, bucket: Bucket, inbox: LocalRepository, *, max_bytes: int, trusts_sums: bool) -> None:
        self._bucket = bucket
        self._inbox = inbox
        self.max_bytes = max_bytes
        self._trusts_sums = trusts_sums
        self._fetched = home / "fetched"
        self._fetched.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._fetching = asyncio.Lock()
        self._checks: dict[int, asyncio.Task[None]] = {}
        self.place = f"S3 bucket {bucket.address.bucket}"

    async def holds(self, blob: Blob) -> bool:
        """See Repository."""
        found = await self._bucket.size_and_sum(self._place(blob.sha256))
        return found is not None and found[0] == blob.size_bytes

    def link(self, sha256: str) -> str | None:
        """See Repository."""
        return self._bucket.sign("get_object", _LINK_S, Key=self._place(sha256))

    def file(self, sha256: str) -> Path | None:
        """See Repository."""
        return None

    async def read(self, sha256: str, first: int, last: int | None) -> Reading:
        """See Repository."""
        key = self._place(sha256)
        found = await self._bucket.size_and_sum(key)
        if found is None:
            raise NotFound(f"the bytes of {sha256[:12]} are not in the repository")
        end = found[0] - 1 if last is None else min(last, found[0] - 1)
        if first > end and found[0]:
            raise InvalidInput(f"the blob has {found[0]} bytes")
        parameters = {"Range": f"bytes={first}-{end}"} if found[0] else {}
        return Reading(first, end, self._bucket.chunks(key, _READ_BYTES, **parameters))

    async def local_path(self, blob: Blob) -> Path:
        """See Repository. A few files are kept, as whoever reads a table comes again for its next lines."""
        target = self._fetched / blob.sha256
        async with self._fetching:
            if target.exists():
                os.utime(target)
                return target
            if blob.size_bytes > _MOST_FETCHED_BYTES:
                raise InvalidInput(f"{blob.size_bytes} bytes are too many to be read here", hint=f"at most {_MOST_FETCHED_BYTES}")
            self._make_room(blob.size_bytes)
            partial = target.with_suffix(".new")
            await self._fetch(blob, partial)
            partial.replace(target)
            return target

    def _make_room(self, size_bytes: int) -> None:
        kept = sorted(((file.stat(), file) for file in self._fetched.iterdir()), key=lambda found: found[0].st_mtime)
        total = sum(found.st_size for found, _ in kept)
        for found, file in kept:
            if total + size_bytes > _MOST_FETCHED_BYTES or file.suffix:
                file.unlink(missing_ok=True)
                total -= found.st_size

    async def _fetch(self, blob: Blob, file: Path) -> None:
        digest = hashlib.sha256()
        try:
            with file.open("wb") as output:
                async for piece in self._bucket.chunks(self._place(blob.sha256), _READ_BYTES):
                    digest.update(piece)
                    output.write(piece)
        except LookupError as error:
            raise NotFound(f"the bytes of {blob.sha256[:12]} are not in the repository") from error
        except OSError as error:
            raise StoreUnavailable(f"{file.parent} cannot be written: {error.strerror}") from error
        if digest.hexdigest() != blob.sha256:
            raise StoreUnavailable(f"the S3 store has other bytes under {blob.sha256[:12]}", hint="remove that object")

    def free_bytes(self) -> int:
        """See Repository."""
        return self._inbox.free_bytes()

    # Uploads

    async def standing(self, upload_id: int, blob: Blob, remote: str | None, *, direct: bool) -> Standing:
        """See Repository."""
        check_size(blob, self.max_bytes)
        if upload_id in self._checks:
            return Standing(received_bytes=blob.size_bytes, whole=True, remote=remote)
        if not direct or blob.size_bytes == 0:
            return await self._inbox.standing(upload_id, blob, remote, direct=False)
        staged = await self._bucket.size_and_sum(self._staged(upload_id))
        if staged is not None and staged[0] == blob.size_bytes:
            return Standing(received_bytes=blob.size_bytes, whole=True, remote=remote)
        if blob.size_bytes <= _SINGLE_BYTES:
            return Standing(received_bytes=0, whole=False, parts=(self._whole(upload_id, blob),), remote=remote)
        return await self._multipart(upload_id, blob, remote)

    def _whole(self, upload_id: int, blob: Blob) -> UploadPart:
        total = base64.b64encode(bytes.fromhex(blob.sha256)).decode()
        url = self._bucket.sign(
            "put_object", _LINK_S, Key=self._staged(upload_id), ContentLength=blob.size_bytes, ChecksumSHA256=total
        )
        return UploadPart(offset=0, size_bytes=blob.size_bytes, url=url, headers={"x-amz-checksum-sha256": total})

    async def _multipart(self, upload_id: int, blob: Blob, remote: str | None) -> Standing:
        """Return which parts are missing; once none is, make them one object."""
        key = self._staged(upload_id)
        there = None if remote is None else await self._parts_there(key, remote)
        if remote is None or there is None:
            remote, there = (await self._bucket.call("create_multipart_upload", Key=key))["UploadId"], {}
        step = part_bytes(blob.size_bytes)
        sizes = {n: min(step, blob.size_bytes - at) for n, at in enumerate(range(0, blob.size_bytes, step), 1)}
        missing = [number for number, size in sizes.items() if number not in there or there[number][0] != size]
        received = blob.size_bytes - sum(sizes[number] for number in missing)
        if missing:
            parts = tuple(
                UploadPart(
                    offset=(number - 1) * step,
                    size_bytes=sizes[number],
                    url=self._bucket.sign(
                        "upload_part",
                        _LINK_S,
                        Key=key,
                        UploadId=remote,
                        PartNumber=number,
                        ContentLength=sizes[number],
                    ),
                )
                for number in missing[:_PARTS_AT_ONCE]
            )
            return Standing(received_bytes=received, whole=False, parts=parts, remote=remote)
        named = [{"PartNumber": number, "ETag": there[number][1]} for number in sizes]
        try:
            await self._bucket.call("complete_multipart_upload", Key=key, UploadId=remote, MultipartUpload={"Parts": named})
        except LookupError:  # another process was quicker
            return Standing(received_bytes=0, whole=False, remote=remote)
        return Standing(received_bytes=blob.size_bytes, whole=True, remote=remote)

    async def _parts_there(self, key: str, remote: str) -> dict[int, tuple[int, str]] | None:
        try:
            pages = await self._bucket.pages("list_parts", Key=key, UploadId=remote)
        except LookupError:
            return None
        return {part["PartNumber"]: (int(part["Size"]), part["ETag"]) for page in pages for part in page.get("Parts", ())}

    async def receive(self, upload_id: int, blob: Blob, offset: int, chunks: AsyncIterator[bytes]) -> int:
        """See Repository."""
        return await self._inbox.receive(upload_id, blob, offset, chunks)

    async def finish(self, upload_id: int, blob: Blob) -> bool:
        """See Repository. Reading many bytes takes long: it goes on between the calls."""
        task = self._checks.get(upload_id)
        if task is None:
            task = self._checks[upload_id] = asyncio.create_task(self._check(upload_id, blob))
        await asyncio.wait([task], timeout=_HOLD_S)
        if not task.done():
            return False
        self._checks.pop(upload_id, None)
        task.result()
        return True

    async def _check(self, upload_id: int, blob: Blob) -> None:
        if blob.size_bytes == 0 or self._inbox.received_bytes(upload_id) == blob.size_bytes:
            part = await self._inbox.verified(upload_id, blob)
            await self._bucket.send_file(self._place(blob.sha256), part)
            return
        key = self._staged(upload_id)
        staged = await self._bucket.size_and_sum(key)
        if staged is None or staged[0] != blob.size_bytes:
            # That the blob is there says nothing of what was sent: they were wrong, or another process was quicker and has noted so.
            raise Conflict("the bytes of this upload have gone", hint="ask where it stands and go on there")
        _, mark, total = staged
        found = base64.b64decode(total).hex() if total and self._trusts_sums else await self._digest(key, mark)
        if found != blob.sha256:
            await self._bucket.remove(key)
            raise InvalidInput(f"the bytes that came have the sha256 {found[:12]}, not {blob.sha256[:12]}", hint="send them again")
        if not await self.holds(blob):
            await self._copy(key, mark, blob)

    async def _digest(self, key: str, mark: str) -> str:
        digest = hashlib.sha256()
        async for piece in self._bucket.chunks(key, _READ_BYTES, IfMatch=mark):
            await asyncio.to_thread(digest.update, piece)
        return digest.hexdigest()

    async def _copy(self, key: str, mark: str, blob: Blob) -> None:
        """Copy what was verified, and nothing that was put in its place since then."""
        place = self._place(blob.sha256)
        source = {"Bucket": self._bucket.address.bucket, "Key": key}
        if blob.size_bytes <= _COPY_BYTES:
            await self._bucket.call("copy_object", Key=place, CopySource=source, CopySourceIfMatch=mark)
            return
        remote = (await self._bucket.call("create_multipart_upload", Key=place))["UploadId"]
        try:
            done = []
            for number, first in enumerate(range(0, blob.size_bytes, _COPY_BYTES), 1):
                last = min(first + _COPY_BYTES, blob.size_bytes) - 1
                part = await self._bucket.call(
                    "upload_part_copy",
                    Key=place,
                    UploadId=remote,
                    PartNumber=number,
                    CopySource=source,
                    CopySourceIfMatch=mark,
                    CopySourceRange=f"bytes={first}-{last}",
                )
                done.append({"PartNumber": number, "ETag": part["CopyPartResult"]["ETag"]})
            await self._bucket.call("complete_multipart_upload", Key=place, UploadId=remote, MultipartUpload={"Parts": done})
        except BaseException:
            await self._bucket.call("abort_multipart_upload", Key=place, UploadId=remote)
            raise

    async def settled(self, upload_id: int) -> None:
        """See Repository."""
        await self._inbox.forget_uploads([upload_id])
        try:
            await self._bucket.remove(self._staged(upload_id))
        except DeskgridError as error:  # it goes with the upload's row
            _log.warning("an upload could not be removed", upload=upload_id, error=error.message)

    async def abandon(self, upload_id: int, remote: str) -> None:
        """See Repository."""
        try:
            await self._bucket.call("abort_multipart_upload", Key=self._staged(upload_id), UploadId=remote)
        except LookupError:
            return

    # Removing

    async def remove(self, sha256: str) -> None:
        """See Repository."""
        (self._fetched / sha256).unlink(missing_ok=True)
        await self._bucket.remove(self._place(sha256))

    async def upload_ids(self) -> set[int]:
        """See Repository."""
        start = self._staged("")
        found = await self._inbox.upload_ids()
        for page in await self._bucket.pages("list_objects_v2", Prefix=start):
            found |= _numbers(page.get("Contents", ()), start)
        for page in await self._bucket.pages("list_multipart_uploads", Prefix=start):
            found |= _numbers(page.get("Uploads", ()), start)
        return found

    async def forget_uploads(self, upload_ids: Iterable[int]) -> None:
        """See Repository."""
        wanted = set(upload_ids)
        await self._inbox.forget_uploads(wanted)
        if not wanted:
            return
        for page in await self._bucket.pages("list_multipart_uploads", Prefix=self._staged("")):
            for begun in page.get("Uploads", ()):
                for upload_id in _numbers([begun], self._staged("")) & wanted:
                    await self.abandon(upload_id, begun["UploadId"])
        for upload_id in wanted:
            await self._bucket.remove(self._staged(upload_id))

    async def blobs(self) -> AsyncIterator[list[Blob]]:
        """See Repository."""
        after = ""
        while True:
            page = await self._bucket.call("list_objects_v2", Prefix=f"{self._bucket.address.prefix}blobs/", StartAfter=after)
            found = page.get("Contents", [])
            if not found:
                return
            after = found[-1]["Key"]
            names = ((each["Key"].rpartition("/")[2], int(each["Size"])) for each in found)
            yield [Blob(sha256=Sha256(name), size_bytes=size) for name, size in names if len(name) == 64]

    async def close(self) -> None:
        """See Repository."""
        for task in self._checks.values():
            task.cancel()
        if self._checks:
            await asyncio.wait(self._checks.values())
        self._checks.clear()
        await self._bucket.close()

    def _place(self, sha256: str) -> str:
        return f"{self._bucket.address.prefix}blobs/{sha256[:2]}/{sha256}"

    def _staged(self, upload_id: int | str) -> str:
        return f"{self._bucket.address.prefix}uploads/{upload_id}"


def _numbers(found: Iterable[Any], start: str) -> set[int]:
    names = (each["Key"].removeprefix(start) for each in found)
    return {int(name) for name in names if name.isdecimal() and len(name) < 19}


async def open_s3(home: Path, address: str, inbox: LocalRepository) -> S3Repository:
    """Open a repository at an S3 store. Raise OperatorError if it cannot be used."""
    bucket = await open_bucket(home, address)
    trusts = await _refuses_wrong_sum(bucket)
    _log.info("blobs are at an S3 store", bucket=bucket.address.bucket, checks_sums=trusts)
    return S3Repository(home, bucket, inbox, max_bytes=inbox.max_bytes, trusts_sums=trusts)


async def _refuses_wrong_sum(bucket: Bucket) -> bool:
    """Try whether the store checks a PUT's x-amz-checksum-sha256: many that speak S3 keep silent about a wrong one."""
    key = f"{bucket.address.prefix}uploads/probe"
    wrong = base64.b64encode(hashlib.sha256(b"other bytes").digest()).decode()
    try:
        await bucket.call("put_object", Key=key, Body=b"bytes", ChecksumSHA256=wrong)
    except StoreUnavailable:
        right = base64.b64encode(hashlib.sha256(b"bytes").digest()).decode()
        await bucket.call("put_object", Key=key, Body=b"bytes", ChecksumSHA256=right)  # otherwise it refuses whatever is written
        found = await bucket.size_and_sum(key)
        return found is not None and found[2] == right
    finally:
        await bucket.remove(key)
    return False
