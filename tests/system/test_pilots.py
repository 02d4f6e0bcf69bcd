"""Pilots: workers in virtual machines of the grid, and on other systems, with real jobs."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.system.factories import PROCESS, Factory, job_file
from tests.system.harness import System, until
from tests.system.newcomer import Newcomer, commands

PAGE = "examples/root-analysis/README.md"
PNG = b"\x89PNG\r\n"


@pytest.fixture
def physicist(tmp_path: Path) -> Iterator[Newcomer]:
    somebody = Newcomer(tmp_path, command_s=1800.0, DESKGRID_WORKER_CPUS="2", DESKGRID_WORKER_SHARE="true")
    try:
        somebody.set_up()
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
    jobs = json.loads(physicist.type("deskgrid job list --json"))
    ran = [job for job in jobs if not job["spec"].get("pilot")]
    for job in ran:
        detail = json.loads(physicist.type(f"deskgrid job show {job['id']} --json"))
        assert {attempt["worker"] for attempt in detail["attempts"]} == {"pilot-root"}
    physicist.type("deskgrid job cancel 1")
    until(lambda: "no pilots" in physicist.type("deskgrid pilot list"), what="the pilot is gone")


def test_pilot_elsewhere_joins_by_its_link_works_and_leaves(system: System) -> None:
    """As a batch job would: one command with a file, and nothing stays."""
    system.publish()
    made = system.json("pilot", "link", "--lifetime", "2h")
    home, file = system.folder / "batch", system.folder / "link.txt"
    file.write_text(made["link"])
    job = system.submit("duration_s = 1\n")
    run = ("worker", "run", "--once", "--join", file, "--name", "batch", "--home", home, "--idle", "3s", "--lifetime", "2h")
    system.cli(*run)
    system.wait_for(job, "completed", ["succeeded"])
    assert [attempt["worker"] for attempt in system.job(job)["attempts"]] == ["batch"]
    assert system.json("pilot", "list") == []
    assert [path.name for path in home.iterdir()] == ["lock"]
    refused = system.cli(*run, expect=None)
    assert refused.returncode != 0 and "used already" in refused.stderr


BATCH = """
import os, signal, subprocess, sys, tempfile
from pathlib import Path

what, *rest = sys.argv[1:]
if what == "submit":
    script = tempfile.NamedTemporaryFile("w", suffix=".sh", delete=False)
    script.write(sys.stdin.read())
    script.close()
    log = open(rest[0], "a")
    print(subprocess.Popen(["sh", script.name], start_new_session=True, stdout=log, stdin=subprocess.DEVNULL, stderr=log).pid)
elif what == "alive":
    stat = Path(f"/proc/{rest[0]}/stat")
    print("running" if stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z" else "", end="")
else:
    os.kill(int(rest[0]), signal.SIGTERM)
"""
"""A batch system of a dozen lines."""


def test_factory_sends_pilots_to_another_system_while_jobs_wait_that_no_worker_could_run(system: System) -> None:
    system.add_worker(DESKGRID_WORKER_DRIVERS="process")
    until(lambda: [one["state"] for one in system.json("worker", "list")] == ["online"], what="the worker is there")
    batch, log = system.folder / "batch.py", system.folder / "batch.log"
    batch.write_text(BATCH)
    program = [sys.executable, str(batch)]
    factory = Factory(
        system,
        name="batch",
        kind="command",
        most=2,
        jobs_per_pilot=2,
        submit=[*program, "submit", str(log)],
        alive=[*program, "alive", "{reference}"],
        cancel=[*program, "cancel", "{reference}"],
    )
    job = job_file(system, "echo done >answer", count=3)
    plain = system.folder / "plain.toml"
    plain.write_text(f'command = ["true"]\n{PROCESS}')
    factory.start()
    system.cli("run", plain, "-o", system.folder / "plain")
    system.cli("run", job, "-o", system.folder / "out")
    assert [(system.folder / "out" / str(index) / "answer").read_text() for index in range(3)] == ["done\n"] * 3
    workers = {attempt["worker"].rpartition("-")[0] for number in range(2, 5) for attempt in system.job(number)["attempts"]}
    assert workers == {"batch"}, factory.program.said()
    factory.program.kill()
    factory.start()
    until(lambda: system.json("pilot", "list") == [], what="idle pilots have left")
    factory.until_none_is_out()
    assert 1 <= factory.said("pilot_sent") <= 2, factory.program.said()
    system.server.kill()
    factory.until_said("grid_does_not_answer")
    system.restart_server()
    system.cli("run", job, "-o", system.folder / "again")
    factory.program.stop()
    system.cli("pilot", "factory", factory.file, "--stop")
    assert factory.out() == []
    system.cli("job", "submit", job_file(system, "true", need="never"))
    system.cli("pilot", "factory", factory.file, "--once")
    assert factory.out() == []
    system.nothing_left()
