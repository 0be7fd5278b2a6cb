"""The rules of the service, pure: no clock, no I/O, no log. The state table is in `reconcile.py`."""

from receiver.decide.attempts import Outcome, conclude
from receiver.decide.channel import ChannelHealth, channel_health
from receiver.decide.decision import Changed, Decision, Unchanged
from receiver.decide.policy import Policy
from receiver.decide.polling import Route, failure_pause, next_poll, right_route, route
from receiver.decide.reconcile import TABLE, Kind, kind_of, reconcile
from receiver.decide.settling import SETTLED_STATES, callback_gone_at, filter_reason, settle

__all__ = [
    "SETTLED_STATES",
    "TABLE",
    "Changed",
    "ChannelHealth",
    "Decision",
    "Kind",
    "Outcome",
    "Policy",
    "Route",
    "Unchanged",
    "callback_gone_at",
    "channel_health",
    "conclude",
    "failure_pause",
    "filter_reason",
    "kind_of",
    "next_poll",
    "reconcile",
    "right_route",
    "route",
    "settle",
]
