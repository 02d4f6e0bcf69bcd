"""Torrents and swarms of data."""

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "torrent",
        sa.Column("sha256", sa.String(length=64), nullable=False),
        sa.Column("layer", sa.LargeBinary(), nullable=False),
        sa.PrimaryKeyConstraint("sha256", name=op.f("pk_torrent")),
    )
    op.create_table(
        "swarm_member",
        sa.Column("sha256", sa.String(length=64), nullable=False),
        sa.Column("worker_id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False),
        sa.Column("seen_at", sa.Float(), nullable=False),
        sa.Column("have", sa.LargeBinary(), nullable=False),
        sa.Column("complete", sa.Boolean(), nullable=False),
        sa.Column("taken", sa.LargeBinary(), nullable=False),
        sa.Column("public", sa.String(length=64), nullable=False),
        sa.Column("private", sa.Text(), nullable=False),
        sa.Column("reachable", sa.Boolean(), nullable=False),
        sa.Column("port", sa.Integer(), nullable=False),
        sa.ForeignKeyConstraint(["worker_id"], ["worker.id"], name=op.f("fk_swarm_member_worker_id"), ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("sha256", "worker_id", name=op.f("pk_swarm_member")),
    )
    op.create_index(op.f("ix_swarm_member_worker_id"), "swarm_member", ["worker_id"], unique=False)
    op.create_index("ix_swarm_member_seen", "swarm_member", ["sha256", "seen_at"], unique=False)
