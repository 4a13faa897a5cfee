"""The promises of docs/security.md, checked on a running cluster: traffic, registry, and renewal of keys."""

from __future__ import annotations

import asyncio
import re
import ssl
from collections.abc import AsyncIterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load

from resplit.control.controller import Controller
from resplit.errors import CommandRefusedError, ShardError
from resplit.gateway.engine import GenerationRequest
from resplit.model.activation import token_ids
from resplit.model.source import StoredModel
from resplit.security.authority import keys_command
from resplit.security.identity import CONTROLLER, Member
from resplit.security.signing import CommandSigner
from resplit.shards.registry import Registry
from resplit.shards.sealing import open_shard, unwrap_key
from resplit.types import Sampling
from tests.support.cluster import reference
from tests.support.in_process import InProcessCluster, deploy, until
from tests.support.latest_problem import problem_of
from tests.support.tcp_proxy import TcpProxy
from tests.support.three_nodes import SPREAD, TURNED, A, B, C, three_node_config
from tests.support.wire_fuzzing import Attacker, attack

LIMITS = {"context_tokens": 256, "sessions": 8, "queue": 4, "deadline": "60 s"}
PROMPTS = [(201, 17, 240, 33, 150, 8, 99, 123 + k) for k in range(4)]
NEW_TOKENS = 48


class RecordingProxy(TcpProxy):
    """A proxy that records its traffic: one tape for each direction of each connection."""

    def __init__(self, proxy: TcpProxy) -> None:
        super().__init__(proxy.outside, proxy.inside)
        self.tapes: list[bytearray] = []

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.tapes.append(tape := bytearray())

        class Recorded:
            async def read(self, most: int) -> bytes:
                data = await reader.read(most)
                tape.extend(data)
                return data

        await super()._pump(Recorded(), writer)  # type: ignore[arg-type]


@pytest.fixture
async def cluster(stored_model: StoredModel, tmp_path: Path) -> AsyncIterator[InProcessCluster]:
    """Three nodes behind proxies that record the traffic."""
    config = three_node_config(kv_tokens=512, limits=LIMITS)
    running = InProcessCluster(config, stored_model, tmp_path)
    running.proxies = {name: RecordingProxy(proxy) for name, proxy in running.proxies.items()}
    try:
        await asyncio.gather(*(running.start(name) for name in config.node_names))
        yield running
    finally:
        await running.stop_all()


@pytest.fixture
async def controller(cluster: InProcessCluster) -> AsyncIterator[Controller]:
    controller = cluster.controller()
    await controller.membership.introduce()
    await deploy(controller, SPREAD)
    controller.planner.set_problem(problem_of(cluster.config, cluster.features, SPREAD))
    yield controller
    await controller.stop()


async def generated(cluster: InProcessCluster, prompt: tuple[int, ...], new_tokens: int = NEW_TOKENS) -> list[int]:
    request = GenerationRequest(prompt, new_tokens, Sampling(), "chat", frozenset())
    return [token.token_id async for token in cluster.sessions.generate(request)]


def tls_records(tape: bytes) -> list[int]:
    """The types of the TLS records on a tape. The last record may be incomplete."""
    kinds, at = [], 0
    while at + 5 <= len(tape):
        kind, major, length = tape[at], tape[at + 1], int.from_bytes(tape[at + 3 : at + 5], "big")
        assert (kind in (20, 21, 22, 23), major, length <= 2**14 + 256) == (True, 3, True), tape[at : at + 5]
        kinds.append(kind)
        at += 5 + length
    return kinds


async def test_captured_traffic_of_a_running_cluster_consists_of_tls_records_only(
    cluster: InProcessCluster, controller: Controller, unsplit_model: torch.nn.Module
) -> None:
    streams = [asyncio.create_task(generated(cluster, prompt)) for prompt in PROMPTS]
    await asyncio.sleep(0.1)
    await deploy(controller, TURNED)  # so that caches are transferred too
    assert await asyncio.gather(*streams) == [reference(unsplit_model, list(p), NEW_TOKENS) for p in PROMPTS]
    tapes = [bytes(tape) for proxy in cluster.proxies.values() for tape in proxy.tapes]
    captured = b"".join(tapes)
    assert len(captured) > 200_000
    for tape in tapes:
        kinds = tls_records(tape)
        # Not encrypted: one hello in each direction, and a change of cipher for old middleboxes.
        assert kinds.count(22) <= 1
        assert set(kinds[3:]) <= {23}
    assert b"gamma" in captured, "the hello names the node that is called; this much is visible"
    with torch.inference_mode():
        hidden = unsplit_model.model.embed_tokens(torch.tensor(PROMPTS[0])).numpy()
    secrets = [token_ids(PROMPTS[0]).data[:24], *(row.tobytes()[:16] for row in hidden)]
    words = ["layer.", "embed", "prepare", "commit", "placement", "float32", "chat", *cluster.sessions.session_names()]
    for secret in [*secrets, *(word.encode() for word in words)]:
        assert secret not in captured


async def test_a_client_of_tls_1_2_is_refused_on_a_nodes_port(cluster: InProcessCluster) -> None:
    address, keys = cluster.addresses[C], cluster.folder / "keys" / A

    async def greet(newest: ssl.TLSVersion) -> str | None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.minimum_version, context.maximum_version = ssl.TLSVersion.TLSv1_2, newest
        context.load_cert_chain(keys / "cert.pem", keys / "key.pem")
        context.load_verify_locations(keys / "ca.pem")
        _, writer = await asyncio.open_connection(address.host, address.port, ssl=context, server_hostname=C)
        version: str | None = writer.get_extra_info("ssl_object").version()
        writer.transport.abort()
        return version

    assert await greet(ssl.TLSVersion.TLSv1_3) == "TLSv1.3"
    with pytest.raises((ssl.SSLError, ConnectionResetError)):
        await greet(ssl.TLSVersion.TLSv1_2)


async def test_a_nodes_credentials_open_only_the_blocks_that_it_hosts(
    cluster: InProcessCluster, controller: Controller, stored_model: StoredModel
) -> None:
    registry = Registry(str(cluster.folder / "registry"))
    members = {name: Member.load(cluster.folder / "keys" / name) for name in (A, B, C)}
    for host in (A, B, C):
        for block, shard in cluster.prepare_body(host, SPREAD, 1)["shards"].items():
            sealed, wrapped = registry.get(shard["name"], shard["sealed_bytes"]), bytes.fromhex(shard["key"])
            for name, member in members.items():
                assert member.wrap_key is not None
                if name == host:
                    key = unwrap_key(wrapped, member.wrap_key, node=name, shard=shard["name"])
                    assert open_shard(sealed, key) == stored_model.content(cluster.features[int(block)].name)
                else:
                    for claimed in (name, host):
                        with pytest.raises(ShardError):
                            unwrap_key(wrapped, member.wrap_key, node=claimed, shard=shard["name"])


async def test_the_registry_of_a_running_cluster_reveals_no_model_layer_or_tensor(
    cluster: InProcessCluster, controller: Controller, stored_model: StoredModel
) -> None:
    files = [path for path in (cluster.folder / "registry").rglob("*") if path.is_file()]
    assert len(files) == len(cluster.features)
    assert all(re.fullmatch("[0-9a-f]{64}", path.name) for path in files)
    stored = b"".join(path.read_bytes() for path in files)
    names, contents = set[str](), []
    for block in cluster.features:
        for name, tensor in load(stored_model.content(block.name)).items():
            names.add(name)
            contents.append(np.ascontiguousarray(tensor).tobytes()[:32])
    readable = {
        *names,
        *(block.name for block in cluster.features if len(block.name) > 4),
        stored_model.name,
        "llama",
        "float32",
    }
    assert len(contents) > 40
    for secret in [*contents, *(name.encode() for name in readable if len(name) > 4)]:
        assert secret not in stored


async def test_keys_are_renewed_node_by_node_while_streams_run(
    cluster: InProcessCluster, controller: Controller, unsplit_model: torch.nn.Module
) -> None:
    expected = [reference(unsplit_model, list(prompt), NEW_TOKENS) for prompt in PROMPTS]
    done = asyncio.Event()

    async def keep_asking(prompt: tuple[int, ...], tokens: list[int]) -> int:
        number = 0
        while not done.is_set():
            assert await generated(cluster, prompt) == tokens
            number += 1
        return number

    streams = [asyncio.create_task(keep_asking(p, tokens)) for p, tokens in zip(PROMPTS, expected, strict=True)]
    before = {name: (cluster.folder / "keys" / name / "cert.pem").read_bytes() for name in (A, B, C, CONTROLLER)}
    old = CommandSigner(Member.load(cluster.folder / "keys" / CONTROLLER))
    keys_command(cluster.folder / "keys", [A, B, C], rotate_keys=True)
    for name in (C, B, A):
        await cluster.stop(name)
        await cluster.start(name)

        async def serves(name: str = name) -> bool:
            return cluster.sessions.ready() is None and name in cluster.router.listening

        await until(serves, 20)
    done.set()
    assert sum(await asyncio.gather(*streams)) > 0
    assert {record.status for record in cluster.sessions.records(0)} == {200}
    renewed = Member.load(cluster.folder / "keys" / CONTROLLER)
    for name in (A, B, C):
        assert (cluster.folder / "keys" / name / "cert.pem").read_bytes() != before[name]
        for signer in (
            CommandSigner(renewed),
            old,
        ):  # the old one is valid for another day, as the controller restarts last
            peer = cluster.peer(name)
            signed = signer.sign("release", {"epoch": 0}, audience=peer.audience, epoch=0)
            assert await peer.command("release", signed) == {"dropped": []}


async def test_a_stolen_signing_key_can_be_refused_at_once(cluster: InProcessCluster, controller: Controller) -> None:
    from resplit.security.authority import rotate

    stolen = CommandSigner(Member.load(cluster.folder / "keys" / CONTROLLER))
    rotate(cluster.folder / "keys", honour_old_s=0)
    await cluster.stop(C)
    await cluster.start(C)
    signed = stolen.sign("release", {"epoch": 0}, audience=cluster.peer(C).audience, epoch=0)
    with pytest.raises(CommandRefusedError) as refusal:
        await cluster.peer(C).command("release", signed)
    assert refusal.value.reason == "authority"
    assert (await cluster.state(C)).refusals["authority"] >= 1


async def test_invalid_messages_harm_no_node_and_no_valid_stream(
    cluster: InProcessCluster, controller: Controller, unsplit_model: torch.nn.Module
) -> None:
    attacker, done = Attacker(cluster.addresses, cluster.folder / "keys" / C), asyncio.Event()

    async def keep_asking() -> None:
        expected = reference(unsplit_model, list(PROMPTS[0]), NEW_TOKENS)
        while not done.is_set():
            assert await generated(cluster, PROMPTS[0]) == expected

    stream = asyncio.create_task(keep_asking())
    assert await asyncio.to_thread(attack, attacker, 4.0) > 0
    done.set()
    await stream
    assert not attacker.broken
    for name in (A, B, C):
        assert (await cluster.state(name)).sessions == 0
