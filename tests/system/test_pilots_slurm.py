"""Pilots on a real Slurm: one node, of which a pilot takes all."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from deskgrid.testing.slurm import Slurm, running_slurm
from tests.system.factories import Factory, job_file
from tests.system.harness import System, until


@pytest.fixture(scope="module")
def node() -> Iterator[Slurm]:
    with running_slurm(cpus=2) as slurm:
        yield slurm


@pytest.fixture
def slurm(node: Slurm, system: System, tmp_path: Path) -> Iterator[Slurm]:
    """Slurm, with an empty queue, as the programs of a system find it. Temporary folders are in `temporary`."""
    (tmp_path / "temporary").mkdir()
    system.environment |= {name: node.environment[name] for name in ("PATH", "SLURM_CONF")} | {
        "TMPDIR": str(tmp_path / "temporary")
    }
    yield node
    left = node.queue()
    if left:
        subprocess.run(["scancel", *(f"--name={name}" for name, _ in left)], env=node.environment, check=False)
    assert left == [], f"left in the queue\n{system.logs()}\n{node.said()}"


def factory_of(system: System, **part: object) -> Factory:
    return Factory(system, name="slurm", kind="slurm", cpus=2, **part)


def test_slurm_runs_pilots_while_jobs_wait_and_those_that_nobody_needs_are_cancelled(system: System, slurm: Slurm) -> None:
    factory = factory_of(system, most=3)
    factory.start()
    out = system.folder / "out"
    system.cli("run", job_file(system, "echo done >answer", count=3), "-o", out)
    assert [(out / str(index) / "answer").read_text() for index in range(3)] == ["done\n"] * 3
    workers = {attempt["worker"].rpartition("-")[0] for number in (1, 2, 3) for attempt in system.job(number)["attempts"]}
    assert workers == {"slurm"}
    factory.until_none_is_out()
    until(lambda: slurm.queue() == [], what="Slurm's queue is empty")
    assert factory.said("pilot_sent") == 3 and factory.said("pilot_called_back") == 2, factory.program.said()
    assert list((system.folder / "temporary").iterdir()) == []


def test_pilot_that_slurm_is_told_to_end_gives_its_job_back(system: System, slurm: Slurm) -> None:
    factory = factory_of(system)
    factory.start()
    system.cli("job", "submit", job_file(system, "echo begun; exec sleep 1000"))
    system.wait_to_print(1, "begun")
    assert list((system.folder / "temporary").iterdir()), "it is at work there"
    factory.program.stop()
    system.cli("pilot", "factory", factory.file, "--stop")
    assert factory.out() == []
    system.wait_for(1, "waiting", ["lost"])
    until(lambda: slurm.queue() == [], what="Slurm's queue is empty")
    assert list((system.folder / "temporary").iterdir()) == []
    assert system.json("pilot", "list") == []


def test_slurm_that_refuses_is_left_alone(system: System, slurm: Slurm) -> None:
    factory = factory_of(system, options=["--partition=wrong"])
    factory.start()
    system.cli("job", "submit", job_file(system, "true"))
    factory.until_said("system_refuses")
    assert "invalid partition" in factory.program.said()
    factory.until_said("pilot_ended")
    factory.until_none_is_out()
    assert factory.said("system_refuses") == 1, factory.program.said()


def test_slurm_that_does_not_answer_for_a_while_has_not_lost_its_pilots(system: System, slurm: Slurm) -> None:
    other = ["sbatch", "--output=/dev/null", "--cpus-per-task=2", "--wrap", "exec sleep 1000"]
    subprocess.run(other, env=slurm.environment, check=True, capture_output=True)
    factory = factory_of(system)
    factory.program.environment = {
        **system.environment,
        "SQUEUE_STATES": "RUNNING",
        "SQUEUE_FORMAT": "%i",
    }  # what people like to see
    factory.start()
    system.cli("job", "submit", job_file(system, "true"))
    factory.until_said("pilot_sent")
    slurm.stop_controller()
    try:
        factory.until_said("system_does_not_answer")
        factory.program.stop()
        assert "not called back" in system.cli("pilot", "factory", factory.file, "--stop", expect=1).stderr
        assert len(factory.out()) == 1
    finally:
        slurm.start_controller()
    factory.start()
    subprocess.run(["scancel", "--name=wrap"], env=slurm.environment, check=True)
    system.wait_for(1, "completed", ["succeeded"])
    factory.until_none_is_out()
    assert factory.said("pilot_sent") == 1, factory.program.said()
    until(lambda: slurm.queue() == [], what="Slurm's queue is empty")
