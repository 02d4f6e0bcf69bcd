"""deskgrid connect, offer, proxy, peers, connection: programs on this PC and programs in jobs talk to each other."""

from __future__ import annotations

import asyncio
import contextlib
import re
import signal
import socket
from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import App, Parameter

from deskgrid.cli.connection import connected
from deskgrid.cli.logs import configure_logs
from deskgrid.cli.output import NO_NEGATIVES, Json, age, print_json, print_lines, print_table
from deskgrid.client.connecting import peer_of
from deskgrid.errors import InvalidInput, NotFound, Unreachable
from deskgrid.model.ids import JobId
from deskgrid.model.overlay import parse_service
from deskgrid.units import format_size, parse_duration

if TYPE_CHECKING:
    pass

__all__ = [
    "Verbose",
    "Wait",
    "connect",
    "connection_app",
    "job_of",
    "listen",
    "offer",
    "peers",
    "proxy",
    "until_ended",
    "wait_of",
]

connection_app = App(default_parameter=NO_NEGATIVES, name="connection", help="The streams that go through the overlay.")

Wait = Annotated[str, Parameter(help="How long a connection waits for a service that is not there yet.")]
Verbose = Annotated[bool, Parameter(name=["--verbose", "-v"], show_default=False, help="Log more.")]
_JOB = re.compile(r"(?:job-)?([1-9][0-9]{0,17})")
_BACKLOG = 128


def listen(text: str) -> socket.socket:
    """Return a listening socket for PORT or HOST:PORT; a port alone is one of this PC's own programs only. Raise InvalidInput."""
    host, _, port = text.rpartition(":")
    if not port.isdecimal() or int(port) > 65535:
        raise InvalidInput(f"{text!r} is no place to listen", where="--listen", hint="PORT or HOST:PORT, as 9000")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host.strip("[]") or "127.0.0.1", int(port)))
        listener.listen(_BACKLOG)
        listener.setblocking(False)
    except OSError as error:
        listener.close()
        raise InvalidInput(f"cannot listen on {text}: {error.strerror}", where="--listen", hint="choose another port") from error
    return listener


def shown_address(listener: socket.socket) -> str:
    """Return what people type to reach a listening socket."""
    host, port = listener.getsockname()[:2]
    return f"localhost:{port}" if host == "127.0.0.1" else f"{host}:{port}"


def job_of(text: str) -> JobId:
    """Return the job of a JOB argument. Raise InvalidInput."""
    match = _JOB.fullmatch(text)
    if match is None:
        raise InvalidInput(f"{text[:60]!r} is not a job", where="JOB", hint="as in job-42")
    return JobId(int(match[1]))


def wait_of(text: str) -> float:
    """Return the seconds of a --wait option. Raise InvalidInput."""
    return 0.0 if text == "0" else parse_duration(text)


async def until_ended() -> None:
    """Return on SIGTERM; Ctrl-C ends a program in its own way."""
    ended = asyncio.Event()
    with contextlib.suppress(NotImplementedError):
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, ended.set)
    await ended.wait()


async def connect(
    service: Annotated[str, Parameter(help="SERVICE.PEER, such as web.job-42.")],
    /,
    *,
    listen_on: Annotated[str, Parameter(name="--listen", help="PORT or HOST:PORT on this PC; by default a free port.")] = "0",
    wait: Wait = "5m",
    verbose: Verbose = False,
    json: Json = False,
) -> None:
    """Make a service of a job available on this PC: what connects to the port printed is connected to it. Runs until Ctrl-C.

    For example:

        deskgrid connect web.job-42 --listen 9000
        deskgrid connect db.job-42 --wait 0
    """
    from deskgrid.overlay.proxy import serve_port

    configure_logs(json=json, verbose=verbose)
    reference = parse_service(service, "SERVICE")
    wait_s = wait_of(wait)
    async with connected() as grid:
        with listen(listen_on) as listener:
            async with peer_of(grid) as peer:
                waiting = await peer.look_up(str(reference))
                words = f"is {reference}{f', not there yet: {waiting}' if waiting else ''}"
                _tell_listening(listener, {"service": str(reference), "waiting_for": waiting}, words, json)
                await _serve(serve_port(peer, str(reference), listener, wait_s=wait_s))


async def _serve(work: Coroutine[Any, Any, None]) -> None:
    """Run what serves, until the program is asked to end."""
    async with asyncio.TaskGroup() as tasks:
        serving = tasks.create_task(work)
        await until_ended()
        serving.cancel()


def _tell_listening(listener: socket.socket, document: dict[str, object], words: str, json: bool) -> None:
    if json:
        print_json({"address": shown_address(listener), **document}, indent=0)  # a line: programs wait for it
    else:
        print_lines(f"{shown_address(listener)} {words}")


async def offer(
    name: Annotated[str, Parameter(help="Name of the service; jobs reach it as NAME.user.")],
    port: Annotated[int, Parameter(help="Port on this PC.")],
    /,
    *,
    host: str = "127.0.0.1",
    share: tuple[str, ...] = (),
    verbose: Verbose = False,
    json: Json = False,
) -> None:
    """Offer a service of this PC to your jobs. Runs until Ctrl-C.

    For example:

        deskgrid offer web 8000
        deskgrid offer db 5432 --share group:hep

    Parameters
    ----------
    host
        Where the service listens, if it is not this PC.
    share
        Who else may reach it: group:NAME, user:NAME or everyone. May be given several times.
    """
    from deskgrid.model.wire import PeerOffer

    configure_logs(json=json, verbose=verbose)
    reference = parse_service(f"{name}.user", "NAME")
    if not 1 <= port <= 65535:
        raise InvalidInput(f"{port} is no port", where="PORT", hint="1 to 65535")

    async def dial() -> socket.socket:
        try:
            return await asyncio.to_thread(socket.create_connection, (host, port), 10.0)
        except OSError as error:
            raise Unreachable(f"nothing answers on {host}:{port} of the user's PC: {error.strerror}") from error

    async with connected() as grid, peer_of(grid, {name: dial}, (PeerOffer(name=name, share=share),)) as peer:
        await peer.ready(30.0)
        if json:
            print_json({"service": str(reference), "host": host, "port": port}, indent=0)
        else:
            print_lines(f"{reference} is {host}:{port}")
        await until_ended()


async def proxy(
    *,
    listen_on: Annotated[str, Parameter(name="--listen", help="PORT or HOST:PORT on this PC.")] = "1080",
    wait: Wait = "0",
    verbose: Verbose = False,
    json: Json = False,
) -> None:
    """Run a SOCKS5 proxy that knows every service of your jobs by name: web.job-42.grid, whatever the port. Runs until Ctrl-C.

    For example:

        deskgrid proxy
        curl --proxy socks5h://localhost:1080 http://web.job-42.grid/
    """
    from deskgrid.overlay.socks import serve_socks

    configure_logs(json=json, verbose=verbose)
    wait_s = wait_of(wait)
    async with connected() as grid:
        with listen(listen_on) as listener:
            async with peer_of(grid) as peer:

                async def join(host: str, _port: int, local: socket.socket, ready: Callable[[], None]) -> None:
                    if not host.endswith(".grid"):
                        raise NotFound(f"{host[:100]} is not a name of the grid", hint="SERVICE.PEER.grid, as web.job-42.grid")
                    await peer.connect(str(parse_service(host.removesuffix(".grid"))), local, wait_s=wait_s, connected=ready)

                _tell_listening(listener, {"proxy": "socks5h"}, "is a SOCKS5 proxy: socks5h, so that it is asked for names", json)
                await _serve(serve_socks(join, listener))


async def peers(
    *, everyone: Annotated[bool, Parameter(help="Also those of others (admins).", show_default=False)] = False, json: Json = False
) -> None:
    """List your programs and jobs that take part in the overlay, and what they offer.

    For example:

        deskgrid peers
        deskgrid peers --json
    """
    async with connected() as grid:
        found = await grid.peers(everyone=everyone)
    if json:
        print_json(found)
        return
    rows = [
        (
            peer.id,
            peer.name.removesuffix(".deskgrid"),
            peer.owner,
            " ".join(peer.services) or "-",
            peer.hub or "-",
            len(peer.connections),
        )
        for peer in found
    ]
    print_table(("peer", "name", "owner", "services", "hub", "connections"), rows, empty="no peers")


@connection_app.command(name="list")
async def list_(
    *, everyone: Annotated[bool, Parameter(help="Also those of others (admins).", show_default=False)] = False, json: Json = False
) -> None:
    """List the streams of your programs and jobs: which path each took, its bytes and round-trip time.

    Peers report every ten seconds.

    For example:

        deskgrid connection list
        deskgrid connection list --json
    """
    async with connected() as grid:
        found = await grid.peers(everyone=everyone)
    pairs = [(peer, connection) for peer in found for connection in peer.connections]
    if json:
        print_json([{"peer": peer.name, "connection": connection} for peer, connection in pairs])
        return
    rows = [
        (
            one.service,
            peer.name.removesuffix(".deskgrid"),
            ("to " if one.outgoing else "from ") + one.peer.removesuffix(".deskgrid"),
            one.path.value,
            format_size(one.sent_bytes),
            format_size(one.received_bytes),
            "-" if one.rtt_s is None else f"{one.rtt_s * 1000:.1f} ms",
            age(one.since),
        )
        for peer, one in pairs
    ]
    columns = ("service", "peer", "other end", "path", "sent", "received", "round trip", "since")
    print_table(columns, rows, empty="no connections")
