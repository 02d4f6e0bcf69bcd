"""A Slurm of one's own for tests: munge, a controller and one node in a temporary folder, on loopback only, gone afterwards with all that runs in it.

Without systemd, writable cgroups, accounting or a user of its own: it runs as who runs the tests, and so do its jobs.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import secrets
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from deskgrid.testing.reaper import apart, follow

__all__ = ["Slurm", "running_slurm"]

_LIMIT_S = 60.0
_CONFIG = """
ClusterName=deskgrid
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller}
SlurmdPort={node}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CryptoType=crypto/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SlurmdParameters=config_overrides
ReturnToService=2
SchedulerParameters=batch_sched_delay=0,sched_interval=1
MessageTimeout=3
MinJobAge=2
NodeName=pc NodeHostname={host} NodeAddr=127.0.0.1 CPUs={cpus} RealMemory=65536
PartitionName=main Nodes=pc Default=YES MaxTime=INFINITE State=UP
"""


class Slurm:
    """One that runs; see `running_slurm`."""

    def __init__(self, folder: Path, environment: dict[str, str]) -> None:
        self.folder = folder
        self.environment = environment
        """What its commands need."""
        self._running: dict[str, subprocess.Popen[bytes]] = {}

    def queue(self) -> list[tuple[str, str]]:
        """Return the names and states of all jobs that wait or run."""
        return [
            (name, state)
            for name, state in (line.split() for line in self._say("squeue", "--noheader", "--format=%j %T").splitlines())
        ]

    def stop_controller(self) -> None:
        """Let its commands get no answer. What runs goes on."""
        self._end("slurmctld")

    def start_controller(self) -> None:
        """Start it, with what was in the queue, and wait until it answers."""
        self._start("slurmctld", ["slurmctld", "-D", "-i", "-f", self.folder / "slurm.conf"])
        self._wait(
            lambda: subprocess.run(["scontrol", "ping"], env=self.environment, capture_output=True, check=False).returncode == 0
        )

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Run all of it."""
        munge = [self.folder / f"munge.{name}" for name in ("key", "socket", "pid", "seed", "log")]
        names = ("key-file", "socket", "pid-file", "seed-file", "log-file")
        try:
            self._start("munged", ["munged", "-F", *(f"--{name}={file}" for name, file in zip(names, munge, strict=True))])
            self._wait(munge[1].exists)
            self.start_controller()
            self._start("slurmd", [*apart(), "slurmd", "-D", "-f", self.folder / "slurm.conf"])
            self._wait(lambda: self._say("sinfo", "--noheader", "--format=%t", check=False).strip() == "idle")
            yield
        finally:
            for name in reversed(list(self._running)):
                self._end(name)

    def said(self) -> str:
        """Return what its programs logged."""
        return "\n".join(
            f"--- {file.name}\n{file.read_text(errors='replace')[-4000:]}" for file in sorted(self.folder.glob("*.log"))
        )

    def _start(self, name: str, command: Sequence[str | Path]) -> None:
        with (self.folder / f"{name}.log").open("ab") as log:
            process = subprocess.Popen(
                command, env=self.environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=self.folder
            )
        follow(process.pid)
        self._running[name] = process

    def _end(self, name: str) -> None:
        process = self._running.pop(name)
        if name == "slurmd":  # unshare keeps SIGTERM from itself
            process.kill()
        else:
            process.terminate()
        process.wait(_LIMIT_S)

    def _wait(self, condition: Callable[[], bool]) -> None:
        end = time.monotonic() + _LIMIT_S
        while not condition():
            ended = [name for name, process in self._running.items() if process.poll() is not None]
            if ended or time.monotonic() > end:
                raise RuntimeError(f"Slurm did not start ({', '.join(ended) or 'too slow'}):\n{self.said()}")
            time.sleep(0.05)

    def _say(self, *command: str, check: bool = True) -> str:
        return subprocess.run(command, env=self.environment, capture_output=True, text=True, check=check).stdout


@contextlib.contextmanager
def running_slurm(*, cpus: int = 2) -> Iterator[Slurm]:
    """Run a Slurm with one node. Raise FileNotFoundError if it is not installed."""
    path = f"{os.environ['PATH']}:/usr/sbin:/sbin"
    for program in ("munged", "slurmctld", "slurmd", "sbatch"):
        if shutil.which(program, path=path) is None:
            raise FileNotFoundError(f"{program} is not installed: apt-get install munge slurmctld slurmd slurm-client")
    with tempfile.TemporaryDirectory(prefix="deskgrid-slurm-") as name:
        folder = Path(name)
        folder.chmod(0o755)  # munge wants its socket to be reached by all; its key is for the owner
        (folder / "munge.key").touch(0o600)
        (folder / "munge.key").write_bytes(secrets.token_bytes(64))
        (folder / "slurm.conf").write_text(_config(folder, cpus))
        for part in ("state", "spool"):
            (folder / part).mkdir()
        slurm = Slurm(folder, {**os.environ, "PATH": path, "SLURM_CONF": str(folder / "slurm.conf")})
        with slurm.running():
            yield slurm


def _config(folder: Path, cpus: int) -> str:
    host = socket.gethostname().partition(".")[0]
    with socket.socket() as one, socket.socket() as other:
        for of in (one, other):
            of.bind(("127.0.0.1", 0))
        ports = [of.getsockname()[1] for of in (one, other)]
    user = pwd.getpwuid(os.geteuid()).pw_name
    return _CONFIG.format(folder=folder, host=host, cpus=cpus, user=user, controller=ports[0], node=ports[1])
