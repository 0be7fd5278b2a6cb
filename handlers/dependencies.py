"""Whether others have stored what a handler wants to tell about: handlers work side by side. Pure; for any handler."""

from collections.abc import Iterable, Sequence

from receiver.handler import Artifact, SettledRun


def unfinished(names: Iterable[str], run: SettledRun, artifacts: Sequence[Artifact]) -> list[str]:
    """Return which of the named handlers have not stored every output of a completed run yet."""
    if run.status != "completed":
        return []
    wanted = {output.position for output in run.outputs}
    return [
        name
        for name in names
        if not wanted <= {each.position for each in artifacts if each.handler == name and each.stored_at is not None}
    ]
