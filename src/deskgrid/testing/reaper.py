"""Ends what tests started and could not end themselves, because they were killed.

    follow(process.pid)

A process beside the tests knows what they follow, and that they are there by a pipe. When that closes, it asks what still runs to end, and kills what does not.
Not the parent's death signal of Linux: that comes with the end of a thread, and tests start programs from threads.

    follow(subprocess.Popen([*apart(), "sshd", "-D"]).pid)

What goes on without who began it, as jobs of a batch system do, ends with a namespace of processes.
"""

from __future__ import annotations

import functools
import os
import subprocess
import sys

import psutil

__all__ = ["apart", "follow"]

GRACE_S = 15.0
"""In which what is asked to end may do so; said to the process when it is started, by the first call of `follow`."""


def follow(pid: int) -> None:
    """Let a process of ours not outlive us."""
    os.write(_reaper(), f"{pid} {psutil.Process(pid).create_time()}\n".encode())


def apart() -> list[str]:
    """Return what stands before a command so that it, and all that comes of it, ends when the process that is started so is killed. SIGTERM does not."""
    rights = [] if os.geteuid() == 0 else ["--user", "--map-current-user"]
    # The shell waits for processes whose parents have ended.
    return ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc", *rights, "sh", "-c", '"$0" "$@" & wait']


@functools.cache
def _reaper() -> int:
    """Start it, and return the end of the pipe to it."""
    reads, writes = os.pipe()
    # In a session of its own, and nobody's child: what is sent to all of ours must not end it before them, and tests count their children.
    subprocess.run(["setsid", "--fork", sys.executable, "-m", __name__, str(GRACE_S)], stdin=reads, check=True)
    os.close(reads)
    return writes


def main() -> None:
    """Wait for the end of those who started us, then end what they leave."""
    followed = [line.split() for line in sys.stdin]
    left = []
    for pid, created in followed:
        try:
            process = psutil.Process(int(pid))
            if process.create_time() == float(created):
                process.terminate()
                left.append(process)
        except psutil.Error:
            continue
    for process in psutil.wait_procs(left, float(sys.argv[1]))[1]:
        try:
            process.kill()
        except psutil.Error:
            continue


if __name__ == "__main__":
    main()
