"""The Python client of the operations API. Public: programs import `ReceiverClient` from here.

The commands use it too, and `web.ops` fills the messages that it reads. May import `net`, `model`
and `errors`.
"""

from receiver.client.client import (
    DEFAULT_URL,
    TOKEN_FILE,
    ArtifactView,
    DispatchView,
    ErrorView,
    OutputView,
    ReceiverApiError,
    ReceiverClient,
    RunView,
    StartView,
)

__all__ = [
    "DEFAULT_URL",
    "TOKEN_FILE",
    "ArtifactView",
    "DispatchView",
    "ErrorView",
    "OutputView",
    "ReceiverApiError",
    "ReceiverClient",
    "RunView",
    "StartView",
]
