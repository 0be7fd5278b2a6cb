"""The command tree: names, options and help. The work is in the modules that the commands import."""

from pathlib import Path
from typing import Annotated, Literal, Optional

import typer

from receiver import __version__
from receiver.cli.service_commands import channel, deliveries, dispatches, runs, techniques_runs

app = typer.Typer(
    name="flora-receiver",
    help="Turns FLORA's run callbacks into safely stored outputs.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,  # what we did not foresee is a bug: a plain traceback, fit for a report
    rich_markup_mode=None,
)
handlers = typer.Typer(help="The handlers that bring settled runs somewhere.", no_args_is_help=True)
app.add_typer(handlers, name="handlers")
app.add_typer(runs, name="runs")
app.add_typer(techniques_runs, name="techniques:runs")
app.add_typer(deliveries, name="deliveries")
app.add_typer(dispatches, name="dispatches")
app.command("channel")(channel)

Config = Annotated[
    Optional[Path],  # noqa: UP045 -- typer reads it at run time
    typer.Option("--config", "-c", help="Settings file; default: RECEIVER_CONFIG, else receiver.toml if there is one."),
]
Pem = Annotated[
    Optional[Path],  # noqa: UP045
    typer.Option("--ca", exists=True, dir_okay=False, help="A further CA to trust (PEM)."),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


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
    host: Annotated[Optional[str], typer.Option(help="Public address to bind; default: [public] host.")] = None,  # noqa: UP045
    port: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(min=0, max=65535, help="Public port to bind, 0 for a free one; default: [public] port."),
    ] = None,
    ops_host: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="Operations address to bind; default: [operations] host."),
    ] = None,
    ops_port: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(min=0, max=65535, help="Operations port to bind; default: [operations] port."),
    ] = None,
    only: Annotated[
        Optional[Literal["door", "workers"]],  # noqa: UP045
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
    from receiver.cli.demo import run

    run(keep=keep, outputs=outputs, json=json)


@app.command()
def dev(
    config: Config = None,
    tunnel: Annotated[
        Optional[Literal["cloudflared", "ngrok", "ssh", "command"]],  # noqa: UP045
        typer.Option(help="The way to a public URL; default: the first that is there."),
    ] = None,
    no_tunnel: Annotated[
        bool, typer.Option("--no-tunnel", help="Poll, and play each settled run as a callback.")
    ] = False,
    public_url: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="A URL that leads here already; with --ssh or --command: the URL of that tunnel."),
    ] = None,
    emulator: Annotated[
        bool, typer.Option("--emulator", help="With an emulated FLORA instead of the real one.")
    ] = False,
    ssh: Annotated[Optional[str], typer.Option(help="user@host[:port] that can be reached from outside.")] = None,  # noqa: UP045
    remote_port: Annotated[int, typer.Option(min=1, max=65535, help="The port that the ssh host listens on.")] = 8443,
    known_hosts: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(exists=True, dir_okay=False, help="Keys of ssh hosts; default: ~/.ssh/known_hosts."),
    ] = None,
    identity: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(exists=True, dir_okay=False, help="Private key for ssh; default: ssh's own."),
    ] = None,
    command: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="Any tunnel program, run without a shell: {port}, {host} and {url} are filled in."),
    ] = None,
    pattern: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="Regular expression for the URL that --command prints; default: the first https URL."),
    ] = None,
    domain: Annotated[Optional[str], typer.Option(help="A reserved ngrok domain.")] = None,  # noqa: UP045
    host: Annotated[str, typer.Option(help="Address to bind: loopback, or 0.0.0.0.")] = "127.0.0.1",
    port: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(min=0, max=65535, help="Port to bind, 0 for a free one; default: [public] port."),
    ] = None,
    ops_port: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(min=0, max=65535, help="Operations port to bind; default: [operations] port."),
    ] = None,
    ca: Pem = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object per line.")] = False,
) -> None:
    """Work on an integration: a public URL, and a live view."""
    from receiver.cli.dev.command import DevOptions, run
    from receiver.cli.dev.tunnel.choice import TunnelOptions

    wanted = TunnelOptions(
        tunnel=tunnel, public_url=public_url, ssh=ssh, remote_port=remote_port, known_hosts=known_hosts,
        identity=identity, command=command, pattern=pattern, domain=domain,
    )  # fmt: skip
    asked = DevOptions(wanted, no_tunnel=no_tunnel, emulator=emulator, ca=ca, json=json)
    run(config, asked, host=host, port=port, ops_port=ops_port)


@app.command()
def emulator(
    host: Annotated[str, typer.Option(help="Address to bind.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to bind, 0 for a free one.")] = 9100,
    api_key: Annotated[Optional[str], typer.Option(envvar="FLORA_API_KEY", help="Key that callers must send.")] = None,  # noqa: UP045
    webhook_secret: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(envvar="FLORA_WEBHOOK_SECRET", help="Secret that signs callbacks; several with commas."),
    ] = None,
    workspace_id: Annotated[str, typer.Option(help="Workspace of the runs.")] = "ws_emulator",
    run_seconds: Annotated[float, typer.Option(min=0, help="How long a run takes.")] = 5.0,
    time_scale: Annotated[float, typer.Option(min=0.001, help="Divides the pauses between callback attempts.")] = 1.0,
    allow_private_callbacks: Annotated[bool, typer.Option(help="Allow callback URLs on loopback.")] = False,
    callback_ca: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(exists=True, dir_okay=False, help="The only CA trusted for callbacks (PEM)."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Makes ids, media and faults repeatable.")] = 0,
) -> None:
    """Run an emulated FLORA to test against."""
    from receiver.cli.emulator import run

    given = {"api_key": api_key, "webhook_secrets": tuple(webhook_secret.split(",")) if webhook_secret else None}
    run(
        {key: value for key, value in given.items() if value},
        host=host,
        port=port,
        workspace_id=workspace_id,
        run_seconds=run_seconds,
        time_scale=time_scale,
        allow_private_callbacks=allow_private_callbacks,
        callback_ca=callback_ca,
        seed=seed,
    )


@app.command()
def trigger(
    url: Annotated[str, typer.Argument(help="Where to send it, e.g. https://127.0.0.1:8080/callbacks/flora.")],
    case: Annotated[
        str, typer.Option(help="completed, failed, duplicate, …, or the refusal to provoke.")
    ] = "completed",
    run_id: Annotated[Optional[str], typer.Option(help="The run it is about; default: a made-up one.")] = None,  # noqa: UP045
    delivery_id: Annotated[str | None, typer.Option(help="The delivery's id; the same again is a duplicate.")] = None,
    secret: Annotated[Optional[str], typer.Option(help="Signing secret; default: FLORA_WEBHOOK_SECRET.")] = None,  # noqa: UP045
    workspace_id: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="The run's workspace; default: the one that the configured secret belongs to."),
    ] = None,
    count: Annotated[int, typer.Option(min=1, max=1_000_000, help="How many times.")] = 1,
    rate: Annotated[
        Optional[float],  # noqa: UP045
        typer.Option(min=0.01, max=100_000, help="How many a second; default: as many as fit."),
    ] = None,
    record: Annotated[Optional[Path], typer.Option(dir_okay=False, help="Keep what is sent, byte for byte.")] = None,  # noqa: UP045
    source: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option("--from", exists=True, dir_okay=False, help="Send what --record has kept."),
    ] = None,
    ca: Pem = None,
    json: Json = False,
) -> None:
    """Send callbacks, good and spoiled ones, and judge answers."""
    from receiver.cli.trigger.command import run

    run(
        url, case, run_id=run_id, delivery_id=delivery_id, secret=secret, workspace_id=workspace_id, ca=ca, json=json,
        count=count, rate=rate, record=record, source=source,
    )  # fmt: skip


@app.command()
def backup(
    file: Annotated[Path, typer.Argument(help="A file that does not exist yet.")],
    config: Config = None,
    json: Json = False,
) -> None:
    """Copy a SQLite ledger, also while the service runs."""
    from receiver.cli.backup import backup as command

    command(config, file, json=json)


@app.command()
def restore(
    file: Annotated[Path, typer.Argument(exists=True, dir_okay=False, help="What `backup` has written.")],
    config: Config = None,
    json: Json = False,
) -> None:
    """Put a copy in its place, with the service stopped."""
    from receiver.cli.backup import restore as command

    command(config, file, json=json)


@app.command()
def move(
    to: Annotated[str, typer.Option(help="An empty database, postgresql://…; a password from ~/.pgpass.")],
    config: Config = None,
    json: Json = False,
) -> None:
    """Copy a SQLite ledger to PostgreSQL, and compare."""
    from receiver.cli.backup import move as command

    command(config, to, json=json)


@app.command("dev-cert")
def dev_cert(
    host: Annotated[Optional[list[str]], typer.Option(help="A name or address; default: this machine's own.")] = None,  # noqa: UP045
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
    public_url: Annotated[Optional[str], typer.Option(help="What FLORA is told to call.")] = None,  # noqa: UP045
    database: Annotated[Optional[str], typer.Option(help="sqlite:///… or postgresql://….")] = None,  # noqa: UP045
    storage: Annotated[str, typer.Option(help="Where outputs go: a directory, or s3://….")] = "outputs",
    force: Annotated[bool, typer.Option("--force", help="Overwrite what is there.")] = False,
    json: Json = False,
) -> None:
    """Write a receiver.toml, and a .env for the secrets."""
    from receiver.cli.init import run

    run(directory, public_url=public_url, database=database, storage=storage, force=force, json=json)


@app.command()
def doctor(config: Config = None, ca: Pem = None, json: Json = False) -> None:
    """Find what is wrong, from settings to the way in."""
    from receiver.cli.doctor.command import run

    run(config, ca=ca, json=json)


@handlers.command("list")
def handlers_list(config: Config = None, json: Json = False) -> None:
    """Show the installed handlers, and the ones that the settings use."""
    from receiver.cli.handlers import run

    run(config, json=json)


@handlers.command("show")
def handlers_show(
    use: Annotated[str, typer.Argument(help="Its `use`: storage, forward, package.module:Class.")], json: Json = False
) -> None:
    """Show a handler's options."""
    from receiver.cli.handlers import options

    options(use, json=json)


@handlers.command("schema")
def handlers_schema(
    name: Annotated[str, typer.Argument(help="The handler's name, or its `use`: database.")],
    config: Config = None,
    json: Json = False,
) -> None:
    """Print the SQL of a handler's tables."""
    from receiver.cli.handlers import schema

    schema(config, name, json=json)


@runs.command("batch")
def runs_batch(
    file: Annotated[Path, typer.Argument(help="CSV or JSON Lines, UTF-8; - for standard input.")],
    technique_id: Annotated[str, typer.Option(help="The technique, tech_… or its slug.")],
    key: Annotated[str, typer.Option(help="What tells rows apart, such as '{market_code}'.")],
    map: Annotated[  # noqa: A002 -- the option's name
        list[str], typer.Option(help="An input of the technique from the row's columns: 'headline={headline}'.")
    ],
    name: Annotated[Optional[str], typer.Option(help="The row's name for files; default: its key.")] = None,  # noqa: UP045
    batch: Annotated[Optional[str], typer.Option(help="The batch's name; default: the file's, without .csv.")] = None,  # noqa: UP045
    parallel: Annotated[int, typer.Option(min=1, max=256, help="Rows in hand at the same time, at most.")] = 8,
    results: Annotated[Path, typer.Option(help="Where the results go.")] = Path("results.csv"),
    patience: Annotated[
        float, typer.Option(min=0, max=86400, help="Seconds to go on while the service does not answer.")
    ] = 120,
    cost_wait: Annotated[
        float, typer.Option(min=0, max=3600, help="Seconds to wait for final costs, at the end.")
    ] = 90,
    workspace_id: Annotated[Optional[str], typer.Option(help="Whose API key starts the runs.")] = None,  # noqa: UP045
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask before spending.")] = False,
    json: Json = False,
) -> None:
    """Start one run for each row of a table and see all through."""
    from receiver.cli.batch.command import run

    run(
        file=file, technique_id=technique_id, maps=map, key=key, name=name, batch=batch, parallel=parallel,
        patience=patience, cost_wait=cost_wait, results=results, workspace_id=workspace_id, yes=yes, json=json,
    )  # fmt: skip


def main() -> None:
    """Entry point of the console script."""
    app()
