"""The Checkpointing protocol over the drivers whose machine is one process; subclasses say how its state is kept and loaded.

    checkpoint   freeze, keep the state under the other name, write the note, drop the state before, thaw
    save         the same without thawing, then end the process
    restore      mark, cut the logs, start a process, load the state, let it run, unmark

A kill between any two of these leaves the last good checkpoint: what the note does not name does not count, and a process found
beside the mark is ended.
"""

from __future__ import annotations

import asyncio
import contextlib
from abc import abstractmethod
from pathlib import Path

from deskgrid.errors import MachineFailed
from deskgrid.machines import cage, processes, qmp
from deskgrid.machines.base import CHANNEL_LOG, CONSOLE_LOG, STOPPED_MARK, ProcessDriver
from deskgrid.machines.checkpoint import RESTORING_MARK, Checkpoint, next_tag, read_checkpoint, truncate_logs, write_checkpoint
from deskgrid.machines.disks import wrap_disk_error
from deskgrid.machines.driver import MachineHandle
from deskgrid.machines.processes import ProcessIdentity

__all__ = ["CheckpointingDriver"]

_QUIT_LIMIT_S = 10.0
_THAW_LIMIT_S = 5.0
_LEFT_LIMIT_S = 1.0
"""For a machine that is left to whoever comes next."""


class CheckpointingDriver(ProcessDriver):
    """A ProcessDriver with the Checkpointing protocol."""

    # ---- what a subclass says

    @abstractmethod
    async def _runs(self, handle: MachineHandle) -> bool:
        """Tell whether the CPUs run. Raise MachineFailed if the machine is off."""

    @abstractmethod
    async def _freeze(self, handle: MachineHandle) -> None:
        """Stop the CPUs. Raise MachineFailed; they may be stopped later, then."""

    @abstractmethod
    async def _thaw(self, handle: MachineHandle, limit_s: float = _THAW_LIMIT_S) -> None:
        """Let the CPUs run on. Raise MachineFailed if that is not done in time."""

    @abstractmethod
    def _state_limit_s(self, handle: MachineHandle) -> float:
        """Return the seconds that keeping a state takes at most."""

    @abstractmethod
    async def _keep_state(self, handle: MachineHandle, tag: str) -> float:
        """Keep memory and disks of the frozen machine under a name, on the disk when it returns. Return the seconds that it ran, 0 if nobody asks."""

    @abstractmethod
    async def _drop_state(self, handle: MachineHandle, tag: str) -> None:
        """Forget a state. Idempotent."""

    @abstractmethod
    async def _quit(self, handle: MachineHandle) -> None:
        """Ask the process to end without a word to the guest."""

    @abstractmethod
    async def _load_state(self, handle: MachineHandle, checkpoint: Checkpoint) -> None:
        """Give the process that has just been started a state, and let it run. Raise MachineFailed."""

    async def _mend(self, handle: MachineHandle) -> None:
        """Make files sound that a power cut may have left in disorder. Raise MachineFailed if that cannot be done."""

    # ---- the protocol

    async def checkpoint(self, handle: MachineHandle) -> None:
        """See Checkpointing."""
        if await self._keep(handle):
            await self._thaw(handle)

    async def save(self, handle: MachineHandle) -> None:
        """See Checkpointing."""
        await self._keep(handle)
        identity = self._living(handle)
        await self._quit(handle)
        await processes.wait_gone(identity, self._clock, limit_s=_QUIT_LIMIT_S)
        await self._kill(handle, identity)

    async def restore(self, handle: MachineHandle) -> None:
        """See Checkpointing."""
        workdir = Path(handle.workdir)
        mark = workdir / RESTORING_MARK
        identity = self._identity(handle)
        if identity is not None and processes.is_alive(identity) and not mark.exists():
            return
        checkpoint = await asyncio.to_thread(read_checkpoint, workdir)
        if checkpoint is None or (workdir / STOPPED_MARK).exists():
            raise MachineFailed("the machine has no checkpoint to go on from")
        if identity is not None:
            await self._kill(handle, identity)
        try:
            await cage.clear(workdir, self._clock)
            mark.touch()
            processes.forget_identity(workdir)
            await self._mend(handle)
            await asyncio.to_thread(truncate_logs, workdir, checkpoint)
            qmp.create_journal(workdir)
        except OSError as error:
            raise wrap_disk_error(error) from error
        identity = await self._spawn(handle)
        try:
            await self._load_state(handle, checkpoint)
        except BaseException:
            await asyncio.shield(self._kill(handle, identity))
            raise
        mark.unlink()

    async def _keep(self, handle: MachineHandle) -> bool:
        """Make a checkpoint; return whether the machine ran before. It is frozen then, and goes on if this fails."""
        self._living(handle)
        ran = await self._runs(handle)
        try:
            await self._freeze(handle)
            await self._keep_frozen(handle)
        except asyncio.CancelledError:
            # Whoever cancels does not wait until a monitor that is busy with gigabytes answers: he removes the machine, or `recover` and
            # `resume` follow, as after a kill.
            if ran:
                with contextlib.suppress(MachineFailed):
                    await asyncio.shield(self._thaw(handle, _LEFT_LIMIT_S))
            raise
        except (MachineFailed, OSError) as error:
            if ran:
                await self._go_on(handle)
            if isinstance(error, OSError):
                raise wrap_disk_error(error) from error
            raise
        return ran

    async def _go_on(self, handle: MachineHandle) -> None:
        """Let a machine run on of which no checkpoint could be made. One that does not is ended, and goes on from its last one if it has one."""
        try:
            await self._thaw(handle, self._state_limit_s(handle))
        except MachineFailed:
            identity = self._identity(handle)
            if identity is not None and processes.is_alive(identity):
                await self._kill(handle, identity)

    async def _keep_frozen(self, handle: MachineHandle) -> None:
        workdir = Path(handle.workdir)
        last = await asyncio.to_thread(read_checkpoint, workdir)
        logs = {name: (workdir / name).stat().st_size for name in (CHANNEL_LOG, CONSOLE_LOG) if (workdir / name).exists()}
        tag = next_tag(last)
        await self._drop_state(handle, tag)  # of one that was cut short
        ran_s = await self._keep_state(handle, tag)
        await asyncio.to_thread(write_checkpoint, workdir, Checkpoint(tag, logs, ran_s))
        if last is not None:
            await self._drop_state(handle, last.tag)

    def _living(self, handle: MachineHandle) -> ProcessIdentity:
        identity = self._identity(handle)
        if identity is None or not processes.is_alive(identity):
            raise MachineFailed("the machine is off")
        return identity
