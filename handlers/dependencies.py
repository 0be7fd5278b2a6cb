"""The option `wait_for`: handlers whose files another handler waits for. Pure; for any handler."""

from collections.abc import Iterable, Sequence

from receiver.handler import Artifact, SettledRun


def pending_handlers(names: Iterable[str], run: SettledRun, artifacts: Sequence[Artifact]) -> list[str]:
    """Return which of the named handlers have not yet stored every output of a completed run."""
    if run.status != "completed":
        return []
    positions = {output.position for output in run.outputs}
    stored = {(each.handler, each.position) for each in artifacts if each.stored_at is not None}
    return [name for name in names if not {(name, position) for position in positions} <= stored]
