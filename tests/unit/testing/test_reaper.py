"""What tests started does not outlive them, however they end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import psutil
import pytest

PROGRAM = """
import subprocess, sys, time
from deskgrid.testing import reaper

reaper.GRACE_S = 1.0
child = subprocess.Popen([sys.executable, "-c", sys.argv[1] + "; import time; time.sleep(600)"])
reaper.follow(child.pid)
print(child.pid, flush=True)
time.sleep(600)
"""
DEAF = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
@pytest.mark.parametrize("child", ["pass", DEAF])
def test_followed_process_ends_with_who_is_killed(child: str, number: signal.Signals) -> None:
    with subprocess.Popen([sys.executable, "-c", PROGRAM, child], stdout=subprocess.PIPE, text=True) as program:
        assert program.stdout is not None
        followed = psutil.Process(int(program.stdout.readline()))
        os.kill(program.pid, number)
        program.wait()
        assert not psutil.wait_procs([followed], 60)[1]
