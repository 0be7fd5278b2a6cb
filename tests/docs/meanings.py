"""What refusals, the cases of `trigger` and the faults of the emulator mean.

The generated tables show these texts beside the names that the code has.
"""

from collections.abc import Mapping

REFUSAL_MEANINGS: Mapping[str, str] = {
    "malformed_request": "The request is not valid HTTP/1.1. The connection is closed.",
    "malformed_signature": "The `Flora-Signature` header is not `t=…,v1=…`.",
    "invalid_payload": "The body is signed, but is not a callback as FLORA documents it. It is stored.",
    "missing_signature": "There is no `Flora-Signature` header.",
    "signature_mismatch": "No configured secret made this signature: the secret is wrong, "
    "or the body was altered on the way.",
    "timestamp_out_of_tolerance": "The signature is authentic, but too old or ahead of this "
    "machine's clock. A run that is not settled is read anyway.",
    "workspace_mismatch": "The callback is signed with the secret of another workspace than its run's.",
    "not_found": "The path does not exist.",
    "method_not_allowed": "Callbacks are `POST`; health checks are `GET`.",
    "body_timeout": "The body did not arrive in time (`public.body_timeout_seconds`).",
    "body_too_large": "The body is larger than `public.max_body_bytes`.",
    "unavailable": "The callback could not be committed, or the service is not ready. The response has `Retry-After`.",
}

CASE_MEANINGS: Mapping[str, str] = {
    "completed": "An authentic callback about a completed run. The default.",
    "failed": "An authentic callback about a failed run.",
    "unknown_run": "An authentic callback about a run that does not exist, whatever `--run-id` says.",
    "unknown_event": "An authentic callback of the type `run.paused`: expects `ignored`.",
    "duplicate": "The same delivery twice: expects `accepted`, then `duplicate`.",
    "contradicting_pair": "Two deliveries about one run, the first `completed`, the second `failed`.",
    "retry_after_six_minutes": "An authentic callback signed 400 seconds ago, "
    "as FLORA's last retry may be: expects `accepted`.",
    "malformed_request": "Both `Content-Length` and `Transfer-Encoding`, which HTTP forbids: expects 400 "
    '(`public.http = "h11"` allows it).',
    "missing_signature": "No `Flora-Signature` header: expects 401.",
    "malformed_signature": "A `Flora-Signature` header that cannot be parsed: expects 400.",
    "signature_mismatch": "Signed with another secret: expects 401.",
    "timestamp_out_of_tolerance": "Signed an hour ago: expects 401.",
    "workspace_mismatch": "About a run of another workspace: expects 401.",
    "body_timeout": "The last byte of the body is held back: expects 408.",
    "invalid_payload": "Signed, but not JSON: expects 400.",
    "malformed": "Signed JSON, but not a callback: expects 400.",
    "body_too_large": "A body of 70 kB: expects 413.",
    "oversized": "The same as `body_too_large`.",
    "method_not_allowed": "A `GET` of the callback path: expects 405.",
    "not_found": "A callback to another path: expects 404.",
}

FAULT_MEANINGS: Mapping[str, str] = {
    "rate_limited": "The API responds 429 `rate_limited`, with `retry-after` if given, in seconds or as a date.",
    "internal_error": "The API responds 500 `internal_error`.",
    "service_unavailable": "The API responds 503 `service_unavailable`.",
    "unauthorized": "The API responds 401.",
    "not_found": "The API responds 404.",
    "insufficient_credits": "The API responds 402.",
    "html": "The API responds with a page of HTML in place of JSON.",
    "slow": "The request is carried out; its response is late.",
    "truncated_json": "The request is carried out; its response is half of the JSON.",
    "cut_answer": "The request is carried out; the connection is closed in the middle of its response.",
    "drop": "The callback is never sent.",
    "duplicate": "The callback is sent again, this many times more.",
    "delay": "The callback is sent late.",
    "reorder": "The callback is held back, so that callbacks of later runs overtake it.",
    "corrupt": "The body is altered after it was signed.",
    "contradict": "The callback reports the opposite status.",
    "wrong_secret": "The callback is signed with a secret that is not configured anywhere.",
    "old_secret": "The callback is signed with this secret, as while one is being rotated.",
    "stale": "The signature is this old.",
    "refresh_timestamp": "Whether each retry is signed anew.",
    "stall": "The download stops after this many bytes, for this long.",
    "cut": "The download's connection is closed after this many bytes.",
    "wrong_length": "`Content-Length` differs from the bytes by this much.",
    "expired": "The output's URL has expired.",
    "unavailable": "The media server responds with this status, and `retry-after` as above.",
    "redirect": "The output's URL redirects to another.",
    "content_encoding": "The output has this `Content-Encoding`: gzip, deflate, br and zstd are applied "
    "unless `apply` is false, any other is a label alone.",
    "content_type": "The output has this `Content-Type`.",
    "fail": "The run fails with this error code.",
    "run_seconds": "The run takes this long.",
    "read_lag": "The API shows the run's end this much later than it happened.",
    "cost_lag": "The API shows the run's cost this much later than its end.",
    "no_outputs": "The run completes without outputs.",
    "same_output_ids": "All outputs of the run have the same id.",
    "size": "Each output of the run has this many bytes.",
}
