"""Tasks of GA4GH TES."""

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None

_Id = sa.BigInteger().with_variant(sa.Integer(), "sqlite")


def upgrade() -> None:
    op.create_table(
        "task",
        sa.Column("job_id", _Id, nullable=False),
        sa.Column("owner_id", _Id, nullable=False),
        sa.Column("kept", sa.Text(), nullable=False),
        sa.ForeignKeyConstraint(["job_id"], ["job.id"], name=op.f("fk_task_job_id"), ondelete="CASCADE"),
        sa.ForeignKeyConstraint(["owner_id"], ["account.id"], name=op.f("fk_task_owner_id")),
        sa.PrimaryKeyConstraint("job_id", name=op.f("pk_task")),
    )
    op.create_index("ix_task_owner", "task", ["owner_id", "job_id"])
