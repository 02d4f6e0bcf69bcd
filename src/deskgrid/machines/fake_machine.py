"""The process of a fake machine; run as a program by fake.py, with nothing but the standard library.

Arguments: the machine's folder and its token (which is there only to be found). It plays `plan.json` and leaves the traces
that QEMU and an agent leave.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

if TYPE_CHECKING:
    from socket import socket

GREETING = b'{"QMP": {}}\n'
CONSOLE_SOCKET = "console.sock"
_REACH_LIMIT_S = 30.0
_RETRY_S = 0.02


def main(workdir: Path) -> int:
    """Play the plan; return the exit status of the process."""
    plan: dict[str, Any] = json.loads((workdir / "plan.json").read_bytes())
    if plan["refuses"]:
        print("the fake machine was told not to start", file=sys.stderr)
        return 1
    ran_s = _ran_s(workdir, plan)
    (workdir / plan["began"]).write_text(str(time.time() - ran_s))
    _append(workdir / plan["journal"], GREETING)
    if plan["console"]:
        _serve_console(workdir, plan)
    if plan["never_boots"]:
        _append(workdir / plan["console_log"], b"fake: no bootable device\n")
        _sleep_for_ever()
    time.sleep(max(0.0, plan["boot_s"] - ran_s))
    if not _said(workdir, plan):
        _append(workdir / plan["channel"], b"! booted\n! context-started\n")
        _append(workdir / plan["channel"], (workdir / plan["output"]).read_bytes())
    for port in plan["serve"]:
        _serve(port)
    for port in (*plan["serve"], *plan["listening"]):
        _append(workdir / plan["channel"], b"! listening %d\n" % port)
    _fetch_all(workdir, plan)
    _work(workdir, plan, max(0.0, ran_s - plan["boot_s"]))
    # The scratch disk with the result takes the empty one's place: a machine killed before has no result.
    (workdir / plan["finished"]).replace(workdir / plan["scratch"])
    _append(workdir / plan["channel"], b"! context-exited %d\n" % plan["exit_code"])
    _append(workdir / plan["journal"], plan["power_off"].encode())
    return 0


def _ran_s(workdir: Path, plan: dict[str, Any]) -> float:
    """Return the seconds that it had run when the checkpoint was made from which it goes on."""
    try:
        return float(json.loads((workdir / plan["checkpoint"]).read_bytes())["ran_s"])
    except OSError:
        return 0.0


def _said(workdir: Path, plan: dict[str, Any]) -> bytes:
    """Return what it had told of itself by then."""
    try:
        return Path(workdir, plan["channel"]).read_bytes()
    except OSError:
        return b""


def _work(workdir: Path, plan: dict[str, Any], worked_s: float) -> None:
    ticks = _said(workdir, plan).count(b"1 tick ")
    while plan["tick_s"]:
        ticks += 1
        _append(workdir / plan["channel"], b"1 tick %d\n" % ticks)
        time.sleep(plan["tick_s"])
    if plan["hangs"]:
        _sleep_for_ever()
    time.sleep(max(0.0, plan["duration_s"] - worked_s))
    while plan["until"] and not Path(plan["until"]).exists():
        time.sleep(_RETRY_S)
    if plan["io_error"]:
        _append(workdir / plan["journal"], plan["full"].encode())
        _sleep_for_ever()
    if plan["crashes"]:
        os.abort()
    if plan["reboots"]:
        _append(workdir / plan["journal"], plan["reset"].encode())
        sys.exit(0)


# ---- services


def _serve(port: int) -> None:
    """Listen on a port, and from now on send back what comes, each direction ended when the other one is."""
    import socket  # here, for most fake machines have no network and should start fast
    import threading

    listener = socket.create_server(("127.0.0.1", port), backlog=128)

    def accept() -> None:
        while True:
            connection, _ = listener.accept()
            threading.Thread(target=_echo, args=(connection,), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()


def _echo(connection: socket) -> None:
    with connection:
        try:
            while data := connection.recv(1 << 16):
                connection.sendall(data)
        except OSError:
            return


# ---- console: RFB 3.8 (RFC 6143) with one black pixel


_SERVER_INIT = bytes((0, 1, 0, 1, 32, 24, 0, 1, 0, 255, 0, 255, 0, 255, 16, 8, 0, 0, 0, 0)) + b"\0\0\0\4fake"
_UPDATE = bytes((0, 0, 0, 1, 0, 0, 0, 0, 0, 1, 0, 1, 0, 0, 0, 0)) + bytes(4)
_KEY, _UPDATE_REQUEST = 4, 3
_MESSAGE_BYTES = {0: 20, 2: 8, _UPDATE_REQUEST: 10, _KEY: 8, 5: 6}
"""By kind; a list of encodings has one."""


def _serve_console(workdir: Path, plan: dict[str, Any]) -> None:
    """Take connections to be served, each with a question and its answer."""
    import socket
    import threading

    os.chdir(workdir)  # its path may be longer than an address
    Path(CONSOLE_SOCKET).unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(CONSOLE_SOCKET)
    listener.listen()

    def show(viewer: socket.socket, order: dict[str, str]) -> None:
        with viewer, viewer.makefile("rb") as said:
            try:
                _show(viewer, said, order, workdir / plan["channel"])
            except OSError:
                return

    def accept() -> None:
        while True:
            connection, _ = listener.accept()
            with connection:
                order, [number], _, _ = socket.recv_fds(connection, 1024, 1)
            threading.Thread(target=show, args=(socket.socket(fileno=number), json.loads(order)), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()


def _show(viewer: socket, said: BinaryIO, order: dict[str, str], channel: Path) -> None:
    viewer.setblocking(True)
    viewer.sendall(b"RFB 003.008\n")
    said.read(12)
    viewer.sendall(b"\1\2")
    said.read(1)
    viewer.sendall(bytes.fromhex(order["question"]))
    if said.read(16) != bytes.fromhex(order["answer"]):
        viewer.sendall(b"\0\0\0\1\0\0\0\5wrong")
        return
    viewer.sendall(bytes(4))
    said.read(1)
    viewer.sendall(_SERVER_INIT)
    while kind := said.read(1):
        if kind[0] not in _MESSAGE_BYTES:
            return
        message = kind + said.read(_MESSAGE_BYTES[kind[0]] - 1)
        if kind[0] == _UPDATE_REQUEST:
            viewer.sendall(_UPDATE)
        elif kind[0] == _KEY and message[1]:
            _append(channel, b"1 %c\n" % message[7])


def _fetch_all(workdir: Path, plan: dict[str, Any]) -> None:
    """Ask each service and leave what it says in the result."""
    if not plan["fetch"]:
        return
    import subprocess

    folder = workdir / plan["result"] / "fetched"
    folder.mkdir(parents=True, exist_ok=True)
    for name, host, port in plan["fetch"]:
        try:
            with (folder / name).open("ab") as file:
                file.write(_fetch(name, host, port))
        except OSError as error:
            _append(workdir / plan["channel"], f"2 {name}: {error}\n".encode())
    subprocess.run(plan["remake"], env=dict(os.environ, MKE2FS_CONFIG=os.devnull), check=True)


def _fetch(name: str, host: str, port: int) -> bytes:
    import socket

    with _connect(host, port) as connection:
        connection.sendall(b"hello from %s\n" % name.encode())
        connection.shutdown(socket.SHUT_WR)
        answer = bytearray()
        while data := connection.recv(1 << 16):
            answer += data
    return bytes(answer)


def _connect(host: str, port: int) -> socket:
    """Connect; a fake machine boots so fast that the worker may not listen yet."""
    import socket

    deadline = time.monotonic() + _REACH_LIMIT_S
    while True:
        try:
            return socket.create_connection((host, port))
        except ConnectionRefusedError:
            if time.monotonic() > deadline:
                raise
        time.sleep(_RETRY_S)


# ---- traces


def _append(path: Path, data: bytes) -> None:
    with path.open("ab", buffering=0) as file:
        file.write(data)


def _sleep_for_ever() -> None:
    while True:
        time.sleep(3600)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
