"""`flora-receiver dev-cert`: a CA of one's own and a certificate under it, for a laptop. It installs nothing anywhere."""

import re
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path

from receiver.cli.output import print_result, report_errors
from receiver.errors import ConfigError, Problem
from receiver.net.addresses import parse_address
from receiver.net.certificates import LOCAL_HOSTS, issue, load_authority, make_authority, save_authority, write

_CA_LIFE = timedelta(days=3650)
_NAME = re.compile(r"(\*\.)?[a-z0-9_-]{1,63}(\.[a-z0-9_-]{1,63})*", re.IGNORECASE)
_NO_HOST = "is no host name or address: leave out https://, port and path, and write other letters as xn--…"


def run(hosts: Sequence[str], directory: Path, *, days: int, force: bool, json: bool) -> None:
    with report_errors(as_json=json):
        names = tuple(hosts) or LOCAL_HOSTS
        if odd := [Problem("--host", f"{name!r} {_NO_HOST}") for name in names if not _is_host(name)]:
            raise ConfigError(odd)
        try:
            authority = None if force else load_authority(directory)
            made = authority is None
            if authority is None:
                authority = make_authority("flora-receiver development CA", life=_CA_LIFE)
                save_authority(authority, directory)
            certificate, key = write(issue(authority, *names, life=timedelta(days=days)), directory)
        except ValueError as error:
            raise ConfigError([Problem(str(directory), f"{error}; --force makes new ones")]) from error
        except OSError as error:
            raise ConfigError([Problem(str(directory), f"cannot be written: {error.strerror}")]) from error
        ca = directory / "ca.pem"
        paths = {"ca": str(ca), "certificate": str(certificate), "key": str(key)}
        print_result(
            {**paths, "hosts": list(names), "days": days, "new_ca": made},
            _told(ca, certificate, key, names),
            as_json=json,
        )


def _is_host(text: str) -> bool:
    return parse_address(text) is not None or (_NAME.fullmatch(text) is not None and len(text) < 254)


def _told(ca: Path, certificate: Path, key: Path, names: Sequence[str]) -> str:
    return f"""{certificate} is good for {", ".join(names)}. In receiver.toml:

  [tls]
  cert = "{certificate}"
  key = "{key}"

Nobody trusts it yet, and nothing was installed. Who shall trust it is given {ca}; keep ca.key to yourself:

  curl               --cacert {ca}
  flora-receiver     trigger, dev and doctor take --ca {ca}; emulator takes --callback-ca {ca}
  Python             SSL_CERT_FILE={ca}
  Node               NODE_EXTRA_CA_CERTS={ca}
  Debian, Ubuntu     sudo cp {ca} /usr/local/share/ca-certificates/flora-receiver.crt && sudo update-ca-certificates
  macOS              sudo security add-trusted-cert -d -r trustRoot -k /Library/Keychains/System.keychain {ca}
  Firefox            Settings, Certificates, Authorities, Import

FLORA itself trusts public certificates only: this is for the emulator, and for tests of your own."""
