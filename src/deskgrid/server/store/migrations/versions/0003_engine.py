"""Submissions and arrays, counted queues, apps, sets, shares, quotas, reservations, narrowed tokens and the audit log."""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None

_STATES = ("blocked", "waiting", "active", "completed", "failed", "cancelled")


def upgrade() -> None:
    _extend_accounts()
    _make_apps_and_audit()
    _make_submissions()
    _fill_submissions()
    _slim_jobs()


def _extend_accounts() -> None:
    with op.batch_alter_table("account", recreate="never") as batch_op:
        batch_op.add_column(sa.Column("weight", sa.Float(), nullable=False, server_default="1"))
        for name in ("max_waiting", "max_running", "max_bytes"):
            batch_op.add_column(sa.Column(name, sa.BigInteger(), nullable=True))
    with op.batch_alter_table("team", recreate="never") as batch_op:
        batch_op.add_column(sa.Column("weight", sa.Float(), nullable=False, server_default="1"))
    with op.batch_alter_table("upload", recreate="never") as batch_op:
        batch_op.add_column(sa.Column("remote", sa.Text(), nullable=True))
    with op.batch_alter_table("blob", recreate="never") as batch_op:
        batch_op.add_column(sa.Column("unused_since", sa.Float(), nullable=True))
        batch_op.add_column(sa.Column("removing", sa.Boolean(), nullable=False, server_default=sa.false()))
    with op.batch_alter_table("data", recreate="never") as batch_op:
        batch_op.add_column(sa.Column("team", sa.String(length=64), nullable=False, server_default=""))
    with op.batch_alter_table("token", recreate="never") as batch_op:
        batch_op.add_column(sa.Column("rights", sa.Text(), nullable=False, server_default=""))
    with op.batch_alter_table("worker", table_kwargs={"sqlite_autoincrement": True}) as batch_op:
        batch_op.add_column(sa.Column("told", sa.String(length=64), nullable=False, server_default=""))
        batch_op.add_column(sa.Column("call", sa.String(length=64), nullable=False, server_default=""))
        batch_op.add_column(sa.Column("owner_id", _id(), nullable=True))
        batch_op.add_column(sa.Column("reserved_for", sa.String(length=80), nullable=False, server_default=""))
        batch_op.add_column(sa.Column("reserved_until", sa.Float(), nullable=True))
        batch_op.create_foreign_key(op.f("fk_worker_owner_id"), "account", ["owner_id"], ["id"], ondelete="SET NULL")
        batch_op.create_index(batch_op.f("ix_worker_owner_id"), ["owner_id"], unique=False)
    op.create_table(
        "use",
        sa.Column("account_id", _id(), nullable=False),
        sa.Column("team", sa.String(length=64), nullable=False),
        sa.Column("cpu_s", sa.Float(), nullable=False),
        sa.Column("at", sa.Float(), nullable=False),
        sa.ForeignKeyConstraint(["account_id"], ["account.id"], name=op.f("fk_use_account_id"), ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("account_id", "team", name=op.f("pk_use")),
    )


def _make_apps_and_audit() -> None:
    op.create_table(
        "app",
        sa.Column("id", _id(), autoincrement=True, nullable=False),
        sa.Column("name", sa.String(length=200), nullable=False),
        sa.Column("version", sa.Integer(), nullable=False),
        sa.Column("owner_id", _id(), nullable=False),
        sa.Column("visibility", sa.String(length=16), nullable=False),
        sa.Column("team", sa.String(length=64), nullable=False, server_default=""),
        sa.Column("created_at", sa.Float(), nullable=False),
        sa.Column("defaults", sa.Text(), nullable=False),
        sa.ForeignKeyConstraint(["owner_id"], ["account.id"], name=op.f("fk_app_owner_id")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_app")),
        sa.UniqueConstraint("owner_id", "name", "version", name=op.f("uq_app_owner_id")),
        sqlite_autoincrement=True,
    )
    op.create_index(op.f("ix_app_name"), "app", ["name"], unique=False)
    op.create_table(
        "app_file",
        sa.Column("app_id", _id(), nullable=False),
        sa.Column("platform", sa.String(length=40), nullable=False),
        sa.Column("sha256", sa.String(length=64), nullable=False),
        sa.Column("size_bytes", sa.BigInteger(), nullable=False),
        sa.ForeignKeyConstraint(["app_id"], ["app.id"], name=op.f("fk_app_file_app_id"), ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("app_id", "platform", name=op.f("pk_app_file")),
    )
    op.create_index(op.f("ix_app_file_sha256"), "app_file", ["sha256"], unique=False)
    op.create_table(
        "audit",
        sa.Column("id", _id(), autoincrement=True, nullable=False),
        sa.Column("at", sa.Float(), nullable=False),
        sa.Column("principal", sa.String(length=80), nullable=False),
        sa.Column("name", sa.String(length=128), nullable=False),
        sa.Column("action", sa.String(length=40), nullable=False),
        sa.Column("object", sa.String(length=200), nullable=False),
        sa.Column("detail", sa.Text(), nullable=False, server_default=""),
        sa.Column("request", sa.String(length=64), nullable=False, server_default=""),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_audit")),
        sqlite_autoincrement=True,
    )
    op.create_index(op.f("ix_audit_at"), "audit", ["at"], unique=False)
    op.create_index(op.f("ix_audit_principal"), "audit", ["principal"], unique=False)


def _make_submissions() -> None:
    with op.batch_alter_table("requirement", table_kwargs={"sqlite_autoincrement": True}) as batch_op:
        batch_op.alter_column("key", existing_type=sa.String(length=400), type_=sa.Text(), existing_nullable=False)
    op.drop_table("queue")  # its counts are made anew from the jobs
    op.create_table(
        "queue",
        sa.Column("id", _id(), autoincrement=True, nullable=False),
        sa.Column("class_id", _id(), nullable=False),
        sa.Column("owner_id", _id(), nullable=False),
        sa.Column("team", sa.String(length=64), nullable=False),
        sa.Column("priority", sa.Integer(), nullable=False),
        sa.Column("array_id", sa.BigInteger(), nullable=False),
        sa.Column("open", sa.Boolean(), nullable=False),
        *(sa.Column(state, sa.BigInteger(), nullable=False, server_default="0") for state in _STATES),
        sa.ForeignKeyConstraint(["class_id"], ["requirement.id"], name=op.f("fk_queue_class_id")),
        sa.ForeignKeyConstraint(["owner_id"], ["account.id"], name=op.f("fk_queue_owner_id")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_queue")),
        sa.UniqueConstraint("class_id", "owner_id", "team", "priority", "array_id", name=op.f("uq_queue_class_id")),
        sqlite_autoincrement=True,
    )
    on_board = sa.text("open IS true AND waiting > 0") if _is_postgresql() else sa.text("open IS 1 AND waiting > 0")
    op.create_index("ix_queue_waiting", "queue", ["id"], unique=False, postgresql_where=on_board, sqlite_where=on_board)
    op.create_index("ix_queue_owner", "queue", ["owner_id"], unique=False)
    op.create_index("ix_queue_array", "queue", ["array_id"], unique=False)
    op.create_table(
        "job_set",
        sa.Column("id", _id(), autoincrement=True, nullable=False),
        sa.Column("owner_id", _id(), nullable=False),
        sa.Column("name", sa.String(length=200), nullable=False),
        sa.Column("together", sa.Boolean(), nullable=False),
        sa.Column("created_at", sa.Float(), nullable=False),
        sa.Column("started_at", sa.Float(), nullable=True),
        sa.Column("opened_at", sa.Float(), nullable=True),
        sa.Column("try_at", sa.Float(), nullable=True),
        sa.Column("tries", sa.Integer(), nullable=False, server_default="0"),
        sa.ForeignKeyConstraint(["owner_id"], ["account.id"], name=op.f("fk_job_set_owner_id")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_job_set")),
        sqlite_autoincrement=True,
    )
    op.create_index(op.f("ix_job_set_owner_id"), "job_set", ["owner_id"], unique=False)
    _partial_index("ix_job_set_try_at", "job_set", ["try_at"], "try_at IS NOT NULL")
    op.create_table(
        "submission",
        sa.Column("id", _id(), autoincrement=True, nullable=False),
        sa.Column("owner_id", _id(), nullable=False),
        sa.Column("queue_id", _id(), nullable=True),
        sa.Column("spec", sa.Text(), nullable=False),
        sa.Column("disk", sa.Text(), nullable=True),
        sa.Column("disk_blob", sa.String(length=64), nullable=True),
        sa.Column("disk_sha256", sa.String(length=64), nullable=True),
        sa.Column("context", sa.String(length=64), nullable=True),
        sa.Column("context_bytes", sa.BigInteger(), nullable=True),
        sa.Column("app_id", _id(), nullable=True),
        sa.Column("programs", sa.Text(), nullable=True),
        sa.Column("set_id", _id(), nullable=True),
        sa.Column("member", sa.String(length=64), nullable=False, server_default=""),
        sa.Column("size", sa.BigInteger(), nullable=True),
        sa.Column("filled", sa.BigInteger(), nullable=False, server_default="0"),
        sa.Column("state", sa.String(length=16), nullable=False),
        sa.Column("parameters", sa.String(length=64), nullable=True),
        sa.Column("parameters_bytes", sa.BigInteger(), nullable=True),
        sa.Column("names", sa.Text(), nullable=True),
        sa.Column("reads_at", sa.BigInteger(), nullable=False, server_default="0"),
        sa.Column("created_at", sa.Float(), nullable=False),
        sa.Column("finished_at", sa.Float(), nullable=True),
        sa.Column("message", sa.Text(), nullable=False, server_default=""),
        sa.ForeignKeyConstraint(["owner_id"], ["account.id"], name=op.f("fk_submission_owner_id")),
        sa.ForeignKeyConstraint(["queue_id"], ["queue.id"], name=op.f("fk_submission_queue_id")),
        sa.ForeignKeyConstraint(["app_id"], ["app.id"], name=op.f("fk_submission_app_id"), ondelete="SET NULL"),
        sa.ForeignKeyConstraint(["set_id"], ["job_set.id"], name=op.f("fk_submission_set_id"), ondelete="SET NULL"),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_submission")),
        sqlite_autoincrement=True,
    )
    for name in ("disk_blob", "context", "app_id", "set_id", "parameters"):
        op.create_index(op.f(f"ix_submission_{name}"), "submission", [name], unique=False)
    _partial_index("ix_submission_unfinished", "submission", ["id"], "state IN ('filling', 'cancelling')")
    _partial_index("ix_submission_owner", "submission", ["owner_id", "id"], "size IS NOT NULL")
    op.create_table(
        "dependency",
        sa.Column("submission_id", _id(), nullable=False),
        sa.Column("on_submission_id", _id(), nullable=False),
        sa.Column("any_end", sa.Boolean(), nullable=False),
        sa.ForeignKeyConstraint(["submission_id"], ["submission.id"], name=op.f("fk_dependency_submission_id"), ondelete="CASCADE"),
        sa.ForeignKeyConstraint(
            ["on_submission_id"], ["submission.id"], name=op.f("fk_dependency_on_submission_id"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("submission_id", "on_submission_id", name=op.f("pk_dependency")),
    )
    op.create_index(op.f("ix_dependency_on_submission_id"), "dependency", ["on_submission_id"], unique=False)


def _fill_submissions() -> None:
    """Each job there is was submitted by itself: its submission has its number."""
    counts = ", ".join(f"SUM(CASE WHEN job.state = '{state}' THEN 1 ELSE 0 END)" for state in _STATES)
    op.execute(
        f"INSERT INTO queue (class_id, owner_id, team, priority, array_id, open, {', '.join(_STATES)}) "  # noqa: S608
        f"SELECT class_id, owner_id, '', 0, 0, true, {counts} FROM job GROUP BY class_id, owner_id"
    )
    op.execute(
        "INSERT INTO submission (id, owner_id, queue_id, spec, disk, disk_blob, disk_sha256, context, context_bytes, filled, state, "
        "created_at, finished_at) "
        "SELECT job.id, job.owner_id, queue.id, job.spec, job.disk, job.disk_blob, job.disk_sha256, job.context, job.context_bytes, 1, "
        "'open', job.created_at, job.finished_at "
        "FROM job JOIN queue ON queue.class_id = job.class_id AND queue.owner_id = job.owner_id"
    )
    if _is_postgresql():
        op.execute(
            "SELECT setval(pg_get_serial_sequence('submission', 'id'), (SELECT coalesce(max(id), 0) + 1 FROM submission), false)"
        )


def _slim_jobs() -> None:
    for name in ("ix_job_waiting", "ix_job_owner", "ix_job_state", "ix_job_disk_blob", "ix_job_context", "ix_job_result"):
        op.drop_index(name, table_name="job")
    with op.batch_alter_table("job", recreate="never") as batch_op:
        batch_op.add_column(sa.Column("submission_id", _id(), nullable=True))
        batch_op.add_column(sa.Column("queue_id", _id(), nullable=True))
        batch_op.add_column(sa.Column("position", sa.BigInteger(), nullable=True))
        batch_op.add_column(sa.Column("parameters", sa.Text(), nullable=True))
        batch_op.add_column(sa.Column("result_until", sa.Float(), nullable=True))
        batch_op.add_column(sa.Column("value", sa.LargeBinary(), nullable=True))
    op.execute(
        "UPDATE job SET submission_id = id, queue_id = (SELECT queue.id FROM queue WHERE queue.class_id = job.class_id "
        "AND queue.owner_id = job.owner_id)"
    )
    with op.batch_alter_table("job", table_kwargs={"sqlite_autoincrement": True}) as batch_op:
        batch_op.alter_column("submission_id", existing_type=_id(), nullable=False)
        batch_op.alter_column("queue_id", existing_type=_id(), nullable=False)
        batch_op.create_foreign_key(op.f("fk_job_submission_id"), "submission", ["submission_id"], ["id"])
        batch_op.create_foreign_key(op.f("fk_job_queue_id"), "queue", ["queue_id"], ["id"])
        batch_op.drop_constraint(op.f("fk_job_class_id"), type_="foreignkey")
        for name in ("class_id", "spec", "disk", "disk_blob", "disk_sha256", "context", "context_bytes", "created_at"):
            batch_op.drop_column(name)
    _partial_index("ix_job_waiting", "job", ["queue_id", "id"], "state = 'waiting'")
    _partial_index("ix_job_owner", "job", ["owner_id", "id"], "position IS NULL")
    op.create_index("ix_job_submission", "job", ["submission_id", "position"], unique=True)
    for name in ("result", "result_until", "finished_at"):
        _partial_index(f"ix_job_{name}", "job", [name], f"{name} IS NOT NULL")
    op.drop_index("ix_attempt_result", table_name="attempt")
    _partial_index("ix_attempt_result", "attempt", ["result"], "result IS NOT NULL")
    _partial_index("ix_attempt_lost_worker", "attempt", ["worker_id"], "state = 'lost'")
    op.create_index(op.f("ix_upload_sha256"), "upload", ["sha256"], unique=False)


def downgrade() -> None:
    raise NotImplementedError("arrays have no place in the older tables: restore a backup instead")


def _partial_index(name: str, table: str, columns: list[str], where: str) -> None:
    op.create_index(name, table, columns, unique=False, postgresql_where=sa.text(where), sqlite_where=sa.text(where))


def _is_postgresql() -> bool:
    return op.get_bind().dialect.name == "postgresql"


def _id() -> sa.types.TypeEngine[int]:
    return sa.BigInteger().with_variant(sa.Integer(), "sqlite")
