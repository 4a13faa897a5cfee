"""One node behind its real socket: the life of an epoch, memory limits, trust, refusals and profiling."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

from resplit.errors import CapacityError, CommandRefusedError, ConfigError, NodeLostError, ShardError
from resplit.model.activation import token_ids
from resplit.model.engines import open_engine
from resplit.model.source import StoredModel
from resplit.node.executor import Executor
from resplit.security.identity import Member
from resplit.security.signing import CommandSigner
from resplit.shards.registry import Registry
from resplit.wire.addresses import Address
from resplit.wire.commands import Standby, to_body
from resplit.wire.emulated_link import Shape
from resplit.wire.node_pb2 import Step
from resplit.wire.peers import Peer
from resplit.wire.tensors import to_wire
from tests.support.hostile import HostileClient
from tests.support.in_process import InProcessCluster, in_process, until
from tests.support.two_nodes import (
    LATER,
    MIDDLE,
    cache_parts,
    commit,
    layer_bytes,
    prepare,
    take_caches,
    two_node_config,
)

PRIVATE_ON_PLAIN = ["plain", *MIDDLE[1:]]


@pytest.fixture
async def nodes(stored_model: StoredModel, tmp_path: Path) -> AsyncIterator[InProcessCluster]:
    async with in_process(two_node_config(), stored_model, tmp_path) as running:
        yield running


async def held(nodes: InProcessCluster, node: str = "plain") -> tuple[list[int], list[int], list[int]]:
    """Blocks held, epochs served, epochs prepared."""
    state = await nodes.state(node)
    return list(state.blocks), list(state.epochs), list(state.prepared)


async def trusted_sends(nodes: InProcessCluster, step: Step) -> None:
    """Send a step to `plain` as the node `trusted`, which runs the segment before."""
    sender = HostileClient(nodes.addresses, nodes.folder / "keys" / "trusted")
    await sender.steps("plain", [step])
    await sender.disconnect()


async def test_an_epoch_is_prepared_committed_and_released_and_only_missing_blocks_are_loaded(
    nodes: InProcessCluster,
) -> None:
    assert await prepare(nodes, MIDDLE, 1) == {"loaded": [2, 3]}
    assert await held(nodes) == ([2, 3], [], [1])
    await commit(nodes, 1)
    assert await prepare(nodes, LATER, 2) == {"loaded": [4]}
    await commit(nodes, 2)
    assert await held(nodes) == ([2, 3, 4], [1, 2], [])
    assert await nodes.command("plain", "release", {"epoch": 2}, 2) == {"dropped": [2]}
    assert await held(nodes) == ([3, 4], [2], [])


async def test_an_aborted_epoch_leaves_the_earlier_one_unchanged(nodes: InProcessCluster) -> None:
    await prepare(nodes, MIDDLE, 1)
    await commit(nodes, 1)
    await prepare(nodes, LATER, 2)
    assert await nodes.command("plain", "abort", {"epoch": 2}, 2) == {"dropped": [4]}
    assert await held(nodes) == ([2, 3], [1], [])
    with pytest.raises(CommandRefusedError, match="unprepared"):
        await commit(nodes, 2)


async def test_a_release_frees_earlier_epochs_that_were_never_committed(
    nodes: InProcessCluster,
) -> None:
    await prepare(nodes, LATER, 1)
    await prepare(nodes, MIDDLE, 2)
    await commit(nodes, 2)
    await nodes.command("plain", "release", {"epoch": 2}, 2)
    assert await held(nodes) == ([2, 3], [2], [])


async def test_an_aborted_epoch_cannot_be_prepared_by_a_late_command(nodes: InProcessCluster) -> None:
    await nodes.command("plain", "abort", {"epoch": 1}, 1)
    with pytest.raises(CommandRefusedError, match="stale"):
        await prepare(nodes, MIDDLE, 1)
    assert await held(nodes) == ([], [], [])


async def test_an_epoch_cannot_be_committed_before_it_is_prepared(nodes: InProcessCluster) -> None:
    with pytest.raises(CommandRefusedError, match="epoch 1 was not prepared here"):
        await commit(nodes, 1)
    assert await held(nodes) == ([], [], [])


async def test_a_private_block_is_refused_by_a_node_that_is_not_trusted(nodes: InProcessCluster) -> None:
    with pytest.raises(CommandRefusedError, match=r"privacy.*plain is not trusted.*\[0\]"):
        await prepare(nodes, PRIVATE_ON_PLAIN, 1)
    body = nodes.prepare_body("plain", PRIVATE_ON_PLAIN, 1)
    profile = {"blocks": [0], "model": body["model"], "private": body["private"], "shards": body["shards"]}
    with pytest.raises(CommandRefusedError, match="privacy"):
        await nodes.command("plain", "profile", profile)
    assert await held(nodes) == ([], [], [])


async def test_after_a_wrong_or_corrupt_shard_no_new_block_stays_loaded(
    nodes: InProcessCluster,
) -> None:
    body = nodes.prepare_body("plain", MIDDLE, 1)
    body["shards"]["3"] = nodes.prepare_body("trusted", ["trusted"] * 8, 1)["shards"]["3"]
    with pytest.raises(ShardError, match="plain"):
        await nodes.command("plain", "prepare", body, 1)
    assert await held(nodes) == ([], [], [])
    shard = nodes.folder / "registry" / nodes.prepare_body("plain", MIDDLE, 2)["shards"]["3"]["name"]
    shard.write_bytes(shard.read_bytes()[:-1] + b"x")
    with pytest.raises(ShardError, match="corrupt"):
        await prepare(nodes, MIDDLE, 2)
    assert await held(nodes) == ([], [], [])


async def test_a_prepare_that_is_given_up_leaves_no_block_behind(
    nodes: InProcessCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    await prepare(nodes, MIDDLE, 1)
    await commit(nodes, 1)
    loading, loaded, go_on, load = asyncio.Event(), asyncio.Event(), threading.Event(), Executor.load
    loop = asyncio.get_running_loop()

    def slowly(executor: Executor, block: int, tensors: Any) -> None:
        loop.call_soon_threadsafe(loading.set)
        go_on.wait(10)
        load(executor, block, tensors)
        loop.call_soon_threadsafe(loaded.set)

    monkeypatch.setattr(Executor, "load", slowly)
    preparing = asyncio.create_task(prepare(nodes, LATER, 2))
    await loading.wait()
    preparing.cancel()
    aborting = asyncio.create_task(nodes.command("plain", "abort", {"epoch": 2}, epoch=2))
    loop.call_later(0.1, go_on.set)
    await aborting
    await loaded.wait()
    assert await held(nodes) == ([2, 3], [1], [])


@pytest.fixture
def hanging_registry(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    go_on = threading.Event()

    def read(*_: object) -> bytes:
        go_on.wait(60)
        return b""

    monkeypatch.setattr(Registry, "_read", read)
    yield
    go_on.set()


@pytest.mark.usefixtures("hanging_registry")
async def test_a_node_whose_registry_hangs_says_so_within_the_time_of_the_command(nodes: InProcessCluster) -> None:
    body = nodes.prepare_body("plain", MIDDLE, 1) | {"within_s": 1.0}
    async with asyncio.timeout(10):
        with pytest.raises(ShardError, match=r"registry .*: no answer within 0\.\d+ s"):
            await nodes.command("plain", "prepare", body, 1)
    assert await held(nodes) == ([], [], [])


@pytest.mark.usefixtures("hanging_registry")
async def test_a_node_that_still_loads_a_standby_block_says_so_within_the_time_of_the_command(
    nodes: InProcessCluster,
) -> None:
    shards = nodes.prepare_body("plain", MIDDLE, 1)["shards"]
    standby = to_body(Standby((2,), nodes.model.spec, nodes.private, {})) | {"shards": shards}
    await nodes.command("plain", "standby", standby)
    async with asyncio.timeout(10):
        with pytest.raises(ShardError, match=r"block 3 could not be loaded in time|no answer within"):
            await nodes.command("plain", "prepare", nodes.prepare_body("plain", LATER, 1) | {"within_s": 1.0}, 1)


@pytest.fixture
async def small(stored_model: StoredModel, tmp_path: Path) -> AsyncIterator[InProcessCluster]:
    """`plain` has room for one layer and its caches, not for two."""
    async with in_process(
        two_node_config(f"{1.5 * layer_bytes(stored_model, 64):.0f} B"), stored_model, tmp_path
    ) as running:
        yield running


async def test_blocks_and_their_caches_must_fit_in_memory(small: InProcessCluster) -> None:
    with pytest.raises(CapacityError, match="MiB more than plain has"):
        await prepare(small, MIDDLE, 1)
    assert await held(small) == ([], [], [])
    one_layer = ["trusted", "trusted", "plain", *["trusted"] * 5]
    with pytest.raises(CapacityError):
        await prepare(small, one_layer, 2, kv_tokens=10_000)
    assert await prepare(small, one_layer, 3) == {"loaded": [2]}
    state = await small.state("plain")
    assert 0 < state.held_bytes <= state.memory_bytes


async def test_a_session_is_refused_if_its_cache_does_not_fit(small: InProcessCluster) -> None:
    await prepare(small, ["trusted", "trusted", "plain", *["trusted"] * 5], 1)
    await commit(small, 1)
    before = (await small.state("plain")).held_bytes
    answers = []
    small.router.on_token = lambda node, token: answers.append(token)
    engine = open_engine(small.model.spec)
    step = Step(session="greedy", epoch=1, segment=1, values=to_wire(engine.blank_input(2, 4)), gateway="controller")
    await small.permit("plain", "greedy", capacity=10_000)
    await trusted_sends(small, step)

    async def answered() -> bool:
        return bool(answers)

    await until(answered)
    assert answers[0].error_kind == "capacity"
    assert "cache of session greedy" in answers[0].error
    state = await small.state("plain")
    assert (state.held_bytes, state.sessions) == (before, 0)


async def test_a_transferred_cache_must_fit_in_memory(small: InProcessCluster) -> None:
    await prepare(small, ["trusted", "trusted", "plain", *["trusted"] * 5], 1)
    with pytest.raises(CapacityError, match="plain: the cache of session greedy"):
        await take_caches(small, "greedy", [2], 10_000)
    assert (await small.state("plain")).sessions == 0
    await take_caches(small, "modest", [2], 64)
    state = await small.state("plain")
    assert state.sessions == 1
    assert state.held_bytes <= state.memory_bytes


async def test_late_messages_of_a_closed_session_are_refused(nodes: InProcessCluster) -> None:
    await prepare(nodes, MIDDLE, 1)
    await commit(nodes, 1)
    answers = []
    nodes.router.on_token = lambda node, token: answers.append(token)
    await nodes.peer("plain").close_sessions(["gone"])
    values = to_wire(open_engine(nodes.model.spec).blank_input(2, 4))
    await trusted_sends(nodes, Step(session="gone", epoch=1, segment=1, values=values, gateway="controller"))
    with pytest.raises(CapacityError, match="gone"):
        await nodes.peer("plain").cache(cache_parts("gone", 2))
    with pytest.raises(NodeLostError, match="session gone has ended"):
        await nodes.permit("plain", "gone")

    async def answered() -> bool:
        return bool(answers)

    await until(answered)
    assert answers[0].error_kind == "stale"
    assert (await nodes.state("plain")).sessions == 0


async def test_a_failed_profile_leaves_no_block_and_no_cache(stored_model: StoredModel, tmp_path: Path) -> None:
    room = f"{layer_bytes(stored_model, 1):.0f} B"  # the block fits, but not the cache of the timed passes
    async with in_process(two_node_config(room), stored_model, tmp_path) as nodes:
        body = nodes.prepare_body("plain", MIDDLE, 1)
        profile = {"blocks": [2], "model": body["model"], "private": body["private"], "shards": body["shards"]}
        with pytest.raises(CapacityError, match="cache of session profile"):
            await nodes.command("plain", "profile", profile)
        state = await nodes.state("plain")
        assert (state.blocks, state.sessions, state.held_bytes) == ((), 0, 0)


async def test_a_profile_times_blocks_and_drops_them(nodes: InProcessCluster) -> None:
    body = nodes.prepare_body("plain", MIDDLE, 1)
    profile = {"blocks": [2], "model": body["model"], "private": body["private"], "shards": body["shards"]}
    await nodes.command("plain", "profile", profile)
    rows = await nodes.rows("plain", "blocks")
    assert {(row["block"], row["kind"]) for row in rows} == {("layer.1", "layer")}
    assert {row["phase"] for row in rows} == {"prefill", "decode"}
    assert all(row["seconds"] > 0 and not row["emulated"] for row in rows)
    assert (await nodes.rows("plain", "nodes"))[-1]["reference_s"] > 0
    assert await held(nodes) == ([], [], [])


async def test_an_emulated_node_reports_its_emulated_hardware_and_the_error(
    stored_model: StoredModel, tmp_path: Path
) -> None:
    times = {"embed": "1 ms", "layer": "2 ms", "head": "3 ms"}
    prefill = dict.fromkeys(times, "0 ms")
    emulate = {"decode_per_token": times, "prefill_per_token": prefill, "background_utilization": 0.25}
    async with in_process(two_node_config(emulate=emulate), stored_model, tmp_path) as nodes:
        body = nodes.prepare_body("plain", MIDDLE, 1)
        profile = {"blocks": [2], "model": body["model"], "private": body["private"], "shards": body["shards"]}
        await nodes.command("plain", "profile", profile)
        state = await nodes.state("plain")
        assert state.emulated
        assert 0 < state.emulation_error < 1
        last = (await nodes.rows("plain", "nodes"))[-1]
        assert (last["emulated"], last["reference_s"]) == (True, 0.002)
        assert 0.25 < last["cpu_utilization"] <= 1
        assert last["cpu_utilization"] - last["own_utilization"] == pytest.approx(0.25)
        assert all(row["emulated"] and row["seconds"] >= 0.0019 for row in await nodes.rows("plain", "blocks"))

        slower = {"slowdown": 3.0, "background_utilization": 0.5, "links": {"trusted": vars(Shape(0.04, 1e9))}}
        await nodes.command("plain", "emulate", slower)
        addresses = {name: str(address) for name, address in nodes.addresses.items()}
        await nodes.command("plain", "connect", nodes.connect_body(addresses))
        await nodes.command("plain", "profile", profile)
        assert (await nodes.rows("plain", "nodes"))[-1]["reference_s"] == pytest.approx(0.006)
        assert (await nodes.rows("plain", "blocks"))[-1]["seconds"] >= 0.0059
        assert (
            min(row["seconds"] for row in await nodes.rows("plain", "links")) >= 0.02
        )  # one way: half of the round trip


async def test_invalid_commands_are_refused_and_counted_by_reason(nodes: InProcessCluster) -> None:
    peer = nodes.peer("plain")
    here = peer.audience
    release = nodes.signer.sign("release", {"epoch": 1}, audience=here, epoch=1)
    await peer.command("release", release)
    for_other = nodes.signer.sign("release", {"epoch": 1}, audience=nodes.peer("trusted").audience, epoch=1)
    header, payload, signature = nodes.signer.sign("abort", {"epoch": 1}, audience=here, epoch=1).split(".")
    for kind, signed, reason in [
        ("release", release, "replayed"),
        ("release", for_other, "misaddressed"),
        ("commit", nodes.signer.sign("release", {"epoch": 1}, audience=here, epoch=1), "kind"),
        ("abort", f"{header}.{payload[:-2]}AA.{signature}", "altered"),
        ("abort", "no command", "malformed"),
    ]:
        with pytest.raises(CommandRefusedError) as refusal:
            await peer.command(kind, signed)
        assert refusal.value.reason == reason
    counted = (await nodes.state("plain")).refusals
    assert counted == {"replayed": 1, "misaddressed": 1, "kind": 1, "altered": 1, "malformed": 1}


async def test_a_node_that_restarted_a_moment_ago_refuses_the_commands_to_its_earlier_process(
    nodes: InProcessCluster,
) -> None:
    before = nodes.signer.sign("release", {"epoch": 1}, audience=nodes.peer("plain").audience, epoch=1)
    await nodes.stop("plain")
    await nodes.start("plain")
    with pytest.raises(CommandRefusedError) as refusal:
        await nodes.peer("plain").command("release", before)
    assert refusal.value.reason == "replayed"
    assert await nodes.command("plain", "release", {"epoch": 1}) == {"dropped": []}


async def test_an_unknown_command_is_refused(nodes: InProcessCluster) -> None:
    with pytest.raises(CommandRefusedError, match="'explode' is not a command for nodes"):
        await nodes.command("plain", "explode", {})


async def test_a_command_for_an_earlier_epoch_than_the_committed_one_is_refused(nodes: InProcessCluster) -> None:
    await prepare(nodes, MIDDLE, 5)
    await commit(nodes, 5)
    with pytest.raises(CommandRefusedError, match="stale"):
        await prepare(nodes, LATER, 4)
    assert await held(nodes) == ([2, 3], [5], [])


async def test_members_of_another_authority_cannot_connect(
    nodes: InProcessCluster, tmp_path_factory: pytest.TempPathFactory
) -> None:
    from resplit.security.authority import keys_command

    others = tmp_path_factory.mktemp("others")
    keys_command(others, ["plain"])
    stranger = Member.load(others / "controller")
    peer = Peer("plain", nodes.addresses["plain"], stranger)
    signed = CommandSigner(stranger).sign("release", {"epoch": 9}, audience="plain", epoch=9)
    with pytest.raises(NodeLostError):
        await peer.command("release", signed)
    await peer.disconnect()


async def test_another_model_is_refused_until_the_node_restarts(nodes: InProcessCluster) -> None:
    await prepare(nodes, MIDDLE, 1)
    body = nodes.prepare_body("plain", LATER, 2)
    body["model"]["weights"] = "int8"
    with pytest.raises(CommandRefusedError, match="already runs another model"):
        await nodes.command("plain", "prepare", body, 2)
    assert await held(nodes) == ([2, 3], [], [1])


async def test_real_hardware_cannot_emulate_other_hardware(nodes: InProcessCluster) -> None:
    with pytest.raises(CommandRefusedError, match="plain is real hardware"):
        await nodes.command("plain", "emulate", {"slowdown": 2.0})


async def test_a_step_for_an_unknown_epoch_is_answered_as_stale(nodes: InProcessCluster) -> None:
    answers = []
    nodes.router.on_token = lambda *answer: answers.append(answer)
    nodes.peer("plain").send(
        Step(session="s", epoch=3, segment=0, values=to_wire(token_ids([1])), gateway="controller")
    )

    async def answered() -> bool:
        return bool(answers)

    await until(answered)
    node, answer = answers[0]
    assert (node, answer.error_kind, answer.session) == ("plain", "stale", "s")


def test_an_address_is_host_and_port() -> None:
    assert Address.parse("hub.local:80") == Address("hub.local", 80)
    assert str(Address.parse("[::1]:80")) == "[::1]:80"
    for wrong in ("localhost", "localhost:", "::1:80", ":80", "host:0", "host:65536", "host:http"):
        with pytest.raises(ConfigError, match="is not host:port"):
            Address.parse(wrong)
