"""Which data is held where: rules, and random grids in which workers come and go."""

from __future__ import annotations

from random import Random

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deskgrid.core.placement import MOST_NEW, Decision, Hold, Host, Wanted, decide, may_hold
from deskgrid.model.ids import DataId, Sha256, WorkerId
from deskgrid.model.placement import ALL, Attributes, Protocol

NOW = 1000.0
SIZE = 100


def wanted(
    number: int = 1, *, placement: int = 1, gone: bool = False, beside: Sha256 | None = None, **attributes: object
) -> Wanted:
    return Wanted(
        data_id=DataId(number),
        placement_id=placement,
        content=content(number),
        size_bytes=SIZE,
        owner_id=1,
        owner="ann",
        owner_groups=frozenset({"hep"}),
        attributes=Attributes(**{"replicas": 1, **attributes}),  # type: ignore[arg-type]
        companion_is_gone=gone,
        affinity_content=beside,
    )


def content(number: int) -> Sha256:
    return Sha256(f"{number:064x}")


def host(number: int = 1, **more: object) -> Host:
    return Host(worker_id=WorkerId(number), **{"lends_bytes": 1000, "shares": True, **more})  # type: ignore[arg-type]


def held(decision: Decision) -> set[int]:
    return {one.data_id for one in decision.hold}


def test_a_worker_holds_what_fewer_hold_than_is_wanted() -> None:
    one = wanted(replicas=2)
    others = [Hold(1.0, WorkerId(2))]
    assert held(decide(host(), [one], {DataId(1): others}, now=NOW)) == {1}
    assert held(decide(host(), [one], {DataId(1): [*others, Hold(2.0, WorkerId(3))]}, now=NOW)) == set()


def test_when_fewer_are_wanted_those_who_hold_it_longest_go_on() -> None:
    holds = {number: Hold(float(number), WorkerId(number)) for number in range(1, 6)}
    kept = set()
    for number in holds:
        others = [one for at, one in holds.items() if at != number]
        if held(decide(host(number, holds={DataId(1): float(number)}), [wanted(replicas=2)], {DataId(1): others}, now=NOW)):
            kept.add(number)
    assert kept == {1, 2}


@pytest.mark.parametrize(
    ("place", "is_there"),
    [("tag:lab", True), ("tag:x", False), ("group:hep", True), ("group:x", False), ("worker:7", True), ("worker:8", False)],
)
def test_where_names_workers(place: str, is_there: bool) -> None:
    one = host(7, tags=frozenset({"lab"}), owner_groups=frozenset({"hep"}))
    assert may_hold(one, wanted(where=(place,))) is is_there
    assert may_hold(one, wanted(where=("tag:none", place))) is is_there


@pytest.mark.parametrize(
    ("rule", "accepted"),
    [("everyone", True), ("mine", False), ("user:ann", True), ("user:bob", False), ("group:hep", True), ("group:x", False)],
)
def test_a_worker_holds_data_only_of_those_whose_jobs_it_takes(rule: str, accepted: bool) -> None:
    assert bool(held(decide(host(accepts=(rule,)), [wanted(replicas=ALL)], {}, now=NOW))) is accepted
    assert held(decide(host(accepts=("mine",), owner_id=1), [wanted(replicas=ALL)], {}, now=NOW)) == {1}


def test_without_room_or_consent_nothing_is_held() -> None:
    assert not held(decide(host(lends_bytes=SIZE - 1), [wanted(replicas=ALL)], {}, now=NOW))
    assert not held(decide(host(lends_bytes=0), [wanted(replicas=ALL)], {}, now=NOW))
    assert not held(decide(host(shares=False), [wanted(replicas=ALL, protocol=Protocol.SWARM)], {}, now=NOW))
    assert held(decide(host(shares=False), [wanted(replicas=ALL, protocol=Protocol.HTTPS)], {}, now=NOW))


def test_affinity_goes_before_replicas() -> None:
    with_data = wanted(affinity="data:other", beside=content(9), replicas=1)
    crowd = {DataId(1): [Hold(1.0, WorkerId(at)) for at in range(2, 9)]}
    assert held(decide(host(has=frozenset({content(9)})), [with_data], crowd, now=NOW)) == {1}
    assert held(decide(host(), [with_data], {}, now=NOW)) == set()
    assert held(decide(host(), [wanted(affinity="data:none", beside=None)], {}, now=NOW)) == set()
    for affinity in ("job-4", "array-2"):
        assert held(decide(host(works=frozenset({affinity})), [wanted(affinity=affinity)], {}, now=NOW)) == {1}
        assert held(decide(host(works=frozenset({"job-5"})), [wanted(affinity=affinity)], {}, now=NOW)) == set()
    assert held(decide(host(tags=frozenset({"lab"})), [wanted(affinity="tag:lab")], {}, now=NOW)) == {1}
    assert held(decide(host(), [wanted(affinity="tag:lab")], {}, now=NOW)) == set()


def test_what_has_outlived_its_time_or_companion_is_removed() -> None:
    for over in (wanted(expires_at=NOW, replicas=ALL), wanted(gone=True, replicas=ALL)):
        holder = host(holds={DataId(1): 1.0}, has=frozenset({content(1)}))
        assert decide(holder, [over], {}, now=NOW) == Decision((), (over,))
        assert decide(host(has=frozenset({content(1)})), [over], {}, now=NOW).remove == (over,)
        assert decide(host(), [over], {}, now=NOW) == Decision((), ())


def test_at_most_so_many_of_a_placement_are_on_one_worker_and_those_that_are_stay() -> None:
    many = [wanted(number, replicas=ALL, max_per_worker=2) for number in range(1, 6)]
    other = wanted(9, placement=2, replicas=ALL)
    assert held(decide(host(holds={DataId(4): 1.0}), [*many, other], {}, now=NOW)) == {4, 1, 9}


def test_few_are_new_at_a_time() -> None:
    many = [wanted(number, replicas=ALL) for number in range(1, 10)]
    assert len(held(decide(host(), many, {}, now=NOW))) == MOST_NEW


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 1 << 32), st.integers(1, 12), st.integers(0, 6), st.integers(1, 4))
def test_in_a_grid_whose_workers_come_and_go_replicas_are_reached_and_never_exceeded(
    seed: int, size: int, replicas: int, pieces: int
) -> None:
    """Workers call in any order; some are away. What counts is noted as the server does."""
    rng = Random(seed)
    holds: dict[int, dict[int, float]] = {piece: {} for piece in range(pieces)}
    caches: dict[int, set[Sha256]] = {worker: set() for worker in range(size)}
    attributes = Attributes(replicas=replicas or ALL)
    data = [msgspec.structs.replace(wanted(piece), attributes=attributes) for piece in range(pieces)]
    fetched = 0
    away: set[int] = set()
    for step in range(30 * size):
        if step < 20 * size:
            if rng.random() < 0.05:
                away ^= {rng.randrange(size)}
        else:
            away = set()
        worker = rng.randrange(size)
        if worker in away:
            continue
        mine = {DataId(piece): since[worker] for piece, since in holds.items() if worker in since}
        others = {
            DataId(piece): [Hold(at, WorkerId(other)) for other, at in since.items() if other != worker and other not in away]
            for piece, since in holds.items()
        }
        caller = Host(worker_id=WorkerId(worker), lends_bytes=SIZE * pieces, shares=True, holds=mine, has=frozenset(caches[worker]))
        decision = decide(caller, data, others, now=float(step))
        now_held = {one.data_id for one in decision.hold}
        for piece, since in holds.items():
            if piece in now_held and worker not in since:
                if replicas:  # it takes the place of those that are away
                    holds[piece] = since = {other: at for other, at in since.items() if other not in away}
                since[worker] = float(step)
                if content(piece) not in caches[worker]:
                    caches[worker].add(content(piece))
                    fetched += 1
            elif piece not in now_held:
                since.pop(worker, None)
            if replicas:
                assert len(since) <= replicas
    for worker in range(size):  # all are there, and each has called in the end
        mine = {DataId(piece): since[worker] for piece, since in holds.items() if worker in since}
        others = {
            DataId(piece): [Hold(at, WorkerId(other)) for other, at in since.items() if other != worker]
            for piece, since in holds.items()
        }
        caller = Host(worker_id=WorkerId(worker), lends_bytes=SIZE * pieces, shares=True, holds=mine, has=frozenset(caches[worker]))
        for one in decide(caller, data, others, now=1e9).hold:
            holds[one.data_id].setdefault(worker, 1e9)
    for since in holds.values():
        assert len(since) == (min(replicas, size) if replicas else size)
    assert fetched <= size * pieces  # nothing is fetched twice: what is not held any more is still there
