"""A newer version starts beside this one on the same PostgreSQL and migrates it: this one goes on until it is replaced.

The newer version is this version's code with one migration more, which does what migrations may: it adds columns with
defaults, a table and its keys, exchanges an index and loosens a CHECK. What earlier migrations did is held in
`tests/store/test_migrations.py`.
"""

import asyncio
import shutil
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from receiver.store.migrate import HEAD
from tests.support.lives import ROOT, Served, served
from tests.support.postgres import Postgres
from tests.support.stage import Stage, eventually, run_stage

NEXT = f"""
import sqlalchemy as sa
from alembic import op

revision = "next"
down_revision = "{HEAD}"


def upgrade():
    op.add_column("runs", sa.Column("label", sa.Text()))
    op.execute("ALTER TABLE deliveries ADD COLUMN way TEXT NOT NULL DEFAULT 'front' CHECK (way IN ('front', 'back'))")
    op.add_column("dispatches", sa.Column("weight", sa.Integer(), nullable=False, server_default="1"))
    op.add_column("delivery_bodies", sa.Column("coding", sa.Text(), nullable=False, server_default="identity"))
    op.drop_constraint(op.f("ck_runs_verdict"), "runs", type_="check")
    op.create_check_constraint(
        op.f("ck_runs_verdict"), "runs", "verdict IN ('matched', 'recovered', 'late', 'diverged', 'early')"
    )
    op.drop_index("ix_dispatches_due", "dispatches")
    op.create_index("ix_dispatches_due", "dispatches", ["handler", "lane", "weight", "due_at"])
    op.create_index("ix_deliveries_way", "deliveries", ["way", "received_at"])
    op.create_table(
        "notes",
        sa.Column("run_id", sa.Text(), sa.ForeignKey("runs.run_id", ondelete="CASCADE"), primary_key=True),
        sa.Column("text", sa.Text(), nullable=False),
    )
"""


@pytest.fixture
async def stage(tmp_path: Path, postgres_server: Postgres) -> AsyncIterator[Stage]:
    """On a database of its own, since it ends up at a revision that no other test knows."""
    async with run_stage(tmp_path) as made:
        made.postgres = postgres_server.create("upgraded", migrated=False)
        yield made
    postgres_server.execute("DROP DATABASE upgraded WITH (FORCE)")


def next_version(directory: Path) -> dict[str, str]:
    """Make the newer version; return the environment in which the command is that."""
    package = directory / "next/receiver"
    shutil.copytree(ROOT / "receiver", package, ignore=shutil.ignore_patterns("__pycache__"))
    (package / "store/migrations/versions/9999_next.py").write_text(NEXT)
    module = package / "store/migrate.py"
    text = module.read_text()
    line = f'HEAD = "{HEAD}"\n'
    assert line in text
    module.write_text(text.replace(line, 'HEAD = "next"\n'))
    return {"PYTHONPATH": str(package.parent)}


async def test_a_replica_goes_on_while_the_next_version_migrates(stage: Stage) -> None:
    """Under load, beside the newer one and then without it: it takes callbacks, reads, settles and stores as before.

    Once stopped it cannot start again: it would not know what else is there.
    """
    newer = next_version(stage.directory)
    logs = [stage.directory / name for name in ("old.log", "new.log")]
    async with stage.client() as client:
        with logs[0].open("wb") as log:
            async with served(stage, stdout=log.fileno()) as old:
                await old.ready(client)
                run_ids = [stage.start() for _ in range(10)]
                load = asyncio.create_task(_load(stage, run_ids))
                with logs[1].open("wb") as other:
                    arguments = ("--port", "0")  # FLORA calls the old one
                    async with served(
                        stage, arguments=arguments, stdout=other.fileno(), environ=newer
                    ) as new:
                        await eventually(lambda: _ready(new, logs[1]))
                        assert stage.rows("SELECT version_num FROM alembic_version") == [
                            {"version_num": "next"}
                        ]
                        told = f'"after": "next", "before": "{HEAD}", "event": "database.migrated"'.split(
                            ", "
                        )
                        assert all(word in logs[1].read_text() for word in told)
                        run_ids += [stage.start() for _ in range(10)]
                        await stage.over(*run_ids)
                        assert await new.stop() == 0
                load.cancel()
                alone = [stage.start("emu-everything") for _ in range(10)]
                await stage.over(*run_ids, *alone)
                assert await old.stop() == 0
        async with served(stage) as again:
            assert await again.ended() == 1
        assert b"newer flora-receiver" in again.said
    for run_id in (*run_ids, *alone):
        stage.check_files(run_id)
        assert {row["state"] for row in stage.dispatches(run_id) if row["event"] == "settled"} == {"done"}
    assert stage.rows("SELECT DISTINCT label, verdict FROM runs") == [{"label": None, "verdict": "matched"}]
    assert stage.rows("SELECT DISTINCT way FROM deliveries") == [{"way": "front"}]
    assert {row["weight"] for row in stage.rows("SELECT DISTINCT weight FROM dispatches")} == {1}
    for trouble in ("loop.failed", "dispatch.dead"):
        assert trouble not in logs[0].read_text()


async def _ready(life: Served, log: Path) -> bool:
    text = log.read_text()  # noqa: ASYNC240 -- a few lines
    assert life.process.returncode is None, text
    return '"service.ready"' in text


async def _load(stage: Stage, run_ids: list[str]) -> None:
    """Start a run whenever the one before is in the ledger, so that the migration meets writers at any moment."""
    while True:
        run_ids.append(run_id := stage.start())

        async def known(run_id: str = run_id) -> bool:
            return bool(stage.deliveries(run_id))

        await eventually(known)
