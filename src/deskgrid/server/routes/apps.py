"""Apps: named, versioned things to run."""

from __future__ import annotations

from deskgrid.model import wire
from deskgrid.model.apps import App
from deskgrid.server.routes.handler import Call, reads, writes
from deskgrid.server.store import apps
from deskgrid.server.store.engine import Transaction


@writes(wire.REGISTER_APP)
def register_app(tx: Transaction, call: Call[wire.RegisterApp]) -> App:
    return apps.register_app(tx, call.caller, call.body)


@reads(wire.LIST_APPS)
def list_apps(tx: Transaction, call: Call[wire.Nothing]) -> wire.AppList:
    return wire.AppList(apps.list_apps(tx, call.caller))


@reads(wire.GET_APP)
def get_app(tx: Transaction, call: Call[wire.Nothing]) -> App:
    return apps.find_app(tx, call.caller, call.path["reference"])


@writes(wire.REMOVE_APP)
def remove_app(tx: Transaction, call: Call[wire.Nothing]) -> wire.Nothing:
    apps.remove_app(tx, call.caller, call.path["reference"])
    return wire.Nothing()
