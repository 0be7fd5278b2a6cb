"""The claims of one run to locations in a place: which are its own, what lies there, reserving one.

Earlier versions encoded the keys in the URIs of objects. What they reserved or stored is still the
run's own, and a location that another run holds under its earlier URI stays that run's.
"""

from enum import StrEnum

from handlers.storage.places import Place
from receiver.handler import Artifact, Context, LocationTakenError


class Overwrite(StrEnum):
    """Whether a location is used at which a file exists that is not this run's own."""

    NEVER = "never"
    SAME = "same"
    ALWAYS = "always"


class Claims:
    """What a run has reserved and stored in a place, as of the beginning of an attempt."""

    def __init__(self, place: Place, context: Context, overwrite: Overwrite) -> None:
        self._place = place
        self._context = context
        self._overwrite = overwrite
        self.artifacts = {artifact.position: artifact for artifact in context.artifacts}

    def keys(self) -> dict[int, str]:
        """Return the keys of the run's own locations, by position."""
        keys = {position: self._keys_of(artifact) for position, artifact in self.artifacts.items()}
        return {position: found[-1] for position, found in keys.items() if found}

    async def find_stored(self, position: int) -> str | None:
        """Return the key of what is stored for a position, if its file still has its size."""
        artifact = self.artifacts.get(position)
        if artifact is None or artifact.stored_at is None or artifact.size is None:
            return None
        for key in self._keys_of(artifact):
            if await self._place.size(key) == artifact.size:
                return key
        return None

    async def foreign_size(self, position: int, key: str) -> int | None:
        """Return the size of a file that must not be replaced unseen, or None if there is none."""
        artifact = self.artifacts.get(position)
        is_own = artifact is not None and artifact.location in self._locations(key)
        return None if is_own or self._overwrite is Overwrite.ALWAYS else await self._place.size(key)

    async def reserve(self, position: int, name: str, key: str) -> None:
        """Claim the location of a key. What lies there decides, not what once did."""
        artifact = self.artifacts.get(position)
        locations = self._locations(key)
        if artifact is not None and artifact.location == locations[-1]:
            locations = locations[-1:]
        for location in locations:  # an earlier URI first: the last one is kept
            try:
                await self._context.reserve(position, name, location)
            except LocationTakenError as error:
                # Looked at only now: a file of the other run would have been there before its claim
                # was known to be that of something stored.
                if error.pending or await self._place.size(key) is not None:
                    raise
                await self._context.reserve(position, name, location, vacant=True)

    def _locations(self, key: str) -> list[str]:
        """Return the URIs of a key, the one in use today last."""
        earlier = self._place.earlier_location(key)
        return [*([earlier] if earlier is not None else []), self._place.locate(key)]

    def _keys_of(self, artifact: Artifact) -> list[str]:
        """Return the keys that a location may stand for: by its URI today, then by the earlier one."""
        keys = (self._place.key_of(artifact.location), self._place.earlier_key_of(artifact.location))
        return list(dict.fromkeys(key for key in keys if key is not None))
