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
from receiver.cli.streams import guard_streams
from receiver.cli.trigger import options as of_trigger
from receiver.net.credentials import split_list

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


@app.callback(invoke_without_command=True)
def root(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", is_eager=True)
    ] = False,
) -> None:
    if version:
        print(__version__)
        raise typer.Exit


@app.command()
def serve(
    config: Config = None,
    host: Annotated[
        str | None, typer.Option(help="Public address to bind; default: [public] host.")
    ] = None,
    port: Annotated[
        int | None,
        typer.Option(
            min=0, max=65535, help="Public port to bind, 0 for a free one; default: [public] port."
        ),
    ] = None,
    ops_host: Annotated[
        str | None, typer.Option(help="Operations address to bind; default: [operations] host.")
    ] = None,
    ops_port: OpsPort = None,
    only: Annotated[
        Literal["door", "workers"] | None,
        typer.Option(
            help="Only receive callbacks (door), or do everything else (workers); PostgreSQL only."
        ),
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
    """Create or upgrade the database (serve does it too)."""
    from receiver.cli.migrate import run

    run(config, json=json)


@app.command()
def demo(
    keep: Annotated[
        bool, typer.Option("--keep", help="Keep the emulator and the receiver running at the end.")
    ] = False,
    outputs: Annotated[Path, typer.Option(help="Directory for the files.")] = Path("outputs"),
    json: Json = False,
) -> None:
    """Try it on this machine: eight runs and their files."""
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
    """Develop with a public URL and a live view of events."""
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
    api_key: Annotated[
        str | None, typer.Option(envvar="FLORA_API_KEY", help="API key that requests must have.")
    ] = None,
    webhook_secret: Annotated[
        str | None,
        typer.Option(
            envvar="FLORA_WEBHOOK_SECRET", help="Secrets that sign callbacks, separated by commas."
        ),
    ] = None,
    workspace_id: Annotated[str, typer.Option(help="Workspace of the runs.")] = "ws_emulator",
    run_seconds: Annotated[float, typer.Option(min=0, help="Duration of a run in seconds.")] = 5.0,
    time_scale: Annotated[
        float, typer.Option(min=0.001, help="Divisor of the pauses between callback attempts.")
    ] = 1.0,
    allow_private_callbacks: Annotated[bool, typer.Option(help="Allow callback URLs on loopback.")] = False,
    callback_ca: Annotated[
        Path | None,
        typer.Option(exists=True, dir_okay=False, help="The only CA that is trusted for callbacks (PEM)."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of ids, media and faults.")] = 0,
) -> None:
    """Run an emulated FLORA to test against."""
    from receiver.cli.emulator import run

    secrets = tuple(split_list(webhook_secret)) if webhook_secret else None
    run(
        host=host, port=port, api_key=api_key or None, webhook_secrets=secrets,
        workspace_id=workspace_id, run_seconds=run_seconds, time_scale=time_scale,
        allow_private_callbacks=allow_private_callbacks, callback_ca=callback_ca, seed=seed,
    )  # fmt: skip


@app.command()
def trigger(
    url: of_trigger.Url,
    case: of_trigger.Case = "completed",
    run_id: of_trigger.RunId = None,
    delivery_id: of_trigger.DeliveryId = None,
    secret: of_trigger.Secret = None,
    workspace_id: of_trigger.WorkspaceId = None,
    count: of_trigger.Count = 1,
    rate: of_trigger.Rate = None,
    record: of_trigger.Record = None,
    source: of_trigger.Source = None,
    ca: Ca = None,
    json: Json = False,
) -> None:
    """Send valid or invalid callbacks and check the responses."""
    from receiver.cli.trigger.command import Options, run

    options = Options(
        url=url, case=case, run_id=run_id, delivery_id=delivery_id, secret=secret,
        workspace_id=workspace_id, count=count, rate=rate, record=record, source=source, ca=ca,
        json=json,
    )  # fmt: skip
    run(options)


@app.command()
def backup(
    file: Annotated[Path, typer.Argument(help="The file to create.")],
    config: Config = None,
    json: Json = False,
) -> None:
    """Copy a SQLite ledger, even while the service runs."""
    from receiver.cli.backup import make_backup

    make_backup(config, file, json=json)


@app.command()
def restore(
    file: Annotated[
        Path, typer.Argument(exists=True, dir_okay=False, help="A file that `backup` has written.")
    ],
    config: Config = None,
    json: Json = False,
) -> None:
    """Restore a backup while the service is stopped."""
    from receiver.cli.backup import restore_backup

    restore_backup(config, file, json=json)


@app.command()
def move(
    to: Annotated[
        str, typer.Option(help="An empty database, postgresql://…; the password can be in ~/.pgpass.")
    ],
    config: Config = None,
    json: Json = False,
) -> None:
    """Copy a SQLite ledger to PostgreSQL and compare the two."""
    from receiver.cli.move import run

    run(config, to, json=json)


@app.command("dev-cert")
def dev_cert(
    host: Annotated[
        list[str] | None, typer.Option(help="Host name or address; default: this machine's own.")
    ] = None,
    directory: Annotated[
        Path, typer.Option("--dir", file_okay=False, help="Directory for the files.")
    ] = Path("var/tls"),
    days: Annotated[int, typer.Option(min=1, max=825, help="Days until the certificate expires.")] = 90,
    force: Annotated[bool, typer.Option("--force", help="Create a new CA too.")] = False,
    json: Json = False,
) -> None:
    """Create a local CA and a certificate; installs nothing."""
    from receiver.cli.dev_cert import run

    run(host or (), directory, days=days, force=force, json=json)


@app.command()
def init(
    directory: Annotated[
        Path, typer.Option("--dir", file_okay=False, help="Directory for the files.")
    ] = Path(),
    public_url: Annotated[
        str | None, typer.Option(help="Public URL of this service, which FLORA calls.")
    ] = None,
    database: Annotated[str | None, typer.Option(help="sqlite:///… or postgresql://….")] = None,
    storage: Annotated[
        str, typer.Option(help="Where outputs are stored: a directory, or s3://….")
    ] = "outputs",
    force: Annotated[bool, typer.Option("--force", help="Overwrite existing files.")] = False,
    json: Json = False,
) -> None:
    """Write a receiver.toml, and a .env for the secrets."""
    from receiver.cli.init import run

    run(directory, public_url=public_url, database=database, storage=storage, force=force, json=json)


@app.command()
def doctor(config: Config = None, ca: Ca = None, json: Json = False) -> None:
    """Find what is wrong, from the settings to the public URL."""
    from receiver.cli.doctor.command import run

    run(config, ca=ca, json=json)


app.command("channel")(channel)


def main() -> None:
    """Entry point of the console script."""
    with guard_streams():
        app()
