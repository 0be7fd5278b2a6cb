"""Plans the API calls that read due runs with the fewest requests. Pure; for poller and sweeper.

A page of a list has a hundred runs, newest first; a single read has one. How many other runs lie
between two of ours in a list is unknown, so a scan is a bet: it is made if it looks cheaper than
single reads, and judged again after each page. Absence from a list never counts against a run: if a
scan has passed a run without finding it, the run is read alone.

Lists are requested without a `status` filter: a run that has just ended would be missing from
`running`, and `completed` contains mostly runs that were settled long ago.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from enum import StrEnum
from itertools import accumulate
from math import ceil

from receiver.decide.policy import Policy
from receiver.decide.poll_schedule import Route, next_poll, route
from receiver.decide.settlement import SETTLED_STATES
from receiver.model import Origin, Run, RunState, Snapshot

LOOKAHEAD = timedelta(minutes=4)
"""A scan for due runs also reads those due within this time: jitter has spread out their reads."""

_PAGE = 100
_URGENT_SINGLES = 8
"""Up to this many runs with a new callback are read alone, which is faster."""
_SOON = 0.25
"""The last part of its pause in which a run may be read early: as much as jitter adds."""
_SOON_WORTH = 0.5
"""The value of an early read, in requests: it makes a later one likely, not surely, needless."""
_LISTED_PAGES = 10
"""Limit of pages read for runs that no single read can return."""
_DEPTH_HOLDS = timedelta(minutes=10)
_STARTED_SLACK = timedelta(minutes=5)
_HEARD_SLACK = timedelta(hours=1)
_LISTED_SLACK = timedelta(days=2)


class Listing(StrEnum):
    """FLORA's lists of runs (FLORA contract, section 3)."""

    TECHNIQUE_RUNS = "technique-runs"
    GENERATIONS = "generations"


@dataclass(frozen=True, slots=True)
class Scope:
    """One list with its filters."""

    listing: Listing
    workspace_id: str | None = None
    technique_id: str | None = None
    project_id: str | None = None


@dataclass(frozen=True, slots=True)
class Single:
    """Plan: read one run on its own route."""

    run: Run
    requests: int = 1


@dataclass(frozen=True, slots=True)
class Scan:
    """Plan: page through a list from its newest run. `due` and `soon` are newest first.

    `requests` is an estimate. `place` is the `list_of` its runs; `scope` may be narrower.
    """

    place: Scope
    scope: Scope
    due: tuple[Run, ...]
    soon: tuple[Run, ...]
    requests: int


Plan = Single | Scan


@dataclass(frozen=True, slots=True)
class Depth:
    """A measurement of a list: how many rows it has down to the one created at `boundary`."""

    rows: int
    boundary: datetime
    at: datetime

    @property
    def rows_per_second(self) -> float:
        return self.rows / max((self.at - self.boundary).total_seconds(), 1.0)


@dataclass(frozen=True, slots=True)
class Progress:
    """The progress of a scan: pages and rows read, `useful` pages, creation of the oldest row."""

    pages: int = 0
    rows: int = 0
    useful: int = 0
    boundary: datetime | None = None

    def add_page(self, snapshots: Sequence[Snapshot], *, useful: int) -> "Progress":
        """Return the progress after one more page."""
        times = [snapshot.created_at for snapshot in snapshots if snapshot.created_at is not None]
        oldest = min([*times, *([self.boundary] if self.boundary else [])], default=None)
        return Progress(self.pages + 1, self.rows + len(snapshots), self.useful + useful, oldest)

    def depth(self, now: datetime) -> Depth | None:
        return None if self.boundary is None else Depth(self.rows, self.boundary, now)


def plan_polls(
    due: Sequence[Run],
    *,
    now: datetime,
    policy: Policy,
    soon: Sequence[Run] = (),
    alone: Collection[str] = (),
    busy: Collection[Scope] = (),
    depths: Mapping[Scope, Depth] | None = None,
) -> tuple[Plan, ...]:
    """Return the plans for the due runs of one API key, most urgent first; each run is in one plan.

    `soon` has runs due within LOOKAHEAD: those due soonest are added to scans. `alone` has ids that
    a scan has just passed without finding them. For lists that are being scanned (`busy`, by
    `list_of`), only runs with a callback are planned. `depths` has measurements of earlier scans.
    """
    plans: list[Plan] = []
    groups: dict[Scope, list[Run]] = {}
    for run in due:
        scope = list_of(run)
        if scope is None or (run.run_id in alone and route(run) is not Route.LISTED):
            plans.append(Single(run))
        else:
            groups.setdefault(scope, []).append(run)
    early: dict[Scope, list[Run]] = {}
    for run in soon:
        scope = list_of(run)
        if scope is not None and run.run_id not in alone and _soon_enough(run, policy, now):
            early.setdefault(scope, []).append(run)
    for scope, members in groups.items():
        plans += _plan_scope(scope, members, early.get(scope, ()), now, depths or {}, busy=scope in busy)
    return tuple(sorted(plans, key=_urgency))


def list_of(run: Run) -> Scope | None:
    """Return the list that contains a run, or None if no known list does."""
    match route(run):
        case Route.TECHNIQUE_RUN | Route.LISTED:
            return Scope(Listing.TECHNIQUE_RUNS, run.workspace_id)
        case Route.RUN:
            return None if run.run_type == "action" else Scope(Listing.GENERATIONS, run.workspace_id)


def is_worth_another_page(
    scan: Scan, left: Collection[str], progress: Progress, *, now: datetime, more: bool = True
) -> bool:
    """Return whether to read the next page. `left` are the ids not found yet; `more`: there is one.

    A scan stops at the end of the list, after the oldest due run, and when the remaining runs are
    cheaper to read one by one: as the pages so far suggest, or if too many of them were useless.
    """
    ahead = [run for run in scan.due if run.run_id in left and not is_passed(run, progress.boundary)]
    if not more or not ahead:
        return False
    if any(route(run) is Route.LISTED for run in ahead) and progress.pages < _LISTED_PAGES:
        return True
    members = len(scan.due) + len(scan.soon)
    if progress.pages - progress.useful > members // 10:
        return False
    early = [run for run in scan.soon if run.run_id in left and not is_passed(run, progress.boundary)]
    depth = progress.depth(now)
    queue = _newest_first(ahead, early)
    return _reach(queue, since=progress.boundary or now, depth=depth, least=0.5)[0] > 0


def is_passed(run: Run, boundary: datetime | None) -> bool:
    """Return whether a list read down to `boundary` should have contained a run."""
    return boundary is not None and boundary < _created_after(run)


def is_news(run: Run, snapshot: Snapshot) -> bool:
    """Return whether a listed row has anything new about a known run, and so is worth a commit."""
    if run.state in SETTLED_STATES:
        return run.cost_due_at is not None and snapshot.charged_cost is not None
    return run.state is not RunState.LOST or snapshot.status in {"completed", "failed"}


def _plan_scope(
    scope: Scope,
    due: Sequence[Run],
    soon: Sequence[Run],
    now: datetime,
    depths: Mapping[Scope, Depth],
    *,
    busy: bool,
) -> Iterable[Plan]:
    reported = [run for run in due if run.state is RunState.REPORTED and route(run) is not Route.LISTED]
    others = list(due)
    if busy or len(reported) <= _URGENT_SINGLES:
        urgent = {run.run_id for run in reported}
        yield from (Single(run) for run in reported)
        others = [run for run in due if run.run_id not in urgent]
    if busy or not others:
        return
    place, scope = scope, _narrow(scope, (*others, *soon))
    depth = depths.get(scope)
    if depth is not None and now - depth.at > _DEPTH_HOLDS:
        depth = None
    queue = _newest_first(others, soon)
    reach, pages = _reach(queue, since=now, depth=depth, least=1.0)
    listed = [place for place, each in enumerate(queue, 1) if each.due and route(each.run) is Route.LISTED]
    if listed and listed[-1] > reach:  # no other call returns these
        reach, pages = listed[-1], max(pages, 1)
    yield from (Single(each.run) for each in queue[reach:] if each.due)
    if reach:
        members = queue[:reach]
        yield Scan(
            place,
            scope,
            due=tuple(each.run for each in members if each.due),
            soon=tuple(each.run for each in members if not each.due),
            requests=pages,
        )


def _soon_enough(run: Run, policy: Policy, now: datetime) -> bool:
    """Return whether a run is so close to its next read that an early read can replace it."""
    if run.next_poll_at is None:
        return False
    pause = next_poll(run, policy, now=now, jitter=0.0) - now
    return run.next_poll_at - now <= pause * _SOON


def _narrow(scope: Scope, runs: Sequence[Run]) -> Scope:
    """Filter a list by technique, if all runs are of one.

    By id only: whether FLORA filters by slug is not documented.
    """
    techniques = {run.technique_id for run in runs}
    only = techniques.pop() if len(techniques) == 1 else None
    if scope.listing is Listing.TECHNIQUE_RUNS and only is not None and only.startswith("tech_"):
        return replace(scope, technique_id=only)
    return scope


@dataclass(frozen=True, slots=True)
class _Queued:
    """A run that a scan could read, and the value of that in requests."""

    run: Run
    due: bool

    @property
    def worth(self) -> float:
        return 1.0 if self.due else _SOON_WORTH

    @property
    def created_at(self) -> datetime:
        return self.run.created_at or self.run.first_seen_at


def _newest_first(due: Iterable[Run], soon: Iterable[Run]) -> list[_Queued]:
    queue = [*(_Queued(run, due=True) for run in due), *(_Queued(run, due=False) for run in soon)]
    return sorted(queue, key=lambda each: each.created_at, reverse=True)


def _reach(
    queue: Sequence[_Queued], *, since: datetime, depth: Depth | None, least: float
) -> tuple[int, int]:
    """Return how many of these runs, newest first, to read by paging from `since`, and the pages.

    The best prefix saves the most requests; it is empty if that is fewer than `least`. Only due
    runs justify a scan; the others are read along with them.
    """
    best, reach, cost = least, 0, 0
    for place, spared in enumerate(accumulate(each.worth for each in queue), 1):
        pages = ceil(place / _PAGE)
        if depth is not None:
            seconds = (since - queue[place - 1].created_at).total_seconds()
            pages = max(pages, ceil(depth.rows_per_second * seconds / _PAGE))
        if spared - pages >= best:
            best, reach, cost = spared - pages, place, pages
    return (reach, cost) if any(each.due for each in queue[:reach]) else (0, 0)


def _created_after(run: Run) -> datetime:
    """Return a time after which a run was created: it may be much older than its row."""
    if run.created_at is not None:
        return run.created_at
    if route(run) is Route.LISTED:
        return run.first_seen_at - _LISTED_SLACK
    return run.first_seen_at - (_STARTED_SLACK if run.origin is Origin.STARTED else _HEARD_SLACK)


def _urgency(plan: Plan) -> tuple[int, datetime]:
    """Runs with callbacks first, missing costs last; within these, the longest due first."""
    runs = plan.due if isinstance(plan, Scan) else (plan.run,)
    rank = min(
        0 if run.state is RunState.REPORTED else 2 if run.state in SETTLED_STATES else 1 for run in runs
    )
    return rank, min(run.next_poll_at or run.first_seen_at for run in runs)
