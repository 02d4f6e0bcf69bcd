"""What Prometheus is told: figures of this process, and of the grid as one query finds them when it asks.

All names begin with deskgrid_. What a process counts is its own: with several servers each is asked, and sums are Prometheus's business; what
is read from the store is the same at all of them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import sqlalchemy as sa
from msgspec import Struct
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from deskgrid.model.jobs import JobState
from deskgrid.server.store.engine import Transaction
from deskgrid.server.store.schema import blob, queue, submission, worker

__all__ = ["CONTENT_TYPE", "Figures", "Metrics", "read_figures"]

CONTENT_TYPE = CONTENT_TYPE_LATEST
_CALL_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1.0, 5.0, 60.0)
_COMMIT_S = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.5, 2.0)
_WRITES = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class Hub(Protocol):
    """What is told of the hub inside this process."""

    @property
    def peers(self) -> int: ...
    @property
    def streams(self) -> int: ...


class Figures(Struct, frozen=True):
    """The grid's figures, from its store."""

    jobs: dict[JobState, int]
    workers_online: int
    chores: int
    stored_bytes: int


def read_figures(tx: Transaction, online_s: float) -> Figures:
    """Return the grid's figures in one query. A worker is online if it called within `online_s`. Costs grow with queues, workers and blobs."""
    sums = [sa.select(sa.func.coalesce(sa.func.sum(queue.c[state.value]), 0)).scalar_subquery() for state in JobState]
    calling = sa.select(sa.func.count()).select_from(worker)
    calling = calling.where(worker.c.left_at.is_(None), worker.c.seen_at > tx.now - online_s, worker.c.paused.is_(False))
    # As the states stand in the partial index, so that it is used.
    unfinished = sa.select(sa.func.count()).select_from(submission)
    unfinished = unfinished.where(sa.literal_column("submission.state IN ('filling', 'cancelling')"))
    stored = sa.select(sa.func.coalesce(sa.func.sum(blob.c.size_bytes), 0))
    parts = [*sums, calling.scalar_subquery(), unfinished.scalar_subquery(), stored.scalar_subquery()]
    row: Any = tx.row(sa.select(*(part.label(f"figure_{number}") for number, part in enumerate(parts))))
    *counts, online, chores, stored_bytes = (int(value) for value in row)
    return Figures(dict(zip(JobState, counts, strict=True)), online, chores, stored_bytes)


class Metrics:
    """The figures of one server process, in a registry of its own."""

    def __init__(self) -> None:
        registry = self._registry = CollectorRegistry(auto_describe=False)
        self._calls = Histogram(
            "deskgrid_call_seconds",
            "Time to answer a call; calls that wait for a change are held for up to 60 s",
            ("route", "status"),
            registry=registry,
            buckets=_CALL_S,
        )
        self._observers: dict[tuple[str, int], Callable[[float], None]] = {}
        self._batch = Histogram("deskgrid_store_batch_writes", "Writes in one transaction", registry=registry, buckets=_WRITES)
        self._commit = Histogram(
            "deskgrid_store_commit_seconds", "Time of a transaction with its commit", registry=registry, buckets=_COMMIT_S
        )
        self._expired = Counter("deskgrid_leases_expired", "Attempts lost because nothing was heard", registry=registry)
        gauges = {
            "store_waiting_writes": "Writes that wait for the writer",
            "workers_online": "Workers that call, and are not paused",
            "chores_left": "Arrays to be filled or cleared away",
            "stored_bytes": "Bytes of all blobs in the repository",
            "free_bytes": "Bytes free for blobs, where that is known",
            "hub_peers": "Peers registered at the hub in this process",
            "hub_streams": "Streams that the hub in this process relays",
        }
        self._gauges = {name: Gauge(f"deskgrid_{name}", text, registry=registry) for name, text in gauges.items()}
        self._jobs = Gauge("deskgrid_jobs", "Jobs by state", ("state",), registry=registry)
        self._hub: Hub | None = None

    def measure_call(self, route: str, status: int, seconds: float) -> None:
        """Note a call that was answered. Costs some microseconds."""
        observe = self._observers.get((route, status))
        if observe is None:
            observe = self._observers[route, status] = self._calls.labels(route, str(status)).observe
        observe(seconds)

    def measure_batch(self, writes: int, seconds: float) -> None:
        """Note a transaction of the store's. May be called by its thread."""
        self._batch.observe(writes)
        self._commit.observe(seconds)

    def count_expired(self, leases: int) -> None:
        """Note leases that ran out."""
        self._expired.inc(leases)

    def watch_hub(self, hub: Hub | None) -> None:
        """Tell of the hub inside this process from now on, or of none."""
        self._hub = hub

    def render(self, figures: Figures, *, waiting_writes: int, free_bytes: int) -> bytes:
        """Return all figures as Prometheus reads them."""
        for state, count in figures.jobs.items():
            self._jobs.labels(state.value).set(count)
        values = {
            "store_waiting_writes": waiting_writes,
            "workers_online": figures.workers_online,
            "chores_left": figures.chores,
            "stored_bytes": figures.stored_bytes,
            "free_bytes": free_bytes,
            "hub_peers": self._hub.peers if self._hub is not None else 0,
            "hub_streams": self._hub.streams if self._hub is not None else 0,
        }
        for name, value in values.items():
            self._gauges[name].set(value)
        return generate_latest(self._registry)
