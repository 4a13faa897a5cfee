"""The record of a run: requests, tokens, node use, events, epochs and decisions as tables.

The columns and their units are defined here; `metrics` computes with them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from resplit.decide import Decision, DecisionOutcome
from resplit.telemetry.tables import frame

# Columns `..._s` that hold a point in time count seconds from the start of the run.
# One row for each request offered. `status` is the HTTP status, or 0 if the connection failed. Times of events that did
# not happen are NaN. `private_ok`: all its private blocks ran on trusted nodes. `epochs`: how many epochs served it.
REQUEST_COLUMNS = {
    "request_class": "str",
    "arrival_s": "float64",
    "first_token_s": "float64",
    "end_s": "float64",
    "prompt_tokens": "int64",
    "new_tokens": "int64",
    "status": "int64",
    "slo_s": "float64",  # NaN without a service objective
    "private_ok": "bool",
    "epochs": "int64",
    "waited_s": "float64",  # where the time of its passes went: in queues of nodes, in batches, between nodes
    "computed_s": "float64",
    "hops_s": "float64",
}
# One row for each token that left the gateway.
TOKEN_COLUMNS = {"time_s": "float64", "request": "int64"}
# One row for each node and sampling period: its utilisation u_i, and the part of it that is resplit's.
USE_COLUMNS = {"time_s": "float64", "node": "str", "utilization": "float64", "own_utilization": "float64"}
# One row for each event: kind is "change" (by the scenario), "reconfiguration" (an epoch was committed), "phase" (what
# changed, and which nodes and links: see `reaction`) or "foreseen" (a policy that knows the scenario moves here).
EVENT_COLUMNS = {"time_s": "float64", "kind": "str", "label": "str"}
# One row for each epoch that was live. `placement` names the node of each block, in order, separated by commas.
EPOCH_COLUMNS = {
    "epoch": "int64",
    "time_s": "float64",
    "action": "str",  # initial, or the action of the decision that led to the epoch
    "placement": "str",
    "predicted_latency_s": "float64",
    "lower_bound": "float64",
    "moved_bytes": "float64",
    "pause_s": "float64",
}
# One row for each decision. `decision` is the whole of it as JSON, with the alternatives and their prices; the other
# columns are taken from it for queries.
DECISION_COLUMNS = {
    "time_s": "float64",
    "action": "str",
    "reason": "str",
    "latency_s": "float64",  # predicted for the choice; NaN where nothing was chosen among alternatives, as `net_gain`
    "net_gain": "float64",
    "epoch": "Int64",  # that was deployed, if any
    "refused": "str",  # why the controller refused it, or empty
    "decision": "str",
}
TABLES = {
    "requests": REQUEST_COLUMNS,
    "tokens": TOKEN_COLUMNS,
    "use": USE_COLUMNS,
    "events": EVENT_COLUMNS,
    "epochs": EPOCH_COLUMNS,
}
_DECISIONS = "decisions.parquet"


@dataclass(frozen=True, eq=False)
class RunRecord:
    """Everything that was measured in one run of one policy. `decisions` is the decision log of the run."""

    policy: str
    scenario: str
    seed: int
    duration_s: float
    requests: pd.DataFrame
    tokens: pd.DataFrame
    use: pd.DataFrame
    events: pd.DataFrame
    epochs: pd.DataFrame
    decisions: tuple[Decision, ...] = ()
    blocks: tuple[str, ...] = ()
    emulated_nodes: tuple[str, ...] = ()
    source: str = ""  # the node at which the gateway stands
    emulation_error: float = float("nan")  # median of |padded / declared - 1| over the segments that ran
    # At the end of the run, against what was true then: the medians of `estimate.error.EstimateErrors`.
    estimate_errors: dict[str, float] = field(default_factory=dict)

    def save(self, folder: Path) -> None:
        """Write one Parquet file for each table, decisions included, and `run.json`, into `folder`."""
        folder.mkdir(parents=True, exist_ok=True)
        for name in TABLES:
            getattr(self, name).to_parquet(folder / f"{name}.parquet", index=False)
        _decision_table(self.decisions).to_parquet(folder / _DECISIONS, index=False)
        plain = {key: value for key, value in vars(self).items() if key not in (*TABLES, "decisions")}
        (folder / "run.json").write_text(json.dumps(plain, indent=1), encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> RunRecord:
        """Read the files that `save` wrote into `folder`."""
        plain = json.loads((folder / "run.json").read_text(encoding="utf-8"))
        # Records of earlier runs have the decisions in `run.json`.
        entries = plain["decisions"] if "decisions" in plain else _decision_entries(folder / _DECISIONS)
        plain["decisions"] = tuple(Decision.from_json(entry) for entry in entries)
        plain["blocks"] = tuple(plain["blocks"])
        plain["emulated_nodes"] = tuple(plain["emulated_nodes"])
        return cls(**plain | {name: pd.read_parquet(folder / f"{name}.parquet") for name in TABLES})


def table(name: str, rows: list[dict[str, object]]) -> pd.DataFrame:
    """The table called `name`, from one dictionary for each row; DataError if a row lacks a column."""
    return frame(rows, TABLES[name])


def _decision_table(decisions: Sequence[Decision]) -> pd.DataFrame:
    return frame([_decision_row(decision) for decision in decisions], DECISION_COLUMNS)


def _decision_row(decision: Decision) -> dict[str, object]:
    chosen, outcome = decision.chosen, decision.outcome or DecisionOutcome()
    return {
        "time_s": decision.at_s,
        "action": decision.action,
        "reason": decision.reason,
        "latency_s": chosen.latency_s if chosen else math.nan,
        "net_gain": chosen.net_gain if chosen else math.nan,
        "epoch": outcome.deployed,
        "refused": outcome.refused or "",
        "decision": json.dumps(decision.to_json()),
    }


def _decision_entries(path: Path) -> list[dict[str, Any]]:
    return [json.loads(entry) for entry in pd.read_parquet(path, columns=["decision"]).decision]
