"""Warm programs: what is said to them, whose jobs they get, and what becomes of jobs when they end."""

from __future__ import annotations

import asyncio
import base64
import json
import random
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deskgrid.archive import pack_folder
from deskgrid.clock import SystemClock
from deskgrid.errors import MachineFailed, ProtocolError
from deskgrid.machines.driver import Booted, ExitCause, Exited, Output, Stream
from deskgrid.machines.process import SandboxDriver
from deskgrid.machines.processes import find_by_token
from deskgrid.model.data import Blob
from deskgrid.model.ids import AttemptId, Sha256, UserId
from deskgrid.model.jobs import AttemptState, JobSpec, Limits, Machine, Results
from deskgrid.model.machines import MachineKind, Network
from deskgrid.model.workers import MOST_VALUE_BYTES, AttemptReport
from deskgrid.units import MIB
from deskgrid.worker.agent import Agent, Term
from deskgrid.worker.conversation import MOST_LINE_BYTES, Answer, AnswerReader, Task, task_line, value_of
from deskgrid.worker.home import Home
from deskgrid.worker.journal import Journal
from tests.unit.worker.play import SETTINGS, PlayMachine, PlayServer, Rig, blob_of

OWNER = UserId(3)
SPEC = JobSpec(
    machine=Machine(kind=MachineKind.PROCESS, warm=True, memory_bytes=128 * MIB, scratch_bytes=64 * MIB),
    command=("serve", "{index}"),
    results=Results(paths=()),
)

ONE_CPU = msgspec.structs.replace(SETTINGS, cpus=1)


def _empty_folder() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "app").mkdir()
        pack_folder(Path(folder, "app"), Path(folder, "app.tar.zst"))
        return Path(folder, "app.tar.zst").read_bytes()


APP = _empty_folder()


# ---- lines

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=20),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["job", "exit_code", "value", "encoding", "x"]), inner)
    ),
    max_leaves=10,
)


@given(st.lists(st.tuples(st.integers(0, 2**40), st.integers(0, 255), st.text(max_size=30)), max_size=20), st.integers(1, 40))
def test_answers_are_the_same_however_the_stream_is_cut(answers: list[tuple[int, int, str]], size: int) -> None:
    stream = b"".join(json.dumps({"job": job, "exit_code": code, "value": text}).encode() + b"\n" for job, code, text in answers)
    reader, found = AnswerReader(), []
    for start in range(0, len(stream), size):
        found += reader.feed(stream[start : start + size])
    assert [(one.job, one.exit_code, one.value) for one in found] == answers
    assert not reader.fault


@given(st.lists(st.binary(max_size=60) | json_values.map(lambda value: json.dumps(value).encode() + b"\n"), max_size=8))
def test_whatever_a_program_writes_is_answers_or_a_fault(chunks: list[bytes]) -> None:
    reader = AnswerReader()
    for chunk in chunks:
        had = bool(reader.fault)
        found = reader.feed(chunk)
        assert all(isinstance(one, Answer) for one in found)
        assert not (had and found)
    assert reader.fault.isprintable()


@pytest.mark.parametrize(
    "line",
    [
        b"hello",
        b"[]",
        b'{"job": 1}',
        b'{"job": 1, "exit_code": 256}',
        b'{"job": 1, "exit_code": 0, "value": 7}',
        b'{"job": 1, "exit_code": 0, "encoding": "rot13"}',
        b'{"job": 1' + b"0" * 5000 + b', "exit_code": 0}',
        b'{"x": ' + b"[" * 100_000,
        b'{"job": 1, "exit_code": 0, "value": "\xff"}',
    ],
)
def test_line_that_is_no_answer_ends_the_conversation_after_those_before_it(line: bytes) -> None:
    reader = AnswerReader()
    good = b'{"job": 1, "exit_code": 0}\n'
    assert reader.feed(good + line + b"\n" + good) == [Answer(1, 0)]
    assert reader.fault.startswith("it wrote a line")
    assert reader.feed(good) == []


def test_empty_lines_are_passed_over_but_not_without_end() -> None:
    reader = AnswerReader()
    assert reader.feed(b'\n\r\n{"job": 1, "exit_code": 0}\n\n') == [Answer(1, 0)]
    assert not reader.fault
    reader.feed(b"\n" * 1000)
    assert "empty" in reader.fault


def test_line_without_end_is_not_gathered_for_ever() -> None:
    reader = AnswerReader()
    for _ in range(MOST_LINE_BYTES // 1000 + 1):
        reader.feed(b"x" * 1000)
    assert "longer" in reader.fault


@pytest.mark.parametrize(
    ("answer", "value"),
    [
        (Answer(1, 0), None),
        (Answer(1, 0, ""), b""),
        (Answer(1, 0, "ä"), "ä".encode()),
        (Answer(1, 0, "AAEC", "base64"), b"\0\1\2"),
        (Answer(1, 0, "x" * MOST_VALUE_BYTES), b"x" * MOST_VALUE_BYTES),
    ],
)
def test_value_is_a_text_or_bytes(answer: Answer, value: bytes | None) -> None:
    assert value_of(answer) == value


@pytest.mark.parametrize(("value", "encoding"), [("?", "base64"), ("x" * (MOST_VALUE_BYTES + 1), "text"), ("ä" * 40_000, "text")])
def test_value_that_is_too_long_or_no_base64_is_refused(value: str, encoding: Any) -> None:
    with pytest.raises(ProtocolError):
        value_of(Answer(1, 0, value, encoding))


def test_longest_value_fits_into_a_line_whatever_its_characters() -> None:
    for text in ("\0" * MOST_VALUE_BYTES, "ä" * (MOST_VALUE_BYTES // 2)):
        line = json.dumps({"job": 2**60, "exit_code": 0, "value": text}).encode() + b"\n"
        reader, found = AnswerReader(), []
        for start in range(0, len(line), 1000):
            found += reader.feed(line[start : start + 1000])
        assert [value_of(one) for one in found] == [text.encode()]


def test_job_is_told_on_one_line() -> None:
    line = task_line(Task(41, 7, {"alpha": "a\nb"}))
    assert line.count(b"\n") == 1
    assert json.loads(line) == {"job": 41, "index": 7, "parameters": {"alpha": "a\nb"}}


# ---- programs that a test plays


class Player:
    """The program in a machine: what it was told, and what it says."""

    def __init__(self, machine: PlayMachine) -> None:
        self.machine = machine
        self.told: list[dict[str, Any]] = []
        self._rest = b""
        machine.inner.setblocking(False)

    def listen(self) -> list[dict[str, Any]]:
        """Read what came; return all that was ever told."""
        try:
            self._rest += self.machine.inner.recv(1 << 20)
        except (BlockingIOError, OSError):
            return self.told
        *lines, self._rest = self._rest.split(b"\n")
        self.told += [json.loads(line) for line in lines]
        return self.told

    def answer(self, job: int, exit_code: int = 0, **more: object) -> None:
        self.say(json.dumps({"job": job, "exit_code": exit_code, **more}).encode() + b"\n")

    def say(self, data: bytes) -> None:
        self.machine.inner.sendall(data)


class Warm:
    """A rig for warm jobs."""

    def __init__(self, rig: Rig) -> None:
        self.rig = rig
        self.players: list[Player] = []

    def submit(self, count: int = 1, **assigned: Any) -> list[AttemptId]:
        fields = {"owner_id": OWNER, "spec": SPEC, "in_array": True, "class_id": 5} | assigned
        return [self.rig.server.submit(**fields, index=number) for number in range(count)]

    def player(self, number: int = -1) -> Player:
        self.players += [Player(machine) for machine in self.rig.pc.made[len(self.players) :]]
        return self.players[number]

    async def told(self, count: int, number: int = -1, *, step_s: float = 0.01) -> Player:
        """Return a program once it has been told so many jobs."""
        await self.rig.until(lambda: len(self.rig.pc.made) > max(number, 0))
        await self.rig.until(lambda: len(self.player(number).listen()) >= count, step_s=step_s)
        return self.player(number)

    async def lease(self, agent: Agent, count: int) -> list[AttemptId]:
        """Lease jobs ahead of what fits."""
        attempts = self.submit(count)
        given, self.rig.server.waiting = self.rig.server.waiting, []
        await agent._take(given)
        # Not before: a call of the worker in between would not list them, and they would count as given back.
        self.rig.server.leased |= {one.attempt_id: one for one in given}
        return attempts

    async def quick(self, agent: Agent) -> Player:
        """Return a program that has shown that it is quick."""
        for number in range(1, 5):
            [last] = await self.lease(agent, 1)
            player = await self.told(number, step_s=0.0)
            player.answer(number)
            await self.rig.until(lambda: not agent._warm.programs()[0].in_hand, step_s=0.0)
        await self.final(last)
        return player

    async def final(self, attempt_id: AttemptId) -> AttemptReport:
        await self.rig.until(lambda: attempt_id in self.rig.server.final)
        return self.rig.server.final[attempt_id]

    def nothing_left(self) -> bool:
        return self.rig.nothing_left()


@pytest.fixture
async def warm(rig: Rig) -> Warm:
    return Warm(rig)


async def test_program_stays_and_does_one_job_after_the_other(warm: Warm) -> None:
    async with warm.rig.working():
        [first] = warm.submit(parameters={"alpha": "0.1"})
        player = await warm.told(1)
        assert player.told == [{"job": 1, "index": 0, "parameters": {"alpha": "0.1"}}]
        made = player.machine.spec
        assert made.interactive and made.command == ("serve", "{index}")
        assert not {name for name, _ in made.environment} & {"DESKGRID_JOB", "DESKGRID_INDEX"}
        await warm.rig.until(lambda: warm.rig.server.state(first) is AttemptState.RUNNING)
        player.answer(1, value="0.25")
        report = await warm.final(first)
        assert (report.state, report.exit_code, report.value, report.result) == (AttemptState.SUCCEEDED, 0, b"0.25", None)
        [second] = warm.submit()
        await warm.told(2)
        player.answer(2, value=base64.b64encode(b"\0\1").decode(), encoding="base64")
        assert (await warm.final(second)).value == b"\0\1"
        assert len(warm.rig.pc.made) == 1
    assert warm.nothing_left()


async def test_job_that_may_take_longer_than_the_worker_is_there_is_refused(warm: Warm) -> None:
    task = asyncio.create_task(warm.rig.agent(term=Term(lifetime_s=100.0)).run())
    [long] = warm.submit(spec=msgspec.structs.replace(SPEC, limits=Limits(wall_time_s=200.0)))
    report = await warm.final(long)
    assert (report.state, report.reason) == (AttemptState.REFUSED, "it may take longer than this worker is there")
    await warm.rig.through(task, step_s=1.0)
    assert warm.rig.server.left and not warm.rig.pc.made


async def test_jobs_are_not_journalled_but_their_machine_is(warm: Warm) -> None:
    async with warm.rig.working():
        warm.submit()
        await warm.told(1)
        assert warm.rig.journalled() == []
        [handle] = Journal(warm.rig.home.journal).machines().values()
        assert handle.spec.interactive
    assert warm.nothing_left()


async def test_nothing_of_one_owner_comes_to_another(warm: Warm) -> None:
    async with warm.rig.working():
        [mine] = warm.submit()
        (await warm.told(1)).answer(1)
        await warm.final(mine)
        warm.submit(owner_id=UserId(4))
        await warm.rig.until(lambda: len(warm.rig.pc.made) == 2)
        player = await warm.told(1, 1)
        assert [one["job"] for one in player.told] == [2]
        assert len(warm.player(0).listen()) == 1


@pytest.mark.parametrize(
    "other",
    [
        {"spec": msgspec.structs.replace(SPEC, command=("other",))},
        {"program": blob_of(APP)},
        {"context": APP},
    ],
    ids=["command", "app", "context"],
)
async def test_program_serves_only_jobs_that_are_made_of_the_same(warm: Warm, other: dict[str, Any]) -> None:
    warm.rig.server.blobs[blob_of(APP).sha256] = APP
    async with warm.rig.working():
        [first] = warm.submit()
        (await warm.told(1)).answer(1)
        await warm.final(first)
        warm.rig.server.submit(**{"owner_id": OWNER, "spec": SPEC} | other)
        await warm.told(1, 1)
        assert len(warm.player(0).listen()) == 1


async def test_job_of_an_unknown_owner_shares_its_program_with_nobody(warm: Warm) -> None:
    async with warm.rig.working():
        [first] = warm.submit(owner_id=UserId(0))
        (await warm.told(1)).answer(1)
        await warm.final(first)
        await warm.rig.until(warm.nothing_left)
        warm.submit(owner_id=UserId(0))
        await warm.rig.until(lambda: len(warm.rig.pc.made) == 2)


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        (msgspec.structs.replace(SPEC, results=Results()), "results.paths"),
        (msgspec.structs.replace(SPEC, fill=("a",)), "filled in"),
        (msgspec.structs.replace(SPEC, machine=msgspec.structs.replace(SPEC.machine, network=Network.OVERLAY)), "network"),
    ],
)
async def test_what_a_warm_program_cannot_do_is_told(warm: Warm, spec: JobSpec, words: str) -> None:
    async with warm.rig.working():
        [attempt] = warm.submit(spec=spec)
        report = await warm.final(attempt)
        assert report.state is AttemptState.FAILED
        assert words in report.reason


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        ({"exit_code": 3}, "the warm program answered 3"),
        ({"exit_code": 0, "value": "x" * (MOST_VALUE_BYTES + 1)}, "longer than"),
        ({"exit_code": 0, "value": "?", "encoding": "base64"}, "base64"),
    ],
)
async def test_bad_answer_fails_its_job_and_the_program_goes_on(warm: Warm, said: dict[str, Any], reason: str) -> None:
    async with warm.rig.working():
        [first] = warm.submit()
        player = await warm.told(1)
        player.answer(1, **said)
        report = await warm.final(first)
        assert report.state is AttemptState.FAILED
        assert reason in report.reason
        [second] = warm.submit()
        await warm.told(2)
        player.answer(2)
        assert (await warm.final(second)).state is AttemptState.SUCCEEDED


async def test_answers_to_unknown_jobs_are_ignored_but_not_without_end(warm: Warm) -> None:
    async with warm.rig.working():
        [first] = warm.submit()
        player = await warm.told(1)
        for job in (99, 0, -1):
            player.answer(job)
        player.answer(1)
        assert (await warm.final(first)).state is AttemptState.SUCCEEDED
        [second] = warm.submit()
        await warm.told(2)
        player.say(b'{"job": 99, "exit_code": 0}\n' * 1001)
        assert "not given" in (await warm.final(second)).reason


async def test_line_that_is_no_answer_ends_the_program_and_fails_its_job(warm: Warm) -> None:
    async with warm.rig.working():
        [first] = warm.submit()
        (await warm.told(1)).say(b"hello\n")
        report = await warm.final(first)
        assert report.state is AttemptState.FAILED
        assert "no answer: hello" in report.reason
        await warm.rig.until(warm.nothing_left)


async def test_program_that_ends_fails_the_job_it_did_with_its_last_words(warm: Warm) -> None:
    async with warm.rig.working():
        [first] = warm.submit()
        player = await warm.told(1)
        await player.machine.tell(Booted(), Output(Stream.STDERR, b"Traceback\nKeyError: 'x'\n"), Exited(ExitCause.POWERED_OFF))
        report = await warm.final(first)
        assert report.state is AttemptState.FAILED
        assert report.reason == "the warm program ended: Traceback; KeyError: 'x'"
        [second] = warm.submit()
        await warm.rig.until(lambda: len(warm.rig.pc.made) == 2)
        (await warm.told(1, 1)).answer(2)
        assert (await warm.final(second)).state is AttemptState.SUCCEEDED


async def test_answer_of_a_program_that_ends_with_it_counts(warm: Warm) -> None:
    async with warm.rig.working():
        [first] = warm.submit()
        player = await warm.told(1)
        player.answer(1, value="done")
        await player.machine.tell(Exited(ExitCause.POWERED_OFF))
        assert (await warm.final(first)).value == b"done"


@pytest.mark.parametrize("cause", [ExitCause.KILLED, ExitCause.STOPPED, ExitCause.START_FAILED, ExitCause.IO_ERROR])
async def test_program_that_is_ended_from_outside_is_not_the_jobs_fault(warm: Warm, cause: ExitCause) -> None:
    async with warm.rig.working():
        [first] = warm.submit()
        player = await warm.told(1)
        await player.machine.tell(Exited(cause))
        report = await warm.final(first)
        assert report.state is AttemptState.REFUSED
        assert report.reason


async def test_program_past_a_limit_fails_its_job_with_the_limit(warm: Warm) -> None:
    async with warm.rig.working():
        [first] = warm.submit()
        player = await warm.told(1)
        await player.machine.tell(Exited(ExitCause.LIMIT, "it used more than 128 MiB of memory"))
        assert "128 MiB" in (await warm.final(first)).reason


async def test_program_that_never_answers_is_ended_at_its_wall_time_and_the_next_job_gets_another(warm: Warm) -> None:
    spec = msgspec.structs.replace(SPEC, limits=Limits(wall_time_s=30.0))
    async with warm.rig.working():
        [first] = warm.submit(spec=spec)
        await warm.told(1)
        assert warm.rig.server.state(first) is not AttemptState.FAILED
        await warm.rig.until(lambda: first in warm.rig.server.final, step_s=1.0)
        assert warm.rig.server.final[first].reason == "wall time of 30s exceeded"
        [second] = warm.submit(spec=spec)
        (await warm.told(1, 1)).answer(2)
        assert (await warm.final(second)).state is AttemptState.SUCCEEDED


async def test_wall_time_is_each_jobs_own(warm: Warm) -> None:
    spec = msgspec.structs.replace(SPEC, limits=Limits(wall_time_s=30.0))
    async with warm.rig.working():
        for number in range(1, 5):
            [attempt] = warm.submit(spec=spec)
            player = await warm.told(number)
            await warm.rig.clock.advance(20.0)
            player.answer(number)
            assert (await warm.final(attempt)).state is AttemptState.SUCCEEDED
        assert len(warm.rig.pc.made) == 1


async def test_idle_program_ends_after_a_minute(warm: Warm) -> None:
    async with warm.rig.working() as agent:
        [first] = warm.submit()
        (await warm.told(1)).answer(1)
        await warm.final(first)
        assert agent.status().free.cpus == SETTINGS.cpus  # type: ignore[union-attr]
        await warm.rig.clock.advance(50.0)
        assert warm.rig.pc.machines
        await warm.rig.until(warm.nothing_left, step_s=1.0)


async def test_idle_program_makes_place_for_other_work(warm: Warm) -> None:
    settings = msgspec.structs.replace(SETTINGS, cpus=1)
    async with warm.rig.working(settings):
        [first] = warm.submit()
        (await warm.told(1)).answer(1)
        await warm.final(first)
        await warm.rig.running()
        await warm.rig.until(lambda: len(warm.rig.pc.machines) == 1)
        await warm.rig.pc.machine.finish()


async def test_program_of_other_jobs_waits_until_there_is_room_and_then_goes_back(warm: Warm) -> None:
    settings = msgspec.structs.replace(SETTINGS, cpus=1)
    async with warm.rig.working(settings):
        warm.submit()
        await warm.told(1)
        warm.rig.server.ignores_free = True
        [other] = warm.submit(owner_id=UserId(4))
        report = await warm.final(other)
        assert (report.state, report.reason) == (AttemptState.REFUSED, "")
        assert len(warm.rig.pc.made) == 1


async def test_cancelled_job_ends_the_program_that_does_it(warm: Warm) -> None:
    async with warm.rig.working():
        [first] = warm.submit()
        await warm.told(1)
        warm.rig.server.cancel(first)
        await warm.rig.until(warm.nothing_left)
        assert first not in warm.rig.server.final


async def test_bad_app_fails_all_that_wait_for_it(warm: Warm) -> None:
    blob = Blob(sha256=Sha256("1" * 64), size_bytes=7)
    warm.rig.server.blobs[blob.sha256] = b"garbage"
    async with warm.rig.working():
        attempts = warm.submit(2, program=blob)
        for attempt in attempts:
            assert (await warm.final(attempt)).state is AttemptState.FAILED
        await warm.rig.until(warm.nothing_left)


async def test_pc_that_cannot_keep_programs_refuses_and_rests(warm: Warm) -> None:
    warm.rig.driver.errors["connect_program"] = MachineFailed("no program here")
    async with warm.rig.working() as agent:
        [first] = warm.submit()
        report = await warm.final(first)
        assert (report.state, report.reason) == (AttemptState.REFUSED, "no program here")
        assert agent.status().trouble == "no program here"
        await warm.rig.until(warm.nothing_left)


async def test_pause_freezes_a_program_and_its_time(warm: Warm) -> None:
    spec = msgspec.structs.replace(SPEC, limits=Limits(wall_time_s=30.0))
    async with warm.rig.working() as agent:
        [first] = warm.submit(spec=spec)
        player = await warm.told(1)
        await _through(warm.rig, agent.pause)
        assert player.machine.frozen
        await warm.rig.until(lambda: warm.rig.server.state(first) is AttemptState.SUSPENDED)
        await warm.rig.clock.advance(100.0)
        await _through(warm.rig, agent.resume)
        assert not player.machine.frozen
        player.answer(1)
        assert (await warm.final(first)).state is AttemptState.SUCCEEDED


async def test_pause_ends_a_program_that_does_nothing_and_gives_back_what_waits(warm: Warm) -> None:
    async with warm.rig.working() as agent:
        [first] = warm.submit()
        (await warm.told(1)).answer(1)
        await warm.final(first)
        await _through(warm.rig, agent.pause)
        await warm.rig.until(warm.nothing_left)


async def test_stopped_worker_gives_warm_jobs_back(warm: Warm) -> None:
    async with warm.rig.working():
        [first] = warm.submit()
        await warm.told(1)
    assert warm.rig.server.final[first].reason == "the worker was stopped"
    assert warm.nothing_left()


async def test_worker_stops_while_jobs_wait_for_its_program(warm: Warm) -> None:
    async with warm.rig.working(ONE_CPU) as agent:
        attempts = await warm.lease(agent, 10)
        await warm.told(1)
    reports = [warm.rig.server.final[one] for one in attempts]
    assert [one.reason for one in reports] == ["the worker was stopped"] + [""] * 9
    assert len(warm.rig.pc.made) == 1
    assert warm.nothing_left()


async def test_worker_that_keeps_its_machines_keeps_no_warm_ones(warm: Warm) -> None:
    async with warm.rig.working(keep=True):
        [first] = warm.submit()
        await warm.told(1)
    assert warm.nothing_left()
    assert first not in warm.rig.server.final


async def test_program_of_a_killed_worker_is_removed_and_its_jobs_go_back(warm: Warm) -> None:
    agent = warm.rig.agent()
    task = asyncio.create_task(agent.run())
    [first] = warm.submit()
    await warm.told(1)
    saved = {file.name: file.read_bytes() for file in warm.rig.home.journal.iterdir()}
    agent.stop(keep=True)
    await warm.rig.through(task)
    # As a kill would leave it: the machine and the note of it.
    for name, content in saved.items():
        (warm.rig.home.journal / name).write_bytes(content)
    (warm.rig.home.attempts / saved.popitem()[0].removesuffix(".machine")).mkdir()
    destroyed = len(warm.rig.pc.destroyed)
    async with warm.rig.working():
        await warm.rig.until(lambda: first in warm.rig.server.returned)
        assert len(warm.rig.pc.destroyed) > destroyed
        assert warm.nothing_left()


async def test_held_job_is_given_to_its_program_once_it_is_released(warm: Warm) -> None:
    async with warm.rig.working() as agent:
        [first] = warm.submit(hold=True)
        await warm.rig.until(lambda: warm.rig.server.state(first) is AttemptState.LEASED)
        assert not warm.rig.pc.made
        agent._warm.release(first)
        await warm.told(1)


async def _through(rig: Rig, work: Callable[[], Awaitable[None]]) -> None:
    await rig.through(asyncio.ensure_future(work()))


# ---- many quick jobs


async def test_slow_program_is_told_one_job_at_a_time(warm: Warm) -> None:
    async with warm.rig.working(ONE_CPU) as agent:
        await warm.lease(agent, 10)
        player = await warm.told(1)
        await warm.rig.clock.advance(1.0)
        player.answer(1)
        await warm.told(2)
        assert len(player.told) == 2
        assert agent._ahead() == {}


async def test_quick_program_is_told_some_jobs_at_once_and_more_are_asked_for(warm: Warm) -> None:
    async with warm.rig.working(ONE_CPU) as agent:
        player = await warm.quick(agent)
        assert agent._ahead()[5] > 10
        attempts = await warm.lease(agent, 100)
        await warm.told(4 + 30, step_s=0.0)
        assert len(player.told) < 104
        answered = 4
        while answered < 104:
            for told in player.listen()[answered:]:
                player.answer(told["job"], value=str(told["index"]))
                answered += 1
            await warm.rig.clock.advance(0.0001)
        await warm.rig.until(lambda: all(one in warm.rig.server.final for one in attempts))
        assert [warm.rig.server.final[one].value for one in attempts] == [str(index).encode() for index in range(100)]
        assert len(warm.rig.pc.made) == 1


async def test_jobs_behind_the_one_that_ended_a_program_go_back_without_a_reason(warm: Warm) -> None:
    async with warm.rig.working(ONE_CPU) as agent:
        player = await warm.quick(agent)
        attempts = await warm.lease(agent, 5)
        await warm.told(9, step_s=0.0)
        player.answer(player.told[4]["job"])
        await player.machine.tell(Exited(ExitCause.POWERED_OFF))
        reports = [await warm.final(one) for one in attempts]
        assert [one.state for one in reports] == [
            AttemptState.SUCCEEDED,
            AttemptState.FAILED,
            *[AttemptState.REFUSED] * 3,
        ]
        assert [bool(one.reason) for one in reports] == [False, True, False, False, False]


async def test_only_the_job_at_the_head_is_told_as_running(warm: Warm) -> None:
    async with warm.rig.working(ONE_CPU) as agent:
        await warm.quick(agent)
        attempts = await warm.lease(agent, 3)
        await warm.told(7, step_s=0.0)
        warm.rig.server.hint()
        await warm.rig.until(lambda: warm.rig.server.state(attempts[0]) is AttemptState.RUNNING)
        assert [warm.rig.server.state(one) for one in attempts[1:]] == [AttemptState.LEASED] * 2


# ---- a real program in its sandbox

ECHO = """
import json, sys
for line in sys.stdin:
    told = json.loads(line)
    print(json.dumps({"job": told["job"], "exit_code": 0, "value": str(told["index"])}), flush=True)
"""


class Place:
    """A worker with the real driver of processes and a server in memory."""

    def __init__(self, folder: Path, command: tuple[str, ...]) -> None:
        self.home = Home(folder / "home")
        self.server = PlayServer()
        self.spec = msgspec.structs.replace(SPEC, command=command)

    def agent(self) -> Agent:
        clock = SystemClock()
        return Agent(self.home, SETTINGS, self.server, [SandboxDriver(clock)], clock=clock, rng=random.Random(1))

    def submit(self, count: int) -> list[AttemptId]:
        return [
            self.server.submit(spec=self.spec, owner_id=OWNER, in_array=True, class_id=5, index=number) for number in range(count)
        ]

    async def until(self, condition: Callable[[], object], limit_s: float = 60.0) -> None:
        deadline = time.monotonic() + limit_s
        while not condition():
            assert time.monotonic() < deadline, "it did not come to that"
            await asyncio.sleep(0.005)


async def test_real_program_answers_and_nothing_of_it_is_left(tmp_path: Path) -> None:
    place = Place(tmp_path, ("/usr/bin/python3", "-c", ECHO))
    agent = place.agent()
    task = asyncio.create_task(agent.run())
    attempts = place.submit(20)
    await place.until(lambda: len(place.server.final) == 20 or task.done())
    handles = list(Journal(place.home.journal).machines().values())
    assert 1 <= len(handles) <= SETTINGS.cpus
    assert [place.server.final[one].value for one in attempts] == [str(index).encode() for index in range(20)]
    agent.stop()
    await task
    assert not [handle for handle in handles if find_by_token(handle.token)]
    assert not list(place.home.attempts.iterdir()) and not list(place.home.journal.iterdir())


async def test_real_program_that_crashes_blames_the_job_it_did_and_none_other(tmp_path: Path) -> None:
    crash = ECHO.replace("print", "told['index'] != 7 or sys.exit('seven')\n    print")
    place = Place(tmp_path, ("/usr/bin/python3", "-c", crash))
    agent = place.agent()
    task = asyncio.create_task(agent.run())
    attempts = place.submit(12)
    await place.until(lambda: len(place.server.final) == 12 or task.done())
    failed = {one: report.reason for one, report in place.server.final.items() if report.state is AttemptState.FAILED}
    assert list(failed) == [attempts[7]]
    assert "seven" in failed[attempts[7]]
    agent.stop()
    await task


async def be_killed(folder: Path) -> None:
    """Be a worker with a warm program until somebody kills it."""
    place = Place(folder, ("/usr/bin/python3", "-c", "import time; time.sleep(1000)"))
    task = asyncio.create_task(place.agent().run())
    [attempt] = place.submit(1)
    await place.until(lambda: place.server.state(attempt) is AttemptState.RUNNING)
    print("runs", flush=True)
    await task


async def test_program_of_a_killed_worker_ends_by_itself_and_the_next_one_removes_its_files(tmp_path: Path) -> None:
    code = "import asyncio, sys, pathlib, tests.unit.worker.test_warm as t; asyncio.run(t.be_killed(pathlib.Path(sys.argv[1])))"
    worker = await asyncio.create_subprocess_exec(
        sys.executable, "-c", code, str(tmp_path), stdout=asyncio.subprocess.PIPE, cwd=Path(__file__).parents[3]
    )
    assert worker.stdout is not None
    while (line := await asyncio.wait_for(worker.stdout.readline(), 60.0)) != b"runs\n":
        assert line, "the worker ended"
    worker.kill()
    await worker.wait()
    place = Place(tmp_path, ("/bin/true",))
    [handle] = Journal(place.home.journal).machines().values()
    await place.until(lambda: find_by_token(handle.token) is None)
    agent = place.agent()
    task = asyncio.create_task(agent.run())
    await place.until(lambda: place.server.syncs)
    assert place.server.syncs[0].attempts == ()
    assert not list(place.home.attempts.iterdir()) and not list(place.home.journal.iterdir())
    agent.stop()
    await task
