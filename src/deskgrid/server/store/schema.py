"""The tables. Times are seconds since 1970 by the store's clock; structs are kept as JSON text of their wire form."""

from __future__ import annotations

from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    Float,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    Text,
    UniqueConstraint,
)

__all__ = [
    "account",
    "attempt",
    "blob",
    "data",
    "hub",
    "idempotency",
    "job",
    "log_chunk",
    "membership",
    "metadata",
    "peer",
    "queue",
    "requirement",
    "secret",
    "team",
    "token",
    "upload",
    "worker",
]

metadata = MetaData(
    naming_convention={
        "ix": "ix_%(column_0_label)s",
        "uq": "uq_%(table_name)s_%(column_0_name)s",
        "fk": "fk_%(table_name)s_%(column_0_name)s",
        "pk": "pk_%(table_name)s",
    }
)

# SQLite gives out row numbers only for a column that is exactly INTEGER.
_Id = BigInteger().with_variant(Integer, "sqlite")


def _numbered(name: str, *columns: Column[object] | UniqueConstraint) -> Table:
    """Return a table whose ids are given out by the store and never used twice."""
    return Table(name, metadata, Column("id", _Id, primary_key=True, autoincrement=True), *columns, sqlite_autoincrement=True)


account = _numbered(
    "account",
    Column("name", String(64), nullable=False, unique=True),
    Column("admin", Boolean, nullable=False),
    Column("created_at", Float, nullable=False),
)

team = Table("team", metadata, Column("name", String(64), primary_key=True))
"""A group; `group` is a word of SQL."""

membership = Table(
    "membership",
    metadata,
    Column("team", ForeignKey("team.name", ondelete="CASCADE"), primary_key=True),
    Column("account_id", ForeignKey("account.id", ondelete="CASCADE"), primary_key=True),
)

worker = _numbered(
    "worker",
    Column("name", String(128), nullable=False),
    Column("joined_at", Float, nullable=False),
    Column("seen_at", Float, nullable=False),
    Column("left_at", Float),
    Column("paused", Boolean, nullable=False, default=False),
    Column("profile", Text),
    Column("cached", Text, nullable=False, default="[]"),
)

secret = Table(
    "secret",
    metadata,
    Column("hash", String(64), primary_key=True),
    Column("purpose", String(16), nullable=False),
    Column("account_id", ForeignKey("account.id", ondelete="CASCADE")),
    Column("uses_left", Integer, nullable=False),
    Column("expires_at", Float, nullable=False),
)

blob = Table(
    "blob",
    metadata,
    Column("sha256", String(64), primary_key=True),
    Column("size_bytes", BigInteger, nullable=False),
    Column("created_at", Float, nullable=False),
)

upload = _numbered(
    "upload",
    Column("holder", String(64), nullable=False),
    Column("sha256", String(64), nullable=False),
    Column("size_bytes", BigInteger, nullable=False),
    Column("complete", Boolean, nullable=False),
    Column("touched_at", Float, nullable=False, index=True),
    UniqueConstraint("holder", "sha256"),
)
"""Who sent (or is sending) which bytes: having sent them is the right to refer to them."""

data = _numbered(
    "data",
    Column("name", String(200), nullable=False, index=True),
    Column("version", Integer, nullable=False),
    Column("kind", String(16), nullable=False),
    Column("sha256", String(64), nullable=False, index=True),
    Column("size_bytes", BigInteger, nullable=False),
    Column("owner_id", ForeignKey("account.id"), nullable=False),
    Column("visibility", String(16), nullable=False),
    Column("created_at", Float, nullable=False),
    Column("disk", Text),
    Column("disk_sha256", String(64), index=True),
    UniqueConstraint("owner_id", "name", "version"),
)

requirement = _numbered("requirement", Column("key", String(400), nullable=False, unique=True))
"""A requirement class: the JSON of core.matching.Requirement."""

queue = Table(
    "queue",
    metadata,
    Column("class_id", ForeignKey("requirement.id"), primary_key=True),
    Column("owner_id", ForeignKey("account.id"), primary_key=True),
    Column("waiting", Integer, nullable=False),
)
"""How many jobs of a class and a user wait: changed in the same transaction as the job."""

job = _numbered(
    "job",
    Column("owner_id", ForeignKey("account.id"), nullable=False),
    Column("class_id", ForeignKey("requirement.id"), nullable=False),
    Column("state", String(16), nullable=False),
    Column("spec", Text, nullable=False),
    Column("disk", Text, nullable=False),
    Column("disk_blob", String(64), nullable=False, index=True),
    Column("disk_sha256", String(64), nullable=False),
    Column("context", String(64), index=True),
    Column("context_bytes", BigInteger),
    Column("result", String(64), index=True),
    Column("result_bytes", BigInteger),
    Column("exit_code", Integer),
    Column("message", Text, nullable=False, default=""),
    Column("created_at", Float, nullable=False),
    Column("finished_at", Float),
)
_waiting = job.c.state == "waiting"
Index("ix_job_waiting", job.c.class_id, job.c.owner_id, job.c.id, sqlite_where=_waiting, postgresql_where=_waiting)
Index("ix_job_owner", job.c.owner_id, job.c.id)
Index("ix_job_state", job.c.state, job.c.finished_at)

attempt = _numbered(
    "attempt",
    Column("job_id", ForeignKey("job.id"), nullable=False),
    Column("number", Integer, nullable=False),
    Column("worker_id", ForeignKey("worker.id"), nullable=False),
    Column("state", String(16), nullable=False),
    Column("leased_at", Float, nullable=False),
    Column("lease_expires_at", Float, nullable=False),
    Column("started_at", Float),
    Column("suspended_at", Float),
    Column("ended_at", Float),
    Column("exit_code", Integer),
    Column("reason", Text, nullable=False, default=""),
    Column("result", String(64), index=True),
    UniqueConstraint("job_id", "number"),
)
_live = attempt.c.state.in_(("leased", "running", "suspended"))
Index("ix_attempt_lease", attempt.c.lease_expires_at, sqlite_where=_live, postgresql_where=_live)
Index("ix_attempt_live_worker", attempt.c.worker_id, sqlite_where=_live, postgresql_where=_live)

hub = _numbered(
    "hub",
    Column("label", String(128), nullable=False),
    Column("own", Boolean, nullable=False),
    Column("key", String(64), nullable=False),
    Column("address", String(300), nullable=False),
    Column("peers", Integer, nullable=False),
    Column("joined_at", Float, nullable=False),
    Column("expires_at", Float, nullable=False),
)
"""`own`: inside a server process; it has no token and is known by its key."""

token = _numbered(
    "token",
    Column("hash", String(64), nullable=False, unique=True),
    Column("role", String(16), nullable=False),
    Column("account_id", ForeignKey("account.id", ondelete="CASCADE")),
    Column("worker_id", ForeignKey("worker.id", ondelete="CASCADE")),
    Column("attempt_id", ForeignKey("attempt.id", ondelete="CASCADE"), index=True),
    Column("hub_id", ForeignKey("hub.id", ondelete="CASCADE")),
    Column("label", String(128), nullable=False),
    Column("created_at", Float, nullable=False),
    Column("expires_at", Float),
    Column("revoked_at", Float),
)
"""Of a user, a worker, an attempt (the job's own token) or a hub."""

peer = _numbered(
    "peer",
    Column("kind", String(16), nullable=False),
    Column("name", String(100), nullable=False),
    Column("key", String(64), nullable=False),
    Column("account_id", ForeignKey("account.id", ondelete="CASCADE")),
    Column("attempt_id", ForeignKey("attempt.id", ondelete="CASCADE"), unique=True),
    Column("worker_id", ForeignKey("worker.id", ondelete="CASCADE"), index=True),
    Column("offers", Text, nullable=False),
    Column("hub_id", ForeignKey("hub.id", ondelete="SET NULL")),
    Column("connections", Text, nullable=False),
    Column("registered_at", Float, nullable=False),
    Column("expires_at", Float, nullable=False, index=True),
    UniqueConstraint("name", "key"),
)
Index("ix_peer_account", peer.c.account_id, peer.c.kind)
"""One end of the overlay. It is there while it has not expired and, of an attempt, while that is live; `account_id` is the user whom it
acts for, `worker_id` the worker that holds it. A key is not enough to name it: anybody may send a public key that is not his."""

log_chunk = Table(
    "log_chunk",
    metadata,
    Column("attempt_id", ForeignKey("attempt.id"), primary_key=True),
    Column("stream", String(16), primary_key=True),
    Column("start", BigInteger, primary_key=True),
    Column("data", LargeBinary, nullable=False),
)

idempotency = Table(
    "idempotency",
    metadata,
    Column("principal", String(80), primary_key=True),
    Column("key", String(64), primary_key=True),
    Column("answer", LargeBinary, nullable=False),
    Column("created_at", Float, nullable=False, index=True),
)
