"""Measuring again in simulated time, by the rules of `control/repeated_measurements.py`."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from resplit.control.repeated_measurements import PAUSE_S, Link, RepeatedMeasurements, Series
from resplit.simulate.agenda import Agenda
from resplit.simulate.reports import Reports

__all__ = ["SimulatedRemeasurement"]


class SimulatedRemeasurement:
    """Has the nodes of one cluster report and measure links again. `doubted` are the links that are doubted now."""

    def __init__(self, reports: Reports, doubted: Callable[[], Sequence[Link]], agenda: Agenda) -> None:
        self._reports = reports
        self._doubted = doubted
        self._agenda = agenda
        self._measurements = RepeatedMeasurements()

    @property
    def may_end_doubts(self) -> bool:
        """Whether links are doubted, and are being measured."""
        return self._measurements.are_under_way and bool(self._doubted())

    def of_node(self, node: str) -> None:
        """Have a node report now, unless it was asked a moment ago."""
        if self._measurements.ask(node, self._agenda.now_s):
            self._reports.ask(node)

    def of_links(self, links: Sequence[Link]) -> None:
        """Measure links now, unless that is under way, and again while they are doubted."""
        if series := self._measurements.begin(links):
            self._measure(series)

    def _measure(self, series: Series) -> None:
        self._reports.measure(series.left, lambda: self._measured(series))

    def _measured(self, series: Series) -> None:
        series.measured(set(self._doubted()))
        if series.is_over:
            self._measurements.end(series)
        else:
            self._agenda.after(PAUSE_S, self._measure, series)
