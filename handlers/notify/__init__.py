"""Notifies people by chat or mail. The handler is in `handler`, the texts in `messages`."""

from handlers.notify.handler import Notify, NotifyConfig

__all__ = ["Notify", "NotifyConfig"]
