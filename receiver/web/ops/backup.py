"""The endpoint that copies the ledger: no process but the service may open its file."""

from collections.abc import Sequence
from http import HTTPStatus
from pathlib import Path

from sqlalchemy import Connection
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from receiver.client.messages import Backup
from receiver.errors import StoreUnavailableError
from receiver.store import Database, backup
from receiver.web.ops.requests import BackupBody, read_body
from receiver.web.ops.responses import Refusal, json_response


class BackupRoutes:
    """`POST /api/backup`."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def routes(self) -> Sequence[BaseRoute]:
        return (Route("/api/backup", self.backup, methods=["POST"]),)

    async def backup(self, request: Request) -> Response:
        body = await read_body(request, BackupBody)
        if self._database.shared:
            message = "the ledger is on PostgreSQL: pg_dump makes copies of it"
            raise Refusal(HTTPStatus.BAD_REQUEST, "not_sqlite", message)
        target = Path(body.path)
        result = await self._database.read(lambda tx: _copy(tx, target))
        if isinstance(result, str):
            raise Refusal(HTTPStatus.CONFLICT, "not_written", result, fields=[("path", result)])
        return json_response(Backup(path=str(target), size=result))


def _copy(tx: Connection, target: Path) -> int | str:
    """Return the size of the copy, or why it was not written: that is about its path, not the ledger."""
    try:
        return backup.copy(tx, target)
    except StoreUnavailableError as error:
        return str(error)
