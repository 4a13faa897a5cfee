"""`params.yaml` is parsed strictly, and errors name the key."""

from __future__ import annotations

from pathlib import Path

import pytest

from flows.params import load_params
from flows.simulated import named_policies
from resplit.errors import ConfigError
from resplit.policies import ABLATIONS, POLICIES
from resplit.simulate.oracle import ORACLE

ROOT = Path(__file__).parents[2]


def test_the_parameters_of_the_project_name_existing_files() -> None:
    params = load_params(ROOT / "params.yaml")
    assert all((ROOT / path).exists() for path in (params.cluster, params.scenario, params.prompts))


def test_the_simulated_study_has_every_policy_and_every_ablation() -> None:
    policies = named_policies(load_params(ROOT / "params.yaml").simulated.policies)
    assert {*POLICIES, ORACLE, *ABLATIONS} == set(policies)


def test_the_environment_can_override_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MODEL", "/some/model")
    assert load_params(ROOT / "params.yaml").model == "/some/model"


@pytest.mark.parametrize(("old", "new"), [("seed: 7", "seed: many"), ("seed: 7", "sed: 7"), ("adapt:", "adapt: 1 #")])
def test_an_error_in_the_parameters_names_the_file(tmp_path: Path, old: str, new: str) -> None:
    text = (ROOT / "params.yaml").read_text(encoding="utf-8")
    (tmp_path / "params.yaml").write_text(text.replace(old, new), encoding="utf-8")
    with pytest.raises(ConfigError, match=r"params\.yaml"):
        load_params(tmp_path / "params.yaml")


def test_the_environment_can_choose_a_scenario_and_with_it_the_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("SCENARIO", "vehicles")
    params = load_params()
    assert (params.scenario, params.cluster) == (
        Path("data/scenarios/vehicles.yaml"),
        Path("data/clusters/vehicles.yaml"),
    )
    monkeypatch.setenv("SCENARIO", "beach")
    with pytest.raises(ConfigError, match="SCENARIO: 'beach' is not one of calm, chat-hours, home-day"):
        load_params()
