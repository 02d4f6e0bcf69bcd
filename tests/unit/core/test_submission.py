"""Bad values of a job are refused with the field and what is allowed."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deskgrid.core.submission import check_spec
from deskgrid.errors import InvalidInput
from deskgrid.model.jobs import JobSpec, Limits, Machine, Results
from deskgrid.model.machines import Network

GOOD = JobSpec(machine=Machine(disk="tiny"))


def test_defaults_are_allowed():
    check_spec(GOOD)


@pytest.mark.parametrize(
    ("spec", "where"),
    [
        (JobSpec(machine=Machine(disk="tiny", cpus=0)), "machine.cpus"),
        (JobSpec(machine=Machine(disk="tiny", memory_bytes=1)), "machine.memory"),
        (JobSpec(machine=Machine(disk="tiny", scratch_bytes=1 << 60)), "machine.scratch"),
        (JobSpec(machine=Machine(disk="")), "machine.disk"),
        (JobSpec(machine=Machine(disk="tiny", network=Network.INTERNET)), "machine.network"),
        (msgspec.structs.replace(GOOD, limits=Limits(wall_time_s=float("nan"))), "limits.wall_time"),
        (msgspec.structs.replace(GOOD, limits=Limits(attempts=0)), "limits.attempts"),
        (msgspec.structs.replace(GOOD, name="a\nb"), "name"),
        (msgspec.structs.replace(GOOD, results=Results(paths=())), "results.paths"),
        (msgspec.structs.replace(GOOD, results=Results(paths=("\u00e9" * 1000,) * 11)), "results.paths"),
    ],
)
def test_value_out_of_bounds_names_its_field(spec: JobSpec, where: str):
    with pytest.raises(InvalidInput) as caught:
        check_spec(spec)
    assert caught.value.where == where


@given(st.integers(), st.integers(), st.floats())
def test_any_numbers_are_allowed_or_refused_clearly(cpus: int, memory: int, wall: float):
    spec = JobSpec(machine=Machine(disk="d", cpus=cpus, memory_bytes=memory), limits=Limits(wall_time_s=wall))
    try:
        check_spec(spec)
    except InvalidInput as error:
        assert error.where
