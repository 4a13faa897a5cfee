"""Carries packets between the devices of the testbed's links, and delays them. Not every kernel has netem.

    python -m benchmarks.testbed.relay NAMESPACE/DEVICE=NAMESPACE/DEVICE ...

Makes a TUN device for each end of each link, in its namespace, writes the line "ready", and reads commands from its
standard input, one JSON object a line: {"link": 0, "latency_s": 0.02, "jitter_s": 0.01} sets a link, and {"link": 0,
"stall_s": 0.8} holds back all that it carries for so long. The devices are gone when it ends, with its input.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import heapq
import itertools
import json
import os
import random
import select
import struct
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

_TUNSETIFF, _IFF_TUN, _IFF_NO_PI = 0x400454CA, 0x0001, 0x1000
_CLONE_NEWNET = 0x40000000
_MAX_PACKET = 65_536
_AT_ONCE = 64  # packets of one device, before the others have their turn


@dataclass
class Wire:
    """One direction of a link: what it does to packets. Times are of a monotonic clock, in seconds."""

    latency_s: float = 0.0
    jitter_s: float = 0.0
    stalled_until_s: float = 0.0
    _last_due_s: float = 0.0

    def due_s(self, now_s: float) -> float:
        """When a packet that came now comes out: never before one that came earlier, nor during a stall."""
        delay_s = max(0.0, self.latency_s + random.uniform(-self.jitter_s, self.jitter_s))
        self._last_due_s = max(self._last_due_s, now_s + delay_s, self.stalled_until_s)
        return self._last_due_s


class Relay:
    """The links, each with two devices. `write` sends a packet out of a device."""

    def __init__(self, links: list[tuple[int, int]], write: Callable[[int, bytes], None]) -> None:
        self._wires = [(Wire(), Wire()) for _ in links]
        self._ways = {
            device: (wires[way], links[number][1 - way])
            for number, wires in enumerate(self._wires)
            for way, device in enumerate(links[number])
        }
        self._write = write
        self._waiting: list[tuple[float, int, int, bytes]] = []  # due, number, device, packet
        self._numbers = itertools.count()

    def set(self, command: dict[str, float], now_s: float) -> None:
        """Carry out a command for both directions of a link."""
        for wire in self._wires[int(command["link"])]:
            wire.latency_s = command.get("latency_s", wire.latency_s)
            wire.jitter_s = command.get("jitter_s", wire.jitter_s)
            if "stall_s" in command:
                wire.stalled_until_s = now_s + command["stall_s"]

    def take(self, device: int, packet: bytes, now_s: float) -> None:
        """A packet came from a device."""
        wire, out = self._ways[device]
        heapq.heappush(self._waiting, (wire.due_s(now_s), next(self._numbers), out, packet))

    def send_due(self, now_s: float) -> float | None:
        """Write what is due; returns the seconds until more is, None if nothing waits."""
        while self._waiting and self._waiting[0][0] <= now_s:
            _, _, out, packet = heapq.heappop(self._waiting)
            self._write(out, packet)
        return max(0.0, self._waiting[0][0] - now_s) if self._waiting else None


def _tun(end: str) -> int:
    """Make a TUN device in a namespace; returns its descriptor. OSError if that is not allowed."""
    namespace, device = end.split("/")
    enter(f"/run/netns/{namespace}")
    descriptor = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(descriptor, _TUNSETIFF, struct.pack("16sH22x", device.encode(), _IFF_TUN | _IFF_NO_PI))
    return descriptor


def enter(path: str) -> None:
    """Have this thread, and those that it starts, use the network namespace at `path`. OSError if it cannot."""
    libc = ctypes.CDLL(None, use_errno=True)
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        if libc.setns(descriptor, _CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), f"cannot enter {path}")
    finally:
        os.close(descriptor)


def _write(device: int, packet: bytes) -> None:
    try:
        os.write(device, packet)
    except OSError as error:
        # The receiver's queue is full, or its device is not up yet: the packet is lost, as on any link.
        if error.errno not in (errno.EAGAIN, errno.EIO):
            raise


def _drain(relay: Relay, device: int) -> None:
    for _ in range(_AT_ONCE):
        try:
            packet = os.read(device, _MAX_PACKET)
        except BlockingIOError:
            return
        relay.take(device, packet, time.monotonic())


def main() -> None:
    """Relay until the standard input ends."""
    links = [(_tun(one), _tun(other)) for one, other in (argument.split("=") for argument in sys.argv[1:])]
    relay = Relay(links, _write)
    devices = [device for link in links for device in link]
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    commands, wait_s = b"", None
    while True:
        readable, _, _ = select.select([0, *devices], [], [], wait_s)
        for descriptor in readable:
            if descriptor:
                _drain(relay, descriptor)
                continue
            more = os.read(0, _MAX_PACKET)
            if not more:
                return
            *lines, commands = (commands + more).split(b"\n")
            for line in lines:
                relay.set(json.loads(line), time.monotonic())
        wait_s = relay.send_due(time.monotonic())


if __name__ == "__main__":
    main()
