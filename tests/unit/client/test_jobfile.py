"""Job files: what is taken, what is refused, and where the refusal points."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from deskgrid.client.jobfile import KEYS, JobFile, job_from_options, parse_job, read_job, spec_reference
from deskgrid.errors import InvalidInput
from deskgrid.model.jobs import JobSpec, Limits, Machine, Results
from deskgrid.model.machines import MachineKind, Network
from deskgrid.model.overlay import API_SERVICE, Offer, Reach, ServiceRef
from deskgrid.units import GIB, MIB

NET = '[machine]\ndisk = "t"\nnetwork = "overlay"\n'
WHOLE = """
name = "hello"
[machine]
kind = "vm"
disk = "tiny"             # name, name@version or sha256
context = "context/"
scratch = "8GiB"
memory = "256MiB"
cpus = 2
network = "overlay"
offer = ["ssh:22", "web:8080"]
share = ["group:hep"]
reach = { db = "db.job-41:5432", site = "web.user:8000", grid = "api.server" }
reach_wait = "1m"
ssh_keys = ["ssh-ed25519 AAAA ann"]
[limits]
wall_time = "10m"
boot_time = "1m30s"
attempts = 2
max_lost = 5
max_suspend = "1d"
[results]
paths = ["out/**", "*.root"]
"""


def test_every_key_is_read(tmp_path: Path):
    (tmp_path / "context").mkdir()
    job = parse_job(WHOLE, "job.toml", folder=tmp_path)
    machine = Machine(
        kind=MachineKind.VM,
        disk="tiny",
        scratch_bytes=8 * GIB,
        memory_bytes=256 * MIB,
        cpus=2,
        network=Network.OVERLAY,
        offer=(Offer("ssh", 22), Offer("web", 8080)),
        share=("group:hep",),
        reach=(
            Reach("db", ServiceRef("db", "job-41"), 5432),
            Reach("site", ServiceRef("web", "user"), 8000),
            Reach("grid", API_SERVICE, 8470),
        ),
        reach_wait_s=60.0,
        ssh_keys=("ssh-ed25519 AAAA ann",),
    )
    limits = Limits(wall_time_s=600, boot_time_s=90, attempts=2, max_lost=5, max_suspend_s=86400)
    assert job.spec == JobSpec(name="hello", machine=machine, limits=limits, results=Results(paths=("out/**", "*.root")))
    assert job.context == tmp_path / "context"


REACHES = (
    'network = "overlay"\nreach = { db = "db.job-41:5432" }',
    'network = "overlay"\nreach.db = "db.job-41:5432"',
    'network = "overlay"\n[machine.reach]\ndb = "db.job-41:5432"',
    'network = "overlay"\nreach = ["db=db.job-41:5432"]',
)


@pytest.mark.parametrize("text", REACHES)
def test_services_to_reach_are_written_in_any_way_that_toml_has(text: str):
    spec = parse_job(f'[machine]\ndisk = "t"\n{text}', "job.toml").spec
    assert spec.machine.reach == (Reach("db", ServiceRef("db", "job-41"), 5432),)


def test_services_as_options():
    options = {"disk": "t", "network": "overlay", "offer": ("ssh:22",), "reach": ("a=web.user:1", "grid=api.server")}
    machine = job_from_options(options).spec.machine
    assert machine.offer == (Offer("ssh", 22),)
    assert machine.reach == (Reach("a", ServiceRef("web", "user"), 1), Reach("grid", API_SERVICE, 8470))


def test_a_disk_is_enough_and_the_rest_has_defaults():
    assert parse_job('machine.disk = "tiny"', "job.toml") == JobFile(spec=JobSpec(machine=Machine(disk="tiny")))
    assert job_from_options({"disk": "tiny", "memory": None}) == JobFile(spec=JobSpec(machine=Machine(disk="tiny")))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[machine]\ndisk = "t"\nmemroy = "1GiB"', "job.toml:3: unknown key 'memroy' in [machine] (did you mean memory?"),
        ('[machine]\ndisk = "t"\n\n[limit]\nattempts = 2', "job.toml:4: unknown key 'limit' (did you mean [limits]?"),
        ('memory = "1GiB"\nmachine.disk = "t"', "job.toml:1: unknown key 'memory' (memory belongs in [machine])"),
        ('[machine]\nname = "n"\ndisk = "t"', "job.toml:2: unknown key 'name' in [machine] (name belongs at the top"),
        ('[machine]\ndisk = "t"\nmemory = "256"', "job.toml:3: memory: '256' is not a size (a number and one of B, KiB"),
        ('[machine]\ndisk = "t"\nmemory = 256', "job.toml:3: memory: 256 is not a size"),
        ('[machine]\ndisk = "t"\nmemory = "1KiB"', "job.toml:3: memory: 1KiB is out of bounds (32MiB to"),
        ('[machine]\ndisk = "t"\ncpus = "2"', "job.toml:3: cpus: '2' is not a whole number"),
        ('[machine]\ndisk = "t"\ncpus = true', "job.toml:3: cpus: true is not a whole number"),
        ('[machine]\ndisk = "t"\nnetwork = "overlai"', "job.toml:3: network: 'overlai' is not known (did you mean overlay?"),
        ('[machine]\ndisk = "t"\ncontext = "gone"', "job.toml:3: there is no folder"),
        ('[limits]\nwall_time = "10"\n[machine]\ndisk = "t"', "job.toml:2: wall_time: '10' is not a duration"),
        ('machine = {disk = "t", cpus = 0}', "job.toml:1: cpus: 0 is out of bounds (1 to 1024)"),
        ('machine.disk = "t"\nlimits.attempts = 0', "job.toml:2: attempts: 0 is out of bounds"),
        ('machine = "t"', "job.toml:1: machine is a section (write [machine]"),
        ('[results]\npaths = "**"\n[machine]\ndisk = "t"', "job.toml:2: paths: '**' is not a list"),
        ('[results]\npaths = []\n[machine]\ndisk = "t"', "job.toml:2: paths: 1 to 100 globs"),
        ('name = "x"\n[machine]\ncpus = 1', "job.toml:2: a disk is needed"),
        ('name = "x"\n[machine\ncpus = 1', "job.toml:2: not TOML: "),
        ('name = ""\nmachine.disk = "t"', "job.toml:1: name: a name has"),
        (NET + 'offer = "ssh:22"', "job.toml:4: offer: 'ssh:22' is not a list"),
        (NET + 'offer = ["ssh"]', "job.toml:4: offer: 'ssh' is not a service to offer (NAME:PORT, as in ssh:22)"),
        (NET + 'offer = ["ssh:22", "ssh:23"]', "job.toml:4: offer: two offers are called ssh"),
        ('machine.disk = "t"\nmachine.offer = ["ssh:22"]', "job.toml:2: offer: without a network there are no services"),
        (NET + 'reach = "db.job-1:1"', "job.toml:4: reach: 'db.job-1:1' is not a table (as in { db ="),
        (NET + 'reach = ["db"]', "job.toml:4: reach: 'db' is not NAME=SERVICE.PEER:PORT (as in db="),
        (NET + 'reach = { db = "db.job1:5" }', "job.toml:4: reach: 'db.job1' is not a service (SERVICE.PEER, as"),
        (NET + '[machine.reach]\na = "a.user:1"\ndb = "db.job-1"', "job.toml:6: reach: 'db.job-1' has no port (as in db ="),
        (NET + "[machine.reach]\ndb = 5", "job.toml:5: reach: 5 is not a text"),
        (NET + '[machine.reach]\njob = "a.user:1"', "job.toml:4: reach: job is taken (any name but localhost,"),
        (NET + '[machine.reach]\nDB = "a.user:1"', "job.toml:5: reach: 'DB' is not a name for a service"),
        (NET + '\noffer = ["a:1"]\nshare = ["hep"]', "job.toml:6: share: 'hep' is nobody to share with (group:NAME,"),
        (NET + 'reach_wait = "2d"', "job.toml:4: reach_wait: 172800.0 is out of bounds (0 to"),
        (NET + 'ssh_keys = ["a\\nb"]', "job.toml:4: ssh_keys: at most 20 lines as in authorized_keys"),
    ],
)
def test_a_mistake_is_refused_with_its_line_and_what_is_allowed(text: str, message: str):
    with pytest.raises(InvalidInput) as refused:
        parse_job(text, "job.toml")
    assert str(refused.value).startswith(message)


def test_options_win_over_the_file_and_are_named_in_mistakes(tmp_path: Path):
    file = tmp_path / "job.toml"
    file.write_text('[machine]\ndisk = "tiny"\nmemory = "1GiB"\n')
    assert read_job(file, {"memory": "2GiB", "paths": ("a",)}).spec.machine.memory_bytes == 2 * GIB
    with pytest.raises(InvalidInput, match=r"^--memory: '2GB2' is not a size"):
        read_job(file, {"memory": "2GB2"})
    with pytest.raises(InvalidInput, match=r"^--cpus: 0 is out of bounds"):
        read_job(None, {"disk": "tiny", "cpus": 0})
    with pytest.raises(InvalidInput, match=r"^--reach: 'db' is not NAME=SERVICE"):
        read_job(None, {"disk": "tiny", "reach": ("db",)})
    with pytest.raises(InvalidInput, match=r"^--disk: a disk is needed"):
        read_job(None)


def test_context_of_a_file_is_beside_it_and_of_an_option_is_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "there" / "files").mkdir(parents=True)
    (tmp_path / "here").mkdir()
    file = tmp_path / "there" / "job.toml"
    file.write_text('machine.disk = "tiny"\nmachine.context = "files"\n')
    monkeypatch.chdir(tmp_path)
    assert read_job(file).context == tmp_path / "there" / "files"
    assert read_job(file, {"context": "here"}).context == Path("here")


def test_a_file_that_cannot_be_read_is_refused_by_name(tmp_path: Path):
    (tmp_path / "latin").write_bytes(b'name = "\xe9"')
    (tmp_path / "large").write_bytes(bytes(2 << 20))
    for name, message in (("gone", "cannot read"), ("latin", "UTF-8"), ("large", "too large"), (".", "cannot read")):
        with pytest.raises(InvalidInput, match=message):
            read_job(tmp_path / name)


TEXTS = st.text(max_size=12) | st.sampled_from(
    ["8GiB", "10m", "tiny", "vm", "none", "9" * 400 + "TiB", "~nobody-here/x", "a" * 300]
)
VALUES = st.recursive(
    st.integers() | st.booleans() | st.floats() | TEXTS | st.none() | st.binary(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=4,
)


@given(st.text(max_size=200))
@example("a = " + "[" * 20000)
@example("a = " + "1" * 5000)
@example('machine.disk = "t"\nmachine.cpus = 1' + "0" * 4000)
@example('machine.disk = "t"\nmachine.memory = "' + "9" * 400 + 'TiB"')
@example('machine.disk = "t"\nmachine.context = "' + "a" * 5000 + '"')
@example('machine.disk = "t"\nmachine.context = "\\u0000"')
@example('machine.disk = "t"\nlimits.wall_time = "' + "9" * 400 + 'd"')
def test_no_text_crashes_the_parser(text: str):
    try:
        parse_job(text, "job.toml")
    except InvalidInput as error:
        assert str(error).startswith("job.toml")


@given(st.lists(st.tuples(st.sampled_from([key.path for key in KEYS]) | TEXTS, VALUES), max_size=4))
def test_no_value_of_any_key_crashes_the_parser(pairs: list[tuple[str, object]]):
    text = 'machine.disk = "t"\n' + "\n".join(f"{name} = {_toml(value)}" for name, value in pairs)
    try:
        job = parse_job(text, "job.toml")
    except InvalidInput as error:
        assert str(error).startswith("job.toml")
    else:
        assert msgspec.json.decode(msgspec.json.encode(job.spec), type=JobSpec) == job.spec


@given(st.dictionaries(st.sampled_from([key.name for key in KEYS]), VALUES | st.just("\udc80"), max_size=4))
def test_no_option_crashes_the_parser(options: dict[str, object]):
    try:
        job = job_from_options(options)
    except InvalidInput as error:
        assert str(error).startswith("--")
    else:
        msgspec.json.encode(job.spec)


def _toml(value: object) -> str:
    """Write a value as TOML, as far as it has it."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return "[" + ", ".join(_toml(item) for item in value) + "]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_toml(name)} = {_toml(item)}" for name, item in value.items()) + "}"
    return msgspec.json.encode(value).decode() if isinstance(value, str) else repr(value)


def test_reference_names_every_key_and_its_default():
    text = spec_reference()
    assert all(f"`{key.name}`" in text for key in KEYS)
    assert '`"256MiB"`' in text
    assert "## [array]" in text


def test_the_example_is_a_job_and_what_the_demo_runs():
    root = Path(__file__).parents[3]
    example_folder, demo_folder = root / "examples/hello", root / "src/deskgrid/cli/hello"
    for name in ("job.toml", "context/context.sh"):
        assert (example_folder / name).read_bytes() == (demo_folder / name).read_bytes()
    assert read_job(example_folder / "job.toml").spec.machine.disk == "tiny"
