"""The examples with native programs, as their pages say: every command is typed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.system.newcomer import Newcomer, commands


@pytest.fixture
def newcomer(tmp_path: Path) -> Iterator[Newcomer]:
    drivers = {"DESKGRID_WORKER_DRIVERS": "process", "DESKGRID_WORKER_CPUS": "5", "DESKGRID_WORKER_MEMORY_BYTES": str(1 << 30)}
    somebody = Newcomer(tmp_path, **drivers)
    try:
        somebody.set_up()
        yield somebody
    finally:
        somebody.leave()


def test_parameter_sweep_works_as_written(newcomer: Newcomer):
    printed = {line: newcomer.type(line) for line in commands("examples/parameter-sweep/README.md")}
    assert printed["cat orbits/2/orbit.txt"].startswith("# job 2: r = 3.5\n")
    assert printed["ls by-r"].split() == ["2.8", "3.2", "3.5", "3.55", "3.83", "4.0"]
    # With r = 3.5 it goes round in four places, with 2.8 in one.
    places = [len(set((newcomer.folder / f"orbits/{index}/orbit.txt").read_text().splitlines()[1:])) for index in (2, 0)]
    assert places == [4, 1]


def test_snakemake_works_as_written(newcomer: Newcomer):
    printed = {line: newcomer.type(line) for line in commands("examples/snakemake/README.md")}
    assert 3.13 <= float(printed["cat examples/snakemake/pi.txt"]) <= 3.15
    assert printed["cat examples/snakemake/logs/7.log"] == "seed 7 done\n"


@pytest.mark.full
def test_set_works_as_written(newcomer: Newcomer):
    printed = {line: newcomer.type(line) for line in commands("examples/set/README.md")}
    assert printed["cat service/front/visitors.txt"] == "client-0\nclient-1\nclient-2\n"
    assert printed["cat service/clients/0/answer.txt"] == "hello client-0\n"
    assert "ended, 3 jobs (3 completed)" in printed["deskgrid set show 2"]
    assert (newcomer.folder / "again/store/kept.json").exists()
