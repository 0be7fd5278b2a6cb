"""The explanation of a run's state, from its timeline in the operations API. Pure."""

import json
from collections.abc import Iterator, Mapping
from typing import Any

_STATES = {
    "open": "FLORA has not reported its end yet.",
    "reported": "A callback reported its end; FLORA's API does not show it yet.",
    "completed": "It completed.",
    "failed": "It failed.",
    "lost": "It was given up.",
}
_EMPTY = "FLORA reports that it completed, but without outputs that can be fetched."
_LOST = {
    "deadline": "It had not ended by its deadline ([reconcile] deadline_hours).",
    "not_found": "FLORA responded 404 repeatedly: it has no such run, or not of this technique.",
    "no_outputs": "FLORA reported that it completed, but never showed its outputs.",
}
_VERDICTS = {
    "matched": "Its callback arrived in time.",
    "recovered": "Its callback never arrived; polling settled it. See `flora-receiver channel`.",
    "late": "Its callback arrived after it had been counted as missing.",
    "diverged": "Its callback contradicts FLORA's API; what the API shows counts.",
}
_MAX_RESULT = 300
"""Characters of a handler's result that are shown."""


def explain_run(timeline: Mapping[str, Any]) -> list[str]:
    """Return the lines: the state and its reasons, what comes next, what to do, what happened."""
    run = timeline["run"]
    return [
        f"{run['run_id']} is {run['state']}. {_summarize(run)}",
        *_explain_state(run),
        *_explain_dispatches(run),
        *_explain_next(run, timeline["reads"], timeline.get("failed_reads", 0)),
        "",
        "What happened (UTC):",
        *(f"  {_to_seconds(each['at'])}  {_describe(each)}" for each in timeline["entries"]),
    ]


def _summarize(run: Mapping[str, Any]) -> str:
    """Return what is known of the run's end, and if it is not known, why."""
    usual, last = _STATES.get(run["state"], ""), _last_read(run)
    if run["state"] not in {"open", "reported"} or last is None:
        return usual
    heard = run["state"] == "reported"
    if heard and last["requested_at"] < (run["reported_at"] or ""):
        return "A callback reported its end; it has not been read from FLORA since."
    match last["outcome"]:
        case "failed":
            cause = _explain_failure(last)
            return (
                f"A callback reported its end, but {cause}" if heard else f"Its end is not known: {cause}"
            )
        case "not_found":
            return (
                f"{'A callback reported its end, but ' if heard else ''}FLORA's API has no such run (404)."
            )
        case _ if last["run_status"] == "completed":
            return _EMPTY
        case _ if heard:
            return f"A callback reported its end; FLORA's API still shows it as {last['run_status']}."
        case _:
            return usual


def _last_read(run: Mapping[str, Any]) -> Mapping[str, Any] | None:
    reads = run.get("last_reads") or ()
    return reads[-1] if reads else None


def _explain_failure(read: Mapping[str, Any]) -> str:
    """Return the reason why a read has failed, as a sentence without its beginning."""
    return f"the last read failed: {_describe_problem(read)}."


def _describe_problem(read: Mapping[str, Any]) -> str:
    status, problem = read["http_status"], str(read["problem"] or "no reason is known").rstrip(".")
    return problem if status is None or str(status) in problem else f"HTTP {status}: {problem}"


def _explain_state(run: Mapping[str, Any]) -> Iterator[str]:
    if run["lost_reason"]:
        yield _LOST.get(run["lost_reason"], run["lost_reason"])
        yield f"If it does exist: flora-receiver runs refresh {run['run_id']}"
    if run["error_code"] or run["error_message"]:
        code, message = run["error_code"] or "no code", run["error_message"] or "no message"
        yield f"FLORA's error: {code}: {message}"
    if run["verdict"]:
        yield _VERDICTS.get(run["verdict"], run["verdict"])
    elif run["settled"] and run["callback_expected"]:
        yield "It was settled by polling; its callback may still arrive."
    if run["settled"] and not run["cost_final"]:
        last = _last_read(run)
        failure = f" But {_explain_failure(last)}" if last and last["outcome"] == "failed" else ""
        yield f"Its cost is not final yet; FLORA is polled for it.{failure}"


def _explain_dispatches(run: Mapping[str, Any]) -> Iterator[str]:
    for row in run["dispatches"]:
        handler, attempts, error = row["handler"], row["attempts"], row["last_error"]
        if row["orphaned"]:
            yield f"{handler} is not configured; its work waits until it is."
            continue
        match row["state"]:
            case "dead":
                command = f"flora-receiver runs redispatch {run['run_id']} --handler {handler}"
                yield f"{handler} gave up after {attempts} attempts: {error}"
                yield f"Once that is fixed: {command}"
            case "ready" if attempts:
                yield f"{handler} retries at {_to_seconds(row['due_at'])}: {error}"
            case "ready":
                yield f"{handler} has not started yet."
            case "leased":
                yield f"{handler} is working on it, attempt {attempts}."
            case "done" if row["result"]:
                yield f"{handler} is done: {_format_result(row['result'])}"
            case "skipped" if row["event"] == "settled":
                yield f"{handler} skipped it: {error}"


def _format_result(result: Mapping[str, Any]) -> str:
    text = json.dumps(result, ensure_ascii=False)
    if len(text) <= _MAX_RESULT:
        return text
    return f"{text[:_MAX_RESULT]}… (in full with `runs show --json`)"


def _explain_next(run: Mapping[str, Any], reads: int, failed: int) -> Iterator[str]:
    if run["next_poll_at"]:
        next_read = _to_seconds(run["next_poll_at"])
        others = f", and {_count(failed, 'read')} failed" if failed else ""
        yield f"It was read {_count(reads, 'time')}{others}; the next read is at {next_read}."
    if held := run.get("reads_held"):
        yield f"Nothing is read until {_to_seconds(held['until'])}: {held['reason']}."
    if run["state"] == "open" and not run["callback_expected"]:
        yield "No callback is expected, so it is polled."


def _count(number: int, thing: str) -> str:
    return f"{number} {thing}{'' if number == 1 else 's'}"


def _describe_read(entry: Mapping[str, Any]) -> str:
    what = "read" if entry["source"] == "run" else "read in a list"
    match entry["outcome"]:
        case "returned":
            problem = f", but {entry['problem']}" if entry["problem"] else ""
            text = f"{what}: {entry['run_status']}{problem}"
        case "not_found":
            text = f"{what}: FLORA has no such run (404)"
        case _:
            text = f"{what} failed: {_describe_problem(entry)}"
    seconds = None if entry["seconds"] is None else f"{entry['seconds']:.1f} s"
    about = ", ".join(filter(None, (seconds, entry["request_id"])))
    return f"{text} ({about})" if about else text


def _describe(entry: Mapping[str, Any]) -> str:
    match entry["kind"]:
        case "asked":
            return f"start requested from FLORA, with the key {entry['idempotency_key']}"
        case "first_seen":
            return f"first seen by the service: {entry['origin']}"
        case "created" | "started" | "ended":
            return f"{entry['kind']}, by FLORA's clock"
        case "settled":
            return f"settled as {entry['state']}"
        case "callback":
            again = f", received {entry['duplicates']} more times" if entry["duplicates"] else ""
            signed = f"signed {entry['age_seconds']} s before"
            return f"callback {entry['delivery_id']} ({entry['event']}), {signed}{again}"
        case "callback_again":
            return f"callback {entry['delivery_id']} received again"
        case "read":
            return _describe_read(entry)
        case "attempt":
            return f"{entry['handler']}: attempt {entry['attempt']} ({entry['event']})"
        case "attempt_ended":
            error = f": {entry['error']}" if entry["error"] else ""
            outcome = f"{entry['outcome']}{error}"
            return f"{entry['handler']}: attempt {entry['attempt']} ended, {outcome}"
        case "stored":
            return f"{entry['handler']}: stored {entry['location']}"
        case _:
            return str(entry["kind"])


def _to_seconds(time: str) -> str:
    """Return an ISO time to the second, with a space before the hour."""
    return time[:19].replace("T", " ")
