"""A cluster that is grown over an area: copies at positions, with the round trips of a region."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest

from resplit.config import ClusterConfig, LinkShape, load_cluster
from resplit.errors import ConfigError, DataError
from resplit.scenario import AreaConfig, load_scenario
from resplit.simulate.area import grown

METROPOLIS = Path("data/scenarios/metropolis.yaml")
# Along a line to the east: sites at 0, 1, 2 and 3 steps, users at 4 and 5.
POSITIONS = "kind,id,latitude,longitude\n" + "".join(
    f"{kind},{number},-37.8,{144.9 + 0.01 * step}\n"
    for kind, number, step in [
        ("edge_server", 0, 0), ("edge_server", 1, 1), ("edge_server", 2, 2), ("edge_server", 3, 3),
        ("user", 0, 4), ("user", 1, 5), ("user", 2, 6),
    ]
)  # fmt: skip
ROUND_TRIPS_MS = [*range(2, 21), 150, 160]


@pytest.fixture
def traces(tmp_path: Path) -> Path:
    rows = "".join(f"0,{5 * number},{ms}\n" for number, ms in enumerate(ROUND_TRIPS_MS, 1))
    (tmp_path / "topo_eua_melbourne_cbd.csv").write_text(POSITIONS)
    with gzip.open(tmp_path / "rtt_planetlab_pairs.csv.gz", "wt") as file:
        file.write("node_a,node_b,rtt_median_ms\n" + rows)
    return tmp_path


def area(**changed: object) -> AreaConfig:
    given = {
        "positions": "topo_eua_melbourne_cbd.csv", "round_trips": "rtt_planetlab_pairs.csv.gz", "within": "20 ms",
        "sites": ["exchange", "hall"], "homes": ["desk"], "most_homes": 2,
    }  # fmt: skip
    return AreaConfig.model_validate(given | changed)


def link(cluster: ClusterConfig, one: str, other: str) -> LinkShape:
    shape = cluster.link(one, other)
    assert shape is not None
    return LinkShape.model_construct(latency=shape.latency, bandwidth=shape.bandwidth)


@pytest.fixture
def city(traces: Path) -> ClusterConfig:
    return grown(base(), area(), traces)


def base() -> ClusterConfig:
    return load_cluster(Path("data/clusters/metropolis.yaml"))


def test_copies_take_turns_and_the_most_central_ones_keep_their_names(city: ClusterConfig) -> None:
    names = city.node_names
    assert sorted(names[:6]) == ["desk", "desk-2", "exchange", "exchange-2", "hall", "hall-2"]
    assert names[6:] == ["mast", "cabinet", "shop", "den", "region"]
    exchange, copy = city.node("exchange"), city.node("exchange-2")
    assert copy.model_copy(update={"name": "exchange"}) == exchange
    assert city.source == "exchange"


def test_the_nearest_pair_has_the_shortest_round_trip_and_the_farthest_the_longest_of_the_region(
    city: ClusterConfig,
) -> None:
    latencies_s = {
        frozenset((one, other)): link(city, one, other).latency
        for one in city.node_names[:6]
        for other in city.node_names[:6]
        if one != other
    }
    assert min(latencies_s.values()) == pytest.approx(0.001)
    assert max(latencies_s.values()) == pytest.approx(0.010)
    assert latencies_s[frozenset(("exchange", "hall"))] < latencies_s[frozenset(("exchange", "desk-2"))]


def test_a_link_has_the_bandwidth_of_the_originals_and_that_to_a_single_node_is_theirs(city: ClusterConfig) -> None:
    declared = base()
    for one, other, like in [
        ("exchange-2", "hall-2", ("exchange", "hall")),
        ("hall-2", "desk-2", ("hall", "desk")),
        ("desk", "desk-2", ("hall", "desk")),
    ]:
        assert link(city, one, other).bandwidth == link(declared, *like).bandwidth
    assert link(city, "desk-2", "region") == link(declared, "desk", "region")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"within": "1 ms"}, r"rtt_planetlab_pairs.csv.gz: has 0 round trips of at most 0.001 s"),
        ({"sites": ["exchange"] * 5}, r"topo_eua_melbourne_cbd.csv: has 4 sites"),
        ({"positions": "lost.csv"}, r"lost.csv: cannot be read.*`resplit traces --fetch` gets them"),
    ],
)
def test_what_is_missing_is_named(traces: Path, changed: dict[str, object], message: str) -> None:
    with pytest.raises(DataError, match=message):
        grown(base(), area(**changed), traces)


def test_an_area_names_nodes_of_its_cluster() -> None:
    scenario = load_scenario(METROPOLIS)
    assert scenario.area is not None
    wrong = scenario.model_copy(update={"area": scenario.area.model_copy(update={"sites": ("castle",)})})
    with pytest.raises(ConfigError, match=r"area.sites: 'castle' is not in this cluster"):
        wrong.check_against(base(), "metropolis.yaml")
    with pytest.raises(ConfigError, match="is only for the simulator"):
        wrong.model_copy(update={"simulated_only": False}).check_live("metropolis.yaml")
