"""The sandbox of a process job: bubblewrap's command line, the few files of its /etc, its seccomp filter.

What the job sees:

    /usr /bin /lib ...    the system's programs and libraries, read-only
    /etc                  EXPOSED of the system's, and hosts, passwd, ... of our own; read-only
    /context /app         its files, read-only
    /scratch /tmp         its own; what is in /scratch is the result
    /proc                 of its own processes, read-only: for a worker that is root, /proc/sys would be the PC's
    /dev                  null, zero, full, random, urandom, tty, pts; /dev/shm is a folder on the disk, and counts like /tmp
    nothing else: no home, no /run, no /var, no /sys

It has namespaces of its own for users, processes, mounts, IPC, host name and (without a network) network; with one it is in the cage
(cage.py). No capability, no_new_privs, and a filter that refuses what a sandbox has no use for. Inside, `prlimit` sets the bounds that have to be
set there: processes are counted for each user namespace (getrlimit(2)).
"""

from __future__ import annotations

import errno
import re
import tempfile
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path

from msgspec import Struct

from deskgrid.machines import processes
from deskgrid.machines.context import DATA_FOLDER, network_environment
from deskgrid.machines.driver import MachineSpec
from deskgrid.machines.process_machine import FILTER_FD, STATUS_FD
from deskgrid.machines.sandbox import add_rule, load_seccomp
from deskgrid.model.machines import Network

__all__ = [
    "Folders",
    "bare_environment",
    "bare_line",
    "bounds_line",
    "command_of",
    "confinement_faults",
    "environment_of",
    "missing",
    "missing_bare",
    "namespace_words",
    "sandbox_line",
    "seccomp_filter",
    "system_files",
    "system_mounts",
]

JOB_USER = 1000
_SYSTEM = ("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32")
EXPOSED = (
    *(
        "alternatives",
        "ca-certificates",
        "ca-certificates.conf",
        "crypto-policies",
        "fonts",
        "gai.conf",
        "ld.so.cache",
        "ld.so.conf",
    ),
    *("ld.so.conf.d", "localtime", "magic", "mime.types", "pki/ca-trust", "pki/tls/certs", "protocols", "services", "ssl/certs"),
    *("ssl/openssl.cnf", "timezone"),
)
"""In /etc: what programs look up, and nothing about this PC or its people."""
_PROC_DATA_FACTOR, _PROC_DATA_SPARE = 4, 1 << 30
"""A process may reserve more memory than it uses (threads' stacks), but not without end."""
_SPARE_THREADS = 1000
"""That the owner may start meanwhile before a job without sandbox can start none: there RLIMIT_NPROC counts all that the user has."""
_MOST_SEGMENT_BYTES = 64 << 10
"""Of System V shared memory, which is nobody's resident memory; 4096 of them may exist. Databases lock with small ones."""


class Folders(Struct, frozen=True):
    """What of the host a sandbox gets; absolute paths."""

    etc: Path
    context: Path
    scratch: Path
    tmp: Path
    shared: Path
    """For /dev/shm."""
    program: Path | None = None
    data: tuple[tuple[str, Path], ...] = ()


def missing() -> str:
    """Return what of the sandbox's parts this PC lacks and what to do, "" if nothing."""
    if processes.find_program("bwrap") is None:
        return "bubblewrap is not installed (on Debian: sudo apt-get install bubblewrap)"
    if reason := missing_bare():
        return reason
    if load_seccomp() is None:
        return "libseccomp is not installed (on Debian: sudo apt-get install libseccomp2)"
    return ""


def missing_bare() -> str:
    """Return what a job without sandbox lacks here, "" if nothing."""
    if processes.find_program("prlimit") is None:
        return "prlimit is not installed (on Debian: sudo apt-get install util-linux)"
    if processes.find_program("env") is None:
        return "env is not installed (on Debian: sudo apt-get install coreutils)"
    return ""


# ---- command lines


def sandbox_line(spec: MachineSpec, folders: Folders) -> list[str]:
    """Return the line that runs the job's command in its sandbox. Descriptors FILTER_FD and STATUS_FD are to be open."""
    program = processes.find_program("bwrap") or "bwrap"
    return [
        *(program, *namespace_words(JOB_USER, network=spec.network is Network.NONE)),
        *("--cap-drop", "ALL"),
        *system_mounts(),
        *_etc_mounts(folders.etc),
        *("--proc", "/proc", "--dev", "/dev", "--bind", str(folders.shared), "/dev/shm"),  # noqa: S108 the sandbox's own
        *context_mounts(folders),
        *(("--ro-bind", str(folders.program), "/app") if folders.program is not None else ("--dir", "/app")),
        *("--bind", str(folders.scratch), "/scratch", "--bind", str(folders.tmp), "/tmp"),  # noqa: S108
        *("--remount-ro", "/proc", "--remount-ro", "/dev", "--remount-ro", "/etc", "--remount-ro", "/"),
        *("--chdir", "/scratch", "--seccomp", str(FILTER_FD), "--json-status-fd", str(STATUS_FD), "--"),
        *bounds_line(spec),
        *command_of(spec, folders.context),
    ]


def context_mounts(folders: Folders) -> list[str]:
    """Return the words that mount /context, and over its places for data the files in the cache."""
    data = [(str(path), f"/context/{DATA_FOLDER}/{name}") for name, path in folders.data]
    return ["--ro-bind", str(folders.context), "/context", *(word for file in data for word in ("--ro-bind", *file))]


def namespace_words(user: int, *, network: bool) -> list[str]:
    """Return the words by which bubblewrap makes namespaces of its own, one for the network only if `network`, that end with its parent."""
    return [
        *("--unshare-user", "--unshare-pid", "--unshare-ipc", "--unshare-uts", "--unshare-cgroup-try"),
        *(("--unshare-net",) if network else ()),
        *("--die-with-parent", "--new-session", "--uid", str(user), "--gid", str(user), "--hostname", "job"),
    ]


def bounds_line(spec: MachineSpec) -> list[str]:
    """Return the words in front of a command that bound it."""
    return _bounds_line(spec, spec.processes + 1)  # pid 1 of the sandbox counts


def _bounds_line(spec: MachineSpec, threads: int) -> list[str]:
    file_bytes = min(filter(None, (spec.file_bytes, spec.scratch_bytes)), default=0)
    return [
        processes.find_program("prlimit") or "prlimit",
        *(("--nproc=" + str(threads),) if spec.processes else ()),
        *(("--fsize=" + str(file_bytes),) if file_bytes else ()),
        "--data=" + str(spec.memory_bytes * _PROC_DATA_FACTOR + _PROC_DATA_SPARE),
        *("--memlock=65536", "--msgqueue=65536", "--core=0", "--"),
    ]


def bare_line(spec: MachineSpec, folders: Folders) -> list[str]:
    """Return the line that runs the job's command without a sandbox, in its scratch folder and within its bounds.

    What the sandbox shows as /context, /app, /scratch and /tmp has other names then: in the command's words they are put in.
    """
    threads = processes.threads_of_user() + spec.processes + _SPARE_THREADS if spec.processes else 0
    return [
        *(processes.find_program("env") or "env", "-C", str(folders.scratch)),
        *_bounds_line(spec, threads),
        *(_placed(word, folders) for word in command_of(spec, folders.context)),
    ]


def _places(folders: Folders) -> dict[str, Path]:
    """Return what the names of the sandbox are without it."""
    app = {"/app": folders.program} if folders.program is not None else {}
    return {"/context": folders.context, **app, "/scratch": folders.scratch, "/tmp": folders.tmp}  # noqa: S108


def _placed(word: str, folders: Folders) -> str:
    for name, place in _places(folders).items():
        if word == name or word.startswith(f"{name}/"):
            return f"{place}{word.removeprefix(name)}"
    return word


def command_of(spec: MachineSpec, context: Path) -> list[str]:
    """Return what the job runs: its command, else the script of its context, else what a VM without one says."""
    if spec.command:
        return list(spec.command)
    if (context / "context.sh").is_file():
        return ["/bin/sh", "/context/context.sh"]
    return ["/bin/sh", "-c", "echo 'deskgrid: there is no context.sh' >&2"]


def environment_of(spec: MachineSpec) -> dict[str, str]:
    """Return all variables of the job; its spec's own win."""
    return {
        "PATH": "/usr/local/bin:/usr/bin:/bin:/usr/local/sbin:/usr/sbin:/sbin",
        "HOME": "/tmp",  # noqa: S108
        "TMPDIR": "/tmp",  # noqa: S108
        "USER": "job",
        "LOGNAME": "job",
        "LANG": "C.UTF-8",
        **dict(network_environment(spec)),
        **dict(spec.environment),
    }


def bare_environment(spec: MachineSpec, folders: Folders) -> dict[str, str]:
    """Return all variables of a job without sandbox; besides, where its folders are (DESKGRID_CONTEXT, ...). TMPDIR is always its own."""
    places = {f"DESKGRID_{name.strip('/').upper()}": str(place) for name, place in _places(folders).items()}
    own = {name: _placed(value, folders) for name, value in spec.environment}
    return {**environment_of(spec), "HOME": str(folders.tmp), **places, **own, "TMPDIR": str(folders.tmp)}


def system_mounts() -> Iterator[str]:
    """Yield the words that show the system's programs and libraries, read-only."""
    for name in _SYSTEM:
        path = Path(name)
        if path.is_symlink():
            yield from ("--symlink", str(path.readlink()), name)
        elif path.is_dir():
            yield from ("--ro-bind", name, name)


def _etc_mounts(own: Path) -> Iterator[str]:
    yield from ("--tmpfs", "/etc")
    for name in EXPOSED:
        yield from ("--ro-bind-try", f"/etc/{name}", f"/etc/{name}")
    for file in sorted(own.iterdir()):
        yield from ("--ro-bind", str(file), f"/etc/{file.name}")


# ---- files


def system_files(spec: MachineSpec) -> dict[str, str]:
    """Return the files of the sandbox's own /etc, by name."""
    doors = "".join(f"{door.host} {door.name}\n" for door in spec.reach) if spec.network is not Network.NONE else ""
    return {
        "passwd": f"root:x:0:0:root:/:/bin/sh\njob:x:{JOB_USER}:{JOB_USER}:job:/tmp:/bin/sh\n",
        "group": f"root:x:0:\njob:x:{JOB_USER}:\n",
        "hosts": f"127.0.0.1 localhost job\n{doors}",
        "hostname": "job\n",
        "resolv.conf": "# there is no name server here: see hosts\n",
        "nsswitch.conf": "passwd: files\ngroup: files\nhosts: files\nservices: files\nprotocols: files\n",
        "host.conf": "multi on\n",
    }


# ---- the filter

_REFUSED = (
    *("ptrace", "process_vm_readv", "process_vm_writev", "pidfd_getfd", "kcmp", "process_madvise"),
    *("mount", "umount", "umount2", "move_mount", "open_tree", "open_tree_attr", "fsopen", "fsmount", "fspick", "fsconfig"),
    *("mount_setattr", "pivot_root", "chroot", "unshare", "setns", "statmount", "listmount"),
    *("keyctl", "add_key", "request_key", "bpf", "perf_event_open", "userfaultfd", "open_by_handle_at", "name_to_handle_at"),
    *("io_uring_setup", "io_uring_enter", "io_uring_register", "fanotify_init", "lookup_dcookie"),
    *("init_module", "finit_module", "delete_module", "create_module", "kexec_load", "kexec_file_load", "reboot"),
    *("swapon", "swapoff", "quotactl", "quotactl_fd", "acct", "syslog", "settimeofday", "clock_settime", "clock_adjtime"),
    *(
        "adjtimex",
        "stime",
        "sethostname",
        "setdomainname",
        "iopl",
        "ioperm",
        "modify_ldt",
        "vm86",
        "vm86old",
        "uselib",
        "nfsservctl",
    ),
    *("vhangup", "personality", "mbind", "set_mempolicy", "set_mempolicy_home_node", "migrate_pages", "move_pages", "memfd_secret"),
    *("sched_setaffinity", "mknod", "mknodat"),
)
"""What a job has no use for. The first of the last row would undo the bound on CPUs; FIFOs are let through again below."""
_NEW_NAMESPACES = (0x80, 0x20000, 0x2000000, 0x4000000, 0x8000000, 0x10000000, 0x20000000, 0x40000000)
"""CLONE_NEWTIME ... CLONE_NEWNET (clone(2))."""
_TIOCSTI, _TIOCLINUX = 0x5412, 0x541C
_LAST_FAMILY = 16
_FAMILIES = frozenset({1, 2, 10, 16})
"""Of sockets: AF_UNIX, AF_INET, AF_INET6, AF_NETLINK. Others, as AF_VSOCK, know no network namespaces, or are doors into odd parts of the kernel."""
_LOW_WORD = 0xFFFFFFFF
_S_IFMT, _DEVICES = 0o170000, (0o020000, 0o060000)


@lru_cache(maxsize=1)
def seccomp_filter() -> bytes:
    """Return the filter as bubblewrap takes it: a BPF program. Raise OSError if libseccomp is missing or refuses."""
    seccomp = load_seccomp()
    if seccomp is None:
        raise OSError(errno.ENOSYS, "libseccomp is missing")
    rules = seccomp.SyscallFilter(seccomp.ALLOW)
    refuse, unknown = seccomp.ERRNO(errno.EPERM), seccomp.ERRNO(errno.ENOSYS)
    for name in _REFUSED:
        if not name.startswith("mknod"):
            add_rule(rules, refuse, name)
    # FIFOs and sockets are made with these, too; devices could not be made anyway.
    for kind in _DEVICES:
        add_rule(rules, refuse, "mknod", seccomp.Arg(1, seccomp.MASKED_EQ, _S_IFMT, kind))
        add_rule(rules, refuse, "mknodat", seccomp.Arg(2, seccomp.MASKED_EQ, _S_IFMT, kind))
    for flag in _NEW_NAMESPACES[1:]:  # the first is a part of the signal's number in clone
        add_rule(rules, refuse, "clone", seccomp.Arg(0, seccomp.MASKED_EQ, flag, flag))
    # clone3 hides its flags in memory; with ENOSYS the C library goes back to clone.
    add_rule(rules, unknown, "clone3")
    # Memory that is in no process's account; with ENOSYS programs go back to files.
    add_rule(rules, unknown, "memfd_create")
    add_rule(rules, refuse, "shmget", seccomp.Arg(1, seccomp.GT, _MOST_SEGMENT_BYTES))
    for request in (_TIOCSTI, _TIOCLINUX):
        add_rule(rules, refuse, "ioctl", seccomp.Arg(1, seccomp.MASKED_EQ, _LOW_WORD, request))
    for call in ("socket", "socketpair"):
        add_rule(rules, refuse, call, seccomp.Arg(0, seccomp.GT, _LAST_FAMILY))
        for family in set(range(_LAST_FAMILY)) - _FAMILIES:
            add_rule(rules, refuse, call, seccomp.Arg(0, seccomp.EQ, family))
    with tempfile.TemporaryFile() as file:
        rules.export_bpf(file)
        file.seek(0)
        return file.read()


# ---- what a probe says


def confinement_faults(status: str, devices: str) -> Sequence[str]:
    """Return what is not confined, by /proc/self/status and /proc/net/dev as a program in a sandbox without network reads them."""
    told = dict(re.findall(r"^(\w+):\s*(.*)$", status, re.MULTILINE))
    wanted = {"NoNewPrivs": "1", "Seccomp": "2", "CapEff": "0" * 16, "CapPrm": "0" * 16, "CapInh": "0" * 16, "CapAmb": "0" * 16}
    faults = [f"{name} is {told.get(name, 'not told')}" for name, value in wanted.items() if told.get(name) != value]
    cards = re.findall(r"^\s*([^\s:|]+):", devices, re.MULTILINE)
    return [*faults, *(f"it has the network {card}" for card in cards if card != "lo")]
