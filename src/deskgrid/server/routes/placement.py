"""Placements: what users want of their data, and which workers have it."""

from __future__ import annotations

import msgspec
from starlette.requests import Request as HttpRequest

from deskgrid.core.rights import Thing
from deskgrid.errors import InvalidInput, NotFound
from deskgrid.model import wire
from deskgrid.model.placement import Placement
from deskgrid.server.routes.handler import Call, Services, reads, serves, writes
from deskgrid.server.routes.jobs import changed
from deskgrid.server.store import accounts, data, placement
from deskgrid.server.store.engine import Transaction
from deskgrid.server.store.submissions import WORK

_MOST_S = 100 * 365 * 86400.0


@writes(wire.PLACE_DATA)
def place_data(tx: Transaction, call: Call[wire.PlaceData]) -> Placement:
    wanted = call.body
    attributes = wanted.attributes
    if wanted.lifetime_s:
        if not 0 < wanted.lifetime_s < _MOST_S:  # what is no number is not either
            raise InvalidInput("a lifetime is some seconds, and fewer than a hundred years have", where="lifetime_s")
        attributes = msgspec.structs.replace(attributes, expires_at=tx.now + wanted.lifetime_s)
    found = placement.place(tx, call.caller, wanted.pattern, attributes)
    tx.topics.append(WORK)  # idle workers are told what to hold
    return found


@reads(wire.LIST_PLACEMENTS)
def list_placements(tx: Transaction, call: Call[wire.Nothing]) -> wire.PlacementList:
    return wire.PlacementList(placement.list_placements(tx, call.caller))


@writes(wire.REMOVE_PLACEMENT)
def remove_placement(tx: Transaction, call: Call[wire.Nothing]) -> wire.Nothing:
    placement.remove_placement(tx, call.caller, call.number("placement"))
    tx.topics.append(WORK)
    return wire.Nothing()


@serves(wire.LIST_HOLDERS)
async def list_holders(services: Services, call: Call[wire.Nothing], _http: HttpRequest) -> wire.HolderList:
    reference = call.path["reference"]

    def read(tx: Transaction) -> wire.HolderList:
        found = data.find_data(tx, call.caller, reference)
        thing = Thing(owner_id=found.owner_id, visibility=found.visibility, group=found.group)
        accounts.require(
            tx,
            call.caller,
            wire.LIST_HOLDERS.name,
            thing,
            see=wire.GET_DATA.name,
            missing=NotFound(f"there is no data {reference!r}"),
        )
        return wire.HolderList(placement.holders(tx, found, services.settings.lease_s))

    found = await services.store.read(lambda tx: data.find_data(tx, call.caller, reference))
    return await changed(services, call, [placement.copies_topic(found.id)], read, wire.holders_mark)
