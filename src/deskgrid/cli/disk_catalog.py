"""deskgrid disk list, search, show, endorse, revoke, export: the disks of the repository, and what is said of them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import msgspec
from cyclopts import Parameter

from deskgrid.cli.connection import connected
from deskgrid.cli.data import Reference, reference_of
from deskgrid.cli.disk import app
from deskgrid.cli.output import Json, age, print_json, print_lines, print_table
from deskgrid.cli.user import lifetime_of
from deskgrid.errors import InvalidInput
from deskgrid.model.machines import ContextLabel
from deskgrid.model.manifests import DiskDetail, Manifest
from deskgrid.units import format_size

__all__ = ["app"]

_BY = {ContextLabel.CONTEXT: "agent", ContextLabel.CIDATA: "cloud-init", ContextLabel.CERNVM: "CernVM"}
"""Who in the guest reads the context disk."""


@app.command(name="list")
async def list_(*, json: Json = False) -> None:
    """List the disks that your jobs may boot.

    For example:

        deskgrid disk list
    """
    async with connected() as grid:
        found = await grid.disks()
    _print_disks(found, json)


@app.command
async def search(*words: str, os: str = "", arch: str = "", endorsed_by: str = "", json: Json = False) -> None:
    """Find disks that your jobs may boot, by words in name, owner, system and description.

    For example:

        deskgrid disk search debian
        deskgrid disk search root analysis --endorsed-by group:hep
        deskgrid disk search --os "debian 12" --arch x86_64

    Parameters
    ----------
    words
        All of them must be there.
    os
        What the system's name begins with.
    arch
        Kind of CPU.
    endorsed_by
        Who must vouch for it: grid, group:NAME or user:NAME, with @GRID of another grid.
    """
    async with connected() as grid:
        found = await grid.disks(words=" ".join(words), os=os, arch=arch, endorser=endorsed_by)
    _print_disks(found, json)


def _print_disks(found: tuple[DiskDetail, ...], as_json: bool) -> None:
    if as_json:
        print_json(found)
        return
    rows = [
        (
            reference_of(one.data),
            one.data.disk.os if one.data.disk else "",
            format_size(one.data.blob.size_bytes),
            one.data.owner,
            one.data.visibility.value,
            "revoked" if one.revocation else ", ".join(said.endorser for said in one.manifests) or "-",
            one.data.disk.about if one.data.disk else "",
        )
        for one in found
    ]
    print_table(("disk", "system", "size", "owner", "who", "endorsed by", "about"), rows, empty="no disks")


@app.command
async def show(reference: Reference, /, *, json: Json = False) -> None:
    """Show a disk: what it is, how it takes its context, who vouches for it, and whether it was revoked.

    For example:

        deskgrid disk show debian
        deskgrid disk show debian@2 --json
    """
    async with connected() as grid:
        found = await grid.disk(reference)
    if json:
        print_json(found)
    else:
        _print_disk(found)


def _print_disk(found: DiskDetail) -> None:
    data, disk = found.data, found.data.disk
    if disk is None:
        return
    print_lines(f"{reference_of(data)} of {data.owner}, {data.visibility.value}, added {age(data.created_at)}")
    rows = (
        ("about", disk.about or "-"),
        ("system", f"{disk.os or '-'}, {disk.arch}"),
        (
            "image",
            f"{disk.format.value}, {format_size(disk.virtual_bytes)} in the guest, {format_size(data.blob.size_bytes)} to fetch",
        ),
        ("context", f"{_BY[disk.context_label]}: the context disk is labelled {disk.context_label.value}"),
        ("sha256", disk.sha256),
    )
    print_lines(*(f"  {name:<9} {text}" for name, text in rows))
    if data.delta is not None:
        print_lines(f"  {'delta':<9} {format_size(data.delta.blob.size_bytes)} to fetch for those who have {data.delta.base}")
    for said in found.manifests:
        print_lines(f"  {'endorsed':<9} by {said.endorser} ({said.by}) {age(said.issued_at)}, for {_days(said)} days")
    if found.revocation is not None:
        print_lines(f"  {'REVOKED':<9} by {found.revocation.by} {age(found.revocation.at)}: {found.revocation.reason}")


def _days(said: Manifest) -> str:
    return f"{(said.expires_at - said.issued_at) / 86400:.0f}"


Endorser = Annotated[
    str, Parameter(name="--as", help="Who does: grid (you are an admin), group:NAME of yours, or by default user:YOU.")
]


@app.command
async def endorse(
    reference: Reference, /, *, as_: Endorser = "", lifetime: str = "180d", withdraw: bool = False, json: Json = False
) -> None:
    """Vouch for a disk, so that PCs whose owners trust you boot it (`endorsers` in their settings).

    For example:

        deskgrid disk endorse debian
        deskgrid disk endorse debian@2 --as group:hep --lifetime 365d
        deskgrid disk endorse debian --as grid --withdraw

    Parameters
    ----------
    lifetime
        For how long, as in 90d.
    withdraw
        Do not vouch for it any more.
    """
    async with connected() as grid:
        if withdraw:
            found = await grid.withdraw_disk(reference, as_ or f"user:{(await grid.who()).name}")
        else:
            found = await grid.endorse_disk(reference, as_, lifetime_s=lifetime_of(lifetime))
    if json:
        print_json(found)
    else:
        _print_disk(found)


@app.command
async def revoke(reference: Reference, /, *, reason: str, json: Json = False) -> None:
    """Let a disk not be started any more, for good. Jobs that wait for it fail and say why; those that run go on.

    Its owner may, and an admin. Meant are the disks of that owner with this content; everybody's, if an admin says so of a disk of his own, or
    gives a sha256: of an image, or of a package and so of all that is packed in it.

    For example:

        deskgrid disk revoke debian@1 --reason "its ssh has a hole: use debian@2"

    Parameters
    ----------
    reason
        Why, in a line; users read it.
    """
    async with connected() as grid:
        said = await grid.revoke_disk(reference, reason)
    if json:
        print_json(said)
    else:
        print_lines(f"revoked {said.disk_sha256} of {said.owner or 'everybody'}")


@app.command
async def export(
    reference: Reference, /, *, output: Annotated[Path | None, Parameter(name=["--output", "-o"])] = None, json: Json = False
) -> None:
    """Write what this grid says of a disk to a file, for another grid: who vouches for it, or that it was revoked.

    There, `deskgrid disk import IMAGE --manifest FILE` takes the disk with it, `deskgrid disk import FILE` news of a disk that is there already;
    its admin must trust this grid's authority (`trusted_grids`).

    For example:

        deskgrid disk export debian
        deskgrid disk export debian@2 -o debian.manifest

    Parameters
    ----------
    output
        File to write, replaced if it exists; ./NAME.manifest by default.
    """
    async with connected() as grid:
        bundle = await grid.disk_bundle(reference)
        name = (await grid.data(reference)).name
        fingerprint = grid.transport.credentials.authority
    file = output or Path(f"{name}.manifest")
    if file.is_dir() or not file.parent.is_dir():
        raise InvalidInput(f"{file} is no file that can be written", where="--output", hint="name a file in a folder that exists")
    partial = file.with_name(file.name + ".part")
    partial.write_bytes(msgspec.json.format(msgspec.json.encode(bundle)))
    partial.replace(file)
    if json:
        print_json({"file": str(file), "grid": bundle.grid, "authority": fingerprint})
    else:
        print_lines(str(file), f"this grid's authority: {fingerprint}")
