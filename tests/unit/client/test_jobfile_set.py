"""Files with several jobs: what is taken, what is refused, and where the refusal points."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from deskgrid.client.jobfile import JobFile, read_job
from deskgrid.client.jobfile_set import SetFile, parse_set, read_file, read_set
from deskgrid.errors import InvalidInput
from deskgrid.model.overlay import Offer, Reach, ServiceRef, parse_reach, parse_service

SERVICE = """
[set]
name = "service"
together = true

[job.store]
command = ["/context/store"]
[job.store.machine]
disk = "tiny"
network = "overlay"
offer = ["db:5432"]

[job.clients]
after_end = ["warm-up"]
command = ["/context/client", "{index}"]
array.count = 10
[job.clients.machine]
disk = "tiny"
network = "overlay"
reach = { db = "db.store.set:5432" }

[job.warm-up]
machine.disk = "tiny"
"""


def test_each_job_of_a_set_has_keys_and_sections_of_its_own():
    found = parse_set(SERVICE, "service.toml")
    assert (found.name, found.together, [name for name, _ in found.members]) == ("service", True, ["store", "clients", "warm-up"])
    store, clients, _ = (job for _, job in found.members)
    assert store.spec.machine.offer == (Offer("db", 5432),)
    assert store.spec.name == "store"
    assert clients.array is not None
    assert clients.array.count == 10
    assert clients.spec.machine.reach == (Reach("db", ServiceRef("db", "store.set"), 5432),)
    assert clients.spec.after_end == ("warm-up",)


def test_a_set_is_called_as_its_file_and_starts_bit_by_bit_unless_it_says_otherwise():
    found = parse_set("[job.a]\nmachine.disk = 't'\nname = 'mine'", "folder/service.toml")
    assert (found.name, found.together, found.members[0][1].spec.name) == ("service", False, "mine")


A = "[job.a.machine]\ndisk = 't'\nnetwork = 'overlay'\noffer = ['web:80']\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[job.a]\nmachine.disk = 't'\n[limits]\nattempts = 2", "s.toml:3: unknown key 'limits' (in a file of several jobs"),
        ("[set]\nnmae = 'x'\n[job.a]\nmachine.disk = 't'", "s.toml:2: unknown key 'nmae' in [set] (allowed: name, together)"),
        ("[set]\ntogether = 1\n[job.a]\nmachine.disk = 't'", "s.toml:2: together: 1 is neither true nor false"),
        ("[set]\nname = 1\n[job.a]\nmachine.disk = 't'", "s.toml:2: name: 1 is not a text"),
        ("set = 1\n[job.a]\nmachine.disk = 't'", "s.toml:1: set is a section"),
        ("[job]\na = 1", "s.toml:2: job.a is a section (write [job.a] on a line"),
        ("[job]", "s.toml:1: a set of 0 jobs"),
        ("[job.A]\nmachine.disk = 't'", "s.toml:1: 'A' is not a name for a job of a set (a letter, then"),
        ("[job.job-1]\nmachine.disk = 't'", "s.toml:1: 'job-1' is not a name for a job of a set"),
        (A + "[job.b]\nname = 'b'", "s.toml:5: a disk is needed"),
        (A + "[job.b.machine]\ndisk = 't'\ncpus = 0", "s.toml:7: cpus: 0 is out of bounds"),
        (A + "[job.b]\nmachine.disk = 't'\nafter = ['c']", "s.toml:7: after: 'c' is neither a job nor an array (as in job-41 or array-3, or one of a, b"),
        (A + "[job.b]\nmachine.disk = 't'\nafter = [1]", "s.toml:7: after: 1 may be a job or an array"),
        (A + "[job.b.machine]\ndisk = 't'\nnetwork = 'overlay'\nreach = { x = 'web.c.set:80' }", "s.toml:8: reach: there is no c in this set"),
        (A + "[job.b.machine]\ndisk = 't'\nnetwork = 'overlay'\n[job.b.machine.reach]\nx = 'db.a.set:80'", "s.toml:9: reach: a does not offer db (it offers web)"),
        (A + "[job.a.array]\ncount = 2\n[job.b.machine]\ndisk = 't'\nnetwork = 'overlay'\nreach = { x = 'web.a.set:80' }", "s.toml:10: reach: a is an array"),
        (A + "[job.b]\nmachine.disk = 't'\ncommand = ['{x}']\narray.count = 2", "s.toml:7: nothing fills in {x}"),
    ],
)  # fmt: skip
def test_a_mistake_in_a_set_is_refused_with_its_line(text: str, message: str):
    with pytest.raises(InvalidInput) as refused:
        parse_set(text, "s.toml")
    assert str(refused.value).startswith(message)


def test_a_file_is_known_as_a_set_by_its_jobs_and_takes_no_options_then(tmp_path: Path):
    (tmp_path / "service.toml").write_text(SERVICE)
    (tmp_path / "job.toml").write_text('machine.disk = "tiny"')
    assert isinstance(read_file(tmp_path / "service.toml", {"memory": None}), SetFile)
    assert isinstance(read_file(tmp_path / "job.toml", {"memory": "1GiB"}), JobFile)
    assert isinstance(read_file(None, {"disk": "tiny"}), JobFile)
    with pytest.raises(InvalidInput, match=r"^--array: options are for one job"):
        read_file(tmp_path / "service.toml", {"array": 2})
    with pytest.raises(InvalidInput, match=r"job\.toml: this is not a set of jobs"):
        read_set(tmp_path / "job.toml")
    with pytest.raises(InvalidInput, match=r"service\.toml:2: unknown key 'set'"):
        read_job(tmp_path / "service.toml")


PARTS = st.sampled_from(SERVICE.splitlines()) | st.text(max_size=20)


@given(st.lists(PARTS, max_size=12).map("\n".join))
@example("job = 1")
@example("[[job.a]]")
@example("[job.a]\nmachine = 1")
def test_no_text_crashes_the_parser(text: str):
    try:
        parse_set(text, "s.toml")
    except InvalidInput as error:
        assert str(error).startswith("s.toml")


def test_services_of_a_set_are_named_by_member():
    assert parse_service("db.store.set").member == "store"
    assert parse_service("db.job-1").member is None
    assert str(parse_reach("db", "db.store.set:5432")) == "db.store.set:5432"
    for text in ("db.set", "db..set", "db.Store.set", "db.a.b.set", "db.store.set.set"):
        with pytest.raises(InvalidInput):
            parse_service(text)
