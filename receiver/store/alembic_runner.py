"""Runs the migrations with Alembic. Imported by `migrate` only if there is something to migrate."""

from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.util import CommandError
from sqlalchemy import Connection

from receiver.errors import StoreUnavailableError


def run_migrations(connection: Connection, *, before: str | None, head: str) -> None:
    """Upgrade a database from revision `before` to `head`.

    Raises StoreUnavailableError if this version does not know the revision.
    """
    try:
        command.upgrade(alembic_config(connection), "head")
    except CommandError as error:
        raise StoreUnavailableError(
            f"the database is at revision {before}, which this version ({head}) does not know: a newer flora-receiver "
            "made it, so run that one, or start with another database"
        ) from error


def alembic_config(connection: Connection) -> Config:
    """Return the configuration under which Alembic works on a connection with our migrations."""
    config = Config()
    scripts = str(Path(__file__).with_name("migrations"))
    config.set_main_option("script_location", scripts.replace("%", "%%"))
    config.attributes["connection"] = connection
    return config
