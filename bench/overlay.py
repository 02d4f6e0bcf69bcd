"""Streams between two PCs through the overlay, against ssh, socat and the bare network, in namespaces of this machine.

A grid's server with its hub, a PC that offers services (`deskgrid offer`) and a PC that uses them (`deskgrid connect`), each in a network
namespace with a public address. Side by side in the same run, on the same links: iperf3 between the PCs (the limit), `ssh -L` from one to the
other, `ssh -J` through the server's machine (the relay's yardstick), and `socat` (a plain forwarder without encryption).

    throughput   1, 8 and 64 streams by iperf3, medians; CPU seconds per GB of all forwarding processes, and of the relay alone on
                 loopback, where the work of the links between the namespaces is not counted with it
    round trip   one byte there and back on an open stream, median of many
    set-up       from connect() on localhost to the first byte back, p95; first: of the first stream between two programs
    with delay   throughput of one stream, round trip and set-up on links with 20 and 100 ms round-trip time

Both sides, their yardsticks and the load generator share two CPUs, so throughput says how much work a byte costs more than what a network of
PCs would carry. The delayed links are TUN devices with a process between them (testing/natlab.py); their throughput is not reported.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
from msgspec import Struct

sys.path.insert(0, str(Path(__file__).parent))
from report import Figure, arguments, median_of, publish

from deskgrid.testing.natlab import Host, Nat, NatLab

_SSH_PORT, _IPERF, _ECHO = 2222, 5201, 7000
_SERVER = "9.9.1.1"
_STREAMS = (1, 8, 64)
_REGISTER_S = 1.0
"""A program that is started is registered at its hub after this; a user's first connection comes later still."""
_TRIES = 5
_PING = """
import socket, sys, time, json
address, port, count, setups = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
def opened():
    connection = socket.create_connection((address, port), 30)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return connection
def ping(connection):
    connection.sendall(b"x")
    assert connection.recv(1) == b"x"
times, begun = [], []
with opened() as connection:
    for _ in range(10):
        ping(connection)
    for _ in range(count):
        began = time.perf_counter(); ping(connection); times.append(time.perf_counter() - began)
for _ in range(setups):
    began = time.perf_counter()
    with opened() as connection:
        ping(connection); begun.append(time.perf_counter() - began)
print(json.dumps([times, begun]))
"""
_FIRST = """
import socket, sys, time
began = time.perf_counter()
with socket.create_connection(("127.0.0.1", int(sys.argv[1])), 30) as connection:
    connection.sendall(b"x")
    assert connection.recv(1) == b"x"
print(time.perf_counter() - began)
"""
_ECHO_SERVER = """
import socket, threading
def serve(connection):
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    with connection:
        while data := connection.recv(65536):
            connection.sendall(data)
with socket.create_server(("0.0.0.0", 7000), backlog=512) as server:
    print("ready", flush=True)
    while True:
        threading.Thread(target=serve, args=(server.accept()[0],), daemon=True).start()
"""
_RELAY = """
import asyncio, socket
from deskgrid.overlay.pump import Pumps
from deskgrid.overlay.relay import Relay
async def main():
    pumps, relays, loop = Pumps(2), [], asyncio.get_running_loop()
    with socket.create_server(("127.0.0.1", 9100), backlog=512) as listener:
        listener.setblocking(False)
        print("ready", flush=True)
        while True:
            near, _ = await loop.sock_accept(listener)
            relays.append(Relay(pumps, near, socket.create_connection(("127.0.0.1", 5201))))
asyncio.run(main())
"""
_SSHD = """
Port {port}
ListenAddress 0.0.0.0
HostKey {folder}/key
AuthorizedKeysFile {folder}/key.pub
PidFile none
StrictModes no
UsePAM no
PasswordAuthentication no
MaxStartups 200
MaxSessions 1000
"""


class Load(Struct, frozen=True):
    """Throughput through one way, and what it cost."""

    bits_per_s: float
    cpu_s_per_gb: float
    relay_s_per_gb: float


class Ping(Struct, frozen=True):
    """Seconds."""

    rtt_s: float
    setup_p95_s: float


class Bench:
    """All programs of one laboratory, started when they are needed and ended with it."""

    def __init__(self, folder: Path, lab: NatLab, stack: contextlib.ExitStack) -> None:
        self.folder = folder
        self.lab = lab
        self.stack = stack
        self.far, self.near = lab.sites["far"][0], lab.sites["near"][0]
        self.environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("DESKGRID_")},
            "DESKGRID_SERVER_HOME": str(folder / "server"),
            "DESKGRID_CLIENT_HOME": str(folder / "client"),
            "DESKGRID_SERVER_RESERVE_BYTES": "0",
        }
        self.started = 0
        self.sshd_pids: list[int] = []
        self.socats: list[int] = []

    # ---- programs

    def start(self, host: Host, *command: str, ready: str = "", **environment: str) -> subprocess.Popen[bytes]:
        """Start a program that is ended with the laboratory; wait until it has printed a line with `ready`."""
        self.started += 1
        log = (self.folder / f"{self.started}.log").open("ab")
        environment = {**self.environment, **environment}
        process = host.popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE if ready else log, stderr=log, env=environment
        )
        self.stack.callback(_end, process, log)
        while ready:
            assert process.stdout is not None
            line = process.stdout.readline().decode()
            if not line:
                raise RuntimeError(f"{command} ended: {(self.folder / f'{self.started}.log').read_text()[-2000:]}")
            if ready in line:
                break
        return process

    def deskgrid(self, host: Host, *arguments: str, **environment: str) -> subprocess.Popen[bytes]:
        """Start a deskgrid command that runs on."""
        return self.start(host, sys.executable, "-m", "deskgrid", *arguments, "--json", ready="{", **environment)

    def start_grid(self) -> None:
        """Start server and hub, and log in."""
        init = self.near.popen(
            [sys.executable, "-m", "deskgrid", "server", "init", "--listen", f"{_SERVER}:8470", "--json"],
            env=self.environment,
            stdout=subprocess.PIPE,
        )
        link = json.loads(init.communicate()[0])["login_link"]
        self.server = self.deskgrid(self.lab.server, "server", "run")
        login = self.near.popen([sys.executable, "-m", "deskgrid", "login", link], env=self.environment, stdout=subprocess.DEVNULL)
        if login.wait(60):
            raise RuntimeError("cannot log in")

    def start_services(self) -> None:
        """Start what is reached, and sshd, on the far PC."""
        self.start_echo()
        self.start(self.far, "iperf3", "-s", "-p", str(_IPERF))
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", self.folder / "key"], check=True)
        (self.folder / "sshd.conf").write_text(_SSHD.format(port=_SSH_PORT, folder=self.folder))
        Path("/run/sshd").mkdir(exist_ok=True)
        for host in (self.far, self.lab.server):
            sshd = self.start(host, _program("sshd"), "-D", "-f", str(self.folder / "sshd.conf"))
            self.sshd_pids.append(sshd.pid)

    def start_echo(self) -> None:
        """Start an echo service on port 7000 of the far PC."""
        self.start(self.far, sys.executable, "-c", _ECHO_SERVER, ready="ready")

    def ssh(self, ports: dict[int, int], *options: str) -> subprocess.Popen[bytes]:
        """Start ssh with forwards local -> far port; return once they listen."""
        forwards = [word for local, port in ports.items() for word in ("-L", f"127.0.0.1:{local}:127.0.0.1:{port}")]
        common = [
            f"-i{self.folder / 'key'}",
            "-oStrictHostKeyChecking=no",
            f"-oUserKnownHostsFile={os.devnull}",
            "-oLogLevel=ERROR",
        ]
        jump = [word for option in options for word in ("-o", option)]
        command = ["ssh", "-F", os.devnull, "-N", *common, *jump, *forwards, "-p", str(_SSH_PORT), f"root@{self.far.address}"]
        process = self.start(self.near, *command)
        for local in ports:
            self.wait_for_port(local)
        return process

    def jump(self) -> str:
        """Return the option that leads ssh through the server's machine."""
        words = f"ssh -F {os.devnull} -i {self.folder / 'key'} -oStrictHostKeyChecking=no -oUserKnownHostsFile={os.devnull} -oLogLevel=ERROR"
        return f"ProxyCommand={words} -W %h:%p -p {_SSH_PORT} root@{_SERVER}"

    def wait_for_port(self, port: int) -> None:
        """Return once something listens on a port of the near PC."""
        script = (
            "import socket, sys, time\n"
            f"for _ in range(600):\n try:\n  socket.create_connection(('127.0.0.1', {port}), 1).close(); sys.exit()\n"
            " except OSError: time.sleep(0.05)\nsys.exit(1)"
        )
        self.near.run(sys.executable, "-c", script)

    # ---- measuring

    def load(
        self, address: str, port: int, streams: int, seconds: float, carriers: Sequence[int], relays: Sequence[int] = ()
    ) -> Load:
        """Measure throughput to the near PC's `address`:`port`; `carriers` and `relays` are the processes whose CPU counts."""
        command = ("iperf3", "-c", address, "-p", str(port), "-P", str(streams), "-t", str(seconds), "-J")
        for _ in range(_TRIES):
            before, relay_before = _cpu(carriers), _cpu(relays)
            report = json.loads(self.near.run(*command, check=False))
            cpu_s, relay_s = _cpu(carriers) - before, _cpu(relays) - relay_before
            if "error" not in report:
                break
            # Such as "busy": its server has not seen yet that the run before has ended.
            print(f"iperf3 through {address}:{port}, {streams} streams: {report['error']}", file=sys.stderr, flush=True)
            time.sleep(_REGISTER_S)
        else:
            raise RuntimeError(f"iperf3 failed {_TRIES} times")
        received = report["end"]["sum_received"]
        gigabytes = received["bytes"] / 1e9
        return Load(received["bits_per_second"], (cpu_s + relay_s) / gigabytes, relay_s / gigabytes)

    def ping(self, address: str, port: int, count: int, setups: int) -> Ping:
        """Measure round trips on one stream, and the set-up of others."""
        times, begun = json.loads(self.near.run(sys.executable, "-c", _PING, address, str(port), str(count), str(setups)))
        return Ping(median_of(times), sorted(begun)[int(len(begun) * 0.95)])

    def first_setup(self, number: int, path: str) -> float:
        """Return the set-up time of the first stream of a program that was just started, in seconds."""
        port = 9500 + number
        process = self.deskgrid(self.near, "connect", "echo.user", "--listen", str(port), "--wait", "10s", DESKGRID_PEER_PATHS=path)
        time.sleep(_REGISTER_S)
        took_s = float(self.near.run(sys.executable, "-c", _FIRST, str(port)))
        process.terminate()
        return took_s


def _program(name: str) -> str:
    found = shutil.which(name) or shutil.which(name, path="/usr/sbin:/sbin")
    if found is None:
        raise SystemExit(f"{name} is needed: tools/setup bench")
    return found


def _end(process: subprocess.Popen[bytes], log: Any) -> None:
    with contextlib.suppress(psutil.Error):
        for child in psutil.Process(process.pid).children(recursive=True):
            child.kill()
    process.kill()
    process.wait()
    log.close()
    if process.stdout is not None:
        process.stdout.close()


def _cpu(pids: Sequence[int]) -> float:
    """Return the CPU seconds that processes and all that they started have used."""
    total = 0.0
    for pid in pids:
        with contextlib.suppress(psutil.Error):
            process = psutil.Process(pid)
            for one in (process, *process.children(recursive=True)):
                with contextlib.suppress(psutil.Error):
                    times = one.cpu_times()
                    total += times.user + times.system + times.children_user + times.children_system
    return total


class Way(Struct, frozen=True):
    """One way from the near PC to the far one: where it begins, and which processes carry it."""

    address: str
    iperf: int
    echo: int
    carriers: tuple[int, ...] = ()
    relays: tuple[int, ...] = ()


def open_ways(bench: Bench) -> dict[str, Way]:
    """Start everything, and return the ways side by side."""
    bench.start_grid()
    bench.start_services()
    offers = [bench.deskgrid(bench.far, "offer", name, str(port)).pid for name, port in (("iperf", _IPERF), ("echo", _ECHO))]
    ways = {"network": Way(bench.far.address, _IPERF, _ECHO)}
    for path, port in (("direct", 9001), ("relayed", 9011)):
        mine = [
            bench.deskgrid(bench.near, "connect", f"{name}.user", "--listen", str(number), DESKGRID_PEER_PATHS=path).pid
            for name, number in (("iperf", port), ("echo", port + 1))
        ]
        ways[path] = Way("127.0.0.1", port, port + 1, (*mine, *offers), (bench.server.pid,) if path == "relayed" else ())
    sshds = {host.name: pid for host, pid in zip((bench.far, bench.lab.server), bench.sshd_pids, strict=True)}
    tunnel, jumped = bench.ssh({9021: _IPERF, 9022: _ECHO}), bench.ssh({9031: _IPERF, 9032: _ECHO}, bench.jump())
    ways["ssh -L"] = Way("127.0.0.1", 9021, 9022, (tunnel.pid, sshds["far"]))
    ways["ssh -J"] = Way("127.0.0.1", 9031, 9032, (jumped.pid, sshds["far"]), (sshds["server"],))
    for local, port in ((9041, _IPERF), (9042, _ECHO)):
        bench.socats.append(
            bench.start(
                bench.near, "socat", f"TCP-LISTEN:{local},fork,reuseaddr,nodelay", f"TCP:{bench.far.address}:{port},nodelay"
            ).pid
        )
        bench.wait_for_port(local)
    ways["socat"] = Way("127.0.0.1", 9041, 9042, tuple(bench.socats))
    return ways


@contextlib.contextmanager
def laboratory(delay_s: float) -> Iterator[Bench]:
    """Open the laboratory, with `delay_s` seconds of round-trip time between the near PC and the rest."""
    delays = {"near": delay_s} if delay_s else {}
    with tempfile.TemporaryDirectory(prefix="deskgrid-bench-") as folder:
        lab = NatLab({"far": Nat.NONE, "near": Nat.NONE}, open_ports=(8470, 8471, _SSH_PORT), delay_s=delays)
        with lab, contextlib.ExitStack() as stack:
            yield Bench(Path(folder), lab, stack)


def throughput(bench: Bench, ways: dict[str, Way], runs: int, seconds: float) -> Iterator[Figure]:
    """Measure every way with 1, 8 and 64 streams, in turn."""
    for streams in _STREAMS:
        loads: dict[str, list[Load]] = {name: [] for name in ways}
        for _ in range(runs):
            for name, way in ways.items():
                loads[name].append(bench.load(way.address, way.iperf, streams, seconds, way.carriers, way.relays))
        speed = {name: median_of([load.bits_per_s for load in found]) / 1e9 for name, found in loads.items()}
        cost = {name: median_of([load.cpu_s_per_gb for load in found]) for name, found in loads.items()}
        relay = {name: median_of([load.relay_s_per_gb for load in found]) for name, found in loads.items()}
        words = f"{streams} stream{'s' if streams > 1 else ''}"
        yield _figure(f"direct, {words}, against ssh -L", speed["direct"], "Gbit/s", speed["ssh -L"], faster=1.5)
        yield _figure(f"relayed, {words}, against ssh -J", speed["relayed"], "Gbit/s", speed["ssh -J"], faster=1.3)
        yield Figure(f"socat, {words}", speed["socat"], "Gbit/s", None, None, None)
        yield Figure(f"iperf3 without anything between, {words}", speed["network"], "Gbit/s", None, None, None)
        yield Figure(
            f"CPU, direct, {words}, against ssh -L", cost["direct"], "s/GB", cost["ssh -L"], cost["direct"] / cost["ssh -L"], None
        )
        yield Figure(f"CPU of hub and network, relayed, {words}", relay["relayed"], "s/GB", relay["ssh -J"], None, None)


def throughput_far(bench: Bench, ways: dict[str, Way], runs: int, seconds: float, delay_s: float) -> Iterator[Figure]:
    """Measure one stream on links with a delay, where windows count more than CPU; no faster than the process that delays."""
    speed = {}
    for name in ("network", "direct", "relayed", "ssh -L", "ssh -J"):
        way = ways[name]
        loads = [bench.load(way.address, way.iperf, 1, seconds, way.carriers, way.relays) for _ in range(runs)]
        speed[name] = median_of([load.bits_per_s for load in loads]) / 1e9
    for path, other in (("direct", "ssh -L"), ("relayed", "ssh -J")):
        words = f"{path}, 1 stream, {delay_s * 1000:.0f} ms, against {other}"
        yield Figure(words, speed[path], "Gbit/s", speed[other], speed[other] / speed[path], None)
    yield Figure(
        f"iperf3 without anything between, 1 stream, {delay_s * 1000:.0f} ms", speed["network"], "Gbit/s", None, None, None
    )


def relay_alone(bench: Bench, runs: int, seconds: float) -> Iterator[Figure]:
    """Measure the relay on one PC's loopback, where no CPU time of a network between the PCs is counted with it."""
    relay = bench.start(bench.far, sys.executable, "-c", _RELAY, ready="ready").pid
    for streams in _STREAMS:
        costs = []
        for _ in range(runs):
            before = _cpu([relay])
            said = bench.far.run("iperf3", "-c", "127.0.0.1", "-p", "9100", "-P", str(streams), "-t", str(seconds), "-J")
            costs.append((_cpu([relay]) - before) / (json.loads(said)["end"]["sum_received"]["bytes"] / 1e9))
        words = f"{streams} stream{'s' if streams > 1 else ''}"
        yield Figure(f"CPU of the relay on loopback, {words}", median_of(costs), "s/GB", None, None, 0.35)


def _figure(name: str, ours: float, unit: str, theirs: float, *, faster: float) -> Figure:
    return Figure(name, ours, unit, theirs, theirs / ours, 1 / faster)


def latency(bench: Bench, ways: dict[str, Way], delay_s: float, pings: int, setups: int, firsts: int) -> Iterator[Figure]:
    """Measure round trips and set-up on links with a delay."""
    found = {name: bench.ping(way.address, way.echo, pings, setups) for name, way in ways.items()}
    rtt_ms = found["network"].rtt_s * 1000
    for path, other in (("direct", "ssh -L"), ("relayed", "ssh -J")):
        words = f"{path}, {delay_s * 1000:.0f} ms"
        added, theirs = (found[name].rtt_s * 1000 - rtt_ms for name in (path, other))
        target = 0.3 if not delay_s and path == "direct" else None
        yield Figure(f"added to the round trip of {rtt_ms:.2f} ms, {words}", added, "ms", theirs, None, target)
        limit_ms = 4 * rtt_ms + 30
        setup_ms, theirs = (found[name].setup_p95_s * 1000 for name in (path, other))
        yield Figure(f"set-up p95, {words}", setup_ms, "ms", theirs, None, limit_ms)
        first_ms = sorted(bench.first_setup(number, path) * 1000 for number in range(firsts))
        yield Figure(f"first set-up p95, {words}", first_ms[int(len(first_ms) * 0.95)], "ms", None, None, limit_ms)


def main() -> None:
    """Run all and publish."""
    options = arguments(__doc__)
    runs, seconds = (1, 1.0) if options.quick else (options.runs or 3, 3.0)
    figures: list[Figure] = []
    for delay_s in (0.0, 0.02, 0.1):
        with laboratory(delay_s) as bench:
            ways = open_ways(bench)
            if not delay_s:
                figures += throughput(bench, ways, runs, seconds)
                figures += relay_alone(bench, runs, seconds)
            else:
                figures += throughput_far(bench, ways, runs, 2 * seconds, delay_s)
            pings = 2000 if not delay_s else 20
            figures += latency(
                bench, ways, delay_s, 200 if options.quick else pings, 20 if options.quick else 60, 3 if options.quick else 20
            )
    publish("overlay", figures, options)


if __name__ == "__main__":
    main()
