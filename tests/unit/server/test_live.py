"""Hints: never lost while somebody waits, and not kept for ever."""

from __future__ import annotations

import asyncio

from deskgrid.server import live
from deskgrid.server.live import Live


async def test_a_change_between_look_and_wait_is_seen():
    hints = Live()
    seen = {"job:1": hints.mark("job:1")}
    hints.notify(["job:1"])
    assert await hints.wait(seen, 10)


async def test_who_waits_is_woken_by_its_topic_only():
    hints = Live()
    waiting = asyncio.create_task(hints.wait({"job:1": hints.mark("job:1")}, 10))
    await asyncio.sleep(0)
    hints.notify(["job:2"])
    await asyncio.sleep(0)
    assert not waiting.done()
    hints.notify(["job:1"])
    assert await waiting


async def test_topics_are_forgotten_without_a_change_being_missed():
    hints = Live()
    hints.notify(["job:0"])
    unchanged, changed = {"new": hints.mark("new")}, {"job:0": hints.mark("job:0")}
    hints.notify(["job:0"])
    assert not await hints.wait(unchanged, 0.01)
    hints.notify([f"job:{number}" for number in range(1, 2 * live._MOST_MARKS)])
    assert len(hints._marks) == live._MOST_MARKS
    assert await hints.wait(changed, 0.01)


async def test_everything_seems_changed_when_hints_may_have_been_lost():
    hints = Live()
    hints.notify(["job:1"])
    before = {"job:1": hints.mark("job:1")}
    never = {"job:2": hints.mark("job:2")}
    waiting = [asyncio.create_task(hints.wait({topic: hints.mark(topic)}, 10)) for topic in ("job:1", "job:2")]
    await asyncio.sleep(0)
    hints.notify_all()
    assert await asyncio.gather(*waiting) == [True, True]
    assert await hints.wait(before, 10)
    assert await hints.wait(never, 10)
    now = {"job:1": hints.mark("job:1")}
    assert not await hints.wait(now, 0.01)


async def _wait_all(hints: Live, number: int) -> list[asyncio.Task[bool]]:
    waiting = [asyncio.create_task(hints.wait({"work": hints.mark("work")}, 10)) for _ in range(number)]
    await asyncio.sleep(0)
    return waiting


async def test_one_new_job_wakes_a_few_and_no_more_once_it_is_taken():
    hints = Live(spread=["work"])
    waiting = await _wait_all(hints, 100)
    hints.notify(["work"])
    for _ in range(10):
        await asyncio.sleep(0)
    woken = [task for task in waiting if task.done()]
    assert 0 < len(woken) < 50
    assert woken == waiting[: len(woken)]
    hints.settle("work", hints.count)
    done, _ = await asyncio.wait(waiting, timeout=3 * live._WAKE_ON_S)
    assert len(done) == len(woken)
    for task in waiting:
        task.cancel()


async def test_all_are_woken_in_the_end_while_work_is_left():
    hints = Live(spread=["work"])
    waiting = await _wait_all(hints, 100)
    hints.notify(["work"])
    hints.settle("work", hints.count - 1)
    assert all(await asyncio.gather(*waiting))


async def test_later_work_is_told_although_earlier_was_settled():
    hints = Live(spread=["work"])
    hints.notify(["work"])
    hints.settle("work", hints.count)
    waiting = await _wait_all(hints, 40)
    hints.notify(["work"])
    assert all(await asyncio.gather(*waiting))
