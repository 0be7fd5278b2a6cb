"""Thumbnails: artifacts at positions below the manifest's."""

from collections.abc import Sequence

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"

_CHECK = "position >= -1"


def upgrade() -> None:
    if op.get_bind().dialect.name == "postgresql":
        op.drop_constraint(op.f("ck_artifacts_position"), "artifacts", type_="check")
        return
    _rebuild([])


def downgrade() -> None:
    op.execute(f"DELETE FROM artifacts WHERE NOT {_CHECK}")  # noqa: S608 - a constant
    if op.get_bind().dialect.name == "postgresql":
        op.create_check_constraint(op.f("ck_artifacts_position"), "artifacts", _CHECK)
        return
    _rebuild([sa.CheckConstraint(_CHECK, name=op.f("ck_artifacts_position"))])


def _rebuild(checks: Sequence[sa.CheckConstraint]) -> None:
    """Make the table anew, as SQLite changes no constraint of one that exists; alembic cannot read CHECKs from it."""
    table = sa.Table(
        "artifacts",
        sa.MetaData(),
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
        *checks,
        sa.ForeignKeyConstraint(
            ["run_id"], ["runs.run_id"], name="fk_artifacts_run_id", ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("run_id", "handler", "position", name="pk_artifacts"),
        sa.UniqueConstraint("handler", "location", name="uq_artifacts_handler_location"),
    )
    with op.batch_alter_table("artifacts", copy_from=table, recreate="always"):
        pass
