"""Arrays as a user types them, on a real server, with a worker played by hand."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from tests.unit.cli.conftest import Deskgrid, Owner, Server, Worker

SWEEP = """
name = "sweep"
command = ["/context/run", "{alpha}"]
fill = ["params.txt"]
[machine]
disk = "tiny"
context = "context"
[limits]
attempts = 1
[array]
table = "params.csv"
"""


@pytest.fixture
def sweep(disk: str) -> Path:
    Path("context").mkdir()
    Path("context/params.txt").write_text("{alpha} of {index}\n")
    Path("params.csv").write_text("alpha,name\n0.1,a/b\n0.2,..\n0.3,c\n")
    Path("sweep.toml").write_text(SWEEP)
    return Path("sweep.toml")


def do_all(worker: Worker, count: int, *, failing: tuple[int, ...] = ()) -> None:
    """Do the jobs of an array; a result says which index and parameters its job had."""
    for _ in range(count):
        work = worker.take()
        if work.index in failing:
            worker.fail(work, "no luck")
        else:
            worker.succeed(work, {"out.txt": f"{work.index} {work.parameters.get('alpha', '')}\n"})


def test_submit_of_an_array_prints_its_name_once_its_jobs_are_there(user: Deskgrid, sweep: Path):
    ran = user("job", "submit", sweep)
    assert (ran.code, ran.out) == (0, "array-1\n")
    assert "make the jobs: done, 3 of 3" in ran.err
    found = user("array", "show", "array-1", "--json").document
    assert (found["state"], found["count"], found["jobs"]["waiting"]) == ("open", 3, 3)
    assert user("array", "show", "1").out == "array-1 open, 3 jobs (3 waiting)\n"
    assert "sweep" in user("array", "list").out
    assert [one["id"] for one in user("array", "list", "--json").document] == [1]


def test_count_and_table_are_options_too(user: Deskgrid, sweep: Path):
    assert user("job", "submit", "--disk", "tiny", "--array", "12", "--json").document["count"] == 12
    assert user("job", "submit", "--disk", "tiny", "--table", "params.csv", "--json").document["count"] == 3
    Path("params.csv").write_text("alpha\n1\n1,2\n")
    ran = user("job", "submit", sweep)
    assert (ran.code, ran.out) == (2, "")
    assert "params.csv:3: 2 values, but 1 columns" in ran.err
    assert user("job", "submit", "--disk", "tiny", "--table", "gone.csv").code == 2


def test_a_name_without_a_column_is_refused_before_anything_is_sent(user: Deskgrid, sweep: Path):
    Path("context/params.txt").write_text("{alpha}\n{beta}\n")
    ran = user("job", "submit", sweep)
    assert (ran.code, ran.out) == (2, "")
    assert "context/params.txt:2: nothing fills in {beta}" in ran.err
    assert user("array", "list").out == "no arrays\n"


def test_run_of_an_array_fetches_all_results_and_tells_how_many_failed(user: Deskgrid, sweep: Path, worker: Worker):
    with Owner(lambda: do_all(worker, 3, failing=(1,))):
        ran = user("run", sweep)
    assert (ran.code, ran.out) == (1, "results-array-1\n")
    assert "run the jobs of array-1: done, 3 of 3" in ran.err
    assert "array-1 ended, 3 jobs (2 completed, 1 failed)" in ran.err
    folders = {path.name: (path / "out.txt").read_text() for path in Path("results-array-1").iterdir()}
    assert folders == {"0": "0 0.1\n", "2": "2 0.3\n"}
    assert user("array", "wait", "1").code == 1
    assert user("job", "wait", "array-1", "--json").document[0]["jobs"]["failed"] == 1


def test_run_with_json_prints_one_document(user: Deskgrid, sweep: Path, worker: Worker):
    with Owner(lambda: do_all(worker, 3)):
        ran = user("run", sweep, "-o", "out", "--json")
    assert (ran.code, ran.err) == (0, "")
    assert ran.document["folder"] == "out"
    assert ran.document["results"] == {"fetched": 3, "there": 0, "without": 0, "values": 0}
    assert ran.document["array"]["state"] == "ended"


def test_results_that_are_there_are_not_fetched_again(user: Deskgrid, sweep: Path, worker: Worker):
    user("job", "submit", sweep)
    do_all(worker, 2)
    assert user("array", "results", "1", "--json").document["results"]["fetched"] == 2
    Path("results-array-1/0/out.txt").write_text("mine now")
    do_all(worker, 1, failing=(2,))
    found = user("array", "results", "1", "--failed-too", "--json").document["results"]
    assert found == {"fetched": 1, "there": 2, "without": 0, "values": 0}
    assert Path("results-array-1/0/out.txt").read_text() == "mine now"
    assert sorted(path.name for path in Path("results-array-1").iterdir()) == ["0", "1", "2"]


def test_folders_are_named_by_a_column_and_stay_in_their_place(user: Deskgrid, sweep: Path, worker: Worker):
    user("job", "submit", sweep)
    do_all(worker, 3)
    assert user("array", "results", "1", "--by", "name", "-o", "out").code == 0
    assert sorted(path.name for path in Path("out").iterdir()) == ["_.", "a_b", "c"]
    assert user("array", "results", "1", "--by", "alpha", "-o", "alphas").code == 0
    assert sorted(path.name for path in Path("alphas").iterdir()) == ["0.1", "0.2", "0.3"]
    ran = user("array", "results", "1", "--by", "colour")
    assert (ran.code, "one of alpha, name" in ran.err) == (2, True)


def test_values_that_are_not_all_different_get_the_index_behind_them(user: Deskgrid, sweep: Path, worker: Worker):
    Path("params.csv").write_text("alpha\nx\nX\ny\n")
    Path("sweep.toml").write_text(SWEEP)
    user("job", "submit", sweep)
    do_all(worker, 3)
    user("array", "results", "1", "--by", "alpha", "-o", "out")
    assert sorted(path.name for path in Path("out").iterdir()) == ["X-1", "x-0", "y-2"]


def test_jobs_of_an_array_are_listed_and_shown_with_what_is_theirs(user: Deskgrid, sweep: Path, worker: Worker):
    user("job", "submit", sweep)
    do_all(worker, 3, failing=(1,))
    (failed,) = user("job", "list", "--array", "array-1", "--state", "failed", "--json").document
    assert (failed["index"], failed["parameters"]) == (1, {"alpha": "0.2", "name": ".."})
    text = user("job", "list", "--array", "1").out
    assert "alpha=0.3, name=c" in text
    assert user("job", "list").out == "no jobs\n"
    assert "array-1, index 1, alpha=0.2, name=..\n" in user("job", "show", f"job-{failed['id']}").out
    page = user("job", "list", "--array", "1", "--limit", "2")
    assert "deskgrid job list --array 1 --before" in page.err


def test_jobs_and_arrays_are_cancelled_by_name_and_arrays_removed(user: Deskgrid, sweep: Path):
    user("job", "submit", sweep)
    assert user("job", "submit", "--disk", "tiny", "--after", "array-1").out == "4\n"
    ran = user("job", "cancel", "array-1", "job-4")
    assert ran.code == 0
    assert ran.out.startswith("array-1 cancelled, 3 jobs")
    assert "job 4: cancelled" in ran.out
    assert user("array", "wait", "1").code == 1
    assert user("array", "cancel", "1").code == 0
    end = time.monotonic() + 30
    while (ran := user("array", "remove", "1")).code and time.monotonic() < end:
        assert "is being cancelled" in ran.err  # its jobs are moved little by little
    assert ran.out == "removed array-1\n"
    assert user("array", "show", "1").code == 2


@pytest.mark.parametrize("name", ["seven", "array-7", "-1", "", "٧", "9" * 30])
def test_a_name_that_is_no_job_is_refused(user: Deskgrid, name: str):
    for command in ("show", "logs", "results", "remove"):
        assert user("job", command, name).code == 2
    assert user("array", "show", "job-7").code == 2
    assert user("array", "wait").code == 2
    assert user("job", "wait").code == 2


def test_an_array_that_cannot_be_made_is_told(server: Server, user: Deskgrid, sweep: Path, worker: Worker):
    user("job", "submit", "--disk", "tiny", "--name", "first")
    work = worker.take()
    assert user("job", "submit", sweep, "--after", "job-1").out == "array-2\n"
    worker.fail(work, "no")
    worker.fail(worker.take(), "no")
    worker.fail(worker.take(), "no")
    ran = user("array", "wait", "2")
    assert ran.code == 1
    assert "job-1, which it comes after, did not complete" in ran.out
    late = user("job", "submit", sweep, "--after", "job-1")
    assert (late.code, late.out) == (1, "array-3\n")
    assert "did not complete" in late.err


def test_what_jobs_answered_is_kept_in_one_file(user: Deskgrid, server: Server, worker: Worker):
    text = 'command = ["/app/square"]\n[machine]\nkind = "process"\nwarm = true\n[results]\npaths = []\n[array]\ncount = 2\n'
    Path("warm.toml").write_text(text)
    assert user("job", "submit", "warm.toml").out == "array-1\n"
    worker.answer(2, lambda index: b"7" if index else b"no JSON")
    assert user("array", "results", "1", "--json").document["results"] == {"fetched": 0, "there": 0, "without": 2, "values": 2}
    lines = [json.loads(line) for line in Path("results-array-1/values.jsonl").read_text().splitlines()]
    assert {line["index"]: line["value"] for line in lines} == {0: "no JSON", 1: 7}
    assert [path.name for path in Path("results-array-1").iterdir()] == ["values.jsonl"]
