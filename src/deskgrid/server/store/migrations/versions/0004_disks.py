"""Manifests, revocations and deltas of disks, sealed secrets of jobs, consoles."""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "manifest",
        sa.Column("id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), autoincrement=True, nullable=False),
        sa.Column("disk_sha256", sa.String(length=64), nullable=False),
        sa.Column("endorser", sa.String(length=200), nullable=False),
        sa.Column("by", sa.String(length=128), nullable=False),
        sa.Column("issued_at", sa.Float(), nullable=False),
        sa.Column("expires_at", sa.Float(), nullable=False),
        sa.Column("signed", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_manifest")),
        sa.UniqueConstraint("disk_sha256", "endorser", name=op.f("uq_manifest_disk_sha256")),
        sqlite_autoincrement=True,
    )
    op.create_table(
        "revocation",
        sa.Column("disk_sha256", sa.String(length=64), nullable=False),
        sa.Column("owner_id", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("by", sa.String(length=128), nullable=False),
        sa.Column("at", sa.Float(), nullable=False),
        sa.Column("reason", sa.Text(), nullable=False),
        sa.Column("signed", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("disk_sha256", "owner_id", name=op.f("pk_revocation")),
    )
    with op.batch_alter_table("data", recreate="never") as batch_op:
        batch_op.add_column(sa.Column("delta", sa.Text(), nullable=True))
        batch_op.add_column(sa.Column("delta_sha256", sa.String(length=64), nullable=True))
        batch_op.create_index(batch_op.f("ix_data_delta_sha256"), ["delta_sha256"], unique=False)
    with op.batch_alter_table("submission", recreate="never") as batch_op:
        batch_op.add_column(sa.Column("secrets", sa.LargeBinary(), nullable=True))
    with op.batch_alter_table("attempt", recreate="never") as batch_op:
        batch_op.add_column(sa.Column("console_until", sa.Float(), nullable=True))
