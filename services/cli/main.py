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
key_app = typer.Typer(no_args_is_help=True, help="API keys of callers.")
app.add_typer(key_app, name="key")


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
            return await show.run(console, options.router, samples, magika, state)

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


@key_app.command()
def new(
    id: Annotated[str, typer.Argument(help="Name of the key in the file, in traces and in the audit log.")],
    file: Annotated[Path, typer.Option(envvar="RINGMESH_API_KEYS", help="File to add the hash of the key to.")],
    role: Annotated[list[str], typer.Option(help="infer, read, operate or admin; may be repeated.")],
    tenant: Annotated[str, typer.Option(help="Tenant of the callers.")] = "",
    model: Annotated[list[str] | None, typer.Option(help="Only for this model; may be repeated.")] = None,
    days: Annotated[float | None, typer.Option(min=0, help="Days until it expires; default: never.")] = None,
) -> None:
    """Prints a new API key, and adds its hash to the file. Remove its line to revoke it."""
    with _one_line_errors():
        from services.cli.commands import keys
        from services.runtime.process.process import keep_files_private

        keep_files_private()
        print(keys.create(file, id, tenant, role, model or [], days))


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
