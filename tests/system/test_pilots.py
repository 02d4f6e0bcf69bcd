"""Pilots: workers in virtual machines of the grid, and on other systems, with real jobs."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.system.harness import System, until
from tests.system.newcomer import Newcomer, commands

PAGE = "examples/root-analysis/README.md"
PNG = b"\x89PNG\r\n"


@pytest.fixture
def physicist(tmp_path: Path) -> Iterator[Newcomer]:
    somebody = Newcomer(tmp_path, command_s=1800.0, DESKGRID_WORKER_CPUS="2", DESKGRID_WORKER_SHARE="true")
    try:
        for line in commands("README.md"):
            if line.startswith(("deskgrid server", "deskgrid login", "deskgrid worker")) and "status" not in line:
                somebody.type(line)
        yield somebody
    finally:
        somebody.leave()


@pytest.mark.full
@pytest.mark.timeout(5400)
def test_root_analysis_works_as_written(physicist: Newcomer) -> None:
    """The disk is built, boots in software emulation where there is nothing better, and real ROOT runs in it."""
    printed = {line: physicist.type(line) for line in commands(PAGE)}
    fit = json.loads(printed["cat fit/fit.json"])
    assert fit["status"] == 0 and abs(fit["mean"] - 91.2) < 4 * fit["error"]
    skim = json.loads(printed["cat skim/skim.json"])
    assert skim["events"] == 20000 and 2000 < skim["kept"] < 3500 and skim["least"] > 30
    merged = json.loads(printed["cat merged/merged.json"])
    assert (merged["parts"], merged["entries"]) == (20, 20000) and abs(merged["mean"] - 91.2) < 0.1
    for plot in ("fit/mass.png", "skim/momentum.png", "merged/merged.png"):
        assert (physicist.folder / plot).read_bytes().startswith(PNG)
    assert "pilot-root" in printed["deskgrid pilot list"] and "job-1" in printed["deskgrid pilot list"]
    jobs = json.loads(physicist.type("deskgrid job list --json"))["jobs"]
    ran = [job for job in jobs if not job["spec"].get("pilot")]
    for job in ran:
        detail = json.loads(physicist.type(f"deskgrid job show {job['id']} --json"))
        assert {attempt["worker"] for attempt in detail["attempts"]} == {"pilot-root"}
    physicist.type("deskgrid job cancel 1")
    until(lambda: "no pilots" in physicist.type("deskgrid pilot list"), what="the pilot is gone")


def test_pilot_elsewhere_joins_by_its_link_works_and_leaves(system: System) -> None:
    """As a batch job would: one command with a file, and nothing stays."""
    system.publish()
    made = system.json("pilot", "link", "--lifetime", "1h")
    home, file = system.folder / "batch", system.folder / "link.txt"
    file.write_text(made["link"])
    job = system.submit("duration_s = 1\n")
    run = ("worker", "run", "--once", "--join", file, "--name", "batch", "--home", home, "--idle", "3s", "--lifetime", "1h")
    system.cli(*run)
    system.wait_for(job, "completed", ["succeeded"])
    assert [attempt["worker"] for attempt in system.job(job)["attempts"]] == ["batch"]
    assert system.json("pilot", "list") == []
    assert [path.name for path in home.iterdir()] == ["lock"]
    refused = system.cli(*run, expect=None)
    assert refused.returncode != 0 and "used already" in refused.stderr
