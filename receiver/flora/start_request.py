"""A requested start, and what it sends to FLORA: body, idempotency key, callback URL with token.

Pure.

Built by the API from its requests; sent by the starter.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qsl, urlencode, urlsplit, urlunsplit

from receiver.model import Operation


@dataclass(frozen=True, slots=True, kw_only=True)
class StartRequest:
    """A run to start: of a technique, or by `generate`, the body of `POST /generate`."""

    technique_id: str = ""
    inputs: tuple[Mapping[str, Any], ...] = ()
    mode: str = "async"
    generate: Mapping[str, Any] | None = None
    workspace_id: str = ""
    callback_url: str | None = None
    """None for the receiver's own. A run with another one is polled."""
    idempotency_key: str | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)

    @property
    def operation(self) -> Operation:
        return Operation.TECHNIQUE_RUN if self.generate is None else Operation.GENERATE

    @property
    def hash(self) -> str:
        """SHA-256 of what FLORA would do: all but the key and the receiver's own callback URL."""
        request = [self.technique_id, list(self.inputs), self.mode, self.generate, self.callback_url]
        return hashlib.sha256(json.dumps(request, sort_keys=True, ensure_ascii=False).encode()).hexdigest()

    def to_body(self, key: str, token: str, *, own_url: str | None) -> tuple[str, bool]:
        """Return the JSON for FLORA, and whether its callback comes to the receiver's `own_url`."""
        is_own = own_url is not None and (
            self.callback_url is None or is_same_address(self.callback_url, own_url)
        )
        url = add_token(self.callback_url or own_url or "", token) if is_own else self.callback_url
        if self.generate is None:
            body: dict[str, Any] = {"inputs": list(self.inputs), "mode": self.mode, "idempotency_key": key}
        else:
            body = dict(self.generate)
        if url is not None:
            body["callback_url"] = url
        return json.dumps(body, ensure_ascii=False), is_own


def add_token(callback_url: str, token: str) -> str:
    """Return the callback URL with the token of a start, in place of any other."""
    scheme, netloc, path, query, _ = urlsplit(callback_url)
    pairs = [(name, value) for name, value in parse_qsl(query) if name != "start"]
    return urlunsplit((scheme, netloc, path, urlencode([*pairs, ("start", token)]), ""))


def is_same_address(one: str, other: str) -> bool:
    """Return whether two callback URLs lead to the same endpoint, whatever their queries."""
    left, right = urlsplit(one), urlsplit(other)
    return (left.scheme, left.netloc.lower(), left.path.rstrip("/")) == (
        right.scheme, right.netloc.lower(), right.path.rstrip("/"),
    )  # fmt: skip
