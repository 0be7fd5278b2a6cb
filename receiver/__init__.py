"""flora-receiver: turns FLORA's run callbacks into safely stored outputs."""

__version__ = "0.1.0"
