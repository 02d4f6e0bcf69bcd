"""What this PC is, and how much of it is lent where its owner did not say."""

from __future__ import annotations

import contextlib
import os
import platform
import sys
from collections.abc import Iterable
from pathlib import Path

import psutil

from deskgrid import __version__
from deskgrid.core.manifests import check_endorser
from deskgrid.model.machines import Fingerprint
from deskgrid.model.workers import Capacity, Profile
from deskgrid.settings import WorkerSettings

__all__ = ["allocated_bytes", "lent_by", "make_gentle", "profile_of"]

_SYSTEMS = {"win32": "windows", "cygwin": "windows"}
_ARCHITECTURES = {"amd64": "x86_64", "x64": "x86_64", "arm64": "aarch64"}


def profile_of(
    settings: WorkerSettings, drivers: Iterable[Fingerprint], installed: Iterable[str] = (), *, secrets_key: str = ""
) -> Profile:
    """Return what the grid is told of this PC. `installed`: packages besides those that the owner declares. Raise InvalidInput."""
    for endorser in settings.endorsers:
        check_endorser(endorser, "endorsers")
    machine = platform.machine().lower()
    return Profile(
        os=_SYSTEMS.get(sys.platform, sys.platform),
        arch=_ARCHITECTURES.get(machine, machine),
        drivers=tuple(drivers),
        lent=lent_by(settings),
        version=__version__,
        packages=(*settings.packages, *installed),
        accepts=settings.accepts,
        endorsers=settings.endorsers,
        tags=settings.tags,
        shares=settings.share,
        keeps_bytes=min(settings.keep_bytes or (settings.cache_bytes // 2 if settings.share else 0), settings.cache_bytes),
        secrets_key=secrets_key,
    )


def lent_by(settings: WorkerSettings) -> Capacity:
    """Return the owner's bounds; where one is 0: all CPUs but one, half of the memory."""
    return Capacity(
        cpus=settings.cpus or max(1, _usable_cpus() - 1),
        memory_bytes=settings.memory_bytes or psutil.virtual_memory().total // 2,
        disk_bytes=settings.disk_bytes,
    )


def make_gentle(nice: int) -> None:
    """Give this process the lowest claim on CPU and disk, `nice` being 0 to 19. Never raises, never raises the priority."""
    process = psutil.Process()
    with contextlib.suppress(psutil.Error, OSError, ValueError):
        if sys.platform == "win32":
            process.nice(psutil.IDLE_PRIORITY_CLASS if nice >= 10 else psutil.BELOW_NORMAL_PRIORITY_CLASS)
        elif int(process.nice()) < nice:
            process.nice(nice)
    with contextlib.suppress(psutil.Error, OSError, ValueError, AttributeError):
        if sys.platform == "linux" and nice:
            # Not the idle class, which machines get: with it, our journal might wait for ever on a busy disk.
            process.ionice(psutil.IOPRIO_CLASS_BE, 7)


def allocated_bytes(folder: Path) -> int:
    """Return what the files below a folder take on the disk, holes not counted. Links are not followed. Blocks."""
    total = 0
    folders = [folder]
    while folders:
        with contextlib.suppress(OSError), os.scandir(folders.pop()) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    folders.append(Path(entry.path))
                    continue
                with contextlib.suppress(OSError):
                    status = entry.stat(follow_symlinks=False)
                    blocks: int | None = getattr(status, "st_blocks", None)
                    total += status.st_size if blocks is None else blocks * 512
    return total


def _usable_cpus() -> int:
    """Return the CPUs that this process may use, which inside a container can be fewer than the PC has."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
