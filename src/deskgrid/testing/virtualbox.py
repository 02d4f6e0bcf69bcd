"""The real VirtualBox of Debian sid in a folder that the tests make, for the tests of its driver on a PC that has none.

Without its kernel module VirtualBox starts no machine, but its interpreter can: `VBoxDriverless` (written here) is VBoxHeadless with its runtime told
to do without the module (RTR3InitExe with RTR3INIT_FLAGS_SUPLIB and TRY_SUPLIB in driverless mode), and the machine's settings allow the
interpreter. A guest is some fifty times slower so: one of 512 bytes takes a second, Linux three minutes.

Each program is a wrapper that enters the folder by chroot in a mount namespace of its own, in which /tmp and /var/tmp are the PC's own: so paths mean
the same inside and outside, and nothing stays mounted. It needs root.
"""

from __future__ import annotations

import fcntl
import subprocess
from pathlib import Path

from deskgrid.testing.tiny_template import template_cache

__all__ = ["DRIVERLESS", "virtualbox_folder"]

DRIVERLESS = "VBoxDriverless"
_PROGRAMS = "/usr/lib/virtualbox"
_ENTER = """#!/bin/sh
exec unshare --mount sh -c '
    root=$0
    mount --make-rprivate / && mount -t proc proc "$root/proc" && mount --rbind /dev "$root/dev" &&
    mount --rbind /tmp "$root/tmp" && mount --rbind /var/tmp "$root/var/tmp" && exec /usr/sbin/chroot "$root" "$@"
' {root} {command} "$@"
"""
_LAUNCHER = """import ctypes, sys
runtime = ctypes.CDLL("{programs}/VBoxRT.so", ctypes.RTLD_GLOBAL)
words = ["VBoxHeadless", *sys.argv[1:]]
argc, argv = len(words), (ctypes.c_char_p * (len(words) + 1))(*(word.encode() for word in words), None)
pointer = ctypes.cast(argv, ctypes.c_void_p)
if runtime.RTR3InitExe(argc, ctypes.byref(pointer), 0xC0004) < 0:
    sys.exit("VirtualBox's runtime does not start")
environment = (ctypes.c_char_p * 1)(None)
library = ctypes.CDLL("{programs}/VBoxHeadless.so", ctypes.RTLD_GLOBAL)
sys.exit(library.TrustedMain(argc, pointer, environment))
"""


def virtualbox_folder() -> Path:
    """Return a folder with VBoxManage, VBoxHeadless, VBoxSVC and `DRIVERLESS`; made once, in a minute, 0.8 GB."""
    folder = (template_cache() / "virtualbox").absolute()
    folder.mkdir(parents=True, exist_ok=True)
    root, programs = folder / "root", folder / "programs"
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        _install(root)
        _write_programs(root, programs)
    return programs


def _install(root: Path) -> None:
    if (root / _PROGRAMS.lstrip("/")).exists():
        return
    new = root.with_name("root.new")
    subprocess.run(["rm", "-rf", str(new)], check=True)
    subprocess.run(
        [
            *("mmdebstrap", "--quiet", "--mode=root", "--variant=minbase", "--components=main,contrib"),
            *('--aptopt=APT::Install-Recommends "false"', '--aptopt=Acquire::Check-Valid-Until "false"'),
            "--include=virtualbox,python3",
            # Nothing is started while it is installed.
            '--essential-hook=printf "#!/bin/sh\\nexit 101\\n" > "$1/usr/sbin/policy-rc.d"; chmod 755 "$1/usr/sbin/policy-rc.d"',
            *("sid", str(new), f"deb [trusted=yes] {_mirror()} sid main contrib"),
        ],
        check=True,
        capture_output=True,
        timeout=900,
    )
    new.rename(root)


def _mirror() -> str:
    """Return where this system's own packages come from."""
    for file in sorted(Path("/etc/apt").glob("sources.list.d/*.sources")):
        for line in file.read_text().splitlines():
            if line.startswith("URIs:"):
                return line.split()[1]
    for file in (Path("/etc/apt/sources.list"), *sorted(Path("/etc/apt").glob("sources.list.d/*.list"))):
        for line in file.read_text().splitlines() if file.exists() else ():
            words = [word for word in line.split() if "://" in word]
            if line.startswith("deb ") and words:
                return words[0]
    raise AssertionError("this system does not say where its packages come from")


def _write_programs(root: Path, programs: Path) -> None:
    (root / "launch.py").write_text(_LAUNCHER.format(programs=_PROGRAMS))
    programs.mkdir(exist_ok=True)
    commands = {name: f"{_PROGRAMS}/{name}" for name in ("VBoxManage", "VBoxHeadless", "VBoxSVC")}
    commands[DRIVERLESS] = "/usr/bin/python3 -I -S /launch.py"
    for name, command in commands.items():
        program = programs / f".{name}"
        program.write_text(_ENTER.format(root=root, command=command))
        program.chmod(0o755)
        program.rename(programs / name)
