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
from deskgrid.units import GIB, MIB

WHOLE = """
name = "hello"
[machine]
kind = "vm"
disk = "tiny"             # name, name@version or sha256
context = "context/"
scratch = "8GiB"
memory = "256MiB"
cpus = 2
network = "none"
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
    machine = Machine(kind=MachineKind.VM, disk="tiny", scratch_bytes=8 * GIB, memory_bytes=256 * MIB, cpus=2, network=Network.NONE)
    limits = Limits(wall_time_s=600, boot_time_s=90, attempts=2, max_lost=5, max_suspend_s=86400)
    assert job.spec == JobSpec(name="hello", machine=machine, limits=limits, results=Results(paths=("out/**", "*.root")))
    assert job.context == tmp_path / "context"


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
    assert "required" in text


def test_the_example_is_a_job_and_what_the_demo_runs():
    root = Path(__file__).parents[3]
    example_folder, demo_folder = root / "examples/hello", root / "src/deskgrid/cli/hello"
    for name in ("job.toml", "context/context.sh"):
        assert (example_folder / name).read_bytes() == (demo_folder / name).read_bytes()
    assert read_job(example_folder / "job.toml").spec.machine.disk == "tiny"
