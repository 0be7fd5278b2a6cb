"""What the doctor finds, as values: each with a stable id, a likely cause and a cure. Pure."""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum


class Severity(StrEnum):
    """How bad it is."""

    OK = "ok"
    """Worth knowing; nothing to do."""
    WARNING = "warning"
    """It works now, or could not be looked at."""
    ERROR = "error"
    """Callbacks or outputs are lost, or will be."""


@dataclass(frozen=True, slots=True)
class Illness:
    """One kind of finding: what it `means`, where it comes from as a rule, and what helps."""

    severity: Severity
    means: str
    cause: str
    cure: str


_OK, _WARNING, _ERROR = Severity
_TIME = "callbacks need an answer within 10 s: look at each step on the way"
ILLNESSES: Mapping[str, Illness] = {
    "settings.unusable": Illness(
        _ERROR, "a setting cannot be used", "it is missing, misspelt or not allowed", "do what is said beside it"
    ),
    "settings.odd": Illness(
        _WARNING, "a setting is allowed and probably not meant", "a value in the wrong place", "look at it again"
    ),
    "secrets.white_space": Illness(
        _ERROR,
        "a key or a secret has white space around it",
        "a newline or a blank was copied with it",
        "set it again without",
    ),
    "secrets.prefix": Illness(
        _WARNING,
        "a key or a secret does not begin as FLORA's do",
        "only a part was copied, or it is another one's",
        "API keys begin with sk_, signing secrets with whsec_: copy it again",
    ),
    "secrets.swapped": Illness(
        _ERROR,
        "an API key and a signing secret are in each other's place",
        "keys begin with sk_live_ or sk_test_, signing secrets with whsec_",
        "exchange FLORA_API_KEY and FLORA_WEBHOOK_SECRET",
    ),
    "secrets.shared": Illness(
        _ERROR,
        "two workspaces have the same signing secret",
        "each workspace of FLORA has its own: callbacks of one are refused as the other's",
        "give each of [[workspaces]] its own",
    ),
    "secrets.mixed_up": Illness(
        _WARNING,
        "a workspace's API key shows another workspace's runs",
        "the keys of two of [[workspaces]] are in each other's place",
        "look in FLORA whose key is whose",
    ),
    "flora.unreachable": Illness(
        _ERROR,
        "FLORA's API gives no answer",
        "no way out, or [flora] base_url is wrong",
        "try it with curl from here",
    ),
    "flora.key_refused": Illness(
        _ERROR,
        "FLORA does not know the API key (401)",
        "it was revoked, or is of another environment",
        "make a new one in FLORA and set FLORA_API_KEY",
    ),
    "flora.key_forbidden": Illness(
        _ERROR,
        "FLORA knows the API key and does not let it read runs (403)",
        "its workspace, rights or plan",
        "look at the key's rights and the workspace's plan in FLORA",
    ),
    "flora.someone_else": Illness(
        _ERROR,
        "what answers at [flora] base_url is not FLORA's API",
        "another path than …/api/v1, a proxy, or a network's login page",
        "look at [flora] base_url (FLORA_BASE_URL)",
    ),
    "flora.failing": Illness(
        _WARNING,
        "FLORA's API answers with an error of its own",
        "FLORA's trouble, as a rule",
        "try again later",
    ),
    "clock.skewed": Illness(
        _ERROR,
        "this machine's clock differs from FLORA's",
        "it is not kept by NTP: signatures will seem too old, or ahead",
        "timedatectl set-ntp true, or your cloud's time service",
    ),
    "database.unusable": Illness(
        _ERROR,
        "the ledger cannot be opened, written or synced",
        "rights, a full or read-only file system, a server that is away",
        "look at [database] url (RECEIVER_DATABASE__URL), its file and its directory",
    ),
    "database.full": Illness(
        _ERROR,
        "less than 1 GiB is left where the ledger is",
        "outputs and old bodies, or somebody else",
        "make room, or move outputs elsewhere",
    ),
    "database.old_sqlite": Illness(
        _OK,
        "this SQLite could corrupt a WAL file with two writers (before 3.51.3)",
        "the Python's own SQLite",
        "nothing: there is one writer, as long as nobody else writes to the file",
    ),
    "database.unanswered": Illness(
        _ERROR,
        "a service holds the ledger and does not say that it can commit",
        "it starts, stops, cannot write, or listens elsewhere than [public] says",
        "look at its log; give here too what `serve` or `dev` was given, as RECEIVER_PUBLIC__PORT",
    ),
    "handler.broken": Illness(
        _ERROR, "a handler's own check fails", "its options, rights or target", "see its options"
    ),
    "handler.unreachable": Illness(
        _WARNING,
        "a handler's target gives no answer now",
        "it is away",
        "nothing, if it comes back: work on it is tried again",
    ),
    "receiver.silent": Illness(
        _ERROR,
        "no receiver answers on this machine, so nobody can at the public URL",
        "`serve` does not run here, or listens elsewhere than [public] says",
        "start it, then look again",
    ),
    "public.missing": Illness(
        _WARNING,
        "there is no public_url",
        "FLORA is told no callback_url, and every run is polled",
        "set public_url to the HTTPS address that leads here, or use `flora-receiver dev` on a laptop",
    ),
    "public.refused_by_flora": Illness(
        _ERROR,
        "FLORA refuses to call such a URL",
        "it is not HTTPS, or not public",
        "name a public HTTPS address",
    ),
    "public.unresolved": Illness(
        _ERROR,
        "the public host's name leads nowhere",
        "no DNS record, or a typing error",
        "mend the record, or public_url",
    ),
    "public.unreachable": Illness(
        _ERROR,
        "nobody answers at the public address",
        "nothing listens there, or a firewall",
        "have something lead from there to the receiver",
    ),
    "public.unchecked": Illness(
        _WARNING,
        "it cannot be checked from here: this machine does not reach its own public address",
        "a router that does not lead back inside; or else a firewall, and then FLORA does not reach it either",
        "from another network: `flora-receiver trigger URL --case signature_mismatch`; 401 is right",
    ),
    "public.certificate": Illness(
        _ERROR,
        "the certificate is expired, for another name, or not trusted",
        "no renewal, another host's, or no chain",
        "renew it with its whole chain; --ca trusts a CA of your own (FLORA will not)",
    ),
    "public.certificate_ends": Illness(
        _WARNING,
        "the certificate ends within two weeks",
        "nobody renews it, or renewal fails",
        "look at certbot's or Caddy's log",
    ),
    "public.redirect": Illness(
        _ERROR,
        "the public URL redirects, and FLORA follows no redirect",
        "a proxy that adds a slash, a host or https",
        "serve the callback path itself there, with and without its final slash",
    ),
    "public.someone_else": Illness(
        _ERROR,
        "someone else answers at the public URL",
        "a login page, a proxy's own answer, another service",
        "lead the callback path to the receiver, without authentication before it",
    ),
    "public.rewritten": Illness(
        _ERROR,
        "the path is another one when it arrives",
        "a proxy adds or cuts a part of it",
        "have it hand on /callbacks/flora as it is",
    ),
    "public.altered": Illness(
        _ERROR,
        "the body is altered on the way: 401 from outside, 200 on this machine",
        "a proxy re-encodes or rewrites bodies; or another receiver answers there",
        "have it hand bodies on as they are",
    ),
    "public.wrong_secret": Illness(
        _ERROR,
        "the receiver that answers there has other secrets",
        "another receiver, or another FLORA_WEBHOOK_SECRET",
        "give both the same",
    ),
    "public.unavailable": Illness(
        _ERROR, "the receiver there cannot commit", "its ledger", "look at its log and its disk"
    ),
    "public.slow": Illness(
        _ERROR, "the answer takes long, and FLORA waits for ten seconds", "a slow proxy, tunnel or disk", _TIME
    ),
}
"""Every kind by its id. Ids are never renamed."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing found, and how it shows here."""

    id: str
    what: str

    @property
    def illness(self) -> Illness:
        return ILLNESSES[self.id]
