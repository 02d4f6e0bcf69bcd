"""The SDK as programs use it: from a thread without a loop, against a real server and a real worker that runs processes."""

from __future__ import annotations

import concurrent.futures
import datetime
import importlib.util
import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import dask
import joblib
import msgspec
import pytest

from deskgrid import Grid
from deskgrid.archive import UnpackLimits
from deskgrid.client import executor as executor_module
from deskgrid.client.calls import CallFailed
from deskgrid.client.transport import load_credentials
from deskgrid.errors import BadArchive, InvalidInput
from tests.system.harness import Program, System, until
from tests.system.newcomer import ROOT


@pytest.fixture
def grid(system: System, monkeypatch: pytest.MonkeyPatch) -> Iterator[Grid]:
    monkeypatch.setenv("DESKGRID_CLIENT_HOME", str(system.folder / "client"))
    system.add_worker(DESKGRID_WORKER_DRIVERS="process", DESKGRID_WORKER_CPUS="4")
    with Grid() as found:
        yield found
    system.nothing_left()


def script(folder: Path, text: str) -> Path:
    context = folder / "script"
    context.mkdir(exist_ok=True)
    (context / "run.sh").write_text(text)
    return context


def test_jobs_are_submitted_waited_for_and_fetched(grid: Grid, tmp_path: Path) -> None:
    context = script(tmp_path, 'echo "hello $1"; echo oh >&2; echo "$1" >answer; exit "$2"')
    options = {"kind": "process", "context": context, "memory": "64MiB", "scratch": "64MiB"}
    jobs = [
        grid.submit(command=["sh", "/context/run.sh", name, code], name=name, attempts=1, **options)
        for name, code in (("a", "0"), ("b", "3"))
    ]
    assert {job.id for job in grid.as_completed(jobs, timeout=60)} == {job.id for job in jobs}
    good, bad = grid.wait(jobs, timeout=60, progress=True)
    assert (good.state, good.exit_code, bad.state, bad.exit_code) == ("completed", 0, "failed", 3)
    assert (good.results(tmp_path / "out") / "answer").read_text() == "a\n"
    assert (good.output(), good.output("stderr")) == ("hello a\n", "oh\n")
    assert repr(good) == f"<job-{good.id} a: completed, exit code 0>"
    assert grid.job(bad.id).message == bad.message != ""
    shown = grid.jobs()._repr_html_()
    assert f"<td>job-{good.id}</td>" in shown and "<td>failed</td>" in shown
    assert good.cancel().state == "completed"
    with pytest.raises(InvalidInput, match="memroy"):
        grid.submit(command=["true"], kind="process", memroy="1GiB")
    with pytest.raises(InvalidInput, match="memory"):
        grid.submit(command=["true"], kind="process", memory="much")


def test_arrays_data_and_a_wait_that_takes_too_long(grid: Grid, tmp_path: Path) -> None:
    (tmp_path / "word").write_text("hello")
    assert grid.put(tmp_path / "word").name == "word"
    assert grid.get("word", tmp_path / "back").read_text() == "hello"
    options = {"kind": "process", "memory": "64MiB", "scratch": "64MiB", "data": {"w": "word"}}
    array = grid.submit(command=["sh", "-c", 'cat /context/data/w >got; echo "$0" >>got', "{index}"], array=3, **options)
    array.wait(timeout=60)
    out = array.results(tmp_path / "out")
    assert [(out / str(index) / "got").read_text() for index in range(3)] == [f"hello{index}\n" for index in range(3)]
    assert array.counts["completed"] == 3 and "array" in array._repr_html_() and "3 completed" in repr(array)
    sleeper = grid.submit(command=["sleep", "600"], kind="process", memory="64MiB", scratch="64MiB")
    with pytest.raises(TimeoutError):
        sleeper.wait(timeout=0.5)
    with pytest.raises(TimeoutError):
        list(grid.as_completed([sleeper], timeout=0.5))
    assert sleeper.cancel().state == "cancelled"


def test_many_jobs_are_waited_for(grid: Grid) -> None:
    options = {"kind": "process", "memory": "64MiB", "scratch": "64MiB", "attempts": 1}
    jobs = [grid.submit(command=["sh", "-c", f"exit {number % 3}"], **options) for number in range(60)]
    seen = list(grid.as_completed([*jobs, jobs[0]], timeout=120))
    assert sorted(job.id for job in seen) == sorted([*(job.id for job in jobs), jobs[0].id])
    assert [job.exit_code for job in grid.wait(jobs, timeout=60)] == [number % 3 for number in range(60)]


def test_service_of_this_users_own_is_reached_while_the_block_lasts(grid: Grid, system: System) -> None:
    with socket.create_server(("127.0.0.1", 0)) as served:
        offering = Program(["offer", "web", str(served.getsockname()[1])], system.environment, system.folder / "offer.log")
        system.programs.append(offering)
        offering.start()
        with grid.connect("web.user", wait_s=30) as (host, port), socket.create_connection((host, port), 30) as near:
            near.sendall(b"hello")
            far, _ = served.accept()
            with far:
                assert far.recv(5) == b"hello"
        with pytest.raises(OSError, match="refused"):
            socket.create_connection((host, port), 5)
    with pytest.raises(InvalidInput), grid.connect("nonsense"):
        pass


def double(number: int) -> int:
    return 2 * number


class Strange:
    """No plain value."""


OPTIONS = {"memory": "128MiB", "scratch": "64MiB"}


def test_functions_run_as_jobs_and_answers_come_in_order(grid: Grid) -> None:
    factor = 3

    def scaled(number: int, *, by: int = 1) -> int:
        return number * factor * by

    assert grid.map(double, range(5), **OPTIONS) == [0, 2, 4, 6, 8]
    assert grid.map(double, range(7), chunksize=3, **OPTIONS) == [0, 2, 4, 6, 8, 10, 12]
    with grid.executor(**OPTIONS) as executor:
        futures = [executor.submit(scaled, 2, by=10), executor.submit(os.getpid), executor.submit(datetime.date, 2026, 1, 2)]
        found = [future.result(60) for future in futures]
    assert found[0] == 60 and found[1] != os.getpid() and found[2] == datetime.date(2026, 1, 2)
    with pytest.raises(RuntimeError, match="after shutdown"):
        executor.submit(double, 1)
    assert not grid.run(grid.asynchronous.arrays()).arrays, "answered arrays are removed"


def test_what_a_function_raises_is_raised_here(grid: Grid) -> None:
    def fails() -> None:
        raise ValueError("no such thing", 7)

    def dies() -> None:
        os._exit(9)

    with grid.executor(attempts=1, **OPTIONS) as executor:
        failing, dying = executor.submit(fails), executor.submit(dies)
        with pytest.raises(ValueError, match="no such thing") as caught:
            failing.result(60)
        assert caught.value.args == ("no such thing", 7) and "in fails" in caught.value.__notes__[0]
        with pytest.raises(CallFailed, match="job"):
            dying.result(60)
        with pytest.raises(InvalidInput, match="packed"):
            executor.submit(double, socket.socket())


def test_answer_that_could_run_code_is_read_only_from_pcs_that_are_trusted(system: System, grid: Grid) -> None:
    with grid.executor(**OPTIONS) as executor, pytest.raises(CallFailed, match="trust"):
        executor.submit(Strange).result(60)
    system.add_worker("own", owner="admin", DESKGRID_WORKER_DRIVERS="process")
    with grid.executor(trust=["mine"], **OPTIONS) as executor:
        assert type(executor.submit(Strange).result(60)).__name__ == "Strange"


def test_map_that_takes_too_long_or_fails_does_not_wait_for_the_rest(grid: Grid) -> None:
    def sleeps(seconds: int) -> int:
        import time

        time.sleep(seconds)
        return 1 // seconds

    with pytest.raises(TimeoutError):
        grid.map(sleeps, [600], timeout=1, **OPTIONS)
    with pytest.raises(ZeroDivisionError):
        grid.map(sleeps, [0, 600], **OPTIONS)


def test_callback_may_use_the_grid(grid: Grid) -> None:
    seen: list[int] = []
    with grid.executor(**OPTIONS) as executor:
        future = executor.submit(double, 1)
        future.add_done_callback(lambda _: seen.append(len(grid.jobs())))
        assert future.result(60) == 2
    until(lambda: len(seen) == 1, what="it was called")


def test_answers_come_though_the_server_is_away_for_a_while(system: System, grid: Grid) -> None:
    def slow() -> str:
        import time

        time.sleep(4)
        return "there"

    with grid.executor(**OPTIONS) as executor:
        future = executor.submit(slow)
        until(lambda: [one for one in grid.run(grid.asynchronous.arrays()).arrays if one.jobs["active"]], what="it runs")
        assert system.server is not None
        system.server.kill()
        system.restart_server()
        assert future.result(90) == "there"


def test_futures_are_answered_though_the_executor_was_shut_down_twice(grid: Grid) -> None:
    executor = grid.executor(need=["nothing"], **OPTIONS)
    futures = [executor.submit(double, number) for number in range(3)]
    until(lambda: grid.run(grid.asynchronous.arrays()).arrays, what="they are submitted")
    executor.shutdown(wait=False, cancel_futures=True)
    executor.shutdown(wait=True)
    for future in futures:
        with pytest.raises((CallFailed, concurrent.futures.CancelledError)):
            future.result(30)


def test_closing_the_grid_does_not_wait_for_a_server_that_is_away(
    system: System, grid: Grid, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(executor_module, "_GOODBYE_S", 1.0)
    assert system.server is not None
    with Grid() as other:
        system.server.kill()
        future = other.executor(**OPTIONS).submit(double, 1)
    with pytest.raises((CallFailed, concurrent.futures.CancelledError)):
        future.result(0)
    system.restart_server()


def test_result_that_is_larger_than_a_job_may_bring_is_not_fetched(grid: Grid, tmp_path: Path) -> None:
    job = grid.submit(command=["true"], kind="process", memory="64MiB", scratch="64MiB").wait(timeout=60)
    large = msgspec.structs.replace(job.detail.job, result_bytes=1 << 40)
    with pytest.raises(BadArchive, match="too large"):
        grid.run(grid.asynchronous.results_of(large, tmp_path / "out", limits=UnpackLimits(bytes=1 << 20)))
    assert not (tmp_path / "out").exists()


def test_shutdown_with_cancel_leaves_no_job(grid: Grid) -> None:
    executor = grid.executor(**OPTIONS)
    future = executor.submit(__import__("time").sleep, 600)
    until(lambda: [one for one in grid.run(grid.asynchronous.arrays()).arrays if one.jobs["active"]], what="it runs")
    executor.shutdown(cancel_futures=True)
    with pytest.raises((CallFailed, concurrent.futures.CancelledError)):
        future.result(60)
    [array] = grid.run(grid.asynchronous.arrays()).arrays
    assert grid.array(array.id).state == "cancelled"


def publish_libraries(grid: Grid, folder: Path, *names: str) -> None:
    """Publish libraries of this Python as an app: what PCs do not have."""
    place = folder / "libraries"
    for name in names:
        spec = importlib.util.find_spec(name)
        assert spec is not None and spec.submodule_search_locations is not None, name
        shutil.copytree(spec.submodule_search_locations[0], place / name, ignore=shutil.ignore_patterns("tests", "__pycache__"))
    grid.run(grid.asynchronous.publish_app("libraries", {"any": place}))


def test_joblib_and_dask_compute_on_the_grid(grid: Grid, tmp_path: Path) -> None:
    from deskgrid.client.joblib import register

    register(grid, **OPTIONS)
    with joblib.parallel_config("deskgrid"):
        assert joblib.Parallel()(joblib.delayed(double)(number) for number in range(8)) == [2 * number for number in range(8)]
    publish_libraries(
        grid,
        tmp_path,
        "dask",
        "toolz",
        "tlz",
        "yaml",
        "fsspec",
        "click",
        "packaging",
        "partd",
        "locket",
        "lazy_importer",
        "importlib_metadata",
        "zipp",
    )
    with grid.executor(app="libraries", modules=[sys.modules[__name__]], environment={"PYTHONPATH": "/app"}, **OPTIONS) as executor:
        total = dask.delayed(sum)([dask.delayed(double)(number) for number in range(4)])
        assert dask.compute(total, scheduler=executor) == (12,)


def test_login_is_taken_from_where_the_command_left_it(system: System, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("DESKGRID_CLIENT_HOME", str(tmp_path / "empty"))
    with pytest.raises(InvalidInput):
        Grid()
    with Grid(load_credentials(system.folder / "client" / "credentials.json")) as grid:
        assert grid.jobs() == []
    with pytest.raises(InvalidInput, match="closed"):
        grid.jobs()


BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("page", ["README.md", "docs/how-to.md"])
def test_programs_of_the_documentation_run(page: str, system: System, tmp_path: Path) -> None:
    system.publish()
    system.add_worker(DESKGRID_WORKER_DRIVERS="fake,process", DESKGRID_WORKER_CPUS="4")
    blocks = [block for block in BLOCK.findall((ROOT / page).read_text()) if "import Grid" in block]
    shutil.copytree(ROOT / "examples", tmp_path / "examples")
    printed = ""
    for block in blocks:
        (tmp_path / "program.py").write_text(block)
        ran = subprocess.run(
            [sys.executable, "program.py"],
            cwd=tmp_path,
            env=system.environment,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert ran.returncode == 0, f"{block}\n{ran.stderr}"
        printed += ran.stdout
    if page == "docs/how-to.md":
        assert "completed, exit code 0" in printed and "\n4\n" in printed and "[3.14, 12.57, 28.27]" in printed
    system.nothing_left()
