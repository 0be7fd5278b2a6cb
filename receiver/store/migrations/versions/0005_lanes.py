"""Lanes: large outputs do not keep small ones waiting."""

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"

_UNFINISHED = sa.text("state IN ('ready', 'leased')")


def upgrade() -> None:
    # One statement, not a batch: that would copy the table on SQLite, and drop the attempts that refer to it.
    op.execute(
        "ALTER TABLE dispatches ADD COLUMN lane TEXT DEFAULT 'light' NOT NULL "
        "CONSTRAINT ck_dispatches_lane CHECK (lane IN ('light', 'heavy'))"
    )
    op.drop_index("ix_dispatches_due", "dispatches")
    op.create_index(
        "ix_dispatches_due",
        "dispatches",
        ["handler", "lane", "due_at", "seq"],
        sqlite_where=_UNFINISHED,
        postgresql_where=_UNFINISHED,
    )


def downgrade() -> None:
    op.drop_index("ix_dispatches_due", "dispatches")
    op.execute("ALTER TABLE dispatches DROP COLUMN lane")
    op.create_index(
        "ix_dispatches_due",
        "dispatches",
        ["handler", "due_at"],
        sqlite_where=_UNFINISHED,
        postgresql_where=_UNFINISHED,
    )
