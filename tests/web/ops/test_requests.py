"""Requests of every kind to the operations API, on both databases: none breaks it."""

import asyncio
import json
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

from tests.support.fuzz import fuzz_ops
from tests.web.ops.conftest import Ops

NUL, LONG = "run_\0", "a" * 300
UNUSABLE: list[tuple[str, str]] = [
    *(
        (path.format(quote(value)), name)
        for value in (NUL, LONG)
        for path, name in (
            ("/api/runs/{}", "run_id"),
            ("/api/runs/{}/wait", "run_id"),
            ("/api/runs/{}/timeline", "run_id"),
            ("/api/techniques/{}", "technique_id"),
            ("/api/techniques/a?workspace_id={}", "workspace_id"),
            ("/api/deliveries/{}", "delivery_id"),
            ("/api/deliveries?run_id={}", "run_id"),
            ("/api/starts?key={}", "key"),
            ("/api/starts?prefix={}", "prefix"),
            ("/api/runs?cursor={}", "cursor"),
            ("/api/runs?limit={}", "limit"),
            ("/api/runs?state={}", "state"),
            ("/api/dispatches?orphaned={}", "orphaned"),
        )
    ),
    ("/api/runs?limit=", "limit"),
    ("/api/runs?cursor=" + "a" * 1001, "cursor"),
]
START = {"technique_id": "emu-image"}
UNUSABLE_BODIES: list[tuple[str, Any, str]] = [
    ("/api/runs", {**START, "metadata": {"a": ["\0"]}}, "metadata.a.0"),
    ("/api/runs", {**START, "metadata": {"a": "\ud800"}}, "metadata.a"),
    ("/api/runs", {**START, "metadata": {"\ud800": 1}}, "metadata"),
    ("/api/runs", {**START, "metadata": {"a": 2**63}}, "metadata.a"),
    ("/api/runs", {**START, "inputs": [{"value": "\0"}]}, "inputs.0.value"),
    ("/api/runs", {**START, "callback_url": "http://["}, "callback_url"),
    ("/api/runs", {"generate": {"callback_url": "http://["}}, "generate"),
    ("/api/runs", {"generate": {"prompt": "\0"}}, "generate.prompt"),
    ("/api/runs", {"generate": {}, "idempotency_key": "\u00fc"}, "idempotency_key"),
    ("/api/runs", {"generate": {}, "idempotency_key": "a "}, "idempotency_key"),
    ("/api/runs/track", {"run_id": "run_a", "metadata": {"a": "\0"}}, "metadata.a"),
    ("/api/runs/" + quote(NUL) + "/refresh", {}, "run_id"),
    ("/api/runs/" + quote(NUL) + "/redispatch", {}, "run_id"),
    ("/api/runs/run_a/redispatch", {"handler": "\0"}, "handler"),
    ("/api/runs/redispatch", {"handler": "\0", "since": "2026-01-01T00:00:00Z"}, "handler"),
    ("/api/dispatches/retry", {"handler": "\0"}, "handler"),
    ("/api/starts/" + quote(NUL) + "/resolve", {"run_id": "run_a"}, "token"),
    ("/api/starts/a/resolve", {"run_id": NUL}, "run_id"),
    ("/api/backup", {"path": "/."}, "path"),
    ("/api/backup", {"path": "/a/.."}, "path"),
]


async def test_an_unusable_value_is_refused_by_name(ops_on_both: Ops) -> None:
    """400 on either database, whatever part of the request the value is in."""
    for path, name in UNUSABLE:
        error = (await ops_on_both.get(path, 400))["error"]
        assert (error["code"], error["fields"][0]["field"]) == ("invalid_request", name), path
    for path, body, name in UNUSABLE_BODIES:
        response = await ops_on_both.http.post(
            path, content=json.dumps(body), headers={"Content-Type": "application/json"}
        )
        assert response.status_code == 400, (path, body, response.text)
        error = response.json()["error"]
        assert error["code"] == "invalid_request", (path, body)
        assert name in (error["fields"][0]["field"] or error["message"]), (path, body, error)


@pytest.mark.parametrize("number", [b"1e400", b"-1e999", b"18446744073709551616"])
async def test_a_number_that_no_column_holds_is_refused(ops: Ops, number: bytes) -> None:
    body = b'{"technique_id": "emu-image", "metadata": {"a": %s}}' % number
    response = await ops.http.post("/api/runs", content=body, headers={"Content-Type": "application/json"})
    assert response.status_code == 400
    assert response.json()["error"]["fields"][0]["field"] == "metadata.a"


async def test_a_copy_that_cannot_be_written_is_no_fault_of_the_service(ops: Ops, tmp_path: Path) -> None:
    """409 with the reason: repeating the request changes nothing."""
    for path in (ops.stage.database, tmp_path / "missing" / "copy.db", tmp_path / ("a" * 300)):
        error = (await ops.post("/api/backup", {"path": str(path)}, 409))["error"]
        assert (error["code"], error["fields"][0]["field"]) == ("not_written", "path")


@pytest.mark.filterwarnings("ignore:Generating overly large repr")  # hypothesis, about its own notes
async def test_no_request_breaks_the_api(ops_on_both: Ops, tmp_path: Path) -> None:
    """Requests made from the OpenAPI document: each response is documented, and none is a 5xx."""
    fuzz = await fuzz_ops(ops_on_both, tmp_path)
    found = await asyncio.to_thread(fuzz.run)
    assert found.failures == {}
    assert {200, 400, 404} <= found.statuses.keys(), found.statuses
    assert found.operations == fuzz.operations
