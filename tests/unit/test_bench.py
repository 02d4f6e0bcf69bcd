"""The benchmarks of the engine: their options, and how their figures are made."""

from __future__ import annotations

import socket
import sys
import time
from pathlib import Path

import pytest

_BENCH = Path(__file__).parents[2] / "bench"
sys.path.insert(0, str(_BENCH))

import dispatch  # noqa: E402
import scale  # noqa: E402
import swarm_of_workers  # noqa: E402


def test_options_of_its_own_are_taken_and_those_of_all_benchmarks_are_left():
    choice, rest = dispatch.chosen(["--quick", "--postgresql", "--only", "deskgrid", "--runs", "2"])
    assert (choice.yardsticks, choice.deskgrid, choice.postgresql) == (False, True, True)
    assert rest == ["--quick", "--runs", "2"]
    assert scale.chosen(["--only", "jobs", "--plot"])[1] == ["--plot"]
    assert scale.chosen([])[0].generators == 1


@pytest.mark.parametrize("given", [["--workers", "9"], ["--generators", "0"], ["--squeeze", "0"], ["--only", "all"]])
def test_senseless_options_are_refused(given: list[str]):
    with pytest.raises(SystemExit):
        scale.chosen(given)


def test_targets_are_against_the_best_and_the_best_durable_yardstick():
    ours = dispatch.Ours(jobs=1, warm=1000.0, command=100.0, alone_s=(0.01, 0.02))
    figures = dispatch.figures_of(ours, {"dask": 600.0, "celery-durable": 50.0, "procrastinate": 90.0, "parsl-command": 50.0})
    best, durable, command = (figure for figure in figures if figure.ratio is not None)
    assert (best.yardstick, best.met) == (600.0, False)
    assert (durable.yardstick, durable.met) == (90.0, True)
    assert (command.ratio, command.met) == (0.5, None)


def test_nothing_is_met_or_missed_without_its_yardstick():
    ours = dispatch.Ours(jobs=1, warm=1000.0, command=100.0, alone_s=(0.01, 0.02))
    assert [figure.target for figure in dispatch.figures_of(ours, {})] == [None, None, None, None, 50.0]


def test_the_aim_for_100_000_workers_is_not_met_by_fewer():
    played = swarm_of_workers.Played(
        latencies_s=(0.01,),
        lags_s=(0.0,),
        connections=1,
        errors={},
        cpu_s=0.1,
        ended=0,
        holding=0,
        idle_holding=0,
        most_open=1,
        longest_hold_s=0.0,
        intervals_s=(300.0, 300.0),
    )
    found = scale.Simulated(played=(played,), server_cpu_s=0.1, bytes_before=0, bytes_after=1)
    assert [figure.met for figure in scale.worker_figures(found, 1000, 10.0, 30.0) if "p99 from" in figure.name] == [None]
    assert [figure.met for figure in scale.worker_figures(found, 100_000, 1.0, 300.0) if "p99 from" in figure.name] == [True]


def test_a_refused_call_is_not_a_quick_one():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    now = time.monotonic()
    plan = swarm_of_workers.Plan(
        address=("127.0.0.1", port),
        server_name="nobody",
        authority_pem="",
        headers="",
        before="",
        after="",
        before_full="",
        after_full="",
        idle="",
        tokens=("token",),
        first_number=0,
        busy=0,
        idle_s=0.2,
        busy_s=1.0,
        keep_s=1.0,
        start_at=now,
        measure_at=now,
        end_at=now + 0.2,
        ends=0.0,
        final="",
        seed=1,
        output="",
    )
    played = swarm_of_workers.Swarm(plan).run()
    assert sum(played.errors.values()) == 1
    assert min(played.latencies_s) >= 30


async def test_callers_at_once_stop_when_all_is_done():
    calls = 0

    async def one(_number: int) -> int:
        nonlocal calls
        calls += 1
        await scale.asyncio.sleep(0)
        return 1

    _, took = await scale.at_once(100, one)
    assert calls == len(took) < 100 + scale._CALLERS
