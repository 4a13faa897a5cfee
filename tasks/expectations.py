"""Runs the rules of a telemetry table through Great Expectations."""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from resplit.errors import DataError
from tasks.telemetry_rules import BLOCKS, NODES, RULES, Rule

__all__ = ["conclusive", "failed_rows", "forget_suites"]


def failed_rows(name: str, nodes: tuple[str, ...], blocks: tuple[str, ...], table: pd.DataFrame) -> list[list[int]]:
    """The positions of the rows of `table` that fail, for each rule of the table called `name`.

    DataError if a rule could not be evaluated: it reports no row then, and bad rows would pass as valid.
    """
    return _suite(name, nodes, blocks).failed_rows(table)


def conclusive(success: bool, rows: Sequence[int] | None, exceptions: Mapping[str, Any]) -> bool:
    """Whether the result of a rule can be trusted.

    It can if no exception was raised, and the rule succeeded without failed rows or failed with some. `rows` is None if
    the rule reported no list. Great Expectations reports either one exception or, nested, one for each metric.
    """
    nested = [info for info in exceptions.values() if isinstance(info, dict)]
    raised = any(info.get("raised_exception", False) for info in [exceptions, *nested])
    return not raised and rows is not None and success == (len(rows) == 0)


def forget_suites() -> None:
    """Build the suites again at the next call, for example after `RULES` was changed."""
    _suite.cache_clear()


class _Suite:
    """The rules of one table as a suite of Great Expectations that can be run on many tables."""

    def __init__(self, name: str, rules: Sequence[Rule], names: Mapping[str, tuple[str, ...]]) -> None:
        import great_expectations as gx

        self._rules = rules
        self._batch_definition = _batch_definition()
        self._suite = gx.ExpectationSuite(name)
        for number, rule in enumerate(rules):
            expectation = getattr(gx.expectations, rule.expectation)
            arguments = {key: _filled(value, names) for key, value in rule.arguments}
            self._suite.add_expectation(expectation(column=rule.column, meta={"rule": number}, **arguments))

    def failed_rows(self, table: pd.DataFrame) -> list[list[int]]:
        """Rows are looked for only where a rule fails: to look takes twice the time, and nearly no window has any."""
        batch = self._batch_definition.get_batch({"dataframe": table})
        passed = batch.validate(self._suite, result_format={"result_format": "BOOLEAN_ONLY"}).results
        if all(conclusive(bool(result.success), [], result.exception_info) for result in passed):
            return [[] for _ in self._rules]
        failed: list[list[int]] = [[] for _ in self._rules]
        for result in batch.validate(self._suite, result_format={"result_format": "COMPLETE"}).results:
            number = result.expectation_config.meta["rule"]
            rows = result.result.get("unexpected_index_list")
            if not conclusive(bool(result.success), rows, result.exception_info):
                raise DataError(f"the rule {self._rules[number].reason!r} cannot be evaluated: {result.exception_info}")
            failed[number] = list(rows)
        return failed


@functools.cache
def _suite(name: str, nodes: tuple[str, ...], blocks: tuple[str, ...]) -> _Suite:
    """The suite of a table, built once for each process and cluster: building takes longer than a run."""
    return _Suite(name, RULES[name], {NODES: nodes, BLOCKS: blocks})


@functools.cache
def _batch_definition() -> Any:  # great_expectations is imported late, because the import takes seconds
    """The definition that makes a batch of a data frame, in a context in memory."""
    os.environ.setdefault("GX_ANALYTICS_ENABLED", "false")
    import great_expectations as gx

    # The import sets this logger to INFO, and it logs a temporary directory.
    logging.getLogger("great_expectations.data_context.types.base").setLevel(logging.WARNING)
    context = gx.get_context(mode="ephemeral")
    context.variables.progress_bars = {"globally": False}
    asset = context.data_sources.pandas_default.add_dataframe_asset("telemetry")
    return asset.add_batch_definition_whole_dataframe("window")


def _filled(value: object, names: Mapping[str, tuple[str, ...]]) -> object:
    """An argument of a rule with its placeholders for names filled in, and None for an infinite limit."""
    if not isinstance(value, tuple):
        return None if isinstance(value, float) and np.isinf(value) else value
    return [filled for item in value for filled in names.get(str(item), (item,))]
