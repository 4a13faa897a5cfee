"""Three real nodes on the test's event loop, and a controller of them."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from resplit.control.controller import Controller
from resplit.control.operations import Operator
from resplit.model.source import StoredModel
from tests.support.controllers import FIRST, operator_of, running_controller
from tests.support.in_process import InProcessCluster, deploy, in_process
from tests.support.latest_problem import problem_of
from tests.support.three_nodes import A, B, C, three_node_config


@pytest.fixture
async def nodes(stored_model: StoredModel, tmp_path: Path) -> AsyncIterator[InProcessCluster]:
    """Three running nodes. Gamma has room for two layers only."""
    memory = {A: "8 MiB", B: "8 MiB", C: "650 kB"}
    config = three_node_config(nodes=[{"name": name, "memory": memory[name]} for name in memory], limits={})
    async with in_process(config, stored_model, tmp_path) as running:
        yield running


@pytest.fixture
async def controller(nodes: InProcessCluster) -> AsyncIterator[Controller]:
    async with running_controller(nodes) as controller:
        yield controller


@pytest.fixture
async def operator(nodes: InProcessCluster, controller: Controller) -> Operator:
    """The operator of a cluster that serves, whose controller has a problem to plan with."""
    controller.planner.set_problem(problem_of(nodes.config, nodes.features, FIRST))
    operator = operator_of(nodes, controller)
    await deploy(controller, FIRST)
    return operator
