"""The handler `notify`: sends messages to people by chat or mail, through Apprise (extra `notify`).

A message is sent at least once: chats cannot recognise a repeated one. What each target has
accepted is kept in memory, so that a retry for one target does not repeat the message to the
others. After a crash, or if a target accepted a message but did not confirm it in time, it may
arrive twice.
"""

import asyncio
import logging
import re
import threading
import warnings
from collections import OrderedDict
from contextlib import suppress
from typing import Annotated, Any, ClassVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from handlers.dependencies import pending_handlers
from handlers.notify.messages import (
    DEFAULTS,
    Message,
    MessageTemplate,
    Occasion,
    choose_occasion,
    compose,
    to_values,
)
from receiver.handler import Answer, Context, Done, Event, Retry, Secret, SettledRun, When, needs

_MAX_ACCEPTED = 1000
"""How many accepted messages are kept per target."""
_STATUS = re.compile(r"error=(\d{3})\b")


def _check_template(text: str) -> str:
    MessageTemplate(text)
    return text


TemplateText = Annotated[str, AfterValidator(_check_template)]


class Texts(BaseModel):
    """The texts of one kind of message; an omitted one keeps its default."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    title: TemplateText | None = None
    """One line."""
    body: TemplateText | None = None
    """Plain text; each target displays it in its own way."""


class NotifyConfig(BaseModel):
    """Whom to notify, and in which words."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    urls: Annotated[tuple[Secret, ...], Field(min_length=1)]
    """Apprise URLs, one per target: `slack://…`, …; better as `env:NAME` or `file:/path`."""
    completed: Texts = Texts()
    """`title` and `body` for a run that completed."""
    failed: Texts = Texts()
    """The same for a run that failed."""
    lost: Texts = Texts()
    """The same for a run that is lost."""
    diverged: Texts = Texts()
    """The same for a run about which callback and API disagree."""
    dead: Texts = Texts()
    """The same for a run on which another handler gave up."""
    seconds: Annotated[float, Field(gt=0, le=600, allow_inf_nan=False)] = 30
    """Timeout for each target, in seconds."""
    wait_for: tuple[str, ...] = ()
    """Handlers that must have stored all outputs of a completed run first, for `{outputs}`."""


class Notify:
    """Notifies every target of each run that ends or needs attention; one run at a time."""

    Config: ClassVar[type[BaseModel]] = NotifyConfig
    on: ClassVar[tuple[Event, ...]] = (Event.SETTLED, Event.LOST, Event.DIVERGED, Event.DEAD)
    when: ClassVar[When] = When()
    concurrency: ClassVar[int] = 1

    def __init__(self, config: NotifyConfig) -> None:
        """Does not connect. ValueError, without the URL in it, if Apprise cannot use a URL."""
        with needs("flora-receiver[notify]"):
            import apprise  # an extra, and slow to import
        _capture_logs()
        self._config = config
        self._targets = [
            Target(apprise, secret.get_secret_value(), number)
            for number, secret in enumerate(config.urls, 1)
        ]
        self._templates: dict[Occasion, tuple[MessageTemplate, MessageTemplate]] = {}
        for name, (title, body) in DEFAULTS.items():
            texts: Texts = getattr(config, name)
            self._templates[name] = (
                MessageTemplate(title if texts.title is None else texts.title),
                MessageTemplate(body if texts.body is None else texts.body),
            )

    async def handle(self, run: SettledRun, context: Context) -> Answer:
        artifacts = await context.stored()
        if context.event is Event.SETTLED:
            pending = pending_handlers(self._config.wait_for, run, artifacts)
            if pending:
                return Retry(f"not sent yet: {', '.join(pending)} has not stored every output")
        occasion = choose_occasion(context.event, run.status)
        values = to_values(run, context.event, context.handler, artifacts)
        message = compose(occasion, *self._templates[occasion], values)
        key, seconds = context.idempotency_key, self._config.seconds
        results = await asyncio.gather(*(target.send(message, key, seconds) for target in self._targets))
        failures = [failure for failure in results if failure is not None]
        return Retry("; ".join(failures)) if failures else Done({"targets": len(self._targets)})


class Target:
    """One Apprise service, called in a daemon thread: one that hangs delays nothing else."""

    def __init__(self, apprise: Any, url: str, number: int) -> None:
        with warnings.catch_warnings():  # it imports every service, some with deprecated modules
            warnings.simplefilter("ignore", DeprecationWarning)
            service = apprise.Apprise.instantiate(url)
        if service is None:
            raise ValueError(f"urls: number {number} cannot be used; see Apprise's page on that service")
        if "overflow=" not in url:  # by default, a text that is too long would be refused on every attempt
            service.overflow_mode = apprise.OverflowMode.TRUNCATE
        self._name = f"target {number} ({service.service_name})"
        self._service = service
        self._types = {
            "completed": apprise.NotifyType.SUCCESS,
            "failed": apprise.NotifyType.FAILURE,
            "lost": apprise.NotifyType.FAILURE,
            "diverged": apprise.NotifyType.WARNING,
            "dead": apprise.NotifyType.FAILURE,
        }
        self._format = apprise.NotifyFormat.TEXT
        self._accepted: OrderedDict[str, None] = OrderedDict()
        self._is_busy = False

    async def send(self, message: Message, key: str, seconds: float) -> str | None:
        """Send a message unless it was accepted under this key before; return any failure."""
        if key in self._accepted:
            return None
        if self._is_busy:
            return f"{self._name} is still busy with an earlier message"
        loop = asyncio.get_running_loop()
        result: asyncio.Future[str | None] = loop.create_future()

        def finish(failure: str | None) -> None:
            self._is_busy = False
            if not result.done():
                result.set_result(failure)

        def send() -> None:
            failure = self._send(message, key)
            with suppress(RuntimeError):  # the loop is closed: the service has stopped
                loop.call_soon_threadsafe(finish, failure)

        self._is_busy = True
        try:
            threading.Thread(target=send, name=f"notify {self._name}", daemon=True).start()
        except RuntimeError:
            self._is_busy = False
            return f"{self._name}: cannot start a thread"
        try:
            async with asyncio.timeout(seconds):
                return await result
        except TimeoutError:
            return f"{self._name} did not answer within {seconds:g} s"

    def _send(self, message: Message, key: str) -> str | None:
        _last_response.clear()
        try:
            is_accepted = self._service.notify(
                title=message.title,
                body=message.body,
                notify_type=self._types[message.occasion],
                body_format=self._format,
            )
        except BaseException as error:
            return f"{self._name} failed: {type(error).__name__}"
        if not is_accepted:
            status = f" with HTTP {_last_response.status}" if _last_response.status else ""
            return f"{self._name} did not accept it{status}: check its URL, and that it is reachable"
        self._accepted[key] = None
        while len(self._accepted) > _MAX_ACCEPTED:
            self._accepted.popitem(last=False)
        return None


class _StatusFilter(logging.Filter):
    """Keeps the HTTP status of what Apprise would log; the line may hold tokens."""

    def filter(self, record: logging.LogRecord) -> bool:
        with suppress(Exception):
            match = _STATUS.search(record.getMessage())
            _last_response.status = match[1] if match else _last_response.status
        return False


class _Response(threading.local):
    status: str | None = None

    def clear(self) -> None:
        self.status = None


_last_response = _Response()


def _capture_logs() -> None:
    """Filter Apprise's logger, and keep urllib3 from logging paths, which may be secrets."""
    logger = logging.getLogger("apprise")
    if not any(isinstance(each, _StatusFilter) for each in logger.filters):
        logger.addFilter(_StatusFilter())
    logger.setLevel(logging.WARNING)
    logging.getLogger("urllib3").setLevel(logging.WARNING)
