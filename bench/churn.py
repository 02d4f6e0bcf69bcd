"""Replicas under a week of workers that come and go, in simulation: the rules of core/placement.py as they are, with the server's bookkeeping.

1,000 PCs of three kinds, by traces made here: of offices (on from about 8 to 18 on weekdays), of homes (some hours in the evening, longer at the
weekend), and some that are always on, most of which are switched off for an hour now and then. One in a hundred leaves for good during the week. Each calls
every 20 s while it is on (here: every 5 minutes), and needs ten minutes for a transfer.

    there     part of the time in which at least one copy is on a PC that is on, and in which all wanted ones are, over all data
    moved     transfers a day for each piece of data, after the first
    at most   the most holders that any data had at any time, against the number wanted: never above 1

Yardstick: the same data put once on as many PCs, chosen by chance, and left there. With --plot: docs/bench/churn.svg, copies on PCs that are on, by the hour.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from random import Random

import msgspec

sys.path.insert(0, str(Path(__file__).parent))
from report import Figure, arguments, publish

from deskgrid.core.placement import ORDER_S, Hold, Host, Wanted, decide
from deskgrid.model.ids import DataId, Sha256, WorkerId
from deskgrid.model.placement import Attributes

_STEP_S = 300.0
_TRANSFER_S = 600.0
_GONE_S = 900.0
_DAY_S = 86400.0
_REPLICAS = (1, 3, 5)


def traces(workers: int, days: int, rng: Random) -> list[list[tuple[float, float]]]:
    """Return for each PC when it is on, in seconds from Monday, 0 h."""
    return [_trace(rng.choices(("office", "home", "server"), (60, 25, 15))[0], days, rng) for _ in range(workers)]


def _trace(kind: str, days: int, rng: Random) -> list[tuple[float, float]]:
    spans = []
    begin, end = rng.gauss(8, 0.7), rng.gauss(18, 1)
    leaves_at = rng.uniform(0, days) if rng.random() < 0.01 else days
    for day in range(days):
        weekend = day % 7 >= 5
        if kind == "office" and not weekend and rng.random() < 0.9:
            spans.append((day * 24 + begin + rng.gauss(0, 0.3), day * 24 + end + rng.gauss(0, 0.8)))
        elif kind == "home" and rng.random() < 0.8:
            start = day * 24 + rng.gauss(12 if weekend else 18, 2)
            spans.append((start, start + rng.expovariate(1 / (6 if weekend else 3))))
        elif kind == "server":
            off = day * 24 + rng.uniform(0, 23) if rng.random() < 0.3 else day * 24 + 24.0
            spans += [(day * 24.0, off), (min(off + 1, day * 24 + 24.0), day * 24 + 24.0)]
    return [(max(a, 0) * 3600, min(b, leaves_at * 24) * 3600) for a, b in spans if b > a and a < leaves_at * 24]


class Model:
    """The server's bookkeeping of `data` pieces with `replicas` each, over PCs with these traces."""

    def __init__(self, spans: list[list[tuple[float, float]]], data: int, replicas: int) -> None:
        self.spans = spans
        self.wanted = [_wanted(number, replicas) for number in range(data)]
        self.holds: list[dict[int, float]] = [{} for _ in range(data)]
        self.has: list[set[Sha256]] = [set() for _ in spans]
        self.ready: list[dict[Sha256, float]] = [{} for _ in spans]
        """Transfers under way: when they are done."""
        self.seen = [-1e9] * len(spans)
        self.transfers = self.most = 0

    def step(self, now: float, on: list[int], rng: Random) -> None:
        """Let those that are on call, in any order."""
        rng.shuffle(on)
        for worker in on:
            done = [content for content, at in self.ready[worker].items() if at <= now]
            for content in done:
                del self.ready[worker][content]
                self.has[worker].add(content)
            self.seen[worker] = now
            self._call(worker, now)
        self.most = max(self.most, *(len(holders) for holders in self.holds))

    def _counts(self, number: int, worker: int, now: float) -> list[Hold]:
        content = self.wanted[number].content
        return [
            Hold(since, WorkerId(other))
            for other, since in self.holds[number].items()
            if other != worker and now - self.seen[other] < _GONE_S and (content in self.has[other] or now - since < ORDER_S)
        ]

    def _call(self, worker: int, now: float) -> None:
        mine = {DataId(number): holders[worker] for number, holders in enumerate(self.holds) if worker in holders}
        others: dict[DataId, Sequence[Hold]] = {
            DataId(number): self._counts(number, worker, now) for number in range(len(self.holds))
        }
        if not mine and all(len(found) >= self.wanted[number].attributes.replicas for number, found in enumerate(others.values())):
            return
        host = Host(worker_id=WorkerId(worker), lends_bytes=1 << 40, shares=True, holds=mine, has=frozenset(self.has[worker]))
        held = {one.data_id for one in decide(host, self.wanted, others, now=now).hold}
        for number, holders in enumerate(self.holds):
            if number in held and worker not in holders:
                counting = {one.worker_id for one in others[DataId(number)]}
                self.holds[number] = {other: since for other, since in holders.items() if other in counting}
                self.holds[number][worker] = now
                content = self.wanted[number].content
                if content not in self.has[worker]:
                    self.ready[worker][content] = now + _TRANSFER_S
                    self.transfers += 1
            elif number not in held:
                holders.pop(worker, None)

    def copies(self, number: int, on: set[int]) -> int:
        """Return how many PCs that are on have a piece of data, held or not."""
        content = self.wanted[number].content
        return sum(content in self.has[worker] for worker in on)


def _wanted(number: int, replicas: int) -> Wanted:
    content = Sha256(f"{number:064x}")
    attributes = Attributes(replicas=replicas)
    return Wanted(
        data_id=DataId(number), placement_id=1, content=content, size_bytes=1, owner_id=1, owner="ann", attributes=attributes
    )


class Seen(msgspec.Struct):
    """What came of a week."""

    some: float
    enough: float
    moved: float
    at_most: float
    by_hour: list[float]


def week(workers: int, days: int, data: int, replicas: int, *, placed: bool, seed: int) -> Seen:
    """Run a week with placement, or with copies that are put somewhere once."""
    rng = Random(seed)
    spans = traces(workers, days, rng)
    model = Model(spans, data, replicas)
    still = [[rng.randrange(workers) for _ in range(replicas)] for _ in range(data)]
    some = enough = steps = 0
    by_hour: list[float] = []
    now = _DAY_S / 24 * 9  # Monday, 9 h: by then there are PCs to begin with
    begun = now
    first = 0
    while now < days * _DAY_S:
        on = [number for number, own in enumerate(spans) if any(a <= now < b for a, b in own)]
        there = set(on)
        if placed:
            model.step(now, on, rng)
            counts = [model.copies(number, there) for number in range(data)]
        else:
            counts = [len(there.intersection(places)) for places in still]
        if now - begun >= 2 * 3600:
            steps += data
            some += sum(count > 0 for count in counts)
            enough += sum(count >= replicas for count in counts)
        else:
            first = model.transfers
        if int(now) % 3600 == 0:
            by_hour.append(sum(counts) / data)
        now += _STEP_S
    moved = (model.transfers - first) / data / ((days * _DAY_S - begun) / _DAY_S)
    return Seen(some / steps, enough / steps, moved, model.most / replicas, by_hour)


def main() -> None:
    options = arguments(__doc__)
    workers, days, data = (60, 3, 5) if options.quick else (1000, 7, 20)
    figures, lines = [], {}
    for replicas in _REPLICAS:
        ours = week(workers, days, data, replicas, placed=True, seed=1)
        theirs = week(workers, days, data, replicas, placed=False, seed=1)
        lines[f"{replicas} wanted, placed"], lines[f"{replicas} wanted, put once"] = ours.by_hour, theirs.by_hour
        figures += [
            Figure(f"{replicas} replicas: time without any copy", 1 - ours.some, "of the time", 1 - theirs.some, None, None),
            Figure(
                f"{replicas} replicas: time with fewer than wanted", 1 - ours.enough, "of the time", 1 - theirs.enough, None, None
            ),
            Figure(f"{replicas} replicas: moved a day", ours.moved, "transfers", None, None, None),
            Figure(f"{replicas} replicas: most held, of those wanted", ours.at_most, "times", None, None, 1.0),
        ]
        print(
            f"{replicas}: {ours.some:.4f} {ours.enough:.4f} {ours.moved:.2f} {ours.at_most:.2f}; once: {theirs.some:.4f} {theirs.enough:.4f}",
            flush=True,
        )
    publish("churn", figures, options)
    if options.plot:
        (Path(__file__).parent.parent / "docs" / "bench" / "churn.svg").write_text(_chart(lines), encoding="utf-8")


_COLOURS = {"1": "#2a6f97", "3": "#c1666b", "5": "#48a9a6"}


def _chart(lines: dict[str, list[float]]) -> str:
    """Return copies on PCs that are on, by the hour; placed as lines, put once as dashes."""
    width, height, left, top = 860, 300, 50, 40
    most = max(max(values) for values in lines.values())
    hours = max(len(values) for values in lines.values())
    parts = []
    for name, values in lines.items():
        points = " ".join(
            f"{left + (width - left - 20) * at / hours:.1f},{top + (height - top - 30) * (1 - value / most):.1f}"
            for at, value in enumerate(values)
        )
        dash = ' stroke-dasharray="4 4"' if "once" in name else ""
        parts.append(f'<polyline fill="none" stroke="{_COLOURS[name[0]]}" stroke-width="1.6"{dash} points="{points}"/>')
    for day in range(hours // 24 + 1):
        x = left + (width - left - 20) * (day * 24 - 9) / hours
        if x >= left:
            parts.append(f'<line x1="{x:.0f}" y1="{top}" x2="{x:.0f}" y2="{height - 30}" stroke="#dddddd"/>')
    for value in range(0, int(most) + 1, max(1, int(most) // 6)):
        y = top + (height - top - 30) * (1 - value / most)
        parts.append(f'<text x="{left - 8}" y="{y + 4:.0f}" text-anchor="end">{value}</text>')
    legend = "copies on PCs that are on, by the hour: 1, 3, 5 wanted (blue, red, green); placed: lines, put once: dashes"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" font-family="sans-serif" font-size="13">'
        f'<rect width="100%" height="100%" fill="white"/><text x="10" y="20">{legend}</text>{"".join(parts)}</svg>\n'
    )


if __name__ == "__main__":
    main()
