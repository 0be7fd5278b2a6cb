"""The operations API on copies of the ledger: the service makes them itself, since nobody else may open its file."""

from collections.abc import Sequence
from pathlib import Path

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from receiver.store import Database, backup
from receiver.web.ops import requests as bodies
from receiver.web.ops.responses import Refusal, answered


class Backups:
    """One endpoint."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def routes(self) -> Sequence[BaseRoute]:
        return (Route("/api/backup", self.backup, methods=["POST"]),)

    async def backup(self, request: Request) -> Response:
        body = await bodies.read(request, bodies.BackupBody)
        if self._database.shared:
            raise Refusal(400, "not_sqlite", "the ledger is on PostgreSQL: pg_dump makes copies of it")
        target = Path(body.path)
        size = await self._database.read(lambda tx: backup.copy(tx, target))
        return answered({"path": str(target), "size": size})
