"""The options of `flora-receiver trigger`."""

from pathlib import Path
from typing import Annotated

import typer

Url = Annotated[
    str, typer.Argument(help="The callback URL, such as https://127.0.0.1:8080/callbacks/flora.")
]
Case = Annotated[str, typer.Option(help="completed, failed, duplicate, …, or the refusal to provoke.")]
RunId = Annotated[str | None, typer.Option(help="The run's id; default: a random one.")]
DeliveryId = Annotated[str | None, typer.Option(help="The delivery's id; a repeated one is a duplicate.")]
Secret = Annotated[str | None, typer.Option(help="Signing secret; default: FLORA_WEBHOOK_SECRET.")]
WorkspaceId = Annotated[
    str | None, typer.Option(help="The run's workspace; default: that of the configured secret.")
]
Count = Annotated[int, typer.Option(min=1, max=1_000_000, help="How many times to send the case.")]
Rate = Annotated[
    float | None,
    typer.Option(
        min=0.01, max=100_000, help="Times per second; default: as fast as the receiver responds."
    ),
]
Record = Annotated[Path | None, typer.Option(dir_okay=False, help="File to record the requests in.")]
Source = Annotated[
    Path | None,
    typer.Option(
        "--from",
        exists=True,
        dir_okay=False,
        help="Send the requests in a file that --record has written.",
    ),
]
