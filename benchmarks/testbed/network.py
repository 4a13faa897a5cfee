"""The network of the testbed: a namespace for each node, and a point-to-point link for every two of them.

Bandwidth is by tbf at the sending end, loss by nft at the receiving end, delay by the relay between both.
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Sequence

from benchmarks.testbed.layout import Link, Shape, address, namespace
from benchmarks.testbed.tools import call, within
from resplit.errors import ResplitError

__all__ = ["Network", "remove_namespaces"]


class Network:
    """Namespaces and links, from `start` to `stop`. The changes may be made from any thread."""

    def __init__(self, nodes: Sequence[str], links: Sequence[Link]) -> None:
        self._nodes = nodes
        self._links = {link.between: (number, link) for number, link in enumerate(links)}
        self._relay: subprocess.Popen[str] | None = None
        self._lock = threading.Lock()

    def start(self) -> None:
        """Make everything. ResplitError if the system refuses something."""
        for node in self._nodes:
            call("ip", "netns", "add", namespace(node))
        self._start_relay()
        for number, node in enumerate(self._nodes):
            name = namespace(node)
            call("ip", "-n", name, "link", "set", "lo", "up")
            call("ip", "-n", name, "addr", "add", f"{address(number)}/32", "dev", "lo")
            call(*within(name, ["nft", "-f", "-"]), text=_TABLE)
        for _, link in self._links.values():
            for node, device, own, peer in link.ends():
                call("ip", "-n", namespace(node), "link", "set", device, "up", "txqueuelen", "1000")
                call("ip", "-n", namespace(node), "route", "add", f"{peer}/32", "dev", device, "src", own)
            self.shape(link.between, link.shape)

    def shape(self, between: tuple[str, str], shape: Shape) -> None:
        """Have a link behave like this from now on, in both directions."""
        number, link = self._links[between]
        with self._lock:
            for node, device, _, _ in link.ends():
                call("tc", "-n", namespace(node), "qdisc", "replace", "dev", device, "root", *shape.tbf())
                call(*within(namespace(node), ["nft", "-f", "-"]), text=loss_rule(device, shape.loss))
            self._tell({"link": number, "latency_s": shape.latency_s, "jitter_s": shape.jitter_s})

    def stall(self, node: str, seconds: float) -> None:
        """Hold back everything from and to a node for so long."""
        with self._lock:
            for between, (number, _) in self._links.items():
                if node in between:
                    self._tell({"link": number, "stall_s": seconds})

    def stop(self) -> None:
        """Remove everything."""
        if self._relay is not None:
            self._relay.kill()
            self._relay.wait()
        remove_namespaces()

    def _start_relay(self) -> None:
        ends = [
            "=".join(f"{namespace(node)}/{device}" for node, device, _, _ in each.ends())
            for _, each in self._links.values()
        ]
        self._relay = subprocess.Popen(
            ["nice", "-n", "-15", sys.executable, "-m", "benchmarks.testbed.relay", *ends],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        if self._relay.stdout is None or self._relay.stdout.readline() != "ready\n":
            raise ResplitError("the relay of the testbed did not start; its error stands above")

    def _tell(self, command: dict[str, float]) -> None:
        if self._relay is None or self._relay.stdin is None or self._relay.poll() is not None:
            raise ResplitError("the relay of the testbed has ended")
        self._relay.stdin.write(json.dumps(command) + "\n")
        self._relay.stdin.flush()


_TABLE = "add table inet testbed\n"


def loss_rule(device: str, loss: float) -> str:
    """Commands for nft that drop this share of what comes in through a device, instead of the former share."""
    chain = f"inet testbed from_{device.replace('-', '_')}"
    text = f"add chain {chain} {{ type filter hook input priority 0; }}\nflush chain {chain}\n"
    if loss:
        text += f"add rule {chain} iifname {device} numgen random mod 10000 <= {round(1e4 * loss) - 1} drop\n"
    return text


def remove_namespaces() -> None:
    """Remove the namespaces of the testbed, with all devices in them."""
    for line in call("ip", "netns", "list").splitlines():
        name = line.split()[0]
        if name.startswith(namespace("")):
            call("ip", "netns", "del", name)
