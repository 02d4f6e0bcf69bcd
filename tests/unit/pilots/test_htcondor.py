"""HTCondor: what its own Python bindings make of what we give them. There is no pool here."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import classad2
import htcondor2
import pytest

from deskgrid.core import pilots
from deskgrid.core.pilots import Sent
from deskgrid.errors import InvalidInput, OperatorError
from deskgrid.pilots.htcondor import HTCondorSystem, check_lines, description, is_there
from deskgrid.pilots.system import NoAnswer, Order

PLAN = pilots.System(name="pool", packages=frozenset({"root"}), cpus=3, memory_bytes=1 << 30)
ORDER = Order(name="pool-1", link="deskgrid://grid:1/join?secret=x", lifetime_s=90.0, idle_s=30.0)
SENT = Sent(name="pool-1", system="pool", sent_at=0.0, reference="7")


class PlaySchedd:
    """A schedd that keeps what it gets. Its methods are called as those of the real one can be."""

    def __init__(self) -> None:
        self.jobs: list[classad2.ClassAd] = []
        self.scripts: list[str] = []
        self.wanted: list[htcondor2.Submit] = []
        self.loses_files = False

    def submit(self, *args: Any, **named: Any) -> Any:
        asked = inspect.signature(htcondor2.Schedd.submit).bind(self, *args, **named).arguments
        assert asked["spool"] is True
        self.wanted.append(asked["description"])
        self.jobs.append(
            classad2.ClassAd({"DeskgridPilot": asked["description"].expand("My.DeskgridPilot").strip('"'), "JobStatus": 5})
        )
        return htcondor2.SubmitResult(len(self.jobs), 0, 1, classad2.ClassAd(), None)

    def spool(self, *args: Any) -> None:
        inspect.signature(htcondor2.Schedd.spool).bind(self, *args)
        if self.loses_files:
            raise htcondor2.HTCondorException("connection lost")
        self.scripts.append(Path(self.wanted[-1].expand("executable")).read_text())

    def query(self, *args: Any, **named: Any) -> list[classad2.ClassAd]:
        asked = inspect.signature(htcondor2.Schedd.query).bind(self, *args, **named).arguments
        return [job for job in self.jobs if holds(asked["constraint"], job)]

    def act(self, *args: Any, **named: Any) -> classad2.ClassAd:
        asked = inspect.signature(htcondor2.Schedd.act).bind(self, *args, **named).arguments
        assert asked["action"] is htcondor2.JobAction.Remove
        self.jobs = [job for job in self.jobs if not holds(asked["job_spec"], job)]
        return classad2.ClassAd()


class Bindings:
    """The module, with another schedd."""

    def __init__(self, schedd: PlaySchedd) -> None:
        self.schedd = schedd

    def __getattr__(self, name: str) -> Any:
        return getattr(htcondor2, name)

    def Schedd(self) -> PlaySchedd:
        return self.schedd


def holds(expression: str, job: classad2.ClassAd) -> bool:
    return classad2.ExprTree(expression).eval(job) is True


def system(schedd: PlaySchedd) -> HTCondorSystem:
    return HTCondorSystem(PLAN, {"accounting_group": "physics"}, idle_s=30.0, bindings=Bindings(schedd))


async def test_pilot_is_spooled_found_by_its_name_and_removed() -> None:
    schedd = PlaySchedd()
    made = system(schedd)
    assert await made.send(ORDER) == "1"
    assert ORDER.link in schedd.scripts[0] and "--lifetime 90s" in schedd.scripts[0]
    assert not Path(schedd.wanted[0].expand("executable")).exists(), "the link stays nowhere"
    assert await made.gone([SENT]) == set()
    await made.call_back(SENT)
    assert await made.gone([SENT]) == {"pool-1"}
    await made.call_back(SENT)


async def test_pilot_of_which_half_arrived_was_perhaps_sent() -> None:
    schedd = PlaySchedd()
    schedd.loses_files = True
    made = system(schedd)
    with pytest.raises(NoAnswer, match="connection lost"):
        await made.send(ORDER)
    assert await made.gone([SENT]) == set()


async def test_pool_that_is_not_there_is_told() -> None:
    made = HTCondorSystem(PLAN, {}, idle_s=30.0)
    with pytest.raises(OperatorError, match="HTCondor does not answer"):
        await made.send(ORDER)
    with pytest.raises(OperatorError, match="HTCondor does not answer"):
        await made.gone([SENT])


def test_bindings_take_the_description_and_the_link_is_not_in_it() -> None:
    made = htcondor2.Submit(description(ORDER, PLAN, Path("/tmp/pilot"), {"+WantedBy": '"physics"', "request_memory": "2048"}))
    assert (made["request_cpus"], made["request_memory"], made["executable"]) == ("3", "2048", "/tmp/pilot")
    assert ORDER.link not in str(made) and "arguments" not in made
    assert 'MY.WantedBy = "physics"' in str(made)


@pytest.mark.parametrize(
    ("job", "is_removed"),
    [
        ({"JobStatus": 2, "EnteredCurrentStatus": 60}, False),
        ({"JobStatus": 2, "EnteredCurrentStatus": 600}, True),
        ({"JobStatus": 5, "EnteredCurrentStatus": 600}, False),
        ({"JobStatus": 5, "EnteredCurrentStatus": 6000}, True),
        ({"JobStatus": 1, "EnteredCurrentStatus": 6000}, False),
        ({"JobStatus": 1, "EnteredCurrentStatus": 6000, "NumJobStarts": 0}, False),
        ({"JobStatus": 1, "EnteredCurrentStatus": 0, "NumJobStarts": 1}, True),
    ],
)
def test_what_is_removed_by_itself(job: dict[str, int], is_removed: bool) -> None:
    """`EnteredCurrentStatus` is so many seconds ago."""
    now = classad2.ExprTree("time()").eval()
    made = classad2.ClassAd({**job, "EnteredCurrentStatus": now - job["EnteredCurrentStatus"]})
    assert holds(description(ORDER, PLAN, Path("/tmp/pilot"), {})["periodic_remove"], made) is is_removed


@pytest.mark.parametrize(("status", "is_one"), [(1, True), (2, True), (3, False), (4, False), (5, True)])
def test_what_is_there(status: int, is_one: bool) -> None:
    constraint = is_there(["pool-1", "pool-2"])
    assert holds(constraint, classad2.ClassAd({"DeskgridPilot": "pool-2", "JobStatus": status})) is is_one
    assert not holds(constraint, classad2.ClassAd({"DeskgridPilot": "pool-3", "JobStatus": status}))
    assert not holds(constraint, classad2.ClassAd({"JobStatus": status})), "others' jobs are not ours"


@pytest.mark.parametrize("line", ["physics", "= x", "a b = c", "queue = 3", "My.DeskgridPilot = x", "a = b\nqueue"])
def test_line_that_is_none_of_a_description_is_told(line: str) -> None:
    with pytest.raises(InvalidInput, match="here"):
        check_lines([line], where="here")
