"""Tells people by chat or mail. The handler is in `handler`, what they are told in `messages`."""

from handlers.notify.handler import Notify, NotifyConfig

__all__ = ["Notify", "NotifyConfig"]
