"""Runs the gateway and the controller together in one process."""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import h11
import structlog
import uvicorn
from fastapi import FastAPI
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from resplit import planner
from resplit.cluster.busy_machine import EmulationCheck, OthersUse
from resplit.cluster.front import Front
from resplit.cluster.model_check import ensure_servable
from resplit.cluster.state_folder import claim_for_model
from resplit.config import ClusterConfig, ClusterFile, HttpConfig
from resplit.control.api import create_control_api
from resplit.control.controller import Controller
from resplit.control.desired_state import DesiredState, load_desired_state
from resplit.control.log import EpochLog
from resplit.control.monitor import Monitor
from resplit.control.operations import Operator, addresses_of
from resplit.errors import ConfigError, NodeLostError
from resplit.files import write_atomically
from resplit.gateway.openai.app import create_app
from resplit.gateway.openai.browsers import LOOPBACK, BrowserRules
from resplit.gateway.openai.http_errors import RETRY_AFTER_S
from resplit.gateway.openai.prometheus import PassMetrics
from resplit.gateway.openai.text import Text
from resplit.gateway.sessions.manager import Sessions
from resplit.gateway.sessions.router import Router
from resplit.live.app import live_routes, reader_check
from resplit.live.observer import Observer
from resplit.live.streams import PageStreams
from resplit.model.source import StoredModel
from resplit.node.emulation_check import check_emulation
from resplit.pass_times import PassTime
from resplit.process.cancellation import VitalTasks, unless_stopped, until_stopped
from resplit.process.garbage import freeze_startup_objects
from resplit.process.signals import ended_by_signals
from resplit.security.identity import CONTROLLER, Member
from resplit.shards.keyring import Keyring
from resplit.shards.packaging import identity, package
from resplit.shards.registry import Registry
from resplit.wire.addresses import Address
from resplit.wire.listener import ACCEPTED_PER_TURN, Listener

_log = structlog.get_logger(__name__)
_NODES_ANSWER_WITHIN_S = 120.0
_LOG_EVERY_S = 5.0
# After a restart, running nodes answer within this time. The cluster resumes without the others.
_ANSWERS_AGAIN_WITHIN_S = 2.0


@dataclass(frozen=True)
class ServePaths:
    """The files and folders of a gateway (`keys`: its own), the shard registry, and where the gateway listens."""

    state: Path
    keys: Path
    registry: str
    listen: Address

    @property
    def token_file(self) -> Path:
        """The file that holds the control API's token."""
        return self.state / "control.token"

    @property
    def desired_state_file(self) -> Path:
        """The file that holds the changes by operators."""
        return self.state / "desired_state.json"


async def serve(
    content: ClusterFile,
    obtain: Callable[[], StoredModel],
    paths: ServePaths,
    stop: asyncio.Event,
    ready: Callable[[], None],
) -> None:
    """Run gateway and controller until `stop` is set; `content` is that of the cluster file.

    The port answers at once, and `GET /readyz` says what is waited for. `obtain` fetches the model, in a thread;
    meanwhile, and while the model is packaged, a signal ends the process. `ready` is called once the API answers.
    Before the first placement, all nodes have to answer: NodeLostError names the nodes that do not. After a restart,
    the last live placement is resumed, if necessary without some nodes.
    ConfigError if the port is taken, if the cluster file asks for what the model or its engine cannot do, or if this
    machine is too slow for its emulated nodes although it is quiet. The error of a vital task if one fails.
    """
    desired = load_desired_state(paths.desired_state_file, content)
    api_keys = required_api_keys(desired.cluster, paths.listen)
    member = Member.load_as(CONTROLLER, paths.keys)
    listener = Listener(paths.listen, desired.cluster.limits.connections)
    front, tasks = Front(), VitalTasks()
    server = _http_server(front, listener)
    try:
        http = tasks.spawn(server.serve(sockets=[listener]), "http")
        with ended_by_signals():
            prepared = await _prepare(desired.cluster, obtain, paths, front)
        async with _gateway(content, desired, prepared, member, paths, api_keys) as parts:
            front.app = parts.app
            try:
                await unless_stopped(stop, _start(parts, tasks, ready))
                await until_stopped(stop, tasks, parts.router.tasks, parts.controller.tasks)
                server.should_exit = True
                parts.page.close()
                await http
            finally:
                await tasks.stop()
    finally:
        await tasks.stop()
        listener.close()


@dataclass(frozen=True)
class _Prerequisites:
    """What a gateway needs before it can be made: the packaged model, on a machine that is fast enough for the file."""

    model: StoredModel
    keyring: Keyring
    emulation: EmulationCheck


async def _prepare(
    cluster: ClusterConfig, obtain: Callable[[], StoredModel], paths: ServePaths, front: Front
) -> _Prerequisites:
    """Fetch and package the model. It may be killed at any point; `front` says how far it is."""
    front.doing = "the model is fetched and converted"
    model = await asyncio.to_thread(obtain)
    ensure_servable(cluster, model.spec)
    front.doing = "the speed of this machine is measured"
    emulation = EmulationCheck(lambda: check_emulation(cluster, model), OthersUse(lambda: [os.getpid()]))
    await emulation.at_start()
    front.doing = "the planner is loaded"
    await asyncio.to_thread(planner.load)
    front.doing = "the model is packaged"
    paths.state.mkdir(parents=True, exist_ok=True)
    keyring = Keyring(paths.state / "keyring.json")
    await asyncio.to_thread(package, model, Registry(paths.registry), keyring)
    return _Prerequisites(model, keyring, emulation)


@dataclass(frozen=True)
class _Parts:
    """The parts of the process that run, and the HTTP application over them."""

    router: Router
    controller: Controller
    monitor: Monitor
    emulation: EmulationCheck
    app: FastAPI
    page: PageStreams
    first: bool  # no placement was ever live
    started: asyncio.Event  # set once the controller has started: until then the control API refuses calls


@contextlib.asynccontextmanager
async def _gateway(
    content: ClusterFile,
    desired: DesiredState,
    prepared: _Prerequisites,
    member: Member,
    paths: ServePaths,
    api_keys: Mapping[bytes, str],
) -> AsyncIterator[_Parts]:
    """Gateway and controller over the log of epochs. ConfigError if the log's epochs are of another model."""
    with contextlib.closing(EpochLog(paths.state / "epochs.db")) as log:
        has_epochs = log.last_committed() is not None
        claim_for_model(paths.state, prepared.model.name, identity(prepared.model, prepared.keyring), has_epochs)
        parts = _assemble(content, desired, prepared, member, log, paths, api_keys)
        try:
            yield parts
        finally:
            await parts.controller.stop()
            await parts.router.disconnect()


async def _start(parts: _Parts, tasks: VitalTasks, ready: Callable[[], None]) -> None:
    """Start the controller once the nodes answer, and what runs beside it."""
    await _until_nodes_answer(parts.router, parts.first)
    await parts.controller.start()
    parts.started.set()
    tasks.spawn(parts.monitor.run(), "monitor")
    tasks.spawn(parts.emulation.when_quiet(), "emulation check")
    freeze_startup_objects()
    ready()


def _assemble(
    content: ClusterFile,
    desired: DesiredState,
    prepared: _Prerequisites,
    member: Member,
    log: EpochLog,
    paths: ServePaths,
    api_keys: Mapping[bytes, str],
) -> _Parts:
    """Create gateway and controller, and connect their events."""
    cluster, addresses = desired.cluster, addresses_of(desired)
    model, emulation, first = prepared.model, prepared.emulation, log.last_committed() is None
    router = Router(cluster, member, model.spec.vocabulary)
    router.connect(addresses)
    sessions = Sessions(cluster, router, model.features(cluster.private_layers))
    controller = Controller(
        cluster, model, member, prepared.keyring, log, router.peers, addresses, sessions, paths.state
    )
    controller.emulation_warning = lambda: emulation.warning
    operator = Operator(controller, router, content, paths.desired_state_file)
    monitor = Monitor(router.peers, len(controller.view.rules.features), router.drop)
    sessions.on_settled = controller.deployment.sessions_left
    sessions.on_lost = controller.node_lost
    router.on_found = controller.node_found
    router.on_heard = monitor.heard
    router.on_news = monitor.hurry
    monitor.on_report = controller.fast_loop.reported
    controller.fast_loop.remeasurement.measure = monitor.measure
    controller.readiness.standby = monitor.standby
    app, token, started = _app(cluster, model, sessions, api_keys), _token(paths.token_file), asyncio.Event()
    app.mount("/control", _once(started, create_control_api(controller, operator, monitor, token), router))
    page = _mount_page(app, controller, monitor, sessions, token)
    return _Parts(router, controller, monitor, emulation, app, page, first, started)


def _mount_page(app: FastAPI, controller: Controller, monitor: Monitor, sessions: Sessions, token: str) -> PageStreams:
    """Serve the live page; passes go to the controller, from which the metrics read them, and to the page."""
    page = PageStreams(Observer(controller, monitor, app.state.metrics))
    PassMetrics(app.state.metrics.registry, controller.spent)

    def passed(done: PassTime) -> None:
        controller.passed(done)
        page.passed(done)

    sessions.on_pass = passed
    sessions.on_ended = page.ended
    app.include_router(live_routes(page, reader_check(app.state.api_keys, token)))
    return page


def required_api_keys(cluster: ClusterConfig, listen: Address) -> dict[bytes, str]:
    """The class of each API key, by its digest; ConfigError if others can reach the gateway, and no class has a key."""
    api_keys = cluster.classes_by_key()
    if not api_keys and listen.host not in LOOPBACK:
        rule = "other machines can reach it, so it needs API keys: give a class of the cluster file some, for example "
        raise ConfigError(f"--host {listen.host}", f"{rule}`api_keys: [{{env: CHAT_KEYS}}]`, or listen on 127.0.0.1")
    return api_keys


def _once(started: asyncio.Event, app: ASGIApp, router: Router) -> ASGIApp:
    """An application that refuses requests with 503 and the reason until `started` is set."""

    async def gate(scope: Scope, receive: Receive, send: Send) -> None:
        if started.is_set():
            return await app(scope, receive, send)
        error = {"message": router.unready_reason() or "the controller starts", "type": "NodeLostError"}
        return await JSONResponse({"error": error}, 503, {"Retry-After": RETRY_AFTER_S})(scope, receive, send)

    return gate


def _app(cluster: ClusterConfig, model: StoredModel, sessions: Sessions, api_keys: Mapping[bytes, str]) -> FastAPI:
    text = Text.from_folder(
        model.folder, vocabulary=model.spec.vocabulary, special_prompts=cluster.allow_special_tokens
    )
    outer = _browser_rules(cluster.http, has_keys=bool(api_keys))
    return create_app(sessions, text, model.name, cluster.limits, api_keys, require_key=bool(api_keys), outer=outer)


def _browser_rules(http: HttpConfig, has_keys: bool) -> list[Middleware]:
    """The middleware that decides which hosts and origins are answered. Scripts see the headers that clients use."""
    allowed_hosts = None if has_keys and not http.hosts else (*LOOPBACK, *http.hosts)
    rules = [Middleware(BrowserRules, hosts=allowed_hosts, origins=http.origins)]
    if http.origins:
        cors = Middleware(
            CORSMiddleware,
            allow_origins=http.origins,
            allow_methods=("GET", "POST"),
            allow_headers=("*",),
            expose_headers=("x-request-id", "retry-after"),
        )
        rules.append(cors)
    return rules


async def _until_nodes_answer(router: Router, first: bool) -> None:
    """Wait for all nodes before the `first` placement; after a restart only for a moment.

    Meanwhile a log line and the gateway say which nodes are missing.
    """
    nodes = set(router.cluster.node_names)
    if not first:
        with contextlib.suppress(NodeLostError):
            await router.wait_for(nodes, _ANSWERS_AGAIN_WITHIN_S)
        return
    until_s, next_log_s = time.monotonic() + _NODES_ANSWER_WITHIN_S, time.monotonic() + _LOG_EVERY_S
    while missing := sorted(nodes - router.listening):
        router.set_unavailable(f"waiting for nodes: {', '.join(missing)}")
        if time.monotonic() >= next_log_s:
            _log.info("waiting for nodes", nodes=", ".join(missing))
            next_log_s += _LOG_EVERY_S
        if time.monotonic() >= until_s:
            raise NodeLostError(f"no answer within {_NODES_ANSWER_WITHIN_S:.0f} s from {', '.join(missing)}")
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(min(next_log_s, until_s) - time.monotonic()):
                await router.changed()
    router.set_available()


def _token(path: Path) -> str:
    """The control API's token, created at the first start."""
    if not path.exists():
        write_atomically(path, secrets.token_urlsafe(32), 0o600)
    return path.read_text(encoding="utf-8").strip()


def _http_server(app: ASGIApp, listener: Listener) -> _Server:
    """A server of `app`, which tells the listener which connections have a request, and whether its answer is taken."""

    async def noted(scope: Scope, receive: Receive, send: Send) -> None:
        peer = tuple(scope["client"])

        async def send_while_taken(message: Message) -> None:
            # After a request that breaks the protocol, the server answers by itself and closes.
            with listener.sending(peer), contextlib.suppress(h11.LocalProtocolError):
                await send(message)

        with listener.serving(peer):
            await app(scope, receive, send_while_taken)

    return _Server(
        uvicorn.Config(
            noted,
            http="h11",  # it bounds the head of a request; the parser that uvicorn prefers, if installed, does not
            log_level="warning",
            lifespan="off",
            ws="none",
            proxy_headers=False,  # else a client could choose its own address
            backlog=ACCEPTED_PER_TURN,
        )
    )


class _Server(uvicorn.Server):
    """uvicorn without its own signal handling: `serve` stops it."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield
