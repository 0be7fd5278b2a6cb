"""The ledger."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None


def upgrade() -> None:
    op.create_table(
        "deliveries",
        sa.Column(
            "seq", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), autoincrement=True, nullable=False
        ),
        sa.Column("delivery_id", sa.Text(), nullable=False),
        sa.Column("run_id", sa.Text(), nullable=True),
        sa.Column("event", sa.Text(), nullable=True),
        sa.Column("api_version", sa.Text(), nullable=True),
        sa.Column("received_at", sa.BigInteger(), nullable=False),
        sa.Column("age", sa.Integer(), nullable=False),
        sa.Column("secret", sa.Integer(), nullable=False),
        sa.Column("readable", sa.Boolean(), nullable=False),
        sa.Column("duplicates", sa.Integer(), nullable=False),
        sa.Column("last_duplicate_at", sa.BigInteger(), nullable=True),
        sa.PrimaryKeyConstraint("seq", name="pk_deliveries"),
        sa.UniqueConstraint("delivery_id", name="uq_deliveries_delivery_id"),
    )
    with op.batch_alter_table("deliveries", schema=None) as batch_op:
        batch_op.create_index("ix_deliveries_received_at", ["received_at"], unique=False)
        batch_op.create_index("ix_deliveries_run_id", ["run_id"], unique=False)

    op.create_table(
        "rejections",
        sa.Column(
            "seq", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), autoincrement=True, nullable=False
        ),
        sa.Column("rejected_at", sa.BigInteger(), nullable=False),
        sa.Column("code", sa.Text(), nullable=False),
        sa.Column("remote", sa.Text(), nullable=True),
        sa.Column("size", sa.Integer(), nullable=False),
        sa.PrimaryKeyConstraint("seq", name="pk_rejections"),
    )
    op.create_table(
        "runs",
        sa.Column("run_id", sa.Text(), nullable=False),
        sa.Column("state", sa.Text(), nullable=False),
        sa.Column("origin", sa.Text(), nullable=False),
        sa.Column("first_seen_at", sa.BigInteger(), nullable=False),
        sa.Column("deadline_at", sa.BigInteger(), nullable=False),
        sa.Column("run_type", sa.Text(), nullable=True),
        sa.Column("technique_id", sa.Text(), nullable=True),
        sa.Column("workspace_id", sa.Text(), nullable=True),
        sa.Column("project_id", sa.Text(), nullable=True),
        sa.Column("poll_url", sa.Text(), nullable=True),
        sa.Column("progress", sa.Integer(), nullable=True),
        sa.Column("created_at", sa.BigInteger(), nullable=True),
        sa.Column("started_at", sa.BigInteger(), nullable=True),
        sa.Column("completed_at", sa.BigInteger(), nullable=True),
        sa.Column("error_code", sa.Text(), nullable=True),
        sa.Column("error_message", sa.Text(), nullable=True),
        sa.Column("charged_cost", sa.Double(), nullable=True),
        sa.Column("quoted_cost", sa.Double(), nullable=True),
        sa.Column("metadata", sa.Text(), nullable=False),
        sa.Column("callback_expected", sa.Boolean(), nullable=False),
        sa.Column("told", sa.Text(), nullable=True),
        sa.Column("reported_at", sa.BigInteger(), nullable=True),
        sa.Column("settled_at", sa.BigInteger(), nullable=True),
        sa.Column("verdict", sa.Text(), nullable=True),
        sa.Column("verdict_due_at", sa.BigInteger(), nullable=True),
        sa.Column("lost_reason", sa.Text(), nullable=True),
        sa.Column("losses", sa.Integer(), nullable=False),
        sa.Column("next_poll_at", sa.BigInteger(), nullable=True),
        sa.Column("polls", sa.Integer(), nullable=False),
        sa.Column("ladder", sa.Integer(), nullable=False),
        sa.Column("failures", sa.Integer(), nullable=False),
        sa.Column("missing", sa.Integer(), nullable=False),
        sa.Column("missing_since", sa.BigInteger(), nullable=True),
        sa.Column("cost_due_at", sa.BigInteger(), nullable=True),
        sa.Column("version", sa.Integer(), nullable=False),
        sa.CheckConstraint("(state = 'lost') = (lost_reason IS NOT NULL)", name=op.f("ck_runs_lost")),
        sa.CheckConstraint(
            "(state IN ('completed', 'failed')) = (settled_at IS NOT NULL)", name=op.f("ck_runs_settled")
        ),
        sa.CheckConstraint(
            "origin IN ('started', 'tracked', 'callback', 'discovered')", name=op.f("ck_runs_origin")
        ),
        sa.CheckConstraint("state <> 'reported' OR reported_at IS NOT NULL", name=op.f("ck_runs_reported")),
        sa.CheckConstraint(
            "state IN ('open', 'reported', 'completed', 'failed', 'lost')", name=op.f("ck_runs_state")
        ),
        sa.CheckConstraint(
            "state NOT IN ('open', 'reported') OR next_poll_at IS NOT NULL", name=op.f("ck_runs_polled")
        ),
        sa.CheckConstraint("told IN ('completed', 'failed', 'both')", name=op.f("ck_runs_told")),
        sa.CheckConstraint(
            "verdict IN ('matched', 'recovered', 'late', 'diverged')", name=op.f("ck_runs_verdict")
        ),
        sa.PrimaryKeyConstraint("run_id", name="pk_runs"),
    )
    with op.batch_alter_table("runs", schema=None) as batch_op:
        batch_op.create_index(
            "ix_runs_due",
            ["next_poll_at"],
            unique=False,
            sqlite_where=sa.text("next_poll_at IS NOT NULL"),
            postgresql_where=sa.text("next_poll_at IS NOT NULL"),
        )
        batch_op.create_index("ix_runs_first_seen_at", ["first_seen_at"], unique=False)
        batch_op.create_index(
            "ix_runs_verdict_due",
            ["verdict_due_at"],
            unique=False,
            sqlite_where=sa.text("verdict_due_at IS NOT NULL"),
            postgresql_where=sa.text("verdict_due_at IS NOT NULL"),
        )

    op.create_table(
        "artifacts",
        sa.Column("run_id", sa.Text(), nullable=False),
        sa.Column("handler", sa.Text(), nullable=False),
        sa.Column("position", sa.Integer(), nullable=False),
        sa.Column("output_id", sa.Text(), nullable=False),
        sa.Column("location", sa.Text(), nullable=False),
        sa.Column("size", sa.BigInteger(), nullable=True),
        sa.Column("sha256", sa.Text(), nullable=True),
        sa.Column("content_type", sa.Text(), nullable=True),
        sa.Column("stored_at", sa.BigInteger(), nullable=True),
        sa.CheckConstraint("(stored_at IS NULL) = (sha256 IS NULL)", name=op.f("ck_artifacts_stored")),
        sa.CheckConstraint("position >= -1", name=op.f("ck_artifacts_position")),
        sa.ForeignKeyConstraint(
            ["run_id"], ["runs.run_id"], name="fk_artifacts_run_id", ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("run_id", "handler", "position", name="pk_artifacts"),
        sa.UniqueConstraint("handler", "location", name="uq_artifacts_handler_location"),
    )
    op.create_table(
        "delivery_bodies",
        sa.Column(
            "seq", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), autoincrement=False, nullable=False
        ),
        sa.Column("signature", sa.Text(), nullable=False),
        sa.Column("body", sa.LargeBinary(), nullable=False),
        sa.ForeignKeyConstraint(
            ["seq"], ["deliveries.seq"], name="fk_delivery_bodies_seq", ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("seq", name="pk_delivery_bodies"),
    )
    op.create_table(
        "dispatches",
        sa.Column(
            "seq", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), autoincrement=True, nullable=False
        ),
        sa.Column("run_id", sa.Text(), nullable=False),
        sa.Column("handler", sa.Text(), nullable=False),
        sa.Column("event", sa.Text(), nullable=False),
        sa.Column("round", sa.Integer(), nullable=False),
        sa.Column("state", sa.Text(), nullable=False),
        sa.Column("attempts", sa.Integer(), nullable=False),
        sa.Column("due_at", sa.BigInteger(), nullable=False),
        sa.Column("lease_token", sa.Text(), nullable=True),
        sa.Column("lease_until", sa.BigInteger(), nullable=True),
        sa.Column("last_error", sa.Text(), nullable=True),
        sa.Column("result", sa.Text(), nullable=True),
        sa.Column("finished_at", sa.BigInteger(), nullable=True),
        sa.CheckConstraint(
            "(state = 'leased') = (lease_token IS NOT NULL) AND (state = 'leased') = (lease_until IS NOT NULL)",
            name=op.f("ck_dispatches_lease"),
        ),
        sa.CheckConstraint(
            "event IN ('settled', 'cost_final', 'lost', 'diverged', 'dead')",
            name=op.f("ck_dispatches_event"),
        ),
        sa.CheckConstraint(
            "state IN ('ready', 'leased', 'done', 'dead', 'skipped')", name=op.f("ck_dispatches_state")
        ),
        sa.ForeignKeyConstraint(
            ["run_id"], ["runs.run_id"], name="fk_dispatches_run_id", ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("seq", name="pk_dispatches"),
        sa.UniqueConstraint(
            "run_id", "handler", "event", "round", name="uq_dispatches_run_id_handler_event_round"
        ),
    )
    with op.batch_alter_table("dispatches", schema=None) as batch_op:
        batch_op.create_index(
            "ix_dispatches_dead",
            ["seq"],
            unique=False,
            sqlite_where=sa.text("state = 'dead'"),
            postgresql_where=sa.text("state = 'dead'"),
        )
        batch_op.create_index(
            "ix_dispatches_due",
            ["handler", "due_at"],
            unique=False,
            sqlite_where=sa.text("state IN ('ready', 'leased')"),
            postgresql_where=sa.text("state IN ('ready', 'leased')"),
        )

    op.create_table(
        "outputs",
        sa.Column("run_id", sa.Text(), nullable=False),
        sa.Column("position", sa.Integer(), nullable=False),
        sa.Column("output_id", sa.Text(), nullable=False),
        sa.Column("type", sa.Text(), nullable=False),
        sa.Column("value", sa.Text(), nullable=False),
        sa.ForeignKeyConstraint(["run_id"], ["runs.run_id"], name="fk_outputs_run_id", ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("run_id", "position", name="pk_outputs"),
    )
    op.create_table(
        "dispatch_attempts",
        sa.Column("dispatch_seq", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False),
        sa.Column("attempt", sa.Integer(), nullable=False),
        sa.Column("started_at", sa.BigInteger(), nullable=False),
        sa.Column("ended_at", sa.BigInteger(), nullable=True),
        sa.Column("outcome", sa.Text(), nullable=True),
        sa.Column("error", sa.Text(), nullable=True),
        sa.ForeignKeyConstraint(
            ["dispatch_seq"],
            ["dispatches.seq"],
            name="fk_dispatch_attempts_dispatch_seq",
            ondelete="CASCADE",
        ),
        sa.PrimaryKeyConstraint("dispatch_seq", "attempt", name="pk_dispatch_attempts"),
    )


def downgrade() -> None:
    op.drop_table("dispatch_attempts")
    op.drop_table("outputs")
    with op.batch_alter_table("dispatches", schema=None) as batch_op:
        batch_op.drop_index(
            "ix_dispatches_due",
            sqlite_where=sa.text("state IN ('ready', 'leased')"),
            postgresql_where=sa.text("state IN ('ready', 'leased')"),
        )
        batch_op.drop_index(
            "ix_dispatches_dead",
            sqlite_where=sa.text("state = 'dead'"),
            postgresql_where=sa.text("state = 'dead'"),
        )

    op.drop_table("dispatches")
    op.drop_table("delivery_bodies")
    op.drop_table("artifacts")
    with op.batch_alter_table("runs", schema=None) as batch_op:
        batch_op.drop_index(
            "ix_runs_verdict_due",
            sqlite_where=sa.text("verdict_due_at IS NOT NULL"),
            postgresql_where=sa.text("verdict_due_at IS NOT NULL"),
        )
        batch_op.drop_index("ix_runs_first_seen_at")
        batch_op.drop_index(
            "ix_runs_due",
            sqlite_where=sa.text("next_poll_at IS NOT NULL"),
            postgresql_where=sa.text("next_poll_at IS NOT NULL"),
        )

    op.drop_table("runs")
    op.drop_table("rejections")
    with op.batch_alter_table("deliveries", schema=None) as batch_op:
        batch_op.drop_index("ix_deliveries_run_id")
        batch_op.drop_index("ix_deliveries_received_at")

    op.drop_table("deliveries")
