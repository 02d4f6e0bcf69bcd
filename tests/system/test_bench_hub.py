"""The benchmark of the hub runs to its end, with few peers, and says what the issue asks for."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

_SCRIPT = Path(__file__).parents[2] / "bench" / "hub.py"


@pytest.mark.full
def test_benchmark_of_the_hub_reports_and_drops_nobody():
    command = [sys.executable, str(_SCRIPT), "--quick", "--peers", "20"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["bench"] == "hub"
    counted = {figure["name"]: figure["value"] for figure in report["figures"] if figure["target"] == 0}
    assert "peers dropped while idle" in counted
    assert len(counted) == 4
    assert not any(counted.values())
