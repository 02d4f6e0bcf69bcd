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
        worker.add_column(sa.Column("served_s", sa.Float(), server_default="0", nullable=False))
        worker.add_column(sa.Column("ends_at", sa.Float(), nullable=True))
    is_pilot, in_attempt = sa.text("pilot_of IS NOT NULL"), sa.text("pilot_attempt_id IS NOT NULL")
    op.create_index("ix_worker_pilot", "worker", ["pilot_of"], sqlite_where=is_pilot, postgresql_where=is_pilot)
    op.create_index(
        "ix_worker_pilot_attempt", "worker", ["pilot_attempt_id"], unique=True, sqlite_where=in_attempt, postgresql_where=in_attempt
    )
