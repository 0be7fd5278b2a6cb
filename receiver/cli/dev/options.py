"""The options of `flora-receiver dev`."""

from pathlib import Path
from typing import Annotated, Literal

import typer

Tunnel = Annotated[
    Literal["cloudflared", "ngrok", "ssh", "command"] | None,
    typer.Option(help="The way to a public URL; default: the first that is there."),
]
NoTunnel = Annotated[bool, typer.Option("--no-tunnel", help="Poll, and play each settled run as a callback.")]
PublicUrl = Annotated[
    str | None,
    typer.Option(help="A URL that leads here already; with --ssh or --command: the URL of that tunnel."),
]
WithEmulator = Annotated[bool, typer.Option("--emulator", help="With an emulated FLORA instead of the real one.")]
SshHost = Annotated[str | None, typer.Option(help="user@host[:port] that can be reached from outside.")]
RemotePort = Annotated[int, typer.Option(min=1, max=65535, help="The port that the ssh host listens on.")]
KnownHosts = Annotated[
    Path | None,
    typer.Option(exists=True, dir_okay=False, help="Keys of ssh hosts; default: ~/.ssh/known_hosts."),
]
Identity = Annotated[
    Path | None,
    typer.Option(exists=True, dir_okay=False, help="Private key for ssh; default: ssh's own."),
]
Program = Annotated[
    str | None,
    typer.Option(help="Any tunnel program, run without a shell: {port}, {host} and {url} are filled in."),
]
Pattern = Annotated[
    str | None,
    typer.Option(help="Regular expression for the URL that --command prints; default: the first https URL."),
]
Domain = Annotated[str | None, typer.Option(help="A reserved ngrok domain.")]
Host = Annotated[str, typer.Option(help="Address to bind: loopback, or 0.0.0.0.")]
JsonLines = Annotated[bool, typer.Option("--json", help="Print one JSON object per line.")]
