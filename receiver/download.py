"""Placeholder of the first hour; replaced by the guarded download."""

from typing import Protocol


class Download(Protocol): ...
