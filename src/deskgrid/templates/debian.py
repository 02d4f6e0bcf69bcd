"""The debian template: Debian with systemd, ssh and cloud-init, made to boot in seconds, as a disk that `disk import --agent` takes.

For PCs of the kind amd64 with a BIOS only, as the machines of deskgrid are. The agent is not in the disk: the worker puts that on every
context disk (machines/context.py), so a published template never goes stale.

Where a plain Debian takes a minute to boot in software emulation, this one has its own initrd of busybox and a few modules; a root that
is mounted once; no unit that a machine of one job has no use for; no network set up by anybody but a rule of udev, so that nothing waits
for a card; cloud-init only if there is a disk for it (label CIDATA); and an ssh server only if the job offers ssh.
"""

from __future__ import annotations

import importlib.resources
import re
from collections.abc import Sequence

from deskgrid.errors import InvalidInput
from deskgrid.templates.debian_disk import DebianRecipe
from deskgrid.units import GIB, format_size

__all__ = ["DEFAULT_SIZE_BYTES", "debian_recipe"]

DEFAULT_SIZE_BYTES = 4 * GIB
"""Of the whole disk; what is not used takes no room."""
_SMALLEST_BYTES, _LARGEST_BYTES = 1 * GIB, 1024 * GIB
_PACKAGE = re.compile(r"[a-z0-9][a-z0-9+.-]+")
_PACKAGES = (
    *("linux-image-cloud-amd64", "busybox-static", "cpio", "zstd", "kmod", "systemd-sysv", "udev", "iproute2"),
    *("openssh-server", "cloud-init", "rsync", "socat", "wget", "ca-certificates"),
)
_WITHOUT = ("/usr/share/doc/*", "/usr/share/man/*", "/usr/share/locale/*", "/usr/share/info/*", "/usr/share/lintian/*")
_LABEL = "debian-system"
_NOT_NEEDED = (
    # Timers, for a machine that lives as long as one job.
    *("apt-daily.timer", "apt-daily-upgrade.timer", "dpkg-db-backup.timer", "e2scrub_all.timer", "fstrim.timer", "man-db.timer"),
    *("systemd-tmpfiles-clean.timer", "e2scrub_reap.service"),
    # Logins at a console: there is no password.
    *("getty@.service", "serial-getty@.service", "console-getty.service", "systemd-logind.service", "getty.target"),
    *("systemd-ask-password-console.path", "systemd-ask-password-wall.path"),
    # Started by the agent if the job offers ssh.
    *("ssh.service", "ssh.socket", "rsync.service"),
    # Of what the next boot would want: there is none.
    *(
        "systemd-random-seed.service",
        "systemd-update-utmp.service",
        "systemd-update-utmp-runlevel.service",
        "systemd-pstore.service",
    ),
    *("systemd-machine-id-commit.service", "systemd-journal-flush.service", "systemd-remount-fs.service"),
    # File systems that nobody asked for; they are there when somebody mounts them.
    *("dev-hugepages.mount", "dev-mqueue.mount", "sys-kernel-debug.mount", "sys-kernel-tracing.mount"),
    *("sys-kernel-config.mount", "sys-fs-fuse-connections.mount", "proc-sys-fs-binfmt_misc.automount"),
    *("modprobe@drm.service", "modprobe@efi_pstore.service", "modprobe@configfs.service", "modprobe@fuse.service"),
    *("modprobe@dm_mod.service", "modprobe@loop.service", "systemd-repart.service", "systemd-binfmt.service"),
    *("systemd-networkd.service", "systemd-networkd-wait-online.service", "systemd-timesyncd.service"),
    "systemd-user-sessions.service",
)
_GENERATORS_NOT_NEEDED = (
    *("bless-boot", "cryptsetup", "debug", "getty", "gpt-auto", "hibernate-resume", "integritysetup", "rc-local"),
    *("system-update", "veritysetup"),
)
_GRUB_CONFIG = """\
set timeout=0
linux /vmlinuz console=tty0 console=ttyS0,115200 quiet panic=-1 no_timer_check mitigations=off net.ifnames=0 audit=0 lsm=landlock,yama \
nowatchdog cryptomgr.notests systemd.condition-needs-update=no systemd.gpt_auto=no systemd.show_status=no
initrd /boot/deskgrid.img
boot
"""
_AGENT_UNIT = """\
[Unit]
Description=The job of this machine
After=multi-user.target cloud-final.service

[Service]
ExecStart=/usr/lib/deskgrid/start-agent
Environment=HOME=/root USER=root LOGNAME=root
StandardOutput=null
StandardError=null
KillMode=process

[Install]
WantedBy=multi-user.target
"""
_CARD_RULE = """\
# QEMU's and VirtualBox's own networks have no need for somebody who asks them for an address: nothing waits if there is no card.
ACTION=="add", SUBSYSTEM=="net", KERNEL=="eth0", RUN+="/bin/sh -c 'ip link set eth0 up; ip addr add 10.0.2.15/24 dev eth0; ip route add \
default via 10.0.2.2'"
"""
_CLOUD_CONFIG = """\
datasource_list: [ NoCloud, None ]
network: { config: disabled }
ssh_genkeytypes: [ ed25519 ]
locale: C.UTF-8
"""
_SSHD_CONFIG = """\
HostKey /etc/ssh/ssh_host_ed25519_key
PasswordAuthentication no
KbdInteractiveAuthentication no
PermitRootLogin prohibit-password
UseDNS no
"""
_JOURNAL_CONFIG = "[Journal]\nStorage=volatile\nAudit=no\n"
_HOSTS = "127.0.0.1 localhost debian\n::1 localhost ip6-localhost\n"


def debian_recipe(packages: Sequence[str] = (), *, size_bytes: int = DEFAULT_SIZE_BYTES) -> DebianRecipe:
    """Return the debian template's recipe. Raise InvalidInput for a name that cannot be a package's, or a size out of bounds."""
    for name in packages:
        if not _PACKAGE.fullmatch(name):
            raise InvalidInput(
                f"{name[:60]!r} is not the name of a package", hint="names with commas between them, as in apache2,wget"
            )
    if not _SMALLEST_BYTES <= size_bytes <= _LARGEST_BYTES:
        bounds = f"between {format_size(_SMALLEST_BYTES)} and {format_size(_LARGEST_BYTES)}"
        raise InvalidInput(f"a disk of {format_size(size_bytes)} cannot be built", hint=f"choose {bounds}")
    return DebianRecipe(
        name="debian",
        label=_LABEL,
        packages=tuple(dict.fromkeys((*_PACKAGES, *sorted(packages)))),
        files={
            "/boot/grub/grub.cfg": _GRUB_CONFIG,
            "/usr/lib/deskgrid/start-agent": _script("agent"),
            "/usr/lib/deskgrid/init": _script("init"),
            "/usr/lib/deskgrid/make-initrd": _script("initrd"),
            "/etc/deskgrid/start-ssh": _script("ssh"),
            "/etc/systemd/system/deskgrid-agent.service": _AGENT_UNIT,
            "/etc/systemd/journald.conf.d/deskgrid.conf": _JOURNAL_CONFIG,
            "/etc/udev/rules.d/80-deskgrid-card.rules": _CARD_RULE,
            "/etc/cloud/cloud.cfg.d/90_deskgrid.cfg": _CLOUD_CONFIG,
            "/etc/ssh/sshd_config.d/deskgrid.conf": _SSHD_CONFIG,
            "/etc/systemd/system-generators/cloud-init-generator": _script("cloud"),
            "/etc/hosts": _HOSTS,
        },
        commands=(
            f"/usr/lib/deskgrid/make-initrd {_LABEL}; rm /usr/lib/deskgrid/make-initrd\n"
            "systemctl --quiet enable deskgrid-agent.service\nsystemctl --quiet set-default multi-user.target\n"
            f"systemctl --quiet mask {' '.join(_NOT_NEEDED)}\nmkdir -p /context /scratch\n"
            f"for name in {' '.join(_GENERATORS_NOT_NEEDED)}; do ln -s /dev/null /etc/systemd/system-generators/systemd-$name-generator; done\n"
            # No file says that logins must wait for the end of the boot.
            "ln -s /dev/null /etc/tmpfiles.d/systemd-nologin.conf\n"
            "rm -f /etc/modules-load.d/modules.conf /usr/lib/udev/hwdb.bin\n"
        ),
        size_bytes=size_bytes,
        without=_WITHOUT,
        ext4="^has_journal",
        own_initrd=True,
    )


def _script(name: str) -> str:
    return (importlib.resources.files(__package__) / f"debian-{name}.sh").read_text()
