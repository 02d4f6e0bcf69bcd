"""What is needed of an S3 store: where it is, with which keys, and its calls, each in a thread.

HOME/s3.toml (only its owner may read it) has access_key, secret_key and, for keys that expire, session_token; without it botocore looks where
all AWS programs do, AWS_ACCESS_KEY_ID and so on first. Keys stay in this process: others get URLs signed for one call.
"""

from __future__ import annotations

import asyncio
import tomllib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from msgspec import Struct

from deskgrid.errors import DeskgridError, InvalidInput, OperatorError, StoreUnavailable

__all__ = ["Bucket", "S3Address", "open_bucket", "parse_address"]

_THREADS = 8
_REMOVAL_S = 30
"""A removal that has not been answered by then is given up, so that it cannot come late (server/retention.py)."""
_ABSENT = {"404", "NoSuchKey", "NotFound", "NoSuchUpload"}


class S3Address(Struct, frozen=True, kw_only=True):
    """Where blobs are at an S3 store."""

    bucket: str
    prefix: str = ""
    endpoint: str | None = None
    public: str | None = None
    region: str = "us-east-1"


def parse_address(text: str) -> S3Address:
    """Return the parts of s3://BUCKET/PREFIX?endpoint=URL&public=URL&region=NAME. Raise InvalidInput."""
    found = urlsplit(text)
    query = {name: values[-1] for name, values in parse_qs(found.query, keep_blank_values=True).items()}
    unknown = set(query) - {"endpoint", "public", "region"}
    if found.scheme != "s3" or not found.netloc or "@" in found.netloc or unknown:
        raise InvalidInput(
            f"{found.scheme}://... is not an S3 address" if not unknown else f"{min(unknown)} is not a part of an S3 address",
            where="blobs",
            hint="s3://BUCKET/PREFIX?endpoint=URL&public=URL&region=NAME; keys go into the environment or s3.toml",
        )
    for name in ("endpoint", "public"):
        if name in query and urlsplit(query[name]).scheme not in ("http", "https"):
            raise InvalidInput(f"{query[name]!r} is not an http(s) URL", where=f"blobs: {name}")
    prefix = found.path.strip("/")
    return S3Address(
        bucket=found.netloc,
        prefix=f"{prefix}/" if prefix else "",
        endpoint=query.get("endpoint"),
        public=query.get("public"),
        region=query.get("region", "us-east-1"),
    )


class Bucket:
    """Calls to one bucket. Foreign exceptions end here: StoreUnavailable, or LookupError for what is not there."""

    def __init__(self, address: S3Address, session: Any) -> None:
        self.address = address
        self._client = _client(session, address, address.endpoint, retries=4, read_s=60)
        self._removing = _client(session, address, address.endpoint, retries=1, read_s=_REMOVAL_S)
        self._signer = _client(session, address, address.public or address.endpoint, retries=1, read_s=60)
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="s3")

    async def call(self, operation: str, **parameters: Any) -> dict[str, Any]:
        """Make a call, as botocore names it, on this bucket. Raise LookupError for what is not there, StoreUnavailable."""
        return await self._run(self._client, operation, parameters)

    async def remove(self, key: str) -> None:
        """Remove an object; tried once, and for `_REMOVAL_S` at most. Idempotent."""
        try:
            await self._run(self._removing, "delete_object", {"Key": key})
        except LookupError:
            return

    async def pages(self, operation: str, **parameters: Any) -> list[dict[str, Any]]:
        """Return all pages of a call that lists something."""
        paginator = self._client.get_paginator(operation)
        found: list[dict[str, Any]] = await self._in_thread(
            lambda: list(paginator.paginate(Bucket=self.address.bucket, **parameters))
        )
        return found

    async def size_and_sum(self, key: str) -> tuple[int, str, str] | None:
        """Return an object's size, its ETag, and the sha256 (base64) that the store says it computed over all of it ("" if it says none).

        None if there is no such object.
        """
        try:
            found = await self.call("head_object", Key=key, ChecksumMode="ENABLED")
        except LookupError:
            return None
        whole = found.get("ChecksumType", "FULL_OBJECT") == "FULL_OBJECT" and "-" not in found.get("ChecksumSHA256", "")
        return int(found["ContentLength"]), str(found["ETag"]), str(found.get("ChecksumSHA256", "")) if whole else ""

    async def chunks(self, key: str, size: int, **parameters: Any) -> Any:
        """Iterate over an object's bytes in pieces of `size`."""
        answer = await self.call("get_object", Key=key, **parameters)
        body = answer["Body"]
        try:
            while piece := await self._in_thread(lambda: body.read(size)):
                yield piece
        finally:
            body.close()

    async def send_file(self, key: str, file: Path) -> None:
        """Store a file as an object, in parts if it is large."""
        size = file.stat().st_size
        if size <= _PART_BYTES:
            await self.call("put_object", Key=key, Body=file.read_bytes())
            return
        step = part_bytes(size)
        remote = (await self.call("create_multipart_upload", Key=key))["UploadId"]
        try:
            sent = []
            for number, offset in enumerate(range(0, size, step), 1):
                piece = await self._in_thread(lambda offset=offset: _read_at(file, offset, step))
                part = await self.call("upload_part", Key=key, UploadId=remote, PartNumber=number, Body=piece)
                sent.append({"PartNumber": number, "ETag": part["ETag"]})
            await self.call("complete_multipart_upload", Key=key, UploadId=remote, MultipartUpload={"Parts": sent})
        except BaseException:
            await self.call("abort_multipart_upload", Key=key, UploadId=remote)
            raise

    def sign(self, operation: str, lifetime_s: float, **parameters: Any) -> str:
        """Return a URL for one call, good for a while."""
        url: str = self._signer.generate_presigned_url(
            operation, Params={"Bucket": self.address.bucket, **parameters}, ExpiresIn=int(lifetime_s)
        )
        return url

    async def close(self) -> None:
        """Let calls under way end."""
        await asyncio.to_thread(self._threads.shutdown)

    async def _run(self, client: Any, operation: str, parameters: dict[str, Any]) -> dict[str, Any]:
        call = getattr(client, operation)
        found: dict[str, Any] = await self._in_thread(lambda: call(Bucket=self.address.bucket, **parameters))
        return found

    async def _in_thread(self, function: Any) -> Any:
        from botocore.exceptions import BotoCoreError, ClientError, HTTPClientError

        try:
            return await asyncio.get_running_loop().run_in_executor(self._threads, function)
        except ClientError as error:
            code = str(error.response.get("Error", {}).get("Code", ""))
            if code in _ABSENT:
                raise LookupError(code) from error
            raise StoreUnavailable(f"the S3 store refuses {error.operation_name}: {code}", hint="see its log") from error
        except (BotoCoreError, HTTPClientError, OSError) as error:
            raise StoreUnavailable(f"the S3 store cannot be used: {type(error).__name__}", hint="is it running?") from error


_PART_BYTES = 16 << 20
_MOST_PARTS = 9000


def part_bytes(size_bytes: int) -> int:
    """Return the size of the parts in which so many bytes are sent: S3 takes 10,000 of them."""
    megabyte = 1 << 20
    return max(_PART_BYTES, -(-size_bytes // _MOST_PARTS // megabyte) * megabyte + megabyte)


def _read_at(file: Path, offset: int, size: int) -> bytes:
    with file.open("rb") as source:
        source.seek(offset)
        return source.read(size)


async def open_bucket(home: Path, text: str) -> Bucket:
    """Return the bucket of a settings' address. Raise OperatorError if it is not there or its keys are not taken, InvalidInput."""
    address = parse_address(text)
    session = _session(home)
    bucket = Bucket(address, session)
    try:
        await bucket.call("head_bucket")
    except LookupError as error:
        await bucket.close()
        raise OperatorError(f"there is no bucket {address.bucket} at the S3 store", hint="make it first") from error
    except DeskgridError as error:
        await bucket.close()
        raise OperatorError(
            f"the bucket {address.bucket} cannot be used: {error.message}",
            hint="check the keys (s3.toml or AWS_*) and the endpoint",
        ) from error
    return bucket


def _session(home: Path) -> Any:
    try:
        import botocore.session
    except ImportError as error:
        raise OperatorError("blobs at S3 need botocore", hint="pip install 'deskgrid[s3]'") from error
    session = botocore.session.Session()
    file = home / "s3.toml"
    if file.exists():
        session.set_credentials(*_keys_in(file))
    if session.get_credentials() is None:
        raise OperatorError("there are no keys for the S3 store", hint=f"AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or {file}")
    return session


def _keys_in(file: Path) -> tuple[str, str, str | None]:
    if file.stat().st_mode & 0o077:
        raise OperatorError(f"others can read {file}", hint=f"chmod 600 {file}")
    try:
        found = tomllib.loads(file.read_text(encoding="utf-8"))
        return str(found["access_key"]), str(found["secret_key"]), found.get("session_token")
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, KeyError) as error:
        # Without its cause: a parser's message may have a part of the key in it.
        raise OperatorError(f"{file} is not understood", hint='access_key = "..." and secret_key = "..."') from error


def _client(session: Any, address: S3Address, endpoint: str | None, *, retries: int, read_s: int) -> Any:
    from botocore.config import Config

    config = Config(
        signature_version="s3v4",
        s3={"addressing_style": "path" if endpoint else "auto"},
        request_checksum_calculation="when_required",  # more than that is not understood by many stores that speak S3
        response_checksum_validation="when_required",
        retries={"mode": "standard", "total_max_attempts": retries},
        connect_timeout=10,
        read_timeout=read_s,
        max_pool_connections=_THREADS,
    )
    return session.create_client("s3", region_name=address.region, endpoint_url=endpoint, config=config)
