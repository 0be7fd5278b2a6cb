"""Why a run stands where it stands, in words. Pure: from what `GET /api/runs/{run_id}/timeline` answers."""

import json
from collections.abc import Iterator, Mapping
from typing import Any

_STATES = {
    "open": "FLORA has not shown its end yet.",
    "reported": "A callback says that it ended; FLORA's API does not show that yet.",
    "completed": "It completed.",
    "failed": "It failed.",
    "lost": "It was given up.",
}
_LOST = {
    "deadline": "It was still not over when its deadline passed ([reconcile] deadline_hours).",
    "not_found": "FLORA answered 404 for it again and again: it does not exist there, or not under this technique.",
    "no_outputs": "FLORA says that it completed, and never showed its outputs.",
}
_VERDICTS = {
    "matched": "Its callback came in time.",
    "recovered": "Its callback never came: polling brought it home. See `flora-receiver channel`.",
    "late": "Its callback came after it had been written off.",
    "diverged": "Its callback and FLORA's API contradict each other; what the API showed counts.",
}
_RESULT_LENGTH = 300


def explain_run(found: Mapping[str, Any]) -> list[str]:
    """Return the lines: where it stands, what is still to come, what to do, and what happened."""
    run = found["run"]
    return [
        f"{run['run_id']} is {run['state']}. {_STATES.get(run['state'], '')}",
        *_reasons(run),
        *_handlers(run),
        *_next(run, found["reads"]),
        "",
        "What happened (UTC):",
        *(f"  {entry['at'][:19].replace('T', ' ')}  {_told(entry)}" for entry in found["entries"]),
    ]


def _reasons(run: Mapping[str, Any]) -> Iterator[str]:
    if run["lost_reason"]:
        yield _LOST.get(run["lost_reason"], run["lost_reason"])
        yield f"If it is there after all: flora-receiver runs refresh {run['run_id']}"
    if run["error_code"] or run["error_message"]:
        yield f"FLORA says: {run['error_code'] or 'no code'}: {run['error_message'] or 'no message'}"
    if run["verdict"]:
        yield _VERDICTS.get(run["verdict"], run["verdict"])
    elif run["settled"] and run["callback_expected"]:
        yield "It was settled by polling; its callback may still come."
    if run["settled"] and not run["cost_final"]:
        yield "FLORA has not said yet what it cost: it is asked again."


def _handlers(run: Mapping[str, Any]) -> Iterator[str]:
    for row in run["dispatches"]:
        if row["orphaned"]:
            yield f"{row['handler']} is not configured: what it has to do waits until it is."
            continue
        match row["state"]:
            case "dead":
                yield f"{row['handler']} gave up on it after {row['attempts']} attempts: {row['last_error']}"
                yield f"Once that is mended: flora-receiver runs redispatch {run['run_id']} --handler {row['handler']}"
            case "ready" if row["attempts"]:
                yield f"{row['handler']} tries again at {row['due_at'][:19].replace('T', ' ')}: {row['last_error']}"
            case "ready":
                yield f"{row['handler']} has yet to work on it."
            case "leased":
                yield f"{row['handler']} is working on it now, attempt {row['attempts']}."
            case "done" if row["result"]:
                yield f"{row['handler']} is done: {_short(row['result'])}"
            case "skipped" if row["event"] == "settled":
                yield f"{row['handler']} does not want it: {row['last_error']}"


def _short(result: Mapping[str, Any]) -> str:
    text = json.dumps(result, ensure_ascii=False)
    return text if len(text) <= _RESULT_LENGTH else f"{text[:_RESULT_LENGTH]}… (whole in `runs show --json`)"


def _next(run: Mapping[str, Any], reads: int) -> Iterator[str]:
    if run["next_poll_at"]:
        yield f"It was read {reads} times, and is read next at {run['next_poll_at'][:19].replace('T', ' ')}."
    if run["state"] == "open" and not run["callback_expected"]:
        yield "No callback is expected: it is polled."


def _told(entry: Mapping[str, Any]) -> str:
    match entry["kind"]:
        case "asked":
            return f"we asked FLORA to start it, under the key {entry['idempotency_key']}"
        case "first_seen":
            return f"we heard of it first: {entry['origin']}"
        case "created" | "started" | "ended":
            return f"{entry['kind']}, by FLORA's clock"
        case "settled":
            return f"settled as {entry['state']}"
        case "callback":
            again = f", {entry['duplicates']} times more later" if entry["duplicates"] else ""
            return f"callback {entry['delivery_id']} ({entry['event']}), signed {entry['age_seconds']} s before{again}"
        case "callback_again":
            return f"callback {entry['delivery_id']} once more"
        case "attempt":
            return f"{entry['handler']}: attempt {entry['attempt']} ({entry['event']})"
        case "attempt_ended":
            error = f": {entry['error']}" if entry["error"] else ""
            return f"{entry['handler']}: attempt {entry['attempt']} ended, {entry['outcome']}{error}"
        case "stored":
            return f"{entry['handler']}: stored {entry['location']}"
        case _:
            return str(entry["kind"])
