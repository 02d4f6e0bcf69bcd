"""The calls that a peer makes to the server, over whatever transport its program has."""

from __future__ import annotations

from typing import Any, Protocol, TypeVar

from deskgrid.model import wire

__all__ = ["ServerCalls"]

A = TypeVar("A")
_LONGEST_HOLD_S = 60.0


class Caller(Protocol):
    """See client.transport.Transport, which is one."""

    async def call(
        self,
        route: wire.Route[Any, A],
        body: Any = None,
        *,
        path: dict[str, object] | None = None,
        query: dict[str, object] | None = None,
        wait_s: float = 0.0,
        key: str | None = None,
    ) -> A:
        """Make one call and return its answer. Raise DeskgridError."""
        ...


class ServerCalls:
    """What overlay.peer.Calls asks for."""

    def __init__(self, transport: Caller) -> None:
        self._transport = transport

    async def register(self, request: wire.RegisterPeer) -> wire.PeerAnswer:
        """Make a peer known, or renew it. Raise DeskgridError."""
        return await self._transport.call(wire.REGISTER_PEER, request)

    async def ask_grant(self, request: wire.AskGrant, wait_s: float) -> wire.GrantAnswer:
        """Ask for a grant; the server may hold its answer for `wait_s`, at most a minute, while there is none. Raise DeskgridError."""
        return await self._transport.call(wire.ASK_GRANT, request, wait_s=min(max(wait_s, 0.0), _LONGEST_HOLD_S))

    async def remove(self, peer_id: int) -> None:
        """Forget a peer. Raise DeskgridError."""
        await self._transport.call(wire.REMOVE_PEER, path={"peer": peer_id})
