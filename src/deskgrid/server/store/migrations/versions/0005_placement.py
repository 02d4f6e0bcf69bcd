"""Placement of data, what workers have, torrents and swarms."""

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("requirement", sa.Column("body", sa.Text(), nullable=True))
    op.create_table(
        "torrent",
        sa.Column("sha256", sa.String(length=64), nullable=False),
        sa.Column("layer", sa.LargeBinary(), nullable=False),
        sa.PrimaryKeyConstraint("sha256", name=op.f("pk_torrent")),
    )
    op.create_table(
        "swarm_member",
        sa.Column("sha256", sa.String(length=64), nullable=False),
        sa.Column("member", sa.String(length=100), nullable=False),
        sa.Column("seen_at", sa.Float(), nullable=False),
        sa.Column("have", sa.LargeBinary(), nullable=False),
        sa.Column("complete", sa.Boolean(), nullable=False),
        sa.Column("taken", sa.LargeBinary(), nullable=False),
        sa.Column("public", sa.String(length=64), nullable=False),
        sa.Column("private", sa.Text(), nullable=False),
        sa.Column("reachable", sa.Boolean(), nullable=False),
        sa.Column("port", sa.Integer(), nullable=False),
        sa.Column("peer", sa.String(length=64), nullable=False),
        sa.PrimaryKeyConstraint("sha256", "member", name=op.f("pk_swarm_member")),
    )
    op.create_index(op.f("ix_swarm_member_member"), "swarm_member", ["member"], unique=False)
    op.create_index("ix_swarm_member_seen", "swarm_member", ["sha256", "seen_at"], unique=False)
    op.create_table(
        "submission_data",
        sa.Column("submission_id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False),
        sa.Column("name", sa.String(length=100), nullable=False),
        sa.Column("sha256", sa.String(length=64), nullable=False),
        sa.Column("size_bytes", sa.BigInteger(), nullable=False),
        sa.ForeignKeyConstraint(
            ["submission_id"], ["submission.id"], name=op.f("fk_submission_data_submission_id"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("submission_id", "name", name=op.f("pk_submission_data")),
    )
    op.create_index(op.f("ix_submission_data_sha256"), "submission_data", ["sha256"], unique=False)
    op.create_table(
        "placement",
        sa.Column("id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), autoincrement=True, nullable=False),
        sa.Column("owner_id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False),
        sa.Column("pattern", sa.String(length=220), nullable=False),
        sa.Column("attributes", sa.Text(), nullable=False),
        sa.Column("created_at", sa.Float(), nullable=False),
        sa.ForeignKeyConstraint(["owner_id"], ["account.id"], name=op.f("fk_placement_owner_id"), ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_placement")),
        sa.UniqueConstraint("owner_id", "pattern", name=op.f("uq_placement_owner_id")),
        sqlite_autoincrement=True,
    )
    op.create_table(
        "holding",
        sa.Column("data_id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False),
        sa.Column("worker_id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False),
        sa.Column("since", sa.Float(), nullable=False),
        sa.Column("held", sa.Boolean(), nullable=False),
        sa.ForeignKeyConstraint(["data_id"], ["data.id"], name=op.f("fk_holding_data_id"), ondelete="CASCADE"),
        sa.ForeignKeyConstraint(["worker_id"], ["worker.id"], name=op.f("fk_holding_worker_id"), ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("data_id", "worker_id", name=op.f("pk_holding")),
    )
    op.create_index(op.f("ix_holding_worker_id"), "holding", ["worker_id"], unique=False)
    op.create_table(
        "copy",
        sa.Column("content", sa.String(length=64), nullable=False),
        sa.Column("worker_id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False),
        sa.Column("since", sa.Float(), nullable=False),
        sa.Column("there", sa.Boolean(), nullable=False),
        sa.ForeignKeyConstraint(["worker_id"], ["worker.id"], name=op.f("fk_copy_worker_id"), ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("content", "worker_id", name=op.f("pk_copy")),
    )
    op.create_index(op.f("ix_copy_worker_id"), "copy", ["worker_id"], unique=False)
    unstarted = sa.text("blocked > 0 OR waiting > 0")
    op.create_index("ix_queue_unstarted", "queue", ["id"], unique=False, sqlite_where=unstarted, postgresql_where=unstarted)
