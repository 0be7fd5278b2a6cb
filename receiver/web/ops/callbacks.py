"""Endpoints on callbacks: those received, those refused, and the health of the channel."""

from collections.abc import Callable, Sequence
from datetime import datetime, timedelta

from sqlalchemy import Connection
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from receiver.client.messages import ChannelView, DeliveryPage, OneDelivery, RejectionPage
from receiver.decide.channel import channel_health
from receiver.store import Database, channel, queries
from receiver.web.ops.requests import limit_of, next_cursor, path_of, sequence_of, text_of
from receiver.web.ops.responses import json_response, not_found
from receiver.web.ops.views import to_delivery
from receiver.web.values import LONGEST_ID

_CHANNEL_SPAN = timedelta(hours=24)


class CallbackRoutes:
    """`/api/deliveries`, `/api/rejections` and `/api/channel`."""

    def __init__(self, database: Database, *, clock: Callable[[], datetime]) -> None:
        self._database = database
        self._clock = clock

    def routes(self) -> Sequence[BaseRoute]:
        return (
            Route("/api/deliveries", self.deliveries, methods=["GET"]),
            Route("/api/deliveries/{delivery_id:path}", self.delivery, methods=["GET"]),
            Route("/api/rejections", self.rejections, methods=["GET"]),
            Route("/api/channel", self.channel, methods=["GET"]),
        )

    async def deliveries(self, request: Request) -> Response:
        limit, before = limit_of(request), sequence_of(request)
        run_id = text_of(request, "run_id", longest=LONGEST_ID)
        page = await self._database.read(
            lambda tx: queries.delivery_page(tx, limit=limit, run_id=run_id, before=before)
        )
        cursor = next_cursor(page, limit, lambda row: (row.seq, ""))
        return json_response(
            DeliveryPage(deliveries=[to_delivery(row) for row in page], next_cursor=cursor)
        )

    async def delivery(self, request: Request) -> Response:
        delivery_id = path_of(request, "delivery_id")
        found = await self._database.read(lambda tx: queries.delivery_by_id(tx, delivery_id))
        if found is None:
            raise not_found("delivery")
        body = None if found.body is None else found.body.decode("utf-8", "replace")
        return json_response(OneDelivery(delivery=to_delivery(found, signature=found.signature, body=body)))

    async def rejections(self, request: Request) -> Response:
        limit, before = limit_of(request), sequence_of(request)
        page = await self._database.read(lambda tx: queries.rejection_page(tx, limit=limit, before=before))
        cursor = next_cursor(page, limit, lambda row: (row[0], ""))
        return json_response(RejectionPage(rejections=[row for _, row in page], next_cursor=cursor))

    async def channel(self, _: Request) -> Response:
        since = self._clock() - _CHANNEL_SPAN
        return json_response(await self._database.read(lambda tx: _read_channel(tx, since)))


def _read_channel(tx: Connection, since: datetime) -> ChannelView:
    hours = channel.outcomes_by_hour(tx, since=since)
    verdicts: dict[str, int] = {}
    for counts in hours.values():
        for verdict, runs in counts.items():
            verdicts[verdict] = verdicts.get(verdict, 0) + runs
    arrivals, refusals = channel.count_arrivals(tx, since=since), channel.count_refusals(tx, since=since)
    return ChannelView(
        since=since,
        health=channel_health(verdicts, arrivals=arrivals, refusals=refusals),
        late=verdicts.get("late", 0),
        arrivals=arrivals,
        refusals=refusals,
        hours=[{"hour": hour.isoformat(), **counts} for hour, counts in hours.items()],
    )
