"""The command `ringmesh`: parses the arguments, and creates and runs the parts of each subcommand."""

from __future__ import annotations

import asyncio
import os
import shutil
import sys
import tempfile
from collections.abc import Awaitable, Callable
from enum import StrEnum
from functools import partial
from importlib.metadata import version as installed_version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer
from rich.console import Console
from typer.core import TyperGroup

from services.cli.commands.cost_groups import By
from services.cli.errors import CommandError
from services.runtime.machine import startup

if TYPE_CHECKING:
    from services.cli.stack.stack import StackOptions
    from services.runtime.rpc.tls import TlsFiles

# Slow imports are inside the commands, so that `--help` does not wait for them.

Value = TypeVar("Value")


class Commands(TyperGroup):
    """Subcommands. An error that the user can fix is printed in one line; the exit code is then 2."""

    def invoke(self, ctx: Any) -> Any:
        startup.begin()
        try:
            return super().invoke(ctx)
        except CommandError as error:
            reason = str(error)
        except ImportError as error:
            reason = f"the installation is broken ({error}); install Ringmesh again, or run `make clean up`"
        print(f"ringmesh: {reason}", file=sys.stderr)
        raise typer.Exit(2)


app = typer.Typer(name="ringmesh", cls=Commands, no_args_is_help=True, pretty_exceptions_show_locals=False)
cache_app = typer.Typer(no_args_is_help=False)
app.add_typer(cache_app, name="cache")
key_app = typer.Typer(no_args_is_help=True, help="API keys of callers.")
app.add_typer(key_app, name="key")
prices_app = typer.Typer(no_args_is_help=False)
app.add_typer(prices_app, name="prices")
budgets_app = typer.Typer(no_args_is_help=False)
app.add_typer(budgets_app, name="budgets")


def _inherited(context: typer.Context, parameter: typer.CallbackParam, value: Value) -> Value:
    """Returns the value of an option, which may also be given before a subcommand."""
    name = str(parameter.name)
    given = context.obj = dict(context.obj or {})
    source = context.get_parameter_source(name)
    if source is not None and source.name != "DEFAULT":
        given[name] = value
    inherited: Value = given.get(name, value)
    return inherited


def _seconds(value: object) -> float:
    from services.runtime.process import units

    try:
        return units.parse_seconds(str(value))
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


def _print_version(wanted: bool) -> None:
    if wanted:
        from services.runtime.machine import compiled

        print(
            f"ringmesh {installed_version('ringmesh-server')} ({'compiled' if compiled.is_used() else 'not compiled'})"
        )
        raise typer.Exit


StateOption = Annotated[
    Path, typer.Option("--state", callback=_inherited, help="Folder for models, traces and logs of a stack.")
]
RouterOption = Annotated[str | None, typer.Option(help="host:port of the router; default: of the stack in --state.")]
CacheOption = Annotated[
    str | None,
    typer.Option(
        "--cache", callback=_inherited, help="host:port of a cache service or router; default: of the stack in --state."
    ),
]
STATE = Path(".ringmesh")


TlsCertificate = Annotated[
    Path | None, typer.Option(envvar="RINGMESH_TLS_CERTIFICATE", help="PEM file with the server's certificate chain.")
]
TlsKey = Annotated[Path | None, typer.Option(envvar="RINGMESH_TLS_KEY", help="PEM file with its key.")]
TlsClientCa = Annotated[
    Path | None,
    typer.Option(
        envvar="RINGMESH_TLS_CLIENT_CA", help="PEM file with the CAs of callers, who need a certificate then."
    ),
]


ModelsOption = Annotated[
    str | None,
    typer.Option(
        envvar="RINGMESH_MODELS",
        help="Model repository in Triton's layout: a folder, or a URL of s3, gs or https. Default: demo models.",
    ),
]
Host = Annotated[
    str, typer.Option(help="Address on which the router, the console and /metrics listen; 0.0.0.0: all of them.")
]
BasePort = Annotated[
    int,
    typer.Option(
        "--base-port",
        "--port",
        min=0,
        max=65535,
        help="Port of the router, and the first of a block of 100 ports; 0: free ports.",
    ),
]
RedisOption = Annotated[
    str | None,
    typer.Option(
        envvar="RINGMESH_REDIS_URL",
        help="URL of a Redis server; set one with a password in the variable. Default: starts a Valkey server.",
    ),
]
Drain = Annotated[
    float,
    typer.Option(
        parser=_seconds,
        metavar="DURATION",
        envvar="RINGMESH_DRAIN_SECONDS",
        help="Time to finish requests after Ctrl-C, such as 15 or 1m.",
    ),
]


@app.callback()
def ringmesh(
    state: StateOption = STATE,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Serves ONNX models and caches their answers."""


@app.command()
def up(
    workers: Annotated[int, typer.Option(min=1, max=256, help="Number of inference workers.")] = 2,
    routers: Annotated[int, typer.Option(min=1, max=8, help="Number of router processes, which share one port.")] = 1,
    models: ModelsOption = None,
    host: Host = "127.0.0.1",
    base_port: BasePort = 8001,
    redis: RedisOption = None,
    otlp: Annotated[
        str | None, typer.Option(envvar="RINGMESH_OTLP_ENDPOINT", help="URL of an OTLP/gRPC collector for traces.")
    ] = None,
    drain: Drain = 15.0,
    tls: Annotated[
        bool,
        typer.Option("--tls", help="Callers and browsers need TLS; without --tls-certificate, one of a CA in --state."),
    ] = False,
    tls_certificate: TlsCertificate = None,
    tls_key: TlsKey = None,
    tls_client_ca: TlsClientCa = None,
    state: StateOption = STATE,
) -> None:
    """Starts a complete Ringmesh on this host, and stops it on Ctrl-C."""
    from services.runtime.process.process import keep_files_private, set_title

    # First, because other users see the arguments in `ps` until then.
    set_title("up", f"{host}:{base_port}")
    keep_files_private()
    from services.cli.commands import demo_models
    from services.cli.commands import up as commands
    from services.cli.commands.screen import Screen
    from services.cli.stack.claim import claim
    from services.cli.stack.endpoints import Endpoints
    from services.cli.stack.key_secret import key_secret
    from services.cli.stack.stack import StackOptions

    screen = Screen(_console(), state)
    endpoints = Endpoints.create(host, base_port, workers, routers)
    files = _tls_files(tls_certificate, tls_key, tls_client_ca)
    options = StackOptions(
        endpoints,
        state=state,
        models=models if models and "://" in models else str(Path(models or state / "models").absolute()),
        traces=state / "traces",
        key_secret=key_secret(state),
        redis=redis,
        otlp=otlp,
        drain_seconds=drain,
        tls=commands.tls_files(files, tls_client_ca, state, host, screen.say) if tls else None,
    )
    # They are the edge's and the console's; a router on the native engine has no TLS.
    for name in ("CERTIFICATE", "KEY", "CLIENT_CA"):
        os.environ.pop(f"RINGMESH_TLS_{name}", None)
    for message in commands.warnings(f"{host}:{base_port}"):
        screen.say(f"warning: {message}")
    with claim(state):
        if models is None:
            demo_models.fill(Path(options.models), screen.say)
        code = _run("up", options, screen.say, partial(commands.serve, screen, options), interrupted=0)
    screen.say("stopped" if code == 0 else "killed")
    raise typer.Exit(code)


@app.command()
def edge(
    address: Annotated[str, typer.Option(help="host:port for callers.")],
    router: Annotated[list[Path], typer.Option(help="Unix socket of a router; may be repeated.")],
    tls_certificate: TlsCertificate = None,
    tls_key: TlsKey = None,
    tls_client_ca: TlsClientCa = None,
    folder: Annotated[Path, typer.Option(help="Folder for Envoy's configuration.")] = STATE / "edge",
) -> None:
    """Runs an Envoy that ends TLS in front of routers, whose RINGMESH_ADDRESS is unix:/path."""
    from services.cli.stack.edge import Edge
    from services.runtime.process.process import keep_files_private

    keep_files_private()
    files = _tls_files(tls_certificate, tls_key, tls_client_ca)
    if files is None:
        raise CommandError("name the certificate and its key by --tls-certificate and --tls-key")
    command = Edge(address, router, files).command(folder)
    os.execv(command[0], command)  # noqa: S606 - no shell


def _tls_files(certificate: Path | None, key: Path | None, client_ca: Path | None) -> TlsFiles | None:
    from services.runtime.rpc.tls import TlsFiles

    if (certificate is None) != (key is None):
        raise CommandError("a certificate needs its key: --tls-certificate and --tls-key")
    return TlsFiles(certificate, key, client_ca) if certificate is not None and key is not None else None


@app.command()
def demo(state: StateOption = STATE) -> None:
    """Classifies the files of this folder twice on a stack of its own, and shows the effect of the cache."""
    from services.cli.commands import demo as show
    from services.cli.commands import demo_models
    from services.cli.commands.magika_features import MagikaFeatures, require_model_folder
    from services.cli.stack.endpoints import LOOPBACK, Endpoints
    from services.cli.stack.key_secret import key_secret
    from services.cli.stack.stack import StackOptions
    from services.runtime.process.process import keep_files_private

    keep_files_private()
    console = _console()
    magika = MagikaFeatures.load(require_model_folder())
    files = show.collect(Path.cwd(), magika)
    demo_models.fill(state / "models", print)
    scratch = Path(tempfile.mkdtemp(prefix="ringmesh-demo-"))
    options = StackOptions(
        Endpoints.create(LOOPBACK, 0, workers=2),
        state=scratch,
        models=str((state / "models").absolute()),
        traces=state / "traces",
        key_secret=key_secret(scratch),
        drain_seconds=5.0,
    )
    work = partial(show.run, console, options, files, magika, state)
    code = _run("demo", options, print, work, interrupted=130)
    shutil.rmtree(scratch)  # kept after an error, because the message refers to a log in it
    raise typer.Exit(code)


@app.command()
def check(
    repository: Annotated[str, typer.Argument(help="Model repository: a folder, or an s3://, gs:// or https:// URL.")],
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Loads each model of a repository and reports how it would be served.

    The exit code is 1 if a model fails to load, and 2 if the repository cannot be read.
    """
    from services.cli.commands import check as tool

    report = tool.check(repository)
    tool.show(_console(), report, as_json=json)
    raise typer.Exit(1 if report.failed else 0)


@app.command()
def sign(
    repository: Annotated[str, typer.Argument(help="Model repository: a folder.")],
    key: Annotated[str, typer.Option(help="File with an Ed25519 private key in PEM.")],
) -> None:
    """Signs the models of a repository for workers with RINGMESH_MODEL_KEYS."""
    import subprocess

    command = [sys.executable, "-P", "-m", "services.inference.sign", repository, key]
    raise typer.Exit(subprocess.run(command, check=False).returncode)  # noqa: S603, our own module


@app.command()
def trace(
    trace_id: Annotated[str | None, typer.Argument(metavar="ID", help="A trace id, or its first characters.")] = None,
    state: StateOption = STATE,
) -> None:
    """Shows a request's path as a tree of spans. Without ID, lists the latest traces."""
    from services.cli.commands import traces

    folder = state / "traces"
    console = _console()
    if trace_id is not None:
        console.print(traces.tree(traces.find(folder, trace_id)))
    elif found := traces.latest(folder):
        console.print(traces.listing(found))
    else:
        console.print(f"no traces in {folder} yet", soft_wrap=True)


@app.command()
def top(
    once: Annotated[bool, typer.Option("--once", help="Print one frame and exit.")] = False,
    console_url: Annotated[
        str | None, typer.Option("--console", help="URL of the console; default: of the stack in --state.")
    ] = None,
    state: StateOption = STATE,
) -> None:
    """Shows the state of the fleet until Ctrl-C: what needs attention, workers, models, processes."""
    from services.cli.commands import top as show
    from services.cli.stack import local_ca

    url = _address("console", console_url, state)
    show.trust(state / "tls" / local_ca.CA)
    if once or not sys.stdout.isatty():
        show.once(_console(), url)
    else:
        show.watch(_console(), url)


@app.command()
def explain(
    model: Annotated[str | None, typer.Argument(help="A model; the request gets random values.")] = None,
    request: Annotated[
        str | None, typer.Option(help="File with a ModelInferRequest as JSON, as grpcurl accepts it; - is stdin.")
    ] = None,
    tenant: Annotated[str, typer.Option(help="Tenant that would send the request.")] = "",
    router: RouterOption = None,
    state: StateOption = STATE,
) -> None:
    """Shows which worker a request would go to, and why: its key, its owner and the other candidates in order."""
    from services.cli.commands import explain as show

    if (model is None) == (request is None):
        raise CommandError("name a model, or a file with --request")
    address = _address("router", router, state)
    sent = show.read_request(request) if request is not None else show.random_request(address, model or "")
    show.show(_console(), show.explain(address, sent, tenant))


@app.command()
def models(router: RouterOption = None, state: StateOption = STATE) -> None:
    """Lists the models of the fleet with their state and counts."""
    from services.cli.commands import model_list

    _console().print(model_list.listing(_address("router", router, state)))


@app.command("semantic-precision")
def semantic_precision(
    model: Annotated[str, typer.Argument(help="A model with one input, a vector.")],
    vectors: Annotated[Path, typer.Argument(help="A .npy file of your own vectors, one per row.")],
    thresholds: Annotated[
        list[float] | None, typer.Option("--threshold", min=0, max=1, help="May be repeated.")
    ] = None,
    router: RouterOption = None,
    state: StateOption = STATE,
) -> None:
    """Measures how often the answer to a similar vector would have been right, by threshold of similarity."""
    from services.cli.commands import semantic_precision as tool

    chosen = thresholds or [0.9, 0.95, 0.98, 0.99, 0.995, 0.999]
    _console().print(tool.measure(_address("router", router, state), model, vectors, chosen))


@cache_app.callback(invoke_without_command=True)
def cache(context: typer.Context, address: CacheOption = None, state: StateOption = STATE) -> None:
    """Shows contents and savings of the caches of router and cache service. `purge` removes entries."""
    if context.invoked_subcommand is not None:
        return
    from services.cli.commands import cache_service

    names = ("router", "cache") if address is None else ("cache",)
    processes = {name: _address(name, address, state) for name in names}
    _console().print(cache_service.listing(processes))


@cache_app.command()
def purge(
    everything: Annotated[bool, typer.Option("--everything", help="Purge all entries.")] = False,
    model: Annotated[str, typer.Option(help="Purge all versions of a model.")] = "",
    tenant: Annotated[str, typer.Option(help="Purge the entries of a tenant.")] = "",
    key: Annotated[str, typer.Option(help="Purge one answer, by the key that `ringmesh explain` shows.")] = "",
    even_if_unknown: Annotated[
        bool, typer.Option("--even-if-unknown", help="Accept a --model that is no longer loaded.")
    ] = False,
    address: CacheOption = None,
    state: StateOption = STATE,
) -> None:
    """Removes entries from all caches. Returns when no router or cache answers from them any more."""
    from services.cli.commands import cache_service

    done = cache_service.purge(
        _address("router", address, state),  # which knows the models
        even_if_unknown=even_if_unknown,
        everything=everything,
        model=model,
        tenant=tenant,
        key=key,
    )
    _console().print(f"purged; {done.confirmed} processes confirmed it")
    if done.warning:
        _console().print(done.warning)


LedgerOption = Annotated[
    str | None, typer.Option("--ledger", help="host:port of the ledger; without it, of the stack in --state.")
]
Since = Annotated[
    str | None, typer.Option(help="An age, such as 90m, 24h or 7d, or a time, such as 2026-11-29; 1h without it.")
]
Until = Annotated[str | None, typer.Option(help="Likewise; until now without it.")]


@app.command()
def cost(
    by: Annotated[list[By] | None, typer.Option(help="What to group by; may be repeated.")] = None,
    since: Since = None,
    until: Until = None,
    tenant: Annotated[str | None, typer.Option(help="Only of this tenant.")] = None,
    model: Annotated[str | None, typer.Option(help="Only of this model.")] = None,
    version: Annotated[str | None, typer.Option(help="Only of this version.")] = None,
    region: Annotated[str | None, typer.Option(help="Only of this region.")] = None,
    trace_id: Annotated[str, typer.Option("--trace", help="One request, by its trace id or how that begins.")] = "",
    limit: Annotated[int, typer.Option(min=1, max=10_000, help="Rows.")] = 50,
    changes: Annotated[bool, typer.Option("--changes", help="Against the same time before; largest first.")] = False,
    bill: Annotated[bool, typer.Option("--bill", help="What workers cost: used by requests, and idle.")] = False,
    forecast: Annotated[bool, typer.Option("--forecast", help="What this month will cost.")] = False,
    export: Annotated[Path | None, typer.Option(help="Write single records to this file, .csv or .parquet.")] = None,
    unpriced: Annotated[bool, typer.Option("--allow-unpriced", help="Leave out what has no price.")] = False,
    is_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
    ledger: LedgerOption = None,
    state: StateOption = STATE,
) -> None:
    """Shows what requests used, what that cost, and what the cache saved."""
    from services.cli.commands import cost as show

    if bill + forecast + (export is not None) > 1:
        raise CommandError("choose one of --bill, --forecast and --export")
    filters = {"tenant": tenant, "model": model, "version": version, "region": region}
    narrowed = [f"--{name}" for name, value in filters.items() if value is not None]
    narrowed += [f"--{name}" for name, given in (("by", by), ("trace", trace_id), ("changes", changes)) if given]
    if narrowed and (bill or forecast or export is not None):
        raise CommandError(f"{narrowed[0]} is of reports: --bill, --forecast and --export are of everything")
    address = _address("ledger", ledger, state)
    console = _console()
    if export is not None:
        written = show.export(address, "1h" if since is None else since, until, export)
        console.print(f"{export}: {written:,} bytes")
    elif forecast:
        expected = show.forecast(address)
        print(show.as_json(expected)) if is_json else show.show_forecast(console, expected)
    elif bill:
        paid = show.bill(address, since, until, allow_unpriced=unpriced)
        print(show.as_json(paid)) if is_json else show.show_bill(console, paid)
    else:
        groups = by or ([] if trace_id else [By.TENANT])
        answer = show.report(
            address, groups, since, until, filters, trace_id, limit=limit, changes=changes, allow_unpriced=unpriced
        )
        if is_json:
            print(show.as_json(answer, groups))
        else:
            show.show_report(console, answer, groups, changes=changes)


@app.command()
def advice(
    since: Annotated[str, typer.Option(help="An age or a time; at most 48 hours ago.")] = "24h",
    until: Until = None,
    latency: Annotated[
        float,
        typer.Option(
            min=0.001,
            max=86_400_000,
            help="Milliseconds that 99 in 100 computed requests may wait and run.",
        ),
    ] = 100,
    worker_type: Annotated[str, typer.Option(help="Only what such workers compute; without it, all.")] = "",
    memory_price: Annotated[float, typer.Option(min=0, max=1_000_000_000, help="Of an hour of 1 GB of cache.")] = 0.005,
    is_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
    ledger: LedgerOption = None,
    state: StateOption = STATE,
) -> None:
    """Says what would have cost less: workers by type and hour, sizes of the cache, sharing, batches and caching."""
    from services.cli.commands import advice as tool
    from services.cli.commands import cost

    answer = tool.ask(_address("ledger", ledger, state), since, until, latency, worker_type, memory_price=memory_price)
    if is_json:
        print(cost.as_json(answer))
    else:
        tool.show(_console(), answer)


@prices_app.callback(invoke_without_command=True)
def prices(context: typer.Context, ledger: LedgerOption = None, state: StateOption = STATE) -> None:
    """Lists what an hour of each type of worker costs; `set` and `delete` change it, for the past too."""
    if context.invoked_subcommand is not None:
        return
    from services.cli.commands import prices as tool

    _console().print(tool.listing(_address("ledger", ledger, state)))


@prices_app.command("set")
def set_price(
    worker_type: Annotated[str, typer.Argument(help="cpu, gpu, router, or as workers call it.")],
    hourly: Annotated[str, typer.Argument(help="Of an hour of one worker, such as 0.38.")],
    currency: Annotated[str, typer.Option(help="By ISO 4217.")] = "USD",
    since: Annotated[str | None, typer.Option(help="A whole hour of UTC; this hour without it.")] = None,
    until: Annotated[str | None, typer.Option(help="A whole hour of UTC; until further notice without it.")] = None,
    slots: Annotated[int, typer.Option(min=1, max=1024, help="Runs that one makes at once.")] = 1,
    watts: Annotated[
        float,
        typer.Option(min=0, max=1_000_000_000, help="Measured power, where energy is paid for separately."),
    ] = 0,
    kwh: Annotated[str, typer.Option(help="Price of a kilowatt hour.")] = "0",
    gpu: Annotated[bool, typer.Option("--gpu", help="It computes on a GPU.")] = False,
    supersede: Annotated[
        bool, typer.Option("--supersede", help="End the price that holds then, and replace later ones.")
    ] = False,
    ledger: LedgerOption = None,
    state: StateOption = STATE,
) -> None:
    """Sets what an hour of a type of worker costs in a period."""
    from services.cli.commands import prices as tool

    tool.set_price(
        _address("ledger", ledger, state),
        worker_type,
        hourly,
        currency,
        since,
        until,
        slots=slots,
        watts=watts,
        kwh=kwh,
        is_gpu=gpu,
        supersede=supersede,
    )


@prices_app.command("delete")
def delete_price(
    worker_type: Annotated[str, typer.Argument(help="As `ringmesh prices` lists it.")],
    since: Annotated[str, typer.Argument(help="When the price begins; 1970-01-01 is the beginning.")],
    ledger: LedgerOption = None,
    state: StateOption = STATE,
) -> None:
    """Removes a price."""
    from services.cli.commands import prices as tool

    tool.delete(_address("ledger", ledger, state), worker_type, since)


class Period(StrEnum):
    """Of a budget."""

    DAY = "day"
    MONTH = "month"


Tenant = Annotated[str, typer.Option(help="Of this tenant; all without it.")]
Model = Annotated[str, typer.Option(help="Of this model; all without it.")]
PeriodOption = Annotated[Period, typer.Option(help="When it begins anew, in UTC.")]


@budgets_app.callback(invoke_without_command=True)
def budgets(
    context: typer.Context,
    is_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
    ledger: LedgerOption = None,
    state: StateOption = STATE,
) -> None:
    """Lists how much tenants and models may cost, and how much is spent; `set` and `delete` change it."""
    if context.invoked_subcommand is not None:
        return
    from services.cli.commands import budgets as tool

    found = tool.states(_address("ledger", ledger, state))
    if is_json:
        print(tool.plain(found))
    else:
        _console().print(tool.listing(found))


@budgets_app.command("set")
def set_budget(
    tenant: Tenant = "",
    model: Model = "",
    period: PeriodOption = Period.MONTH,
    soft: Annotated[str, typer.Option(help="Reached, it is reported; 0: never.")] = "0",
    hard: Annotated[str, typer.Option(help="Reached, requests are refused; 0: never.")] = "0",
    currency: Annotated[str, typer.Option(help="By ISO 4217.")] = "USD",
    ledger: LedgerOption = None,
    state: StateOption = STATE,
) -> None:
    """Sets how much a tenant, a model, or a tenant's use of a model may cost."""
    from services.cli.commands import budgets as tool

    tool.set_budget(_address("ledger", ledger, state), tenant, model, period.value, soft, hard, currency)


@budgets_app.command("delete")
def delete_budget(
    tenant: Tenant = "",
    model: Model = "",
    period: PeriodOption = Period.MONTH,
    ledger: LedgerOption = None,
    state: StateOption = STATE,
) -> None:
    """Removes a budget."""
    from services.cli.commands import budgets as tool

    tool.delete(_address("ledger", ledger, state), tenant, model, period.value)


def _run(
    title: str, options: StackOptions, say: Callable[[str], None], work: Callable[[], Awaitable[int]], interrupted: int
) -> int:
    """Runs `work` on a stack. Returns its exit code, or `interrupted` after Ctrl-C."""
    from services.cli.commands import traces
    from services.cli.stack.stack import Stack
    from services.cli.stack.supervise import supervise
    from services.runtime.process.process import set_title

    set_title(title, options.endpoints.router)
    traces.prune(options.traces)
    return asyncio.run(supervise(Stack(options, say), work, interrupted=interrupted))


@app.command()
def audit(
    since: Since = None,
    until: Until = None,
    who: Annotated[str, typer.Option(help="Only entries whose actor contains this text, such as ops-1.")] = "",
    method: Annotated[str, typer.Option(help="Only entries whose method contains this text, such as Load.")] = "",
    limit: Annotated[int, typer.Option(min=0, help="Entries, the newest first; 0: all.")] = 100,
    is_json: Annotated[bool, typer.Option("--json", help="One JSON object a line, as in the file.")] = False,
    address: Annotated[
        str | None, typer.Option(help="host:port of a process; default: the router of the stack in --state.")
    ] = None,
    state: StateOption = STATE,
) -> None:
    """Shows who did what: administrative actions and refused calls, the newest first."""
    from services.cli.commands import audit as tool

    asked = tool.question(since, until, who, method, limit)
    found = tool.entries(_address("router", address, state), asked)
    if is_json:
        for line in tool.lines(found):
            print(line)
    else:
        _console().print(tool.listing(found), soft_wrap=True)


@key_app.command()
def new(
    id: Annotated[str, typer.Argument(help="Name of the key in the file, in traces and in the audit log.")],
    file: Annotated[Path, typer.Option(envvar="RINGMESH_API_KEYS", help="File to add the hash of the key to.")],
    role: Annotated[list[str], typer.Option(help="infer, read, operate or admin; may be repeated.")],
    tenant: Annotated[str, typer.Option(help="Tenant of the callers.")] = "",
    model: Annotated[list[str] | None, typer.Option(help="Only for this model; may be repeated.")] = None,
    days: Annotated[
        float | None, typer.Option(min=0, max=36_500, help="Days until it expires; default: never.")
    ] = None,
) -> None:
    """Prints a new API key, and adds its hash to the file. Remove its line to revoke it."""
    from services.cli.commands import keys
    from services.runtime.process.process import keep_files_private

    keep_files_private()
    print(keys.create(file, id, tenant, role, model or [], days))


def _address(name: str, given: str | None, state: Path) -> str:
    """Returns the address that is given, else that of a process of the stack in `state`. Raises CommandError."""
    from services.cli.commands import running

    return given or running.endpoint(name, state)


def _console() -> Console:
    """Returns a console. A file or a pipe gets a fixed width of 160, because it has no terminal width to wrap at."""
    return Console(highlight=False, width=None if sys.stdout.isatty() else 160)
