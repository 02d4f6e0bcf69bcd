"""Jobs that are native programs in a sandbox, with a real server, a real worker and real sandboxes."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import msgspec
import psutil
import pytest

from deskgrid import archive
from deskgrid.client.grid import Grid, describe_file
from deskgrid.model import wire
from deskgrid.model.data import Blob
from deskgrid.model.jobs import Array, ArrayState, Job, JobSpec, JobState, Limits, Machine, Results
from deskgrid.model.machines import MachineKind, Network
from deskgrid.units import MIB
from tests.system.harness import System, until, wait

PROCESS = Machine(kind=MachineKind.PROCESS, memory_bytes=128 * MIB, scratch_bytes=64 * MIB)


@pytest.fixture
def processes(system: System) -> System:
    system.add_worker(DESKGRID_WORKER_DRIVERS="process")
    return system


def with_grid(system: System, work: Any) -> Any:
    async def do() -> Any:
        async with system.grid() as grid:
            return await work(grid)

    coroutine: Coroutine[Any, Any, Any] = do()
    return wait(coroutine)


def submit(system: System, spec: JobSpec, context: Path | None = None) -> Job:
    return with_grid(system, lambda grid: grid.submit(spec, context=context))  # type: ignore[no-any-return]


def spec(*command: str, **more: Any) -> JobSpec:
    return JobSpec(machine=PROCESS, command=command, limits=Limits(attempts=1), **more)


def folder(system: System, name: str, **files: str) -> Path:
    made = system.folder / name
    made.mkdir()
    for file, text in files.items():
        (made / file.replace("_", ".")).write_text(text)
    return made


async def send_folder(grid: Grid, source: Path) -> Blob:
    packed = source.with_suffix(".tar.zst")
    archive.pack_folder(source, packed)
    blob = describe_file(packed)
    await grid.transport.upload(packed, blob)
    return blob


def results(system: System, job: int) -> Path:
    destination = system.folder / f"out-{job}"
    with_grid(system, lambda grid: grid.results(job, destination))
    return destination


def ended(system: System, array_id: int) -> Array:
    async def look(grid: Grid) -> Array:
        return await grid.transport.call(wire.GET_ARRAY, path={"array": array_id})

    found: Array = until(lambda: _if_over(with_grid(system, look)), what=f"array {array_id} ends")
    return found


def _if_over(array: Array) -> Array | None:
    return array if array.state in (ArrayState.ENDED, ArrayState.CANCELLED) else None


def test_context_script_runs_as_a_process_and_its_files_come_back(processes: System):
    context = folder(
        processes, "context", context_sh="echo hello; cp /context/input.txt result.txt; echo $DESKGRID_JOB >&2\n", input_txt="42\n"
    )
    job = submit(processes, spec(), context)
    processes.wait_for(job.id, "completed")
    found = results(processes, job.id)
    assert (found / "result.txt").read_text() == "42\n"
    assert processes.cli("job", "logs", str(job.id)).stdout == "hello\n"
    processes.nothing_left()


def test_data_of_the_grid_is_there_as_files_that_cannot_be_written_to(processes: System):
    (processes.folder / "events").write_text("one\ntwo\n")
    processes.cli("data", "put", processes.folder / "events")
    job_file = processes.folder / "count.toml"
    job_file.write_text(
        'command = ["/bin/sh", "-c", "cd $DESKGRID_DATA; wc -l < events.txt > /scratch/lines; ls > /scratch/names; echo x > events.txt; rm -f events.txt"]\n'
        'data = { "events.txt" = "events@1", again = "events" }\n'
        '[machine]\nkind = "process"\n'
    )
    processes.cli("run", job_file, "-o", processes.folder / "out", expect=1)
    out = processes.folder / "out"
    assert ((out / "lines").read_text().strip(), (out / "names").read_text()) == ("2", "again\nevents.txt\n")
    stderr = processes.cli("job", "logs", "1", "--stderr").stdout
    assert stderr.count("Read-only file system") == 2, stderr
    [cached] = (processes.folder / "pc" / "cache" / "shared").iterdir()
    assert cached.read_text() == "one\ntwo\n"
    refused = processes.cli("job", "submit", job_file, "--data", "events.txt=nothing", expect=2)
    assert "data.events.txt" in refused.stderr
    processes.nothing_left()


def test_command_that_fails_says_so(processes: System):
    job = submit(processes, spec("/bin/sh", "-c", "echo why >&2; exit 3"))
    detail = processes.wait_for(job.id, "failed")
    assert detail["job"]["exit_code"] == 3
    processes.nothing_left()


def test_array_fills_in_command_environment_and_files(processes: System):
    rows = [["red", "1"], ["green", "2"], ["blue", "3"]]
    context = folder(
        processes, "context", run_sh='echo "$1 $SHADE $(cat /context/params.txt)" > out.txt\n', params_txt="{number}/{index}\n"
    )
    table = processes.folder / "table"
    table.write_text("".join(json.dumps(row) + "\n" for row in rows))

    async def send(grid: Grid) -> Array:
        blob = describe_file(table)
        await grid.transport.upload(table, blob)
        wanted = msgspec.structs.replace(
            spec("/bin/sh", "/context/run.sh", "job {index}"), environment=(("SHADE", "{color}"),), fill=("params.txt",)
        )
        request = wire.SubmitArray(
            spec=wanted, count=3, context=await send_folder(grid, context), table=blob, names=("color", "number")
        )
        return await grid.transport.call(wire.SUBMIT_ARRAY, request)

    array = with_grid(processes, send)
    assert ended(processes, array.id).jobs[JobState.COMPLETED] == 3
    listed = with_grid(processes, lambda grid: grid.transport.call(wire.LIST_JOBS, query={"array": array.id})).jobs
    texts = {job.index: (results(processes, job.id) / "out.txt").read_text() for job in listed}
    assert texts == {index: f"job {index} {color} {number}/{index}\n" for index, (color, number) in enumerate(rows)}
    processes.nothing_left()


def test_placeholder_that_nobody_fills_in_fails_the_job_with_its_name(processes: System):
    async def send(grid: Grid) -> Array:
        return await grid.transport.call(wire.SUBMIT_ARRAY, wire.SubmitArray(spec=spec("echo", "{nobody}"), count=1))

    array = with_grid(processes, send)
    assert ended(processes, array.id).jobs[JobState.FAILED] == 1
    [job] = with_grid(processes, lambda grid: grid.transport.call(wire.LIST_JOBS, query={"array": array.id})).jobs
    assert "{nobody}" in job.message


def test_app_brings_its_program_for_the_workers_platform(processes: System):
    program = folder(processes, "program", tool_sh="echo tool of $1 > out.txt\n")

    async def publish(grid: Grid) -> Job:
        blob = await send_folder(grid, program)
        await grid.transport.call(wire.REGISTER_APP, wire.RegisterApp(name="tool", files={"any": blob}))
        return await grid.submit(msgspec.structs.replace(spec("/bin/sh", "/app/tool.sh", "ann"), app="tool"))

    job = with_grid(processes, publish)
    processes.wait_for(job.id, "completed")
    assert (results(processes, job.id) / "out.txt").read_text() == "tool of ann\n"
    processes.nothing_left()


def test_job_that_wants_no_files_sends_none(processes: System):
    job = submit(processes, spec("true", results=Results(paths=())))
    detail = processes.wait_for(job.id, "completed")
    assert detail["job"]["result"] is None
    processes.nothing_left()


def test_warm_program_ends_by_itself_when_its_worker_was_killed_and_nobody_comes_after(processes: System) -> None:
    machine = msgspec.structs.replace(PROCESS, warm=True)
    job = submit(
        processes,
        JobSpec(machine=machine, command=("/bin/sleep", "600"), results=Results(paths=()), limits=Limits(attempts=1)),
    )
    until(lambda: processes.states(job.id)[1] == ["running"], what="the program has its job")
    assert processes.machines()
    processes.workers["pc"].kill()
    until(lambda: not processes.machines(), what="the program has ended", limit_s=10)
    assert list((processes.folder / "pc" / "journal").glob("*.machine"))
    processes.workers["pc"].start()
    processes.wait_for(job.id, "active", ["lost", "running"])
    processes.cli("job", "cancel", str(job.id))
    processes.nothing_left()


def test_ordinary_job_survives_its_killed_worker_and_is_finished_by_the_next(processes: System) -> None:
    # A job without children: those that came and went would be counted, too.
    job = submit(processes, spec("/bin/sh", "-c", "mkfifo /tmp/go; read line </tmp/go; echo done"))
    until(lambda: list((processes.folder / "pc" / "attempts").glob("*/machine/tmp/go")), what="it runs")
    until(lambda: processes.states(job.id)[1] == ["running"], what="it is known to run")
    processes.workers["pc"].kill()
    processes.workers["pc"].process.wait()  # type: ignore[union-attr]
    before = {process.pid for process in processes.machines()}
    processes.workers["pc"].start()
    until(lambda: processes.workers["pc"].said().count("machine_found_again") == 1, what="it was found again")
    assert before and before == {process.pid for process in processes.machines()}
    (go,) = (processes.folder / "pc" / "attempts").glob("*/machine/tmp/go")
    go.write_text("on\n")
    processes.wait_for(job.id, "completed", ["succeeded"])
    processes.nothing_left()


def test_owner_who_allows_it_gets_jobs_on_a_pc_without_bubblewrap(system: System, tmp_path: Path) -> None:
    for name in ("env", "prlimit", "nice", "ionice", "sh"):
        (tmp_path / name).symlink_to(shutil.which(name) or name)
    system.add_worker(DESKGRID_WORKER_DRIVERS="process", DESKGRID_WORKER_UNSANDBOXED="true", PATH=str(tmp_path))
    job = submit(system, spec("/bin/sh", "-c", "echo made >out"))
    networked = msgspec.structs.replace(PROCESS, network=Network.OVERLAY)
    never = submit(system, JobSpec(machine=networked, command=("/bin/true",), limits=Limits(attempts=1)))
    system.wait_for(job.id, "completed", ["succeeded"])
    assert "WITHOUT A SANDBOX" in system.cli("worker", "status", "--home", system.folder / "pc").stdout
    assert system.states(never.id) == ("waiting", [])
    system.nothing_left()


def cmdline(process: psutil.Process) -> tuple[str, ...]:
    with contextlib.suppress(psutil.Error):
        return tuple(process.cmdline())
    return ()


def test_quick_jobs_leased_ahead_never_run_beside_more_than_is_lent_and_none_is_lost_by_a_kill(system: System) -> None:
    worker = system.add_worker(DESKGRID_WORKER_DRIVERS="process", DESKGRID_WORKER_CPUS="1")
    wanted = JobSpec(machine=PROCESS, command=("/bin/sleep", "0.05"), results=Results(paths=()))
    made = with_grid(system, lambda grid: grid.transport.call(wire.SUBMIT_ARRAY, wire.SubmitArray(spec=wanted, count=60)))
    most = 0

    def completed() -> int:
        nonlocal most
        # Each machine has a line of its own, and a child that is just being started still has its parent's.
        lines = {cmdline(process) for process in system.machines()}
        most = max(most, sum("process_machine" in " ".join(line) for line in lines))
        return with_grid(system, lambda grid: grid.array(made.id)).jobs.get(JobState.COMPLETED, 0)  # type: ignore[no-any-return]

    until(lambda: completed() >= 20, what="a third is done")
    worker.kill()
    worker.start()
    until(lambda: completed() == 60, what="all are done")
    assert most <= 1
    system.nothing_left()


def test_set_starts_together_on_two_workers(processes: System):
    processes.add_worker("other", DESKGRID_WORKER_DRIVERS="process")
    machine = msgspec.structs.replace(PROCESS, cpus=2)
    member = msgspec.structs.replace(spec("true"), machine=machine)
    members = (wire.SetMember(name="a", spec=member), wire.SetMember(name="b", spec=member))

    async def send(grid: Grid) -> wire.JobSet:
        return await grid.transport.call(wire.SUBMIT_SET, wire.SubmitSet(name="pair", members=members, together=True))

    found = with_grid(processes, send)
    for one in found.members:
        processes.wait_for(one.job.id, "completed")
    details = [processes.job(one.job.id) for one in found.members]
    assert len({detail["attempts"][-1]["worker"] for detail in details}) == 2
    first, second = (detail["attempts"][-1] for detail in details)
    assert first["started_at"] < second["ended_at"] and second["started_at"] < first["ended_at"]


SWEEP = """
name = "sweep"
command = ["/bin/sh", "-c", "echo $0 > out.txt", "{color} {index}"]
[machine]
kind = "process"
scratch = "64MiB"
[array]
table = "colors.csv"
"""


def test_sweep_of_a_job_file_is_run_and_fetched_by_one_command(processes: System):
    (processes.folder / "sweep.toml").write_text(SWEEP)
    (processes.folder / "colors.csv").write_text('color\nred\n"dark, blue"\n')
    done = processes.cli("run", "sweep.toml", "-o", "out", "--json")
    assert json.loads(done.stdout)["array"]["jobs"]["completed"] == 2
    texts = [(processes.folder / "out" / str(index) / "out.txt").read_text() for index in range(2)]
    assert texts == ["red 0\n", "dark, blue 1\n"]
    [array] = processes.json("array", "list")
    assert processes.cli("job", "list", "--array", f"array-{array['id']}", "--state", "completed").stdout.count("color=") == 2
    assert (
        f"array-{array['id']}, index 0, color=red"
        in processes.cli("job", "show", str(processes.json("job", "list", "--array", str(array["id"]))[-1]["id"])).stdout
    )


def test_app_is_published_and_its_defaults_hold_where_a_job_says_nothing(processes: System):
    folder(processes, "tool", tool_sh="echo tool $1 > out.txt\n")
    (processes.folder / "defaults.toml").write_text(
        'command = ["/bin/sh", "/app/tool.sh", "default"]\n[machine]\nkind = "process"\nscratch = "64MiB"\n'
    )
    assert processes.cli("app", "publish", "tool", "--name", "tool", "--defaults", "defaults.toml").stdout == "tool@1\n"
    (processes.folder / "plain.toml").write_text('app = "tool"\n')
    (processes.folder / "own.toml").write_text('app = "tool@1"\ncommand = ["/bin/sh", "/app/tool.sh", "own"]\n')
    for name, text in (("plain", "default"), ("own", "own")):
        processes.cli("run", f"{name}.toml", "-o", name)
        assert (processes.folder / name / "out.txt").read_text() == f"tool {text}\n"
    assert "tool" in processes.cli("app", "list").stdout


SET = """
[set]
name = "pipeline"
[job.first]
command = ["/bin/sh", "-c", "echo first > out.txt"]
[job.first.machine]
kind = "process"
scratch = "64MiB"
[job.second]
command = ["/bin/sh", "-c", "echo second > out.txt"]
after = ["first"]
[job.second.machine]
kind = "process"
scratch = "64MiB"
[job.many]
command = ["/bin/sh", "-c", "echo $0 > out.txt", "{index}"]
after_end = ["second"]
[job.many.machine]
kind = "process"
scratch = "64MiB"
[job.many.array]
count = 3
"""


def test_set_of_one_file_runs_in_its_order_and_all_results_come(processes: System):
    (processes.folder / "set.toml").write_text(SET)
    processes.cli("run", "set.toml", "-o", "out")
    found = {
        str(file.relative_to(processes.folder / "out")): file.read_text() for file in (processes.folder / "out").rglob("out.txt")
    }
    assert found == {
        "first/out.txt": "first\n",
        "second/out.txt": "second\n",
        **{f"many/{index}/out.txt": f"{index}\n" for index in range(3)},
    }
    [listed] = processes.json("set", "list")
    assert processes.cli("set", "show", str(listed["id"])).stdout.count("completed") == 3
    processes.nothing_left()


def places_of(system: System, secret: bytes) -> list[str]:
    """Return the files of server, worker and user that have a secret in them, and processes that have it in their arguments or variables."""
    found = [str(file.relative_to(system.folder)) for file in system.folder.rglob("*") if _has(file, secret)]
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            words = [*process.cmdline(), *process.environ().values()]
            found += [f"process {process.pid}"] if any(secret.decode() in word for word in words) else []
    return found


def _has(file: Path, secret: bytes) -> bool:
    with contextlib.suppress(OSError):  # gone, or a pipe
        return file.is_file() and secret in file.read_bytes()
    return False


def test_secret_is_in_its_job_and_nowhere_else_not_even_after_a_kill(processes: System) -> None:
    secret = b"s3cr3t-" + os.urandom(8).hex().encode()
    (processes.folder / "token.txt").write_bytes(secret)
    script = 'sha256sum <"$DESKGRID_SECRETS/token" >sum; mkfifo /tmp/go; read line </tmp/go'
    (processes.folder / "job.toml").write_text(
        f'name = "secret"\ncommand = ["/bin/sh", "-c", {json.dumps(script)}]\nmachine = {{ kind = "process", memory = "128MiB" }}\n'
    )
    submitted = processes.cli("job", "submit", "job.toml", "--secret", "token=token.txt", "--trust", "everyone", "--json")
    job_id = json.loads(submitted.stdout)["id"]
    until(lambda: list((processes.folder / "pc" / "attempts").glob("*/machine/tmp/go")), what="it runs")
    processes.workers["pc"].kill()
    processes.workers["pc"].process.wait()  # type: ignore[union-attr]
    inside = next((processes.folder / "pc" / "attempts").glob("*/machine/context/secrets/token"))
    assert sorted(places_of(processes, secret)) == sorted(["token.txt", str(inside.relative_to(processes.folder))])
    seen = processes.folder.parent / "seen"
    seen.hardlink_to(inside)
    processes.workers["pc"].start()
    until(lambda: processes.workers["pc"].said().count("machine_found_again") == 1, what="it was found again")
    (inside.parents[2] / "tmp" / "go").write_text("on\n")
    processes.wait_for(job_id, "completed", ["succeeded"])
    processes.cli("job", "results", str(job_id), "--output", "out")
    assert (processes.folder / "out" / "sum").read_text().split()[0] == hashlib.sha256(secret).hexdigest()
    processes.nothing_left()
    assert places_of(processes, secret) == ["token.txt"]
    assert seen.read_bytes() == bytes(len(secret)), "it was written over, not only removed"
