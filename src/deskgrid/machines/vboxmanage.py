"""Calls of VirtualBox's VBoxManage, and what its words mean for the owner of a PC.

Rules, most of them learnt by BOINC's vboxwrapper:

1. A call has CALL_S; VBoxManage hangs when its service does.
2. Session locks and failures of its COM layer pass: a call that meets one is made again, with doubling pauses.
3. Programs are called by their full path in VirtualBox's own folder: the VBoxManage on PATH may be a distribution's script, which prints warnings
   among the answers and removes what belongs to others.
4. The locale is UTF-8: without it VirtualBox does not even start in a folder with other names than ASCII.
"""

from __future__ import annotations

import asyncio
import os
import re
import sys
from collections.abc import Mapping
from pathlib import Path

from deskgrid.archive import printable
from deskgrid.clock import Clock
from deskgrid.errors import MachineFailed
from deskgrid.machines.processes import find_program

__all__ = ["CALL_S", "call", "explain", "find_folder"]

CALL_S = 45.0
_TRIES = 5
_PAUSE_S = 0.5
_PASSING = re.compile(r"0x80bb0007|0x80004005|0x80080005|Failed to create the VirtualBox object", re.IGNORECASE)
"""Locked session, COM failure, COM server does not start."""
_FOLDERS = {
    "linux": ("/usr/lib/virtualbox", "/opt/VirtualBox"),
    "darwin": ("/Applications/VirtualBox.app/Contents/MacOS",),
    "win32": (r"C:\Program Files\Oracle\VirtualBox",),
}

_CAUSES = (
    (
        r"-1908\b|VERR_VM_DRIVER_NOT_INSTALLED|Kernel driver not installed",
        "VirtualBox's kernel module is not loaded (on Debian: sudo apt-get install virtualbox-dkms, then sudo modprobe vboxdrv)",
    ),
    (
        r"-1909\b|VERR_VM_DRIVER_NOT_ACCESSIBLE|permission problem",
        "this user may not use /dev/vboxdrv (reinstall VirtualBox, or sudo adduser $USER vboxusers, and log in again)",
    ),
    (
        r"-191[0-2]\b|VERR_VM_DRIVER_\w+",
        "VirtualBox's kernel module does not fit (on Debian: sudo dpkg-reconfigure virtualbox-dkms, or restart the PC after an upgrade)",
    ),
    (
        r"VERR_VMX_IN_VMX_ROOT_MODE|VERR_SVM_IN_USE|used by another hypervisor|disable the KVM kernel extension",
        "another hypervisor uses the CPU's virtualisation (end its machines, or sudo modprobe -r kvm_intel kvm_amd; on Windows switch off Hyper-V)",
    ),
    (
        r"VERR_VMX_MSR_\w*|VERR_VMX_NO_VMX|VERR_SVM_DISABLED|VERR_SVM_NO_SVM|disabled in the BIOS|not available on your host or disabled",
        "the CPU's virtualisation is switched off (switch on VT-x or AMD-V in the PC's firmware)",
    ),
    (
        r"VERR_NO_MEMORY|VERR_NO_LOW_MEMORY|VERR_NO_PAGE_MEMORY|VERR_NO_CONT_MEMORY|VERR_GMM_OUT_OF_MEMORY|out of memory",
        "there is not enough memory for the machine (lend less: memory_bytes in worker.toml)",
    ),
    (r"VERR_DISK_FULL|disk full", "the disk of this PC is full"),
    (
        r"Error -10 in SUPR3HardenedMain|not owned by root",
        "VirtualBox does not start in a sandbox, or is not installed as root's (reinstall it)",
    ),
    (r"VERR_SSM_\w+", "the saved state does not fit this PC or VirtualBox any more"),
)
"""Words of VirtualBox, or the numbers of its errors (include/VBox/err.h), and what they mean, with what to do."""


def find_folder() -> Path | None:
    """Return the folder with VirtualBox's programs, None if it is not installed."""
    suffix = ".exe" if sys.platform == "win32" else ""
    told = os.environ.get("VBOX_MSI_INSTALL_PATH")
    folders = [Path(folder) for folder in (*([told] if told else []), *_FOLDERS.get(sys.platform, ()))]
    on_path = find_program("VBoxManage")
    folders += [Path(on_path).resolve().parent] if on_path else []
    return next((folder for folder in folders if (folder / f"VBoxHeadless{suffix}").exists()), None)


def explain(words: str) -> str:
    """Return what VirtualBox's words mean and what to do; the last of them if that is not known."""
    for pattern, meaning in _CAUSES:
        if re.search(pattern, words, re.IGNORECASE):
            return meaning
    lines = [line.strip() for line in words.splitlines() if line.strip()]
    return printable(" ".join(lines[-3:])[-300:]) or "VirtualBox gave no reason"


async def call(folder: Path, arguments: list[str], environment: Mapping[str, str], clock: Clock) -> str:
    """Run VBoxManage and return what it printed. Raise MachineFailed with the cause, after some tries if it may pass."""
    for number in range(_TRIES):
        if number:
            await clock.sleep(_PAUSE_S * 2 ** (number - 1))
        code, words = await _run([str(folder / "VBoxManage"), "-q", *arguments], environment)
        if code == 0:
            return words
        if not _PASSING.search(words):
            break
    raise MachineFailed(f"VBoxManage {arguments[0]} failed: {explain(words)}")


async def _run(command: list[str], environment: Mapping[str, str]) -> tuple[int, str]:
    """Return exit code and words; a call that takes too long is ended and has failed."""
    try:
        child = await asyncio.create_subprocess_exec(
            *command,
            env=dict(environment),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )
    except OSError as error:
        raise MachineFailed(f"{command[0]} cannot be run: {error.strerror}") from error
    try:
        async with asyncio.timeout(CALL_S):
            output, _ = await child.communicate()
    except TimeoutError:
        return 1, f"no answer within {CALL_S:.0f} s"
    finally:
        if child.returncode is None:
            child.kill()
            await child.wait()
    return child.returncode or 0, output.decode(errors="replace")
