"""Making a server, its links, and running it.

HOME/server.toml       settings (may be missing)
HOME/hub.toml          settings of the hub inside the server (may be missing)
HOME/authority/        root and server keys and certificates, the key for grants
HOME/hub/hub.key       the key of the hub inside the server
HOME/grid.sqlite       the store, unless settings say otherwise
HOME/blobs, uploads    the repository
HOME/lock, lock-1, ..  one held by each running server; there are several only over PostgreSQL
HOME/address           where the server listens, or did last; address-1, ... of the others while they run
HOME/hub/hub-1.key ..  the keys of the others' hubs
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import re
import signal
import socket
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from pathlib import Path
from random import Random

import structlog
import uvicorn
from starlette.types import ASGIApp

from deskgrid.clock import Clock, SystemClock
from deskgrid.errors import InvalidInput, OperatorError
from deskgrid.files import locked
from deskgrid.link import Link, hash_secret, make_secret
from deskgrid.model.users import User
from deskgrid.server.app import make_app, sweep_forever
from deskgrid.server.authority import Authority, authority_fingerprint, ensure_certificate, make_authority
from deskgrid.server.chores import do_chores_forever
from deskgrid.server.health import serving_figures
from deskgrid.server.hints import Elsewhere, listen_forever
from deskgrid.server.hub import OwnHub
from deskgrid.server.live import Live
from deskgrid.server.metrics import Metrics
from deskgrid.server.repository import open_repository
from deskgrid.server.retention import clean_forever
from deskgrid.server.routes.handler import Services
from deskgrid.server.store import accounts, audit
from deskgrid.server.store.engine import SqlStore, Transaction, is_shared, sqlite_url
from deskgrid.server.store.migrate import migrate
from deskgrid.server.store.submissions import WORK
from deskgrid.server.torrents import make_torrents_forever
from deskgrid.settings import ServerSettings

__all__ = [
    "claimed",
    "database_url",
    "hub_address",
    "init_server",
    "listen",
    "listen_hub",
    "locked",
    "make_hub_link",
    "make_join_link",
    "make_login_link",
    "open_services",
    "run_server",
    "running_hub",
    "server_config",
]

_WEEK_S = 7 * 86400.0
_MOST_PROCESSES = 64
_ADDRESS_FILE = re.compile(r"address(-[0-9]+)?")
_log = structlog.get_logger("deskgrid.server")


async def init_server(home: Path, settings: ServerSettings, *, admin: str = "admin") -> User:
    """Make the grid in `home`: keys, database, and a first admin. Idempotent: what is there stays."""
    home.mkdir(parents=True, exist_ok=True, mode=0o700)
    make_authority(home / "authority", settings.name, _utc_now())
    migrate(database_url(home, settings))
    async with _opened(home, settings) as store:
        return await store.write(lambda tx: _ensure_admin(tx, admin))


def _ensure_admin(tx: Transaction, name: str) -> User:
    found = [user for user in accounts.list_accounts(tx) if user.name == name]
    return found[0] if found else accounts.add_account(tx, name, admin=True)


async def make_join_link(home: Path, settings: ServerSettings, *, uses: int = 1, lifetime_s: float = _WEEK_S) -> Link:
    """Return a link by which `uses` PCs may join. Works beside a running server."""
    return await _make_link(home, settings, accounts.JOIN, None, uses, lifetime_s)


async def make_hub_link(home: Path, settings: ServerSettings, *, uses: int = 1, lifetime_s: float = _WEEK_S) -> Link:
    """Return a link by which `uses` machines may become hubs. Works beside a running server."""
    return await _make_link(home, settings, accounts.HUB, None, uses, lifetime_s)


async def make_login_link(home: Path, settings: ServerSettings, user: str, *, lifetime_s: float = _WEEK_S) -> Link:
    """Return a one-use link by which `user` logs in. Works beside a running server. Raise NotFound for an unknown user."""
    return await _make_link(home, settings, accounts.LOGIN, user, 1, lifetime_s)


async def _make_link(home: Path, settings: ServerSettings, purpose: str, user: str | None, uses: int, lifetime_s: float) -> Link:
    _require_init(home)
    secret = make_secret()

    def keep(tx: Transaction) -> None:
        user_id = accounts.find_account(tx, user).id if user is not None else None
        accounts.add_secret(tx, hash_secret(secret), purpose=purpose, uses=uses, lifetime_s=lifetime_s, user=user_id)
        audit.note(tx, "operator", "", f"{purpose}-link", f"user {user}" if user else purpose)

    async with _opened(home, settings) as store:
        await store.write(keep)
    return Link(
        purpose=purpose,
        address=public_address(home, settings),
        authority=authority_fingerprint(home / "authority"),
        secret=secret,
    )


def database_url(home: Path, settings: ServerSettings) -> str:
    """Return the SQLAlchemy URL of the grid's database."""
    return settings.database or sqlite_url(home / "grid.sqlite")


def public_address(home: Path, settings: ServerSettings) -> str:
    """Return the HOST:PORT that others dial, or several with commas between: from the settings, or where servers listen (or did last)."""
    if settings.address:
        return settings.address
    found = dict.fromkeys(file.read_text().strip() for file in sorted(home.glob("address*")) if _ADDRESS_FILE.fullmatch(file.name))
    if found:
        return ",".join(found)
    host, port = parse_listen(settings.listen)
    return f"{socket.getfqdn() if host in ('0.0.0.0', '::') else host}:{port}"  # noqa: S104 - compared, not bound


def parse_listen(text: str) -> tuple[str, int]:
    """Return host and port of HOST:PORT. Raise InvalidInput otherwise."""
    host, _, port = text.rpartition(":")
    if not host or not port.isdecimal() or int(port) > 65535:
        raise InvalidInput(f"{text!r} is not HOST:PORT", where="listen", hint="as in 0.0.0.0:8470")
    return host.strip("[]"), int(port)


@contextlib.asynccontextmanager
async def open_services(home: Path, settings: ServerSettings, clock: Clock) -> AsyncIterator[Services]:
    """Open store and repository for one server process."""
    live = Live(spread=[WORK])
    repository = await open_repository(home, settings)
    url = database_url(home, settings)
    metrics = Metrics()
    store = SqlStore(url, clock, live.notify, measure=metrics.measure_batch)
    try:
        async with _hearing_of_others(url, store, live):
            yield Services(
                settings=settings,
                store=store,
                repository=repository,
                live=live,
                clock=clock,
                authority=Authority(home / "authority"),
                metrics=metrics,
            )
    finally:
        await store.close()
        await repository.close()


@contextlib.asynccontextmanager
async def _hearing_of_others(url: str, store: SqlStore, live: Live) -> AsyncIterator[None]:
    """Pass on what other processes change while the block runs. Over SQLite there are none."""
    if not is_shared(url):
        yield
        return
    listening = asyncio.create_task(listen_forever(url, Elsewhere(store, live), Random()))  # noqa: S311 - pauses
    try:
        yield
    finally:
        listening.cancel()
        await asyncio.wait([listening])


@contextlib.asynccontextmanager
async def running_hub(
    home: Path, services: Services, listener: socket.socket, address: str, *, place: int = 0
) -> AsyncIterator[OwnHub]:
    """Run the server's own hub on a listening socket until the block ends. Peers are told to dial `address`.

    `place`: which of the processes in this folder it is; each has a hub with a key of its own.
    """
    own = OwnHub(home, services, address, key_file=home / "hub" / _numbered("hub", place, ".key"))
    try:
        await own.start(listener)
        renewing = asyncio.create_task(own.renew_forever())
        try:
            yield own
        finally:
            renewing.cancel()
            await asyncio.wait([renewing])
    finally:
        await own.close()


async def run_server(home: Path, settings: ServerSettings, *, ready: Callable[[str, str], None] | None = None) -> None:
    """Serve until SIGTERM or SIGINT. `ready` is called once calls are answered, with HOST:PORT of the server and of its hub ("" if none).

    Raise OperatorError if a server runs in `home` already, unless the database is one that several may use.
    """
    _require_init(home)
    url = database_url(home, settings)
    with claimed(home, several=is_shared(url)) as place:
        migrate(url)
        await _run_server(home, settings, place, ready)


async def _run_server(home: Path, settings: ServerSettings, place: int, ready: Callable[[str, str], None] | None) -> None:
    listener = listen(settings)
    host, port = listener.getsockname()[:2]
    shown = f"{parse_listen(settings.listen)[0]}:{port}"
    public = public_or(shown, settings)
    hosts = (host, socket.gethostname(), *(one.rpartition(":")[0] for one in public.split(",")))
    clock = SystemClock()
    async with contextlib.AsyncExitStack() as running:
        running.enter_context(_told(home / _numbered("address", place), public, keep=place == 0))
        services = await running.enter_async_context(open_services(home, settings, clock))
        hub = ""
        if settings.hub_listen != "off":
            hub_listener = running.enter_context(listen_hub(settings, port))
            hub = hub_address(hub_listener, settings)
            await running.enter_async_context(running_hub(home, services, hub_listener, hub, place=place))
        if settings.metrics_listen:
            watched = running.enter_context(_listen(*parse_listen(settings.metrics_listen), hint="choose another metrics_listen"))
            await running.enter_async_context(serving_figures(services, watched))
        with locked(home / "authority" / "lock"):  # two processes that begin at once must not make two certificates
            chain, key = ensure_certificate(home / "authority", [name for name in hosts if name], _utc_now())
            config = server_config(make_app(services), chain, key)
            config.load()
            assert config.ssl is not None
            config.ssl.num_tickets = 0  # to take up a session again, which none of our clients does
        server = _Server(config, lambda: ready and ready(shown, hub))
        chores = do_chores_forever(services, Random())  # noqa: S311 - pauses
        torrents = make_torrents_forever(services)
        await _serve(server, listener, sweep_forever(services), chores, torrents, clean_forever(services))


@contextlib.contextmanager
def claimed(home: Path, *, several: bool = False) -> Iterator[int]:
    """Hold a place in a server's folder: 0, or with `several` the first that is free. The process's end, however it comes, frees it.

    Raise OperatorError if there is none.
    """
    for place in range(_MOST_PROCESSES if several else 1):
        try:
            with locked(home / _numbered("lock", place), wait=False):
                yield place
                return
        except BlockingIOError:
            continue
    hint = "end some" if several else "end it first; several servers in one folder need PostgreSQL"
    raise OperatorError(f"a server runs in {home} already", hint=hint)


@contextlib.contextmanager
def _told(file: Path, address: str, *, keep: bool) -> Iterator[None]:
    """Tell commands beside the server where it listens; after its end, too, if it is the first in its folder."""
    file.write_text(address)
    try:
        yield
    finally:
        if not keep:
            file.unlink(missing_ok=True)


def _numbered(name: str, place: int, suffix: str = "") -> str:
    return f"{name}-{place}{suffix}" if place else f"{name}{suffix}"


def server_config(app: ASGIApp, chain: Path, key: Path) -> uvicorn.Config:
    """Return how we serve: TLS always, our own logs, no lifespan protocol."""
    return uvicorn.Config(
        app,
        ssl_certfile=chain,
        ssl_keyfile=key,
        loop="none",
        http="httptools",
        log_config=None,
        access_log=False,
        lifespan="off",
        timeout_keep_alive=75,
        timeout_graceful_shutdown=3,
        server_header=False,
        proxy_headers=False,
    )


def public_or(shown: str, settings: ServerSettings) -> str:
    """Return the address that others dial, given the one that is listened on."""
    host, port = parse_listen(shown)
    return settings.address or (f"{socket.getfqdn()}:{port}" if host in ("0.0.0.0", "::") else shown)  # noqa: S104


class _Server(uvicorn.Server):
    """A server that tells when it answers, and leaves signals to us."""

    def __init__(self, config: uvicorn.Config, ready: Callable[[], object]) -> None:
        super().__init__(config)
        self._ready = ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._ready()

    @contextlib.contextmanager
    def capture_signals(self):  # type: ignore[no-untyped-def]
        yield


async def _serve(server: _Server, listener: socket.socket, *loops: Coroutine[None, None, None]) -> None:
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        with contextlib.suppress(NotImplementedError):  # Windows: Ctrl-C arrives as KeyboardInterrupt
            loop.add_signal_handler(number, lambda: setattr(server, "should_exit", True))
    async with asyncio.TaskGroup() as tasks:
        running = [tasks.create_task(work) for work in loops]
        await server.serve(sockets=[listener])
        for task in running:
            task.cancel()


def listen(settings: ServerSettings) -> socket.socket:
    """Return the socket to serve on. Raise OperatorError if the address cannot be had."""
    return _listen(*parse_listen(settings.listen), hint="choose another port with --listen")


def listen_hub(settings: ServerSettings, server_port: int) -> socket.socket:
    """Return the socket of the server's hub. Raise OperatorError if the address that the settings name cannot be had.

    Without settings it is the port after the server's, or, if that is taken, a free one: peers are told which.
    """
    if settings.hub_listen:
        return _listen(*parse_listen(settings.hub_listen), hint="choose another port with --hub-listen")
    host, wanted = parse_listen(settings.listen)
    if wanted == 0 or server_port == 65535:
        return _listen(host, 0)
    try:
        return _listen(host, server_port + 1)
    except OperatorError as error:
        _log.warning("the hub takes another port", error=error.message)
        return _listen(host, 0)


def hub_address(listener: socket.socket, settings: ServerSettings) -> str:
    """Return the HOST:PORT that peers dial for the server's hub: at the host of the server's address, unless settings say otherwise."""
    if settings.hub_address:
        return settings.hub_address
    host, _ = parse_listen(settings.hub_listen or settings.listen)
    host, _ = parse_listen(public_or(f"{_bracketed(host)}:0", settings))
    return f"{_bracketed(host)}:{listener.getsockname()[1]}"


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def _listen(host: str, port: int, *, hint: str = "") -> socket.socket:
    # The protocol must be named: asyncio turns Nagle's delay off only for sockets that say they are TCP, and leaving it on
    # costs 40 ms a call.
    server = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        server.bind((host, port))
        server.listen(1024)
    except OSError as error:
        server.close()
        raise OperatorError(f"cannot listen on {host}:{port}: {error.strerror}", hint=hint) from error
    return server


@contextlib.asynccontextmanager
async def _opened(home: Path, settings: ServerSettings) -> AsyncIterator[SqlStore]:
    store = SqlStore(database_url(home, settings), SystemClock())
    try:
        yield store
    finally:
        await store.close()


def _require_init(home: Path) -> None:
    if not (home / "authority" / "authority.pem").exists():
        raise InvalidInput(f"there is no grid in {home}", hint="deskgrid server init")


def _utc_now() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC)
