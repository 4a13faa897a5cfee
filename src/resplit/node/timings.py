"""How long blocks took in the passes that a node ran, for its telemetry."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from resplit.node.batching import Batch


@dataclass(frozen=True)
class Timing:
    """Node time of one block in one pass of `sessions` sessions, without the time that background load added.

    The pass ended at `time_s`, in seconds since 1970. `tokens` are those of all sessions, `context_tokens` is the mean
    number of tokens cached before the pass.
    """

    time_s: float
    block: int
    phase: str
    tokens: int
    context_tokens: int
    sessions: int
    seconds: float


def timings_of(batch: Batch, kinds: Sequence[str], block_s: Sequence[float], turn: int, now_s: float) -> list[Timing]:
    """The timing of one block of each kind in a batch that ended at `now_s`: blocks of a kind take equal times.

    `block_s` has the node time of each block of the batch, in order; `kinds` has the kind of every block of the model.
    Each `turn` takes other blocks. Nothing is known of a batch that mixes decode steps and a prompt, because it is of
    neither phase, of one that is stepwise, and of a prompt that runs through one half of the blocks.
    """
    sessions = len(batch.parts)
    mixed = 0 < batch.decodes < sessions or batch.prompt_half
    if mixed or any(part.waiting.work.stepwise for part in batch.parts):
        return []
    alike: dict[str, list[int]] = {}
    for block in range(batch.first, batch.last + 1):
        alike.setdefault(kinds[block], []).append(block)
    phase = "decode" if batch.decodes else "prefill"
    tokens = sum(part.tokens for part in batch.parts)
    context_tokens = round(sum(part.waiting.work.start + part.waiting.done for part in batch.parts) / sessions)
    chosen = [blocks[turn % len(blocks)] for blocks in alike.values()]
    return [
        Timing(now_s, block, phase, tokens, context_tokens, sessions, block_s[block - batch.first]) for block in chosen
    ]
