"""The options of `flora-receiver dev`."""

from pathlib import Path
from typing import Annotated, Literal

import typer

Tunnel = Annotated[
    Literal["cloudflared", "ngrok", "ssh", "command"] | None,
    typer.Option(help="The tunnel to use; default: the first that is installed."),
]
NoTunnel = Annotated[
    bool, typer.Option("--no-tunnel", help="Poll, and simulate the callback of each settled run.")
]
PublicUrl = Annotated[
    str | None,
    typer.Option(help="Public URL that already leads here; with --ssh or --command: the tunnel's URL."),
]
WithEmulator = Annotated[
    bool, typer.Option("--emulator", help="Use an emulated FLORA instead of the real one.")
]
SshHost = Annotated[
    str | None, typer.Option(help="user@host[:port] of an ssh server that is reachable from outside.")
]
RemotePort = Annotated[int, typer.Option(min=1, max=65535, help="Port that the ssh server listens on.")]
KnownHosts = Annotated[
    Path | None,
    typer.Option(exists=True, dir_okay=False, help="Keys of ssh servers; default: ~/.ssh/known_hosts."),
]
Identity = Annotated[
    Path | None,
    typer.Option(exists=True, dir_okay=False, help="Private key for ssh; default: ssh's own."),
]
Program = Annotated[
    str | None,
    typer.Option(help="Any tunnel program, run without a shell; {port}, {host} and {url} are replaced."),
]
Pattern = Annotated[
    str | None,
    typer.Option(
        help="Regular expression for the URL that --command prints; default: the first https URL."
    ),
]
Domain = Annotated[str | None, typer.Option(help="Reserved ngrok domain.")]
Host = Annotated[str, typer.Option(help="Address to bind: loopback, 0.0.0.0 or ::.")]
JsonLines = Annotated[bool, typer.Option("--json", help="Print one JSON object per line.")]
