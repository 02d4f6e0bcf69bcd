"""OCI archives: a tar with `oci-layout`, `index.json` and blobs (OCI image layout specification 1.0), as hostile input.

Only what is needed to accept one is read here: the headers of the tar, and its two small JSON files. What is in the blobs is
podman's business, which reads them confined (container.py).
"""

from __future__ import annotations

import hashlib
import io
import re
import tarfile
from pathlib import Path
from typing import TypeVar

import msgspec
from msgspec import Struct

from deskgrid.errors import BadImage
from deskgrid.machines.ext4 import ReadAt
from deskgrid.machines.tar_members import TarMember, tar_members

__all__ = ["check_archive", "looks_like_archive", "write_archive"]

T = TypeVar("T")
_MOST_MEMBERS = 10_000
_LOOK_MEMBERS = 64
_MOST_JSON_BYTES = 1 << 20
_NAME = re.compile(r"(?:\./)?(oci-layout|index\.json|blobs/?|blobs/sha256/?|blobs/sha256/[0-9a-f]{64})")
_MANIFESTS = ("application/vnd.oci.image.manifest.v1+json",)


class _Layout(Struct, frozen=True):
    version: str = msgspec.field(name="imageLayoutVersion")


class _Manifest(Struct, frozen=True):
    kind: str = msgspec.field(name="mediaType")
    digest: str
    size: int


class _Index(Struct, frozen=True):
    manifests: list[_Manifest]


def looks_like_archive(read_at: ReadAt, size: int) -> bool:
    """Tell whether a file is a tar with the mark of an OCI archive among its first members."""
    try:
        for number, member in enumerate(tar_members(read_at, size)):
            if member.name.removeprefix("./") == "oci-layout":
                return True
            if number >= _LOOK_MEMBERS:
                break
    except BadImage:
        pass
    return False


def check_archive(read_at: ReadAt, size: int) -> int:
    """Return the bytes of all blobs. Raise BadImage if it is not an OCI archive with just one image in it."""
    found: dict[str, TarMember] = {}
    for number, member in enumerate(tar_members(read_at, size)):
        if number >= _MOST_MEMBERS:
            raise BadImage(f"has more than {_MOST_MEMBERS} members")
        match = _NAME.fullmatch(member.name)
        if match is None or not (member.is_file or member.is_folder):
            raise BadImage(f"is no OCI archive: it has {member.name[:100]!r} in it")
        if match[1] in found:
            raise BadImage(f"has {match[1]} twice")
        found[match[1]] = member
    layout = _json(found, "oci-layout", read_at, _Layout)
    index = _json(found, "index.json", read_at, _Index)
    if layout.version != "1.0.0":
        raise BadImage(
            f"is an OCI archive of version {layout.version[:20]!r}", hint="podman save --format oci-archive writes 1.0.0"
        )
    if len(index.manifests) != 1 or index.manifests[0].kind not in _MANIFESTS:
        raise BadImage("has not just one image in it", hint="podman save --format oci-archive IMAGE")
    digest = index.manifests[0].digest
    if f"blobs/{digest.replace(':', '/')}" not in found:
        raise BadImage("lacks the manifest that its index names")
    return sum(member.size for member in found.values())


def write_archive(path: Path, layer: bytes, config: dict[str, object]) -> None:
    """Write an OCI archive of one layer (a tar): the smallest there can be, for trying out and for tests."""
    blobs: dict[str, bytes] = {}

    def blob(data: bytes, kind: str) -> dict[str, object]:
        digest = hashlib.sha256(data).hexdigest()
        blobs[f"blobs/sha256/{digest}"] = data
        return {"mediaType": f"application/vnd.oci.image.{kind}", "digest": f"sha256:{digest}", "size": len(data)}

    rootfs = {"type": "layers", "diff_ids": [f"sha256:{hashlib.sha256(layer).hexdigest()}"]}
    whole = {"architecture": "amd64", "os": "linux", "config": config, "rootfs": rootfs}
    manifest = {
        "schemaVersion": 2,
        "config": blob(msgspec.json.encode(whole), "config.v1+json"),
        "layers": [blob(layer, "layer.v1.tar")],
    }
    index = {"schemaVersion": 2, "manifests": [blob(msgspec.json.encode(manifest), "manifest.v1+json")]}
    files = {**blobs, "index.json": msgspec.json.encode(index), "oci-layout": b'{"imageLayoutVersion": "1.0.0"}'}
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as archive:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))


def _json(found: dict[str, TarMember], name: str, read_at: ReadAt, kind: type[T]) -> T:
    member = found.get(name)
    if member is None or member.size > _MOST_JSON_BYTES or not member.is_file:
        raise BadImage(f"has no {name}")
    try:
        return msgspec.json.decode(read_at(member.at, member.size), type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise BadImage(f"has a bad {name}: {error}") from error
