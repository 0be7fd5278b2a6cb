"""Callbacks: their bytes, their signature, their retries and every fault they can have."""

import asyncio
import json
import time
from pathlib import Path

import pytest

from receiver.emulator import EmulatorSettings
from receiver.errors import SignatureError, SignatureProblem
from receiver.flora.signature import HEADER, Verified, verify
from tests.emulator.conftest import Bench, Inbox, MakeBench

SECRET = "whsec_emulator"


def check(received: tuple[dict[str, str], bytes], *secrets: str) -> Verified:
    headers, body = received
    return verify(body, headers[HEADER.lower()], secrets or (SECRET,), now=int(time.time()))


async def test_a_completed_run_calls_back(bench: Bench, inbox: Inbox) -> None:
    """One POST with FLORA's headers and body, signed with the workspace's secret."""
    run_id = await bench.run_id(callback_url=inbox.url)
    await bench.drain()
    [(headers, body)] = inbox.received
    check((headers, body))
    event = json.loads(body)
    assert headers["content-type"] == "application/json"
    assert (headers["flora-webhook-id"], headers["flora-event"]) == (event["id"], "run.completed")
    assert event["data"] == {
        "run_id": run_id,
        "run_type": "technique",
        "workspace_id": "ws_emulator",
        "status": "completed",
    }
    assert bench.emulator.deliveries[0].state == "delivered"


async def test_a_failed_run_calls_back(bench: Bench, inbox: Inbox) -> None:
    """run.failed carries the code and a message."""
    await bench.run_id("emu-fail", callback_url=inbox.url)
    await bench.drain()
    event = json.loads(inbox.received[0][1])
    assert (event["type"], event["data"]["error_code"]) == ("run.failed", "GENERATION_PROMPT_MODERATED")
    assert event["data"]["error_message"]


async def test_four_attempts_with_the_same_bytes(bench: Bench, inbox: Inbox) -> None:
    """Any status but 2xx is retried three times with the same body and signature.

    Redirects are not followed.
    """
    inbox.answers = [500, 302, 404, 503]
    await bench.run_id(callback_url=inbox.url)
    await bench.drain()
    assert len({(headers[HEADER.lower()], body) for headers, body in inbox.received}) == 1
    listed = (await bench.client.get(f"{bench.origin}/_emulator/deliveries")).json()["deliveries"]
    assert listed[0]["state"] == "failed"
    assert [(one["attempt"], one["status"]) for one in listed[0]["attempts"]] == [
        (1, 500),
        (2, 302),
        (3, 404),
        (4, 503),
    ]


async def test_retries_end_with_a_2xx(bench: Bench, inbox: Inbox) -> None:
    """The second attempt is accepted, so there is no third."""
    inbox.answers = [500]
    run_id = await bench.run_id(callback_url=inbox.url)
    await bench.drain()
    listed = await bench.client.get(f"{bench.origin}/_emulator/deliveries", params={"run_id": run_id})
    assert [one["status"] for one in listed.json()["deliveries"][0]["attempts"]] == [500, 200]


async def test_a_refused_connection(bench: Bench) -> None:
    """A refused connection is an error of each of the four attempts."""
    await bench.run_id(callback_url="http://127.0.0.1:1/x")
    await bench.drain()
    assert [attempt.error is not None for attempt in bench.emulator.deliveries[0].attempts] == [True] * 4


async def test_a_receiver_that_never_responds(make_bench: MakeBench) -> None:
    """The timeout counts as a failed attempt."""
    released = asyncio.Event()

    async def silent(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await released.wait()
        writer.close()

    server = await asyncio.start_server(silent, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    bench = await make_bench(
        EmulatorSettings(
            run_seconds=0, time_scale=10_000, allow_private_callbacks=True, callback_timeout_seconds=0.05
        )
    )
    await bench.run_id(callback_url=f"http://127.0.0.1:{port}/x")
    await bench.drain()
    released.set()
    server.close()
    await server.wait_closed()
    assert [(one.error or "").partition(":")[0] for one in bench.emulator.deliveries[0].attempts] == [
        "TimeoutError"
    ] * 4


async def test_drop(bench: Bench, inbox: Inbox) -> None:
    """Nothing arrives; with `attempts`, only the named ones are lost."""
    await bench.run_id(callback_url=inbox.url, faults={"kind": "drop"})
    await bench.run_id(callback_url=inbox.url, faults={"kind": "drop", "attempts": [1, 2]})
    await bench.drain()
    lost, late = bench.emulator.deliveries
    assert (lost.state, [one.error for one in lost.attempts]) == ("failed", ["dropped"] * 4)
    assert [one.status for one in late.attempts] == [None, None, 200]
    assert inbox.run_ids() == [late.run_id]


async def test_duplicate(bench: Bench, inbox: Inbox) -> None:
    """Two copies besides the original, all the same bytes."""
    await bench.run_id(callback_url=inbox.url, faults={"kind": "duplicate", "copies": 2})
    await bench.drain()
    assert len(inbox.received) == 3
    assert len({body for _, body in inbox.received}) == 1


async def test_delay_and_reorder(bench: Bench, inbox: Inbox) -> None:
    """A reordered callback lets the next one overtake it."""
    first = await bench.run_id(callback_url=inbox.url, faults={"kind": "reorder"})
    second = await bench.run_id(callback_url=inbox.url, faults={"kind": "delay", "seconds": 0.01})
    await bench.drain()
    assert inbox.run_ids() == [second, first]


@pytest.mark.parametrize(
    ("fault", "problem"),
    [
        ({"kind": "corrupt"}, SignatureProblem.SIGNATURE_MISMATCH),
        ({"kind": "wrong_secret"}, SignatureProblem.SIGNATURE_MISMATCH),
        ({"kind": "old_secret", "secret": "whsec_old"}, SignatureProblem.SIGNATURE_MISMATCH),
        ({"kind": "stale", "seconds": 901}, SignatureProblem.TIMESTAMP_OUT_OF_TOLERANCE),
        ({"kind": "stale", "seconds": -400}, SignatureProblem.TIMESTAMP_OUT_OF_TOLERANCE),
    ],
)
async def test_callbacks_that_do_not_verify(
    bench: Bench, inbox: Inbox, fault: dict[str, object], problem: SignatureProblem
) -> None:
    """Each is refused for its own reason."""
    await bench.run_id(callback_url=inbox.url, faults=fault)
    await bench.drain()
    with pytest.raises(SignatureError) as refused:
        check(inbox.received[0])
    assert refused.value.problem is problem


async def test_old_secret_verifies_with_the_old_secret(bench: Bench, inbox: Inbox) -> None:
    """A receiver that still has the old secret accepts the callback."""
    await bench.run_id(callback_url=inbox.url, faults={"kind": "old_secret", "secret": "whsec_old"})
    await bench.drain()
    assert check(inbox.received[0], SECRET, "whsec_old").secret == 1


async def test_rotation_signs_twice(make_bench: MakeBench, inbox: Inbox) -> None:
    """Both secrets verify the one header."""
    bench = await make_bench(
        EmulatorSettings(
            run_seconds=0,
            allow_private_callbacks=True,
            webhook_secrets=("whsec_new", "whsec_old"),
            sign_with_all=True,
        )
    )
    await bench.run_id(callback_url=inbox.url)
    await bench.drain()
    check(inbox.received[0], "whsec_old")
    check(inbox.received[0], "whsec_new")


async def test_timestamps_refreshed_on_retry(bench: Bench, inbox: Inbox) -> None:
    """A stale first attempt followed by a fresh second: the header changes, the body does not."""
    inbox.answers = [500]
    faults = [{"kind": "stale", "attempts": [1]}, {"kind": "refresh_timestamp"}]
    await bench.run_id(callback_url=inbox.url, faults=faults)
    await bench.drain()
    first, second = inbox.received
    with pytest.raises(SignatureError):
        check(first)
    check(second)
    assert first[1] == second[1]


async def test_contradict(bench: Bench, inbox: Inbox) -> None:
    """The callback says failed, the API says completed."""
    run = await bench.start(body={"callback_url": inbox.url}, faults={"kind": "contradict"})
    await bench.drain()
    check(inbox.received[0])
    assert json.loads(inbox.received[0][1])["type"] == "run.failed"
    assert (await bench.client.get(str(run["poll_url"]))).json()["status"] == "completed"


async def test_callback_before_the_api_knows(bench: Bench, inbox: Inbox) -> None:
    """With a read lag the callback arrives while reads still state running."""
    run = await bench.start(body={"callback_url": inbox.url}, faults={"kind": "read_lag", "seconds": 3600})
    await bench.drain()
    assert len(inbox.received) == 1
    assert (await bench.client.get(str(run["poll_url"]))).json()["status"] == "running"


async def test_faults_bound_to_a_run_that_waits(bench: Bench, inbox: Inbox) -> None:
    """A run of an hour is made to end now and to fail: its callback follows, once."""
    run_id = await bench.run_id(callback_url=inbox.url, faults={"kind": "run_seconds", "seconds": 3600})
    faults = [{"kind": "run_seconds", "seconds": 0}, {"kind": "fail", "error_code": "model_timeout"}]
    path = f"{bench.origin}/_emulator/runs/{run_id}/faults"
    assert (await bench.client.post(path, json={"faults": faults})).status_code == 200
    await bench.drain()
    [(_, body)] = inbox.received
    assert json.loads(body)["data"]["error_code"] == "model_timeout"


async def test_closing_cancels_what_waits(bench: Bench, inbox: Inbox) -> None:
    """After aclose nothing is sent any more."""
    await bench.run_id(callback_url=inbox.url, faults={"kind": "run_seconds", "seconds": 3600})
    await bench.emulator.aclose()
    await bench.drain()
    assert inbox.received == []


async def test_the_ca_is_the_only_one_trusted(make_bench: MakeBench, tls_inbox: tuple[Inbox, Path]) -> None:
    """HTTPS with `callback_ca` arrives, without it the certificate is refused."""
    inbox, authority = tls_inbox
    for callback_ca, arrived in ((None, 0), (authority, 1)):
        bench = await make_bench(
            EmulatorSettings(
                run_seconds=0, time_scale=10_000, allow_private_callbacks=True, callback_ca=callback_ca
            )
        )
        await bench.run_id(callback_url=inbox.url)
        await bench.drain()
        assert len(inbox.received) == arrived
