"""The rules of the service. Pure: no clock, no I/O, no logs. `reconcile` has the state table."""

from receiver.decide.attempts import Backoff, Outcome, conclude
from receiver.decide.channel import ChannelHealth, channel_health
from receiver.decide.decision import Changed, Decision, Unchanged
from receiver.decide.lanes import HEAVY_BYTES, FillStep, fill_order, free_slots, lane_of
from receiver.decide.outputs import refresh_outputs
from receiver.decide.plans import (
    LOOKAHEAD,
    Depth,
    Listing,
    Plan,
    Progress,
    Scan,
    Scope,
    Single,
    is_news,
    is_worth_another_page,
    list_of,
    plan_polls,
)
from receiver.decide.policy import Policy
from receiver.decide.poll_schedule import Route, failure_pause, is_404_conclusive, next_poll, route
from receiver.decide.reconcile import TABLE, Kind, kind_of, reconcile
from receiver.decide.settlement import SETTLED_STATES, callback_expires_at, filter_reason, settle

__all__ = [
    "HEAVY_BYTES",
    "LOOKAHEAD",
    "SETTLED_STATES",
    "TABLE",
    "Backoff",
    "Changed",
    "ChannelHealth",
    "Decision",
    "Depth",
    "FillStep",
    "Kind",
    "Listing",
    "Outcome",
    "Plan",
    "Policy",
    "Progress",
    "Route",
    "Scan",
    "Scope",
    "Single",
    "Unchanged",
    "callback_expires_at",
    "channel_health",
    "conclude",
    "failure_pause",
    "fill_order",
    "filter_reason",
    "free_slots",
    "is_404_conclusive",
    "is_news",
    "is_worth_another_page",
    "kind_of",
    "lane_of",
    "list_of",
    "next_poll",
    "plan_polls",
    "reconcile",
    "refresh_outputs",
    "route",
    "settle",
]
