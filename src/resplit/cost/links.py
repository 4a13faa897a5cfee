"""The link model: the time of a message is a latency plus its payload divided by a bandwidth."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from resplit.cost.robust import huber_lines
from resplit.types import FloatArray

__all__ = ["LinkModel", "fit_links"]

Pair = tuple[str, str]
PASSIVE_WEIGHT = 0.5  # of an activation, which may have waited for another message; a probe is sent alone
SPREAD = 2.0  # least ratio of largest to smallest payload at which latency and bandwidth can be separated
MIN_S_PER_BYTE = 1e-11  # 100 GB/s: no link is assumed to be faster


@dataclass(frozen=True)
class LinkModel:
    """One directed link: seconds = latency_s + payload_bytes * s_per_byte, with the standard errors of both.

    `rows` is the number of messages in the last window that had any.
    """

    node: str
    peer: str
    latency_s: float
    s_per_byte: float
    latency_error_s: float
    s_per_byte_error: float
    rows: int

    @property
    def bandwidth_bytes_per_s(self) -> float:
        """Bytes per second, finite."""
        return 1 / max(self.s_per_byte, MIN_S_PER_BYTE)

    def seconds(self, payload_bytes: float) -> float:
        """The predicted one-way time of a message."""
        return self.latency_s + payload_bytes * self.s_per_byte


def fit_links(messages: pd.DataFrame, previous: Iterable[LinkModel] = ()) -> tuple[LinkModel, ...]:
    """Fit one model to the messages (columns `telemetry.LINK_COLUMNS`) of each directed pair of nodes.

    Pairs without messages keep their models of `previous`.
    If all payloads of a pair have about the same size, only its latency is fitted. Its bandwidth is then the previous
    one, or else that of the opposite direction, or else the median of the cluster.
    """
    columns = _Messages.of(messages)
    groups = messages.groupby(["node", "peer"], sort=True).indices
    pairs = {(str(pair[0]), str(pair[1])): columns.at(np.asarray(at)) for pair, at in groups.items()}  # type: ignore[index]
    before = {(link.node, link.peer): link for link in previous}
    full = _fit_both({pair: rows for pair, rows in pairs.items() if rows.spread >= SPREAD}, before)
    known = before | full
    narrow = {pair: _fit_latency(pair, rows, known) for pair, rows in pairs.items() if pair not in full}
    return tuple(link for _, link in sorted((known | narrow).items()))


@dataclass(frozen=True, eq=False)
class _Messages:
    """Columns (R,) of messages as arrays: a cluster of N nodes has N (N - 1) links, too many for a table each."""

    payload_bytes: FloatArray
    seconds: FloatArray
    weights: FloatArray

    @classmethod
    def of(cls, messages: pd.DataFrame) -> _Messages:
        weights = np.where(messages["source"] == "passive", PASSIVE_WEIGHT, 1.0)
        return cls(messages["payload_bytes"].to_numpy(), messages["seconds"].to_numpy(), weights)

    def at(self, positions: NDArray[np.intp]) -> _Messages:
        return _Messages(self.payload_bytes[positions], self.seconds[positions], self.weights[positions])

    @property
    def spread(self) -> float:
        """The ratio of the largest payload to the smallest one."""
        return float(self.payload_bytes.max() / self.payload_bytes.min())


def _fit_both(pairs: Mapping[Pair, _Messages], before: Mapping[Pair, LinkModel]) -> dict[Pair, LinkModel]:
    """Latency and bandwidth of each pair. Pairs with equally many messages are fitted at once."""
    by_count: dict[int, list[Pair]] = {}
    for pair, rows in pairs.items():
        by_count.setdefault(len(rows.seconds), []).append(pair)
    fitted = {}
    for count, alike in by_count.items():
        payload, seconds, weights = (
            np.stack([getattr(pairs[pair], column) for pair in alike])  # (P, R)
            for column in ("payload_bytes", "seconds", "weights")
        )
        guess = np.array([_coefficients(before.get(pair)) for pair in alike])  # (P, 2)
        lines = huber_lines(payload, seconds, weights, guess)
        for pair, coefficients, errors in zip(alike, lines.coefficients.tolist(), lines.errors.tolist(), strict=True):
            (latency_s, s_per_byte), (latency_error_s, s_per_byte_error) = coefficients, errors
            fitted[pair] = LinkModel(*pair, latency_s, s_per_byte, latency_error_s, s_per_byte_error, count)
    return fitted


def _coefficients(link: LinkModel | None) -> tuple[float, float]:
    return (np.nan, np.nan) if link is None else (link.latency_s, link.s_per_byte)


def _fit_latency(pair: Pair, rows: _Messages, known: dict[Pair, LinkModel]) -> LinkModel:
    """The latency, with the bandwidth from another model. Without one, latency is the whole time."""
    model = known.get(pair) or known.get(pair[::-1])
    slopes = [model.s_per_byte] if model else [link.s_per_byte for link in known.values()]
    s_per_byte = float(np.median(slopes)) if slopes else 0.0
    rest = rows.seconds - rows.payload_bytes * s_per_byte
    latency = max(float(np.median(rest)), 0.0)
    error = float(1.4826 * np.median(np.abs(rest - latency)) / np.sqrt(len(rest)))
    fitted = LinkModel(*pair, latency, s_per_byte, error, s_per_byte, len(rest))
    return replace(fitted, s_per_byte_error=model.s_per_byte_error) if model else fitted
