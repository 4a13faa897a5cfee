"""Random requests that follow the app's OpenAPI description, and random bodies: none may cause a 5xx."""

from __future__ import annotations

from collections import Counter

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given
from hypothesis import strategies as st

from tests.support.fuzzing import object_text, odd_json, odd_scalars
from tests.support.properties import examples

HTTP = httpx.Client(verify=False, timeout=60)  # the server is on loopback, so no certificates are loaded
MODEL = "tiny-random-llama"
QUICK = examples(50, phases=[Phase.generate], suppress_health_check=list(HealthCheck))
HELLO = '[{"role":"user","content":"a"}]'
PARAMETERS = ["prompt", "messages", "max_tokens", "temperature", "top_p", "seed", "stop", "stream", "n", "ignore_eos"]


@pytest.mark.parametrize(
    ("method", "path", "reached"),
    [
        (
            "POST",
            "/v1/completions",
            {400},
        ),  # few described requests are served: most use parameters that are not implemented
        ("POST", "/v1/chat/completions", {400}),
        ("POST", "/v1/responses", {400}),
        ("GET", "/v1/models", {200}),
        ("GET", "/v1/models/{name}", {404}),
    ],
)
def test_no_described_request_causes_a_server_error(server, method: str, path: str, reached: set[int]) -> None:
    operation = schemathesis.openapi.from_url(f"{server[0]}/openapi.json")[path][method]
    right, wrong = (operation.as_strategy(generation_mode=mode) for mode in schemathesis.GenerationMode)
    statuses: Counter[int] = Counter()

    @QUICK
    @given(case=right | wrong)
    def run(case: schemathesis.Case) -> None:
        if isinstance(case.body, dict) and "model" in case.body:
            case.body["model"] = MODEL  # a random name would be a 404
        case.headers.pop("x-resplit-class", None)  # a random class would be a 400
        status = case.call().status_code
        statuses[status] += 1
        assert status < 500 or (status == 504 and "x-resplit-deadline-s" in case.headers)

    run()
    assert reached <= set(statuses), statuses


@QUICK
@given(
    path=st.sampled_from(["completions", "chat/completions", "responses"]),
    body=st.binary() | odd_json().map(str.encode),
)
def test_no_body_causes_a_server_error(server, path: str, body: bytes) -> None:
    answer = HTTP.post(f"{server[0]}/v1/{path}", content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code in (400, 413)


@QUICK
@given(
    path=st.sampled_from(["completions", "chat/completions"]),
    odd=st.lists(st.tuples(st.sampled_from(PARAMETERS), odd_scalars() | odd_json()), max_size=2),
)
def test_no_parameter_value_causes_a_server_error(server, path: str, odd: list[tuple[str, str]]) -> None:
    prompt = ("prompt", '"a"') if path == "completions" else ("messages", HELLO)
    content = object_text([("model", f'"{MODEL}"'), ("max_tokens", "2"), ("temperature", "0.5"), prompt, *odd])
    answer = HTTP.post(f"{server[0]}/v1/{path}", content=content, headers={"Content-Type": "application/json"})
    assert answer.status_code in (200, 400, 413)
