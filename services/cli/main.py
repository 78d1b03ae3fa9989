"""The command `ringmesh`: parses the arguments, and creates and runs the parts of each subcommand."""

from __future__ import annotations

import asyncio
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from importlib.metadata import version as installed_version
from pathlib import Path
from typing import Annotated, NoReturn

import typer
from rich.console import Console

from services.cli.errors import CommandError

# Slow imports are inside the commands, so that `--help` does not wait for them.

app = typer.Typer(
    name="ringmesh",
    no_args_is_help=True,
    pretty_exceptions_show_locals=False,
)
cache_app = typer.Typer(no_args_is_help=False)
app.add_typer(cache_app, name="cache")
prices_app = typer.Typer(no_args_is_help=False)
app.add_typer(prices_app, name="prices")
budgets_app = typer.Typer(no_args_is_help=False)
app.add_typer(budgets_app, name="budgets")


class Engine(StrEnum):
    """A copy of `services.runtime.server.Engine`, whose import is slow."""

    NATIVE = "native"
    GRPCIO = "grpcio"


State = Annotated[Path, typer.Option(help="Folder for models, traces and logs.")]
EngineOption = Annotated[Engine, typer.Option(envvar="RINGMESH_ENGINE", help="What does the HTTP/2 work.")]
Drain = Annotated[
    float, typer.Option(min=0, envvar="RINGMESH_DRAIN_SECONDS", help="Seconds for requests under way when stopped.")
]
_STATE = Path(".ringmesh")


def _print_version(wanted: bool) -> None:
    if wanted:
        from services.runtime.machine import compiled

        print(
            f"ringmesh {installed_version('ringmesh-server')} ({'compiled' if compiled.is_used() else 'not compiled'})"
        )
        raise typer.Exit


@app.callback()
def ringmesh(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and end.")
    ] = False,
) -> None:
    """Serves ONNX models, and answers from a cache what was computed before."""


@app.command()
def up(
    workers: Annotated[int, typer.Option(min=1, max=256, help="Inference workers.")] = 2,
    routers: Annotated[int, typer.Option(min=1, max=8, help="Router processes, on one port.")] = 1,
    models: Annotated[
        str | None,
        typer.Option(
            envvar="RINGMESH_MODELS",
            help="Model repository in Triton's layout, a folder or a URL of s3, gs or https; without it, demo models.",
        ),
    ] = None,
    port: Annotated[
        int,
        typer.Option(
            min=0, max=65535, help="Of the router; the rest follows it (8001, 8010, 8011, 8100). 0: free ones."
        ),
    ] = 8001,
    redis: Annotated[
        str | None,
        typer.Option(
            envvar="RINGMESH_REDIS_URL",
            help="URL of a Redis, instead of the embedded Valkey; with a password, give it in the variable.",
        ),
    ] = None,
    engine: EngineOption = Engine.NATIVE,
    otlp: Annotated[
        str | None, typer.Option(envvar="RINGMESH_OTLP_ENDPOINT", help="URL of an OTLP/gRPC collector for traces.")
    ] = None,
    drain: Drain = 15.0,
    state: State = _STATE,
) -> None:
    """Brings a whole Ringmesh up on this machine, until Ctrl-C."""
    with _one_line_errors():
        from services.runtime.process.process import keep_files_private, set_title

        # First, because other users see the arguments in `ps` until then.
        set_title("up", f"127.0.0.1:{port}")
        keep_files_private()
        from services.cli.commands import demo_models, first_calls, traces
        from services.cli.commands.screen import Screen
        from services.cli.stack.claim import claim
        from services.cli.stack.key_secret import key_secret
        from services.cli.stack.ports import Ports
        from services.cli.stack.stack import Stack, StackOptions
        from services.cli.stack.supervise import supervise

        console = _console()
        screen = Screen(console)
        options = StackOptions(
            ports=Ports.from_base(port, workers, routers) if port else Ports.free(workers, routers),
            state=state,
            models=models if models and "://" in models else str(Path(models or state / "models").absolute()),
            traces=state / "traces",
            engine=engine.value,
            redis=redis,
            key_secret=key_secret(state),
            otlp=otlp,
            drain_seconds=drain,
        )

        async def serve() -> int:
            screen.endpoints(options)
            names = _names(options.models)
            is_demo = models is None and "mlp" in names
            router = options.router
            name = names[0] if names else "<model>"
            screen.first_calls(first_calls.of_mlp(router, state) if is_demo else first_calls.of_model(router, name))
            screen.say("ready")
            try:
                await asyncio.Event().wait()
            finally:
                screen.say("draining; Ctrl-C again to kill")
            return 0

        set_title("up", options.router)
        with claim(state):
            if models is None:
                demo_models.fill(Path(options.models), screen.say)
            traces.prune(options.traces)
            code = asyncio.run(supervise(Stack(options, screen), serve, interrupted=0))
        screen.say("stopped" if code == 0 else "killed")
        sys.exit(code)


@app.command()
def demo(engine: EngineOption = Engine.NATIVE, state: State = _STATE) -> None:
    """Runs a real model over the files here, twice, on a stack of its own, and shows what the cache did."""
    with _one_line_errors():
        from services.cli.commands import demo as show
        from services.cli.commands import demo_models, traces
        from services.cli.commands.magika_features import MagikaFeatures, require_model_folder
        from services.cli.commands.screen import Screen
        from services.cli.stack.key_secret import key_secret
        from services.cli.stack.ports import Ports
        from services.cli.stack.stack import Stack, StackOptions
        from services.cli.stack.supervise import supervise
        from services.runtime.process.process import keep_files_private, set_title

        keep_files_private()
        console = _console()
        screen = Screen(console)
        magika = MagikaFeatures.load(require_model_folder())
        samples = show.collect(Path.cwd(), magika)
        demo_models.fill(state / "models", screen.say)
        traces.prune(state / "traces")
        scratch = Path(tempfile.mkdtemp(prefix="ringmesh-demo-"))
        options = StackOptions(
            ports=Ports.free(workers=2),
            state=scratch,
            models=str((state / "models").absolute()),
            traces=state / "traces",
            engine=engine.value,
            redis=None,
            key_secret=key_secret(scratch),
            otlp=None,
            drain_seconds=5.0,
        )

        async def work() -> int:
            return await show.run(console, options.router, options.ledger, samples, magika, state)

        set_title("demo", options.router)
        code = asyncio.run(supervise(Stack(options, screen), work, interrupted=130))
        shutil.rmtree(scratch)  # kept after an error, because the message refers to a log in it
        sys.exit(code)


@app.command()
def trace(
    trace_id: Annotated[str | None, typer.Argument(metavar="ID", help="A trace id, or how it begins.")] = None,
    state: State = _STATE,
) -> None:
    """Shows a request's path from span to span; without an ID, lists the latest traces."""
    with _one_line_errors():
        from services.cli.commands import traces

        folder = state / "traces"
        console = _console()
        if trace_id is not None:
            console.print(traces.tree(traces.find(folder, trace_id)))
        elif found := traces.latest(folder):
            console.print(traces.listing(found))
        else:
            console.print(f"no traces in {folder} yet", soft_wrap=True)


RouterOption = Annotated[str | None, typer.Option(help="host:port of the router; without it, of the stack in --state.")]


@app.command()
def top(
    once: Annotated[bool, typer.Option("--once", help="Print one frame and end.")] = False,
    console_url: Annotated[
        str | None, typer.Option("--console", help="URL of the console; without it, of the stack in --state.")
    ] = None,
    state: State = _STATE,
) -> None:
    """Shows how the fleet does, until Ctrl-C: what needs attention, workers, models, processes."""
    with _one_line_errors():
        from services.cli.commands import running
        from services.cli.commands import top as show

        url = console_url or running.find(state).console
        if once or not sys.stdout.isatty():
            show.once(_console(), url)
        else:
            show.watch(_console(), url)


@app.command()
def explain(
    model: Annotated[str | None, typer.Argument(help="A model, asked with random values.")] = None,
    request: Annotated[
        str | None, typer.Option(help="A file with a ModelInferRequest as JSON, as grpcurl takes it; - is the input.")
    ] = None,
    tenant: Annotated[str, typer.Option(help="Who would be asking.")] = "",
    router: RouterOption = None,
    state: State = _STATE,
) -> None:
    """Says where a request would go, and why: its key, the owner, and the others in the order they would be asked."""
    with _one_line_errors():
        from services.cli.commands import explain as show
        from services.cli.commands import running

        if (model is None) == (request is None):
            raise CommandError("name a model, or a file with --request")
        where = router or running.find(state).router
        sent = show.read_request(request) if request is not None else show.random_request(where, model or "")
        show.show(_console(), show.explain(where, sent, tenant))


@app.command()
def models(router: RouterOption = None, state: State = _STATE) -> None:
    """Lists the models of the fleet, with their state and counts."""
    with _one_line_errors():
        from services.cli.commands import model_list, running

        _console().print(model_list.listing(router or running.find(state).router))


@app.command("semantic-precision")
def semantic_precision(
    model: Annotated[str, typer.Argument(help="A model with one input, a vector.")],
    vectors: Annotated[Path, typer.Argument(help="A .npy file of the owner's own vectors, one a row.")],
    thresholds: Annotated[
        list[float] | None, typer.Option("--threshold", min=0, max=1, help="May be repeated.")
    ] = None,
    router: RouterOption = None,
    state: State = _STATE,
) -> None:
    """Measures how often the answer to a similar vector would have been right, by threshold of similarity."""
    with _one_line_errors():
        from services.cli.commands import running
        from services.cli.commands import semantic_precision as tool

        address = router or running.find(state).router
        chosen = thresholds or [0.9, 0.95, 0.98, 0.99, 0.995, 0.999]
        asyncio.run(tool.measure(address, model, vectors, chosen, _console()))


CacheOption = Annotated[
    str | None, typer.Option("--cache", help="host:port of the cache service; without it, of the stack in --state.")
]


@cache_app.callback(invoke_without_command=True)
def cache(context: typer.Context, address: CacheOption = None, state: State = _STATE) -> None:
    """Shows what the tiers of router and cache service hold and saved; `purge` makes them forget."""
    if context.invoked_subcommand is not None:
        return
    with _one_line_errors():
        from services.cli.commands import cache_service, running

        if address is not None:
            processes = {"cache": address}
        else:
            stack = running.find(state)
            processes = {"router": stack.router, "cache": stack.cache}
        _console().print(cache_service.listing(processes))


@cache_app.command()
def purge(
    everything: Annotated[bool, typer.Option("--everything", help="All there is.")] = False,
    model: Annotated[str, typer.Option(help="A model, in all its versions.")] = "",
    tenant: Annotated[str, typer.Option(help="What is kept apart for a tenant.")] = "",
    key: Annotated[str, typer.Option(help="One answer, by the key that `ringmesh explain` tells.")] = "",
    even_if_unknown: Annotated[
        bool, typer.Option("--even-if-unknown", help="Also what a --model left that was unloaded.")
    ] = False,
    address: CacheOption = None,
    state: State = _STATE,
) -> None:
    """Makes the caches forget; returns when no router or cache answers from what was kept before."""
    with _one_line_errors():
        from services.cli.commands import cache_service, running

        request = cache_service.purge_request(
            everything=everything, model=model, tenant=tenant, key=key, even_if_unknown=even_if_unknown
        )
        # Sent to a router, which knows the models.
        done = cache_service.purge(address or running.find(state).router, request)
        _console().print(f"purged; {done.confirmed} processes confirmed it", highlight=False)
        if done.warning:
            _console().print(done.warning, highlight=False)


LedgerOption = Annotated[
    str | None, typer.Option("--ledger", help="host:port of the ledger; without it, of the stack in --state.")
]
Since = Annotated[
    str | None, typer.Option(help="An age, such as 90m, 24h or 7d, or a time, such as 2026-11-29; 1h without it.")
]
Until = Annotated[str | None, typer.Option(help="Likewise; until now without it.")]


class By(StrEnum):
    """As `services.cli.commands.cost.By`, whose import takes long."""

    TENANT = "tenant"
    MODEL = "model"
    VERSION = "version"
    REGION = "region"
    DAY = "day"
    REQUEST = "request"


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
    state: State = _STATE,
) -> None:
    """Shows what requests used, what that cost, and what the cache saved."""
    with _one_line_errors():
        from services.cli.commands import cost as show
        from services.cli.commands import running

        if bill + forecast + (export is not None) > 1:
            raise CommandError("choose one of --bill, --forecast and --export")
        address = ledger or running.find(state).ledger
        console = _console()
        if export is not None:
            written = show.export(address, since or "1h", until, export)
            console.print(f"{export}: {written:,} bytes", highlight=False)
        elif forecast:
            told = show.forecast(address)
            print(show.as_json(told)) if is_json else show.show_forecast(console, told)
        elif bill:
            paid = show.bill(address, show.period(since, until, allow_unpriced=unpriced))
            print(show.as_json(paid)) if is_json else show.show_bill(console, paid)
        else:
            groups = [show.By(one.value) for one in by or ([] if trace_id else [By.TENANT])]
            filters = {"tenant": tenant, "model": model, "version": version, "region": region}
            asked = show.question(
                groups,
                since,
                until,
                filters,
                trace_id,
                limit=limit,
                changes=changes,
                allow_unpriced=unpriced,
            )
            answer = show.report(address, asked)
            if is_json:
                print(show.as_json(answer, groups))
            else:
                show.show_report(console, answer, groups, changes=changes)


@app.command()
def advice(
    worker_type: Annotated[str, typer.Option(help="Of which workers.")] = "cpu",
    since: Annotated[str, typer.Option(help="An age or a time; at most 48 hours ago.")] = "24h",
    until: Until = None,
    wait: Annotated[float, typer.Option(min=0.001, help="Milliseconds that 99 in 100 requests may wait.")] = 50,
    is_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
    ledger: LedgerOption = None,
    state: State = _STATE,
) -> None:
    """Says how many workers each hour would have needed, from its requests, and what that would have cost."""
    with _one_line_errors():
        from services.cli.commands import advice as tool
        from services.cli.commands import cost, running

        answer = tool.ask(ledger or running.find(state).ledger, worker_type, since, until, wait)
        if is_json:
            print(cost.as_json(answer))
        else:
            tool.show(_console(), answer)


@prices_app.callback(invoke_without_command=True)
def prices(context: typer.Context, ledger: LedgerOption = None, state: State = _STATE) -> None:
    """Lists what an hour of each type of worker costs; `set` and `delete` change it, for the past too."""
    if context.invoked_subcommand is not None:
        return
    with _one_line_errors():
        from services.cli.commands import prices as tool
        from services.cli.commands import running

        _console().print(tool.listing(ledger or running.find(state).ledger))


@prices_app.command("set")
def set_price(
    worker_type: Annotated[str, typer.Argument(help="cpu, gpu, router, or as workers call it.")],
    hourly: Annotated[str, typer.Argument(help="Of an hour of one worker, such as 0.38.")],
    currency: Annotated[str, typer.Option(help="By ISO 4217.")] = "USD",
    since: Annotated[str | None, typer.Option(help="A whole hour of UTC; this hour without it.")] = None,
    until: Annotated[str | None, typer.Option(help="A whole hour of UTC; until further notice without it.")] = None,
    slots: Annotated[int, typer.Option(min=1, help="Runs that one makes at once.")] = 1,
    watts: Annotated[float, typer.Option(min=0, help="Measured power, where energy is paid for separately.")] = 0,
    kwh: Annotated[str, typer.Option(help="Price of a kilowatt hour.")] = "0",
    gpu: Annotated[bool, typer.Option("--gpu", help="It computes on a GPU.")] = False,
    supersede: Annotated[
        bool, typer.Option("--supersede", help="End the price that holds then, and replace later ones.")
    ] = False,
    ledger: LedgerOption = None,
    state: State = _STATE,
) -> None:
    """Sets what an hour of a type of worker costs in a period."""
    with _one_line_errors():
        from services.cli.commands import prices as tool
        from services.cli.commands import running

        tool.set_price(
            ledger or running.find(state).ledger,
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
    state: State = _STATE,
) -> None:
    """Removes a price."""
    with _one_line_errors():
        from services.cli.commands import prices as tool
        from services.cli.commands import running

        tool.delete(ledger or running.find(state).ledger, worker_type, since)


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
    state: State = _STATE,
) -> None:
    """Lists how much tenants and models may cost, and how much is spent; `set` and `delete` change it."""
    if context.invoked_subcommand is not None:
        return
    with _one_line_errors():
        from services.cli.commands import budgets as tool
        from services.cli.commands import running

        found = tool.states(ledger or running.find(state).ledger)
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
    state: State = _STATE,
) -> None:
    """Sets how much a tenant, a model, or a tenant's use of a model may cost."""
    with _one_line_errors():
        from services.cli.commands import budgets as tool
        from services.cli.commands import running

        tool.set_budget(ledger or running.find(state).ledger, tenant, model, period.value, soft, hard, currency)


@budgets_app.command("delete")
def delete_budget(
    tenant: Tenant = "",
    model: Model = "",
    period: PeriodOption = Period.MONTH,
    ledger: LedgerOption = None,
    state: State = _STATE,
) -> None:
    """Removes a budget."""
    with _one_line_errors():
        from services.cli.commands import budgets as tool
        from services.cli.commands import running

        tool.delete(ledger or running.find(state).ledger, tenant, model, period.value)


def _console() -> Console:
    """Returns a console. A file or a pipe gets a fixed width of 160, because it has no terminal width to wrap at."""
    return Console() if sys.stdout.isatty() else Console(width=160)


@contextmanager
def _one_line_errors() -> Iterator[None]:
    try:
        yield
    except CommandError as error:
        _refuse(str(error))
    except ImportError as error:
        _refuse(f"the installation is broken ({error}); `make clean up` installs anew")


def _refuse(why: str) -> NoReturn:
    print(f"ringmesh: {why}", file=sys.stderr)
    sys.exit(2)


def _names(models: str) -> list[str]:
    """Returns the models in a folder; [] for a URL, whose contents only the workers know."""
    found = Path(models).iterdir() if "://" not in models else ()
    return sorted(path.name for path in found if not path.name.startswith("."))
