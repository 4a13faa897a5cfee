"""The testbed of `benchmarks.testbed`: what it computes, and, where root and the tools are there, what it makes."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.testbed import tools
from benchmarks.testbed.groups import Groups, remove_groups
from benchmarks.testbed.layout import (
    Link,
    Shape,
    address,
    cluster_of_real_machines,
    cores_of,
    faster,
    links_of,
    namespace,
    quota,
    shares,
)
from benchmarks.testbed.machines import LOCK
from benchmarks.testbed.network import Network, loss_rule
from benchmarks.testbed.relay import Relay, Wire
from resplit.cluster.state_folder import in_use
from resplit.config import load_cluster, parse_cluster, read_cluster
from resplit.errors import ConfigError

HOME = Path("data/clusters/home.yaml")
KINDS = ("embed", *["layer"] * 30, "head")
NODES = ("left", "right")


def test_the_testbed_runs_the_same_cluster_file_without_emulation() -> None:
    content = read_cluster(HOME)
    real = parse_cluster(cluster_of_real_machines(content), "real")
    declared = load_cluster(HOME)
    assert [node.memory for node in real.nodes] == [node.memory for node in declared.nodes]
    assert all(node.emulate is None for node in real.nodes)
    assert real.link("hub", "cloud") is None
    assert [node.address for node in real.nodes] == [f"10.77.0.{number}:7000" for number in range(1, 6)]
    assert content == read_cluster(HOME), "the file's content is left as it was"


def test_every_two_nodes_are_linked_as_the_file_declares() -> None:
    links = {link.between: link for link in links_of(load_cluster(HOME))}
    assert len(links) == 10
    far = links["hub", "cloud"]
    assert (far.shape.latency_s, far.shape.bandwidth_bytes_per_s) == (0.022, 7.5e6)
    assert [end[:2] for end in far.ends()] == [("hub", "to-4"), ("cloud", "to-0")]
    assert far.shape.tbf()[:3] == ["tbf", "rate", "60000000bit"]


def test_a_token_takes_its_declared_time_on_the_share_of_a_core() -> None:
    declared = load_cluster(HOME)
    found = shares(declared, KINDS, 0.011, speed=1.0)
    assert found["hub"] == pytest.approx(0.011 / 0.1105)  # 9.06 tokens a second are 110 ms
    assert found["study"] / found["kitchen"] == pytest.approx(23.81 / 4.88, rel=0.02)
    with pytest.raises(ConfigError, match=r"study would need 2\.\d+ cores"):
        shares(declared, KINDS, 0.011, speed=9.0)


def test_a_faster_cluster_has_more_load_and_less_time() -> None:
    declared, fast = load_cluster(HOME), parse_cluster(faster(read_cluster(HOME), 3.0), "fast")
    assert fast.classes[0].slo == pytest.approx(0.5)
    assert [each.rate_rps for each in fast.classes] == pytest.approx([3 * each.rate_rps for each in declared.classes])
    assert fast.classes[1].slo is None


def test_no_quota_is_less_than_the_kernel_takes_and_each_is_the_share() -> None:
    for share in (0.9, 0.3, 0.1, 0.033, 0.007):
        quota_us, period_us = quota(share)
        assert quota_us >= 1000
        assert quota_us / period_us == pytest.approx(share, rel=0.01)
    assert quota(0.3)[1] == 10_000


def test_nodes_are_spread_over_the_cores_by_their_shares() -> None:
    found = cores_of({"a": 0.5, "b": 0.4, "c": 0.2, "d": 0.1}, 2)
    assert found == {"a": 0, "b": 1, "c": 1, "d": 0}


def test_packets_come_late_by_latency_and_jitter_and_never_overtake() -> None:
    wire = Wire(latency_s=0.040, jitter_s=0.030)
    sent = [index * 0.001 for index in range(500)]
    due = [wire.due_s(now_s) for now_s in sent]
    delays = [out - now_s for out, now_s in zip(due, sent, strict=True)]
    assert due == sorted(due)
    assert min(delays) >= 0.010 - 1e-9
    assert max(delays) <= 0.070 + 1e-9
    assert max(delays) - min(delays) > 0.01


def test_a_stall_holds_packets_of_one_link_back_in_both_directions() -> None:
    delivered: list[tuple[int, bytes]] = []
    relay = Relay([(1, 2), (3, 4)], lambda device, packet: delivered.append((device, packet)))
    relay.set({"link": 0, "latency_s": 0.01}, 0.0)
    relay.set({"link": 0, "stall_s": 0.8}, 0.0)
    for device in (1, 2, 3):
        relay.take(device, b"packet", 0.1)
    assert relay.send_due(0.1) == pytest.approx(0.7)
    assert delivered == [(4, b"packet")]
    assert relay.send_due(0.81) is None
    assert delivered[1:] == [(2, b"packet"), (1, b"packet")]


def test_the_loss_of_a_device_replaces_the_former_one() -> None:
    assert "numgen random mod 10000 <= 299 drop" in loss_rule("to-4", 0.03)
    assert "flush chain inet testbed from_to_4" in loss_rule("to-4", 0.0)
    assert "drop" not in loss_rule("to-4", 0.0)


def test_quotas_of_version_2_are_written_as_the_kernel_reads_them(tmp_path: Path) -> None:
    groups = Groups(tmp_path)
    groups.make(["hub"])
    groups.limit("hub", 0.25, 0.0, core=0)
    group = tmp_path / "resplit-testbed" / "hub"
    assert (group / "cpu.max").read_text() == "2500 10000"
    assert (group / "others" / "cpu.max").read_text() == "max"
    assert (group / "node" / "cpu.weight").read_text() == "1000"


def test_the_command_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tools.shutil, "which", lambda tool: None if tool == "nft" else tool)
    monkeypatch.setattr(tools.os, "geteuid", lambda: 0)
    with pytest.raises(ConfigError, match="apt-get install nftables"):
        tools.require()
    monkeypatch.setattr(tools.os, "geteuid", lambda: 1000)
    with pytest.raises(ConfigError, match="needs root"):
        tools.require()


@pytest.fixture
def network() -> Iterator[Network]:
    """Two namespaces with a link of 20 ms and 8 Mbit/s."""
    if why := tools.missing():
        pytest.skip(why)
    try:
        with in_use(LOCK):
            made = Network(NODES, [Link(NODES, (0, 1), Shape(0.020, 1e6))])
            try:
                made.start()
                yield made
            finally:
                made.stop()
    except ConfigError as error:
        pytest.skip(f"the testbed is in use: {error}")


_SERVE = """
import socket
server = socket.create_server(("0.0.0.0", 7000))
print("ready", flush=True)
while True:
    connection, _ = server.accept()
    connection.sendall(connection.recv(1))
"""
_ASK = """
import socket, sys, time
begun_s = time.monotonic()
connection = socket.create_connection((sys.argv[1], 7000), float(sys.argv[2]))
print(time.monotonic() - begun_s)
begun_s = time.monotonic()
connection.sendall(b"?")
connection.recv(1)
print(time.monotonic() - begun_s)
"""


def _within(node: str, code: str, *arguments: str) -> list[str]:
    return tools.within(namespace(node), [sys.executable, "-c", code, *arguments])


@pytest.mark.processes
def test_a_connection_between_two_namespaces_takes_a_round_trip_and_nothing_passes_at_full_loss(
    network: Network,
) -> None:
    with subprocess.Popen(_within("right", _SERVE), stdout=subprocess.PIPE) as server:
        try:
            assert server.stdout is not None
            assert server.stdout.readline() == b"ready\n"
            ask = _within("left", _ASK, address(1), "10")
            connected_s, answered_s = map(float, subprocess.run(ask, capture_output=True, check=True).stdout.split())
            assert connected_s >= 0.040
            assert answered_s >= 0.040
            network.shape(NODES, Shape(0.020, 1e6, loss=1.0))
            ask = _within("left", _ASK, address(1), "2")
            assert b"TimeoutError" in subprocess.run(ask, capture_output=True, check=False).stderr
        finally:
            server.kill()
    network.stop()
    assert namespace("left") not in tools.call("ip", "netns", "list")


@pytest.mark.processes
def test_a_group_limits_the_processor_time_of_its_process() -> None:
    if why := tools.missing():
        pytest.skip(why)
    try:
        with in_use(LOCK):
            _limited_to_a_tenth()
    except ConfigError as error:
        pytest.skip(f"the testbed is in use: {error}")


def _limited_to_a_tenth() -> None:
    groups = Groups()
    try:
        groups.make(["left"])
        code = "import time\nend = time.monotonic() + 1\nwhile time.monotonic() < end: pass\nprint(time.process_time())"
        with subprocess.Popen([sys.executable, "-c", f"input()\n{code}"], stdin=-1, stdout=-1) as process:
            groups.join("left/node", process.pid)
            groups.limit("left", 0.1, 0.0, core=0)
            out, _ = process.communicate(b"\n")
        assert float(out) < 0.3
    finally:
        groups.stop()
        remove_groups()
    assert not Path("/sys/fs/cgroup/cpu/resplit-testbed").exists()
