"""Puts the gateway and the controller together in one process and runs them until told to stop."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import structlog
import uvicorn
from fastapi import FastAPI

from resplit.config import ClusterConfig
from resplit.control.api import create_control_api
from resplit.control.controller import Controller
from resplit.control.keys import CONTROLLER, Member
from resplit.control.log import EpochLog
from resplit.control.monitor import Monitor
from resplit.control.package import package
from resplit.errors import ConfigError
from resplit.gateway.api import create_app
from resplit.gateway.router import Router
from resplit.gateway.sessions import Sessions
from resplit.model.registry import Keyring, Registry
from resplit.model.source import StoredModel
from resplit.node.feasible import ensure_feasible
from resplit.wire.peers import Address

_log = structlog.get_logger(__name__)
_NODES_ANSWER_WITHIN_S = 120.0


@dataclass(frozen=True)
class Place:
    """Where a gateway keeps its things and where it listens."""

    state: Path
    keys: Path
    registry: str
    listen: Address

    @property
    def token_file(self) -> Path:
        """The file that holds the control API's token."""
        return self.state / "control.token"


async def serve(
    cluster: ClusterConfig, model: StoredModel, place: Place, stop: asyncio.Event, ready: Callable[[], None]
) -> None:
    """Run gateway and controller until `stop` is set; `ready` is called once the API answers and every node does.

    ConfigError where the port is taken, or where this machine cannot do what its emulated nodes are to play;
    NodeLostError where a node does not answer.
    """
    bound = _bind(place.listen)
    await asyncio.to_thread(ensure_feasible, cluster, model)
    place.state.mkdir(parents=True, exist_ok=True)
    member = Member.load(place.keys / CONTROLLER)
    keyring = Keyring(place.state / "keyring.json")
    await asyncio.to_thread(package, model, Registry(place.registry), keyring)
    router = Router(cluster, member)
    sessions = Sessions(cluster, router, model.features(cluster.private_layers))
    addresses = _addresses(cluster)
    log = EpochLog(place.state / "epochs.db")
    router.meet(addresses)
    picture = place.state / "picture.json"
    controller = Controller(cluster, model, member, keyring, log, router.peers, addresses, sessions, picture)
    sessions.on_settled = controller.settled
    sessions.on_lost = controller.node_lost
    router.on_found = controller.node_found
    monitor = Monitor(router.peers, router.drop)
    router.on_heard = monitor.heard
    app = _app(cluster, model, sessions, place.listen)
    app.mount("/control", create_control_api(controller, monitor, _token(place.token_file)))
    server = _Server(uvicorn.Config(app, log_level="warning", lifespan="off"))
    try:
        await router.wait_for(set(cluster.node_names), _NODES_ANSWER_WITHIN_S)
        await controller.introduce()
        await controller.resume()
        async with asyncio.TaskGroup() as tasks:
            serving = tasks.create_task(server.serve(sockets=[bound]), name="http")
            polling = tasks.create_task(monitor.run(), name="monitor")
            ready()
            await stop.wait()
            server.should_exit = True
            await serving
            polling.cancel()
    finally:
        await controller.stop()
        await router.disconnect()
        bound.close()


def _app(cluster: ClusterConfig, model: StoredModel, sessions: Sessions, listen: Address) -> FastAPI:
    api_keys = {key: c.name for c in cluster.classes for key in c.api_keys}
    on_loopback = listen.host in ("127.0.0.1", "::1", "localhost")
    return create_app(sessions, model.folder, model.name, cluster.limits, api_keys, bool(api_keys) or not on_loopback)


def _addresses(cluster: ClusterConfig) -> dict[str, Address]:
    missing = [node.name for node in cluster.nodes if node.address is None]
    if missing:
        raise ConfigError(
            f"nodes: {missing[0]}", "has no address; `resplit serve` needs `address: host:port` of every node"
        )
    return {node.name: Address.parse(node.address) for node in cluster.nodes if node.address}


def _token(path: Path) -> str:
    """The control API's token, made once."""
    if not path.exists():
        path.touch(mode=0o600)
        path.write_text(secrets.token_urlsafe(32), encoding="utf-8")
    return path.read_text(encoding="utf-8").strip()


def _bind(listen: Address) -> socket.socket:
    """Listen before anything is announced, so that a port in use is an error and not a surprise."""
    family = socket.AF_INET6 if ":" in listen.host else socket.AF_INET
    bound = socket.socket(family, socket.SOCK_STREAM)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind((listen.host, listen.port))
    except OSError as error:
        bound.close()
        raise ConfigError(f"--listen {listen}", f"cannot listen there: {error.strerror}; choose another port") from None
    return bound


class _Server(uvicorn.Server):
    """uvicorn without its own signal handling: whoever runs it stops it."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield
