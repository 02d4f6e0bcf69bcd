"""Job files: what is taken, what is refused, and where the refusal points."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from deskgrid.client.jobfile import (
    KEYS,
    ArrayPart,
    JobFile,
    job_from_options,
    parse_defaults,
    parse_job,
    read_job,
    spec_reference,
    with_defaults,
)
from deskgrid.errors import InvalidInput
from deskgrid.model.jobs import JobSpec, Limits, Machine, Results
from deskgrid.model.machines import MachineKind, Network
from deskgrid.model.overlay import API_SERVICE, Offer, Reach, ServiceRef
from deskgrid.units import GIB, MIB

NET = '[machine]\ndisk = "t"\nnetwork = "overlay"\n'
WHOLE = """
name = "hello"
command = ["/context/run", "-n", "{not filled in}"]
environment = { SEED = "7" }
group = "hep"
priority = 3
after = ["job-41", "array-3"]
after_end = ["job-40"]
retain = "1d"
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
platforms = ["linux-x86_64"]
need = ["root-6.30"]
on = "worker:7"
[limits]
wall_time = "10m"
boot_time = "1m30s"
attempts = 2
max_lost = 5
max_suspend = "1d"
processes = 10
file_size = "1MiB"
[results]
paths = ["out/**", "*.root"]
[secrets]
files = { token = "token.txt", "rucio.cfg" = "private/rucio.cfg" }
trust = ["mine", "group:hep"]
"""


def test_every_key_is_read(tmp_path: Path):
    for name in ("context", "private"):
        (tmp_path / name).mkdir()
    for name in ("token.txt", "private/rucio.cfg"):
        (tmp_path / name).write_text("s3cret")
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
        platforms=("linux-x86_64",),
        need=("root-6.30",),
        on="worker:7",
    )
    limits = Limits(wall_time_s=600, boot_time_s=90, attempts=2, max_lost=5, max_suspend_s=86400, processes=10, file_bytes=MIB)
    assert job.spec == JobSpec(
        name="hello",
        command=("/context/run", "-n", "{not filled in}"),
        environment=(("SEED", "7"),),
        group="hep",
        priority=3,
        after=("job-41", "array-3"),
        after_end=("job-40",),
        retain_s=86400,
        machine=machine,
        limits=limits,
        results=Results(paths=("out/**", "*.root")),
        secrets=("token", "rucio.cfg"),
        trust=("mine", "group:hep"),
    )
    assert job.secrets == (("token", tmp_path / "token.txt"), ("rucio.cfg", tmp_path / "private" / "rucio.cfg"))
    assert job.array is None
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
        ('after = [41]\nmachine.disk = "t"', 'job.toml:1: after: 41 may be a job or an array ("job-41" or "array-41")'),
        ('after_end = ["41"]\nmachine.disk = "t"', "job.toml:1: after_end: 41 may be a job or an array"),
        ('machine.disk = "t"\nafter = ["jbo-41"]', "job.toml:2: after: 'jbo-41' is neither a job nor an array (as in job-41"),
        ('machine.disk = "t"\n[environment]\nA = 1', "job.toml:3: environment: 1 is not a text"),
        ('machine.disk = "t"\n[environment]\n"A B" = "1"', "job.toml:2: environment: 'A B' is not a variable"),
        ('machine.kind = "process"\nmachine.disk = "t"', "job.toml:2: disk: a process has no disk"),
        ('[machine]\nkind = "process"\nwarm = true', "job.toml:1: command: a warm program is a command"),
        ('[machine]\ndisk = "t"\nwarm = true', "job.toml:3: warm: only a process"),
        ('[machine]\ndisk = "t"\nplatforms = ["amiga"]', "job.toml:3: platforms: 'amiga' will not do"),
        ('[machine]\ndisk = "t"\non = "lab"', "job.toml:3: on: 'lab' is neither a worker nor a group"),
        ('machine.disk = "t"\nfill = ["a"]', "job.toml:2: only in an array is something filled in"),
        ('machine.disk = "t"\n[array]\ncount = 0', "job.toml:3: an array of 0 jobs"),
        ('machine.disk = "t"\n[array]\ntable = "gone.csv"', "job.toml:3: there is no file"),
        ('command = ["a", "{b}"]\nmachine.disk = "t"\narray.count = 2', "job.toml:1: nothing fills in {b} (one of index;"),
        ('command = ["a", "{"]\nmachine.disk = "t"\narray.count = 2', "job.toml:1: a single { near '{' (write {{ or }}"),
        ('machine.disk = "t"\narray.count = 2\n[environment]\nA = "{index}"\nB = "{c}"', "job.toml:5: nothing fills in {c}"),
        (NET + 'reach = { db = "db.store.set:5" }', "job.toml:4: reach: db.store.set is of a set (only jobs of the same set"),
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


def test_secrets_are_for_ones_own_pcs_unless_others_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "token.txt").write_text("s3cret")
    file = tmp_path / "job.toml"
    file.write_text('[machine]\ndisk = "tiny"\n[secrets]\nfiles.token = "token.txt"\n')
    assert (read_job(file).spec.secrets, read_job(file).spec.trust) == (("token",), ("mine",))
    assert read_job(file, {"trust": ("everyone",)}).spec.trust == ("everyone",)
    assert read_job(None, {"disk": "tiny"}).spec.trust == ()
    assert read_job(None, {"disk": "tiny", "trust": ("user:bob",)}).spec.trust == ("user:bob",)
    monkeypatch.chdir(tmp_path)
    assert read_job(None, {"disk": "tiny", "secret": ("key=token.txt",)}).secrets == (("key", Path("token.txt")),)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("files = { token = 7 }", r"job.toml:4: files: 7 is not the name of a file"),
        ('files = "token.txt"', r"job.toml:4: files: 'token.txt' is not a table"),
        ('files = { token = "nowhere.txt" }', r"job.toml:4: there is no file .*nowhere.txt' for token"),
        ('files = { token = "." }', r"job.toml:4: there is no file"),
        ('files = { "a/b" = "token.txt" }', r"job.toml:4: files: 'a/b' is not a name for a secret"),
        ('files = { token = "token.txt" }\ntrust = []', r"job.toml:5: trust: whose PCs may see the secrets"),
        ('files = { token = "token.txt" }\ntrust = ["bob"]', r"job.toml:5: trust: 'bob' is nobody to trust"),
        ('token = "token.txt"', r"job.toml:4: unknown key 'token' in \[secrets\]"),
    ],
)
def test_wrong_secrets_are_told_with_their_line(tmp_path: Path, text: str, told: str):
    (tmp_path / "token.txt").write_text("s3cret")
    with pytest.raises(InvalidInput, match=f"^{told}"):
        parse_job(f'[machine]\ndisk = "tiny"\n[secrets]\n{text}\n', "job.toml", folder=tmp_path)


@pytest.mark.parametrize("context", [".", "files", "files/../files"])
def test_secret_that_would_travel_in_clear_with_the_context_is_refused(tmp_path: Path, context: str):
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "token").write_text("s3cret")
    text = f'[machine]\ndisk = "tiny"\ncontext = "{context}"\n[secrets]\nfiles = {{ token = "files/token" }}\n'
    with pytest.raises(InvalidInput, match=r"^job.toml:5: .*files/token' is in the context, which is not sealed"):
        parse_job(text, "job.toml", folder=tmp_path)


def test_context_that_has_something_in_the_place_of_the_secrets_is_refused(tmp_path: Path):
    (tmp_path / "files" / "secrets").mkdir(parents=True)
    (tmp_path / "token").write_text("s3cret")
    text = '[machine]\ndisk = "tiny"\ncontext = "files"\n'
    assert parse_job(text, "job.toml", folder=tmp_path).secrets == ()
    with pytest.raises(InvalidInput, match=r"^job.toml:5: .*files has 'secrets', which is where the job finds its secrets"):
        parse_job(text + '[secrets]\nfiles = { token = "token" }\n', "job.toml", folder=tmp_path)


def test_an_app_says_nothing_of_secrets_or_of_whom_to_trust():
    for secrets in ({"files": {"token": "t"}}, {"trust": ["everyone"]}):
        with pytest.raises(InvalidInput, match="cannot be a default"):
            parse_defaults({"secrets": secrets}, "app.toml")


SWEEP = """
command = ["/context/run", "{alpha}", "{index}", "{{literal}}"]
fill = ["params.txt"]
[machine]
disk = "tiny"
context = "context"
[array]
table = "params.csv"
"""


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    (tmp_path / "context").mkdir()
    (tmp_path / "context" / "params.txt").write_text("alpha = {alpha}\nbeta = {beta}\n")
    (tmp_path / "params.csv").write_text("alpha,beta\n1,2\n3,4\n")
    (tmp_path / "sweep.toml").write_text(SWEEP)
    return tmp_path / "sweep.toml"


def test_an_array_has_its_table_beside_the_file_and_the_columns_fill_in(sweep: Path):
    assert read_job(sweep).array == ArrayPart(table=sweep.parent / "params.csv", names=("alpha", "beta"))
    assert read_job(None, {"disk": "t", "array": 1000}).array == ArrayPart(count=1000)


def test_array_and_table_as_options_are_named_in_mistakes(sweep: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(sweep.parent)
    assert read_job(None, {"disk": "t", "table": "params.csv", "command": ("{beta}",)}).array is not None
    with pytest.raises(InvalidInput, match=r"^--array: an array of 0 jobs"):
        read_job(None, {"disk": "t", "array": 0})
    with pytest.raises(InvalidInput, match=r"^--command: nothing fills in {gamma} \(one of alpha, beta, index"):
        read_job(None, {"disk": "t", "table": "params.csv", "command": ("{gamma}",)})
    with pytest.raises(InvalidInput, match=r"^--environment: nothing fills in {gamma}"):
        read_job(None, {"disk": "t", "array": 2, "environment": ("A={gamma}",)})
    with pytest.raises(InvalidInput, match=r"^--after: 7 may be a job or an array"):
        read_job(None, {"disk": "t", "after": ("7",)})


def test_a_name_that_nothing_fills_in_is_told_with_its_line_in_the_files_of_the_context(sweep: Path):
    file = sweep.parent / "context" / "params.txt"
    file.write_text("alpha = {alpha}\nbeta = {bate}\n")
    with pytest.raises(InvalidInput, match=r"context/params\.txt:2: nothing fills in {bate} \(one of alpha, beta, index"):
        read_job(sweep)
    for content, message in ((b"\xe9", "not a text in UTF-8"), (bytes(2 << 20), "too large"), (None, "there is no file")):
        file.unlink(missing_ok=True)
        if content is not None:
            file.write_bytes(content)
        with pytest.raises(InvalidInput, match=rf"sweep\.toml:3: .*{message}"):
            read_job(sweep)


@pytest.mark.parametrize("name", ["../secret", "/etc/hostname", "link", "", ".", "a\\u0000b", "n" * 300])
def test_only_files_of_the_context_are_filled_in(sweep: Path, name: str):
    (sweep.parent / "secret").write_text("x")
    (sweep.parent / "context" / "link").symlink_to(sweep.parent / "secret")
    sweep.write_text(SWEEP.replace("params.txt", name))
    with pytest.raises(InvalidInput, match=r"sweep\.toml:3: "):
        read_job(sweep)


def test_nothing_is_filled_in_for_a_warm_program(tmp_path: Path):
    text = 'command = ["serve", "{"]\narray.count = 2\nresults.paths = []\n[machine]\nkind = "process"\nwarm = true'
    assert parse_job(text, "job.toml").spec.machine.warm


# ---- apps


def test_an_app_says_what_its_user_does_not():
    wanted = parse_job('app = "blast"\n[machine]\nmemory = "1GiB"\n', "job.toml")
    defaults = parse_defaults({"command": ["/app/run"], "machine": {"kind": "process", "memory": "2GiB", "cpus": 2}}, "app.toml")
    assert defaults == {"command": ["/app/run"], "machine.kind": "process", "machine.memory": "2GiB", "machine.cpus": 2}
    spec = with_defaults(wanted, defaults, "app blast@1").spec
    assert (spec.command, spec.machine.kind, spec.machine.memory_bytes, spec.machine.cpus) == (
        ("/app/run",),
        MachineKind.PROCESS,
        GIB,
        2,
    )


@pytest.mark.parametrize(
    "tables",
    [{"app": "other"}, {"machine": {"context": "c"}}, {"array": {"count": 2}}, {"nosuch": 1}, {"after": ["job-1"]}, {"machine": 1}],
)
def test_what_cannot_be_a_default_is_refused_where_it_is_written_and_where_it_arrives(tables: dict[str, object]):
    with pytest.raises(InvalidInput, match=r"^app\.toml: "):
        parse_defaults(tables, "app.toml")
    wanted = parse_job('app = "blast"', "job.toml")
    flat = {f"{name}.{key}": value for name, inner in tables.items() if isinstance(inner, dict) for key, value in inner.items()}
    with pytest.raises(InvalidInput, match=r"^app blast@1: "):
        with_defaults(wanted, flat or tables, "app blast@1")


def test_what_an_app_leaves_open_is_asked_for_before_it_is_submitted():
    with pytest.raises(InvalidInput, match="a disk is needed"):
        with_defaults(parse_job('app = "blast"', "job.toml"), {"command": ["/app/run"]}, "app blast@1")
    with pytest.raises(InvalidInput, match=r"^app blast@1: nothing fills in {alpha}"):
        wanted = parse_job('app = "blast"\narray.count = 2', "job.toml")
        with_defaults(wanted, {"command": ["/app/run", "{alpha}"], "machine.kind": "process"}, "app blast@1")


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


@given(st.dictionaries(st.sampled_from([key.given for key in KEYS]), VALUES | st.just("\udc80"), max_size=4))
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
