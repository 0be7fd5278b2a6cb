"""The handler that tells people, by chat or mail, through Apprise (extra `notify`). Found by its entry point `notify`.

A message cannot be taken back and has no key by which a chat would know it again: it comes at least once. What each
target has taken is kept in memory, so that a retry for one does not repeat the message to the others; after a crash in
between, or a target that took it and did not say so in time, it may come twice. It always names its run.
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
from handlers.notify.messages import DEFAULTS, Message, MessageTemplate, Occasion, occasion, values_of, written
from receiver.handler import Answer, Context, Done, Event, Retry, Secret, SettledRun, When, needs

REMEMBERED = 1000
"""Messages per target that are not sent again."""
_STATUS = re.compile(r"error=(\d{3})\b")


def _usable(text: str) -> str:
    MessageTemplate(text)
    return text


TemplateText = Annotated[str, AfterValidator(_usable)]


class Words(BaseModel):
    """The words of one occasion; what is left out stays as it is by default."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    title: TemplateText | None = None
    """One line."""
    body: TemplateText | None = None
    """Plain text; each target makes of it what it can show."""


class NotifyConfig(BaseModel):
    """Whom to tell, and in which words."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    urls: Annotated[tuple[Secret, ...], Field(min_length=1)]
    """Apprise's URLs, one for each target: `slack://…`, `mailto://…`, `json://…`; `env:NAME` or `file:/path` is better."""
    completed: Words = Words()
    """`title` and `body` for a run that completed."""
    failed: Words = Words()
    """The same for a run that failed."""
    lost: Words = Words()
    """The same for a run that was given up."""
    diverged: Words = Words()
    """The same for a run about which callback and API contradict each other."""
    dead: Words = Words()
    """The same for a run on which another handler gave up."""
    seconds: Annotated[float, Field(gt=0, le=600, allow_inf_nan=False)] = 30
    """How long one target may take, in seconds."""
    wait_for: tuple[str, ...] = ()
    """Names of handlers that must have stored every output of a completed run before it is told, for `{outputs}`."""


class Notify:
    """Tells every target about every run that ends, and about what needs a person; one message at a time."""

    Config: ClassVar[type[BaseModel]] = NotifyConfig
    on: ClassVar[tuple[Event, ...]] = (Event.SETTLED, Event.LOST, Event.DIVERGED, Event.DEAD)
    when: ClassVar[When] = When()
    concurrency: ClassVar[int] = 1

    def __init__(self, config: NotifyConfig) -> None:
        """Build the targets; ValueError, without the URL in it, where Apprise cannot read one."""
        with needs("flora-receiver[notify]"):
            import apprise  # noqa: PLC0415 - only who notifies waits for it
        _listen()
        self._config = config
        self._targets = [
            Target(apprise, secret.get_secret_value(), number) for number, secret in enumerate(config.urls, 1)
        ]
        self._templates: dict[Occasion, tuple[MessageTemplate, MessageTemplate]] = {}
        for name, (title, body) in DEFAULTS.items():
            words: Words = getattr(config, name)
            chosen = (title if words.title is None else words.title, body if words.body is None else words.body)
            self._templates[name] = (MessageTemplate(chosen[0]), MessageTemplate(chosen[1]))

    async def handle(self, run: SettledRun, context: Context) -> Answer:
        artifacts = await context.stored()
        awaited = pending_handlers(self._config.wait_for, run, artifacts) if context.event is Event.SETTLED else []
        if awaited:
            return Retry(f"not told yet: {', '.join(awaited)} has not stored every output")
        chosen = occasion(context.event, run.status)
        values = values_of(run, context.event, context.handler, artifacts)
        message = written(chosen, *self._templates[chosen], values)
        key, seconds = context.idempotency_key, self._config.seconds
        troubles = await asyncio.gather(*(target.send(message, key, seconds) for target in self._targets))
        told = [trouble for trouble in troubles if trouble is not None]
        return Retry("; ".join(told)) if told else Done({"targets": len(self._targets)})


class Target:
    """One of Apprise's services. It is called in a thread that nothing waits for: a target that hangs holds up itself."""

    def __init__(self, apprise: Any, url: str, number: int) -> None:
        with warnings.catch_warnings():  # it loads every service that there is, old modules among them
            warnings.simplefilter("ignore", DeprecationWarning)
            service = apprise.Apprise.instantiate(url)
        if service is None:
            raise ValueError(f"urls: number {number} is no URL that Apprise can use; see its page on that service")
        if "overflow=" not in url:  # by default a text that is too long would be refused, again and again
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
        self._taken: OrderedDict[str, None] = OrderedDict()
        self._busy = False

    async def send(self, message: Message, key: str, seconds: float) -> str | None:
        """Send a message that was not sent under this key before; return what went wrong."""
        if key in self._taken:
            return None
        if self._busy:
            return f"{self._name} still hangs on an earlier message"
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[str | None] = loop.create_future()

        def tell(trouble: str | None) -> None:
            self._busy = False
            if not answer.done():
                answer.set_result(trouble)

        def work() -> None:
            trouble = self._send(message, key)
            with suppress(RuntimeError):  # the loop is closed: nobody wants to know any more
                loop.call_soon_threadsafe(tell, trouble)

        self._busy = True
        try:
            threading.Thread(target=work, name=f"notify {self._name}", daemon=True).start()
        except RuntimeError:
            self._busy = False
            return f"{self._name}: no thread could be started"
        try:
            async with asyncio.timeout(seconds):
                return await answer
        except TimeoutError:
            return f"{self._name} did not answer within {seconds:g} s"

    def _send(self, message: Message, key: str) -> str | None:
        _heard.forget()
        try:
            taken = self._service.notify(
                title=message.title,
                body=message.body,
                notify_type=self._types[message.occasion],
                body_format=self._format,
            )
        except BaseException as error:
            return f"{self._name} failed: {type(error).__name__}"
        if not taken:
            status = f" with HTTP {_heard.status}" if _heard.status else ""
            return f"{self._name} did not take it{status}: check that it is reachable, and its URL"
        self._taken[key] = None
        while len(self._taken) > REMEMBERED:
            self._taken.popitem(last=False)
        return None


class _Ear(logging.Filter):
    """Hears what Apprise would log, keeps the HTTP status alone and lets nothing pass: lines may hold tokens."""

    def filter(self, record: logging.LogRecord) -> bool:
        with suppress(Exception):
            match = _STATUS.search(record.getMessage())
            _heard.status = match[1] if match else _heard.status
        return False


class _Heard(threading.local):
    status: str | None = None

    def forget(self) -> None:
        self.status = None


_heard = _Heard()


def _listen() -> None:
    """Take over Apprise's logger, and keep urllib3 from logging paths, which are the secrets of many chats."""
    logger = logging.getLogger("apprise")
    if not any(isinstance(each, _Ear) for each in logger.filters):
        logger.addFilter(_Ear())
    logger.setLevel(logging.WARNING)
    logging.getLogger("urllib3").setLevel(logging.WARNING)
