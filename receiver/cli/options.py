"""The options and arguments that several commands share."""

from pathlib import Path
from typing import Annotated

import typer

Config = Annotated[
    Path | None,
    typer.Option(
        "--config",
        "-c",
        help="Settings file; default: RECEIVER_CONFIG, else receiver.toml if it exists.",
    ),
]
Ca = Annotated[
    Path | None,
    typer.Option("--ca", exists=True, dir_okay=False, help="Additional CA to trust (PEM)."),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
OpsPort = Annotated[
    int | None,
    typer.Option(
        min=0,
        max=65535,
        help="Operations port to bind; default: [operations] port.",
    ),
]
RunId = Annotated[str, typer.Argument(help="The run's id, run_….")]
WorkspaceId = Annotated[str | None, typer.Option("--workspace-id", help="Workspace whose API key is used.")]
Metadata = Annotated[
    str | None,
    typer.Option("--metadata", help="Your own data about the run, a JSON object; file names can use it."),
]
Handler = Annotated[str | None, typer.Option("--handler", help="Only this handler.")]
Limit = Annotated[int, typer.Option(min=1, max=100_000, help="Maximum number of rows.")]
Timeout = Annotated[float, typer.Option("--timeout", min=0, help="Maximum number of seconds to wait.")]
