"""The command tree, and the names, options and help of the commands that work on this machine.

Commands on a running service are in the file of their group: `runs.py`, `deliveries.py` and so on.
A command imports the module that does its work when it runs, so that `--help` is quick.
"""

from pathlib import Path
from typing import Annotated, Literal

import typer

from receiver import __version__
from receiver.cli.channel import channel
from receiver.cli.deliveries import deliveries
from receiver.cli.dev import options as of_dev
from receiver.cli.dispatches import dispatches
from receiver.cli.handlers import handlers
from receiver.cli.options import Ca, Config, Json, OpsPort
from receiver.cli.runs import runs, techniques_runs

app = typer.Typer(
    name="flora-receiver",
    help="Turns FLORA's run callbacks into safely stored outputs.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,  # an unforeseen error is a bug: print a plain traceback
    rich_markup_mode=None,
)
app.add_typer(handlers, name="handlers")
app.add_typer(runs, name="runs")
app.add_typer(techniques_runs, name="techniques:runs")
app.add_typer(deliveries, name="deliveries")
app.add_typer(dispatches, name="dispatches")
app.command("channel")(channel)


@app.callback(invoke_without_command=True)
def root(
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.", is_eager=True)] = False,
) -> None:
    if version:
        print(__version__)
        raise typer.Exit


@app.command()
def serve(
    config: Config = None,
    host: Annotated[str | None, typer.Option(help="Public address to bind; default: [public] host.")] = None,
    port: Annotated[
        int | None,
        typer.Option(min=0, max=65535, help="Public port to bind, 0 for a free one; default: [public] port."),
    ] = None,
    ops_host: Annotated[
        str | None, typer.Option(help="Operations address to bind; default: [operations] host.")
    ] = None,
    ops_port: OpsPort = None,
    only: Annotated[
        Literal["door", "workers"] | None,
        typer.Option(help="Take callbacks only, or do all but that; the rest is other processes' (PostgreSQL)."),
    ] = None,
) -> None:
    """Run the receiver until it is stopped."""
    from receiver.cli.serve import run

    run(config, host=host, port=port, ops_host=ops_host, ops_port=ops_port, only=only)


@app.command()
def check(config: Config = None, json: Json = False) -> None:
    """Check settings, database and handlers."""
    from receiver.cli.check import run

    run(config, json=json)


@app.command()
def migrate(config: Config = None, json: Json = False) -> None:
    """Bring the database up to date (serve does it too)."""
    from receiver.cli.migrate import run

    run(config, json=json)


@app.command()
def demo(
    keep: Annotated[bool, typer.Option("--keep", help="Keep emulator and receiver running at the end.")] = False,
    outputs: Annotated[Path, typer.Option(help="Where the files land.")] = Path("outputs"),
    json: Json = False,
) -> None:
    """See it work: eight runs and their files."""
    from receiver.cli.demo.command import run

    run(keep=keep, outputs=outputs, json=json)


@app.command()
def dev(
    config: Config = None,
    tunnel: of_dev.Tunnel = None,
    no_tunnel: of_dev.NoTunnel = False,
    public_url: of_dev.PublicUrl = None,
    emulator: of_dev.WithEmulator = False,
    ssh: of_dev.SshHost = None,
    remote_port: of_dev.RemotePort = 8443,
    known_hosts: of_dev.KnownHosts = None,
    identity: of_dev.Identity = None,
    command: of_dev.Program = None,
    pattern: of_dev.Pattern = None,
    domain: of_dev.Domain = None,
    host: of_dev.Host = "127.0.0.1",
    port: Annotated[
        int | None,
        typer.Option(min=0, max=65535, help="Port to bind, 0 for a free one; default: [public] port."),
    ] = None,
    ops_port: OpsPort = None,
    ca: Ca = None,
    json: of_dev.JsonLines = False,
) -> None:
    """Work on an integration: a public URL, and a live view."""
    from receiver.cli.dev.command import DevOptions, run
    from receiver.cli.dev.tunnel.choice import TunnelOptions

    by_tunnel = TunnelOptions(
        tunnel=tunnel, public_url=public_url, ssh=ssh, remote_port=remote_port,
        known_hosts=known_hosts, identity=identity, command=command, pattern=pattern, domain=domain,
    )  # fmt: skip
    options = DevOptions(by_tunnel, no_tunnel=no_tunnel, emulator=emulator, ca=ca, json=json)
    run(config, options, host=host, port=port, ops_port=ops_port)


@app.command()
def emulator(
    host: Annotated[str, typer.Option(help="Address to bind.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to bind, 0 for a free one.")] = 9100,
    api_key: Annotated[str | None, typer.Option(envvar="FLORA_API_KEY", help="Key that callers must send.")] = None,
    webhook_secret: Annotated[
        str | None,
        typer.Option(envvar="FLORA_WEBHOOK_SECRET", help="Secret that signs callbacks; several with commas."),
    ] = None,
    workspace_id: Annotated[str, typer.Option(help="Workspace of the runs.")] = "ws_emulator",
    run_seconds: Annotated[float, typer.Option(min=0, help="How long a run takes.")] = 5.0,
    time_scale: Annotated[float, typer.Option(min=0.001, help="Divides the pauses between callback attempts.")] = 1.0,
    allow_private_callbacks: Annotated[bool, typer.Option(help="Allow callback URLs on loopback.")] = False,
    callback_ca: Annotated[
        Path | None,
        typer.Option(exists=True, dir_okay=False, help="The only CA trusted for callbacks (PEM)."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Makes ids, media and faults repeatable.")] = 0,
) -> None:
    """Run an emulated FLORA to test against."""
    from receiver.cli.emulator import run

    secrets = tuple(webhook_secret.split(",")) if webhook_secret else None
    run(
        host=host, port=port, api_key=api_key or None, webhook_secrets=secrets,
        workspace_id=workspace_id, run_seconds=run_seconds, time_scale=time_scale,
        allow_private_callbacks=allow_private_callbacks, callback_ca=callback_ca, seed=seed,
    )  # fmt: skip


@app.command()
def trigger(
    url: Annotated[
        str,
        typer.Argument(help="Where to send it, e.g. https://127.0.0.1:8080/callbacks/flora."),
    ],
    case: Annotated[
        str, typer.Option(help="completed, failed, duplicate, …, or the refusal to provoke.")
    ] = "completed",
    run_id: Annotated[str | None, typer.Option(help="The run it is about; default: a made-up one.")] = None,
    delivery_id: Annotated[str | None, typer.Option(help="The delivery's id; the same again is a duplicate.")] = None,
    secret: Annotated[str | None, typer.Option(help="Signing secret; default: FLORA_WEBHOOK_SECRET.")] = None,
    workspace_id: Annotated[
        str | None,
        typer.Option(help="The run's workspace; default: the one that the configured secret belongs to."),
    ] = None,
    count: Annotated[int, typer.Option(min=1, max=1_000_000, help="How many times.")] = 1,
    rate: Annotated[
        float | None,
        typer.Option(min=0.01, max=100_000, help="How many a second; default: as many as fit."),
    ] = None,
    record: Annotated[Path | None, typer.Option(dir_okay=False, help="Keep what is sent, byte for byte.")] = None,
    source: Annotated[
        Path | None,
        typer.Option("--from", exists=True, dir_okay=False, help="Send what --record has kept."),
    ] = None,
    ca: Ca = None,
    json: Json = False,
) -> None:
    """Send callbacks, good and spoiled ones, and judge answers."""
    from receiver.cli.trigger.command import Options, run

    options = Options(
        url=url, case=case, run_id=run_id, delivery_id=delivery_id, secret=secret,
        workspace_id=workspace_id, count=count, rate=rate, record=record, source=source, ca=ca,
        json=json,
    )  # fmt: skip
    run(options)


@app.command()
def backup(
    file: Annotated[Path, typer.Argument(help="A file that does not exist yet.")],
    config: Config = None,
    json: Json = False,
) -> None:
    """Copy a SQLite ledger, also while the service runs."""
    from receiver.cli.backup import make_backup

    make_backup(config, file, json=json)


@app.command()
def restore(
    file: Annotated[Path, typer.Argument(exists=True, dir_okay=False, help="What `backup` has written.")],
    config: Config = None,
    json: Json = False,
) -> None:
    """Put a copy in its place, with the service stopped."""
    from receiver.cli.backup import restore_backup

    restore_backup(config, file, json=json)


@app.command()
def move(
    to: Annotated[str, typer.Option(help="An empty database, postgresql://…; a password from ~/.pgpass.")],
    config: Config = None,
    json: Json = False,
) -> None:
    """Copy a SQLite ledger to PostgreSQL, and compare."""
    from receiver.cli.move import run

    run(config, to, json=json)


@app.command("dev-cert")
def dev_cert(
    host: Annotated[list[str] | None, typer.Option(help="A name or address; default: this machine's own.")] = None,
    directory: Annotated[Path, typer.Option("--dir", file_okay=False, help="Where the files go.")] = Path("var/tls"),
    days: Annotated[int, typer.Option(min=1, max=825, help="How long the certificate is good.")] = 90,
    force: Annotated[bool, typer.Option("--force", help="Make a new CA too.")] = False,
    json: Json = False,
) -> None:
    """Make a local CA and a certificate; it installs nothing."""
    from receiver.cli.dev_cert import run

    run(host or (), directory, days=days, force=force, json=json)


@app.command()
def init(
    directory: Annotated[Path, typer.Option("--dir", file_okay=False, help="Where the files go.")] = Path(),
    public_url: Annotated[str | None, typer.Option(help="What FLORA is told to call.")] = None,
    database: Annotated[str | None, typer.Option(help="sqlite:///… or postgresql://….")] = None,
    storage: Annotated[str, typer.Option(help="Where outputs go: a directory, or s3://….")] = "outputs",
    force: Annotated[bool, typer.Option("--force", help="Overwrite what is there.")] = False,
    json: Json = False,
) -> None:
    """Write a receiver.toml, and a .env for the secrets."""
    from receiver.cli.init import run

    run(directory, public_url=public_url, database=database, storage=storage, force=force, json=json)


@app.command()
def doctor(config: Config = None, ca: Ca = None, json: Json = False) -> None:
    """Find what is wrong, from settings to the way in."""
    from receiver.cli.doctor.command import run

    run(config, ca=ca, json=json)


def main() -> None:
    """Entry point of the console script."""
    app()
