"""Pilots on a host that is reached by a real ssh."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator

import psutil
import pytest

from deskgrid.testing.ssh_host import SshHost, running_sshd
from tests.system.factories import Factory, job_file
from tests.system.harness import System, until


@pytest.fixture
def host() -> Iterator[SshHost]:
    with running_sshd() as found:
        yield found


def factory_of(system: System, host: SshHost, **part: object) -> Factory:
    return Factory(system, name="desk", kind="ssh", host=host.name, options=host.options, **part)


def left(host: SshHost) -> list[str]:
    """Return what pilots left: processes that name the folder for temporary files, and what is in it."""
    processes = [" ".join(process.info["cmdline"] or ()) for process in psutil.process_iter(["cmdline"])]
    return [*(line for line in processes if str(host.temporary) in line), *map(str, host.temporary.iterdir())]


def nothing_left(system: System, host: SshHost) -> None:
    until(lambda: not left(host), what=f"nothing is left: {left(host)}\n{system.logs()}")


def test_pilot_runs_jobs_on_a_host_that_is_reached_by_ssh_and_leaves_nothing(system: System, host: SshHost) -> None:
    factory = factory_of(system, host, jobs_per_pilot=10)
    factory.start()
    out = system.folder / "out"
    system.cli("run", job_file(system, "echo done >answer", count=2), "-o", out)
    assert [(out / str(index) / "answer").read_text() for index in range(2)] == ["done\n"] * 2
    assert left(host), "it is at work there"
    factory.until_none_is_out()
    assert factory.said("pilot_sent") == 1 and factory.said("pilot_called_back") == 0, factory.program.said()
    nothing_left(system, host)


@pytest.mark.full
def test_host_without_deskgrid_runs_it_from_one_file(system: System, host: SshHost) -> None:
    python = "/usr/bin/python3"
    version = subprocess.run(
        [python, "-c", "import sys; print('%d.%d' % sys.version_info[:2])"], capture_output=True, text=True, check=True
    )
    file = system.folder / "deskgrid.pyz"
    system.cli("pilot", "program", "-o", file, "--python", version.stdout.strip())
    factory = factory_of(system, host, deskgrid=f"{python} -I {file}")
    factory.start()
    system.cli("run", job_file(system, "echo done >answer"), "-o", system.folder / "out")
    factory.until_none_is_out()
    nothing_left(system, host)


def test_pilot_that_is_called_back_by_ssh_gives_its_job_back_and_leaves_nothing(system: System, host: SshHost) -> None:
    factory = factory_of(system, host)
    factory.start()
    system.cli("job", "submit", job_file(system, "echo begun; exec sleep 1000"))
    system.wait_to_print(1, "begun")
    factory.program.stop()
    system.cli("pilot", "factory", factory.file, "--stop")
    assert factory.out() == []
    system.wait_for(1, "waiting")
    until(lambda: system.json("pilot", "list") == [], what="it has left")
    nothing_left(system, host)


def test_pilot_that_is_called_back_before_it_has_joined_joins_never(system: System, host: SshHost) -> None:
    go = system.folder / "go"
    factory = factory_of(system, host, setup=f"until test -e {go}; do sleep 0.1; done")
    factory.start()
    job = system.json("job", "submit", job_file(system, "true"))
    factory.until_said("pilot_sent")
    assert left(host)
    system.cli("array", "cancel", str(job["id"]))
    factory.until_said("pilot_called_back")
    factory.until_none_is_out()
    go.touch()
    nothing_left(system, host)
    assert system.json("worker", "list") == []
