"""Jobs of arrays, processes, sets: what is filled in, what is held, what does not come back."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from deskgrid.archive import pack_folder
from deskgrid.machines.driver import ExitCause
from deskgrid.model.data import DataFile
from deskgrid.model.jobs import AttemptState, JobSpec, Machine, Results
from deskgrid.model.machines import MachineKind
from deskgrid.units import GIB, MIB
from deskgrid.worker.agent import Agent
from tests.unit.worker.play import Rig, blob_of

PROCESS = Machine(kind=MachineKind.PROCESS, memory_bytes=128 * MIB, scratch_bytes=GIB)


def packed(folder: Path, files: dict[str, bytes]) -> bytes:
    source = folder / "packed"
    for name, content in files.items():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes(content)
    pack_folder(source, folder / "packed.tar.zst")
    return (folder / "packed.tar.zst").read_bytes()


async def test_job_of_an_array_gets_its_index_and_parameters_wherever_they_are_named(rig: Rig, tmp_path: Path) -> None:
    seen: dict[str, bytes] = {}
    prepare = rig.driver.prepare

    async def look(spec, workdir):  # type: ignore[no-untyped-def]
        seen.update({file.name: file.read_bytes() for file in spec.context.iterdir()})
        return await prepare(spec, workdir)

    rig.driver.prepare = look  # type: ignore[method-assign]
    spec = JobSpec(
        machine=PROCESS,
        command=("run", "{index}", "--alpha={alpha}", "{{x}}"),
        environment=(("PLACE", "out/{index}"),),
        fill=("input.txt",),
    )
    context = packed(tmp_path, {"input.txt": b"{alpha}\r\n{{}}\n", "other.txt": b"{alpha}"})
    async with rig.working():
        await rig.running(spec=spec, context=context, in_array=True, index=7, parameters={"alpha": "0.1"})
        made = rig.pc.machine.spec
        assert made.kind is MachineKind.PROCESS and made.disk is None
        assert made.command == ("run", "7", "--alpha=0.1", "{x}")
        assert dict(made.environment) | {"DESKGRID_INDEX": "7", "DESKGRID_PARAM_alpha": "0.1", "PLACE": "out/7"} == dict(
            made.environment
        )
        assert seen == {"input.txt": b"0.1\r\n{}\n", "other.txt": b"{alpha}"}
        await rig.pc.machine.finish()


async def test_job_that_is_of_no_array_is_taken_as_it_is_written(rig: Rig) -> None:
    async with rig.working():
        await rig.running(spec=JobSpec(machine=PROCESS, command=("awk", "{print}")))
        assert rig.pc.machine.spec.command == ("awk", "{print}")
        await rig.pc.machine.finish()


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        (JobSpec(machine=PROCESS, command=("run", "{beta}")), "beta"),
        (JobSpec(machine=PROCESS, command=("run",), environment=(("A", "{"),)), "environment.A"),
        (JobSpec(machine=PROCESS, command=("run",), fill=("missing",)), "missing"),
        (JobSpec(machine=PROCESS, command=("run",), fill=("../../../../etc/hosts",)), "etc/hosts"),
        (JobSpec(machine=PROCESS, command=("run",), fill=("binary",)), "UTF-8"),
        (JobSpec(machine=PROCESS, command=("run",), fill=("large",)), "too large"),
        (JobSpec(machine=PROCESS, command=("run",), fill=("grows",)), "bytes"),
    ],
)
async def test_what_cannot_be_filled_in_is_the_jobs_fault(rig: Rig, tmp_path: Path, spec: JobSpec, words: str) -> None:
    context = packed(tmp_path, {"binary": b"\xff", "large": b"x" * (2 << 20), "grows": b"{alpha}" * 1000})
    async with rig.working():
        attempt = rig.server.submit(spec=spec, context=context, in_array=True, parameters={"alpha": "x" * 5000})
        report = await rig.ended(attempt)
        assert report.state is AttemptState.FAILED
        assert words in report.reason
        await rig.until(rig.nothing_left)


async def test_files_of_an_app_are_there_while_a_process_runs_and_go_with_it(rig: Rig, tmp_path: Path) -> None:
    program = packed(tmp_path, {"bin/tool": b"tool"})
    rig.server.blobs[blob_of(program).sha256] = program
    async with rig.working():
        attempt = await rig.running(spec=JobSpec(machine=PROCESS, command=("/app/bin/tool",)), program=blob_of(program))
        folder = rig.pc.machine.spec.program
        assert folder is not None and (folder / "bin" / "tool").read_bytes() == b"tool"
        await rig.pc.machine.finish()
        assert (await rig.ended(attempt)).state is AttemptState.SUCCEEDED
        await rig.until(rig.nothing_left)


async def test_data_comes_once_stays_while_its_machine_needs_it_and_may_go_then(rig: Rig) -> None:
    events = b"many events"
    rig.server.blobs[blob_of(events).sha256] = events
    spec, files = JobSpec(machine=PROCESS, command=("run",), results=Results(paths=())), (DataFile(name="e", blob=blob_of(events)),)
    async with rig.working() as worker:
        for _ in range(2):
            attempt = await rig.running(spec=spec, data=files)
            [(name, path)] = rig.pc.machine.spec.data
            assert (name, path.read_bytes(), path.stat().st_mode & 0o777) == ("e", events, 0o444)
            assert dict(rig.pc.machine.spec.environment)["DESKGRID_DATA"] == "/context/data"
            assert not worker._cache.discard(blob_of(events).sha256)
            await rig.pc.machine.finish()
            await rig.ended(attempt)
        assert rig.server.downloads == [blob_of(events).sha256]
        await rig.until(lambda: blob_of(events).sha256 in rig.server.syncs[-1].held)
        assert worker._cache.discard(blob_of(events).sha256)


async def test_restarted_worker_keeps_the_data_of_what_runs(rig: Rig) -> None:
    events = b"many events"
    rig.server.blobs[blob_of(events).sha256] = events
    spec = JobSpec(machine=PROCESS, command=("run",), results=Results(paths=()))
    async with rig.working(keep=True):
        attempt = await rig.running(spec=spec, data=(DataFile(name="e", blob=blob_of(events)),))
    async with rig.working() as worker:
        await rig.until(lambda: attempt in worker._runners)
        assert not worker._cache.discard(blob_of(events).sha256)
        await rig.pc.machine.finish()
        await rig.ended(attempt)


async def test_job_that_wants_no_files_brings_none(rig: Rig) -> None:
    async with rig.working():
        attempt = await rig.running(spec=JobSpec(machine=PROCESS, command=("true",), results=Results(paths=())))
        await rig.pc.machine.finish(stdout=b"said\n")
        report = await rig.ended(attempt)
        assert (report.state, report.exit_code, report.result) == (AttemptState.SUCCEEDED, 0, None)
        assert rig.server.uploads == {}
        assert rig.server.logs[attempt, "stdout"] == b"said\n"


@pytest.mark.parametrize(
    ("exit_code", "cause", "reason"),
    [
        (3, ExitCause.POWERED_OFF, "the command ended with 3"),
        (None, ExitCause.POWERED_OFF, "the guest powered off before the command ended"),
        (None, ExitCause.LIMIT, "it went past a limit of the job: the end of its stderr says which"),
    ],
)
async def test_failure_of_a_command_is_told_as_one(rig: Rig, exit_code: int | None, cause: ExitCause, reason: str) -> None:
    async with rig.working():
        attempt = await rig.running(spec=JobSpec(machine=PROCESS, command=("false",)))
        await rig.pc.machine.finish(exit_code, cause=cause)
        assert (await rig.ended(attempt)).reason == reason


async def test_job_of_a_set_is_made_ready_but_starts_only_when_the_server_says_so(rig: Rig) -> None:
    async with rig.working():
        attempt = rig.server.submit(hold=True)
        await rig.until(lambda: rig.pc.made and rig.server.state(attempt) is AttemptState.LEASED)
        seen = len(rig.server.syncs)
        rig.server.hint()
        await rig.until(lambda: len(rig.server.syncs) > seen)
        assert not rig.pc.machine.started
        rig.server.started.add(attempt)
        rig.server.hint()
        await rig.until(lambda: rig.server.state(attempt) is AttemptState.RUNNING)
        assert rig.pc.machine.started
        await rig.pc.machine.finish()


async def test_held_job_is_still_held_by_the_next_worker(rig: Rig) -> None:
    async with rig.working(keep=True):
        attempt = rig.server.submit(hold=True)
        await rig.until(lambda: [entry["phase"] for entry in rig.journalled()] == ["prepared"])
    async with rig.working():
        await rig.until(lambda: len(rig.pc.made) > 1)
        assert not rig.pc.machine.started
        rig.server.cancel(attempt)
        await rig.until(rig.nothing_left)


async def test_paused_worker_gives_held_jobs_back(rig: Rig) -> None:
    async with rig.working() as agent:
        attempt = rig.server.submit(hold=True)
        await rig.until(lambda: [entry["phase"] for entry in rig.journalled()] == ["prepared"])
        await _paused(rig, agent)
        assert (await rig.ended(attempt)).state is AttemptState.REFUSED


async def _paused(rig: Rig, agent: Agent) -> None:
    await rig.through(asyncio.ensure_future(agent.pause()))
