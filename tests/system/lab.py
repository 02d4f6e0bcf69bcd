"""A grid in a laboratory of namespaces: the server behind its firewall, the user and the workers at sites of their own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from deskgrid.client.grid import Grid
from deskgrid.testing.natlab import Host, NatLab
from tests.system.harness import LIMIT_S, Program, System, until

ASK = """
import socket, sys
with socket.create_connection(("127.0.0.1", int(sys.argv[1])), 60) as connection:
    connection.settimeout(60)
    connection.sendall(sys.argv[2].encode())
    connection.shutdown(socket.SHUT_WR)
    sys.stdout.write(b"".join(iter(lambda: connection.recv(65536), b"")).decode())
"""


class LabGrid(System):
    """Everything is done by commands, each where it belongs, since this process is outside of the laboratory."""

    def __init__(self, folder: Path, lab: NatLab, user: Host, **environment: str) -> None:
        super().__init__(folder, user.prefix)
        self.lab = lab
        self.user = user
        self.environment.update({"DESKGRID_SERVER_LEASE_S": "10", **environment})

    def start_server(self, **_options: Any) -> None:
        """Make and run the grid on the laboratory's server, and log its admin in."""
        listen = ["--listen", "9.9.1.1:8470"]
        link = self.json("server", "init", *listen)["login_link"]
        self.server = Program(["server", "run", "--json"], self.environment, self.folder / "server.log", self.lab.server.prefix)
        self.programs.append(self.server)
        self.server.start()
        self.address = until(self._listening, what="the server listens")
        self.cli("login", link)

    def publish_file(self, file: Path, name: str, *options: str) -> None:
        self.cli("disk", "import", file, "--name", name, *options)

    def publish(self, name: str = "tiny", content: bytes | None = None) -> None:
        file = self.folder / f"{name}.iso"
        file.write_bytes(content or bytes(32769) + b"CD001" + bytes(32768))
        self.publish_file(file, name)

    def add_worker_at(self, host: Host, name: str = "pc", **environment: str) -> Program:
        """Let a PC of the laboratory join, and work."""
        home = self.join_at(host, name)
        program = Program(
            ["worker", "run", "--home", str(home), "--verbose"],
            {**self.environment, **environment},
            self.folder / f"{name}.log",
            host.prefix,
        )
        self.programs.append(program)
        self.workers[name] = program
        program.start()
        return program

    def join_at(self, host: Host, name: str) -> Path:
        """Let a PC of the laboratory join; return its worker's folder."""
        home = self.folder / name
        link = self.json("server", "join-link")["link"]
        join = [*host.prefix, sys.executable, "-m", "deskgrid", "worker", "join", link, "--name", name, "--home", str(home)]
        subprocess.run(join, env=self.environment, check=True, capture_output=True, timeout=60)
        return home

    def job(self, number: int) -> Any:
        return self.json("job", "show", str(number))

    def grid(self) -> Grid:
        raise AssertionError("the laboratory's addresses are others' out here: use commands")

    def wait_for(self, number: int, state: str, attempts: list[str] | None = None, limit_s: float = LIMIT_S) -> Any:
        """Poll by commands."""
        wanted = f"job {number} is {state} with {attempts}"
        until(lambda: self._is_so(number, state, attempts), what=wanted, limit_s=limit_s)
        return self.job(number)

    def _is_so(self, number: int, state: str, attempts: list[str] | None) -> bool:
        found, of = self.states(number)
        return found == state and attempts in (None, of)

    def ask(self, address: str, said: str) -> str:
        """Say something to a port of the user's PC and return what comes back."""
        return self.user.run(sys.executable, "-c", ASK, address.rpartition(":")[2], said)

    def paths_taken(self) -> set[str]:
        """Return the paths of the streams that are or were logged by the user's programs."""
        found = set()
        for program in self.programs:
            for line in program.said().splitlines():
                if line.startswith("{") and "stream_begins" in line:
                    found.add(json.loads(line)["path"])
        return found
