"""Every kind of finding that `doctor` can report: id, severity, summary, cause and fix. Pure."""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum


class Severity(StrEnum):
    """How serious a finding is."""

    OK = "ok"
    """For information; nothing needs to be done."""
    WARNING = "warning"
    """It works now and may stop working, or it could not be checked."""
    ERROR = "error"
    """Callbacks or outputs are lost, or will be."""


@dataclass(frozen=True, slots=True)
class FindingKind:
    """One kind of finding: what it says, its usual cause, and the instruction that fixes it."""

    severity: Severity
    summary: str
    cause: str
    fix: str


_OK, _WARNING, _ERROR = Severity

FINDING_KINDS: Mapping[str, FindingKind] = {
    # Settings and secrets
    "settings.unusable": FindingKind(
        _ERROR,
        "A setting cannot be used.",
        "It is missing, misspelt or outside its limits.",
        "Correct the setting as the message says.",
    ),
    "settings.odd": FindingKind(
        _WARNING,
        "A setting is allowed but probably a mistake.",
        "A value was misspelt, or set in the wrong place.",
        "Correct the setting that the message names, or ignore this if it is intended.",
    ),
    "secrets.white_space": FindingKind(
        _ERROR,
        "A key or a secret begins or ends with white space.",
        "A newline or a space was copied with it.",
        "Set it again without the white space.",
    ),
    "secrets.character": FindingKind(
        _ERROR,
        "A key or a secret has a character in it that no key has and no header can hold.",
        "An editor, a shell or --env-file added it, or a file holds more than the key.",
        "Set it again: one line of plain text, without quotation marks, comments or spaces.",
    ),
    "secrets.prefix": FindingKind(
        _WARNING,
        "A key or a secret does not have FLORA's prefix.",
        "Only a part of it was copied, or it is another value.",
        "Copy it from FLORA again: API keys begin with sk_, signing secrets with whsec_.",
    ),
    "secrets.swapped": FindingKind(
        _ERROR,
        "An API key is set as a signing secret, or a signing secret as an API key.",
        "API keys begin with sk_live_ or sk_test_, signing secrets with whsec_.",
        "Swap the values of FLORA_API_KEY and FLORA_WEBHOOK_SECRET.",
    ),
    "secrets.shared": FindingKind(
        _ERROR,
        "Two workspaces have the same signing secret.",
        "In FLORA each workspace has its own, so the callbacks of one of them would be refused.",
        "Set the secret of each workspace in its [[workspaces]] table.",
    ),
    "secrets.mixed_up": FindingKind(
        _WARNING,
        "The API key of one workspace lists runs of another.",
        "The keys of two [[workspaces]] are swapped.",
        "Look up in FLORA which key belongs to which workspace, and set `api_key` accordingly.",
    ),
    # FLORA's API and the clock
    "flora.unreachable": FindingKind(
        _ERROR,
        "FLORA's API does not respond.",
        "This machine has no route to it, or [flora] base_url is wrong.",
        "Run `curl --noproxy '*'` with [flora] base_url on this machine; correct the URL, or allow outgoing "
        "HTTPS.",
    ),
    "flora.proxy_ignored": FindingKind(
        _ERROR,
        "FLORA's API does not respond directly, and the proxy of the environment is not used.",
        "HTTPS_PROXY and the like are read by curl and by the clients of buckets, not by flora-receiver.",
        'Set [flora] proxy = "env:HTTPS_PROXY", and [downloads] proxy if outputs need it too.',
    ),
    "flora.proxy_failed": FindingKind(
        _ERROR,
        "The proxy of [flora] does not connect to FLORA's API.",
        "It is not reachable, wants a user name and password, or does not allow this host.",
        "Run `curl --proxy URL` with [flora] base_url on this machine, and correct [flora] proxy.",
    ),
    "downloads.proxy_failed": FindingKind(
        _ERROR,
        "The proxy of [downloads] cannot be used.",
        "It is not reachable, or wants a user name and password.",
        "Correct [downloads] proxy; `curl --proxy URL` with the URL of an output shows what it answers.",
    ),
    "proxy.not_used": FindingKind(
        _OK,
        "The environment names a proxy that flora-receiver does not use.",
        "HTTPS_PROXY and the like are read by the clients of buckets and of `notify` only.",
        "None needed if it works; else set [flora] proxy and [downloads] proxy.",
    ),
    "flora.key_refused": FindingKind(
        _ERROR,
        "FLORA does not accept the API key (401).",
        "The key was revoked, or belongs to another environment.",
        "Create a new API key in FLORA and set FLORA_API_KEY.",
    ),
    "flora.key_forbidden": FindingKind(
        _ERROR,
        "FLORA does not let the API key list runs (403).",
        "The workspace, the rights of the key or the plan do not include it.",
        "Check the rights of the key and the plan of the workspace in FLORA.",
    ),
    "flora.someone_else": FindingKind(
        _ERROR,
        "The server at [flora] base_url is not FLORA's API.",
        "The path is not …/api/v1, or a proxy or the login page of a network responds.",
        "Correct [flora] base_url (FLORA_BASE_URL), or let requests to FLORA bypass the proxy.",
    ),
    "flora.failing": FindingKind(
        _WARNING,
        "FLORA's API responds with an error.",
        "FLORA has a temporary problem, or limits the rate of requests.",
        "Run `flora-receiver doctor` again in a few minutes.",
    ),
    "clock.skewed": FindingKind(
        _ERROR,
        "The clock of this machine differs from FLORA's.",
        "It is not synchronized by NTP, so valid signatures look too old or too new.",
        "Run `timedatectl set-ntp true`, or use the time service of your cloud.",
    ),
    # The ledger
    "database.unusable": FindingKind(
        _ERROR,
        "The ledger cannot be opened, written or synced.",
        "The permissions are missing, the disk is full or read-only, or the server is down.",
        "Check [database] url (RECEIVER_DATABASE__URL), and who may write its file and directory.",
    ),
    "database.full": FindingKind(
        _ERROR,
        "Less than 1 GiB is free where the ledger is stored.",
        "Outputs, callback bodies or other programs have filled the disk.",
        "Free some space, or store outputs on another disk.",
    ),
    "database.old_sqlite": FindingKind(
        _OK,
        "This version of SQLite (before 3.51.3) can corrupt a WAL file that has two writers.",
        "Python was built with it.",
        "None needed: the service is the only writer. Let no other program write to the file.",
    ),
    "database.unanswered": FindingKind(
        _ERROR,
        "A service holds the ledger and does not confirm that it can commit.",
        "It is starting or stopping, cannot write, or listens elsewhere than [public] says.",
        "Read its log. If it was started with --port or --host, set RECEIVER_PUBLIC__PORT or "
        "RECEIVER_PUBLIC__HOST to the same value for `doctor`.",
    ),
    # Handlers
    "handler.broken": FindingKind(
        _ERROR,
        "The check of a handler fails.",
        "Its options, its permissions or its target are wrong.",
        "Correct its options; `flora-receiver handlers show NAME` lists them.",
    ),
    "handler.unreachable": FindingKind(
        _WARNING,
        "The target of a handler does not respond.",
        "It is down, or cannot be reached from this machine.",
        "None needed if it recovers: failed work is retried. Otherwise correct the options.",
    ),
    "handler.degraded": FindingKind(
        _WARNING,
        "The target of a handler works, with a flaw.",
        "A permission is missing that the handler can do without.",
        "None needed for runs. What was found says what is left to do.",
    ),
    # The receiver and its public URL
    "receiver.silent": FindingKind(
        _ERROR,
        "No receiver responds on this machine, so none can at the public URL.",
        "`serve` is not running, or listens elsewhere than [public] says.",
        "Start `flora-receiver serve`, then run `flora-receiver doctor` again.",
    ),
    "public.missing": FindingKind(
        _WARNING,
        "public_url is not set.",
        "FLORA gets no callback_url, so every run is polled.",
        "Set public_url to the HTTPS URL that leads here; on a laptop use `flora-receiver dev`.",
    ),
    "public.refused_by_flora": FindingKind(
        _ERROR,
        "FLORA refuses to call this URL.",
        "It is not HTTPS, or its host is not public.",
        "Set public_url to an HTTPS URL with a public host name.",
    ),
    "public.unresolved": FindingKind(
        _ERROR,
        "The host name of the public URL does not resolve.",
        "There is no DNS record, or the name is misspelt.",
        "Add the DNS record, or correct public_url.",
    ),
    "public.unreachable": FindingKind(
        _ERROR,
        "Nothing responds at the public address.",
        "Nothing listens there, or a firewall blocks it.",
        "Forward the public address to the receiver, and open its port in the firewall.",
    ),
    "public.unchecked": FindingKind(
        _WARNING,
        "The public URL cannot be checked: this machine does not reach its own public address.",
        "The router does not route it back inside, or a firewall blocks it, for FLORA too.",
        "From another network: `flora-receiver trigger URL --case signature_mismatch`; expect 401.",
    ),
    "public.certificate": FindingKind(
        _ERROR,
        "The certificate has expired, is for another name, or is not trusted.",
        "It was not renewed, belongs to another host, or lacks its chain.",
        "Install a certificate for this host with its full chain; FLORA trusts no --ca of yours.",
    ),
    "public.certificate_ends": FindingKind(
        _WARNING,
        "The certificate expires within two weeks.",
        "It is not renewed automatically, or the renewal fails.",
        "Check the log of certbot or Caddy, and renew the certificate.",
    ),
    "public.redirect": FindingKind(
        _ERROR,
        "The public URL redirects, and FLORA does not follow redirects.",
        "A proxy adds a slash, a host or https.",
        "Serve the callback path itself at this URL, with and without a final slash.",
    ),
    "public.someone_else": FindingKind(
        _ERROR,
        "The server at the public URL is not the receiver.",
        "A login page, a proxy or another service responds.",
        "Route the callback path to the receiver, without authentication before it.",
    ),
    "public.rewritten": FindingKind(
        _ERROR,
        "The path is changed before it reaches the receiver.",
        "A proxy adds or removes a part of it.",
        "Let the proxy forward /callbacks/flora unchanged.",
    ),
    "public.altered": FindingKind(
        _ERROR,
        "The body is changed on the way: 401 through the public URL, 200 on this machine.",
        "A proxy rewrites bodies, or another receiver responds there.",
        "Let the proxy forward bodies byte for byte.",
    ),
    "public.wrong_secret": FindingKind(
        _ERROR,
        "The receiver at the public URL has other signing secrets.",
        "It is another receiver, or has another FLORA_WEBHOOK_SECRET.",
        "Give both the same FLORA_WEBHOOK_SECRET, and restart the service.",
    ),
    "public.unavailable": FindingKind(
        _ERROR,
        "The receiver at the public URL cannot commit.",
        "Its ledger cannot be written.",
        "Read its log, and check its database and its disk.",
    ),
    "public.slow": FindingKind(
        _ERROR,
        "The response takes long, and FLORA waits for 10 seconds only.",
        "A proxy, a tunnel or a disk is slow.",
        "Compare the response time on this machine with the public one; replace the slow part.",
    ),
}
"""Every kind by its id. An id never changes."""


@dataclass(frozen=True, slots=True)
class Finding:
    """A finding on this set-up: the id of its kind, and what exactly was found."""

    id: str
    what: str

    @property
    def kind(self) -> FindingKind:
        return FINDING_KINDS[self.id]
