"""What a first plan says on the terminal of `resplit up`."""

from __future__ import annotations

import pytest
from structlog.testing import capture_logs

from resplit.cluster.first_plan import _warn_of_context
from resplit.model.source import StoredModel
from tests.support.latest_problem import problem_of
from tests.support.three_nodes import A, B, C, three_node_config


@pytest.mark.parametrize(("deadline", "warnings"), [("1 ms", 1), ("100 h", 0)])
def test_a_context_longer_than_the_deadline_is_warned_of(
    stored_model: StoredModel, deadline: str, warnings: int
) -> None:
    cluster = three_node_config(kv_tokens=64, limits={"context_tokens": 64, "deadline": deadline})
    problem = problem_of(cluster, stored_model.features(1), (A, A, B, B, C, C, B, A))
    with capture_logs() as logs:
        _warn_of_context(problem, cluster)
    assert ["lower context_tokens or raise deadline" in each["event"] for each in logs] == [True] * warnings
