"""Emulated hardware: passes are padded to the declared times by sleeping, and the error of the padding is recorded."""

from __future__ import annotations

import statistics
import time
from collections import deque
from dataclasses import dataclass, replace

from resplit.config import Emulation


@dataclass(frozen=True)
class Load:
    """What one pass computes: a decode step for each of `decodes` sessions, and `prefill_tokens` of a prompt."""

    decodes: int
    prefill_tokens: int


ONE_STEP = Load(1, 0)
_DELAY_STEP_S = 5e-6  # by which the usual delay of a sleeper follows each delay


@dataclass(frozen=True)
class Hardware:
    """The current times of one emulated node, in seconds by kind of block.

    A pass takes `fixed_s`, `session_s` more for each session that decodes, and for a prompt `session_s` and
    `prefill_s` more for each token. In the placement problem, too, the fixed cost of a prefill is that of a decode
    step. `slowdown` multiplies all. With background load everything takes 1 / (1 - background_utilization) times as
    long.
    """

    fixed_s: dict[str, float]
    session_s: dict[str, float]
    prefill_s: dict[str, float]
    slowdown: float = 1.0
    background_utilization: float = 0.0

    @classmethod
    def declared(cls, emulation: Emulation) -> Hardware:
        """The hardware that the cluster file declares."""
        decode = emulation.decode_per_token.parts()
        return cls(
            {kind: fixed for kind, (fixed, _) in decode.items()},
            {kind: session for kind, (_, session) in decode.items()},
            emulation.prefill_per_token.model_dump(),
            background_utilization=emulation.background_utilization,
        )

    def changed(self, slowdown: float | None, background_utilization: float | None) -> Hardware:
        """The same node with another slowdown or background load; None keeps the value."""
        slowdown = self.slowdown if slowdown is None else slowdown
        background = self.background_utilization if background_utilization is None else background_utilization
        return replace(self, slowdown=slowdown, background_utilization=background)

    def node_s(self, kind: str, load: Load = ONE_STEP) -> float:
        """Seconds of one pass through a block of this kind, without background load."""
        # Times are declared for layers; attention and mlp count as one half each.
        share, kind = (0.5, "layer") if kind in ("attention", "mlp") else (1.0, kind)
        sessions = load.decodes + (1 if load.prefill_tokens else 0)
        pass_s = self.fixed_s[kind] + sessions * self.session_s[kind] + load.prefill_tokens * self.prefill_s[kind]
        return share * self.slowdown * pass_s

    def elapsed_s(self, kind: str, load: Load = ONE_STEP) -> float:
        """Seconds of the same pass on the clock, with background load."""
        return self.node_s(kind, load) / (1 - self.background_utilization)


class WakeDelay:
    """How long after its time the host usually wakes a thread that sleeps: the median, followed in small steps.

    A pass would take as much longer as the delay after its last block. So each sleep is shorter by the usual delay.
    """

    def __init__(self) -> None:
        self.usual_s = 0.0

    def sleep_until(self, due_s: float) -> None:
        """Sleep so that the thread usually wakes at `due_s` (`time.perf_counter`)."""
        aim_s = due_s - self.usual_s
        if (left_s := aim_s - time.perf_counter()) > 0:
            time.sleep(left_s)
            later = time.perf_counter() - aim_s > self.usual_s
            self.usual_s = max(0.0, self.usual_s + (_DELAY_STEP_S if later else -_DELAY_STEP_S))


class Padding:
    """Pads one pass, block by block, to the declared time.

    Each block is due at the sum of the declared times so far, so that errors of single blocks do not add up. What the
    host adds is no time of the device: other emulated nodes share its cores, and this node loads blocks beside its
    passes. So a pass takes the declared time, or the processor time of its thread where that is longer.
    """

    def __init__(self, hardware: Hardware, errors: deque[float], wake_delay: WakeDelay) -> None:
        self._hardware = hardware
        self._errors = errors
        self._wake_delay = wake_delay
        self._begun_s, self._begun_cpu_s = time.perf_counter(), time.thread_time()
        self._dues_s = [0.0]  # of the blocks so far, from the begin of the pass

    def after_block(self, kind: str, load: Load) -> None:
        """Sleep until the block would be done on the emulated hardware."""
        due_s = self._dues_s[-1] + self._hardware.elapsed_s(kind, load)
        self._dues_s.append(due_s)
        self._wake_delay.sleep_until(self._begun_s + due_s)

    def finish(self) -> list[float]:
        """When each block of the pass was done on the emulated hardware, in seconds from the begin of the pass, which
        comes first. Records the relative error of the pass on the clock.

        Where the processor time was longer than declared, all blocks took longer in proportion. Single blocks must not
        be timed: one after a late block is shorter than declared, until the pass is on time again. No hardware does
        that, and a fit to such times would follow them.
        """
        declared_s = self._dues_s[-1]
        self._errors.append((time.perf_counter() - self._begun_s) / declared_s - 1)
        longer = max(1.0, (time.thread_time() - self._begun_cpu_s) / declared_s)
        return [longer * due_s for due_s in self._dues_s]


def median_error(errors: deque[float]) -> float:
    """Median absolute relative error of the passes, NaN without any."""
    known = list(errors)  # at once, for the thread that computes adds more
    return statistics.median(map(abs, known)) if known else float("nan")
