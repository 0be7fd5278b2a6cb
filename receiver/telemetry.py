"""Logs and metrics. Every module above may call this one; it imports `model` and `scrubber` alone.

No log line shows a secret, a body or a media URL: `scrub_event` cleans every value on its way out.
"""

import contextlib
import logging
import sys
from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any, Literal, TextIO, cast

import structlog
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from structlog.processors import NAME_TO_LEVEL
from structlog.typing import Processor

from receiver.model import Event, Run, RunState, Verdict
from receiver.net.scrubber import clean

__all__ = ["Metrics", "configure_logging", "scrub_event", "set_log_level"]

# Below warning, these libraries log URLs, SQL statements or their parameters.
_VERBOSE_LIBRARIES = ("uvicorn", "httpx", "httpcore", "sqlalchemy", "alembic", "asyncio")


def configure_logging(
    level: str = "info",
    log_format: Literal["auto", "console", "json"] = "auto",
    stream: TextIO | None = None,
) -> None:
    """Write the log records of structlog and of the standard library to `stream`.

    The default is standard error. `auto` means console on a terminal, JSON elsewhere.
    """
    stream = stream or sys.stderr
    is_narrow = not (stream.encoding or "utf-8").lower().startswith("utf")
    console = log_format == "console" or (log_format == "auto" and stream.isatty())
    colors, stream = stream.isatty(), cast("TextIO", _ForgivingStream(stream))
    threshold = _Threshold(_to_number(level))
    shared: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.format_exc_info,
        scrub_event,
    ]
    renderer: Processor = structlog.processors.JSONRenderer(ensure_ascii=is_narrow)
    if console:
        renderer = structlog.dev.ConsoleRenderer(
            colors=colors, exception_formatter=structlog.dev.plain_traceback
        )
    structlog.configure(
        processors=[threshold, *shared, renderer],
        # The level may change while loggers are cached, so the threshold decides.
        wrapper_class=structlog.make_filtering_bound_logger(logging.DEBUG),
        logger_factory=structlog.WriteLoggerFactory(stream),
        cache_logger_on_first_use=True,
    )
    _route_standard_library(stream, shared, renderer)
    _set_standard_level(threshold.level)


def set_log_level(level: str) -> None:
    """Change the lowest level that is logged, after `configure_logging`."""
    for processor in structlog.get_config()["processors"]:
        if isinstance(processor, _Threshold):
            processor.level = _to_number(level)
            _set_standard_level(processor.level)


def _to_number(level: str) -> int:
    return logging.getLevelNamesMapping()[level.upper()]


class _Threshold:
    """A structlog processor that drops what is below its level, which may change."""

    def __init__(self, level: int) -> None:
        self.level = level

    def __call__(self, _: Any, method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
        if NAME_TO_LEVEL[method] < self.level:
            raise structlog.DropEvent
        return event


class _ForgivingStream:
    """A stream whose errors are ignored: a full disk must not cost a callback or a read."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> None:
        with contextlib.suppress(OSError, UnicodeError):
            self._stream.write(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError):
            self._stream.flush()


class _OurHandler(logging.StreamHandler[TextIO]):
    """A type of its own, so that configuring again replaces this handler and no other."""


def _route_standard_library(stream: TextIO, shared: Sequence[Processor], renderer: Processor) -> None:
    handler = _OurHandler(stream)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[structlog.stdlib.add_logger_name, *shared],
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, renderer],
        )
    )
    root = logging.getLogger()
    root.handlers = [*(each for each in root.handlers if not isinstance(each, _OurHandler)), handler]


def _set_standard_level(threshold: int) -> None:
    logging.getLogger().setLevel(threshold)
    for name in _VERBOSE_LIBRARIES:
        logging.getLogger(name).setLevel(max(threshold, logging.WARNING))


def scrub_event(_: Any, method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """Mask secrets and shorten web URLs in every value of a log event (a structlog processor).

    Web URLs are shortened to scheme and host, at level debug not at all.
    """
    shorten = method != "debug"
    for key, value in event.items():
        event[key] = clean(key, value, shorten=shorten)
    return event


_ACKNOWLEDGEMENT = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.015, 0.025, 0.05, 0.1, 0.25, 1, 8)
_BATCH = (1, 2, 4, 8, 16, 32, 64, 128)
_WORK = (0.01, 0.05, 0.1, 0.5, 1, 5, 15, 60, 300, 900)


class Metrics:
    """Every metric of one service, on a registry of its own; `/metrics` exposes them."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.callbacks = self._counter(
            "callbacks", "Requests to the callback path, by their answer.", "result"
        )
        self._callbacks_by_result: dict[str, Counter] = {}
        self.callback_seconds = self._histogram(
            "callback_seconds",
            "From a callback's headers to its committed answer.",
            _ACKNOWLEDGEMENT,
        )
        self.connections_closed = self._counter(
            "connections_closed",
            "Connections closed by a listener's guard: `slow_head`, `slow_body`, `too_large`, `too_many`, `crowded`, "
            "`malformed`.",
            "listener",
            "reason",
        )
        self.commits = self._counter("commits", "Transactions that committed callbacks and reports.")
        self.commit_batch = self._histogram(
            "commit_batch", "Callbacks and reports that shared one transaction.", _BATCH
        )
        self.polls = self._counter("polls", "Reads of runs, by their outcome.", "outcome")
        self.api_requests = self._counter(
            "api_requests",
            "Requests to FLORA's API, starts among them, by status; `none`: no response.",
            "status",
        )
        self.runs_settled = self._counter("runs_settled", "Runs that settled, by state.", "state")
        self.verdicts = self._counter(
            "verdicts",
            "Verdicts on the callback channel; `recovered` above zero: callbacks do not arrive.",
            "verdict",
        )
        self.dispatches = self._counter(
            "dispatches", "Handler calls, by how they ended.", "handler", "outcome"
        )
        self.dispatch_seconds = self._histogram(
            "dispatch_seconds", "Duration of a handler call.", _WORK, "handler"
        )
        self.download_bytes = self._counter("download_bytes", "Bytes of outputs fetched.")
        self._add_gauges()
        # An alert on a series that does not exist yet never fires.
        for state in (RunState.COMPLETED, RunState.FAILED, RunState.LOST):
            self.runs_settled.labels(state.value)
        for verdict in Verdict:
            self.verdicts.labels(verdict.value)

    def _add_gauges(self) -> None:
        self.runs = self._gauge(
            "runs", "Runs that are not settled, by state; counted at each scrape.", "state"
        )
        self.dispatch_backlog = self._gauge(
            "dispatch_backlog",
            "Dispatches that are not done, by state; counted at each scrape.",
            "state",
        )
        self.overdue = self._gauge(
            "overdue_seconds",
            "How long the oldest `run` to read, or `dispatch` to do, has been due; 0: none is.",
            "queue",
        )

        self.certificate_seconds = self._gauge(
            "certificate_seconds",
            "Seconds until the certificate that a listener serves expires; below zero: it has.",
            "listener",
        )

    def count_response(self, result: str, seconds: float) -> None:
        """Count a response of the callback path.

        Its result is `accepted`, `duplicate`, `ignored` or the code of a refusal.
        """
        counter = self._callbacks_by_result.get(result)
        if counter is None:
            counter = self._callbacks_by_result[result] = self.callbacks.labels(result)
        counter.inc()
        self.callback_seconds.observe(seconds)

    def count_closed_connection(self, listener: str, reason: str) -> None:
        """Count a connection that the guard of a listener (`public`, `operations`) closed."""
        self.connections_closed.labels(listener, reason).inc()

    def set_certificate_seconds(self, listener: str, seconds: float) -> None:
        """Set for how long the certificate of a listener (`public`, `operations`) is valid."""
        self.certificate_seconds.labels(listener).set(seconds)

    def observe_commit(self, entries: int) -> None:
        """Observe a transaction that committed this many callbacks and reports."""
        self.commits.inc()
        self.commit_batch.observe(entries)

    def count_poll(self, outcome: str) -> None:
        """Count a read of a run by its outcome, failures included."""
        self.polls.labels(outcome).inc()

    def count_api_request(self, status: int | None) -> None:
        """Count a request to FLORA's API by its status; None means that no response came."""
        self.api_requests.labels("none" if status is None else str(status)).inc()

    def count_event(self, event: Event, run: Run) -> None:
        """Count a run that settled or was given up as lost; other events are not counted."""
        if event in {Event.SETTLED, Event.LOST}:
            self.runs_settled.labels(run.state.value).inc()

    def count_verdict(self, before: Verdict | None, after: Verdict | None) -> None:
        """Count a run's verdict on the callback channel, where a committed change gave it one."""
        if after is not None and after is not before:
            self.verdicts.labels(after.value).inc()

    def observe_dispatch(self, handler: str, outcome: str, seconds: float) -> None:
        """Observe the end of a handler's call."""
        self.dispatches.labels(handler, outcome).inc()
        self.dispatch_seconds.labels(handler).observe(seconds)

    def count_download(self, size: int) -> None:
        """Count bytes of an output as they arrive."""
        self.download_bytes.inc(size)

    def set_backlog(
        self, runs: Mapping[str, int], backlog: Mapping[str, int], overdue: Mapping[str, float]
    ) -> None:
        """Set the gauges: unsettled runs and dispatches by state, seconds overdue by queue."""
        for queue, seconds in overdue.items():
            self.overdue.labels(queue).set(seconds)
        for state, number in runs.items():
            self.runs.labels(state).set(number)
        for state, number in backlog.items():
            self.dispatch_backlog.labels(state).set(number)

    def render(self) -> tuple[bytes, str]:
        """Return the metrics in Prometheus' text format, and its content type."""
        return generate_latest(self.registry), CONTENT_TYPE_LATEST

    def catalogue(self) -> list[tuple[str, str, str]]:
        """Return (name as exposed, type, help) of every metric, for the documentation."""
        return [
            (
                f"{each.name}_total" if each.type == "counter" else each.name,
                each.type,
                each.documentation,
            )
            for each in self.registry.collect()
        ]

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"flora_receiver_{name}", text, labels, registry=self.registry)

    def _gauge(self, name: str, text: str, *labels: str) -> Gauge:
        return Gauge(f"flora_receiver_{name}", text, labels, registry=self.registry)

    def _histogram(self, name: str, text: str, buckets: Sequence[float], *labels: str) -> Histogram:
        return Histogram(f"flora_receiver_{name}", text, labels, registry=self.registry, buckets=buckets)
