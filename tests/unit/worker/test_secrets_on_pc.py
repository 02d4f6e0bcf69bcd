"""Secrets on a worker's PC: sealed in its journal, in the machine for root only, and written over as soon as nobody needs them."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from deskgrid.core.sealing import for_attempt, seal_secrets
from deskgrid.errors import InvalidInput, NoSpace
from deskgrid.machines.clear_secrets import mark_secrets
from deskgrid.machines.folders import wipe
from deskgrid.model.ids import AttemptId
from deskgrid.model.jobs import AttemptState, JobSpec, Machine
from deskgrid.units import MIB
from deskgrid.worker.home import MACHINE, make_empty, remove, remove_attempt
from deskgrid.worker.secrets import SecretsKey, write_secrets
from tests.unit.worker.play import Rig

SPEC = JobSpec(machine=Machine(disk="tiny", memory_bytes=128 * MIB), secrets=("token",), trust=("mine",))
TOKEN = b"s3cr3t-" + os.urandom(8).hex().encode()


def sealed_for(rig: Rig, attempt_id: int, key: str = "") -> bytes:
    rig.home.create()
    return seal_secrets({"token": TOKEN}, key or SecretsKey(rig.home.secrets_key).public, for_attempt(AttemptId(attempt_id)))


def places(folder: Path) -> list[str]:
    """Return the files below a folder that have the secret in them."""
    return [str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file() and TOKEN in file.read_bytes()]


def test_key_stays_and_is_for_nobody_else(rig: Rig) -> None:
    rig.home.create()
    first = SecretsKey(rig.home.secrets_key).public
    assert SecretsKey(rig.home.secrets_key).public == first
    assert rig.home.secrets_key.stat().st_mode & 0o777 == 0o600


async def test_machine_gets_the_secrets_and_nothing_of_them_stays(rig: Rig) -> None:
    async with rig.working():
        await rig.until(lambda: rig.server.syncs)
        assert rig.server.syncs[-1].profile.secrets_key == SecretsKey(rig.home.secrets_key).public
        attempt = await rig.running(spec=SPEC, secrets=sealed_for(rig, 1))
        spec = rig.pc.machine.spec
        assert spec.secrets is not None
        assert ("DESKGRID_SECRETS", "/context/secrets") in spec.environment
        assert TOKEN.decode() not in repr(spec)
        assert rig.pc.machine.secrets == {"token": TOKEN}
        assert places(rig.home.folder) == []
        await rig.pc.machine.finish(0)
        assert (await rig.ended(attempt)).state is AttemptState.SUCCEEDED
    assert places(rig.home.folder) == []


@pytest.mark.parametrize(("key", "words"), [("", "its key was replaced"), ("other", "damaged, or sealed to another key")])
async def test_job_whose_secrets_do_not_open_fails_and_says_why(rig: Rig, key: str, words: str) -> None:
    other = X25519PrivateKey.generate().public_key().public_bytes_raw().hex()
    sealed = sealed_for(rig, 1, other) if key else b""
    async with rig.working():
        report = await rig.ended(rig.server.submit(spec=SPEC, secrets=sealed))
    assert report.state is AttemptState.FAILED
    assert words in report.reason


def test_what_one_attempt_may_open_is_of_no_use_in_another(rig: Rig) -> None:
    sealed = sealed_for(rig, 7)
    key = SecretsKey(rig.home.secrets_key)
    server = rig.server
    server.submit(spec=SPEC, secrets=sealed)
    [assignment] = server.waiting
    with pytest.raises(InvalidInput):
        key.open(assignment)
    assert key.open(msgspec.structs.replace(assignment, attempt_id=AttemptId(7))) == {"token": TOKEN}


async def test_nothing_of_the_secrets_stays_when_the_machine_cannot_be_made(rig: Rig, tmp_path: Path) -> None:
    rig.driver.errors["prepare"] = NoSpace("full")
    async with rig.working():
        report = await rig.ended(rig.server.submit(spec=SPEC, secrets=sealed_for(rig, 1)))
        assert report.state is AttemptState.REFUSED
        assert not list(rig.home.attempts.rglob("token"))


def test_secrets_that_a_kill_left_are_written_over(tmp_path: Path) -> None:
    attempt = tmp_path / "attempt"
    machine = attempt / MACHINE
    (machine / "context" / "secrets").mkdir(parents=True)
    mark_secrets(machine)
    files = [write_secrets(attempt, {"token": TOKEN}) / "token", machine / "context.iso", machine / "context" / "secrets" / "token"]
    assert files[0].stat().st_mode & 0o777 == 0o600
    for number, file in enumerate(files):
        file.write_bytes(TOKEN)
        os.link(file, tmp_path / f"seen{number}")  # what is on the disk, whatever the name
    remove_attempt(attempt)
    assert {(tmp_path / f"seen{number}").read_bytes() for number in range(3)} == {bytes(len(TOKEN))}
    assert not attempt.exists()


@pytest.mark.parametrize("clean", [remove, make_empty, remove_attempt])
def test_files_of_a_user_that_are_called_secrets_are_not_touched(tmp_path: Path, clean: Callable[[Path], None]) -> None:
    attempt = tmp_path / "attempt"
    for folder in (attempt / "context" / "secrets", attempt / MACHINE / "context" / "secrets", tmp_path / "given" / "secrets"):
        folder.mkdir(parents=True)
        (folder / "notes").write_bytes(TOKEN)
        (folder / "notes").chmod(0o444)
        os.link(folder / "notes", tmp_path / f"seen-{len(list(tmp_path.glob('seen-*')))}")
    remove(tmp_path / "given")
    clean(attempt)
    assert {file.read_bytes() for file in tmp_path.glob("seen-*")} == {TOKEN}


@pytest.mark.parametrize("content", [b"", b"short", None], ids=["empty", "short", "a folder"])
async def test_worker_without_a_usable_key_works_and_gets_no_secrets(rig: Rig, content: bytes | None) -> None:
    rig.home.create()
    if content is None:
        rig.home.secrets_key.mkdir()
    else:
        rig.home.secrets_key.write_bytes(content)
    async with rig.working():
        await rig.running()
        assert rig.server.syncs[-1].profile.secrets_key == ""


def test_wiping_follows_no_link_and_can_be_done_again(tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    kept.write_bytes(TOKEN)
    folder = tmp_path / "folder"
    (folder / "deep").mkdir(parents=True)
    (folder / "link").symlink_to(kept)
    (folder / "deep" / "file").write_bytes(bytes(3 << 20))
    for _ in range(2):
        wipe(folder, tmp_path / "link", tmp_path / "gone")
    assert kept.read_bytes() == TOKEN
    assert not (folder / "deep" / "file").exists()
