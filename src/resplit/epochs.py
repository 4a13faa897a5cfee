"""Epochs as values: proposed placements, and placements that are or were live.

An epoch is a numbered deployed placement. The controller writes epochs; flows propose them and read their history.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

from pydantic import ConfigDict, Field

RECOVER = "recover"  # the action of an epoch that replaces one that could not serve any more after a loss


@dataclass(frozen=True)
class Proposal:
    """A placement to deploy, one node name per block. `based_on` is the epoch against which it was planned.

    `note` says what its plan does not keep: ceilings on utilisation, or a part of the demand. Nodes prepare it at once.
    If `not_before_s` (seconds since 1970) is given, it goes live then, and until then it gives way to others.
    """

    __pydantic_config__: ClassVar[ConfigDict] = {"extra": "forbid"}  # applies when a proposal is parsed

    placement: tuple[str, ...]
    action: str
    based_on: Annotated[int, Field(ge=0)]
    predicted_latency_s: float | None = None
    lower_bound: float | None = None
    note: Annotated[str, Field(max_length=2000)] = ""
    not_before_s: Annotated[float, Field(allow_inf_nan=False)] | None = None


@dataclass(frozen=True)
class LiveEpoch:
    """A placement that was committed at `committed_s` (seconds since 1970).

    `loaded_bytes` are the weights that nodes loaded for it, `longest_load_bytes` those of them that one node loaded at
    most: nodes load in parallel. `ready_bytes` are those that new hosts had loaded before it was proposed. `prepare_s`
    is the time from the proposal to the commit.
    `staged`: passes were paused meanwhile, because old and new blocks did not fit beside each other. `note` is that of
    the proposal.
    """

    epoch: int
    committed_s: float
    action: str
    placement: tuple[str, ...]
    predicted_latency_s: float | None
    lower_bound: float | None
    loaded_bytes: float
    prepare_s: float
    staged: bool = False
    note: str = ""
    ready_bytes: float = 0.0
    longest_load_bytes: float = 0.0
