"""What may never be in a log line, where lines go, and what a scrape must show."""

import io
import json
import logging
import re
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from typing import Any

import pytest
import structlog

from receiver.model import Event, Origin, Run, RunState, Verdict
from receiver.telemetry import Metrics, configure_logging, scrub_event, set_log_level

MEDIA = "https://media.flora.ai/assets/SECRETPATH.png?sig=SECRETPATH"


@pytest.fixture(autouse=True)
def _put_back() -> Iterator[None]:
    """Restore the logging of the process."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield
    root.handlers = handlers
    root.setLevel(level)
    structlog.reset_defaults()


def log_line(level: str = "info", **values: Any) -> dict[str, Any]:
    stream = io.StringIO()
    configure_logging("debug", "json", stream)
    getattr(structlog.get_logger(), level)("thing.happened", **values)
    found: dict[str, Any] = json.loads(stream.getvalue())
    return found


@pytest.mark.parametrize(
    ("key", "value", "shown"),
    [
        ("run_id", "run_1", "run_1"),
        ("seconds", 0.25, 0.25),
        ("nothing", None, None),
        ("secret", 1, 1),
        ("api_key", "x", "***"),
        ("webhook_secret", "x", "***"),
        ("lease_token", "x", "***"),
        ("Flora-Signature", "t=1,v1=ab", "***"),
        ("body", b"{}", "***"),
        ("secrets", ["a"], "***"),
        ("payload", b"1234", "<4 bytes>"),
        ("error", "bad secret whsec_abc-1.2+/=, sorry", "bad secret whsec_***, sorry"),
        ("error", "key 'sk_live_abc' or sk_test_1", "key 'sk_live_***' or sk_test_***"),
        ("error", "Authorization: Bearer abc.def", "Authorization: Bearer ***"),
        ("url", MEDIA, "https://media.flora.ai/…"),
        ("error", f'cannot get "{MEDIA}" now', 'cannot get "https://media.flora.ai/…" now'),
        ("error", ValueError(f"no {MEDIA}"), "no https://media.flora.ai/…"),
        ("url", "HTTPS://me:pw@Media.flora.ai:8443/x", "HTTPS://Media.flora.ai:8443/…"),
        ("base", "https://app.flora.ai", "https://app.flora.ai"),
        ("query", "http://h.example?a=b", "http://h.example/…"),
        ("database", "postgresql://u:pw@db/x", "postgresql://***@db/x"),
        ("location", "s3://bucket/run_1/a.png", "s3://bucket/run_1/a.png"),
        ("headers", {"authorization": "x", "accept": "y"}, {"authorization": "***", "accept": "y"}),
        ("urls", [MEDIA, (MEDIA,)], ["https://media.flora.ai/…", ["https://media.flora.ai/…"]]),
        ("numbers", [1, True], [1, True]),
    ],
)
def test_a_value_is_shown_as(key: str, value: Any, shown: Any) -> None:
    assert log_line(**{key: value})[key] == shown


def test_media_urls_show_at_debug_level_alone_and_secrets_never() -> None:
    line = log_line("debug", url=MEDIA, error="whsec_abc")
    assert (line["url"], line["error"]) == (MEDIA, "whsec_***")


def test_the_text_of_an_exception_is_scrubbed() -> None:
    stream = io.StringIO()
    configure_logging("info", "json", stream)
    structlog.get_logger().error("download.failed", exc_info=ValueError(f"{MEDIA} with whsec_abc"))
    line = json.loads(stream.getvalue())
    assert "ValueError: https://media.flora.ai/… with whsec_***" in line["exception"]


def test_a_json_line_has_a_utc_time_a_level_and_an_event() -> None:
    line = log_line(run_id="run_1")
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?Z", line.pop("timestamp"))
    assert line == {"event": "thing.happened", "level": "info", "run_id": "run_1"}


@pytest.mark.parametrize(
    ("terminal", "format_", "is_json"),
    [(True, "auto", False), (False, "auto", True), (True, "json", True), (False, "console", False)],
)
def test_the_format_follows_the_stream_unless_it_is_set(
    terminal: bool, format_: Any, is_json: bool
) -> None:
    class Stream(io.StringIO):
        def isatty(self) -> bool:
            return terminal

    stream = Stream()
    configure_logging("info", format_, stream)
    structlog.get_logger().info("thing.happened")
    assert stream.getvalue().startswith("{") == is_json
    assert "thing.happened" in stream.getvalue()


def test_the_console_shows_a_scrubbed_traceback() -> None:
    stream = io.StringIO()
    configure_logging("info", "console", stream)
    structlog.get_logger().error("download.failed", exc_info=ValueError(MEDIA))
    assert "ValueError" in stream.getvalue()
    assert "SECRETPATH" not in stream.getvalue()


def test_the_level_is_kept() -> None:
    stream = io.StringIO()
    configure_logging("warning", "json", stream)
    structlog.get_logger().info("quiet")
    logging.getLogger("other").info("quiet")
    structlog.get_logger().warning("loud")
    assert [json.loads(line)["event"] for line in stream.getvalue().splitlines()] == ["loud"]


def test_standard_library_records_are_written_once() -> None:
    """Scrubbed, in the same format; configuring twice does not print twice."""
    configure_logging("info", "json", io.StringIO())
    stream = io.StringIO()
    configure_logging("info", "json", stream)
    logging.getLogger("some.library").warning("GET %s", MEDIA)
    (text,) = stream.getvalue().splitlines()
    line = json.loads(text)
    assert (line["event"], line["level"], line["logger"]) == (
        "GET https://media.flora.ai/…",
        "warning",
        "some.library",
    )


@pytest.mark.parametrize(
    "name", ["uvicorn.access", "httpx", "httpcore.http11", "sqlalchemy.engine", "alembic"]
)
def test_libraries_that_log_urls_and_parameters_are_quiet_below_warning(name: str) -> None:
    stream = io.StringIO()
    configure_logging("debug", "json", stream)
    logging.getLogger(name).info("POST /callbacks/flora?start=abc")
    assert stream.getvalue() == ""


def test_a_plain_record_passes_unchanged() -> None:
    """The common case: short ids and numbers."""
    event = {"event": "callback.accepted", "run_id": "run_1", "callbacks": 12, "seconds": 0.004}
    assert scrub_event(None, "info", dict(event)) == event


def test_the_level_changes_for_loggers_that_are_in_use() -> None:
    """Loggers are cached at their first line; those of the standard library follow too."""
    stream = io.StringIO()
    configure_logging("info", "json", stream)
    ours, other = structlog.get_logger(), logging.getLogger("other")

    def log(text: str) -> None:
        ours.debug(text)
        other.debug(text)

    log("no")
    set_log_level("debug")
    log("yes")
    set_log_level("error")
    ours.warning("no")
    other.warning("no")
    assert [json.loads(line)["event"] for line in stream.getvalue().splitlines()] == ["yes", "yes"]


def scrape(metrics: Metrics) -> dict[str, float]:
    """Every sample that is not zero, without the creation times."""
    lines = [
        line.rsplit(" ", 1)
        for line in metrics.render()[0].decode().splitlines()
        if not line.startswith("#")
    ]
    return {name: float(value) for name, value in lines if float(value) and "_created" not in name}


def test_a_scrape_shows_our_prefix_and_verdicts_from_the_start() -> None:
    text, kind = Metrics().render()
    assert kind.startswith("text/plain")
    lines = [line for line in text.decode().splitlines() if not line.startswith("#")]
    assert all(line.startswith("flora_receiver_") for line in lines)
    assert 'flora_receiver_verdicts_total{verdict="recovered"} 0.0' in lines


RUN = Run(
    "run_1",
    RunState.COMPLETED,
    Origin.STARTED,
    datetime(2026, 1, 1, tzinfo=UTC),
    datetime(2026, 1, 2, tzinfo=UTC),
)


@pytest.mark.parametrize(
    ("happens", "sample"),
    [
        (lambda m: m.count_response("accepted", 0.003), 'callbacks_total{result="accepted"}'),
        (lambda m: m.count_response("accepted", 0.003), 'callback_seconds_bucket{le="0.005"}'),
        (lambda m: m.observe_commit(12), "commits_total"),
        (lambda m: m.observe_commit(12), 'commit_batch_bucket{le="16.0"}'),
        (lambda m: m.count_download(1), "download_bytes_total"),
        (lambda m: m.set_certificate_seconds("public", 1), 'certificate_seconds{listener="public"}'),
        (lambda m: m.count_api_request(None), 'api_requests_total{status="none"}'),
        (lambda m: m.count_poll("missing"), 'polls_total{outcome="missing"}'),
        (lambda m: m.count_event(Event.SETTLED, RUN), 'runs_settled_total{state="completed"}'),
        (lambda m: m.count_verdict(None, Verdict.RECOVERED), 'verdicts_total{verdict="recovered"}'),
        (lambda m: m.count_verdict(Verdict.RECOVERED, Verdict.LATE), 'verdicts_total{verdict="late"}'),
        (
            lambda m: m.observe_dispatch("log", "done", 0.2),
            'dispatches_total{handler="log",outcome="done"}',
        ),
        (
            lambda m: m.observe_dispatch("log", "done", 0.2),
            'dispatch_seconds_bucket{handler="log",le="0.5"}',
        ),
    ],
)
def test_what_happens_is_counted(happens: Callable[[Metrics], None], sample: str) -> None:
    metrics = Metrics()
    happens(metrics)
    assert scrape(metrics)[f"flora_receiver_{sample}"] == 1


@pytest.mark.parametrize("verdict", [None, Verdict.MATCHED])
def test_a_verdict_that_stays_is_not_counted_again(verdict: Verdict | None) -> None:
    metrics = Metrics()
    metrics.count_verdict(verdict, verdict)
    metrics.count_event(Event.COST_FINAL, RUN)
    assert scrape(metrics) == {}


def test_two_services_in_one_process_do_not_share_metrics() -> None:
    one, other = Metrics(), Metrics()
    one.commits.inc()
    assert b"flora_receiver_commits_total 0.0" in other.render()[0]


def test_every_metric_says_what_it_counts() -> None:
    for name, _, text in Metrics().catalogue():
        assert re.fullmatch(r"flora_receiver_[a-z_]+", name)
        assert text.endswith(".")
