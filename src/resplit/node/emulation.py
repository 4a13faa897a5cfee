"""The hardware that a node plays: how long each pass must take, and how far off the truth was.

Pads real compute to declared times. Knows no sockets; the executor's thread sleeps, and never spins.
"""

from __future__ import annotations

import statistics
import time
from collections import deque
from dataclasses import dataclass, replace

from resplit.config import Emulation


@dataclass(frozen=True)
class Hardware:
    """Declared times of one emulated node, in seconds, as they stand now.

    A pass of n new tokens through a block takes `decode + n * prefill` if it is a prefill and `decode` if not: the
    fixed cost of a pass is that of a decode step, as the placement problem has it. `slowdown` multiplies both; while
    others use `background_utilization` of the node, all takes 1 / (1 - background_utilization) times as long.
    """

    decode_s: dict[str, float]
    prefill_s: dict[str, float]
    slowdown: float = 1.0
    background_utilization: float = 0.0

    @classmethod
    def declared(cls, emulation: Emulation) -> Hardware:
        """As the cluster file declares it."""
        return cls(
            emulation.decode_per_token.model_dump(),
            emulation.prefill_per_token.model_dump(),
            background_utilization=emulation.background_utilization,
        )

    def changed(self, slowdown: float | None, background_utilization: float | None) -> Hardware:
        """The same node under other conditions; None leaves a condition as it is."""
        slowdown = self.slowdown if slowdown is None else slowdown
        background = self.background_utilization if background_utilization is None else background_utilization
        return replace(self, slowdown=slowdown, background_utilization=background)

    def node_s(self, kind: str, tokens: int, decoding: bool) -> float:
        """Node time of one pass through a block of this kind, background aside."""
        # Attention and mlp are halves of a layer; who splits so finely declares times for layers.
        share, kind = (0.5, "layer") if kind in ("attention", "mlp") else (1.0, kind)
        fixed_s = self.decode_s[kind]
        return share * self.slowdown * (fixed_s if decoding else fixed_s + tokens * self.prefill_s[kind])

    def elapsed_s(self, kind: str, tokens: int, decoding: bool) -> float:
        """Wall time of the same pass."""
        return self.node_s(kind, tokens, decoding) / (1 - self.background_utilization)


class Padding:
    """Stretches one pass block by block to the declared time; deadlines add up, so errors do not."""

    def __init__(self, hardware: Hardware, errors: deque[float]) -> None:
        self._hardware = hardware
        self._errors = errors
        self._begun_s = time.perf_counter()
        self._due_s = self._begun_s

    def after_block(self, kind: str, tokens: int, decoding: bool) -> None:
        """Sleep until the block would have been done on the emulated hardware."""
        self._due_s += self._hardware.elapsed_s(kind, tokens, decoding)
        wait_s = self._due_s - time.perf_counter()
        if wait_s > 0:
            time.sleep(wait_s)

    def finish(self) -> None:
        """Note how far the whole pass was off, relative to what was declared."""
        declared_s = self._due_s - self._begun_s
        self._errors.append((time.perf_counter() - self._begun_s) / declared_s - 1)


def median_error(errors: deque[float]) -> float:
    """Median absolute relative error of the passes, NaN before there was one."""
    return statistics.median(abs(error) for error in errors) if errors else float("nan")
