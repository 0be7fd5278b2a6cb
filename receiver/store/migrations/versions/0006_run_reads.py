"""The last reads of each run, with what came of them."""

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"


def upgrade() -> None:
    # One statement, not a batch: that would copy the table on SQLite, and drop what refers to it.
    op.execute("ALTER TABLE runs ADD COLUMN failed_polls INTEGER DEFAULT 0 NOT NULL")
    op.create_table(
        "run_reads",
        sa.Column("run_id", sa.Text(), nullable=False),
        sa.Column("slot", sa.Integer(), nullable=False),
        sa.Column("requested_at", sa.BigInteger(), nullable=False),
        sa.Column("source", sa.Text(), nullable=False),
        sa.Column("outcome", sa.Text(), nullable=False),
        sa.Column("run_status", sa.Text(), nullable=True),
        sa.Column("http_status", sa.Integer(), nullable=True),
        sa.Column("problem", sa.Text(), nullable=True),
        sa.Column("request_id", sa.Text(), nullable=True),
        sa.Column("duration_ms", sa.Integer(), nullable=True),
        sa.CheckConstraint(
            "outcome IN ('returned', 'not_found', 'failed')", name=op.f("ck_run_reads_outcome")
        ),
        sa.CheckConstraint("source IN ('run', 'list')", name=op.f("ck_run_reads_source")),
        sa.ForeignKeyConstraint(
            ["run_id"], ["runs.run_id"], name="fk_run_reads_run_id", ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("run_id", "slot", name="pk_run_reads"),
    )


def downgrade() -> None:
    op.drop_table("run_reads")
    op.execute("ALTER TABLE runs DROP COLUMN failed_polls")
