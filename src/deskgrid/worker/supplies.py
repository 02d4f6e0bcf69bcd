"""What a machine is made from: the disk through the cache, the user's context, the spec for the driver."""

from __future__ import annotations

from pathlib import Path

from deskgrid import archive
from deskgrid.core.backoff import delay_s
from deskgrid.errors import BadImage, ProtocolError, StoreUnavailable, Unreachable
from deskgrid.machines.driver import MachineSpec
from deskgrid.model.data import Blob
from deskgrid.model.ids import attempt_name
from deskgrid.model.workers import Assignment
from deskgrid.units import GIB
from deskgrid.worker.kit import Kit
from deskgrid.worker.services import doorways, job_credentials
from deskgrid.worker.tasks import in_thread

__all__ = ["Supplies"]

_CONTEXT_LIMITS = archive.UnpackLimits(bytes=2 * GIB, apparent_bytes=16 * GIB, files=200_000)
_DOWNLOAD_TRIES = 8
"""Failures in a row without a byte of progress after which a download is given up."""
_CPU_SLACK_S = 600.0
_CONTEXT, _CONTEXT_ARCHIVE, _CREDENTIALS = "context", "context.tar.zst", "credentials.json"


class Supplies:
    """Fetches for one attempt, into its folder."""

    def __init__(self, kit: Kit, assignment: Assignment) -> None:
        self._kit = kit
        self._assignment = assignment
        self._folder = kit.home.attempt(assignment.attempt_id)
        self.fetched_bytes = 0
        """Of what is fetched now."""

    def files(self) -> tuple[Path, ...]:
        """Return what is of no use any more once the machine is made."""
        return self._folder / _CONTEXT, self._folder / _CONTEXT_ARCHIVE

    async def fetch_context(self) -> Path | None:
        """Return the folder with the user's files, unpacked; None if there are none. Raise BadArchive, or as download does."""
        blob = self._assignment.context
        if blob is None:
            return None
        packed, folder = self._folder / _CONTEXT_ARCHIVE, self._folder / _CONTEXT
        await self._download(blob, packed)
        await in_thread(archive.unpack, packed, folder, limits=_CONTEXT_LIMITS)
        return folder

    async def fetch_disk(self, partial: Path, output: Path) -> None:
        """Make the disk appear at `output`, verified: the `fetch` of swarm.cache. Raise BadImage, or as download does."""
        ref = self._assignment.disk
        if ref.disk is None:
            raise BadImage("this data is not a disk")
        await self._download(ref.blob, partial)
        try:
            await self._kit.unpack(partial, output, sha256=ref.disk.sha256, size_bytes=ref.disk.size_bytes, format=ref.disk.format)
        except ProtocolError as error:
            # What came is what was published (its sha256 is right), so nobody else's copy is better.
            raise BadImage(error.message, hint=error.hint) from error

    @property
    def credentials(self) -> Path:
        """Where the job's own credentials are, if its spec reaches the server."""
        return self._folder / _CREDENTIALS

    def _job_credentials(self) -> Path | None:
        if self._kit.overlay is None:
            return None
        name = attempt_name(self._assignment.job_id, self._assignment.number)
        return job_credentials(self.credentials, self._assignment.spec.machine, self._kit.overlay.credentials, name)

    async def _download(self, blob: Blob, file: Path) -> None:
        """Fetch a blob, going on after interruptions. Raise Unreachable once tries without progress are used up."""
        failures, have = 0, _size(file)
        while True:
            try:
                await self._kit.connection.download(blob, file, self._note_progress)
                return
            except (Unreachable, StoreUnavailable):
                failures = 1 if _size(file) > have else failures + 1
                have = _size(file)
                if failures >= _DOWNLOAD_TRIES:
                    raise
                settings = self._kit.settings
                pause_s = delay_s(failures, first_s=settings.backoff_s, max_s=settings.max_backoff_s, rng=self._kit.rng)
                await self._kit.clock.sleep(pause_s)

    def _note_progress(self, have_bytes: int) -> None:
        self.fetched_bytes = have_bytes

    def machine_spec(self, disk: Path, context: Path | None) -> MachineSpec:
        """Return what the driver is asked to make. Raise BadImage if the job's disk is none."""
        assignment = self._assignment
        machine, limits, known = assignment.spec.machine, assignment.spec.limits, assignment.disk.disk
        if known is None:
            raise BadImage("this data is not a disk")
        return MachineSpec(
            name=attempt_name(assignment.job_id, assignment.number),
            kind=machine.kind,
            memory_bytes=machine.memory_bytes,
            cpus=machine.cpus,
            scratch_bytes=machine.scratch_bytes,
            disk=disk,
            disk_format=known.format,
            context=context,
            context_label=known.context_label,
            network=machine.network,
            reach=doorways(machine),
            offer=tuple((offer.name, offer.port) for offer in machine.offer),
            ssh_keys=machine.ssh_keys,
            credentials=self._job_credentials(),
            environment=(
                ("DESKGRID_JOB", str(assignment.job_id)),
                ("DESKGRID_ATTEMPT", str(assignment.number)),
                ("DESKGRID_CPUS", str(machine.cpus)),
            ),
            # Emulation has threads besides those of the guest's CPUs.
            cpu_time_s=(limits.wall_time_s + _CPU_SLACK_S) * (machine.cpus + 1),
        )


def _size(file: Path) -> int:
    return file.stat().st_size if file.exists() else 0
