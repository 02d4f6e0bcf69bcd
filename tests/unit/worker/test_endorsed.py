"""Only disks that one of those whom the owner named vouches for are booted, whatever the server sends."""

from __future__ import annotations

import datetime
from pathlib import Path

import msgspec
import pytest

from deskgrid.errors import InvalidInput
from deskgrid.model.ids import Sha256
from deskgrid.model.jobs import AttemptState
from deskgrid.model.manifests import Manifest
from deskgrid.server.authority import Authority, make_authority
from tests.unit.worker.play import SETTINGS, Rig, disk_ref

WANTING = msgspec.structs.replace(SETTINGS, endorsers=("grid", "group:hep"))


def authority_in(folder: Path) -> Authority:
    make_authority(folder, "lab", datetime.datetime.now(datetime.UTC))
    return Authority(folder)


def statement(authority: Authority, rig: Rig, endorser: str, *, sha256: str = "", lifetime_s: float = 1000.0) -> str:
    disk = disk_ref().disk
    assert disk is not None
    return authority.sign_statement(
        Manifest(
            grid="lab",
            name="tiny@1",
            disk=msgspec.structs.replace(disk, sha256=Sha256(sha256)) if sha256 else disk,
            endorser=endorser,
            by="ann",
            issued_at=rig.clock.now(),
            expires_at=rig.clock.now() + lifetime_s,
        )
    )


async def test_disk_that_one_of_them_vouches_for_is_booted_and_the_grid_is_told_whom_the_owner_wants(rig: Rig, tmp_path: Path):
    authority = authority_in(tmp_path / "authority")
    rig.authority_pem = authority.pem.decode()
    async with rig.working(WANTING):
        attempt = await rig.running(statements=(statement(authority, rig, "group:hep"),))
        assert rig.server.syncs[-1].profile.endorsers == ("grid", "group:hep")
        await rig.pc.machine.finish(0)
        assert (await rig.ended(attempt)).state is AttemptState.SUCCEEDED


@pytest.mark.parametrize("wrong", ["nothing", "another endorser", "another disk", "another grid", "expired", "damaged"])
async def test_disk_that_nobody_vouches_for_is_neither_booted_nor_fetched(rig: Rig, tmp_path: Path, wrong: str):
    authority = authority_in(tmp_path / "authority")
    rig.authority_pem = authority.pem.decode()
    said = {
        "nothing": (),
        "another endorser": (statement(authority, rig, "group:other"), statement(authority, rig, "grid@cern")),
        "another disk": (statement(authority, rig, "grid", sha256="e" * 64),),
        "another grid": (statement(authority_in(tmp_path / "other"), rig, "grid"),),
        "expired": (statement(authority, rig, "grid", lifetime_s=-1.0),),
        "damaged": ("x", statement(authority, rig, "grid")[1:]),
    }[wrong]
    async with rig.working(WANTING):
        report = await rig.ended(rig.server.submit(statements=said))
    assert report.state is AttemptState.REFUSED
    assert report.reason == "the owner of this PC takes only disks that grid or group:hep vouch for"
    assert rig.server.downloads == []


async def test_owner_who_names_nobody_is_told_so_at_once(rig: Rig):
    with pytest.raises(InvalidInput, match="'everyone' cannot vouch"):
        rig.agent(msgspec.structs.replace(SETTINGS, endorsers=("everyone",)))
