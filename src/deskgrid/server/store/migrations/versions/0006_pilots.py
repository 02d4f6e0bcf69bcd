"""Pilots."""

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None

_Id = sa.BigInteger().with_variant(sa.Integer(), "sqlite")


def upgrade() -> None:
    op.add_column("secret", sa.Column("pilot_s", sa.Float(), server_default="0", nullable=False))
    with op.batch_alter_table("worker", recreate="never") as worker:
        worker.add_column(sa.Column("pilot_of", _Id, nullable=True))
        worker.add_column(sa.Column("pilot_attempt_id", _Id, nullable=True))
        worker.add_column(sa.Column("ends_at", sa.Float(), nullable=True))
    op.create_table(
        "pilot_use",
        sa.Column("id", _Id, autoincrement=True, nullable=False),
        sa.Column("attempt_id", _Id, nullable=False),
        sa.Column("cpu_s", sa.Float(), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_pilot_use")),
        sqlite_autoincrement=True,
    )
    op.create_index(op.f("ix_pilot_use_attempt_id"), "pilot_use", ["attempt_id"], unique=False)
    is_pilot, in_attempt = sa.text("pilot_of IS NOT NULL AND left_at IS NULL"), sa.text("pilot_attempt_id IS NOT NULL")
    op.create_index("ix_worker_pilot", "worker", ["pilot_of"], sqlite_where=is_pilot, postgresql_where=is_pilot)
    op.create_index(
        "ix_worker_pilot_attempt", "worker", ["pilot_attempt_id"], unique=True, sqlite_where=in_attempt, postgresql_where=in_attempt
    )
