"""Disks and what is said of them: who vouches for which, and which must not be started any more."""

from __future__ import annotations

from deskgrid.core.manifests import read_bundle, read_trusted
from deskgrid.model import wire
from deskgrid.model.manifests import Bundle, DiskDetail, Revocation
from deskgrid.server.routes.handler import Call, reads, writes
from deskgrid.server.store import manifests
from deskgrid.server.store.engine import Transaction
from deskgrid.server.store.submissions import CHORES


@reads(wire.LIST_DISKS)
def list_disks(tx: Transaction, call: Call[wire.Nothing]) -> wire.DiskList:
    return wire.DiskList(tuple(manifests.list_disks(tx, call.caller, **call.query)))


@reads(wire.GET_DISK)
def get_disk(tx: Transaction, call: Call[wire.Nothing]) -> DiskDetail:
    return manifests.find_disk(tx, call.caller, call.path["reference"])


@writes(wire.ENDORSE_DISK)
def endorse_disk(tx: Transaction, call: Call[wire.EndorseDisk]) -> DiskDetail:
    body, grid = call.body, call.settings.name
    sign = call.authority.sign_statement
    return manifests.endorse(tx, call.caller, call.path["reference"], body.endorser, body.lifetime_s, grid=grid, sign=sign)


@writes(wire.WITHDRAW_DISK)
def withdraw_disk(tx: Transaction, call: Call[wire.Nothing]) -> DiskDetail:
    return manifests.withdraw(tx, call.caller, call.path["reference"], call.path["endorser"])


@writes(wire.REVOKE_DISK)
def revoke_disk(tx: Transaction, call: Call[wire.RevokeDisk]) -> Revocation:
    grid, sign = call.settings.name, call.authority.sign_statement
    said = manifests.revoke(tx, call.caller, call.path["reference"], call.body.reason, grid=grid, sign=sign)
    tx.topics.append(CHORES)
    return said


@reads(wire.GET_BUNDLE)
def get_bundle(tx: Transaction, call: Call[wire.Nothing]) -> Bundle:
    authority = call.authority.pem.decode()
    return manifests.bundle_of(tx, call.caller, call.path["reference"], grid=call.settings.name, authority=authority)


@writes(wire.TAKE_BUNDLE)
def take_bundle(tx: Transaction, call: Call[Bundle]) -> wire.DiskList:
    origin, said = read_bundle(call.body, read_trusted(call.settings.trusted_grids), now=tx.now)
    grid, sign = call.settings.name, call.authority.sign_statement
    found = manifests.take_in(tx, call.caller, origin, said, grid=grid, sign=sign)
    tx.topics.append(CHORES)
    return wire.DiskList(tuple(found))
