"""Plays many workers of one grid: each calls the server at times of its own, over HTTPS, as a real worker does.

    python bench/swarm_of_workers.py PLAN.json

A program of its own, so that its CPU time is not the server's; bench/scale.py starts one or more of them. It is light on purpose, for it shares two
cores with the server: one thread, epoll, OpenSSL directly on the sockets, requests put together from bytes made before.

What a real worker does (client/transport.py): TLS 1.3 with the grid's authority and name checked, no resumption of sessions (aiohttp has none), and the
connection closed after it was unused for `keep_s`, so a worker that calls every minute makes a new one for each call. Each has an address of its own
in 127.0.0.0/8 (there are not enough ports at one).

A call is due at a time drawn before. Its latency counts from then to the last byte of the answer, whatever kept it from starting in time: this
program, too. Nothing is left out when the server is slow: the next call of the same worker is due as if this one had been answered at once,
and if it is not answered yet, it waits for that (and then has the connection of that: so an overloaded server sees fewer new connections than there
are calls, and the cost of a call seems less). How late this program itself began is reported beside.
"""

from __future__ import annotations

import contextlib
import heapq
import json
import os
import random
import resource
import select
import socket
import ssl
import sys
import time
from collections import Counter, deque
from pathlib import Path
from typing import Any

import msgspec
from msgspec import Struct

__all__ = ["Plan", "Played"]

_ANSWER_LIMIT_S = 30.0
_READ = 1 << 16
_OPEN_FILES = 200
"""Beside connections."""


class Plan(Struct, frozen=True, kw_only=True):
    """What one such program plays. Times are seconds of CLOCK_MONOTONIC."""

    address: tuple[str, int]
    server_name: str
    authority_pem: str
    headers: str
    """Lines of each request, without the token's."""
    before: str
    """The body up to the list of attempts, as a worker with nothing to do sends it."""
    after: str
    before_full: str
    """Likewise of a worker whose slot is taken."""
    after_full: str
    tokens: tuple[str, ...]
    first_number: int
    """Tells the addresses of several programs apart."""
    busy: int
    """So many of the first tokens are of busy workers."""
    idle: str
    """What an idle worker says. It asks for work, so what waits must not fit it."""
    idle_s: float
    busy_s: float
    keep_s: float
    start_at: float
    measure_at: float
    end_at: float
    ends: float
    """Chance that a busy worker's job has ended when it calls."""
    final: str
    """The report of an ended attempt, with %d for its number."""
    seed: int
    output: str


class Played(Struct, frozen=True, kw_only=True):
    """What came of it, of the calls due between measure_at and end_at."""

    latencies_s: tuple[float, ...]
    lags_s: tuple[float, ...]
    """How late this program began calls, those left out that had to wait for the last one of their worker."""
    connections: int
    errors: dict[str, int]
    cpu_s: float
    ended: int
    """Jobs whose final report was acknowledged."""
    holding: int
    """Busy workers with a job at the end."""
    idle_holding: int
    """Idle workers that got a job all the same: none should."""
    most_open: int
    longest_hold_s: float
    """Longest wake call that the server asked for; these workers make none."""
    intervals_s: tuple[float, float]
    """Least and most that the server told idle workers to wait between calls; these come when the plan says."""


class _Call:
    """A worker's connection, and the call on it."""

    __slots__ = ("answer", "close_at", "due", "registered", "sock", "state", "waits", "worker")

    def __init__(self, worker: int, sock: socket.socket, due: float, state: int) -> None:
        self.worker = worker
        self.sock = sock
        self.due = due
        self.state = state
        self.answer = b""
        self.close_at = 0.0
        self.waits = 0
        self.registered = False


_CONNECTING, _SHAKING, _SENDING, _READING = range(4)


class Swarm:
    """The workers."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.rng = random.Random(plan.seed)
        self.context = ssl.create_default_context(cadata=plan.authority_pem)
        self.context.minimum_version = ssl.TLSVersion.TLSv1_3
        self.epoll = select.epoll()
        self.calls: dict[int, _Call] = {}
        self.kept: dict[int, _Call] = {}
        self.closing: deque[_Call] = deque()
        self.underway: dict[int, _Call] = {}
        self.late: dict[int, deque[float]] = {}
        """When calls were due, of workers whose last was not answered yet."""
        self.attempts: list[int] = [0] * plan.busy
        self.reported: set[int] = set()
        self.latencies: list[float] = []
        self.lags: list[float] = []
        self.errors: Counter[str] = Counter()
        self.connections = self.ended = self.most_open = self.idle_holding = 0
        self.longest_hold_s, self.least_s, self.most_s = 0.0, float("inf"), 0.0
        self.heads = [f"{plan.headers}Authorization: Bearer {token}\r\n".encode() for token in plan.tokens]
        self.schedule = [
            (plan.start_at + self.rng.random() * self.interval_s(number), number) for number in range(len(plan.tokens))
        ]
        heapq.heapify(self.schedule)

    def interval_s(self, worker: int) -> float:
        """Return after how many seconds a worker calls again."""
        return self.plan.busy_s if worker < self.plan.busy else self.plan.idle_s

    def run(self) -> Played:
        """Play until the end and a moment longer, for the answers that are still due."""
        cpu_s = 0.0
        measuring = False
        looked_at = 0.0
        while True:
            now = time.monotonic()
            if not measuring and now >= self.plan.measure_at:
                cpu_s, measuring = time.process_time(), True
            if now >= self.plan.end_at and not self.underway:
                break
            self.begin_due(now)
            while self.closing and self.closing[0].close_at <= now:
                self.close_kept(self.closing.popleft())
            if now - looked_at > 1.0:
                looked_at = now
                self.give_up(now)
            self.poll(now)
        cpu_s = time.process_time() - cpu_s
        return Played(
            latencies_s=tuple(self.latencies),
            lags_s=tuple(self.lags),
            connections=self.connections,
            errors=dict(self.errors),
            cpu_s=cpu_s,
            ended=self.ended,
            holding=sum(1 for attempt in self.attempts if attempt),
            idle_holding=self.idle_holding,
            most_open=self.most_open,
            longest_hold_s=self.longest_hold_s,
            intervals_s=(self.least_s if self.most_s else 0.0, self.most_s),
        )

    def begin_due(self, now: float) -> None:
        """Begin the calls that are due."""
        schedule = self.schedule
        while schedule and schedule[0][0] <= now:
            due, worker = schedule[0]
            heapq.heapreplace(schedule, (due + self.interval_s(worker), worker))
            if due >= self.plan.end_at:
                continue
            if worker in self.underway:
                self.late.setdefault(worker, deque()).append(due)
            else:
                if self.measured(due):
                    self.lags.append(time.monotonic() - due)
                self.begin(worker, due)

    def begin(self, worker: int, due: float) -> None:
        """Begin one call, on the connection of the last if that is kept."""
        kept = self.kept.pop(worker, None)
        if kept is not None:
            kept.due, kept.state, kept.answer, kept.close_at = due, _SENDING, b"", 0.0
            self.underway[worker] = self.calls[kept.sock.fileno()] = kept
            self.step(kept)
            return
        number = self.plan.first_number + worker + 1
        try:
            plain = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        except OSError as error:
            self.miss(due, f"socket: {error.strerror}")
            return
        plain.setblocking(False)
        plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        plain.setsockopt(socket.IPPROTO_IP, 24, 1)  # IP_BIND_ADDRESS_NO_PORT
        plain.bind((f"127.{1 + (number >> 16)}.{number >> 8 & 255}.{number & 255}", 0))
        plain.connect_ex(self.plan.address)
        call = _Call(worker, plain, due, _CONNECTING)
        self.connections += self.measured(due)
        self.underway[worker] = self.calls[plain.fileno()] = call
        self.most_open = max(self.most_open, len(self.underway) + len(self.kept))
        self.wait(call, select.EPOLLOUT)

    def poll(self, now: float) -> None:
        """Wait for sockets until the next call is due."""
        next_at = self.schedule[0][0] if self.schedule else now + 1.0
        if self.closing:
            next_at = min(next_at, self.closing[0].close_at)
        for descriptor, _ in self.epoll.poll(max(0.0, min(next_at - now, 0.25)), 256):
            call = self.calls.get(descriptor)
            if call is not None:
                self.step(call)

    def wait(self, call: _Call, events: int) -> None:
        """Ask to be told when a socket is ready."""
        if not call.registered:
            self.epoll.register(call.sock.fileno(), events)
            call.registered = True
        elif call.waits != events:
            self.epoll.modify(call.sock.fileno(), events)
        call.waits = events

    def step(self, call: _Call) -> None:
        """Go on with a call as far as possible."""
        try:
            if call.state == _CONNECTING:
                failed = call.sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
                if failed:
                    raise OSError(failed, os.strerror(failed))
                name = self.plan.server_name
                call.sock = self.context.wrap_socket(call.sock, server_hostname=name, do_handshake_on_connect=False)
                call.state = _SHAKING
            if call.state == _SHAKING:
                call.sock.do_handshake()  # type: ignore[attr-defined]
                call.state = _SENDING
            if call.state == _SENDING:
                call.sock.send(self.request(call.worker))  # a few kB: they fit
                call.state = _READING
            while True:
                piece = call.sock.recv(_READ)
                call.answer += piece
                if not piece:
                    raise OSError(0, "closed by the server")
                if self.is_whole(call.answer):
                    break
        except ssl.SSLWantReadError:
            self.wait(call, select.EPOLLIN)
        except ssl.SSLWantWriteError:
            self.wait(call, select.EPOLLOUT)
        except (OSError, ValueError) as error:
            self.fail(call, f"{type(error).__name__}: {error}")
        else:
            self.finish(call)

    def request(self, worker: int) -> bytes:
        """Return the bytes of a worker's next call."""
        body = self.body(worker).encode()
        key = f"Idempotency-Key: {self.rng.getrandbits(128):032x}\r\nContent-Length: {len(body)}\r\n\r\n"
        return self.heads[worker] + key.encode() + body

    def body(self, worker: int) -> str:
        """Return what a worker says: an idle one has no attempts, a busy one its attempt, or that it has ended."""
        plan = self.plan
        if worker >= plan.busy:
            return plan.idle
        attempt = self.attempts[worker]
        if not attempt:
            return f"{plan.before}{plan.after}"
        if attempt in self.reported or self.rng.random() < plan.ends:
            self.reported.add(attempt)
            return f"{plan.before}{plan.final % attempt}{plan.after}"
        return f'{plan.before_full}{{"attempt_id":{attempt},"state":"running"}}{plan.after_full}'

    @staticmethod
    def is_whole(answer: bytes) -> bool:
        """Say whether a whole answer is there. Raise ValueError if it is not understood."""
        head, found, body = answer.partition(b"\r\n\r\n")
        if not found:
            return False
        _, named, rest = head.lower().partition(b"content-length:")
        if not named:
            raise ValueError("an answer without its length")
        return len(body) >= int(rest.partition(b"\r\n")[0])

    def finish(self, call: _Call) -> None:
        """Take an answer, and keep the connection for a while."""
        now = time.monotonic()
        status = call.answer[9:12]
        if status != b"200":
            self.fail(call, f"status {status.decode('ascii', 'replace')}")
            return
        if self.measured(call.due):
            self.latencies.append(now - call.due)
        self.learn(call)
        self.forget(call)
        call.answer = b""
        call.close_at = now + self.plan.keep_s
        self.kept[call.worker] = call
        self.closing.append(call)
        self.go_on(call.worker)

    def learn(self, call: _Call) -> None:
        """Note what a busy worker holds now, and what the server tells."""
        answer = msgspec.json.decode(call.answer.partition(b"\r\n\r\n")[2], type=_Answer)
        if call.worker >= self.plan.busy:
            self.idle_holding += len(answer.assignments)
            self.longest_hold_s = max(self.longest_hold_s, answer.hold_s)
            self.least_s, self.most_s = min(self.least_s, answer.interval_s), max(self.most_s, answer.interval_s)
            return
        attempt = self.attempts[call.worker]
        if attempt and attempt in answer.acknowledged:
            self.reported.discard(attempt)
            self.attempts[call.worker] = 0
            self.ended += self.measured(call.due)
        elif attempt and attempt in answer.cancelled:
            self.errors["a job was taken away"] += 1
            self.reported.discard(attempt)
            self.attempts[call.worker] = 0
        if answer.assignments:
            self.attempts[call.worker] = answer.assignments[0].attempt_id

    def fail(self, call: _Call, why: str) -> None:
        """End a call that had no good answer. A server that refuses is quick, so the call counts as long as a worker would have waited."""
        self.miss(call.due, why)
        self.forget(call)
        call.sock.close()
        self.go_on(call.worker)

    def miss(self, due: float, why: str) -> None:
        """Count a call that had no good answer."""
        if self.measured(due):
            self.latencies.append(max(_ANSWER_LIMIT_S, time.monotonic() - due))
        self.errors[why] += 1

    def go_on(self, worker: int) -> None:
        """Begin the first call that was due meanwhile. Those that a worker would have given up by now are not made, but counted."""
        waiting = self.late.get(worker)
        while waiting:
            due = waiting.popleft()
            if time.monotonic() - due < _ANSWER_LIMIT_S:
                self.begin(worker, due)
                return
            self.miss(due, "no answer in time")

    def forget(self, call: _Call) -> None:
        """Take a call off the lists; its socket stays open."""
        if call.registered:
            self.epoll.unregister(call.sock.fileno())
            call.registered = False
        del self.calls[call.sock.fileno()]
        del self.underway[call.worker]

    def close_kept(self, call: _Call) -> None:
        """Close a connection that was not used again."""
        if self.kept.get(call.worker) is not call or call.close_at > time.monotonic():
            return
        del self.kept[call.worker]
        with contextlib.suppress(OSError, ValueError):
            call.sock.unwrap()  # type: ignore[attr-defined]  # says goodbye; the answer is not waited for
        call.sock.close()

    def give_up(self, now: float) -> None:
        """End calls that wait for longer than a worker does."""
        for call in [call for call in self.underway.values() if now - call.due > _ANSWER_LIMIT_S]:
            self.fail(call, "no answer in time")

    def measured(self, due: float) -> bool:
        """Say whether a call counts."""
        return self.plan.measure_at <= due < self.plan.end_at


class _Assigned(Struct):
    attempt_id: int


class _Answer(Struct):
    assignments: list[_Assigned]
    acknowledged: list[int]
    cancelled: list[int]
    interval_s: float = 0.0
    hold_s: float = 0.0


def main() -> None:
    """Play the plan that the argument names."""
    plan = msgspec.json.decode(Path(sys.argv[1]).read_bytes(), type=Plan)
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    played: Any = Swarm(plan).run()
    Path(plan.output).write_bytes(msgspec.json.encode(played))
    print(json.dumps({"calls": len(played.latencies_s)}))


if __name__ == "__main__":
    main()
