"""The rules of the service, pure: no clock, no I/O, no log. The state table is in `reconcile.py`."""

from receiver.decide.attempts import Backoff, Outcome, conclude
from receiver.decide.channel import ChannelHealth, channel_health
from receiver.decide.decision import Changed, Decision, Unchanged
from receiver.decide.lanes import HEAVY_BYTES, Turn, lane_of, room, turns
from receiver.decide.plans import (
    LOOKAHEAD,
    Depth,
    Listing,
    Plan,
    Progress,
    Scan,
    Scope,
    Single,
    home,
    plan_polls,
    worth_another_page,
    worth_telling,
)
from receiver.decide.policy import Policy
from receiver.decide.poll_schedule import Route, failure_pause, next_poll, right_route, route
from receiver.decide.reconcile import TABLE, Kind, kind_of, reconcile
from receiver.decide.settlement import SETTLED_STATES, callback_gone_at, filter_reason, settle

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
    "Turn",
    "Unchanged",
    "callback_gone_at",
    "channel_health",
    "conclude",
    "failure_pause",
    "filter_reason",
    "home",
    "kind_of",
    "lane_of",
    "next_poll",
    "plan_polls",
    "reconcile",
    "right_route",
    "room",
    "route",
    "settle",
    "turns",
    "worth_another_page",
    "worth_telling",
]
