"""The fit of the whole cost model against machines whose true times are known."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from resplit.cost import CostModel, SpeedJump, fit_cost_model
from resplit.cost.model import Phase
from resplit.errors import DataError
from resplit.telemetry.tables import NODE_COLUMNS, Telemetry, frame
from resplit.types import BlockFeatures
from tests.support.telemetry import MACHINES, Machine, block_rows, link_rows, node_rows

Features = tuple[BlockFeatures, ...]
PASSES: tuple[tuple[Phase, int, int], ...] = (("prefill", 40, 0), ("decode", 1, 100), ("decode", 1, 300))


def _window(
    machines: dict[str, Machine], features: Features, keep: tuple[str, ...] = ("embed", "layer", "head")
) -> Telemetry:
    rows = [row for row in block_rows(machines, features, seed=1) if row["kind"] in keep]
    return Telemetry.from_rows({"nodes": node_rows(machines, [9.0]), "links": link_rows(machines), "blocks": rows})


def _worst(model: CostModel, features: Features, node: str, machine: Machine) -> float:
    errors = [
        model.pass_s(feature, node, phase, tokens, context)[0] / machine.seconds(feature.kind, tokens, context) - 1
        for feature in features
        for phase, tokens, context in PASSES
    ]
    return float(np.abs(errors).max())


@pytest.mark.parametrize("node", MACHINES)
def test_passes_of_every_kind_are_predicted_at_seen_and_longer_contexts(
    model: CostModel, features: Features, node: str
) -> None:
    assert _worst(model, features, node, MACHINES[node]) < 0.1


def test_held_out_errors_are_of_longer_contexts_and_of_unseen_nodes(model: CostModel) -> None:
    for error in (model.held_out_contexts, model.held_out_nodes):
        assert error.cells > 20
        assert error.median is not None
        assert error.p90 is not None
        assert 0 < error.median < 0.06
        assert error.median < error.p90
    assert model.uncertainty == model.held_out_contexts.median


def test_held_out_contexts_are_not_used_by_the_fit_that_they_test(features: Features) -> None:
    rows = block_rows(MACHINES, features, noise=0.0)
    for row in rows:
        if row["context_tokens"] > 150 or row["tokens"] > 100:  # type: ignore[operator]
            row["seconds"] = 1.5 * float(str(row["seconds"]))
    fitted = fit_cost_model(Telemetry.from_rows({"nodes": node_rows(MACHINES, [0.0]), "blocks": rows}), features)
    assert fitted.held_out_contexts.median == pytest.approx(1 - 1 / 1.5, abs=0.01)


def test_the_held_out_error_is_large_if_a_reference_does_not_describe_its_node(features: Features) -> None:
    odd = MACHINES | {"cloud": replace(MACHINES["cloud"], per_token_s=(5e-5, 8e-3, 1e-4))}
    nodes = node_rows(MACHINES, [0.0])  # the reference gives a speed of 0.4, but the layers are four times slower
    fitted = fit_cost_model(Telemetry.from_rows({"nodes": nodes, "blocks": block_rows(odd, features)}), features)
    assert fitted.held_out_nodes.p90 is not None
    assert fitted.held_out_nodes.p90 > 0.5


def test_a_node_without_block_timings_is_predicted_by_its_reference(features: Features) -> None:
    idle = {"edge": MACHINES["edge"]}
    busy = {name: machine for name, machine in MACHINES.items() if name != "edge"}
    window = Telemetry.from_rows({"nodes": node_rows(MACHINES, [0.0]), "blocks": block_rows(busy, features)})
    model = fit_cost_model(window, features)
    assert _worst(model, features, "edge", idle["edge"]) < 0.1
    fit = model.find("edge", "decode", "layer")
    assert fit is not None
    assert fit.cells == 0


def test_kinds_that_a_node_never_ran_are_predicted_from_other_nodes_at_its_speed(features: Features) -> None:
    rows = [row for row in block_rows(MACHINES, features) if row["node"] != "edge" or row["kind"] == "layer"]
    nodes = [row | {"reference_s": 0.02} if row["node"] == "edge" else row for row in node_rows(MACHINES, [0.0])]
    model = fit_cost_model(Telemetry.from_rows({"nodes": nodes, "blocks": rows}), features)
    # Its own layers are better evidence than its reference.
    assert _worst(model, features, "edge", MACHINES["edge"]) < 0.12


def test_a_kind_that_no_node_ran_is_predicted_from_its_work(features: Features) -> None:
    rows = [row for row in block_rows(MACHINES, features) if row["kind"] != "head"]
    model = fit_cost_model(Telemetry.from_rows({"nodes": node_rows(MACHINES, [0.0]), "blocks": rows}), features)
    seconds = model.pass_s(features[-1], "home-a", "decode", 1, 10)[0]
    assert model.pass_s(features[1], "home-a", "decode", 1, 10)[0] < seconds  # the head has more weights than a layer


def test_a_node_that_slowed_down_is_also_slow_for_kinds_that_it_did_not_run_in_the_window(
    model: CostModel, features: Features
) -> None:
    slow = MACHINES | {"cloud": replace(MACHINES["cloud"], speed=1.2)}
    window = _window(slow, features, keep=("layer",))
    # The reference was timed before the node slowed down.
    unaware = Telemetry(frame(node_rows(MACHINES, [9.0]), NODE_COLUMNS), window.links, window.blocks)
    after = fit_cost_model(unaware, features, previous=model, hold_out=False)
    assert _worst(after, features, "cloud", slow["cloud"]) < 0.12
    assert _worst(after, features, "home-a", slow["home-a"]) < 0.12


def test_a_single_pass_that_hung_does_not_make_a_node_slow(model: CostModel, features: Features) -> None:
    rows = [row for row in block_rows(MACHINES, features, contexts=(40,), prompts=()) if row["node"] == "edge"][1:2]
    hung = [row | {"seconds": 10 * float(str(row["seconds"]))} for row in rows]
    window = Telemetry.from_rows({"nodes": node_rows(MACHINES, [9.0]), "blocks": hung})
    assert (
        _worst(fit_cost_model(window, features, previous=model, hold_out=False), features, "edge", MACHINES["edge"])
        < 0.1
    )


def test_the_reference_shows_that_an_idle_node_slowed_down(model: CostModel, features: Features) -> None:
    slow = MACHINES | {"edge": replace(MACHINES["edge"], speed=7.5)}
    window = Telemetry.from_rows({"nodes": node_rows(slow, [9.0])})
    after = fit_cost_model(window, features, previous=model, hold_out=False)
    assert _worst(after, features, "edge", slow["edge"]) < 0.12
    assert after.links == model.links


SLOW_CLOUD = MACHINES | {"cloud": replace(MACHINES["cloud"], speed=2.0)}
JUMPED = {"cloud": SpeedJump(1.9, 5.0)}


def test_a_node_that_jumped_within_the_window_is_fitted_to_what_came_after(
    model: CostModel, features: Features
) -> None:
    window = _jumped(features, [0.0, 0.5, 1.0, 1.5], [2.0, 2.5, 3.0])
    after = fit_cost_model(window, features, previous=model, hold_out=False, jumps=JUMPED)
    assert _worst(after, features, "cloud", SLOW_CLOUD["cloud"]) < 0.12
    assert _worst(after, features, "home-a", MACHINES["home-a"]) < 0.12
    idle = Telemetry.from_rows({"nodes": node_rows(MACHINES, [10.0, 10.5, 11.0])})
    again = fit_cost_model(idle, features, previous=after, hold_out=False, jumps=JUMPED)
    assert _worst(again, features, "cloud", MACHINES["cloud"]) < 0.12


@pytest.mark.parametrize("reported", [True, False])
def test_a_node_that_has_just_jumped_is_as_slow_for_all_kinds_of_block_as_its_passes_showed(
    model: CostModel, features: Features, reported: bool
) -> None:
    """Also if it reports no new reference: real nodes do not. The next window has nothing of it."""
    reports = node_rows(SLOW_CLOUD if reported else MACHINES, [2.0])
    window = _jumped(features, [0.0, 0.5, 1.0, 1.5], [])
    window = replace(window, nodes=frame(node_rows(MACHINES, [0.0, 1.5]) + reports, NODE_COLUMNS))
    before = replace(model, fitted_at_s=1.0)
    after = fit_cost_model(window, features, previous=before, hold_out=False, jumps=JUMPED)
    assert _worst(after, features, "cloud", SLOW_CLOUD["cloud"]) < 0.12
    idle = Telemetry.from_rows({"nodes": [row | {"time_s": 9.0} for row in reports]})
    again = fit_cost_model(idle, features, previous=after, hold_out=False, jumps=JUMPED)
    assert _worst(again, features, "cloud", SLOW_CLOUD["cloud"]) < 0.12


def _jumped(features: Features, before_s: list[float], after_s: list[float]) -> Telemetry:
    """A window in which a machine became slower: reports before and after, and passes soon after each."""
    blocks: list[dict[str, object]] = []
    for machines, times in ((MACHINES, before_s), (SLOW_CLOUD, after_s)):
        rows = block_rows(machines, features, seed=len(blocks)) if times else []
        blocks += [row | {"time_s": times[index % len(times)] + 0.1} for index, row in enumerate(rows)]
    nodes = node_rows(MACHINES, before_s) + node_rows(SLOW_CLOUD, after_s)
    return Telemetry.from_rows({"nodes": nodes, "blocks": blocks})


def test_one_pass_in_ten_that_hung_hardly_changes_the_model(features: Features) -> None:
    rows = block_rows(MACHINES, features)
    for row in rows[::10]:
        row["seconds"] = 20 * float(str(row["seconds"]))
    model = fit_cost_model(Telemetry.from_rows({"nodes": node_rows(MACHINES, [0.0]), "blocks": rows}), features)
    assert max(_worst(model, features, node, machine) for node, machine in MACHINES.items()) < 0.15


def test_the_same_telemetry_gives_the_same_model(model: CostModel, telemetry: Telemetry, features: Features) -> None:
    assert fit_cost_model(telemetry, features) == model


def test_without_holding_out_data_the_errors_are_those_of_the_previous_model(
    model: CostModel, telemetry: Telemetry, features: Features
) -> None:
    odd = replace(model, held_out_contexts=replace(model.held_out_contexts, median=0.5))
    after = fit_cost_model(telemetry, features, odd, hold_out=False)
    assert after.uncertainty == 0.5
    assert after.held_out_nodes == model.held_out_nodes
    assert fit_cost_model(telemetry, features, hold_out=False) == model  # there is no previous model
    again = fit_cost_model(telemetry, features, odd)  # by default the errors are estimated again
    assert again.held_out_contexts.median != 0.5


@pytest.mark.parametrize(
    ("missing", "message"), [("nodes", "reference_s"), ("blocks", "no prefill timing")], ids=["nodes", "blocks"]
)
def test_an_empty_table_is_a_data_error(features: Features, missing: str, message: str) -> None:
    rows = {"nodes": node_rows(MACHINES, [0.0]), "blocks": block_rows(MACHINES, features)}
    with pytest.raises(DataError, match=message):
        fit_cost_model(Telemetry.from_rows(rows | {missing: []}), features)


def test_timings_of_an_unknown_block_are_a_data_error(telemetry: Telemetry, features: Features) -> None:
    with pytest.raises(DataError, match="block 'head'"):
        fit_cost_model(telemetry, features[:-1])


def test_a_model_holds_the_newest_time_the_median_references_and_the_emulated_nodes(features: Features) -> None:
    nodes = node_rows(MACHINES, [3.0, 9.0, 6.0])
    for row, reference_s in zip([row for row in nodes if row["node"] == "edge"], (0.3, 0.1, 0.2), strict=True):
        row |= {"reference_s": reference_s}
    nodes = [row | {"emulated": row["node"] in ("edge", "cloud")} for row in nodes]
    window = Telemetry.from_rows({"nodes": nodes, "blocks": block_rows(MACHINES, features, prompts=(8, 16))})
    model = fit_cost_model(window, features)
    assert model.fitted_at_s == 9.0
    assert set(model.reference_s) == set(MACHINES)
    assert model.reference_s["edge"] == 0.2
    assert model.emulated == ("cloud", "edge")

    only_edge = Telemetry.from_rows({"nodes": [row for row in nodes if row["node"] == "edge"]})
    silent = Telemetry(only_edge.nodes.assign(emulated=False), only_edge.links, only_edge.blocks)
    after = fit_cost_model(silent, features, model, hold_out=False)
    assert after.emulated == ("cloud",)  # the cloud did not report, so it is still what it was
    assert after.reference_s == model.reference_s

    blocks_only = Telemetry.from_rows({"blocks": block_rows(MACHINES, features)})
    assert (
        fit_cost_model(blocks_only, features, model, hold_out=False).fitted_at_s == blocks_only.blocks["time_s"].max()
    )
