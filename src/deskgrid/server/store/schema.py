"""The tables. Times are seconds since 1970 by the store's clock; structs are kept as JSON text of their wire form."""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa
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

from deskgrid.model.jobs import JobState
from deskgrid.server.store.statement import constant

__all__ = [
    "IS_LIVE",
    "IS_UNSTARTED",
    "WITHOUT_SECRETS",
    "account",
    "app",
    "app_file",
    "attempt",
    "audit",
    "blob",
    "copy",
    "data",
    "dependency",
    "holding",
    "hub",
    "idempotency",
    "job",
    "job_set",
    "log_chunk",
    "manifest",
    "membership",
    "metadata",
    "peer",
    "pilot_use",
    "placement",
    "queue",
    "requirement",
    "revocation",
    "secret",
    "submission",
    "swarm_member",
    "task",
    "team",
    "token",
    "torrent",
    "upload",
    "use",
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


def _numbered(name: str, *columns: Column[Any] | UniqueConstraint) -> Table:
    """Return a table whose ids are given out by the store and never used twice."""
    return Table(name, metadata, Column("id", _Id, primary_key=True, autoincrement=True), *columns, sqlite_autoincrement=True)


account = _numbered(
    "account",
    Column("name", String(64), nullable=False, unique=True),
    Column("admin", Boolean, nullable=False),
    Column("created_at", Float, nullable=False),
    Column("weight", Float, nullable=False, server_default="1"),
    Column("max_waiting", BigInteger),
    Column("max_running", BigInteger),
    Column("max_bytes", BigInteger),
)
"""`weight`: its part of the grid against others'. The bounds are for jobs waiting, jobs running and bytes kept; NULL: what the server says."""

team = Table(
    "team",
    metadata,
    Column("name", String(64), primary_key=True),
    Column("weight", Float, nullable=False, server_default="1"),
)
"""A group; `group` is a word of SQL."""

use = Table(
    "use",
    metadata,
    Column("account_id", ForeignKey("account.id", ondelete="CASCADE"), primary_key=True),
    Column("team", String(64), primary_key=True),
    Column("cpu_s", Float, nullable=False),
    Column("at", Float, nullable=False),
)
"""CPU seconds that a user has used for a group ("": for himself), fading: worth `cpu_s` at the time `at` (core/shares.py)."""

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
    Column("told", String(64), nullable=False, server_default=""),
    Column("call", String(64), nullable=False, server_default=""),
    Column("owner_id", ForeignKey("account.id", ondelete="SET NULL"), index=True),
    Column("reserved_for", String(80), nullable=False, server_default=""),
    Column("reserved_until", Float),
    Column("pilot_of", _Id),
    Column("pilot_attempt_id", _Id),
    Column("ends_at", Float),
)
_pilot_there = sa.text("pilot_of IS NOT NULL AND left_at IS NULL")
Index("ix_worker_pilot", worker.c.pilot_of, sqlite_where=_pilot_there, postgresql_where=_pilot_there)
Index(
    "ix_worker_pilot_attempt",
    worker.c.pilot_attempt_id,
    unique=True,
    sqlite_where=worker.c.pilot_attempt_id.is_not(None),
    postgresql_where=worker.c.pilot_attempt_id.is_not(None),
)
"""`told`: hash of profile and cache, so that what did not change is not written again. `call`: the key of its last call that leased
something. `reserved_for`: user:NAME or group:NAME. `pilot_of`: whose pilot it is, in the attempt `pilot_attempt_id` or on another system; it
ends with its attempt or at `ends_at`."""

pilot_use = _numbered(
    "pilot_use",
    Column("attempt_id", _Id, nullable=False, index=True),
    Column("cpu_s", Float, nullable=False),
)
"""CPU seconds that others were charged for jobs of the pilot in an attempt: rows are added only, so that nobody waits for another."""

secret = Table(
    "secret",
    metadata,
    Column("hash", String(64), primary_key=True),
    Column("purpose", String(16), nullable=False),
    Column("account_id", ForeignKey("account.id", ondelete="CASCADE")),
    Column("uses_left", Integer, nullable=False),
    Column("expires_at", Float, nullable=False),
    Column("pilot_s", Float, nullable=False, server_default="0"),
)
"""`pilot_s`: what joins by it is a pilot for so many seconds; 0: a worker."""

blob = Table(
    "blob",
    metadata,
    Column("sha256", String(64), primary_key=True),
    Column("size_bytes", BigInteger, nullable=False),
    Column("created_at", Float, nullable=False),
    Column("unused_since", Float),
    Column("removing", Boolean, nullable=False, server_default=sa.false()),
)
"""`unused_since`: nothing referred to it then; once that has been so for long enough a process claims it (`removing`, since then) and
removes its bytes (server/retention.py)."""

placement = _numbered(
    "placement",
    Column("owner_id", ForeignKey("account.id", ondelete="CASCADE"), nullable=False),
    Column("pattern", String(220), nullable=False),
    Column("attributes", Text, nullable=False),
    Column("created_at", Float, nullable=False),
    UniqueConstraint("owner_id", "pattern"),
)
"""What is wanted of a user's data of some names (model/placement.py)."""

holding = Table(
    "holding",
    metadata,
    Column("data_id", ForeignKey("data.id", ondelete="CASCADE"), primary_key=True),
    Column("worker_id", ForeignKey("worker.id", ondelete="CASCADE"), primary_key=True, index=True),
    Column("since", Float, nullable=False),
    Column("held", Boolean, nullable=False),
)
"""Which worker is to hold which data, since when; `held`: it has it."""

copy = Table(
    "copy",
    metadata,
    Column("content", String(64), primary_key=True),
    Column("worker_id", ForeignKey("worker.id", ondelete="CASCADE"), primary_key=True, index=True),
    Column("since", Float, nullable=False),
    Column("there", Boolean, nullable=False),
)
"""What workers have in their caches, as they said last: unpacked disks and other data, by sha256. Not `there`: it was told to fetch it, since jobs
wait for it."""

torrent = Table(
    "torrent",
    metadata,
    Column("sha256", String(64), primary_key=True),
    Column("layer", LargeBinary, nullable=False),
)
"""The hashes of a blob's pieces (core/torrents.py)."""

swarm_member = Table(
    "swarm_member",
    metadata,
    Column("sha256", String(64), primary_key=True),
    Column("member", String(100), primary_key=True, index=True),
    Column("seen_at", Float, nullable=False),
    Column("have", LargeBinary, nullable=False),
    Column("complete", Boolean, nullable=False),
    Column("taken", LargeBinary, nullable=False),
    Column("public", String(64), nullable=False),
    Column("private", Text, nullable=False),
    Column("reachable", Boolean, nullable=False),
    Column("port", Integer, nullable=False),
    Column("peer", String(64), nullable=False),
)
"""Workers, and programs of users, that have or fetch a blob together: what core.transfer.Member says of them. `have` is empty if it is `complete`."""
Index("ix_swarm_member_seen", swarm_member.c.sha256, swarm_member.c.seen_at)

upload = _numbered(
    "upload",
    Column("holder", String(64), nullable=False),
    Column("sha256", String(64), nullable=False, index=True),
    Column("size_bytes", BigInteger, nullable=False),
    Column("complete", Boolean, nullable=False),
    Column("touched_at", Float, nullable=False, index=True),
    Column("remote", Text),
    UniqueConstraint("holder", "sha256"),
)
"""Who sent (or is sending) which bytes: having sent them is the right to refer to them. `remote`: the upload's name at an S3 store."""

data = _numbered(
    "data",
    Column("name", String(200), nullable=False, index=True),
    Column("version", Integer, nullable=False),
    Column("kind", String(16), nullable=False),
    Column("sha256", String(64), nullable=False, index=True),
    Column("size_bytes", BigInteger, nullable=False),
    Column("owner_id", ForeignKey("account.id"), nullable=False),
    Column("visibility", String(16), nullable=False),
    Column("team", String(64), nullable=False, server_default=""),
    Column("created_at", Float, nullable=False),
    Column("disk", Text),
    Column("disk_sha256", String(64), index=True),
    Column("delta", Text),
    Column("delta_sha256", String(64), index=True),
    UniqueConstraint("owner_id", "name", "version"),
)
"""`disk`, `delta`: JSON of what they are; the bytes of a delta are the blob `delta_sha256`."""

manifest = _numbered(
    "manifest",
    Column("disk_sha256", String(64), nullable=False),
    Column("endorser", String(200), nullable=False),
    Column("by", String(128), nullable=False),
    Column("issued_at", Float, nullable=False),
    Column("expires_at", Float, nullable=False),
    Column("signed", Text, nullable=False),
    UniqueConstraint("disk_sha256", "endorser"),
)
"""Who vouches for which disk until when. `signed`: the statement itself (core/manifests.py); the rest is what it says."""

revocation = Table(
    "revocation",
    metadata,
    Column("disk_sha256", String(64), primary_key=True),
    Column("owner_id", BigInteger, primary_key=True, autoincrement=False),
    Column("by", String(128), nullable=False),
    Column("at", Float, nullable=False),
    Column("reason", Text, nullable=False),
    Column("signed", Text, nullable=False),
)
"""Disks that are not started any more. `owner_id`: those of this user; 0: everybody's."""

app = _numbered(
    "app",
    Column("name", String(200), nullable=False, index=True),
    Column("version", Integer, nullable=False),
    Column("owner_id", ForeignKey("account.id"), nullable=False),
    Column("visibility", String(16), nullable=False),
    Column("team", String(64), nullable=False, server_default=""),
    Column("created_at", Float, nullable=False),
    Column("defaults", Text, nullable=False),
    UniqueConstraint("owner_id", "name", "version"),
)
"""A named, versioned thing to run. `defaults`: JSON of what a job has where it says nothing."""

app_file = Table(
    "app_file",
    metadata,
    Column("app_id", ForeignKey("app.id", ondelete="CASCADE"), primary_key=True),
    Column("platform", String(40), primary_key=True),
    Column("sha256", String(64), nullable=False, index=True),
    Column("size_bytes", BigInteger, nullable=False),
)
"""The archive of an app's files for a platform."""

requirement = _numbered("requirement", Column("key", Text, nullable=False, unique=True), Column("body", Text))
"""A requirement class: the JSON of core.matching.Requirement is its key, or if it is too long for an index, its digest is, and `body` the JSON."""

queue = _numbered(
    "queue",
    Column("class_id", ForeignKey("requirement.id"), nullable=False),
    Column("owner_id", ForeignKey("account.id"), nullable=False),
    Column("team", String(64), nullable=False),
    Column("priority", Integer, nullable=False),
    Column("array_id", BigInteger, nullable=False),
    Column("open", Boolean, nullable=False),
    *(Column(state, BigInteger, nullable=False, server_default="0") for state in JobState),
    UniqueConstraint("class_id", "owner_id", "team", "priority", "array_id"),
)
"""Jobs of one class, user, group and priority; an array (`array_id`, else 0) has its own, so opening it (`open`) lets all its jobs go at
once. The counts are of its jobs by state and change in the same transaction as they."""
_on_board = sa.and_(queue.c.open.is_(True), queue.c.waiting > 0)
Index("ix_queue_waiting", queue.c.id, sqlite_where=_on_board, postgresql_where=_on_board)
_none: sa.ColumnElement[int] = sa.literal_column("0", sa.BigInteger())
IS_UNSTARTED = sa.or_(queue.c.blocked > _none, queue.c.waiting > _none)
"""Whether jobs of a queue have not started yet."""
Index("ix_queue_unstarted", queue.c.id, sqlite_where=IS_UNSTARTED, postgresql_where=IS_UNSTARTED)
Index("ix_queue_owner", queue.c.owner_id)
Index("ix_queue_array", queue.c.array_id)

job_set = _numbered(
    "job_set",
    Column("owner_id", ForeignKey("account.id"), nullable=False, index=True),
    Column("name", String(200), nullable=False),
    Column("together", Boolean, nullable=False),
    Column("created_at", Float, nullable=False),
    Column("started_at", Float),
    Column("opened_at", Float),
    Column("try_at", Float),
    Column("tries", Integer, nullable=False, server_default="0"),
)
_unstarted = job_set.c.try_at.is_not(None)
Index("ix_job_set_try_at", job_set.c.try_at, sqlite_where=_unstarted, postgresql_where=_unstarted)
"""Several submissions of one file that belong together. `together`: none starts before all can; until then its queues are opened for a while
at `opened_at`, and if not all jobs find workers in that time they are closed and opened again after `try_at`."""

submission = _numbered(
    "submission",
    Column("owner_id", ForeignKey("account.id"), nullable=False),
    Column("queue_id", ForeignKey("queue.id")),
    Column("spec", Text, nullable=False),
    Column("disk", Text),
    Column("disk_blob", String(64), index=True),
    Column("disk_sha256", String(64)),
    Column("context", String(64), index=True),
    Column("context_bytes", BigInteger),
    Column("app_id", ForeignKey("app.id", ondelete="SET NULL"), index=True),
    Column("programs", Text),
    Column("secrets", LargeBinary),
    Column("set_id", ForeignKey("job_set.id", ondelete="SET NULL"), index=True),
    Column("member", String(64), nullable=False, server_default=""),
    Column("size", BigInteger),
    Column("filled", BigInteger, nullable=False, server_default="0"),
    Column("state", String(16), nullable=False),
    Column("parameters", String(64), index=True),
    Column("parameters_bytes", BigInteger),
    Column("names", Text),
    Column("reads_at", BigInteger, nullable=False, server_default="0"),
    Column("created_at", Float, nullable=False),
    Column("finished_at", Float),
    Column("message", Text, nullable=False, server_default=""),
)
"""What one call submitted: a job, or an array of `size` jobs. All that its jobs have in common is here. An array is filled little by
little: `filled` jobs are there; of its table (the blob `parameters`, columns `names`) `reads_at` bytes were read. `programs`: its app's
files by platform, JSON. `secrets`: sealed to the server (core/sealing.py)."""
submission_data = Table(
    "submission_data",
    metadata,
    Column("submission_id", ForeignKey("submission.id", ondelete="CASCADE"), primary_key=True),
    Column("name", String(100), primary_key=True),
    Column("sha256", String(64), nullable=False, index=True),
    Column("size_bytes", BigInteger, nullable=False),
)
"""Data that the jobs of a submission find as files of these names."""
WITHOUT_SECRETS = tuple(column for column in submission.c if column.name != "secrets")
"""All of a submission but what is long and needed only where its jobs are leased."""
_unfinished = submission.c.state.in_(("filling", "cancelling"))
Index("ix_submission_unfinished", submission.c.id, sqlite_where=_unfinished, postgresql_where=_unfinished)
_array = submission.c.size.is_not(None)
Index("ix_submission_owner", submission.c.owner_id, submission.c.id, sqlite_where=_array, postgresql_where=_array)

dependency = Table(
    "dependency",
    metadata,
    Column("submission_id", ForeignKey("submission.id", ondelete="CASCADE"), primary_key=True),
    Column("on_submission_id", ForeignKey("submission.id", ondelete="CASCADE"), primary_key=True, index=True),
    Column("any_end", Boolean, nullable=False),
)
"""What a submission waits for, while it does: one that has ended as wished leaves no row."""

job = _numbered(
    "job",
    Column("submission_id", ForeignKey("submission.id"), nullable=False),
    Column("queue_id", ForeignKey("queue.id"), nullable=False),
    Column("owner_id", ForeignKey("account.id"), nullable=False),
    Column("state", String(16), nullable=False),
    Column("position", BigInteger),
    Column("parameters", Text),
    Column("result", String(64)),
    Column("result_bytes", BigInteger),
    Column("result_until", Float),
    Column("value", LargeBinary),
    Column("exit_code", Integer),
    Column("message", Text, nullable=False, default=""),
    Column("finished_at", Float),
)
"""`position`: in its array; NULL for a job by itself. `parameters`: its line of the array's table, as a JSON list."""
_waiting = job.c.state == "waiting"
Index("ix_job_waiting", job.c.queue_id, job.c.id, sqlite_where=_waiting, postgresql_where=_waiting)
_single = job.c.position.is_(None)
Index("ix_job_owner", job.c.owner_id, job.c.id, sqlite_where=_single, postgresql_where=_single)
Index("ix_job_submission", job.c.submission_id, job.c.position, unique=True)
for _column in (job.c.result, job.c.result_until, job.c.finished_at):
    Index(f"ix_job_{_column.name}", _column, sqlite_where=_column.is_not(None), postgresql_where=_column.is_not(None))

task = Table(
    "task",
    metadata,
    Column("job_id", ForeignKey("job.id", ondelete="CASCADE"), primary_key=True),
    Column("owner_id", ForeignKey("account.id"), nullable=False),
    Column("kept", Text, nullable=False),
)
Index("ix_task_owner", task.c.owner_id, task.c.job_id)
"""A job that was submitted as a task of GA4GH TES. `kept`: JSON of what its job does not say of it (core/tes.py)."""

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
    Column("result", String(64)),
    Column("console_until", Float),
    UniqueConstraint("job_id", "number"),
)
"""`console_until`: its owner wants to see its screen until then."""
_taken_out = attempt.c.result.is_not(None)
Index("ix_attempt_result", attempt.c.result, sqlite_where=_taken_out, postgresql_where=_taken_out)
IS_LIVE = attempt.c.state.in_([constant(state) for state in ("leased", "running", "suspended")])
"""Whether an attempt is one of `LIVE_STATES`. Written so everywhere: in another order SQLite does not see that the indexes cover it, and scans."""
Index("ix_attempt_lease", attempt.c.lease_expires_at, sqlite_where=IS_LIVE, postgresql_where=IS_LIVE)
Index("ix_attempt_live_worker", attempt.c.worker_id, sqlite_where=IS_LIVE, postgresql_where=IS_LIVE)
_lost = attempt.c.state == "lost"
Index("ix_attempt_lost_worker", attempt.c.worker_id, sqlite_where=_lost, postgresql_where=_lost)

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
    Column("rights", Text, nullable=False, server_default=""),
)
"""`rights`: what it is narrowed to, as a JSON list; "": all that its holder may. Of a user, a worker, an attempt (the job's own token) or a hub."""

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

audit = _numbered(
    "audit",
    Column("at", Float, nullable=False, index=True),
    Column("principal", String(80), nullable=False, index=True),
    Column("name", String(128), nullable=False),
    Column("action", String(40), nullable=False),
    Column("object", String(200), nullable=False),
    Column("detail", Text, nullable=False, server_default=""),
    Column("request", String(64), nullable=False, server_default=""),
)
"""Who did what to which object; `action` is a route's name, `request` the id that the logs have too."""

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
