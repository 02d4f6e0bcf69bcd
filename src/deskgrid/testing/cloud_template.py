"""An ordinary Debian for tests: systemd, the stock cloud-init, GRUB, and nothing of ours in it.

It stands for the cloud image that a user brings. Like a cloud image it looks for NoCloud data only, boots from its own disk with the
distribution's initrd, and takes what it is to do from the context disk.
"""

from __future__ import annotations

import fcntl
import hashlib
from pathlib import Path

import msgspec

from deskgrid.templates import debian_disk
from deskgrid.templates.debian_disk import DebianRecipe, build_disk
from deskgrid.testing.tiny_template import template_cache
from deskgrid.units import GIB

__all__ = ["cloud_template"]

_LABEL = "cloudroot"
_PACKAGES = (
    *("linux-image-cloud-amd64", "zstd", "systemd-sysv", "udev", "dbus", "ifupdown", "openssh-server", "sudo"),
    *("cloud-init", "cloud-guest-utils"),
)
"""What Debian's own cloud images are made of, less editors, manuals and netplan.

A disk whose network is systemd-networkd's works too, but a machine without network card waits 120 s in it for one
(systemd-networkd-wait-online) before cloud-init goes on.
"""
_GRUB_CONFIG = f"""\
set timeout=0
linux /vmlinuz root=LABEL={_LABEL} ro console=tty0 console=ttyS0,115200
initrd /initrd.img
boot
"""
_RECIPE = DebianRecipe(
    name="cloud",
    label=_LABEL,
    packages=_PACKAGES,
    files={
        "/boot/grub/grub.cfg": _GRUB_CONFIG,
        "/etc/cloud/cloud.cfg.d/90_datasources.cfg": "datasource_list: [ NoCloud, None ]\n",
        "/etc/fstab": f"LABEL={_LABEL} / ext4 defaults 0 1\n",
    },
    size_bytes=2 * GIB,
    without=("/usr/share/man/*",),
)


def cloud_template() -> Path:
    """Return the disk (qcow2, not compressed) made by the present recipe, building it in minutes if need be.

    Raise as build_disk does.
    """
    folder = template_cache() / f"cloud-{_mark()}"
    folder.mkdir(parents=True, exist_ok=True)
    disk = folder / "cloud.qcow2"
    # A lock of its own: whoever wants the tiny template need not wait for this one.
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not disk.exists():
            build_disk(disk, template_cache() / "debian", _RECIPE)
    return disk


def _mark() -> str:
    """Return a hash of everything of ours that goes into the disk."""
    digest = hashlib.sha256(Path(debian_disk.__file__).read_bytes())
    digest.update(msgspec.json.encode(_RECIPE, order="deterministic"))
    return digest.hexdigest()[:16]
