"""How the control loops of a simulated cluster run: how often, over which window, and how long their plans take."""

from __future__ import annotations

from dataclasses import dataclass, field

from resplit.decide import Settings

__all__ = ["Loop"]


@dataclass(frozen=True)
class Loop:
    """The loops: the period and window of ticks, how long planning takes, and how losses are noticed.

    A reaction takes `reaction_s`, or `ready_reaction_s` if its search starts from plans that were made ahead. Such a
    plan takes `ahead_s`; with `prepares` false, none is made, and no blocks stand by.

    The cost model is fitted again at the next tick after a detected change or a move, and else every `fit_s`. Between
    fits the estimate follows nodes and links.
    """

    settings: Settings = field(default_factory=lambda: Settings(work_limit=2000))
    period_s: float = 3.0
    window_s: float = 20.0
    fit_s: float = 10.0
    tick_s: float = 0.5
    reaction_s: float = 0.2
    ready_reaction_s: float = 0.1
    ahead_s: float = 0.3
    prepares: bool = True
    noticed_s: float = 0.55
