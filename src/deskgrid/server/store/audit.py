"""Who did what: a row for every call by which a person changed something, written in the transaction of the change."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec
import sqlalchemy as sa

from deskgrid.core.rights import RULES
from deskgrid.model.users import AuditEntry, Role
from deskgrid.server.store.accounts import Caller
from deskgrid.server.store.engine import Transaction
from deskgrid.server.store.schema import audit
from deskgrid.server.store.statement import Statement

__all__ = ["forget", "list_entries", "note", "note_call"]

_LONGEST_DETAIL = 1000
_PEOPLE = frozenset({Role.USER, Role.ADMIN, Role.JOB})
_COLUMNS = ("at", "principal", "name", "action", "object", "detail", "request")
_NOTE = Statement(sa.insert(audit).values(**{name: sa.bindparam(name) for name in _COLUMNS}))


def note(tx: Transaction, principal: str, name: str, action: str, what: str, detail: str = "", request: str = "") -> None:
    """Keep that somebody did something to an object."""
    texts = {"principal": principal[:80], "name": name[:128], "action": action[:40], "object": _clean(what)[:200]}
    tx.change(_NOTE, at=tx.now, **texts, detail=detail[:_LONGEST_DETAIL], request=request[:64])


def note_call(
    tx: Transaction, caller: Caller | None, action: str, path: Mapping[str, str], body: Any, answer: Any, request: str
) -> None:
    """Keep a call that succeeded, if the table of rights says so. `caller`: None for one that came with a secret."""
    rule = RULES[action]
    if not rule.audited or (caller is not None and caller.role not in _PEOPLE):
        return
    principal, name = (caller.principal, caller.name) if caller is not None else _newcomer(body, answer)
    told = {field: getattr(body, field, None) for field in rule.tells}
    said = {field: value for field, value in told.items() if value not in (None, "", ())}
    detail = msgspec.json.encode(said).decode() if said else ""
    note(tx, principal, name, action, f"{rule.kind} {_named(path, answer)}".strip(), detail, request)


def _newcomer(body: Any, answer: Any) -> tuple[str, str]:
    """Return who came in by a secret."""
    if getattr(answer, "user", None) is not None:
        return f"user:{answer.user.id}", answer.user.name
    for kind in ("worker", "hub"):
        if hasattr(answer, f"{kind}_id"):
            return f"{kind}:{getattr(answer, f'{kind}_id')}", _clean(getattr(body, "name", ""))
    return "nobody", ""


def _named(path: Mapping[str, str], answer: Any) -> str:
    """Return what a call was about: what its path names, or what it made."""
    if path:
        return " ".join(path.values())
    if hasattr(answer, "version"):
        return f"{answer.name}@{answer.version}"
    for field in ("id", "name", "worker_id", "hub_id"):
        if hasattr(answer, field):
            return str(getattr(answer, field))
    return answer.user.name if hasattr(answer, "user") else ""


def _clean(text: str) -> str:
    return "".join(letter for letter in text if letter.isprintable())


def list_entries(
    tx: Transaction, *, user: str = "", since: float | None = None, before: int | None = None, limit: int = 100
) -> tuple[tuple[AuditEntry, ...], bool]:
    """Return at most `limit` entries, newest first, and whether there are older ones. `user`: a name; of his jobs' tokens, too."""
    query = sa.select(audit).order_by(audit.c.id.desc()).limit(limit + 1)
    if user:
        people = sa.or_(audit.c.principal.like("user:%"), audit.c.principal.like("job:%"))
        query = query.where(audit.c.name == user, people)
    if since is not None:
        query = query.where(audit.c.at >= since)
    if before is not None:
        query = query.where(audit.c.id < before)
    rows = tx.rows(query)
    entries = tuple(AuditEntry(id=row.id, **{name: getattr(row, name) for name in _COLUMNS}) for row in rows[:limit])
    return entries, len(rows) > limit


def forget(tx: Transaction, before: float, limit: int) -> int:
    """Forget entries made before a time; return how many."""
    old = sa.select(audit.c.id).where(audit.c.at < before).order_by(audit.c.at).limit(limit)
    return int(tx.run(sa.delete(audit).where(audit.c.id.in_(old.scalar_subquery()))).rowcount)
