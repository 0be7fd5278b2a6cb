"""The tables. Times are integers of unix milliseconds; the CHECKs restate what `decide` promises.

Change them together with a migration: a test compares the two.
"""

from sqlalchemy import (
    BigInteger,
    Boolean,
    CheckConstraint,
    Column,
    Double,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    Table,
    Text,
    UniqueConstraint,
    text,
)

metadata = MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "ck": "ck_%(table_name)s_%(constraint_name)s",
        "fk": "fk_%(table_name)s_%(column_0_N_name)s",
        "pk": "pk_%(table_name)s",
    }
)

# In SQLite an INTEGER PRIMARY KEY is the row id; a BIGINT one would be a second index.
_Seq = BigInteger().with_variant(Integer, "sqlite")

runs = Table(
    "runs",
    metadata,
    Column("run_id", Text, primary_key=True),
    Column("state", Text, nullable=False),
    Column("origin", Text, nullable=False),
    Column("first_seen_at", BigInteger, nullable=False),
    Column("deadline_at", BigInteger, nullable=False),
    Column("run_type", Text),
    Column("technique_id", Text),
    Column("workspace_id", Text),
    Column("project_id", Text),
    Column("poll_url", Text),
    Column("progress", Integer),
    Column("created_at", BigInteger),
    Column("started_at", BigInteger),
    Column("completed_at", BigInteger),
    Column("error_code", Text),
    Column("error_message", Text),
    Column("charged_cost", Double),
    Column("quoted_cost", Double),
    Column("metadata", Text, nullable=False),
    Column("callback_expected", Boolean, nullable=False),
    Column("told", Text),
    Column("reported_at", BigInteger),
    Column("settled_at", BigInteger),
    Column("verdict", Text),
    Column("verdict_due_at", BigInteger),
    Column("lost_reason", Text),
    Column("losses", Integer, nullable=False),
    Column("next_poll_at", BigInteger),
    Column("polls", Integer, nullable=False),
    # The default is for replicas of an earlier version that still run while this one starts.
    Column("failed_polls", Integer, nullable=False, server_default="0"),
    Column("ladder", Integer, nullable=False),
    Column("failures", Integer, nullable=False),
    Column("missing", Integer, nullable=False),
    Column("missing_since", BigInteger),
    Column("cost_due_at", BigInteger),
    Column("version", Integer, nullable=False),
    CheckConstraint("state IN ('open', 'reported', 'completed', 'failed', 'lost')", name="state"),
    CheckConstraint("origin IN ('started', 'tracked', 'callback', 'discovered')", name="origin"),
    CheckConstraint("verdict IN ('matched', 'recovered', 'late', 'diverged')", name="verdict"),
    CheckConstraint("told IN ('completed', 'failed', 'both')", name="told"),
    CheckConstraint("(state IN ('completed', 'failed')) = (settled_at IS NOT NULL)", name="settled"),
    CheckConstraint("(state = 'lost') = (lost_reason IS NOT NULL)", name="lost"),
    CheckConstraint("state <> 'reported' OR reported_at IS NOT NULL", name="reported"),
    CheckConstraint("state NOT IN ('open', 'reported') OR next_poll_at IS NOT NULL", name="polled"),
    # Partial indexes have the unsettled runs only: a poll costs the same with ten million settled
    # ones.
    Index("ix_runs_due", "next_poll_at", sqlite_where=text("next_poll_at IS NOT NULL"),
          postgresql_where=text("next_poll_at IS NOT NULL")),
    Index("ix_runs_verdict_due", "verdict_due_at", sqlite_where=text("verdict_due_at IS NOT NULL"),
          postgresql_where=text("verdict_due_at IS NOT NULL")),
    Index("ix_runs_first_seen_at", "first_seen_at"),
)  # fmt: skip

outputs = Table(
    "outputs",
    metadata,
    Column("run_id", Text, ForeignKey("runs.run_id", ondelete="CASCADE"), primary_key=True),
    Column("position", Integer, primary_key=True),
    Column("output_id", Text, nullable=False),
    Column("type", Text, nullable=False),
    Column("value", Text, nullable=False),
)

run_reads = Table(
    "run_reads",
    metadata,
    Column("run_id", Text, ForeignKey("runs.run_id", ondelete="CASCADE"), primary_key=True),
    # The number of the read, modulo how many are kept: a new one takes the place of the oldest.
    Column("slot", Integer, primary_key=True),
    Column("requested_at", BigInteger, nullable=False),
    Column("source", Text, nullable=False),
    Column("outcome", Text, nullable=False),
    Column("run_status", Text),
    Column("http_status", Integer),
    Column("problem", Text),
    Column("request_id", Text),
    Column("duration_ms", Integer),
    CheckConstraint("outcome IN ('returned', 'not_found', 'failed')", name="outcome"),
    CheckConstraint("source IN ('run', 'list')", name="source"),
)

deliveries = Table(
    "deliveries",
    metadata,
    Column("seq", _Seq, primary_key=True, autoincrement=True),
    Column("delivery_id", Text, nullable=False, unique=True),
    Column("run_id", Text),
    Column("event", Text),
    Column("api_version", Text),
    Column("received_at", BigInteger, nullable=False),
    Column("age", Integer, nullable=False),
    Column("secret", Integer, nullable=False),
    Column("readable", Boolean, nullable=False),
    Column("duplicates", Integer, nullable=False),
    Column("last_duplicate_at", BigInteger),
    Index("ix_deliveries_run_id", "run_id"),
    Index("ix_deliveries_received_at", "received_at"),
)

delivery_bodies = Table(
    "delivery_bodies",
    metadata,
    Column(
        "seq", _Seq, ForeignKey("deliveries.seq", ondelete="CASCADE"), primary_key=True, autoincrement=False
    ),
    Column("signature", Text, nullable=False),
    Column("body", LargeBinary, nullable=False),
)

dispatches = Table(
    "dispatches",
    metadata,
    Column("seq", _Seq, primary_key=True, autoincrement=True),
    Column("run_id", Text, ForeignKey("runs.run_id", ondelete="CASCADE"), nullable=False),
    Column("handler", Text, nullable=False),
    Column("event", Text, nullable=False),
    Column("round", Integer, nullable=False),
    Column("state", Text, nullable=False),
    Column("attempts", Integer, nullable=False),
    Column("due_at", BigInteger, nullable=False),
    Column("lease_token", Text),
    Column("lease_until", BigInteger),
    Column("last_error", Text),
    Column("result", Text),
    Column("finished_at", BigInteger),
    # The default is for replicas of an earlier version that still run while this one starts.
    Column("lane", Text, nullable=False, server_default="light"),
    UniqueConstraint("run_id", "handler", "event", "round"),
    CheckConstraint("state IN ('ready', 'leased', 'done', 'dead', 'skipped')", name="state"),
    CheckConstraint("event IN ('settled', 'cost_final', 'lost', 'diverged', 'dead')", name="event"),
    CheckConstraint(
        "(state = 'leased') = (lease_token IS NOT NULL) AND (state = 'leased') = (lease_until IS NOT NULL)", name="lease"
    ),
    CheckConstraint("lane IN ('light', 'heavy')", name="lane"),
    Index("ix_dispatches_due", "handler", "lane", "due_at", "seq", sqlite_where=text("state IN ('ready', 'leased')"),
          postgresql_where=text("state IN ('ready', 'leased')")),
    Index("ix_dispatches_dead", "seq", sqlite_where=text("state = 'dead'"), postgresql_where=text("state = 'dead'")),
)  # fmt: skip

dispatch_attempts = Table(
    "dispatch_attempts",
    metadata,
    Column("dispatch_seq", _Seq, ForeignKey("dispatches.seq", ondelete="CASCADE"), primary_key=True),
    Column("attempt", Integer, primary_key=True),
    Column("started_at", BigInteger, nullable=False),
    Column("ended_at", BigInteger),
    Column("outcome", Text),
    Column("error", Text),
)

artifacts = Table(
    "artifacts",
    metadata,
    Column("run_id", Text, ForeignKey("runs.run_id", ondelete="CASCADE"), primary_key=True),
    Column("handler", Text, primary_key=True),
    Column("position", Integer, primary_key=True),
    Column("output_id", Text, nullable=False),
    Column("location", Text, nullable=False),
    Column("size", BigInteger),
    Column("sha256", Text),
    Column("content_type", Text),
    Column("stored_at", BigInteger),
    UniqueConstraint("handler", "location"),
    CheckConstraint("(stored_at IS NULL) = (sha256 IS NULL)", name="stored"),
)

starts = Table(
    "starts",
    metadata,
    Column("token", Text, primary_key=True),
    Column("workspace_id", Text, nullable=False),
    Column("operation", Text, nullable=False),
    Column("technique_id", Text, nullable=False),
    Column("idempotency_key", Text, nullable=False),
    Column("request", Text, nullable=False),
    Column("request_hash", Text, nullable=False),
    Column("metadata", Text, nullable=False),
    Column("callback_expected", Boolean, nullable=False),
    Column("state", Text, nullable=False),
    Column("created_at", BigInteger, nullable=False),
    Column("due_at", BigInteger, nullable=False),
    Column("attempts", Integer, nullable=False),
    Column("run_id", Text),
    Column("error_status", Integer),
    Column("error_code", Text),
    Column("error_message", Text),
    Column("error_fields", Text, nullable=False),
    Column("request_id", Text),
    UniqueConstraint("workspace_id", "operation", "technique_id", "idempotency_key"),
    CheckConstraint("state IN ('asking', 'started', 'refused', 'unknown')", name="state"),
    CheckConstraint("operation IN ('technique_run', 'generate')", name="operation"),
    CheckConstraint("(state = 'started') = (run_id IS NOT NULL)", name="started"),
    Index("ix_starts_asking", "due_at", sqlite_where=text("state = 'asking'"), postgresql_where=text("state = 'asking'")),
    Index("ix_starts_run_id", "run_id"),
)  # fmt: skip

channel_hours = Table(
    "channel_hours",
    metadata,
    Column("hour", BigInteger, primary_key=True),
    Column("outcome", Text, primary_key=True),
    Column("runs", Integer, nullable=False),
)

watermarks = Table(
    "watermarks",
    metadata,
    Column("scope", Text, primary_key=True),
    Column("created_at", BigInteger, nullable=False),
    Column("swept_at", BigInteger, nullable=False),
)

rejections = Table(
    "rejections",
    metadata,
    Column("seq", _Seq, primary_key=True, autoincrement=True),
    Column("rejected_at", BigInteger, nullable=False),
    Column("code", Text, nullable=False),
    Column("remote", Text),
    Column("size", Integer, nullable=False),
)

leases = Table(
    "leases",
    metadata,
    Column("name", Text, primary_key=True),
    Column("owner", Text, nullable=False),
    Column("token", Text, nullable=False),
    Column("until", BigInteger, nullable=False),
)
