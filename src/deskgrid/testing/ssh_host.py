"""A host that is reached by ssh, for tests: a real sshd on loopback with keys of its own, that lets in who runs the tests. What is begun there ends with it."""

from __future__ import annotations

import contextlib
import os
import pwd
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from msgspec import Struct

from deskgrid.testing.reaper import apart, follow

__all__ = ["SshHost", "running_sshd"]

_LIMIT_S = 60.0
_CONFIG = """
Port {port}
ListenAddress 127.0.0.1
HostKey {folder}/host_key
AuthorizedKeysFile {folder}/user_key.pub
PidFile none
StrictModes no
UsePAM no
PasswordAuthentication no
SetEnv TMPDIR={folder}/temporary
"""


class SshHost(Struct, frozen=True, kw_only=True):
    """One that runs; see `running_sshd`."""

    name: str
    """As in ann@desk."""
    options: tuple[str, ...]
    """Of ssh, to reach it."""
    temporary: Path
    """Its folder for temporary files."""


@contextlib.contextmanager
def running_sshd() -> Iterator[SshHost]:
    """Run a host. Raise FileNotFoundError if sshd is not installed."""
    sshd = shutil.which("sshd", path=f"{os.environ['PATH']}:/usr/sbin:/sbin")  # it starts itself again, by its whole path
    if sshd is None:
        raise FileNotFoundError("sshd is not installed: apt-get install openssh-server")
    with tempfile.TemporaryDirectory(prefix="deskgrid-ssh-") as name, socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        folder = Path(name)
        (folder / "temporary").mkdir()
        for key in ("host_key", "user_key"):
            subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / key], check=True)
        (folder / "sshd.conf").write_text(_CONFIG.format(folder=folder, port=port))
        if os.geteuid() == 0:
            Path("/run/sshd").mkdir(exist_ok=True)
        free.close()
        with (folder / "log").open("wb") as log:
            server = subprocess.Popen(
                [*apart(), sshd, "-D", "-e", "-f", folder / "sshd.conf"], stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
        follow(server.pid)
        try:
            _wait(server, port, folder / "log")
            yield SshHost(
                name=f"{pwd.getpwuid(os.geteuid()).pw_name}@127.0.0.1",
                options=_options(folder, port),
                temporary=folder / "temporary",
            )
        finally:
            server.kill()
            server.wait(_LIMIT_S)


def _options(folder: Path, port: int) -> tuple[str, ...]:
    (folder / "known_hosts").write_text(f"[127.0.0.1]:{port} {(folder / 'host_key.pub').read_text()}")
    return (
        "-F",
        "none",
        "-o",
        "IdentitiesOnly=yes",
        "-p",
        str(port),
        "-i",
        str(folder / "user_key"),
        "-o",
        f"UserKnownHostsFile={folder / 'known_hosts'}",
    )


def _wait(server: subprocess.Popen[bytes], port: int, log: Path) -> None:
    end = time.monotonic() + _LIMIT_S
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1.0).close()
            return
        except OSError:
            if server.poll() is not None or time.monotonic() > end:
                raise RuntimeError(f"sshd did not start: {log.read_text()}") from None
            time.sleep(0.05)
