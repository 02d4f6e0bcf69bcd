"""What is said of disks: who vouches for which, and which must not be started any more. Who may say what: core/manifests.py."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import msgspec
import sqlalchemy as sa

from deskgrid.core.manifests import GRID, check_endorser, elsewhere, read_own
from deskgrid.core.rights import Thing
from deskgrid.errors import Conflict, Forbidden, InvalidInput, NotFound
from deskgrid.model.data import Data, DataKind, Disk
from deskgrid.model.ids import Sha256, is_sha256
from deskgrid.model.manifests import Bundle, DiskDetail, Manifest, Revocation
from deskgrid.model.users import Role
from deskgrid.server.store import data as repository
from deskgrid.server.store.accounts import Caller, check_group, require
from deskgrid.server.store.engine import Transaction
from deskgrid.server.store.schema import account, data, manifest, revocation

__all__ = [
    "EVERYBODY",
    "Signer",
    "any_revoked",
    "bundle_of",
    "check_not_revoked",
    "endorse",
    "endorsers",
    "find_disk",
    "forget_expired",
    "list_disks",
    "revocations",
    "revoke",
    "statements_for",
    "take_in",
    "withdraw",
]

Signer = Callable[[Manifest | Revocation], str]
_LONGEST_S = 2 * 366 * 86400.0
_LONGEST_REASON = 500
_AT_ONCE = 500
EVERYBODY = 0
"""The owner of all disks with a content."""


def endorse(
    tx: Transaction, caller: Caller, reference: str, endorser: str, lifetime_s: float, *, grid: str, sign: Signer
) -> DiskDetail:
    """Vouch for a disk, for `endorser` (empty: the caller himself), in the place of what that one said before.

    Raise NotFound, InvalidInput, Forbidden (not the caller's to say), Conflict (a revoked disk).
    """
    found = _disk(tx, caller, reference)
    name = _spoken_for(tx, caller, endorser)
    if not 0 < lifetime_s <= _LONGEST_S:
        raise InvalidInput("it is said for some time", where="lifetime_s", hint=f"at most {_LONGEST_S / 86400:.0f} days")
    check_not_revoked(tx, found)
    said = Manifest(
        grid=grid,
        name=f"{found.name}@{found.version}",
        disk=_content(found),
        endorser=name,
        by=caller.name,
        issued_at=tx.now,
        expires_at=tx.now + lifetime_s,
    )
    _keep(tx, said, sign)
    return find_disk(tx, caller, reference)


def withdraw(tx: Transaction, caller: Caller, reference: str, endorser: str) -> DiskDetail:
    """Vouch for a disk no more. Raise NotFound, InvalidInput, Forbidden."""
    found = _disk(tx, caller, reference)
    # What another grid said is an admin's to put away.
    foreign = "@" in endorser and caller.role is Role.ADMIN
    name = endorser if foreign else _spoken_for(tx, caller, endorser)
    mine = (manifest.c.disk_sha256 == _content(found).sha256, manifest.c.endorser == name, manifest.c.expires_at > tx.now)
    # It may be carried here once more: the row stays, so that what was said before today does not count again.
    ended = (
        sa.update(manifest).where(*mine).values(issued_at=tx.now, expires_at=tx.now)
        if foreign
        else sa.delete(manifest).where(*mine)
    )
    if not tx.run(ended).rowcount:
        raise NotFound(f"{name} does not vouch for {reference}", hint=f"deskgrid disk show {reference}")
    tx.memo.pop("board", None)
    return find_disk(tx, caller, reference)


def revoke(tx: Transaction, caller: Caller, reference: str, reason: str, *, grid: str, sign: Signer) -> Revocation:
    """Let a disk not be started any more. Raise NotFound, InvalidInput, Forbidden. Idempotent.

    What is in a disk is its owner's word until a PC unpacks it. So by a name, the disks of that owner with this content are meant;
    everybody's, where an admin speaks of his own disk, or gives the sha256.
    """
    if not reason.isprintable() or not 0 < len(reason) <= _LONGEST_REASON:
        raise InvalidInput("say why, in a line", where="reason", hint=f"at most {_LONGEST_REASON} characters")
    saying = _Saying(tx, caller, reason, grid, sign)
    if not is_sha256(reference) or caller.role is not Role.ADMIN:
        found = repository.find_data(tx, caller, reference)
        _require_revoke(tx, caller, found)
        return saying.of(_content(_disk(tx, caller, reference)).sha256, found.owner_id)
    for row in tx.rows(sa.select(data.c.disk_sha256, data.c.owner_id).where(data.c.sha256 == reference, data.c.disk.is_not(None))):
        saying.of(Sha256(row.disk_sha256), row.owner_id)  # those that are packed so
    return saying.of(Sha256(reference), EVERYBODY)


def _require_revoke(tx: Transaction, caller: Caller, found: Data) -> None:
    thing = Thing(owner_id=found.owner_id, visibility=found.visibility, group=found.group)
    require(tx, caller, "revoke_disk", thing, see="get_data", missing=NotFound(f"there is no disk {found.name!r}"))


class _Saying(NamedTuple):
    """A revocation that a caller makes, of one disk or more."""

    tx: Transaction
    caller: Caller
    reason: str
    grid: str
    sign: Signer

    def of(self, disk: Sha256, owner_id: int) -> Revocation:
        """Say it of the disks of an owner with a content, unless it was said."""
        tx, caller = self.tx, self.caller
        if caller.role is Role.ADMIN and owner_id == caller.user_id:
            owner_id = EVERYBODY
        known = revocations(tx, [(disk, owner_id)]).get((disk, owner_id))
        if known is not None:
            return known
        owner = tx.value(sa.select(account.c.name).where(account.c.id == owner_id)) if owner_id != EVERYBODY else ""
        said = Revocation(grid=self.grid, disk_sha256=disk, reason=self.reason, by=caller.name, at=tx.now, owner=owner)
        key = {"disk_sha256": disk, "owner_id": owner_id}
        values = {"by": said.by, "at": said.at, "reason": said.reason, "signed": self.sign(said)}
        tx.insert_if_new(revocation, [*key], **key, **values)
        tx.memo.pop("board", None)
        return said


def any_revoked(tx: Transaction) -> bool:
    """Tell whether any disk was ever revoked."""
    return tx.row(sa.select(revocation.c.disk_sha256).limit(1)) is not None


def check_not_revoked(tx: Transaction, found: Data) -> None:
    """Raise Conflict if a disk must not be started any more."""
    said = _first(revocations(tx, _keys(found)), found)
    if said is not None:
        raise Conflict(f"this disk was revoked by {said.by}: {said.reason}", hint="deskgrid disk list shows others")


# What is asked


def find_disk(tx: Transaction, caller: Caller, reference: str) -> DiskDetail:
    """Find a visible disk, and what is said of it. Raise NotFound, or InvalidInput if it is other data."""
    return _detailed(tx, [_disk(tx, caller, reference)])[0]


def list_disks(
    tx: Transaction, caller: Caller, *, words: str = "", os: str = "", arch: str = "", endorser: str = ""
) -> list[DiskDetail]:
    """Return visible disks by name and version: those with all words in name, owner, system or description, such a system and such an endorser."""
    found = _detailed(tx, repository.list_data(tx, caller, DataKind.DISK.value))
    return [
        one
        for one in found
        if all(word in _text(one.data) for word in words.lower().split())
        and _content(one.data).os.lower().startswith(os.lower())
        and arch in ("", _content(one.data).arch)
        and (not endorser or any(said.endorser == endorser for said in one.manifests))
    ]


def _text(found: Data) -> str:
    disk = _content(found)
    return f"{found.name} {found.owner} {disk.os} {disk.arch} {disk.about}".lower()


def _detailed(tx: Transaction, found: Iterable[Data]) -> list[DiskDetail]:
    wanted = list(found)
    disks = {_content(one).sha256 for one in wanted}
    said = _manifests(tx, disks)
    revoked = revocations(tx, (key for one in wanted for key in _keys(one)))
    return [
        DiskDetail(data=one, manifests=tuple(said.get(_content(one).sha256, ())), revocation=_first(revoked, one)) for one in wanted
    ]


def endorsers(tx: Transaction, disks: Iterable[Sha256]) -> dict[Sha256, frozenset[str]]:
    """Return who vouches for which of these disks now."""
    found: dict[Sha256, set[str]] = {}
    for chunk in _chunks(disks):
        here = manifest.c.disk_sha256.in_(chunk)
        for row in tx.rows(sa.select(manifest.c.disk_sha256, manifest.c.endorser).where(here, manifest.c.expires_at > tx.now)):
            found.setdefault(Sha256(row.disk_sha256), set()).add(row.endorser)
    return {disk: frozenset(names) for disk, names in found.items()}


def statements_for(tx: Transaction, disk: Sha256, wanted: Iterable[str]) -> tuple[str, ...]:
    """Return the signed statements by which some of `wanted` vouch for a disk now."""
    here = (manifest.c.disk_sha256 == disk, manifest.c.endorser.in_(list(wanted)), manifest.c.expires_at > tx.now)
    return tuple(row.signed for row in tx.rows(sa.select(manifest.c.signed).where(*here).order_by(manifest.c.id)))


def revocations(tx: Transaction, disks: Iterable[tuple[Sha256, int]]) -> dict[tuple[Sha256, int], Revocation]:
    """Return which of these disks, with their owners, must not be started, and why."""
    wanted, said = set(disks), {}
    for chunk in _chunks(disk for disk, _ in wanted):
        for row in tx.rows(sa.select(revocation).where(revocation.c.disk_sha256.in_(chunk))):
            said[row.disk_sha256, row.owner_id] = row.signed
    found = {one: said.get((one[0], EVERYBODY)) or said.get(one) for one in wanted}
    read = {one: read_own(signed) for one, signed in found.items() if signed is not None}
    return {one: statement for one, statement in read.items() if isinstance(statement, Revocation)}


def _keys(found: Data) -> tuple[tuple[Sha256, int], ...]:
    """Return by what a disk may be revoked: its content, its package."""
    return (_content(found).sha256, found.owner_id), (found.blob.sha256, found.owner_id)


def _first(revoked: Mapping[tuple[Sha256, int], Revocation], found: Data) -> Revocation | None:
    return next((revoked[key] for key in _keys(found) if key in revoked), None)


def _manifests(tx: Transaction, disks: Iterable[Sha256]) -> dict[str, list[Manifest]]:
    found: dict[str, list[Manifest]] = {}
    for chunk in _chunks(disks):
        here = (manifest.c.disk_sha256.in_(chunk), manifest.c.expires_at > tx.now)
        for row in tx.rows(sa.select(manifest).where(*here).order_by(manifest.c.endorser)):
            said = read_own(row.signed)
            if isinstance(said, Manifest):
                found.setdefault(row.disk_sha256, []).append(said)
    return found


def _chunks(disks: Iterable[Sha256]) -> Iterable[list[Sha256]]:
    wanted = sorted(set(disks))
    return (wanted[start : start + _AT_ONCE] for start in range(0, len(wanted), _AT_ONCE))


def forget_expired(tx: Transaction) -> None:
    """Forget manifests that have ended, and so have all that may have been said before them: one carried here later says nothing new."""
    tx.run(sa.delete(manifest).where(manifest.c.expires_at < tx.now, manifest.c.issued_at < tx.now - _LONGEST_S))


# Other grids


def bundle_of(tx: Transaction, caller: Caller, reference: str, *, grid: str, authority: str) -> Bundle:
    """Return what this grid itself says of a disk, to carry to another. Raise NotFound, InvalidInput, Conflict (its owner revoked it)."""
    found = _disk(tx, caller, reference)
    revoked = _first(revocations(tx, _keys(found)), found)
    if revoked is not None and revoked.owner:
        raise Conflict(f"{revoked.owner} revoked this disk", hint="what an admin revokes is news for other grids")
    own = (manifest.c.disk_sha256 == _content(found).sha256, manifest.c.expires_at > tx.now, ~manifest.c.endorser.contains("@"))
    said = [row.signed for row in tx.rows(sa.select(manifest.c.signed).where(*own).order_by(manifest.c.endorser))]
    ended = (revocation.c.disk_sha256.in_([disk for disk, _ in _keys(found)]), revocation.c.owner_id == EVERYBODY)
    said += [row.signed for row in tx.rows(sa.select(revocation.c.signed).where(*ended))]
    if not said:
        raise NotFound(f"nobody here vouches for {reference}", hint=f"deskgrid disk endorse {reference}")
    return Bundle(grid=grid, authority=authority, statements=tuple(said))


def take_in(
    tx: Transaction, caller: Caller, origin: str, said: Iterable[Manifest | Revocation], *, grid: str, sign: Signer
) -> list[DiskDetail]:
    """Keep what a trusted grid, known here as `origin`, says of disks that are here, unless it has said something newer; return them.

    Raise NotFound (the caller has no such disk here), Conflict (it is revoked), Forbidden (a revocation, see revoke).
    """
    found = []
    for statement in said:
        if isinstance(statement, Manifest):
            found.append(_take_manifest(tx, caller, origin, statement, grid, sign))
        else:
            reason = f"{statement.reason} ({statement.by} of {origin})"[:_LONGEST_REASON]
            found.append(_take_revocation(tx, statement, _Saying(tx, caller, reason, grid, sign)))
    return _detailed(tx, {one.id: one for one in found}.values())


def _take_revocation(tx: Transaction, statement: Revocation, saying: _Saying) -> Data:
    caller = saying.caller
    if statement.owner:
        raise Forbidden("it is of one owner's disks: that is for his own grid")
    here = _disk(tx, caller, statement.disk_sha256)
    _require_revoke(tx, caller, here)
    saying.of(statement.disk_sha256, EVERYBODY if caller.role is Role.ADMIN else here.owner_id)
    return here


def _take_manifest(tx: Transaction, caller: Caller, origin: str, statement: Manifest, grid: str, sign: Signer) -> Data:
    all_here = [one for one in repository.find_all(tx, caller, statement.disk.sha256) if one.disk is not None]
    here = next((one for one in all_here if _facts(_content(one)) == _facts(statement.disk)), None)
    if here is None:
        name = _disk(tx, caller, statement.disk.sha256).name
        raise NotFound(f"{name} is declared differently here", hint="import the disk anew, as its manifest says")
    check_not_revoked(tx, here)
    endorser = elsewhere(statement.endorser, origin)
    mine = (manifest.c.disk_sha256 == statement.disk.sha256, manifest.c.endorser == endorser)
    if tx.row(sa.select(manifest.c.id).where(*mine, manifest.c.issued_at >= statement.issued_at)) is None:
        by = f"{statement.by}@{origin}"[:128]
        _keep(tx, msgspec.structs.replace(statement, grid=grid, endorser=endorser, by=by), sign)
    return here


def _facts(disk: Disk) -> tuple[object, ...]:
    return disk.sha256, disk.size_bytes, disk.virtual_bytes, disk.format, disk.context_label


# Rows


def _disk(tx: Transaction, caller: Caller, reference: str) -> Data:
    found = repository.find_data(tx, caller, reference)
    if found.disk is None:
        raise InvalidInput(f"{reference} is a {found.kind}, not a disk", hint="deskgrid disk list")
    return found


def _content(found: Data) -> Disk:
    if found.disk is None:
        raise ValueError(f"data {found.id} is not a disk")
    return found.disk


def _spoken_for(tx: Transaction, caller: Caller, endorser: str) -> str:
    """Return whom a caller speaks for. Raise InvalidInput, Forbidden."""
    wanted = endorser or f"user:{caller.name}"
    check_endorser(wanted, "endorser")
    kind, _, name = wanted.partition(":")
    if kind == "group" and "@" not in name:
        check_group(tx, caller, name)
    elif (wanted == GRID and caller.role is not Role.ADMIN) or (kind == "user" and name != caller.name) or "@" in wanted:
        raise Forbidden(f"{caller.name} does not speak for {wanted}")
    return wanted


def _keep(tx: Transaction, said: Manifest, sign: Signer) -> None:
    mine = {"disk_sha256": said.disk.sha256, "endorser": said.endorser}
    values = {"by": said.by, "issued_at": said.issued_at, "expires_at": said.expires_at, "signed": sign(said)}
    tx.insert_if_new(manifest, [*mine], **mine, **values)
    tx.run(sa.update(manifest).where(*(manifest.c[name] == value for name, value in mine.items())).values(**values))
    tx.memo.pop("board", None)
