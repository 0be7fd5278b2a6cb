"""`flora-receiver dev-cert`: creates a CA and a certificate for tests; installs nothing."""

import re
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path

from receiver.cli.output import print_result, report_errors
from receiver.errors import ConfigError, Problem
from receiver.net.addresses import parse_address
from receiver.net.certificates import (
    LOCAL_HOSTS,
    issue,
    load_authority,
    make_authority,
    save_authority,
    write,
)

_CA_LIFE = timedelta(days=3650)
_MAX_NAME_LENGTH = 253
_NAME = re.compile(r"(\*\.)?[a-z0-9_-]{1,63}(\.[a-z0-9_-]{1,63})*", re.IGNORECASE)
_NOT_A_HOST = "is not a host name or an address; omit https://, port and path; write ü as xn--…"


def run(hosts: Sequence[str], directory: Path, *, days: int, force: bool, json: bool) -> None:
    with report_errors(as_json=json):
        names = tuple(hosts) or LOCAL_HOSTS
        if invalid := [name for name in names if not _is_host(name)]:
            raise ConfigError([Problem("--host", f"{name!r} {_NOT_A_HOST}") for name in invalid])
        try:
            authority = None if force else load_authority(directory)
            is_new = authority is None
            if authority is None:
                authority = make_authority("flora-receiver development CA", life=_CA_LIFE)
                save_authority(authority, directory)
            issued = issue(authority, *names, life=timedelta(days=days))
            certificate, key = write(issued, directory)
        except ValueError as error:
            message = f"{error}; --force creates a new CA"
            raise ConfigError([Problem(str(directory), message)]) from error
        except OSError as error:
            message = f"cannot be written: {error.strerror}"
            raise ConfigError([Problem(str(directory), message)]) from error
        ca = directory / "ca.pem"
        paths = {"ca": str(ca), "certificate": str(certificate), "key": str(key)}
        print_result(
            {**paths, "hosts": list(names), "days": days, "new_ca": is_new},
            _instructions(ca, certificate, key, names),
            as_json=json,
        )


def _is_host(text: str) -> bool:
    if parse_address(text) is not None:
        return True
    return len(text) <= _MAX_NAME_LENGTH and _NAME.fullmatch(text) is not None


def _instructions(ca: Path, certificate: Path, key: Path, names: Sequence[str]) -> str:
    return f"""{certificate} is valid for {", ".join(names)}. In receiver.toml:

  [tls]
  cert = "{certificate}"
  key = "{key}"

No program trusts it yet, because nothing was installed. Give {ca} to those that must trust it,
and keep ca.key private:

  curl               --cacert {ca}
  flora-receiver     trigger, dev, doctor: --ca {ca}; emulator: --callback-ca {ca}
  Python             SSL_CERT_FILE={ca}
  Node               NODE_EXTRA_CA_CERTS={ca}
  Debian, Ubuntu     sudo cp {ca} /usr/local/share/ca-certificates/flora-receiver.crt && \\
                     sudo update-ca-certificates
  macOS              sudo security add-trusted-cert -d -r trustRoot \\
                     -k /Library/Keychains/System.keychain {ca}
  Firefox            Settings, Certificates, Authorities, Import

FLORA itself trusts public certificates only. This one is for the emulator and your own tests."""
