"""Telemetry is judged row by row before anything is fitted to it; what fails goes to quarantine with its reason.

Holds the rules as plain data and runs them through Great Expectations. Knows no cost model.
"""

from __future__ import annotations

import functools
import html
import logging
import os
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import structlog
from prefect import task
from prefect.cache_policies import NO_CACHE

from resplit.errors import DataError
from resplit.telemetry import TABLES, Telemetry
from resplit.types import BlockFeatures

__all__ = ["RULES", "Need", "RowFault", "Rule", "ValidTelemetry", "render_html", "validate", "validate_telemetry"]

_log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class Rule:
    """One expectation of Great Expectations on one column, and the reason that a row which fails it gets."""

    reason: str
    expectation: str
    column: str
    arguments: tuple[tuple[str, object], ...] = ()


def _present(column: str) -> Rule:
    return Rule(f"{column} is missing", "ExpectColumnValuesToNotBeNull", column)


def _between(column: str, low: float, high: float, reason: str, strict: bool = False) -> Rule:
    arguments = (("min_value", low), ("max_value", high), ("strict_min", strict))
    return Rule(reason, "ExpectColumnValuesToBeBetween", column, arguments)


def _one_of(column: str, *values: object, reason: str) -> Rule:
    return Rule(reason, "ExpectColumnValuesToBeInSet", column, (("value_set", values),))


_NODES, _BLOCKS = "$nodes", "$blocks"  # stand for the names that the cluster has
_OPTIONAL = {"gpu_utilization", "reference_s"}  # without a GPU; before the probe has run the reference layer


def _complete(table: str) -> tuple[Rule, ...]:
    return tuple(_present(column) for column in TABLES[table] if column not in _OPTIONAL)


_WHEN_AND_WHERE = (
    _between("ahead_s", -86_400, 1, "time_s lies in the future, or more than a day back"),
    _between("behind_s", -np.inf, 0, "time_s lies before an earlier row of the same node"),
    _one_of("repeated", False, reason="the row is there twice"),
    _one_of("node", _NODES, reason="node is not in this cluster"),
)
_SECONDS = _between("seconds", 0, 600, "seconds must be above 0 and at most 600", strict=True)

# Columns that no node reports (ahead_s, behind_s, own_excess, ...) are added by `_derive`.
RULES: dict[str, tuple[Rule, ...]] = {
    "nodes": (
        *_complete("nodes"),
        *_WHEN_AND_WHERE,
        _between("cpu_utilization", 0, 1 + 1e-6, "cpu_utilization must lie within 0..1"),
        _between("own_utilization", 0, 1 + 1e-6, "own_utilization must lie within 0..1"),
        _between("gpu_utilization", 0, 1 + 1e-6, "gpu_utilization must lie within 0..1"),
        _between("own_excess", -1, 0.05, "own_utilization is above cpu_utilization"),
        _between("memory_free_bytes", 0, 1e15, "memory_free_bytes must lie within 0..1e15"),
        _between("memory_held_bytes", 0, 1e15, "memory_held_bytes must lie within 0..1e15"),
        _between("reference_s", 0, 600, "reference_s must be above 0 and at most 600", strict=True),
    ),
    "links": (
        *_complete("links"),
        *_WHEN_AND_WHERE,
        _SECONDS,
        _between("payload_bytes", 0, 1e12, "payload_bytes must be above 0 and at most 1e12", strict=True),
        _between("bytes_per_s", 0, 1e11, "payload_bytes / seconds is more than any link carries (1e11 bytes/s)"),
        _one_of("peer", _NODES, reason="peer is not in this cluster"),
        _one_of("to_itself", False, reason="node and peer are the same"),
        _one_of("source", "active", "passive", reason="source must be active or passive"),
    ),
    "blocks": (
        *_complete("blocks"),
        *_WHEN_AND_WHERE,
        _SECONDS,
        _between("tokens", 1, 1e6, "tokens must lie within 1..1e6"),
        _between("context_tokens", 0, 1e7, "context_tokens must lie within 0..1e7"),
        _between("s_per_token", 0, 60, "more than a minute per token"),
        _one_of("phase", "prefill", "decode", reason="phase must be prefill or decode"),
        _one_of("block", _BLOCKS, reason="block is not in this model"),
        _one_of("other_kind", False, reason="kind is not that of the block"),
    ),
}


@dataclass(frozen=True)
class Need:
    """How many good rows there must be: reports per node, messages per directed pair, passes per phase and kind of
    block; and which share of each table must be good."""

    reports: int = 1
    messages: int = 0
    passes: int = 0
    good_share: float = 0.5


@dataclass(frozen=True)
class RowFault:
    """What one rule found in one table: how many of its rows failed."""

    table: str
    rule: Rule
    rows: int
    failed: int


@dataclass(frozen=True, eq=False)
class ValidTelemetry:
    """The rows that passed, what each rule found, and the files that hold the rows that failed."""

    telemetry: Telemetry
    findings: tuple[RowFault, ...]
    quarantine: tuple[Path, ...]

    @property
    def failed(self) -> int:
        """Failures over all rules; a row may fail several."""
        return sum(finding.failed for finding in self.findings)


def validate_telemetry(
    telemetry: Telemetry,
    nodes: Sequence[str],
    features: Sequence[BlockFeatures],
    now_s: float,
    quarantine: Path,
    lost_nodes: Collection[str] = (),
    need: Need = Need(),
) -> ValidTelemetry:
    """Judge every row of `telemetry`, as of `now_s`, for the cluster `nodes` and the model `features`.

    Rows that fail are written to one Parquet file per table in the folder `quarantine`, with a column `reason`.
    DataError where a table lacks a column or has one of another type, where a rule cannot be evaluated, and where fewer
    good rows are left than `need` says (of nodes that are not in `lost_nodes`): it names what is missing of whom.
    """
    kinds: dict[str, str] = {feature.name: feature.kind for feature in features}
    good: dict[str, pd.DataFrame] = {}
    findings: list[RowFault] = []
    files: list[Path] = []
    for name, columns in TABLES.items():
        table = _typed(name, getattr(telemetry, name), columns)
        found, reasons = _judge(name, _derive(name, table, kinds, now_s), tuple(nodes), tuple(kinds))
        good[name] = table[reasons == ""].reset_index(drop=True)
        findings += found
        if (bad := table[reasons != ""].assign(reason=reasons[reasons != ""])).size:
            files.append(_quarantine(bad, quarantine / f"{name}-{now_s:.3f}.parquet"))
            _log.warning("telemetry quarantined", table=name, rows=len(bad), of=len(table), file=str(files[-1]))
    valid = ValidTelemetry(Telemetry(**good), tuple(findings), tuple(files))
    if missing := _missing(telemetry, valid.telemetry, [node for node in nodes if node not in lost_nodes], kinds, need):
        raise DataError(f"too few good rows of telemetry: {'; '.join(missing)}" + _where(files))
    return valid


@task(name="validate", cache_policy=NO_CACHE)
def validate(
    telemetry: Telemetry,
    nodes: Sequence[str],
    features: Sequence[BlockFeatures],
    now_s: float,
    quarantine: Path,
    lost_nodes: Collection[str] = (),
    need: Need = Need(),
) -> ValidTelemetry:
    """`validate_telemetry` as a task."""
    return validate_telemetry(telemetry, nodes, features, now_s, quarantine, lost_nodes, need)


def _typed(name: str, table: pd.DataFrame, columns: dict[str, str]) -> pd.DataFrame:
    """The table with exactly `columns`, of their types, and a plain index (named or repeated ones hide rows)."""
    if absent := [column for column in columns if column not in table]:
        raise DataError(f"telemetry table {name}: no column {', '.join(absent)}")
    try:
        return table[list(columns)].reset_index(drop=True).astype(columns)
    except (TypeError, ValueError) as error:
        raise DataError(f"telemetry table {name}: a column is of another type: {error}") from error


def _derive(name: str, table: pd.DataFrame, kinds: dict[str, str], now_s: float) -> pd.DataFrame:
    """The table with a column for each thing that a rule asks and no single reported column says."""
    # A clock that is ahead must not make the honest rows after it look late.
    past = table["time_s"].where(table["time_s"] <= now_s + 1)
    identity = ["time_s", "node"] if name == "nodes" else list(table.columns)
    common = table.assign(
        ahead_s=table["time_s"] - now_s,
        behind_s=past.groupby(table["node"]).cummax() - table["time_s"],
        repeated=table.duplicated(identity),
    )
    if name == "nodes":
        return common.assign(own_excess=table["own_utilization"] - table["cpu_utilization"])
    if name == "links":
        return common.assign(
            bytes_per_s=table["payload_bytes"] / table["seconds"].where(table["seconds"] > 0),
            to_itself=table["node"] == table["peer"],
        )
    return common.assign(
        s_per_token=table["seconds"] / table["tokens"].where(table["tokens"] > 0),
        other_kind=table["block"].isin(kinds) & (table["block"].map(kinds) != table["kind"]),
    )


def _judge(
    name: str, table: pd.DataFrame, nodes: tuple[str, ...], blocks: tuple[str, ...]
) -> tuple[list[RowFault], pd.Series]:
    """What each rule finds in the table, and the reasons of each row, "" where none."""
    reasons = np.full(len(table), "", dtype=object)
    findings = []
    # An empty table passes every rule; whether it may be empty is for `_missing` to say.
    results = _expectations(name, nodes, blocks).validate(table) if len(table) else [[] for _ in RULES[name]]
    for rule, failed in zip(RULES[name], results, strict=True):
        findings.append(RowFault(name, rule, len(table), len(failed)))
        for row in failed:
            reasons[row] += ("; " if reasons[row] else "") + rule.reason
    return findings, pd.Series(reasons, index=table.index)


class _Expectations:
    """One table's rules as a suite of Great Expectations, to be run on many tables."""

    def __init__(self, name: str, rules: Sequence[Rule], names: dict[str, tuple[str, ...]]) -> None:
        import great_expectations as gx

        self._rules = rules
        self._batches = _batches()
        self._suite = gx.ExpectationSuite(name)
        for number, rule in enumerate(rules):
            expectation = getattr(gx.expectations, rule.expectation)
            arguments = {key: _filled(value, names) for key, value in rule.arguments}
            self._suite.add_expectation(expectation(column=rule.column, meta={"rule": number}, **arguments))

    def validate(self, table: pd.DataFrame) -> list[list[int]]:
        """Positions of the rows that fail, by rule. DataError where a rule could not be evaluated: it then reports no
        row at all, and bad rows would pass as good ones."""
        batch = self._batches.get_batch({"dataframe": table})
        outcome = batch.validate(self._suite, result_format={"result_format": "COMPLETE"})
        failed: list[list[int]] = [[] for _ in self._rules]
        for result in outcome.results:
            number = result.expectation_config.meta["rule"]
            rows = result.result.get("unexpected_index_list")
            if _raised(result.exception_info) or rows is None or bool(rows) == bool(result.success):
                raise DataError(f"the rule {self._rules[number].reason!r} cannot be evaluated: {result.exception_info}")
            failed[number] = list(rows)
        return failed


@functools.cache
def _expectations(name: str, nodes: tuple[str, ...], blocks: tuple[str, ...]) -> _Expectations:
    """Built once per process and cluster: that costs more than a run."""
    return _Expectations(name, RULES[name], {_NODES: nodes, _BLOCKS: blocks})


@functools.cache
def _batches() -> Any:
    """What turns a data frame into a batch, in a context in memory (Any: imported late, for it takes seconds)."""
    os.environ.setdefault("GX_ANALYTICS_ENABLED", "false")
    import great_expectations as gx

    # This one logger is set to INFO on import, and tells of a temporary directory.
    logging.getLogger("great_expectations.data_context.types.base").setLevel(logging.WARNING)
    context = gx.get_context(mode="ephemeral")
    context.variables.progress_bars = {"globally": False}
    asset = context.data_sources.pandas_default.add_dataframe_asset("telemetry")
    return asset.add_batch_definition_whole_dataframe("window")


def _filled(value: object, names: dict[str, tuple[str, ...]]) -> object:
    """An argument with the place-holders of names filled in."""
    if not isinstance(value, tuple):
        return None if isinstance(value, float) and np.isinf(value) else value
    return [filled for item in value for filled in names.get(str(item), (item,))]


def _raised(exception_info: dict[str, Any]) -> bool:
    """Great Expectations reports either one exception or one for each metric."""
    nested = [info for info in exception_info.values() if isinstance(info, dict)]
    return any(info.get("raised_exception", False) for info in [exception_info, *nested])


def _quarantine(rows: pd.DataFrame, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    rows.to_parquet(path, index=False)
    return path


def _missing(seen: Telemetry, good: Telemetry, nodes: Sequence[str], kinds: dict[str, str], need: Need) -> list[str]:
    """What `need` asks for and the good rows do not have, in words."""
    missing = [
        f"{name}: {len(getattr(good, name))} of {len(table)} rows are good"
        for name in TABLES
        if len(getattr(good, name)) < need.good_share * len(table := getattr(seen, name))
    ]
    reports = good.nodes["node"].value_counts()
    messages = good.links.groupby(["node", "peer"]).size()
    passes = good.blocks.groupby(["phase", "kind"]).size()
    pairs = [(node, peer) for node in nodes for peer in nodes if node != peer]
    phases = [(phase, kind) for phase in ("prefill", "decode") for kind in dict.fromkeys(kinds.values())]
    missing += [f"{reports.get(node, 0)} reports of {node}" for node in nodes if reports.get(node, 0) < need.reports]
    missing += [f"{messages.get(p, 0)} messages {p[0]} -> {p[1]}" for p in pairs if messages.get(p, 0) < need.messages]
    return missing + [f"{passes.get(p, 0)} {p[0]} passes of {p[1]}" for p in phases if passes.get(p, 0) < need.passes]


def _where(files: list[Path]) -> str:
    return f" (the bad ones are in {files[0].parent})" if files else ""


def render_html(valid: ValidTelemetry, title: str = "Telemetry") -> str:
    """One page that stands alone: each rule, the rows it saw and those that failed it."""
    rows = "\n".join(
        f'<tr class="{"bad" if finding.failed else "good"}"><td>{finding.table}</td>'
        f"<td>{html.escape(finding.rule.column)}</td><td>{html.escape(finding.rule.reason)}</td>"
        f"<td>{finding.rows}</td><td>{finding.failed}</td></tr>"
        for finding in valid.findings
    )
    kept = {name: len(getattr(valid.telemetry, name)) for name in TABLES}
    summary = ", ".join(f"{name} {count}" for name, count in kept.items())
    files = "".join(f"<li>{html.escape(str(path))}</li>" for path in valid.quarantine)
    return _PAGE.format(title=html.escape(title), summary=summary, rows=rows, files=files or "<li>none</li>")


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>
body {{ font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 60rem; color: #1f2328 }}
table {{ border-collapse: collapse; width: 100% }} th, td {{ text-align: left; padding: .3rem .6rem }}
tr {{ border-bottom: 1px solid #dfe3e8 }} .bad td {{ background: #fbe9e4 }} td:nth-child(n+4) {{ text-align: right }}
</style></head><body><h1>{title}</h1><p>Good rows: {summary}.</p>
<table><thead><tr><th>table</th><th>column</th><th>a row fails where</th><th>rows</th><th>failed</th></tr></thead>
<tbody>
{rows}
</tbody></table><h2>Quarantine</h2><ul>{files}</ul></body></html>
"""
