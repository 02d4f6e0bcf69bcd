"""The laboratory of namespaces is what it says: its NATs, its firewall, its delays; and nothing of it stays."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from deskgrid.testing.natlab import Host, Nat, NatLab

PYTHON = (sys.executable, "-I", "-S", "-c")
LIMIT_S = 20.0
OBSERVED = range(8001, 8003)
KEEPING = (Nat.MASQUERADE, Nat.PERSISTENT, Nat.REJECTING)
RANDOM = (Nat.RANDOM, Nat.FULLY_RANDOM)

OBSERVER = """
import selectors, socket, sys
selector = selectors.DefaultSelector()
for port in sys.argv[1:]:
    selector.register(socket.create_server(("0.0.0.0", int(port))), selectors.EVENT_READ)
print("ready", flush=True)
held = []
while True:
    for key, _ in selector.select():
        connection, (host, port) = key.fileobj.accept()
        connection.sendall(f"{host} {port}\\n".encode())
        held.append(connection)
"""
"""Tells whoever connects how it is seen from here."""

ASK = """
import socket, sys
held = []
for address in sys.argv[2:]:
    host, _, port = address.partition(":")
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    connection.bind(("0.0.0.0", int(sys.argv[1])))
    connection.settimeout(20)
    connection.connect((host, int(port)))
    print(connection.makefile().readline().strip(), flush=True)
    held.append(connection)
print(flush=True)
sys.stdin.read()
"""
"""Connect from one port to several addresses, print how each sees us, and stay connected until stdin ends."""

DIAL = """
import socket, sys
try:
    socket.create_connection((sys.argv[1], int(sys.argv[2])), float(sys.argv[3])).close()
    print("connected")
except TimeoutError:
    print("silence")
except ConnectionRefusedError:
    print("refused")
except OSError as error:
    print(error)
"""

ROUND_TRIPS = """
import socket, sys, time
for _ in range(5):
    began = time.monotonic()
    with socket.create_connection((sys.argv[1], int(sys.argv[2])), 20):
        print(time.monotonic() - began)
"""

HOLD = """
import os, sys
import deskgrid.testing.natlab as natlab
uid = int(sys.argv[1])
if uid != os.getuid():
    os.setgroups([])
    os.setgid(uid)
    os.setuid(uid)
    os.chdir("/")
delay_s = {"server": 0.01} if "delayed" in sys.argv[2] else {}
with natlab.NatLab({"a": natlab.Nat.MASQUERADE, "b": natlab.Nat.NONE}, delay_s=delay_s) as lab:
    [pc] = lab.sites["a"]
    if "dial" in sys.argv[2]:  # through the NAT; bash needs no file of ours, which another user may not read
        dial = f"LC_ALL=C; (</dev/tcp/{lab.server.address}/8470) 2>&1 | grep -om1 'Connection refused'"
        print(pc.run("bash", "-c", dial).strip(), flush=True)
    print("built", flush=True)
    sys.stdin.read()
"""
"""A process that holds a laboratory until its stdin ends."""


# ---- programs in the laboratory


@contextmanager
def running(host: Host, script: str, *arguments: object) -> Iterator[list[str]]:
    """Run a script on a host; yield what it has printed once it is ready, which an empty or short line tells."""
    command = [*PYTHON, script, *map(str, arguments)]
    process = host.popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        said = []
        while (line := process.stdout.readline().strip()) not in ("", "ready"):
            said.append(line)
        yield said
    finally:
        process.kill()
        process.communicate()


def ask(host: Host, local_port: int, *addresses: str) -> list[tuple[str, int]]:
    """Return how a host is seen that connects from one port to each address."""
    with running(host, ASK, local_port, *addresses) as said:
        return [(seen.split()[0], int(seen.split()[1])) for seen in said]


def dial(host: Host, address: str, port: int, limit_s: float = 1.0) -> str:
    return host.run(*PYTHON, DIAL, address, str(port), str(limit_s)).strip()


@contextmanager
def observed(site: Nat, **options: int) -> Iterator[tuple[NatLab, Host, list[str]]]:
    """Yield a laboratory with a site behind that NAT, its first PC, and the addresses that tell how they see one."""
    with NatLab({"home": site, "web": Nat.NONE}, **options) as lab:
        [web] = lab.sites["web"]
        with running(web, OBSERVER, *OBSERVED):
            yield lab, lab.sites["home"][0], [f"{web.address}:{port}" for port in OBSERVED]


# ---- NATs


@pytest.mark.parametrize("nat", [*KEEPING, *RANDOM], ids=str)
def test_pc_behind_a_nat_is_seen_at_its_routers_address(nat: Nat):
    with observed(nat) as (lab, pc, web):
        assert pc.address.startswith("192.168.1.")
        assert {host for host, _ in ask(pc, 5000, *web)} == {lab.routers["home"].address}


def test_pc_without_a_nat_is_seen_as_it_is_and_can_be_dialled():
    with observed(Nat.NONE) as (lab, pc, web):
        assert ask(pc, 5000, *web) == [(pc.address, 5000)] * 2
        assert "home" not in lab.routers
        with running(pc, OBSERVER, 7000):
            assert dial(lab.sites["web"][0], pc.address, 7000) == "connected"


@pytest.mark.parametrize("nat", KEEPING, ids=str)
def test_nat_that_keeps_ports_keeps_them_for_every_destination(nat: Nat):
    with observed(nat) as (_, pc, web):
        for port in (5000, 40_000):
            assert [outside for _, outside in ask(pc, port, *web)] == [port, port]


def test_port_that_another_pc_of_the_site_has_is_not_given_twice():
    with observed(Nat.MASQUERADE, hosts=2) as (lab, first, web), running(first, ASK, 5000, web[0]) as said:
        assert said[0].endswith(" 5000")
        [(_, outside)] = ask(lab.sites["home"][1], 5000, web[0])
        assert outside != 5000


@pytest.mark.parametrize("nat", RANDOM, ids=str)
def test_random_nat_gives_each_connection_another_port(nat: Nat):
    with observed(nat) as (_, pc, web):
        seen = [(port, outside) for port in (5000, 5001, 5002) for _, outside in ask(pc, port, *web)]
    assert sum(port == outside for port, outside in seen) <= 1, f"one by chance, perhaps: {seen}"
    assert len({outside for _, outside in seen}) >= 5, seen


@pytest.mark.parametrize(
    ("nat", "answer"), [(Nat.MASQUERADE, "silence"), (Nat.FULLY_RANDOM, "silence"), (Nat.REJECTING, "refused")], ids=str
)
def test_connections_from_outside_are_ignored_or_refused_as_the_nat_says(nat: Nat, answer: str):
    with observed(nat) as (lab, pc, web), running(pc, ASK, 5000, web[0]) as said:
        router = lab.routers["home"].address
        outside = int(said[0].split()[1])
        assert dial(lab.sites["web"][0], router, 7000) == answer
        assert dial(lab.server, router, outside) == answer, "the hole is for one destination only"


def test_sites_have_the_same_private_addresses_and_do_not_see_each_other():
    with NatLab({"a": Nat.MASQUERADE, "b": Nat.MASQUERADE}, hosts=2) as lab:
        assert [host.address for host in lab.sites["a"]] == [host.address for host in lab.sites["b"]]
        with running(lab.sites["b"][1], OBSERVER, 7000):
            assert dial(lab.sites["b"][0], lab.sites["b"][1].address, 7000) == "connected"
            assert dial(lab.sites["a"][0], lab.sites["b"][1].address, 7000) == "refused", "its own neighbour, who does not listen"


# ---- server, delay, disturbances


def test_firewall_of_the_server_lets_its_ports_in_only():
    with observed(Nat.MASQUERADE, open_ports=(8470,)) as (lab, pc, _), running(lab.server, OBSERVER, 8470, 8471):
        for host in (pc, lab.sites["web"][0]):
            assert dial(host, lab.server.address, 8470) == "connected"
            assert dial(host, lab.server.address, 8471) == "silence"


@pytest.mark.parametrize("delay_s", [0.02, 0.1])
def test_delayed_host_is_as_far_away_as_was_asked(delay_s: float):
    with NatLab({"home": Nat.MASQUERADE}, delay_s={"home": delay_s}) as lab, running(lab.server, OBSERVER, 8470):
        said = lab.sites["home"][0].run(*PYTHON, ROUND_TRIPS, lab.server.address, "8470").split()
        measured_s = sorted(map(float, said))
        assert measured_s[0] >= delay_s
        assert measured_s[0] < 2 * delay_s + 0.1, "one of five is not much more"


def test_host_that_is_cut_off_is_silent_until_it_is_healed():
    with observed(Nat.MASQUERADE) as (lab, pc, _):
        [web] = lab.sites["web"]
        for far in (web, lab.routers["home"]):
            lab.cut(far)
            assert dial(pc, web.address, OBSERVED[0], 0.3) != "connected"
            lab.heal(far)
            assert dial(pc, web.address, OBSERVED[0], 10.0) == "connected"


# ---- nothing is left


class Held:
    """A laboratory held by another process, all of whose descendants are known by a mark in their environment."""

    def __init__(self, uid: int, what: str) -> None:
        self.mark = f"DESKGRID_LAB_MARK={uuid.uuid4().hex}"
        name, _, value = self.mark.partition("=")
        environment = {**os.environ, name: value}
        self.process = subprocess.Popen(
            [sys.executable, "-c", HOLD, str(uid), what],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def __enter__(self) -> Held:
        return self

    def __exit__(self, *_error: object) -> None:
        self.process.kill()
        self.process.communicate()
        for process in self.left():
            process.kill()

    def answer(self) -> str:
        """Return its next line, the last of which is "built"; "" if it failed."""
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def left(self) -> list[psutil.Process]:
        """Return what runs with our mark, besides the process itself."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error, OSError):
                environment = Path(f"/proc/{process.pid}/environ").read_bytes().split(b"\0")
                if process.pid != self.process.pid and self.mark.encode() in environment:
                    found.append(process)
        return found

    def namespaces(self) -> set[str]:
        """Return the network namespaces of the laboratory."""
        return {os.readlink(f"/proc/{process.pid}/ns/net") for process in self.left()} - {os.readlink("/proc/self/ns/net")}

    def all_gone(self) -> None:
        eventually(lambda: not self.left(), lambda: f"left: {self.left()}")


def eventually(is_so, otherwise, limit_s: float = LIMIT_S) -> None:
    end = time.monotonic() + limit_s
    while not is_so():
        assert time.monotonic() < end, otherwise()
        time.sleep(0.01)


def in_use() -> Mapping[str, set[str]]:
    """Return the network namespaces that processes are in, and our descriptors."""
    namespaces = set()
    for process in psutil.pids():
        with contextlib.suppress(OSError):
            namespaces.add(os.readlink(f"/proc/{process}/ns/net"))
    return {"namespaces": namespaces, "files": set(os.listdir("/proc/self/fd"))}


def _children() -> set[int]:
    """Return our processes; other tests may have left some that nobody waits for, as workers end."""
    return {child.pid for child in psutil.Process().children(recursive=True)}


def test_nothing_is_left_after_the_block_even_if_it_fails():
    files, before = in_use()["files"], _children()
    made: set[str] = set()
    with pytest.raises(KeyError), NatLab({"a": Nat.MASQUERADE, "b": Nat.NONE}, delay_s={"b": 0.01}) as lab:
        for host in (lab.core, lab.server, *lab.routers.values(), *lab.sites["a"], *lab.sites["b"]):
            made.add(os.readlink(f"/proc/{host.holder.pid}/ns/net"))
        assert len(made) == 5, "each has a network of its own"
        raise KeyError
    assert not made & in_use()["namespaces"]
    assert in_use()["files"] == files
    assert _children() <= before


def test_nothing_is_left_of_a_laboratory_that_cannot_be_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    before = _children()
    (tmp_path / "nft").write_text("#!/bin/sh\necho no tables here >&2\nexit 1\n")
    (tmp_path / "nft").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with pytest.raises(RuntimeError, match="no tables here"), NatLab({"a": Nat.MASQUERADE}):
        pass
    assert _children() <= before


def test_kill_9_of_the_process_that_holds_it_leaves_nothing():
    with Held(os.getuid(), "delayed") as held:
        assert held.answer() == "built"
        assert len(held.left()) >= 6  # and the process of the delayed link
        assert len(held.namespaces()) >= 5  # one of each host, and the one around all of an ordinary user
        held.process.send_signal(signal.SIGKILL)
        held.all_gone()


@pytest.mark.parametrize("part", [number / 6 for number in range(1, 6)], ids=lambda part: f"{part:.0%}")
def test_kill_9_while_it_is_built_leaves_nothing(part: float):
    with Held(os.getuid(), "nothing") as whole:
        eventually(whole.left, lambda: "it does not begin")
        began = time.monotonic()
        assert whole.answer() == "built"
        took_s = time.monotonic() - began
    with Held(os.getuid(), "nothing") as held:
        eventually(held.left, lambda: "it does not begin")
        time.sleep(took_s * part)  # the moment of the kill is what varies
        held.process.send_signal(signal.SIGKILL)
        held.all_gone()


def test_ordinary_user_builds_one_inside_a_user_namespace():
    """Where the kernel lets him; this test fails where it does not, as the laboratory is of no use there."""
    uid = os.getuid() or 65_534
    everybody = Path("/dev/net/tun").stat().st_mode & 0o006 == 0o006  # as on most PCs
    with Held(uid, "dial, delayed" if everybody else "dial") as held:
        assert held.answer() == "Connection refused", held.process.communicate()[1]
        assert held.answer() == "built"
        assert {process.uids().real for process in held.left()} == {uid}
        outside = os.readlink("/proc/self/ns/user")
        assert outside not in {os.readlink(f"/proc/{process.pid}/ns/user") for process in held.left()}
        held.process.send_signal(signal.SIGKILL)
        held.all_gone()
