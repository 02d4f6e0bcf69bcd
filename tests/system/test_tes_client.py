"""GA4GH TES by its public client, with a real server, a real worker and real sandboxes."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import requests
import tes

from deskgrid.client.transport import Credentials, load_credentials
from deskgrid.machines.container_image import write_archive
from deskgrid.testing.tiny_template import tiny_template
from tests.contract.test_driver_container import PROGRAMS, layer_of
from tests.system.harness import LIMIT_S, System, until
from tests.system.newcomer import ROOT
from tests.system.test_process_jobs import results

SMALL = tes.Resources(cpu_cores=1, ram_gb=0.1, disk_gb=0.05)


@pytest.fixture
def grid(system: System) -> System:
    system.add_worker(DESKGRID_WORKER_DRIVERS="process")
    return system


@pytest.fixture
def login(system: System) -> Credentials:
    return load_credentials(system.folder / "client" / "credentials.json")


@pytest.fixture
def client(login: Credentials, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tes.HTTPClient:
    authority = tmp_path / "grid.pem"
    authority.write_text(login.authority_pem)
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(authority))
    return tes.HTTPClient(f"https://{login.address}", token=login.token)


def task(*executors: tes.Executor, **more: Any) -> tes.Task:
    found = tes.Task(executors=list(executors), **{"resources": SMALL, **more})
    valid, reason = found.is_valid()
    assert valid, reason
    return found


def process(*command: str, **more: Any) -> tes.Executor:
    return tes.Executor(image="process", command=list(command), **more)


def finished(client: tes.HTTPClient, task_id: str, view: str = "FULL") -> tes.Task:
    client.wait(task_id, timeout=LIMIT_S)
    return client.get_task(task_id, view)


def test_task_runs_and_its_log_is_read(grid: System, client: tes.HTTPClient):
    (grid.folder / "events").write_text("3\n1\n2\n")
    grid.cli("data", "put", grid.folder / "events")
    wanted = task(
        process("sort", stdin="/scratch/in/events", stdout="/scratch/out/sorted"),
        process("sh", "/tmp/count.sh", "a b", env={"WHAT": "lines; $(x)"}, workdir="/scratch/out", stderr="/scratch/errors"),
        name="sort and count",
        description="two commands",
        tags={"workflow": "w1"},
        volumes=["/scratch/vol/"],
        inputs=[
            tes.Input(url="deskgrid:events", path="/scratch/in/events", name="events"),
            tes.Input(content='echo "$1 $WHAT $(wc -l <sorted)"; echo careful >&2; ls -d /scratch/vol', path="/tmp/count.sh"),
        ],
        outputs=[
            tes.Output(path="/scratch/out/sorted", url="deskgrid:"),
            tes.Output(path="/scratch/err*", url="deskgrid:err*"),
            tes.Output(path="/tmp", url="deskgrid:tmp", type="DIRECTORY"),
        ],
    )
    task_id = client.create_task(wanted)
    found = finished(client, task_id)
    assert (found.id, found.state, found.name, found.tags) == (task_id, "COMPLETE", "sort and count", {"workflow": "w1"})
    assert [one.content for one in found.inputs] == [None, wanted.inputs[1].content]
    [log] = found.logs
    assert log.metadata["worker"] == "pc" and log.start_time >= found.creation_time and log.end_time >= log.start_time
    first, second = log.logs
    assert (first.exit_code, first.stdout, first.stderr) == (0, "1\n2\n3\n", "")
    assert (second.exit_code, second.stdout, second.stderr) == (0, "a b lines; $(x) 3\n/scratch/vol\n", "careful\n")
    assert first.start_time <= first.end_time <= second.end_time
    assert [(one.url, one.path, one.size_bytes) for one in log.outputs] == [("deskgrid:out/sorted", "/scratch/out/sorted", 6)]
    came = results(grid, int(task_id))
    assert {str(file.relative_to(came)) for file in came.rglob("*") if file.is_file()} == {"out/sorted", "errors", "tmp/count.sh"}
    basic = client.get_task(task_id, "BASIC")
    assert basic.logs[0].logs[1].exit_code == 0 and basic.logs[0].logs[1].stdout is None and basic.inputs[1].content is None
    assert basic.executors == found.executors and basic.resources == SMALL
    grid.nothing_left()


def test_command_that_fails_ends_the_task_unless_it_may(grid: System, client: tes.HTTPClient, login: Credentials):
    stopped = client.create_task(task(process("sh", "-c", "echo why >&2; exit 3"), process("echo", "never")))
    lenient = create(
        login,
        executors=[
            {"image": "process", "command": ["false"], "ignore_error": True},
            {"image": "process", "command": ["echo", "on"]},
        ],
    )
    found = finished(client, stopped)
    assert found.state == "EXECUTOR_ERROR" and [(one.exit_code, one.stderr) for one in found.logs[0].logs] == [(3, "why\n")]
    assert "ended with 3" in found.logs[0].system_logs[0], found.logs[0].system_logs
    assert len(found.logs) == 1, "a command that failed is not tried again"
    found = finished(client, lenient)
    assert found.state == "COMPLETE" and [(one.exit_code, one.stdout) for one in found.logs[0].logs] == [(1, ""), (0, "on\n")]


def test_what_takes_too_long_is_not_the_commands_error(grid: System, client: tes.HTTPClient):
    resources = tes.Resources(**{**SMALL.as_dict(), "backend_parameters": {"WALL_TIME": "1s", "VmSize": "large"}})
    found = finished(client, client.create_task(task(process("sleep", "600"), resources=resources)))
    assert found.state == "SYSTEM_ERROR"
    assert found.resources.backend_parameters == {"wall_time": "1s"}
    assert "wall time" in found.logs[0].system_logs[0] and "vmsize" in found.logs[0].system_logs[1]
    grid.nothing_left()


def test_running_task_is_cancelled(grid: System, client: tes.HTTPClient):
    task_id = client.create_task(task(process("sh", "-c", "echo begun; sleep 600")))

    def running() -> Any:
        found = client.get_task(task_id, "FULL")
        return found.state == "RUNNING" and found.logs[0].logs and found.logs[0].logs[0].stdout == "begun\n"

    until(running, what="it runs, and what it has printed is seen")
    client.cancel_task(task_id)
    assert client.get_task(task_id, "MINIMAL").state == "CANCELED"
    client.cancel_task(task_id)  # what has ended stays as it is
    grid.nothing_left()


def create(login: Credentials, headers: dict[str, str] | None = None, **wanted: Any) -> str:
    return str(
        call(login, "POST", "tasks", json={"resources": {"ram_gb": 0.1, "disk_gb": 0.05}, **wanted}, headers=headers).json()["id"]
    )


def call(login: Credentials, method: str, path: str, *, headers: dict[str, str] | None = None, **more: Any) -> requests.Response:
    given = {"Authorization": f"Bearer {login.token}", **(headers or {})}
    return requests.request(method, f"https://{login.address}/ga4gh/tes/v1/{path}", headers=given, timeout=LIMIT_S, **more)


def test_tasks_are_listed_in_pages_and_by_what_is_asked_for(system: System, client: tes.HTTPClient, login: Credentials):
    made = [
        client.create_task(task(process("true"), name=f"{'odd' if number % 2 else 'even'}-{number}", tags={"n": str(number)}))
        for number in range(5)
    ]
    system.cli("job", "submit", "--kind", "process", "--command", "true")  # a job, and no task
    client.cancel_task(made[0])
    assert [one.id for one in client.list_tasks().tasks] == made[::-1]
    first = client.list_tasks(view="BASIC", page_size=2)
    second = client.list_tasks(view="FULL", page_size=2, page_token=first.next_page_token)
    third = client.list_tasks(page_size=2, page_token=second.next_page_token)
    assert [one.id for page in (first, second, third) for one in page.tasks] == made[::-1]
    assert third.next_page_token is None and first.tasks[0].name == "even-4"
    for query, expected in (
        ("name_prefix=odd", [made[3], made[1]]),
        ("state=CANCELED", [made[0]]),
        ("state=QUEUED&name_prefix=even", [made[4], made[2]]),
        ("tag_key=n&tag_value=2", [made[2]]),
        ("tag_key=n&tag_value=", made[::-1]),
        ("tag_key=n&tag_key=m&tag_value=2&tag_value=1", []),
    ):
        found = call(login, "GET", f"tasks?{query}").json()
        assert [one["id"] for one in found["tasks"]] == expected, query


def test_program_of_the_documentation_runs(grid: System, tmp_path: Path):
    section = (ROOT / "docs" / "how-to.md").read_text().partition("## From TES clients\n")[2].partition("\n## ")[0]
    for line in [line.strip() for line in section.splitlines() if line.startswith("    deskgrid")]:
        grid.cli(*line.split()[1:])
    (program,) = [block.partition("```")[0] for block in section.split("```python\n")[1:]]
    (grid.folder / "program.py").write_text(program)
    ran = subprocess.run(
        [sys.executable, "program.py"],
        cwd=grid.folder,
        env=grid.environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout == "COMPLETE\nhello grid\n"


def run_anywhere(grid: System, client: tes.HTTPClient, worker: str, image: str, *, ram_gb: float) -> None:
    """Run a task that reads and writes all over its machine."""
    (grid.folder / "events").write_text("3\n1\n2\n")
    grid.cli("data", "put", grid.folder / "events")
    wanted = tes.Task(
        executors=[
            tes.Executor(image=image, command=["cat", "/data/in/events"], stdout="/data/out/copy"),
            tes.Executor(
                image=image,
                command=["sh", "-c", 'echo "$GREETING from $PWD"; cat copy >&2'],
                workdir="/data/out",
                env={"GREETING": "hi you"},
            ),
        ],
        inputs=[tes.Input(url="deskgrid:events@1", path="/data/in/events")],
        outputs=[
            tes.Output(path="/data/out/copy", url="deskgrid:data/out/copy"),
            tes.Output(path="/data/in", url="deskgrid:", type="DIRECTORY"),
        ],
        resources=tes.Resources(ram_gb=ram_gb, disk_gb=0.1),
    )
    task_id = client.create_task(wanted)
    client.wait(task_id, timeout=240)
    found = client.get_task(task_id, "FULL")
    assert found.state == "COMPLETE", found
    [log] = found.logs
    assert [(one.exit_code, one.stdout, one.stderr) for one in log.logs] == [
        (0, "3\n1\n2\n", ""),
        (0, "hi you from /data/out\n", "3\n1\n2\n"),
    ]
    assert [(one.url, one.size_bytes) for one in log.outputs] == [("deskgrid:data/out/copy", 6)]
    assert (results(grid, int(task_id)) / "data" / "out" / "copy").read_text() == "3\n1\n2\n"
    grid.nothing_left(worker)


def test_task_runs_on_a_pc_without_a_sandbox_where_its_folders_have_other_names(
    system: System, client: tes.HTTPClient, tmp_path: Path
):
    (tmp_path / "bin").mkdir()
    for name in ("env", "prlimit", "nice", "ionice", "sh"):
        (tmp_path / "bin" / name).symlink_to(shutil.which(name) or name)
    system.add_worker(DESKGRID_WORKER_DRIVERS="process", DESKGRID_WORKER_UNSANDBOXED="true", PATH=str(tmp_path / "bin"))
    wanted = task(
        process("sh", "-c", 'cat "$0" >"$WHERE/copy"', "/scratch/in", env={"WHERE": "/tmp/out"}, workdir="/tmp/out"),
        inputs=[tes.Input(content="content", path="/scratch/in")],
        outputs=[tes.Output(path="/tmp/out/copy", url="deskgrid:tmp/out/copy")],
    )
    task_id = client.create_task(wanted)
    found = finished(client, task_id)
    assert found.state == "COMPLETE", found
    assert (results(system, int(task_id)) / "tmp" / "out" / "copy").read_text() == "content"
    system.nothing_left()


@pytest.mark.full
def test_task_runs_in_a_container(system: System, client: tes.HTTPClient):
    system.add_worker("box", DESKGRID_WORKER_DRIVERS="container")
    image = system.folder / "box.oci"
    write_archive(image, layer_of((*PROGRAMS, "cp", "ln", "tail", "wc", "date")), {"Env": ["PATH=/bin"]})
    system.cli("disk", "import", image, "--name", "box")
    run_anywhere(system, client, "box", "box", ram_gb=0.3)


@pytest.mark.full
def test_task_runs_in_a_virtual_machine(system: System, client: tes.HTTPClient):
    system.add_worker("vms", DESKGRID_WORKER_DRIVERS="qemu")
    system.publish_template(tiny_template().qcow2, "tiny")
    run_anywhere(system, client, "vms", "tiny@1", ram_gb=0.2)
