"""`flora-receiver migrate`: creates or upgrades the schema of the database."""

import asyncio
import os
from pathlib import Path

from receiver.cli.output import print_result, report_errors
from receiver.config import load_settings
from receiver.store import open_database
from receiver.store.migrate import upgrade


def run(config: Path | None, *, json: bool) -> None:
    with report_errors(as_json=json):
        settings = load_settings(config, os.environ, need_secrets=False)
        before, after = asyncio.run(_migrate(settings.database.url))
        done = f"migrated from {before or 'an empty file'} to {after}"
        text = f"The database is {done if before != after else f'up to date ({after})'}."
        print_result({"before": before, "after": after}, text, as_json=json)


async def _migrate(url: str) -> tuple[str | None, str]:
    database = open_database(url)
    try:
        return await database.run(upgrade)
    finally:
        await database.close()
