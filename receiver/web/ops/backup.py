"""The endpoint that copies the ledger: no process but the service may open its file."""

from collections.abc import Sequence
from http import HTTPStatus
from pathlib import Path

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from receiver.client.messages import Backup
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
        size = await self._database.read(lambda tx: backup.copy(tx, target))
        return json_response(Backup(path=str(target), size=size))
