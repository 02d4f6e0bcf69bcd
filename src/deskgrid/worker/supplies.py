"""What a machine is made from: disk and data through the cache, the user's context, the app's files, the spec for the driver.

The context of an array's job is its own: {index} and the columns of the array's table are filled in, in the command, in the variables and in the
files that the spec names (core/arrays.py). A warm program serves many jobs: it is told them with each (conversation.py), and nothing is filled in.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

from deskgrid import archive
from deskgrid.core.arrays import fill, values_of
from deskgrid.errors import BadImage, InvalidInput
from deskgrid.machines.driver import MachineSpec
from deskgrid.model.data import Blob, Disk
from deskgrid.model.ids import Sha256, attempt_name
from deskgrid.model.machines import ContextLabel, DiskFormat, MachineKind
from deskgrid.model.workers import Assignment
from deskgrid.units import GIB
from deskgrid.worker.installed import InstalledDisk
from deskgrid.worker.kit import Kit
from deskgrid.worker.secrets import write_secrets
from deskgrid.worker.services import doorways, job_credentials
from deskgrid.worker.tasks import in_thread
from deskgrid.worker.transfer import Transfer

__all__ = ["WARM_LIFE_S", "Supplies"]

_CONTEXT_LIMITS = archive.UnpackLimits(bytes=2 * GIB, apparent_bytes=16 * GIB, files=200_000)
_CPU_SLACK_S = 600.0
_LIFE_SLACK_S = 60.0
"""That a machine without worker may live on beyond its wall time: a worker that is there ends it first, and says why."""
WARM_LIFE_S = 3600.0
"""After which a warm program is given no more jobs: its CPU time is bounded, and what it gathers in its folders and its memory, too."""
_CONTEXT, _CONTEXT_ARCHIVE, _CREDENTIALS = "context", "context.tar.zst", "credentials.json"
_PROGRAM, _PROGRAM_ARCHIVE = "program", "program.tar.zst"
_LARGEST_FILLED_BYTES = 1 << 20
_MOST_FILLED_IN = 1 << 26
"""Characters that a file can become at most before it is known how many it does: a bound on memory."""


class Supplies:
    """Fetches for one attempt, into its folder, or for a warm program, into another."""

    def __init__(self, kit: Kit, assignment: Assignment, folder: Path | None = None) -> None:
        self._kit = kit
        self._assignment = assignment
        self._folder = folder or kit.home.attempt(assignment.attempt_id)
        self._fills = assignment.in_array and not assignment.spec.machine.warm
        self._transfer = Transfer(kit)

    @property
    def fetched_bytes(self) -> int:
        """Bytes that are there of what is fetched now."""
        return self._transfer.fetched_bytes

    def files(self) -> tuple[Path, ...]:
        """Return what is of no use any more once the machine is made."""
        whole = self._folder / _CONTEXT, self._folder / _CONTEXT_ARCHIVE, self._folder / _PROGRAM_ARCHIVE
        # A process runs from its program's folder; a VM has it on its context disk.
        return whole if self._assignment.spec.machine.kind is not MachineKind.VM else (*whole, self._folder / _PROGRAM)

    async def fetch_context(self) -> Path | None:
        """Return the folder with the user's files, unpacked and filled in; None if there are none.

        Raise BadArchive, InvalidInput (what cannot be filled in), or as download does.
        """
        blob = self._assignment.context
        if blob is None:
            return None
        folder = await self._fetch_folder(blob, self._folder / _CONTEXT_ARCHIVE, self._folder / _CONTEXT)
        if self._fills and self._assignment.spec.fill:
            await in_thread(_fill_files, folder, self._assignment.spec.fill, self._values)
        return folder

    async def open_secrets(self) -> Path | None:
        """Return a folder with the job's secrets, to be wiped when the machine has them; None if it has none. Raise InvalidInput."""
        if not self._assignment.spec.secrets:
            return None
        return await in_thread(write_secrets, self._folder, self._kit.secrets.open(self._assignment))

    async def fetch_program(self) -> Path | None:
        """Return the folder with the files of the job's app for this platform; None if it has none. Raise BadArchive, or as download does."""
        blob = self._assignment.program
        if blob is None:
            return None
        return await self._fetch_folder(blob, self._folder / _PROGRAM_ARCHIVE, self._folder / _PROGRAM)

    async def _fetch_folder(self, blob: Blob, packed: Path, folder: Path) -> Path:
        await self._transfer.download(blob, packed)
        await in_thread(archive.unpack, packed, folder, limits=_CONTEXT_LIMITS)
        return folder

    @property
    def _values(self) -> dict[str, str]:
        return values_of(self._assignment.index, self._assignment.parameters)

    async def fetch_data(self) -> tuple[tuple[str, Path], ...]:
        """Return the files with the job's data, by name, in the cache: hold `contents` before. Raise NoSpace, or as download does."""
        fetch, bring = self._transfer.fetch, self._kit.cache.bring
        return tuple([(file.name, await bring(file.blob, partial(fetch, file.blob))) for file in self._assignment.data])

    def contents(self) -> tuple[Sha256, ...]:
        """Return what the machine is made from in the cache: disk and data, by their sha256."""
        ref = self._assignment.disk
        disk = (ref.disk.sha256,) if ref is not None and ref.disk is not None else ()
        return (*disk, *(file.blob.sha256 for file in self._assignment.data))

    async def fetch_disk(self, part: Path, output: Path) -> None:
        """Make the disk appear at `output`, verified: the `fetch` of swarm.cache. Raise BadImage, or as download does."""
        ref = self._assignment.disk
        if ref is None:
            raise BadImage("this data is not a disk")
        await self._transfer.fetch_disk(ref, part, output)

    @property
    def credentials(self) -> Path:
        """Where the job's own credentials are, if its spec reaches the server."""
        return self._folder / _CREDENTIALS

    def _job_credentials(self) -> Path | None:
        if self._kit.overlay is None:
            return None
        name = attempt_name(self._assignment.job_id, self._assignment.number)
        return job_credentials(self.credentials, self._assignment.spec.machine, self._kit.overlay.credentials, name)

    def machine_spec(
        self,
        disk: Path | None,
        context: Path | None,
        program: Path | None = None,
        secrets: Path | None = None,
        data: tuple[tuple[str, Path], ...] = (),
    ) -> MachineSpec:
        """Return what the driver is asked to make. Raise BadImage if the job's disk is none, InvalidInput for what cannot be filled in."""
        assignment = self._assignment
        machine, limits = assignment.spec.machine, assignment.spec.limits
        known = self._known_disk()
        if known is None and disk is not None:
            raise BadImage("this data is not a disk")
        return MachineSpec(
            name=attempt_name(assignment.job_id, assignment.number),
            kind=machine.kind,
            memory_bytes=machine.memory_bytes,
            cpus=machine.cpus,
            scratch_bytes=machine.scratch_bytes,
            disk=disk,
            disk_format=known.format if known else DiskFormat.QCOW2,
            context=context,
            context_label=known.context_label if known else ContextLabel.CONTEXT,
            interactive=machine.warm,
            command=tuple(self._filled(part, "command") for part in assignment.spec.command),
            program=program,
            processes=limits.processes,
            file_bytes=limits.file_bytes,
            network=machine.network,
            reach=doorways(machine),
            offer=tuple((offer.name, offer.port) for offer in machine.offer),
            ssh_keys=machine.ssh_keys,
            credentials=self._job_credentials(),
            secrets=secrets,
            data=data,
            environment=(
                ("DESKGRID_CPUS", str(machine.cpus)),
                *((("DESKGRID_SECRETS", "/context/secrets"),) if secrets is not None else ()),
                *((("DESKGRID_DATA", "/context/data"),) if data else ()),
                *(() if machine.warm else self._names_of_job()),
                *((name, self._filled(value, f"environment.{name}")) for name, value in assignment.spec.environment),
            ),
            lifetime_s=limits.wall_time_s + (WARM_LIFE_S if machine.warm else 0.0) + _LIFE_SLACK_S,
            # Emulation has threads besides those of the guest's CPUs.
            cpu_time_s=(limits.wall_time_s + (WARM_LIFE_S if machine.warm else 0.0) + _CPU_SLACK_S) * (machine.cpus + 1),
        )

    def _known_disk(self) -> Disk | InstalledDisk | None:
        assignment = self._assignment
        if assignment.spec.machine.installed_disk:
            return self._kit.installed.find(assignment.spec.machine.installed_disk)
        return assignment.disk.disk if assignment.disk is not None else None

    def _names_of_job(self) -> Iterator[tuple[str, str]]:
        """Yield the variables by which a job knows which one it is."""
        assignment = self._assignment
        yield "DESKGRID_JOB", str(assignment.job_id)
        yield "DESKGRID_ATTEMPT", str(assignment.number)
        yield "DESKGRID_INDEX", str(assignment.index)
        for name, value in assignment.parameters.items():
            yield f"DESKGRID_PARAM_{name}", value

    def _filled(self, text: str, where: str) -> str:
        """Return a text of the spec with what belongs to this job; one that is no array's, or warm, stands as it is."""
        if not self._fills:
            return text
        try:
            return fill(text, self._values)
        except InvalidInput as error:
            raise InvalidInput(error.message, where=where, hint=error.hint) from error


def _fill_files(folder: Path, names: tuple[str, ...], values: dict[str, str]) -> None:
    """Fill in files of a context, in place. Blocks. Raise InvalidInput naming the file."""
    for name in names:
        file = folder / name
        if not file.resolve().is_relative_to(folder.resolve()) or not file.is_file():
            raise InvalidInput(f"there is no file {name[:100]!r} in the context", where="fill")
        if file.stat().st_size > _LARGEST_FILLED_BYTES:
            raise InvalidInput(f"{name} is too large to be filled in", where="fill", hint=f"at most {_LARGEST_FILLED_BYTES} bytes")
        filled = _fill_file(file, name, values)
        if len(filled) > _LARGEST_FILLED_BYTES:
            raise InvalidInput(f"{name}, filled in, has more than {_LARGEST_FILLED_BYTES} bytes", where="fill")
        _replace(file, filled)


def _fill_file(file: Path, name: str, values: dict[str, str]) -> bytes:
    try:
        # As bytes: the ends of lines stay what they are.
        text = file.read_bytes().decode()
        if len(text) + text.count("{") * max(map(len, values.values())) > _MOST_FILLED_IN:
            raise InvalidInput("it becomes too large", hint="shorter values, or fewer places for them")
        return fill(text, values).encode()
    except UnicodeDecodeError as error:
        raise InvalidInput(f"{name} is not a text in UTF-8", where="fill") from error
    except InvalidInput as error:
        raise InvalidInput(error.message, where=name, hint=error.hint) from error


def _replace(file: Path, content: bytes) -> None:
    """Give a file, a read-only one too, new content; its mode stays."""
    mode = file.stat().st_mode
    file.chmod(0o600)
    file.write_bytes(content)
    file.chmod(mode)
