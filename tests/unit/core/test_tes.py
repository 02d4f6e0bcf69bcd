"""What a task of GA4GH TES is as a job, and a job as a task."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deskgrid.core.rights import RULES
from deskgrid.core.tes import KeptTask, Printed, TaskJob, job_of, matches, shown, state_of, with_contents
from deskgrid.errors import InvalidInput
from deskgrid.model import tes
from deskgrid.model.ids import AttemptId, JobId, UserId, WorkerId
from deskgrid.model.jobs import Attempt, AttemptState, Job, JobSpec, JobState, Machine
from deskgrid.model.machines import MachineKind
from deskgrid.model.tes import TesState, TesTask, TesView

MARK = "deskgrid-task-0"
PROCESS, CONTAINER = MachineKind.PROCESS, MachineKind.CONTAINER


def made(kind: MachineKind = PROCESS, **fields: Any) -> TaskJob:
    return job_of(task(**fields), kind, MARK)


def task(**fields: Any) -> TesTask:
    whole = {"executors": [{"image": "process", "command": ["true"]}], **fields}
    return msgspec.json.decode(msgspec.json.encode(whole), type=TesTask)


def executor(**fields: Any) -> dict[str, Any]:
    return {"executors": [{"image": "process", "command": ["true"], **fields}]}


def test_task_becomes_a_job():
    found = made(
        CONTAINER,
        executors=[{"image": "alpine", "command": ["wc", "/data/in"]}],
        name="count\tlines",
        inputs=[
            {"path": "/data/in", "url": "deskgrid:events@2"},
            {"path": "/data/more", "url": f"deskgrid:sha256:{'a' * 64}"},
            {"path": "/etc/x", "content": "é"},
        ],
        outputs=[
            {"path": "/data/out/", "url": "deskgrid:data/out", "type": "DIRECTORY"},
            {"path": "/scratch//log*", "url": "deskgrid:"},
        ],
        resources={
            "cpu_cores": 2,
            "ram_gb": 1.5,
            "disk_gb": 2,
            "preemptible": True,
            "zones": ["moon"],
            "backend_parameters": {"Group": "hep", "priority": "-3", "WALL_TIME": "2h", "VmSize": "x"},
        },
    )
    spec, machine = found.spec, found.spec.machine
    assert (machine.disk, machine.kind, machine.cpus, machine.memory_bytes, machine.scratch_bytes) == (
        "alpine",
        CONTAINER,
        2,
        1_500_000_000,
        2 * 10**9,
    )
    assert spec.data == (("input-0", "events@2"), ("input-1", "a" * 64))
    assert (spec.name, spec.group, spec.priority, spec.limits.wall_time_s, spec.limits.attempts) == (
        "countlines",
        "hep",
        -3,
        7200,
        1,
    )
    assert spec.results.paths == ("data/out", "log*")
    assert set(found.files) == {"context.sh", "inputs/2"} and found.files["inputs/2"] == "é".encode()
    assert found.kept.ignored == ("vmsize",)
    assert found.kept.task.resources is not None and found.kept.task.resources.backend_parameters == {
        "group": "hep",
        "priority": "-3",
        "wall_time": "2h",
    }


def test_what_a_client_leaves_out_or_sets_to_nothing_is_the_grids_default():
    found = made(name=None, inputs=None, tags=None, resources={"cpu_cores": 0, "ram_gb": 0, "disk_gb": None, "zones": None})
    assert found.spec.machine == Machine(kind=PROCESS)
    assert (found.spec.name, found.spec.results.paths, found.spec.data) == ("task", (), ())
    assert made(MachineKind.VM, executors=[{"image": "debian", "command": ["true"]}]).spec.results.paths


PATHS = {"inputs": {"content": "x"}, "outputs": {"url": "deskgrid:"}}


@pytest.mark.parametrize(
    ("fields", "where"),
    [
        ({"executors": None}, "executors"),
        ({"executors": []}, "executors"),
        ({"executors": [{"image": "process", "command": ["true"]}] * 65}, "executors"),
        ({"executors": [{"image": name, "command": ["true"]} for name in ("process", "alpine")]}, "executors[1].image"),
        (executor(image=""), "executors[0].image"),
        (executor(command=[]), "executors[0].command"),
        (executor(command=["", "x"]), "executors[0].command"),
        (executor(command=["-x"]), "executors[0].command"),
        (executor(command=["A=b", "x"]), "executors[0].command"),
        (executor(command=["x"] * 20_000), "executors[0].command"),
        (executor(env={"A B": "c"}), "executors[0].env"),
        (executor(env={"DESKGRID_SCRATCH": "/"}), "executors[0].env"),
        (executor(env={f"A{number}": "" for number in range(101)}), "executors[0].env"),
        (executor(env={"A": "x" * 40_000}), "executors[0].env"),
        (executor(stdin="in"), "executors[0].stdin"),
        (executor(stdout="/etc/passwd"), "executors[0].stdout"),
        (executor(stderr="/scratch/../etc/x"), "executors[0].stderr"),
        (executor(workdir="/scratch/a\nb"), "executors[0].workdir"),
        ({"inputs": [{"path": "/scratch/a"}]}, "inputs[0]"),
        ({"inputs": [{"path": "/scratch/a", "url": "s3://bucket/file"}]}, "inputs[0].url"),
        ({"inputs": [{"path": "/scratch/a", "url": "http://somewhere/file"}]}, "inputs[0].url"),
        ({"inputs": [{"path": "/scratch/a", "url": "deskgrid:"}]}, "data.input-0"),
        ({"inputs": [{"path": "/scratch/a", "url": "deskgrid:../x"}]}, "data.input-0"),
        ({"inputs": [{"path": "/scratch/a", "content": "x", "type": "DIRECTORY"}]}, "inputs[0].type"),
        ({"inputs": [{"path": "/scratch/a", "content": "x"}] * 2}, "inputs"),
        ({"inputs": [{"path": f"/scratch/{number}", "content": "x"} for number in range(101)]}, "inputs"),
        ({"inputs": [{"path": "/scratch/a", "content": "x" * (5 << 20)}]}, "inputs"),
        *(
            ({part: [{"path": path, **more}]}, f"{part}[0].path")
            for part, more in PATHS.items()
            for path in (
                "a",
                "",
                "/",
                "/scratch",
                "/tmp/",
                "/context/a",
                "/proc/1/mem",
                "/scratch/..",
                "/scratch/./a",
                "/scratch/a/",
                "/data/x",
                "/scratch/" + "x" * 1000,
            )
        ),
        ({"outputs": [{"path": "/scratch/a", "url": "s3://bucket/file"}]}, "outputs[0].url"),
        ({"outputs": [{"path": "/scratch/a", "url": "deskgrid:b"}]}, "outputs[0].url"),
        ({"outputs": [{"path": "/tmp/*.txt", "url": "deskgrid:"}]}, "outputs[0].path"),
        ({"outputs": [{"path": "/scratch/[a-z]", "url": "deskgrid:"}]}, "outputs[0].path"),
        ({"outputs": [{"path": path, "url": "deskgrid:"} for path in ("/tmp/x", "/scratch/tmp/x")]}, "outputs"),
        ({"volumes": ["/data"]}, "volumes[0]"),
        ({"volumes": ["/scratch"] * 101}, "volumes"),
        ({"name": "x" * 1001}, "name"),
        ({"description": "x" * 10_001}, "description"),
        ({"tags": {"x" * 201: ""}}, "tags"),
        ({"tags": {str(number): "" for number in range(101)}}, "tags"),
        ({"tags": {str(number): "x" * 9000 for number in range(100)}}, "large"),
        ({"resources": {"ram_gb": -1}}, "resources.ram_gb"),
        ({"resources": {"disk_gb": 1e300}}, "resources.disk_gb"),
        ({"resources": {"cpu_cores": 10**30}}, "machine.cpus"),
        ({"resources": {"cpu_cores": -1}}, "machine.cpus"),
        ({"resources": {"backend_parameters": {"priority": "high"}}}, "resources.backend_parameters.priority"),
        ({"resources": {"backend_parameters": {"priority": "9999"}}}, "priority"),
        ({"resources": {"backend_parameters": {"wall_time": "soon"}}}, "resources.backend_parameters.wall_time"),
        ({"resources": {"backend_parameters": {"wall_time": "9" * 90 + "d"}}}, "limits.wall_time"),
        ({"resources": {"backend_parameters": {"x": "1"}, "backend_parameters_strict": True}}, "resources.backend_parameters"),
    ],
)
def test_what_is_wrong_is_refused_with_its_place(fields: dict[str, Any], where: str):
    with pytest.raises(InvalidInput) as refused:
        made(**fields)
    assert where in refused.value.message


def test_containers_write_where_they_like_but_not_over_the_machines_own():
    for path in ("/data/x", "/home/me/x", "/etc/x"):
        assert made(CONTAINER, **executor(image="a", stdout=path), outputs=[{"path": path, "url": "deskgrid:"}])
    for path in ("/context/x", "/app/x", "/proc/x", "/dev/null"):
        with pytest.raises(InvalidInput):
            made(CONTAINER, **executor(image="a", stdout=path))


paths = st.text(max_size=12) | st.from_regex(r"/(scratch|tmp|data|proc)?(/[a-z*?. $'\\]{1,6}){0,3}/?", fullmatch=True)
urls = st.none() | st.text(max_size=8) | st.sampled_from(("deskgrid:", "deskgrid:events", "s3://x"))
executors = st.builds(
    tes.TesExecutor,
    image=st.sampled_from(("process", "alpine")) | st.text(max_size=5),
    command=st.lists(st.text(max_size=8), max_size=3).map(tuple),
    env=st.none() | st.dictionaries(st.text(max_size=5) | st.just("A"), st.text(max_size=5), max_size=2),
    **dict.fromkeys(("workdir", "stdin", "stdout", "stderr"), st.none() | paths),
)
tasks = st.builds(
    TesTask,
    name=st.none() | st.text(max_size=300),
    executors=st.none() | st.lists(executors, max_size=2).map(tuple),
    inputs=st.none()
    | st.lists(st.builds(tes.TesInput, path=paths, url=urls, content=st.none() | st.text(max_size=8)), max_size=3).map(tuple),
    outputs=st.none()
    | st.lists(st.builds(tes.TesOutput, path=paths, url=st.just("deskgrid:") | st.text(max_size=5), type=...), max_size=3).map(
        tuple
    ),
    volumes=st.none() | st.lists(paths, max_size=2).map(tuple),
    tags=st.none() | st.dictionaries(st.text(max_size=5), st.text(max_size=5), max_size=2),
    resources=st.none()
    | st.builds(
        tes.TesResources, cpu_cores=st.none() | st.integers(), ram_gb=st.none() | st.floats(), disk_gb=st.none() | st.floats(0, 100)
    ),
)


@settings(max_examples=500, deadline=None)
@given(tasks, st.sampled_from(MachineKind))
def test_any_task_is_a_job_or_refused(anything: TesTask, kind: MachineKind):
    try:
        found = job_of(anything, kind, MARK)
    except InvalidInput:
        return
    assert msgspec.json.decode(msgspec.json.encode(found.kept), type=KeptTask) == found.kept
    assert found.spec.limits.attempts == 1


# ---- a job as a task


def job(state: JobState, exit_code: int | None = None) -> Job:
    return Job(
        id=JobId(7),
        owner_id=UserId(1),
        owner="ann",
        spec=JobSpec(machine=Machine()),
        state=state,
        created_at=0.5,
        exit_code=exit_code,
    )


def attempt(state: AttemptState, number: int = 1, started_at: float | None = 1.0, exit_code: int | None = None) -> Attempt:
    return Attempt(
        id=AttemptId(number),
        job_id=JobId(7),
        number=number,
        worker_id=WorkerId(1),
        worker="pc",
        state=state,
        leased_at=1.0,
        started_at=started_at,
        exit_code=exit_code,
        reason=f"reason {number}",
    )


@pytest.mark.parametrize(
    ("found", "attempts", "expected"),
    [
        (job(JobState.BLOCKED), [], TesState.QUEUED),
        (job(JobState.WAITING), [], TesState.QUEUED),
        (job(JobState.WAITING), [AttemptState.LOST], TesState.QUEUED),
        (job(JobState.ACTIVE), [AttemptState.LEASED], TesState.INITIALIZING),
        (job(JobState.ACTIVE), [AttemptState.LOST, AttemptState.RUNNING], TesState.RUNNING),
        (job(JobState.ACTIVE), [AttemptState.RUNNING, AttemptState.LOST], TesState.RUNNING),
        (job(JobState.ACTIVE), [AttemptState.SUSPENDED, AttemptState.LEASED], TesState.PAUSED),
        (job(JobState.ACTIVE), [AttemptState.SUSPENDED], TesState.PAUSED),
        (job(JobState.COMPLETED, 0), [AttemptState.SUCCEEDED], TesState.COMPLETE),
        (job(JobState.FAILED, 3), [AttemptState.FAILED], TesState.EXECUTOR_ERROR),
        (job(JobState.FAILED), [AttemptState.FAILED], TesState.SYSTEM_ERROR),
        (job(JobState.FAILED), [AttemptState.LOST], TesState.SYSTEM_ERROR),
        (job(JobState.CANCELLED), [AttemptState.CANCELLED], TesState.CANCELED),
    ],
)
def test_state_is_that_of_job_and_attempt(found: Job, attempts: list[AttemptState], expected: TesState):
    assert state_of(found, [attempt(state, number) for number, state in enumerate(attempts, 1)]) is expected


def test_every_state_of_a_job_has_one_of_a_task():
    assert all(state_of(job(state), []) in TesState for state in JobState)


def test_each_view_tells_what_it_should():
    kept = made(inputs=[{"path": "/scratch/a", "content": "secret"}], tags={"a": "b"}).kept
    told = Printed(
        stdout=f"\n{MARK} begin 0 @5\nout\n{MARK} end 0 0@5-6\n".encode(),
        stderr=f"\n{MARK} begin 0 @5\nbad\n{MARK} end 0 0@5-6\n".encode(),
    )
    attempts = [attempt(AttemptState.REFUSED, 1, None), attempt(AttemptState.SUCCEEDED, 2)]
    printed = {2: told}
    assert shown(kept, job(JobState.COMPLETED), attempts, TesView.MINIMAL, printed) == TesTask(id="7", state=TesState.COMPLETE)
    basic = shown(kept, job(JobState.COMPLETED), attempts, TesView.BASIC, printed)
    assert basic.logs is not None and basic.inputs is not None
    assert (basic.inputs[0].content, basic.tags, basic.creation_time) == (None, {"a": "b"}, "1970-01-01T00:00:00.500+00:00")
    [log] = basic.logs
    assert log.system_logs is None
    assert log.logs == (
        tes.TesExecutorLog(start_time="1970-01-01T00:00:05.000+00:00", end_time="1970-01-01T00:00:06.000+00:00", exit_code=0),
    )
    full = shown(kept, job(JobState.COMPLETED), attempts, TesView.FULL, printed)
    assert full.logs is not None and full.inputs is not None
    assert full.logs[0].system_logs == ("reason 2",)
    whole = with_contents(full, {0: "secret"})
    assert whole.inputs is not None and whole.inputs[0].content == "secret"
    assert (full.logs[0].logs[0].stdout, full.logs[0].logs[0].stderr) == ("out", "bad")


def test_exit_code_is_known_without_the_scripts_lines():
    found = shown(made().kept, job(JobState.FAILED, 4), [attempt(AttemptState.FAILED, exit_code=4)], TesView.BASIC, {})
    assert found.logs is not None and found.logs[0].logs == (tes.TesExecutorLog(exit_code=4),)


@pytest.mark.parametrize(
    ("wanted", "own", "expected"),
    [
        ({"foo": "bar"}, {"foo": "bar"}, True),
        ({"foo": "bar"}, {"foo": "bat"}, False),
        ({"foo": ""}, {"foo": ""}, True),
        ({"foo": "bar", "baz": "bat"}, {"foo": "bar", "baz": "bat"}, True),
        ({"foo": "bar"}, {"foo": "bar", "baz": "bat"}, True),
        ({"foo": "bar", "baz": "bat"}, {"foo": "bar"}, False),
        ({"foo": ""}, {"foo": "bar"}, True),
        ({"foo": ""}, {}, False),
    ],
)
def test_tags_match_as_the_specification_says(wanted: dict[str, str], own: dict[str, str], expected: bool):
    assert matches(made(tags=own).kept, name_prefix="", tags=list(wanted.items())) == expected


def test_calls_of_tes_have_the_rights_of_ours():
    pairs = {"info": "grid", "create": "submit_job", "list": "list_jobs", "get": "get_job", "cancel": "cancel_job"}
    assert all(RULES[f"tes_{theirs}"] == RULES[ours] for theirs, ours in pairs.items())
    # What a task tells of its output needs no right that its job does not.
    assert RULES["read_log"] == RULES["get_job"] == RULES["list_jobs"]
