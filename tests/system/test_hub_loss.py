"""A hub is killed while streams go on: those that were direct live on, relayed ones end with a reset, and new ones take another hub.

In the laboratory: the hubs are two hosts of their own, the user and the worker have public addresses.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from deskgrid.testing.natlab import Host, Nat, NatLab
from tests.system.cage import inside
from tests.system.harness import Program, until
from tests.system.lab import LabGrid
from tests.system.talk import started

PORTS = {"talk": 7000, "half": 7001}
TALK = """
import socket, sys
if sys.argv[1] == "listen":
    with socket.create_server(("127.0.0.1", int(sys.argv[2]))) as listener:
        print("listens", flush=True)
        connection, _ = listener.accept()
else:
    connection = socket.create_connection(("127.0.0.1", int(sys.argv[2])), 60)
connection.settimeout(120)
print("connected", flush=True)
for line in sys.stdin:
    order, _, words = line.rstrip("\\n").partition(" ")
    try:
        if order == "say":
            connection.sendall(words.encode() + b"\\n")
            print("said", flush=True)
        elif order == "hear":
            heard = b""
            while not heard.endswith(b"\\n") and (piece := connection.recv(65536)):
                heard += piece
            print("heard " + heard.decode().rstrip("\\n") if heard else "end", flush=True)
        elif order == "end":
            connection.shutdown(socket.SHUT_WR)
            print("ended", flush=True)
    except ConnectionResetError:
        print("reset", flush=True)
"""
"""One end of a connection; it does what stdin says and tells what came of it."""


class Talker:
    """A program with one TCP connection, that does as it is told."""

    def __init__(self, prefix: tuple[str, ...], role: str, port: int) -> None:
        command = [*prefix, sys.executable, "-I", "-S", "-c", TALK, role, str(port)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def expect(self, words: str) -> None:
        assert self.process.stdout is not None
        assert self.process.stdout.readline().rstrip("\n") == words

    def order(self, order: str, *, expect: str) -> None:
        assert self.process.stdin is not None
        print(order, file=self.process.stdin, flush=True)
        self.expect(expect)

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()


class TwoHubs(LabGrid):
    """A grid whose server has no hub; the hubs are programs at sites h1 and h2."""

    def __init__(self, folder: Path, lab: NatLab, path: str) -> None:
        super().__init__(folder, lab, lab.sites["user"][0], DESKGRID_SERVER_HUB_LISTEN="off", DESKGRID_PEER_PATHS=path)
        self.hubs: dict[str, Program] = {}
        self.talkers: list[Talker] = []

    def add_hub(self, label: str, host: Host) -> None:
        """Make and run a hub; it is known by the name that peers show."""
        home = self.folder / label
        environment = {**self.environment, "DESKGRID_HUB_HOME": str(home)}
        link = self.json("server", "hub-link")["link"]
        join = [*host.prefix, sys.executable, "-m", "deskgrid", "hub", "join", link, "--name", label]
        subprocess.run(join, env=environment, check=True, capture_output=True, timeout=60)
        program = Program(
            ["hub", "run", "--listen", f"{host.address}:8471"], environment, self.folder / f"{label}.log", host.prefix
        )
        self.programs.append(program)
        program.start()

        def name() -> str:
            found = [hub for hub in self.json("hub", "list") if hub["label"] == label and hub["alive"]]
            return str(found[0]["hub"]["name"]) if found else ""

        self.hubs[until(name, what=f"hub {label} is known")] = program

    def hub_of(self, kind: str) -> str:
        """Return the hub where a peer is whose name begins so; "" while it is at none."""
        found = [peer["hub"] for peer in self.json("peers") if peer["name"].startswith(kind)]
        return next((f"{hub.removesuffix('.deskgrid')}.deskgrid" for hub in found if hub), "")

    def talk(self, prefix: tuple[str, ...], role: str, port: int) -> Talker:
        talker = Talker(prefix, role, port)
        self.talkers.append(talker)
        return talker

    def called_and_caller(self, job: int, service: str) -> tuple[Talker, Talker]:
        """Put a service into the job's cage and connect with it from the user's PC, through a program that knows nothing from before."""
        _, ready = started(self, "connect", f"{service}.job-{job}", "--wait", "1m", name=f"connect-{len(self.talkers)}")
        port = int(ready["address"].rpartition(":")[2])
        called = self.talk(inside(self), "listen", PORTS[service])
        called.expect("listens")
        caller = self.talk(self.user.prefix, "dial", port)
        for one in (caller, called):
            one.expect("connected")
        return called, caller


@contextmanager
def grid_with_two_hubs(folder: Path, path: str) -> Iterator[tuple[TwoHubs, int]]:
    """Yield the grid and a job that offers PORTS."""
    with NatLab(dict.fromkeys(("user", "pc", "h1", "h2"), Nat.NONE)) as lab:
        grid = TwoHubs(folder, lab, path)
        try:
            grid.start_server()
            for label in ("h1", "h2"):
                grid.add_hub(label, lab.sites[label][0])
            grid.publish()
            grid.add_worker_at(lab.sites["pc"][0])
            job = grid.submit("listening = [7000, 7001]\nhangs = true\n", network='"overlay"', offer='["talk:7000", "half:7001"]')
            grid.wait_for(job, "active", ["running"])
            yield grid, job
        finally:
            for talker in grid.talkers:
                talker.close()
            grid.stop()
            for process in grid.machines():
                process.kill()


def they_talk(called: Talker, caller: Talker) -> None:
    for one, other in ((caller, called), (called, caller)):
        one.order("say hello", expect="said")
        other.order("hear", expect="heard hello")


@pytest.mark.full
def test_direct_stream_lives_on_when_the_hub_is_killed_and_a_new_one_takes_another_hub(tmp_path: Path):
    with grid_with_two_hubs(tmp_path, "direct") as (grid, job):
        called, caller = grid.called_and_caller(job, "talk")
        they_talk(called, caller)
        lost = until(lambda: grid.hub_of("attempt"), what="the job is at a hub")
        grid.hubs[lost].kill()
        they_talk(called, caller)
        until(lambda: grid.hub_of("attempt") not in ("", lost), what="the job is at the other hub")
        they_talk(called, caller)
        caller.order("end", expect="ended")
        called.order("hear", expect="end")
        called.order("say the last words", expect="said")  # in the other direction it goes on
        caller.order("hear", expect="heard the last words")
        called.order("end", expect="ended")
        caller.order("hear", expect="end")
        called.close()
        they_talk(*grid.called_and_caller(job, "talk"))
        assert grid.paths_taken() == {"direct"}, grid.logs()


@pytest.mark.full
def test_relayed_streams_end_with_a_reset_when_the_hub_is_killed_and_a_new_one_takes_another_hub(tmp_path: Path):
    with grid_with_two_hubs(tmp_path, "relayed") as (grid, job):
        called, caller = grid.called_and_caller(job, "talk")
        half_called, half_caller = grid.called_and_caller(job, "half")
        they_talk(called, caller)
        they_talk(half_called, half_caller)
        half_caller.order("end", expect="ended")
        half_called.order("hear", expect="end")
        lost = until(lambda: grid.hub_of("attempt"), what="the job is at a hub")
        grid.hubs[lost].kill()
        for one in (caller, called, half_caller):  # the one to whom the data was ended properly has nothing more to hear
            one.order("hear", expect="reset")
        called.close()
        until(lambda: grid.hub_of("attempt") not in ("", lost), what="the job is at the other hub")
        they_talk(*grid.called_and_caller(job, "talk"))
        assert grid.paths_taken() == {"relayed"}, grid.logs()
