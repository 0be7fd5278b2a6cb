"""Starts, channel health, sweeps."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    op.create_table(
        "channel_hours",
        sa.Column("hour", sa.BigInteger(), nullable=False),
        sa.Column("outcome", sa.Text(), nullable=False),
        sa.Column("runs", sa.Integer(), nullable=False),
        sa.PrimaryKeyConstraint("hour", "outcome", name="pk_channel_hours"),
    )
    op.create_table(
        "starts",
        sa.Column("token", sa.Text(), nullable=False),
        sa.Column("workspace_id", sa.Text(), nullable=False),
        sa.Column("operation", sa.Text(), nullable=False),
        sa.Column("technique_id", sa.Text(), nullable=False),
        sa.Column("idempotency_key", sa.Text(), nullable=False),
        sa.Column("request", sa.Text(), nullable=False),
        sa.Column("request_hash", sa.Text(), nullable=False),
        sa.Column("metadata", sa.Text(), nullable=False),
        sa.Column("callback_expected", sa.Boolean(), nullable=False),
        sa.Column("state", sa.Text(), nullable=False),
        sa.Column("created_at", sa.BigInteger(), nullable=False),
        sa.Column("due_at", sa.BigInteger(), nullable=False),
        sa.Column("attempts", sa.Integer(), nullable=False),
        sa.Column("run_id", sa.Text(), nullable=True),
        sa.Column("error_status", sa.Integer(), nullable=True),
        sa.Column("error_code", sa.Text(), nullable=True),
        sa.Column("error_message", sa.Text(), nullable=True),
        sa.Column("error_fields", sa.Text(), nullable=False),
        sa.Column("request_id", sa.Text(), nullable=True),
        sa.CheckConstraint("(state = 'started') = (run_id IS NOT NULL)", name=op.f("ck_starts_started")),
        sa.CheckConstraint("operation IN ('technique_run', 'generate')", name=op.f("ck_starts_operation")),
        sa.CheckConstraint(
            "state IN ('asking', 'started', 'refused', 'unknown')", name=op.f("ck_starts_state")
        ),
        sa.PrimaryKeyConstraint("token", name="pk_starts"),
        sa.UniqueConstraint(
            "workspace_id",
            "operation",
            "technique_id",
            "idempotency_key",
            name="uq_starts_workspace_id_operation_technique_id_idempotency_key",
        ),
    )
    with op.batch_alter_table("starts", schema=None) as batch_op:
        batch_op.create_index(
            "ix_starts_asking",
            ["due_at"],
            unique=False,
            sqlite_where=sa.text("state = 'asking'"),
            postgresql_where=sa.text("state = 'asking'"),
        )
        batch_op.create_index("ix_starts_run_id", ["run_id"], unique=False)

    op.create_table(
        "watermarks",
        sa.Column("scope", sa.Text(), nullable=False),
        sa.Column("created_at", sa.BigInteger(), nullable=False),
        sa.Column("swept_at", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("scope", name="pk_watermarks"),
    )


def downgrade() -> None:
    op.drop_table("watermarks")
    with op.batch_alter_table("starts", schema=None) as batch_op:
        batch_op.drop_index("ix_starts_run_id")
        batch_op.drop_index(
            "ix_starts_asking",
            sqlite_where=sa.text("state = 'asking'"),
            postgresql_where=sa.text("state = 'asking'"),
        )

    op.drop_table("starts")
    op.drop_table("channel_hours")
