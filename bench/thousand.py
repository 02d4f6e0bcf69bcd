"""A disk to 1,000 workers at once in simulation: the rules of core/transfer.py as they are, networks and BitTorrent as a model.

Time goes in steps. The server's link carries 20 MB/s, shared by those who fetch from it; each worker takes and gives so many pieces a second, and
takes from its neighbours a piece that it lacks, at random, as long as they have upload left: BitTorrent as of a worker that does not look for
rare pieces. Workers call as the rules say; what they have is known to the server from their last call only.

    time      until all have it, against the bound max(F/us, F/dmin, N*F/(us + sum ui))
    copies    that the server sent

Yardstick of the copies: 1, which any way needs.
"""

from __future__ import annotations

import sys
from pathlib import Path
from random import Random

sys.path.insert(0, str(Path(__file__).parent))
from report import Figure, arguments, publish

from deskgrid.core.torrents import piece_bytes, piece_count
from deskgrid.core.transfer import STUCK_S, Member, all_pieces, hand_out, interval_s, neighbours, pieces_of
from deskgrid.units import MIB

_SERVER_BYTES_PER_S = 20e6
_STEP_S = 0.25
_LONGEST_S = 7200.0
_CASES = (
    (1000, 10e6, 1, 0.1, False),
    (1000, 1e6, 1, 0.1, False),
    (1000, 10e6, 50, 0.1, False),
    (1000, 10e6, 50, 0.1, True),
    (200, 1e6, 200, 0.1, False),
    (200, 1e6, 200, 0.1, True),
    (200, 1e6, 200, 0.0, True),
)
"""Workers, what each gives in a second, how many sites, which part of the workers can be reached from other sites, and whether the others are through
the overlay. The last three are PCs at home."""


class Worker:
    """One worker of the model."""

    def __init__(self, number: int, site: int, starts_at: float) -> None:
        self.number, self.site = number, site
        self.have = self.fetching = self.said = 0
        self.queue: list[int] = []
        self.near: list[int] = []
        self.call_at, self.gained_at = starts_at, starts_at
        self.done_at: float | None = None
        self.reachable = self.joined = False


def spread(
    workers: int,
    size_bytes: int,
    *,
    up_bytes_per_s: float,
    down_bytes_per_s: float,
    sites: int,
    reachable: float,
    joined: bool,
    rng: Random,
) -> tuple[float, float]:
    """Return the seconds until all have it, and the copies that the server sent.

    At each site workers are behind one router and can reach each other; of all workers this part can be reached from elsewhere. `joined`: the others
    are reached through the overlay, whose hole punching always succeeds here.
    """
    count, piece = piece_count(size_bytes), piece_bytes(size_bytes)
    whole = all_pieces(count)
    crowd = [Worker(number, number % sites, rng.uniform(0, 2)) for number in range(workers)]
    for one in rng.sample(crowd, round(reachable * workers)):
        one.reachable = True
    for one in crowd:
        one.joined = joined
    members: dict[int, Member] = {}
    sent = budget = 0.0
    left, room = [0.0] * workers, [0.0] * workers
    up, down = up_bytes_per_s * _STEP_S / piece, down_bytes_per_s * _STEP_S / piece
    now = 0.0
    while now < _LONGEST_S and any(one.done_at is None for one in crowd):
        now += _STEP_S
        order = [one for one in crowd if one.done_at is None]
        rng.shuffle(order)
        for one in order:
            if one.call_at <= now:
                _call(one, members, crowd, count, now, rng)
        feeding = [one for one in order if one.queue]
        budget = min(budget + _SERVER_BYTES_PER_S * _STEP_S, _SERVER_BYTES_PER_S)
        while feeding and budget >= piece:
            one = feeding[rng.randrange(len(feeding))]
            got = one.queue.pop()
            one.have |= 1 << got
            one.fetching &= ~(1 << got)
            sent += piece
            budget -= piece
            if not one.queue:
                feeding.remove(one)
                one.call_at = now
        left = [min(tokens + up, max(2 * up, 1.0)) for tokens in left]
        room = [min(tokens + down, max(2 * down, 1.0)) for tokens in room]
        for one in order:
            near = list(one.near)
            rng.shuffle(near)
            for at in near:
                while room[one.number] >= 1 and left[at] >= 1:
                    offered = crowd[at].have & ~one.have
                    if not offered:
                        break
                    one.have |= _any(offered, count, rng)
                    one.gained_at = now
                    room[one.number] -= 1
                    left[at] -= 1
        for one in order:
            if one.have == whole:
                one.done_at = now
                _call(one, members, crowd, count, now, rng)
    return now, sent / size_bytes


def _call(one: Worker, members: dict[int, Member], crowd: list[Worker], count: int, now: float, rng: Random) -> None:
    """Let a worker take a turn."""
    public = f"9.0.{one.site >> 8}.{one.site & 255}"
    me = Member(
        have=one.have,
        taken=one.fetching & ~one.have,
        seen_at=now,
        public=public,
        private=(str(one.number),),
        reachable=one.reachable,
        peer=f"worker-{one.number}" if one.joined else "",
        port=one.number + 1,
    )
    others = [other for number, other in members.items() if number != one.number]
    take = hand_out(count, me, others, wanted=8, stuck=now - one.gained_at > STUCK_S, now=now) if not one.queue else 0
    one.queue = [*one.queue, *pieces_of(take)]
    one.fetching |= take
    members[one.number] = Member(
        **{name: getattr(me, name) for name in ("have", "seen_at", "public", "private", "reachable", "port", "peer")},
        taken=me.taken | take,
    )
    found = {
        int(place.peer.removeprefix("worker-")) if place.peer else place.port - 1
        for place in neighbours(me, others, count=count, rng=rng)
    }
    one.near = sorted({*one.near, *found})[-60:]
    for at in found:  # a connection is one in both directions
        if one.number not in crowd[at].near:
            crowd[at].near.append(one.number)
    one.call_at = now + interval_s(len(members))


def _any(pieces: int, count: int, rng: Random) -> int:
    """Return one piece of a set, by chance."""
    start = rng.randrange(count)
    upper = pieces >> start
    if upper:
        return (upper & -upper) << start
    return pieces & -pieces


def main() -> None:
    options = arguments(__doc__)
    size_bytes = (32 if options.quick else 256) * MIB
    figures = []
    for most, up, sites, reachable, joined in _CASES:
        workers = min(most, 100) if options.quick else most
        links = {"up_bytes_per_s": up, "down_bytes_per_s": 50e6}
        seconds, copies = spread(
            workers, size_bytes, **links, sites=min(sites, workers), reachable=reachable, joined=joined, rng=Random(1)
        )
        bound = max(size_bytes / _SERVER_BYTES_PER_S, workers * size_bytes / (_SERVER_BYTES_PER_S + workers * up))
        what = f"{workers} workers, {up / 1e6:g} MB/s up, {sites} {'site' if sites == 1 else 'sites'}, {reachable:.0%} reachable"
        what += ", the others through the overlay" if joined else ""
        figures.append(Figure(f"{what}: all have it", seconds, "s", bound, seconds / bound, None))
        figures.append(Figure(f"{what}: copies sent by the server", copies, "copies", 1.0, copies, 1.2))
        print(f"{what}: {seconds:.1f} s, bound {bound:.1f} s, {copies:.2f} copies", flush=True)
    publish("thousand", figures, options)


if __name__ == "__main__":
    main()
