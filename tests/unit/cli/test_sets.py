"""Sets as a user types them, on a real server, with a worker played by hand."""

from __future__ import annotations

from pathlib import Path

import pytest

from deskgrid.cli import set as set_noun
from tests.unit.cli.conftest import Deskgrid, Owner, Worker

SERVICE = """
[set]
name = "service"
[job.store.machine]
disk = "tiny"
network = "overlay"
offer = ["db:5432"]
[job.store.limits]
attempts = 1
[job.clients]
after = ["store"]
[job.clients.machine]
disk = "tiny"
[job.clients.array]
count = 2
"""


@pytest.fixture
def service(disk: str) -> Path:
    Path("service.toml").write_text(SERVICE)
    return Path("service.toml")


def do_all(worker: Worker) -> None:
    for _ in range(3):
        work = worker.take()
        worker.succeed(work, {"out.txt": f"{work.spec.name} {work.index}\n"})


@pytest.mark.parametrize("command", [("set", "submit"), ("job", "submit")])
def test_a_set_is_submitted_whole_and_shown(user: Deskgrid, service: Path, command: tuple[str, ...]):
    assert user(*command, service).out == "set-1\n"
    found = user("set", "show", "set-1", "--json").document
    assert [member["name"] for member in found["members"]] == ["store", "clients"]
    text = user("set", "show", "1").out
    assert text.startswith("set-1 service, of admin, submitted now\n")
    assert "clients  array-2  " in text
    assert "service" in user("set", "list").out
    assert [one["id"] for one in user("set", "list", "--json").document] == [1]


def test_run_of_a_set_tells_what_changes_and_fetches_all_results(user: Deskgrid, service: Path, worker: Worker):
    with Owner(lambda: do_all(worker)):
        ran = user("run", service)
    assert (ran.code, ran.out) == (0, "results-set-1\n")
    told = ran.err.splitlines()
    assert "store: completed" in told
    assert told.index("store: completed") < told.index("clients: ended, 2 jobs (2 completed)")
    files = {str(path.relative_to("results-set-1")): path.read_text() for path in Path("results-set-1").rglob("out.txt")}
    assert files == {"store/out.txt": "store 0\n", "clients/0/out.txt": "clients 0\n", "clients/1/out.txt": "clients 1\n"}
    assert user("set", "wait", "1").code == 0
    assert user("set", "results", "1", "--json").document["folder"] == "results-set-1"


def test_a_set_of_which_something_failed_exits_with_1(user: Deskgrid, service: Path, worker: Worker):
    with Owner(lambda: worker.fail(worker.take(), "no luck")):
        ran = user("run", service, "--json")
    assert (ran.code, ran.err) == (1, "")
    states = [(member["job"] or member["array"])["state"] for member in ran.document["set"]["members"]]
    assert states == ["failed", "cancelled"]
    assert user("set", "wait", "1").code == 1


def test_a_set_is_cancelled_whole(user: Deskgrid, service: Path):
    user("set", "submit", service)
    assert "store    job-1    cancelled" in user("set", "cancel", "1").out
    ran = user("set", "wait", "1")
    assert ran.code == 1
    assert "clients: cancelled, 2 jobs" in ran.err


def test_a_set_that_waits_for_enough_pcs_says_so(user: Deskgrid, service: Path):
    service.write_text(SERVICE.replace('name = "service"', "together = true").replace('after = ["store"]', ""))
    user("set", "submit", service)
    assert "waits for" in user("set", "show", "1").out


def test_options_are_for_one_job_and_nothing_is_sent_of_a_wrong_file(user: Deskgrid, service: Path):
    ran = user("run", service, "--memory", "1GiB")
    assert (ran.code, ran.err.splitlines()[0]) == (2, "deskgrid: --memory: options are for one job, and this file has several")
    service.write_text(SERVICE.replace("job.store", "job.shop"))
    ran = user("set", "submit", service)
    assert (ran.code, "service.toml:11: after: 'store' is neither" in ran.err) == (2, True), ran.err
    Path("one.toml").write_text('machine.disk = "tiny"')
    assert "not a set of jobs" in user("set", "submit", "one.toml").err
    assert user("set", "list").out == "no sets\n"
    assert user("set", "show", "seven").code == 2
    assert user("set", "show", "7").code == 2


def test_on_a_terminal_the_set_is_a_table_that_changes(
    user: Deskgrid, service: Path, worker: Worker, monkeypatch: pytest.MonkeyPatch
):
    user("set", "submit", service)
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setattr(set_noun.sys.stderr, "isatty", lambda: True, raising=False)
    with Owner(lambda: do_all(worker)):
        ran = user("set", "wait", "1")
    assert ran.code == 0
    assert "set-1 service" in ran.err
    assert "ended, 2 jobs (2 completed)" in ran.err
