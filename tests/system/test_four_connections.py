"""The four connections that deskgrid was made for, with the real programs, through two sites behind NAT and a firewalled hub, on every path.

The programs run in the cages of machines (fake ones, that only hold the cage open), where they find exactly what programs in a VM
find; the same connections in real VMs are in test_real_vm.py. The WebDAV server is Apache httpd's mod_dav. 100 MB each.

    1  a WebDAV server in a job, used from the user's PC        curl
    2  a web server on the user's PC, used from a job           wget
    3  a WebDAV server in a job, used from another job          wget
    4  ssh into a job                                           ssh, scp, rsync
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from deskgrid.testing.natlab import Nat, NatLab
from tests.system.cage import inside
from tests.system.lab import LabGrid
from tests.system.talk import started

pytestmark = pytest.mark.full

SIZE_BYTES = 100_000_000
WAYS = {
    "direct": Nat.NONE,
    "reverse": Nat.NONE,
    "punched": Nat.MASQUERADE,
    "relayed": Nat.FULLY_RANDOM,
}
"""Path -> what stands before both sites: streams begin on either side, so a forced path must work both ways."""
HTTPD = """
ServerRoot {folder}
PidFile {folder}/httpd.pid
ServerName localhost
Listen 8080
{user}
LoadModule mpm_event_module {modules}/mod_mpm_event.so
LoadModule authz_core_module {modules}/mod_authz_core.so
LoadModule dav_module {modules}/mod_dav.so
LoadModule dav_fs_module {modules}/mod_dav_fs.so
ErrorLog {folder}/error.log
DavLockDB {folder}/locks
DocumentRoot {folder}/files
<Directory {folder}/files>
  Dav On
  Require all granted
</Directory>
"""
SSHD = """
Port 2222
HostKey {folder}/host_key
AuthorizedKeysFile {folder}/authorized_keys
PidFile none
StrictModes no
UsePAM no
PasswordAuthentication no
Subsystem sftp internal-sftp
"""


def digest(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


class Site:
    """The grid between two sites, with a job whose cage has the servers."""

    def __init__(self, grid: LabGrid) -> None:
        self.grid = grid
        self.folder = grid.folder
        self.source = grid.folder / "source"
        self.source.write_bytes(os.urandom(SIZE_BYTES))
        self.sent = digest(self.source)

    def run(self, *command: str | Path, where: tuple[str, ...]) -> str:
        done = subprocess.run(
            [*where, *map(str, command)], capture_output=True, text=True, timeout=280, check=False, env=self.grid.environment
        )
        assert done.returncode == 0, f"{command}: {done.stdout}\n{done.stderr}\n{self.grid.logs()}"
        return done.stdout

    @contextlib.contextmanager
    def started(self, *command: str | Path, where: tuple[str, ...]) -> Iterator[None]:
        with (self.folder / f"{Path(command[0]).name}.log").open("ab") as log:
            process = subprocess.Popen([*where, *map(str, command)], stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        try:
            yield
        finally:
            process.terminate()
            process.wait(30)

    def httpd(self) -> list[str | Path]:
        """Return the command of a WebDAV server on port 8080."""
        folder = self.folder / "httpd"
        (folder / "files").mkdir(parents=True)
        user = ""
        if os.geteuid() == 0:
            user = "User nobody\nGroup nogroup"
            for path in (folder, folder / "files"):
                shutil.chown(path, "nobody", "nogroup")
            for path in (folder, *folder.parents):  # pytest's folders are for root only
                with contextlib.suppress(PermissionError):
                    path.chmod(path.stat().st_mode | 0o011)
        (folder / "httpd.conf").write_text(HTTPD.format(folder=folder, modules="/usr/lib/apache2/modules", user=user))
        return [program("apache2"), "-d", folder, "-f", folder / "httpd.conf", "-D", "FOREGROUND"]

    def sshd(self) -> list[str | Path]:
        """Return the command of an ssh server on port 2222 that lets the user's key in."""
        (self.folder / "sshd").mkdir()
        folder = self.folder / "sshd"
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / "host_key"], check=True)
        key = self.grid.job(1)["job"]["spec"]["machine"]["ssh_keys"][0]
        (folder / "authorized_keys").write_text(key + "\n")
        (folder / "sshd.conf").write_text(SSHD.format(folder=folder))
        if os.geteuid() == 0:
            Path("/run/sshd").mkdir(exist_ok=True)
        return [program("sshd"), "-D", "-e", "-f", folder / "sshd.conf"]


def program(name: str) -> str:
    found = shutil.which(name, path=os.environ["PATH"] + ":/usr/sbin:/sbin")
    assert found, f"{name} is needed: tools/setup full"
    return found


@pytest.fixture(params=WAYS)
def site(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Site]:
    with NatLab(dict.fromkeys("ab", WAYS[request.param]), hosts=2) as lab:
        grid = LabGrid(tmp_path, lab, lab.sites["b"][0], DESKGRID_PEER_PATHS=request.param)
        try:
            grid.start_server()
            grid.publish()
            grid.add_worker_at(lab.sites["a"][0])
            yield Site(grid)
            assert grid.paths_taken() <= {request.param}
        finally:
            grid.stop()
            for process in [process for name in grid.workers for process in grid.machines(name)]:
                process.kill()


def test_the_four_connections(site: Site):
    grid = site.grid
    with site.started(sys.executable, "-m", "http.server", "8000", "-d", site.folder, where=grid.user.prefix):
        started(grid, "offer", "web", "8000")
        offers = {"network": '"overlay"', "offer": '["dav:8080", "ssh:2222"]', "reach": '{ site = "web.user:8000" }', "cpus": "2"}
        server = grid.submit("listening = [8080, 2222]\nhangs = true\n", name="server", **offers)
        grid.wait_for(server, "active", ["running"])
        cage = inside(site.grid)
        with site.started(*site.httpd(), where=cage), site.started(*site.sshd(), where=cage):
            use_webdav_from_the_users_pc(site, server)
            fetch_from_the_users_pc(site, cage)
            fetch_from_another_job(site, server)
            log_in_and_copy(site, server)


def use_webdav_from_the_users_pc(site: Site, server: int) -> None:
    _, ready = started(site.grid, "connect", f"dav.job-{server}")
    url = f"http://127.0.0.1:{ready['address'].rpartition(':')[2]}"
    here = site.grid.user.prefix
    site.run("curl", "-sSf", "-X", "MKCOL", f"{url}/data/", where=here)
    site.run("curl", "-sSf", "-T", site.source, f"{url}/data/source", where=here)
    listing = site.run("curl", "-sSf", "-X", "PROPFIND", "-H", "Depth: 1", f"{url}/data/", where=here)
    assert f"<lp1:getcontentlength>{SIZE_BYTES}<" in listing
    site.run("curl", "-sSf", "-o", site.folder / "back", f"{url}/data/source", where=here)
    assert digest(site.folder / "back") == site.sent


def fetch_from_the_users_pc(site: Site, cage: tuple[str, ...]) -> None:
    site.run("wget", "-q", "-O", site.folder / "fetched", "http://10.64.1.1:8000/source", where=cage)
    assert digest(site.folder / "fetched") == site.sent


def fetch_from_another_job(site: Site, server: int) -> None:
    """On a second volunteer's PC, at the other site: the first one is full."""
    site.grid.add_worker_at(site.grid.lab.sites["b"][-1], "pc2")
    client = site.grid.submit("hangs = true\n", name="client", network='"overlay"', reach=f'{{ dav = "dav.job-{server}:80" }}')
    site.grid.wait_for(client, "active", ["running"])
    site.run("wget", "-q", "-O", site.folder / "copied", "http://10.64.1.1:80/data/source", where=inside(site.grid, "pc2"))
    assert digest(site.folder / "copied") == site.sent


def log_in_and_copy(site: Site, server: int) -> None:
    here = site.grid.user.prefix
    assert site.grid.cli("ssh", f"job-{server}", "echo hello from $((40 + 2))").stdout == "hello from 42\n"
    site.grid.cli("scp", site.source, f"job-{server}:{site.folder / 'by-scp'}")
    assert digest(site.folder / "by-scp") == site.sent
    shell = f"{sys.executable} -m deskgrid ssh"
    site.run("rsync", "-e", shell, site.source, f"job-{server}:{site.folder / 'by-rsync'}", where=here)
    assert digest(site.folder / "by-rsync") == site.sent
