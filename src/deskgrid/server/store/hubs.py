"""Hubs as the store knows them: where peers register. A hub is alive while it says so."""

from __future__ import annotations

import re

import sqlalchemy as sa

from deskgrid.errors import Conflict, InvalidInput, NotFound
from deskgrid.model.ids import Sha256
from deskgrid.model.overlay import Hub, hub_peer
from deskgrid.model.wire import HubDetail
from deskgrid.server.store.engine import Transaction
from deskgrid.server.store.schema import hub

__all__ = ["HUBS", "add_hub", "add_own_hub", "alive_hubs", "end_hub", "find_hub", "list_hubs", "remove_hub", "renew_hub"]

HUBS = "hubs"
"""Topic: a hub came, moved, or came back."""
_NAME = re.compile(r"hub-([1-9][0-9]{0,17})\.deskgrid")
_ADDRESS = re.compile(
    r"(?P<host>\[[0-9A-Fa-f:.]{2,45}\]|[A-Za-z0-9](?:[A-Za-z0-9_.-]{0,251}[A-Za-z0-9])?):(?P<port>[1-9][0-9]{0,4})"
)
_NOWHERE = ("0.0.0.0", "[::]")  # noqa: S104 - refused, not bound


def add_hub(tx: Transaction, label: str) -> int:
    """Add a hub, which is not alive yet, under a name for people."""
    shown = "".join(letter for letter in label if letter.isprintable())[:128] or "hub"
    return _insert(tx, shown, own=False, key="")


def add_own_hub(tx: Transaction, key: Sha256) -> int:
    """Return the number of the hub inside a server, which is known by its key. Idempotent."""
    found: int | None = tx.value(sa.select(hub.c.id).where(hub.c.own.is_(True), hub.c.key == key))
    return _insert(tx, "server", own=True, key=key) if found is None else found


def _insert(tx: Transaction, label: str, *, own: bool, key: str) -> int:
    values = {"label": label, "own": own, "key": key, "joined_at": tx.now}
    added = tx.run(sa.insert(hub).values(address="", peers=0, expires_at=0.0, **values))
    return int(added.inserted_primary_key[0])  # type: ignore[index]


def renew_hub(tx: Transaction, hub_id: int, *, key: Sha256, address: str, peers: int, lifetime_s: float) -> None:
    """Note that a hub is there. Raise InvalidInput if nobody could dial its address."""
    _check_address(address)
    before = tx.row(sa.select(hub.c.address, hub.c.expires_at).where(hub.c.id == hub_id))
    values = {"key": key, "address": address, "peers": min(max(peers, 0), 1 << 30), "expires_at": tx.now + lifetime_s}
    tx.run(sa.update(hub).where(hub.c.id == hub_id).values(**values))
    if before is None or before.address != address or before.expires_at <= tx.now:
        tx.topics.append(HUBS)


def end_hub(tx: Transaction, hub_id: int) -> None:
    """Note that a hub ended in good order, so that nobody is sent there. Idempotent."""
    tx.run(sa.update(hub).where(hub.c.id == hub_id).values(peers=0, expires_at=tx.now))


def remove_hub(tx: Transaction, hub_id: int) -> None:
    """Forget a hub and its token; peers are not told of it any more. Raise NotFound, or Conflict for a server's own."""
    own = tx.value(sa.select(hub.c.own).where(hub.c.id == hub_id))
    if own is None:
        raise NotFound(f"there is no hub {hub_id}", hint="deskgrid hub list")
    if own:
        raise Conflict(f"hub {hub_id} is a server's own", hint='hub_listen = "off" in its server.toml')
    tx.run(sa.delete(hub).where(hub.c.id == hub_id))


def alive_hubs(tx: Transaction) -> tuple[Hub, ...]:
    """Return the hubs that are there."""
    rows = tx.rows(sa.select(hub.c.id, hub.c.address).where(hub.c.expires_at > tx.now).order_by(hub.c.id))
    return tuple(Hub(name=hub_peer(row.id), address=row.address) for row in rows)


def list_hubs(tx: Transaction) -> tuple[HubDetail, ...]:
    """Return all hubs that ever were, by number."""
    return tuple(
        HubDetail(
            hub=Hub(name=hub_peer(row.id), address=row.address),
            label=row.label,
            peers=row.peers if row.expires_at > tx.now else 0,
            alive=row.expires_at > tx.now,
        )
        for row in tx.rows(sa.select(hub).order_by(hub.c.id))
    )


def find_hub(tx: Transaction, name: str) -> int | None:
    """Return the number of a hub by the name in its certificate; None if it was removed. Raise InvalidInput for what is no name."""
    match = _NAME.fullmatch(name)
    if match is None:
        raise InvalidInput(f"there is no hub {name[:80]!r}", where="hub")
    found: int | None = tx.value(sa.select(hub.c.id).where(hub.c.id == int(match[1])))
    return found


def _check_address(address: str) -> None:
    match = _ADDRESS.fullmatch(address)
    if match is None or int(match["port"]) > 65535 or match["host"] in _NOWHERE:
        raise InvalidInput(
            f"{address[:80]!r} is nothing that peers can dial", where="address", hint="HOST:PORT, as hub.example.org:8471"
        )
