"""The command line: `resplit up`, `node`, `serve`, `status`, `drain`, `join`, `trust`, `apply`, `plan`, `simulate`,
`traces`, `keys`, `doctor`, `size`.

Parses arguments and prints. Each command imports its module when it runs, so that `resplit --help` is instant.
"""

from __future__ import annotations

import contextlib
import json
import sys
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from resplit.errors import ConfigError, ResplitError
from resplit.model import DEFAULT_MODEL
from resplit.process.logs import log_to_stderr

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable, Coroutine

    from resplit.cluster.client import ControlClient

app = typer.Typer(
    help="Adaptive split inference of large foundation models over unequal edge machines.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
ClusterFile = Annotated[Path, typer.Argument(help="The cluster file (YAML).", metavar="CLUSTER.yaml")]
Url = Annotated[str, typer.Option(help="URL of the gateway.")]
NodeName = Annotated[str, typer.Argument(help="The node's name in the cluster file.", metavar="NODE")]
State = Annotated[Path, typer.Option(help="Folder for keys, logs, shards and the model.")]
Model = Annotated[str, typer.Option(envvar="MODEL", help="A local folder, a hub name, or the default model.")]
EndWithParent = Annotated[bool, typer.Option("--end-with-parent", hidden=True, help="End once stdin closes.")]
_DEFAULT_URL = "http://127.0.0.1:8080"
_DEFAULT_STATE = Path(".resplit")


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"resplit {version('resplit')}")
        raise typer.Exit


@app.callback()
def common(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Adaptive split inference of large foundation models over unequal edge machines."""


@app.command()
def up(
    cluster: ClusterFile,
    port: Annotated[int, typer.Option(help="Port of the gateway on 127.0.0.1; 0 takes a free one.")] = 8080,
    model: Model = DEFAULT_MODEL,
    state: State = _DEFAULT_STATE,
) -> None:
    """Start a cluster on this machine and deploy a first plan. Ctrl-C stops it. A process that ends starts again."""
    import signal

    from resplit.cluster.busy_machine import OthersUse, measured_again_when_quiet
    from resplit.cluster.event_lines import news_told
    from resplit.cluster.first_plan import first_plan, measure_again
    from resplit.cluster.local import running
    from resplit.cluster.supervision import supervised

    # SIGTERM acts like Ctrl-C from the start, because its default action would leave the node processes running.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with running(cluster, state, model, port) as started, supervised(started, started.processes) as watching:
        others = OthersUse(started.pids)
        placement = first_plan(started)
        typer.echo(f"ready {started.url}  {placement}  (Ctrl-C stops it all)")
        remeasured = measured_again_when_quiet(others, lambda: measure_again(started))
        with contextlib.suppress(KeyboardInterrupt), news_told(started), remeasured:
            watching.result()
        typer.echo("stopping", err=True)


@app.command()
def node(
    cluster: ClusterFile,
    name: Annotated[str, typer.Option(help="Which node of the cluster this is.")],
    listen: Annotated[str | None, typer.Option(help="host:port; by default the node's address in the file.")] = None,
    keys: Annotated[Path | None, typer.Option(help="This node's key folder; by default STATE/keys/NAME.")] = None,
    registry: Annotated[str | None, typer.Option(help="Shard registry: a folder or a bucket's URL.")] = None,
    state: State = _DEFAULT_STATE,
    end_with_parent: EndWithParent = False,
) -> None:
    """Run one node until SIGTERM or Ctrl-C."""
    from resplit.config import load_cluster

    _follow_parent(end_with_parent)
    config = load_cluster(cluster)  # before torch is imported, so that an error shows at once
    if name not in config.node_names:
        raise ConfigError("--name", f"{name!r} is not in {cluster}; it has {', '.join(config.node_names)}")
    address = listen or config.node(name).address
    if address is None:
        raise ConfigError(f"{cluster}: nodes: {name}", "has no address; give `address: host:port` there, or --listen")
    from resplit.node.server import serve_node
    from resplit.wire.addresses import Address

    key_folder = keys or state / "keys" / name
    url, kept = registry or str(state / "registry"), state / "shards" / name
    try:
        at = Address.parse(address)
    except ConfigError as error:  # those in the file are checked already
        raise ConfigError(f"--listen {error.place}", error.rule) from None
    _run_until_stopped(lambda stop: serve_node(name, config, key_folder, url, at, stop, kept=kept))


@app.command()
def serve(
    cluster: ClusterFile,
    host: Annotated[str, typer.Option(help="Address that the gateway listens on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port that the gateway listens on.", min=0, max=65535)] = 8080,
    model: Model = DEFAULT_MODEL,
    keys: Annotated[Path | None, typer.Option(help="Its key folder; by default STATE/keys/controller.")] = None,
    registry: Annotated[str | None, typer.Option(help="Shard registry: a folder or a bucket's URL.")] = None,
    state: State = _DEFAULT_STATE,
    end_with_parent: EndWithParent = False,
) -> None:
    """Run the gateway and the controller until SIGTERM or Ctrl-C."""
    from resplit.cluster.state_folder import in_use
    from resplit.config import parse_cluster, read_cluster

    _follow_parent(end_with_parent)
    content = read_cluster(cluster)
    config = parse_cluster(content, str(cluster))
    with contextlib.nullcontext() if end_with_parent else in_use(state):  # the parent holds the lock
        from resplit.cluster.server import ServePaths, serve
        from resplit.model.source import obtain
        from resplit.security.identity import CONTROLLER
        from resplit.wire.addresses import Address

        key_folder = keys or state / "keys" / CONTROLLER
        paths = ServePaths(state, key_folder, registry or str(state / "registry"), Address(host, port))
        fetch = partial(obtain, model, state / "models", config.weights, config.split, config.engine)
        _run_until_stopped(lambda stop: serve(content, fetch, paths, stop, (state / "ready").touch))


@app.command()
def status(
    url: Url = _DEFAULT_URL,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    state: State = _DEFAULT_STATE,
) -> None:
    """Show the epoch, the nodes and the sessions of a running cluster."""
    from resplit.cluster.client import ControlClient, describe_status
    from resplit.cluster.supervision import describe_restarts, read_restarts

    with ControlClient.from_state(url, state) as client:
        found = client.status()
    restarts = read_restarts(state)
    if as_json:
        ended = {name: asdict(each) for name, each in restarts.items()}
        typer.echo(json.dumps(asdict(found) | {"restarts": ended}, indent=1))
    else:
        ended_lines = (f"  {name:10} {describe_restarts(each)}" for name, each in restarts.items())
        typer.echo("\n".join([describe_status(found), *ended_lines]))


@app.command()
def drain(node: NodeName, url: Url = _DEFAULT_URL, state: State = _DEFAULT_STATE) -> None:
    """Move everything off a node without losing a request, and stop using it until `resplit join`."""
    _operate(url, state, lambda client: client.drain(node))


@app.command()
def join(node: NodeName, url: Url = _DEFAULT_URL, state: State = _DEFAULT_STATE) -> None:
    """Use a drained node again."""
    _operate(url, state, lambda client: client.join(node))


@app.command()
def trust(
    node: NodeName,
    on: Annotated[Literal["on", "off"], typer.Argument(help="Allow private blocks or not.", metavar="on|off")],
    url: Url = _DEFAULT_URL,
    state: State = _DEFAULT_STATE,
) -> None:
    """Allow private blocks on a node, or forbid them. `off` returns once the node holds none."""
    _operate(url, state, lambda client: client.trust(node, on == "on"))


@app.command(name="apply")
def apply_file(cluster: ClusterFile, url: Url = _DEFAULT_URL, state: State = _DEFAULT_STATE) -> None:
    """Apply a changed cluster file to a running cluster."""
    from resplit.config import read_cluster

    content = read_cluster(cluster)
    _operate(url, state, lambda client: client.apply(content))


@app.command()
def plan(
    files: Annotated[
        list[Path], typer.Argument(help="Placement problems (docs/problem.md); - is stdin.", metavar="FILE...")
    ],
    solver: Annotated[str, typer.Option(help="relax, exact, or a published baseline.")] = "relax",
    time_limit: Annotated[float, typer.Option(help="Seconds for each solve.", min=0)] = 10.0,
    work_limit: Annotated[
        int | None, typer.Option(help="Solver steps for each solve, instead of seconds.", min=0)
    ] = None,
    tolerance: Annotated[
        float,
        typer.Option(help="Relative cost that better service may add to the best plan.", min=0),
    ] = 0,
    explain: Annotated[
        bool, typer.Option("--explain", help="Print a page of text instead: latency by part, binding limits.")
    ] = False,
) -> None:
    """Solve placement problems; print one JSON object per line."""
    from resplit.planner.command import plan_command

    raise typer.Exit(plan_command(files, solver, time_limit, work_limit, tolerance, explain))


@app.command()
def simulate(
    scenario: Annotated[Path, typer.Argument(help="The scenario file (YAML).", metavar="SCENARIO.yaml")],
    policy: Annotated[str, typer.Option(help="A policy, `all`, or anybody's own as package.module:Name.")] = "resplit",
    seed: Annotated[int, typer.Option(help="Fixes the workload and all noise.", min=0)] = 7,
    out: Annotated[Path | None, typer.Option(help="Folder for the tables of each run, as Parquet.")] = None,
    cluster: Annotated[Path | None, typer.Option(help="By default the cluster that the scenario names.")] = None,
    model: Annotated[Path | None, typer.Option(help="The sizes of the model's blocks (docs/simulator.md).")] = None,
    traces: Annotated[
        Path | None, typer.Option(help="Folder of the trace files, if not where the scenario says (data/traces).")
    ] = None,
    rival: Annotated[
        list[Path] | None, typer.Option(help="For `oracle`: tables of another policy's run, instead of running all.")
    ] = None,
) -> None:
    """Simulate a scenario; print one JSON object per policy."""
    from resplit.simulate.command import simulate_command

    simulate_command(scenario, policy, seed, out, cluster, model, rival or (), traces)


@app.command()
def traces(
    folder: Annotated[Path, typer.Option(help="Where the trace files are.")] = Path("data/traces"),
    fetch: Annotated[bool, typer.Option("--fetch", help="Download what is missing from its source.")] = False,
) -> None:
    """Say where the public traces of the bundled scenarios come from, and which are here."""
    from resplit.trace_files import traces_command

    for line in traces_command(folder, fetch):
        typer.echo(line)


@app.command()
def doctor(
    cluster: ClusterFile,
    url: Url = _DEFAULT_URL,
    model: Model = DEFAULT_MODEL,
    state: State = _DEFAULT_STATE,
) -> None:
    """Check keys, disk, memory, pace, ports, clocks and links of a cluster, and say what to do. Exit status 1: errors.

    Run it where the controller's keys are. If no controller runs, the nodes measure their links for it.
    """
    from resplit.cluster.doctor import examine
    from resplit.config import load_cluster
    from resplit.model.source import obtain

    config = load_cluster(cluster)
    stored = obtain(model, state / "models", config.weights, config.split, config.engine)
    findings = examine(config, stored, state, url)
    for each in findings:
        typer.echo(f"{each.level:8} {each.about:24} {each.says}")
    raise typer.Exit(any(each.level == "error" for each in findings))


@app.command()
def size(
    model: Annotated[str, typer.Argument(help="A local folder, a hub name, or the default model.", metavar="MODEL")],
    users: Annotated[int, typer.Option(min=1, help="Requests that run at once.")],
    context: Annotated[int, typer.Option(min=2, help="Tokens of a request, prompt and answer together.")],
    cluster: Annotated[Path | None, typer.Option(help="Cluster file with the nodes; default: this machine.")] = None,
    state: State = _DEFAULT_STATE,
) -> None:
    """Say what memory and `kv_tokens` the nodes need, if the model fits, and how fast it will be. Exit status 1: no."""
    from resplit.cluster.sizing import describe, for_users, this_machine
    from resplit.cluster.sizing import size as size_up
    from resplit.config import load_cluster
    from resplit.model.source import obtain

    config = for_users(load_cluster(cluster) if cluster else this_machine(context), users, context)
    stored = obtain(model, state / "models", config.weights, config.split, config.engine)
    found = size_up(config, stored)
    typer.echo(describe(found))
    raise typer.Exit(found.reason is not None)


@app.command()
def keys(
    cluster: ClusterFile,
    state: State = _DEFAULT_STATE,
    rotate: Annotated[bool, typer.Option(help="Renew every certificate and the signing key.")] = False,
) -> None:
    """Create the certificate authority, and keys and certificates for the controller and every node."""
    from resplit.cluster.state_folder import make_private
    from resplit.security.authority import keys_command

    make_private(state)
    keys_command(state / "keys", cluster, rotate)
    typer.echo(f"keys are in {state / 'keys'}: copy each member's folder to its machine, but never `authority`")


def main() -> None:
    """Run the command line. What the user or the machine caused is printed as one line, without a traceback."""
    try:
        log_to_stderr()
        app()
    except ResplitError as error:
        typer.echo(f"resplit: {error}", err=True)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
    except OSError as error:  # one of a file, such as a full disk
        if error.filename is None:
            raise
        typer.echo(f"resplit: {error.filename}: {error.strerror}", err=True)
        sys.exit(1)
    except ModuleNotFoundError as error:
        package = (error.name or "resplit").partition(".")[0]
        if package == "resplit":
            raise
        rule = "this command needs more than a node does: install resplit with its extra, `pip install '.[serve]'`"
        typer.echo(f"resplit: the package {package} is missing; {rule}", err=True)
        sys.exit(1)


def _run_until_stopped(work: Callable[[asyncio.Event], Coroutine[Any, Any, None]]) -> None:
    """Run `work` on an event loop with timers of 0.1 ms accuracy; SIGINT and SIGTERM set its event."""
    import asyncio
    import signal

    from resplit.process import event_loop

    async def run() -> None:
        stop = asyncio.Event()
        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, stop.set)
        await work(stop)

    event_loop.run(run())


def _operate(url: str, state: Path, work: Callable[[ControlClient], list[str]]) -> None:
    """Send an operator's command to the controller, and print the changes to the cluster."""
    from resplit.cluster.client import ControlClient

    with ControlClient.from_state(url, state) as client:
        changed = work(client)
    typer.echo("\n".join(changed) or "nothing changes")


def _follow_parent(wanted: bool) -> None:
    """End with the process that started this one, if `wanted`."""
    if wanted:
        from resplit.cluster.parent import end_with_parent

        end_with_parent()


if __name__ == "__main__":
    main()
