"""The OpenAPI document, compared with the routes and with responses."""

import re
from typing import Any

from starlette.routing import Route

from receiver.service.service import Service
from receiver.web.ops.openapi import openapi_document
from tests.web.ops.conftest import Ops


def routes(service: Service) -> set[tuple[str, str]]:
    """Return every (method, path) that the listener serves."""
    assert service._operations is not None
    app: Any = service._operations.config.app
    return {
        (method.lower(), re.sub(r":\w+}", "}", route.path))
        for route in app.routes
        if isinstance(route, Route)
        for method in route.methods or ()
        if method != "HEAD"
    }


async def test_every_route_is_described(ops: Ops) -> None:
    """No other route is described, and every schema is defined and used."""
    found = await ops.get("/api/openapi.json")
    described = {(method, path) for path, methods in found["paths"].items() for method in methods}
    assert described == routes(ops.service)
    referred = set(re.findall(r"#/components/schemas/(\w+)", str(found)))
    assert referred == set(found["components"]["schemas"])
    for path, methods in found["paths"].items():
        for operation in methods.values():
            named = {row["name"] for row in operation["parameters"] if row["in"] == "path"}
            assert named == set(re.findall(r"{(\w+)}", path))
            assert {"401", "403", "503"} <= operation["responses"].keys()


async def test_told_is_deprecated_beside_callback_status(ops: Ops) -> None:
    run = (await ops.get(f"/api/runs/{await ops.run_to_end()}"))["run"]
    assert (run["callback_status"], run["told"]) == ("completed", "completed")
    described = openapi_document()["components"]["schemas"]["Run"]["properties"]
    assert described["told"]["deprecated"]
    assert "deprecated" not in described["callback_status"]


async def test_responses_are_as_described(ops: Ops) -> None:
    """Every key of a response is in its schema."""
    run_id = await ops.run_to_end(idempotency_key="k")
    delivery = (await ops.get("/api/deliveries"))["deliveries"][0]["delivery_id"]
    for path, described in (
        ("/api/runs", "RunPage"),
        (f"/api/runs/{run_id}", "OneRun"),
        (f"/api/runs/{run_id}/timeline", "Timeline"),
        ("/api/starts", "StartPage"),
        ("/api/deliveries", "DeliveryPage"),
        (f"/api/deliveries/{delivery}", "OneDelivery"),
        ("/api/dispatches?state=done", "DispatchPage"),
        ("/api/channel", "Channel"),
        ("/api/techniques/emu-image", "OneTechnique"),
    ):
        check_keys(await ops.get(path), {"$ref": f"#/components/schemas/{described}"}, path)
    again = await ops.start(idempotency_key="k", status=200)
    check_keys(again, {"$ref": "#/components/schemas/Started"}, "start")


def check_keys(value: Any, schema: dict[str, Any], where: str) -> None:
    """Compare the keys of a response with its schema."""
    if "anyOf" in schema:
        schema = schema["anyOf"][0]
    if "$ref" in schema:
        schema = openapi_document()["components"]["schemas"][schema["$ref"].rpartition("/")[2]]
    if isinstance(value, list):
        for each in value:
            check_keys(each, schema["items"], where)
    elif isinstance(value, dict) and "properties" in schema:
        unknown = value.keys() - schema["properties"].keys()
        assert not unknown or schema.get("additionalProperties"), f"{where}: {unknown}"
        for key in value.keys() & schema["properties"].keys():
            check_keys(value[key], schema["properties"][key], f"{where}.{key}")
