"""The factory: what it sends, forgets, takes up after a kill, and does when a system refuses."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest

from deskgrid.clock import FakeClock
from deskgrid.core import pilots
from deskgrid.core.pilots import Sent
from deskgrid.errors import DeskgridError, Forbidden, InvalidInput, OperatorError, ProtocolError, StoreUnavailable, Unreachable
from deskgrid.model.machines import MachineKind, Network
from deskgrid.model.wire import WaitingClass
from deskgrid.model.workers import WorkerState
from deskgrid.pilots.factory import Factory
from deskgrid.pilots.system import NoAnswer, Order


class PlaySystem:
    """A place for pilots that says what it is told to."""

    uses_links = True

    def __init__(self, name: str = "batch", *, most: int = 4) -> None:
        self.plan = pilots.System(name=name, packages=frozenset({"root"}), most=most, jobs_per_pilot=1, patience_s=600.0)
        self.idle_s = 60.0
        self.orders: list[Order] = []
        self.there: dict[str, str] = {}
        self.called_back: list[str] = []
        self.refuses = self.silent = self.is_unsure = False

    async def send(self, order: Order) -> str:
        self.orders.append(order)
        if self.refuses:
            raise OperatorError("the queue is closed")
        reference = str(len(self.orders))
        self.there[reference] = order.name
        if self.is_unsure:
            raise NoAnswer("it takes too long")
        return reference

    async def gone(self, pilots: Sequence[Sent]) -> set[str]:
        """As one that knows pilots by reference only."""
        if self.silent:
            raise OperatorError("it does not answer")
        return {one.name for one in pilots if one.reference and one.reference not in self.there}

    async def call_back(self, pilot: Sent) -> None:
        if self.silent:
            raise OperatorError("it does not answer")
        self.called_back.append(self.there.pop(pilot.reference, ""))


class PlayGrid:
    """What the factory asks of a grid."""

    def __init__(self) -> None:
        self.jobs = 0
        self.joined: set[str] = set()
        self.offline: set[str] = set()
        self.links = 0
        self.error: DeskgridError | None = None

    async def workers(self) -> list[Any]:
        states = {name: WorkerState.OFFLINE if name in self.offline else WorkerState.ONLINE for name in self.joined}
        return [type("W", (), {"name": name, "pilot_of": "ann", "state": state}) for name, state in states.items()]

    async def waiting(self) -> tuple[WaitingClass, ...]:
        one = WaitingClass(
            jobs=self.jobs, kind=MachineKind.PROCESS, network=Network.NONE, cpus=1, memory_bytes=0, packages=("root",), workers=0
        )
        return (one,) if self.jobs else ()

    async def pilot_link(self, *, pilot_s: float, lifetime_s: float) -> str:
        assert pilot_s == 14400.0 + 300.0 and lifetime_s >= 600.0
        if self.error:
            raise self.error
        self.links += 1
        return f"deskgrid://link-{self.links}"


class Place:
    def __init__(self, folder: Path) -> None:
        self.folder, self.grid, self.system, self.clock = folder, PlayGrid(), PlaySystem(), FakeClock()
        self.begin()

    def begin(self) -> None:
        """Be a new process with what is in the folder."""
        self.factory = Factory(self.grid, [self.system], self.folder, clock=self.clock, rng=random.Random(1))  # type: ignore[arg-type]

    async def look(self, *, jobs: int | None = None, after_s: float = 30.0) -> None:
        if jobs is not None:
            self.grid.jobs = jobs
        await self.clock.advance(after_s)
        await self.factory.look()


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path / "factory")


async def test_pilots_come_work_and_go(place: Place) -> None:
    await place.look(jobs=2)
    assert [order.link for order in place.system.orders] == ["deskgrid://link-1", "deskgrid://link-2"]
    await place.look()
    assert len(place.system.orders) == 2, "those on their way count"
    place.grid.joined = set(place.system.there.values())
    await place.look(jobs=0)
    assert all(record.joined for record in place.factory.out.values()) and not place.system.called_back
    place.grid.joined.clear()
    place.system.there.clear()
    await place.look()
    assert place.factory.out == {}
    await place.look(jobs=9)
    assert len(place.system.orders) == 2 + 4


async def test_factory_that_is_killed_goes_on_where_it_was(place: Place) -> None:
    await place.look(jobs=3)
    place.begin()
    await place.look()
    assert len(place.system.orders) == 3 and len(place.factory.out) == 3
    assert {record.reference for record in place.factory.out.values()} == set(place.system.there)


async def test_pilot_that_was_perhaps_sent_when_it_was_killed_counts_until_it_joins_or_is_overdue(place: Place) -> None:
    send = place.system.send

    async def killed(_order: Order) -> str:
        raise KeyboardInterrupt

    place.system.send = killed  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        await place.look(jobs=1)
    place.system.send = send  # type: ignore[method-assign]
    place.begin()
    await place.look()
    assert not place.system.orders
    await place.look(after_s=601.0)
    await place.look(after_s=3601.0)
    assert len(place.system.orders) == 1


async def test_pilot_of_which_only_the_name_is_known_is_forgotten_when_it_has_left(place: Place) -> None:
    """The factory was killed before it had written by what name the system knows it."""
    await place.look(jobs=1)
    [record] = place.factory.out.values()
    place.factory.out[record.name] = msgspec.structs.replace(record, reference="")
    place.grid.joined = {record.name}
    await place.look()
    place.grid.joined.clear()
    await place.look(jobs=0)
    assert place.factory.out == {}


async def test_system_that_refuses_is_left_alone_for_longer_and_longer(place: Place) -> None:
    place.system.refuses = True
    tries = []
    for _ in range(200):
        before = len(place.system.orders)
        await place.look(jobs=4)
        tries.append(len(place.system.orders) - before)
    assert max(tries) == 1, "one that is refused is enough"
    assert 3 <= sum(tries) <= 12
    assert place.factory.out == {}
    place.system.refuses = False
    await place.look(after_s=3601.0)
    assert len(place.system.there) == 4


async def test_pilot_that_was_perhaps_taken_is_kept_and_no_other_is_sent_at_once(place: Place) -> None:
    place.system.is_unsure = True
    await place.look(jobs=3)
    assert len(place.system.orders) == 1 and [record.reference for record in place.factory.out.values()] == [""]
    place.system.is_unsure = False
    await place.look()
    assert len(place.system.orders) == 1
    place.grid.joined = set(place.system.there.values())
    await place.look()
    assert len(place.system.orders) == 3, "it was taken, and nothing is wrong with the system"


@pytest.mark.parametrize("error", [Unreachable("no answer"), StoreUnavailable("its disk is full")])
async def test_grid_that_does_not_answer_is_not_the_systems_failure(error: DeskgridError, place: Place) -> None:
    place.grid.error = error
    with pytest.raises(type(error)):
        await place.look(jobs=1)
    assert not place.system.orders and place.factory.out == {}
    place.grid.error = None
    await place.look(after_s=1.0)
    assert len(place.system.orders) == 1


async def test_factory_goes_on_while_the_grid_does_not_answer_and_ends_when_it_refuses(place: Place) -> None:
    place.grid.jobs = 1
    running = asyncio.create_task(place.factory.run(30.0))
    for error in (Unreachable("no answer"), StoreUnavailable("its disk is full"), ProtocolError("nonsense")):
        place.grid.error = error
        await place.clock.advance(30.0)
    assert not running.done() and not place.system.orders
    place.grid.error = None
    await place.clock.advance(30.0)
    assert len(place.system.orders) == 1
    place.grid.error, place.grid.jobs = Forbidden("you are no user any more"), 2
    await place.clock.advance(30.0)
    with pytest.raises(Forbidden):
        await running


async def test_pilot_whose_worker_is_offline_is_forgotten_when_its_system_says_that_it_is_gone(place: Place) -> None:
    await place.look(jobs=1)
    place.grid.joined = place.grid.offline = set(place.system.there.values())
    await place.look()
    place.system.silent = True
    await place.look()
    assert len(place.factory.out) == 1, "perhaps it comes back"
    place.system.silent = False
    place.system.there.clear()
    await place.look(jobs=0)
    assert place.factory.out == {}
    await place.look(jobs=1)
    assert len(place.system.orders) == 2, "and that was no failure"


async def test_pilots_that_never_join_are_called_back(place: Place) -> None:
    await place.look(jobs=2)
    await place.look(after_s=601.0)
    assert len(place.system.called_back) == 2 and place.factory.out == {}
    await place.look()
    assert len(place.system.orders) == 2, "not at once again"


async def test_pilots_nobody_needs_any_more_are_called_back_as_soon_as_the_system_answers(place: Place) -> None:
    await place.look(jobs=2)
    place.system.silent = True
    await place.look(jobs=0)
    assert len(place.factory.out) == 2
    place.system.silent = False
    await place.look()
    assert len(place.system.called_back) == 2 and place.factory.out == {}


async def test_all_are_called_back_when_it_is_told_to_stop(place: Place) -> None:
    await place.look(jobs=2)
    place.grid.joined = {next(iter(place.system.there.values()))}
    await place.look()
    place.begin()
    await place.factory.call_all_back()
    assert len(place.system.called_back) == 2 and place.factory.out == {} and not place.system.there


async def test_pilots_of_a_system_that_is_not_in_the_file_any_more_are_out_until_they_have_left(place: Place) -> None:
    await place.look(jobs=2)
    [first, second] = place.factory.out
    place.system = PlaySystem("other")
    place.begin()
    place.grid.joined = {first}
    await place.look(jobs=0)
    await place.factory.call_all_back()
    assert set(place.factory.out) == {first, second}, "nobody can call them back"
    place.grid.joined = set()
    await place.look(jobs=0)
    assert set(place.factory.out) == {second}


def test_file_of_somebody_elses_is_not_overwritten(place: Place) -> None:
    (place.folder / "pilots.json").write_text('{"notes": 1}')
    with pytest.raises(InvalidInput, match=r"pilots\.json"):
        place.begin()
    assert (place.folder / "pilots.json").read_text() == '{"notes": 1}'
