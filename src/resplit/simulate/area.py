"""The cluster of an area: the machines of a cluster file, many times over, at real positions with real round trips.

The round trips were measured between other machines, so they are matched by rank: of the links between two positions,
the n-th shortest one gets the n-th shortest round trip of a region.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import numpy as np

from resplit.config import ClusterConfig, LinkConfig, LinksConfig
from resplit.errors import DataError
from resplit.scenario import AreaConfig
from resplit.traces import read_columns
from resplit.types import FloatArray

__all__ = ["grown"]

_KM_PER_DEGREE = 111.2  # of latitude
_FEWEST_ROUND_TRIPS = 10


@dataclass(frozen=True)
class _Placed:
    """A machine at a position: its name, and the node of the cluster file that it is a copy of."""

    name: str
    original: str
    latitude: float
    longitude: float


def grown(cluster: ClusterConfig, area: AreaConfig, folder: Path) -> ClusterConfig:
    """`cluster` with copies of the nodes that `area` names, one at each of its positions; other nodes stay single.

    The copies at sites and at homes take turns, the most central position first. The first copy of a node keeps its
    name, later ones are called NAME-NUMBER. A link between two copies has the bandwidth of the link between their
    originals, and a link to a single node is that of the original. File names are relative to `folder`. DataError names
    the file that is missing or too short.
    """
    placed = _placed(area, folder)
    copies = [cluster.node(each.original).model_copy(update={"name": each.name}) for each in placed]
    copied = {*area.sites, *area.homes}
    single = [node for node in cluster.nodes if node.name not in copied]
    between = list(combinations(placed, 2))
    links = [
        _link(one.name, other.name, latency_s, _bandwidth(cluster, one.original, other.original))
        for (one, other), latency_s in zip(between, _latencies_s(between, area, folder).tolist(), strict=True)
    ]
    links += [
        _link(each.name, node.name, shape.latency, shape.bandwidth)
        for each in placed
        for node in single
        if (shape := cluster.link(each.original, node.name)) is not None
    ]
    declared = cluster.links
    if declared is None:
        raise DataError(f"cluster {cluster.name}: declares no links, so an area has no bandwidths to copy")
    pairs = (*declared.pairs, *links)
    return cluster.model_copy(
        update={
            "nodes": (*copies, *single),
            "links": LinksConfig.model_construct(default=declared.default, pairs=pairs),
        }
    )


def _placed(area: AreaConfig, folder: Path) -> list[_Placed]:
    """The copies, those at the most central positions first: all sites, and the first `most_homes` users."""
    rows = read_columns(folder / area.positions, ("kind", "id", "latitude", "longitude"))
    sites, homes = rows[rows.kind == "edge_server"], rows[rows.kind == "user"].head(area.most_homes)
    if len(sites) < len(area.sites) or len(homes) < len(area.homes):
        raise DataError(
            f"{folder / area.positions}: has {len(sites)} sites and {len(homes)} users; the area needs more"
        )
    centre = (float(sites.latitude.mean()), float(sites.longitude.mean()))
    placed: list[_Placed] = []
    for originals, table in ((area.sites, sites), (area.homes, homes)):
        points = sorted(
            zip(table.latitude.astype(float), table.longitude.astype(float), strict=True),
            key=lambda point: _distance_km(*centre, *point),
        )
        for place, point in enumerate(points if originals else ()):
            name = original = originals[place % len(originals)]
            if place >= len(originals):
                name = f"{original}-{place // len(originals) + 1}"
            placed.append(_Placed(name, original, *point))
    return placed


def _latencies_s(between: Sequence[tuple[_Placed, _Placed]], area: AreaConfig, folder: Path) -> FloatArray:
    """The one-way latency of each pair (P,): half of the round trip at the rank of its distance."""
    path = folder / area.round_trips
    round_trips_s = read_columns(path, ("node_a", "node_b", "rtt_median_ms")).rtt_median_ms.to_numpy(float) / 1e3
    regional_s = round_trips_s[round_trips_s <= area.within]
    if len(regional_s) < _FEWEST_ROUND_TRIPS:
        raise DataError(f"{path}: has {len(regional_s)} round trips of at most {area.within} s; an area needs more")
    distances_km = [
        _distance_km(one.latitude, one.longitude, other.latitude, other.longitude) for one, other in between
    ]
    ranks = np.argsort(np.argsort(distances_km, kind="stable"), kind="stable") / max(1, len(between) - 1)
    latencies_s: FloatArray = np.quantile(regional_s, ranks) / 2
    return latencies_s


def _bandwidth(cluster: ClusterConfig, one: str, other: str) -> float:
    """Bytes per second between copies of two nodes. Two copies of one node have the least of the links of that node."""
    peers = [node.name for node in cluster.nodes if node.name != one] if one == other else [other]
    shapes = [shape for peer in peers if (shape := cluster.link(one, peer)) is not None]
    return min(shape.bandwidth for shape in shapes)


def _link(one: str, other: str, latency_s: float, bandwidth_bytes_per_s: float) -> LinkConfig:
    return LinkConfig.model_construct(between=(one, other), latency=latency_s, bandwidth=bandwidth_bytes_per_s)


def _distance_km(latitude: float, longitude: float, other_latitude: float, other_longitude: float) -> float:
    """Over an area so small that it is flat."""
    east = (other_longitude - longitude) * math.cos(math.radians(latitude))
    return _KM_PER_DEGREE * math.hypot(other_latitude - latitude, east)
