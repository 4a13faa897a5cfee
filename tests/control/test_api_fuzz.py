"""Random requests to the control API, with its token: none may cause a server error, also not of a later call."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator

import httpx
import pytest
from hypothesis import HealthCheck, Phase, given
from hypothesis import strategies as st

from resplit.control.api import create_control_api
from resplit.control.controller import Controller
from resplit.control.monitor import Monitor
from tests.support.controllers import operator_of
from tests.support.fuzzing import object_text, odd_json
from tests.support.in_process import InProcessCluster
from tests.support.properties import examples
from tests.support.three_nodes import A

# Valid bodies, each of which gets odd values: so that a request comes as far as possible.
BODIES: dict[tuple[str, str], dict[str, object]] = {
    ("POST", "/decisions"): {"at_s": 1.0, "action": "re-split", "outcome": {"deployed": 1}},
    ("POST", "/proposals"): {
        "placement": ["nobody"],
        "action": "initial",
        "based_on": 0,
        "predicted_latency_s": 1.0,
        "lower_bound": 0.5,
    },
    ("POST", "/emulation/node"): {"node": A, "slowdown": 2.0, "background_utilization": 0.5},
    ("POST", "/emulation/link"): {"between": [A, "beta"], "latency_s": 0.1, "bandwidth_bytes_per_s": 1e6},
    ("POST", f"/nodes/{A}/trust"): {"on": True},
    ("POST", "/moves"): {
        "move": {
            "at_s": 1.0,
            "action": "re-split",
            "before": [A],
            "after": [A],
            "latency_before_s": 1.0,
            "predicted_before_s": 1.0,
        },
        "settings": {},
    },
    ("POST", "/problem"): {},
    ("PUT", "/cluster"): {},
}
READS = ["/status", "/model", "/telemetry", "/demand", "/records", "/epochs", "/decisions", "/cluster", "/ready"]


@pytest.fixture
async def api(nodes: InProcessCluster, controller: Controller) -> AsyncIterator[httpx.AsyncClient]:
    operator = operator_of(nodes, controller)
    app = create_control_api(controller, operator, Monitor(nodes.router.peers, 8), "secret")
    BODIES["PUT", "/cluster"] = dict(operator.desired.content)
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with httpx.AsyncClient(
        transport=transport, base_url="http://control", headers={"Authorization": "Bearer secret"}
    ) as client:
        yield client


@pytest.mark.parametrize("call", BODIES, ids=" ".join)
async def test_no_body_causes_a_server_error(api: httpx.AsyncClient, call: tuple[str, str]) -> None:
    loop, (method, path), valid = asyncio.get_running_loop(), call, BODIES[call]
    base = [(key, json.dumps(value)) for key, value in valid.items()]
    keys = st.sampled_from([*valid, "more"])
    odd = st.lists(st.tuples(keys, odd_json()), max_size=2).map(lambda pairs: object_text(base + pairs)) | odd_json()

    async def send(body: str) -> None:
        answers = [await api.request(method, path, content=body, headers={"Content-Type": "application/json"})]
        answers += [await api.get(each) for each in READS]
        broken = [(str(each.request.url), each.status_code) for each in answers if each.status_code >= 500]
        assert not broken

    @examples(40, phases=[Phase.generate], suppress_health_check=list(HealthCheck))
    @given(body=odd)
    def run(body: str) -> None:
        asyncio.run_coroutine_threadsafe(send(body), loop).result(60)

    await asyncio.to_thread(run)
