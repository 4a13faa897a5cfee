"""The message with which the gateway begins a pass of a session."""

from __future__ import annotations

from collections.abc import Sequence

from resplit.gateway.engine import GenerationRequest
from resplit.model.activation import token_ids
from resplit.wire.choices import changes_to_wire, sampling_to_wire
from resplit.wire.node_pb2 import Step
from resplit.wire.tensors import to_wire


def pass_message(
    request: GenerationRequest, tokens: tuple[int, ...], stepwise: bool = False, drafts: int = 0, follow_until: int = 0
) -> Step:
    """The step of a pass of `tokens`, the last of which are drafts. The sender adds where and when it runs.

    With `stepwise`, every position gets the bits of a pass of its own. The node of the head may begin the passes after
    this one that start before position `follow_until`.
    """
    return Step(
        segment=0,
        values=to_wire(token_ids(tokens)),
        sampling=sampling_to_wire(request.sampling),
        stepwise=stepwise or drafts > 0,
        drafts=drafts,
        follow_until=follow_until,
        stop_ids=sorted(request.stop_ids) if follow_until else (),
    )


def add_wishes(
    message: Step, request: GenerationRequest, made: Sequence[int], drafts: tuple[int, ...], is_prompt: bool
) -> None:
    """Add what only some requests want: changes of logits after the tokens `made`, and log probabilities."""
    if request.steering is not None:
        message.changes.extend(changes_to_wire(request.steering.changes(made, drafts)))
    if request.logprobs is not None:
        message.logprobs = 1 + request.logprobs
        if request.score_prompt and is_prompt:
            message.scored.extend(request.prompt_ids[1:])
