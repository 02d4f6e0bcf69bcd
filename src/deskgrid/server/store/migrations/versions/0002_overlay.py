"""Peers, hubs, and the tokens of hubs and jobs."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "hub",
        sa.Column("id", _id(), autoincrement=True, nullable=False),
        sa.Column("label", sa.String(length=128), nullable=False),
        sa.Column("own", sa.Boolean(), nullable=False),
        sa.Column("key", sa.String(length=64), nullable=False),
        sa.Column("address", sa.String(length=300), nullable=False),
        sa.Column("peers", sa.Integer(), nullable=False),
        sa.Column("joined_at", sa.Float(), nullable=False),
        sa.Column("expires_at", sa.Float(), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_hub")),
        sqlite_autoincrement=True,
    )
    op.create_table(
        "peer",
        sa.Column("id", _id(), autoincrement=True, nullable=False),
        sa.Column("kind", sa.String(length=16), nullable=False),
        sa.Column("name", sa.String(length=100), nullable=False),
        sa.Column("key", sa.String(length=64), nullable=False),
        sa.Column("account_id", _id(), nullable=True),
        sa.Column("attempt_id", _id(), nullable=True),
        sa.Column("worker_id", _id(), nullable=True),
        sa.Column("offers", sa.Text(), nullable=False),
        sa.Column("hub_id", _id(), nullable=True),
        sa.Column("connections", sa.Text(), nullable=False),
        sa.Column("registered_at", sa.Float(), nullable=False),
        sa.Column("expires_at", sa.Float(), nullable=False),
        sa.ForeignKeyConstraint(["account_id"], ["account.id"], name=op.f("fk_peer_account_id"), ondelete="CASCADE"),
        sa.ForeignKeyConstraint(["attempt_id"], ["attempt.id"], name=op.f("fk_peer_attempt_id"), ondelete="CASCADE"),
        sa.ForeignKeyConstraint(["worker_id"], ["worker.id"], name=op.f("fk_peer_worker_id"), ondelete="CASCADE"),
        sa.ForeignKeyConstraint(["hub_id"], ["hub.id"], name=op.f("fk_peer_hub_id"), ondelete="SET NULL"),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_peer")),
        sa.UniqueConstraint("name", "key", name=op.f("uq_peer_name")),
        sa.UniqueConstraint("attempt_id", name=op.f("uq_peer_attempt_id")),
        sqlite_autoincrement=True,
    )
    with op.batch_alter_table("peer", schema=None) as batch_op:
        batch_op.create_index("ix_peer_account", ["account_id", "kind"], unique=False)
        batch_op.create_index(batch_op.f("ix_peer_worker_id"), ["worker_id"], unique=False)
        batch_op.create_index(batch_op.f("ix_peer_expires_at"), ["expires_at"], unique=False)

    with op.batch_alter_table("token", schema=None, table_kwargs={"sqlite_autoincrement": True}) as batch_op:
        batch_op.add_column(sa.Column("attempt_id", _id(), nullable=True))
        batch_op.add_column(sa.Column("hub_id", _id(), nullable=True))
        batch_op.create_foreign_key(op.f("fk_token_attempt_id"), "attempt", ["attempt_id"], ["id"], ondelete="CASCADE")
        batch_op.create_foreign_key(op.f("fk_token_hub_id"), "hub", ["hub_id"], ["id"], ondelete="CASCADE")
        batch_op.create_index(batch_op.f("ix_token_attempt_id"), ["attempt_id"], unique=False)


def downgrade() -> None:
    op.execute("DELETE FROM token WHERE role IN ('job', 'hub')")  # they would be nobody's
    with op.batch_alter_table("token", schema=None, table_kwargs={"sqlite_autoincrement": True}) as batch_op:
        batch_op.drop_index(batch_op.f("ix_token_attempt_id"))
        batch_op.drop_constraint(op.f("fk_token_attempt_id"), type_="foreignkey")
        batch_op.drop_constraint(op.f("fk_token_hub_id"), type_="foreignkey")
        batch_op.drop_column("hub_id")
        batch_op.drop_column("attempt_id")
    op.drop_table("peer")
    op.drop_table("hub")


def _id() -> sa.types.TypeEngine[int]:
    return sa.BigInteger().with_variant(sa.Integer(), "sqlite")
