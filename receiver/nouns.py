"""How nouns are made that the door makes for every callback. Imports nothing of ours.

To mypy, which is held over all of our code, they are frozen; at run time they are plain: a frozen dataclass sets each field
by a call, and so a run with its forty fields takes four times as long to make. What plug-ins are given is frozen for good.
"""

from typing import TYPE_CHECKING, Any

__all__ = ["noun"]

if TYPE_CHECKING:
    from dataclasses import dataclass as noun
else:
    from dataclasses import dataclass

    def noun(*, frozen: bool, slots: bool) -> Any:
        """Make a class that is compared and hashed by its fields."""
        assert frozen, "mypy must see that nobody changes it"
        return dataclass(slots=slots, unsafe_hash=True)
