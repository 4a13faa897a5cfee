"""What each command to a node contains, and what becomes of refusals and losses."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
import structlog

from resplit.control import load_paces
from resplit.control.node_commands import NodeCommands
from resplit.control.rules import PlacementRules
from resplit.errors import CommandRefusedError, NodeLostError, PeerFaultError
from resplit.model.source import StoredModel
from resplit.security.authority import keys_command
from resplit.security.identity import CONTROLLER, Member
from resplit.security.signing import CommandVerifier, audience_of
from resplit.shards.keyring import Keyring
from resplit.shards.packaging import package
from resplit.shards.registry import Registry
from resplit.shards.sealing import unwrap_key
from resplit.wire.addresses import Address
from resplit.wire.commands import Abort, Commit, Release
from resplit.wire.emulated_link import Shape
from resplit.wire.routes import Route
from tests.support.three_nodes import SPREAD, A, B, C, three_node_config

LINKS = {
    "default": {"latency": "3 ms", "bandwidth": "80 Mbit/s"},
    "pairs": [{"between": [A, C], "latency": "8 ms", "bandwidth": "80 Mbit/s"}],
}


class SigningPeer:
    """Verifies commands with a node's own credentials, and answers with `answer` or raises it."""

    def __init__(self, member: Member, answer: dict[str, list[int]] | Exception) -> None:
        self._verifier = CommandVerifier(member)
        self._answer = answer
        self.audience = audience_of(member.name, self._verifier.nonce)
        self.faults: list[str] = []
        self.fault_count = 0
        self.limits_s: dict[str, float] = {}
        self.running = 0
        self.received: list[tuple[str, dict[str, Any], int]] = []

    def fault(self, reason: str) -> None:
        self.faults.append(reason)

    async def command(self, kind: str, signed: str, timeout_s: float) -> dict[str, list[int]]:
        self.limits_s[kind] = timeout_s
        self.running += 1
        assert self.running == 1, "a node carries out one command at a time"
        await asyncio.sleep(0)
        self.running -= 1
        command = self._verifier.verify(signed, kind=kind, current_epoch=0)
        self.received.append((command.kind, dict(command.body), command.epoch))
        if isinstance(self._answer, Exception):
            raise self._answer
        return self._answer


class Bench:
    def __init__(self, model: StoredModel, folder: Path) -> None:
        keys_command(folder / "keys", [A, B, C])
        self.keys = folder / "keys"
        self.keyring = Keyring(folder / "keyring.json")
        package(model, Registry(str(folder / "registry")), self.keyring)
        answers: dict[str, dict[str, list[int]] | Exception] = {
            A: {"dropped": [1]},
            B: CommandRefusedError("unprepared", "epoch 4 is not prepared"),
            C: NodeLostError("gamma does not answer"),
        }
        self.peers = {name: SigningPeer(Member.load(self.keys / name), answers[name]) for name in answers}
        peers: Any = self.peers
        self.suspects: set[str] = set()
        member = Member.load(self.keys / CONTROLLER)
        self.commands = NodeCommands(model, member, self.keyring, peers, lambda: self.suspects)
        self.rules = PlacementRules.of(three_node_config(links=LINKS), model)


@pytest.fixture
def bench(stored_model: StoredModel, tmp_path: Path) -> Bench:
    return Bench(stored_model, tmp_path)


async def test_each_node_gets_its_own_command_signed_for_the_epoch(bench: Bench) -> None:
    answers = await bench.commands.send({A: Commit(4), B: Abort(5), C: Commit(4)}, 6)
    assert bench.peers[A].received[-1] == ("commit", {"epoch": 4}, 6)
    assert bench.peers[B].received[-1] == ("abort", {"epoch": 5}, 6)
    assert answers[A] == {"dropped": [1]}
    assert isinstance(answers[B], CommandRefusedError)
    assert isinstance(answers[C], NodeLostError)


async def test_a_required_command_raises_the_first_refusal_once_all_nodes_answered(bench: Bench) -> None:
    assert await bench.commands.require({A: Commit(4)}, 4) == {A: {"dropped": [1]}}
    before = len(bench.peers[C].received)
    with pytest.raises(CommandRefusedError, match="not prepared"):
        await bench.commands.require({A: Commit(4), B: Commit(4), C: Commit(4)}, 4)
    assert len(bench.peers[C].received) == before + 1


async def test_a_notification_passes_over_refusals_and_losses_but_not_over_defects(bench: Bench) -> None:
    with structlog.testing.capture_logs() as logged:
        await bench.commands.notify({A: Commit(4), B: Commit(4), C: Commit(4)}, 4)
    event = {"event": "a command was not carried out", "kind": "commit"}
    refused = {"node": B, "error": "command refused (unprepared): epoch 4 is not prepared", "log_level": "warning"}
    lost = {"node": C, "error": "gamma does not answer", "log_level": "info"}
    assert [entry for entry in logged if entry["event"] == event["event"]] == [event | refused, event | lost]
    assert [bench.peers[name].faults for name in (A, B, C)] == [[], [], []]
    bench.peers[A]._answer = KeyError("defect")
    with pytest.raises(KeyError):
        await bench.commands.notify({A: Commit(4)}, 4)


async def test_a_node_that_refuses_a_notification_for_no_honest_reason_is_faulty(bench: Bench) -> None:
    bench.peers[B]._answer = CommandRefusedError("privacy", "I will not")
    await bench.commands.notify({A: Abort(4), B: Abort(4)}, 4)
    assert bench.peers[A].faults == []
    assert bench.peers[B].faults == ["it refuses 'abort': command refused (privacy): I will not"]


async def test_a_node_that_has_left_meanwhile_counts_as_lost(bench: Bench) -> None:
    del bench.peers[A]
    answers = await bench.commands.send({A: Commit(4), B: Commit(4)}, 4)
    assert str(answers[A]) == f"{A} is no longer in the cluster"
    assert isinstance(answers[A], NodeLostError)
    assert await bench.commands.notify({A: Commit(4)}, 4) == {}
    with pytest.raises(NodeLostError):
        bench.commands.peer(A)
    bench.commands.fault(A, "it sends nonsense")  # nobody is left to count as lost


async def test_a_node_gets_one_command_at_a_time_and_a_limit_for_each(bench: Bench) -> None:
    await asyncio.gather(*(bench.commands.send({A: command}, 4) for command in (Commit(4), Abort(5), Release(4))))
    assert bench.peers[A].limits_s == {"commit": 10.0, "abort": 10.0, "release": 10.0}
    await bench.commands.send({A: Commit(4), B: Commit(4)}, 4, {A: 2.0})
    assert (bench.peers[A].limits_s["commit"], bench.peers[B].limits_s["commit"]) == (2.0, 10.0)


async def test_to_load_blocks_a_node_gets_time_for_their_bytes_and_those_of_the_block_that_it_loads_just_then(
    bench: Bench,
) -> None:
    largest, pace = bench.keyring.largest_sealed_bytes, load_paces.SLOWEST_BYTES_PER_S
    prepare = bench.commands.prepare(A, Route(3, tuple(SPREAD), {}), bench.rules, replace_current=False)
    profile = bench.commands.profile(A, bench.rules)
    for command, least_s in ((prepare, 10.0), (profile, 60.0)):
        await bench.commands.send({A: command}, 4)
        sealed_bytes = largest + sum(shard.sealed_bytes for shard in command.shards.values())
        assert bench.peers[A].limits_s[command.kind] == pytest.approx(least_s + sealed_bytes / pace)
        kind, body, _ = bench.peers[A].received[-1]
        assert (kind, body["within_s"]) == (command.kind, bench.peers[A].limits_s[command.kind])
    await bench.commands.notify({A: prepare}, 4)
    assert bench.peers[A].limits_s["prepare"] == 10.0


async def test_the_pace_of_a_load_sets_the_time_for_the_next_one(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load_paces, "SLOWEST_BYTES_PER_S", 1)
    prepare = bench.commands.prepare(A, Route(3, tuple(SPREAD), {}), bench.rules, replace_current=False)
    limits_s = []
    for loaded in ([1], [], []):
        bench.peers[A]._answer = {"loaded": loaded}
        await bench.commands.send({A: prepare}, 4)
        limits_s.append(bench.peers[A].limits_s["prepare"])
    assert limits_s[0] > 1000 > limits_s[1] == limits_s[2]


async def test_the_pace_of_one_node_does_not_shorten_the_time_of_another(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(load_paces, "SLOWEST_BYTES_PER_S", 1)
    for slow in (B, C):
        bench.commands._paces.note(slow, 1000, 10.0)
    bench.peers[A]._answer = {"loaded": [1]}
    prepare = {
        node: bench.commands.prepare(node, Route(3, tuple(SPREAD), {}), bench.rules, replace_current=False)
        for node in (A, C)
    }
    await bench.commands.send({A: prepare[A]}, 4)
    await bench.commands.send(prepare, 4)
    assert bench.peers[A].limits_s["prepare"] < 100 < bench.peers[C].limits_s["prepare"]


async def test_a_command_that_waited_while_its_node_was_found_faulty_is_not_sent(bench: Bench) -> None:
    peer = bench.peers[A]
    answer = peer.command

    async def never_in_time(kind: str, signed: str, timeout_s: float) -> dict[str, list[int]]:
        await answer(kind, signed, timeout_s)
        peer.fault_count += 1
        raise PeerFaultError("it hangs")

    peer.command = never_in_time  # type: ignore[method-assign]
    answers = await asyncio.gather(*(bench.commands.send({A: command}, 4) for command in (Commit(4), Release(4))))
    assert [type(each[A]) for each in answers] == [PeerFaultError, NodeLostError]
    assert len(peer.received) == 1


async def test_only_while_a_node_is_a_suspect_it_gets_little_time_to_load(bench: Bench) -> None:
    bench.suspects.add(A)
    await bench.commands.send({A: bench.commands.profile(A, bench.rules)}, 4)
    assert bench.peers[A].limits_s["profile"] == 10.0
    bench.suspects.clear()
    await bench.commands.send({A: bench.commands.profile(A, bench.rules)}, 4)
    assert bench.peers[A].limits_s["profile"] > 60.0


def test_a_prepare_has_the_shards_of_the_nodes_own_blocks_with_keys_that_it_alone_opens(
    bench: Bench, stored_model: StoredModel
) -> None:
    route = Route(3, tuple(SPREAD), {})
    prepare = bench.commands.prepare(C, route, bench.rules, replace_current=True)
    assert (prepare.route, prepare.replace_current, prepare.kv_tokens) == (route, True, 256)
    assert (prepare.private, prepare.model) == ({0, 1, 7}, stored_model.spec)
    assert set(prepare.shards) == {4, 5}
    entry = bench.keyring["layer.3"]
    assert prepare.shards[4].name == entry.shard
    member = Member.load(bench.keys / C)
    assert member.wrap_key is not None
    assert unwrap_key(prepare.shards[4].key, member.wrap_key, node=C, shard=entry.shard) == entry.key


def test_a_node_is_told_which_blocks_to_keep_ready_with_keys_that_it_alone_opens(
    bench: Bench, stored_model: StoredModel
) -> None:
    standby = bench.commands.standby(C, [5, 2], bench.rules)
    assert (standby.blocks, standby.private, standby.model) == ((5, 2), {0, 1, 7}, stored_model.spec)
    entry = bench.keyring["layer.4"]
    assert (set(standby.shards), standby.shards[5].name) == ({2, 5}, entry.shard)
    member = Member.load(bench.keys / C)
    assert member.wrap_key is not None
    assert unwrap_key(standby.shards[5].key, member.wrap_key, node=C, shard=entry.shard) == entry.key


@pytest.mark.parametrize(("node", "blocks"), [(A, (0, 1, 7)), (C, (2,))])
def test_a_node_times_the_first_block_of_each_kind_that_it_may_hold(
    bench: Bench, stored_model: StoredModel, node: str, blocks: tuple[int, ...]
) -> None:
    profile = bench.commands.profile(node, bench.rules)
    assert profile.blocks == blocks
    assert set(profile.shards) == set(blocks)
    assert (profile.private, profile.model) == ({0, 1, 7}, stored_model.spec)


def test_an_introduction_names_the_other_nodes_and_their_links(bench: Bench) -> None:
    addresses = {name: Address("127.0.0.1", port) for port, name in enumerate((A, B, C), 1)}
    connect = bench.commands.connect(C, addresses, bench.rules)
    assert (connect.trusted, connect.private) == (False, {0, 1, 7})
    assert connect.addresses == addresses
    assert connect.links == {A: Shape(0.008, 1e7), B: Shape(0.003, 1e7)}
    assert bench.commands.connect(A, addresses, bench.rules).trusted


def test_without_emulated_links_an_introduction_has_none(bench: Bench, stored_model: StoredModel) -> None:
    rules = PlacementRules.of(three_node_config(), stored_model)
    assert bench.commands.connect(A, {B: Address("127.0.0.1", 2)}, rules).links == {}


@pytest.mark.parametrize(("node", "trusted"), [(A, True), (C, False)])
def test_the_trust_command_says_whether_the_node_is_trusted(bench: Bench, node: str, trusted: bool) -> None:
    trust = bench.commands.trust(node, bench.rules)
    assert (trust.trusted, trust.private) == (trusted, {0, 1, 7})
