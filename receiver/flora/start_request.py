"""What a caller wants started, and what FLORA is asked for it: the body, the key, the callback URL with its token. Pure."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qsl, urlencode, urlsplit, urlunsplit

from receiver.model import Operation


@dataclass(frozen=True, slots=True, kw_only=True)
class StartRequest:
    """What a caller wants started. `technique_id` for a technique run; `generate` is the body of `POST /generate`."""

    technique_id: str = ""
    inputs: tuple[Mapping[str, Any], ...] = ()
    mode: str = "async"
    generate: Mapping[str, Any] | None = None
    workspace_id: str = ""
    callback_url: str | None = None
    """None: ours. Another one is passed on, and the run is polled."""
    idempotency_key: str | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)

    @property
    def operation(self) -> Operation:
        return Operation.TECHNIQUE_RUN if self.generate is None else Operation.GENERATE

    @property
    def hash(self) -> str:
        """SHA-256 of what FLORA would be asked to do, apart from the key and our own callback URL."""
        asked = [self.technique_id, list(self.inputs), self.mode, self.generate, self.callback_url]
        return hashlib.sha256(json.dumps(asked, sort_keys=True, ensure_ascii=False).encode()).hexdigest()

    def body(self, key: str, token: str, *, ours: str | None) -> tuple[str, bool]:
        """Return the JSON that FLORA gets, and whether its callback will come to us; `ours` is our address, if any."""
        is_ours = ours is not None and (self.callback_url is None or same_address(self.callback_url, ours))
        url = with_token(self.callback_url or ours or "", token) if is_ours else self.callback_url
        if self.generate is None:
            body: dict[str, Any] = {"inputs": list(self.inputs), "mode": self.mode, "idempotency_key": key}
        else:
            body = dict(self.generate)
        if url is not None:
            body["callback_url"] = url
        return json.dumps(body, ensure_ascii=False), is_ours


def with_token(callback_url: str, token: str) -> str:
    """Return the callback URL that names a start."""
    scheme, netloc, path, query, _ = urlsplit(callback_url)
    pairs = [(name, value) for name, value in parse_qsl(query) if name != "start"]
    return urlunsplit((scheme, netloc, path, urlencode([*pairs, ("start", token)]), ""))


def same_address(one: str, other: str) -> bool:
    """Return whether two callback URLs lead to the same place, query aside."""
    left, right = urlsplit(one), urlsplit(other)
    return (left.scheme, left.netloc.lower(), left.path.rstrip("/")) == (
        right.scheme, right.netloc.lower(), right.path.rstrip("/"),
    )  # fmt: skip
