"""Refused and failed requests: statuses, OpenAI's error objects, the client's exceptions, and clients that leave."""

from __future__ import annotations

import asyncio
import json
import socket
import time
from contextlib import suppress

import httpx
import openai
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.testclient import TestClient

from resplit import request_body
from resplit.config import LimitsConfig
from resplit.errors import CapacityError, ConfigError, NodeLostError, QueueTimeoutError, RequestError
from resplit.gateway.openai.api_keys import ApiKeys
from resplit.gateway.openai.app import create_app
from resplit.gateway.openai.http_errors import as_http
from resplit.gateway.openai.middleware import RequestLimits
from resplit.gateway.openai.prometheus import RequestMetrics
from resplit.gateway.openai.text import Text
from tests.support.eventually import eventually

HTTP = httpx.Client(verify=False, timeout=60)  # the server is on loopback, so no certificates are loaded
MODEL = "tiny-random-llama"
COMPLETION = {"model": MODEL, "prompt": "the fox", "max_tokens": 4}
CHAT = {"model": MODEL, "messages": [{"role": "user", "content": "the fox"}], "max_tokens": 4}


def _client(url: str, key: str = "none") -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0)


def _refused(answer: httpx.Response, status: int) -> dict[str, str]:
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert "Traceback" not in answer.text
    return error


BAD_COMPLETIONS = {
    "model": [None, 7, ["m"]],
    "prompt": [
        "",
        [],
        [[]],
        ["a", ""],
        ["a"] * 129,
        [1, -1],
        [1.5],
        [True],
        [10**9],
        [10**40],
        {},
        None,
        3,
    ],
    "max_tokens": [0, -1, 1.5, "3", True, 10**30],
    "temperature": [-0.1, 2.1, "1", [], 10**400],
    "top_p": [-0.1, 1.1],
    "seed": [2**63, 1.5, "x"],
    "stop": ["", [""], ["a"] * 17, [1], 3, {}],
    "stream": ["yes", 1],
    "stream_options": [{"include_usage": True}, []],
    "n": [0, 129, True],
    "best_of": [2],
    "echo": [1, "yes"],
    "logprobs": [-1, 21, True],
    "top_k": [-2, 1.5],
    "min_p": [-0.1, 1.1],
    "frequency_penalty": [2.1],
    "stop_token_ids": [[-1], [10**9], 3],
    "suffix": ["end"],
    "logit_bias": [{"five": 10}, {"5": 101}, {"99999": 1}, [5]],
    "presence_penalty": [-2.1],
    "ignore_eos": ["no"],
    "max_token": [5],
    "repetition_penalty": [1.1, True],
    "min_tokens": [3],
    "use_beam_search": [True, 0],
    "skip_special_tokens": [False],
    "prompt_logprobs": [1],
    "add_special_tokens": [False],
}


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name, values in BAD_COMPLETIONS.items() for value in values]
)
def test_a_bad_parameter_is_refused_and_named(server, name: str, value: object) -> None:
    body = json.dumps({**COMPLETION, name: value})
    answer = HTTP.post(f"{server[0]}/v1/completions", content=body, headers={"Content-Type": "application/json"})
    error = _refused(answer, 400)
    assert error["type"] == "invalid_request_error"
    assert name in error["message"]


@pytest.mark.parametrize(
    "change",
    [
        {"messages": []},
        {"messages": "hello"},
        {"messages": [{"role": "tool"}]},
        {"messages": [{"role": "robot", "content": "x"}]},
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "tool_calls": [{"function": {}}]}]},
        {"messages": [{"role": "user"}]},
        {"messages": [{"role": "user", "content": None}]},
        {"messages": [{"role": "user", "content": []}]},
        {"messages": [{"role": "user", "content": "\ud800"}]},
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
        {"messages": [{"role": "assistant", "content": "the template wants a user first"}]},
        {"tools": [{"type": "function", "function": {"name": "no spaces"}}]},
        {"tools": [{"type": "retrieval"}]},
        {"tool_choice": "required"},
        {"tool_choice": {"type": "function", "function": {"name": "f"}}},
        {"response_format": {"type": "yaml"}},
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "frob"}}}},
        {"top_logprobs": 2},
        {"logprobs": True, "top_logprobs": 21},
        {"prompt": "x"},
    ],
)
def test_a_bad_conversation_is_refused(server, change: dict[str, object]) -> None:
    body = json.dumps(CHAT | change)
    answer = HTTP.post(f"{server[0]}/v1/chat/completions", content=body, headers={"Content-Type": "application/json"})
    _refused(answer, 400)


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (b"", "application/json"),
        (b"{", "application/json"),
        (b"null", "application/json"),
        (b"[]", "application/json"),
        (b"\xff\xfe{}", "application/json"),
        (b'{"model": "\xff"}', "application/json"),
        (b'{"\\ud800": 1}', "application/json"),
        (b'{"model": "tiny-random-llama", "prompt": "\\ud800"}', "application/json"),
        (b'{"model": "tiny-random-llama", "prompt": "a", "stop": "\\udfff\\ud800"}', "application/json"),
        (b"[" * 60_000, "application/json"),
        (b'{"metadata":' + b"[" * 20_000 + b"]" * 20_000 + b"}", "application/json"),
        (b'{"model": "tiny-random-llama", "prompt": "a", "temperature": NaN}', "application/json"),
        (b'{"model": "tiny-random-llama", "prompt": "a", "temperature": Infinity}', "application/json"),
        (b'{"model": "tiny-random-llama", "prompt": "a", "seed": ' + b"9" * 5000 + b"}", "application/json"),
        (json.dumps(COMPLETION).encode(), "text/plain"),
        (json.dumps(COMPLETION).encode(), "application/x-www-form-urlencoded"),
        (json.dumps(COMPLETION).encode(), ""),
    ],
)
def test_a_body_that_is_not_a_json_object_is_refused(server, content: bytes, kind: str) -> None:
    _refused(HTTP.post(f"{server[0]}/v1/completions", content=content, headers={"Content-Type": kind}), 400)


def test_each_error_raises_the_matching_exception_of_the_client(serve) -> None:
    url, engine = serve(require_key=True)
    client = _client(url, "key-batch")
    with pytest.raises(openai.BadRequestError) as bad:
        client.completions.create(**COMPLETION, n=0)
    assert bad.value.param == "n"
    with pytest.raises(openai.NotFoundError) as missing:
        client.completions.create(**COMPLETION | {"model": "gpt-4"})
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-4/x")
    with pytest.raises(openai.AuthenticationError) as unknown_key:
        _client(url, "key-unknown").models.list()
    assert unknown_key.value.code == "invalid_api_key"
    engine.room = 0
    with pytest.raises(openai.RateLimitError) as busy:
        client.completions.create(**COMPLETION)
    assert busy.value.response.headers["retry-after"] == "2"
    engine.room, engine.lost_after = 8, 0
    with pytest.raises(openai.InternalServerError, match="the last trusted node is gone") as lost:
        client.chat.completions.create(**CHAT)
    assert lost.value.status_code == 503


@pytest.mark.parametrize(
    ("error", "status", "retry_after_s"),
    [
        (CapacityError("full", 3.2), 429, "4"),
        (NodeLostError("recovering"), 503, "2"),
        (QueueTimeoutError(7.5), 504, "8"),
        (TimeoutError(), 504, None),
        (RequestError("too long"), 400, None),
    ],
)
def test_an_error_says_when_to_try_again_if_that_helps(
    error: Exception, status: int, retry_after_s: str | None
) -> None:
    answer = as_http(error)
    assert (answer.status_code, (answer.headers or {}).get("Retry-After")) == (status, retry_after_s)


def test_an_error_before_the_first_token_of_a_stream_is_a_status(serve) -> None:
    url, engine = serve(room=0)
    with pytest.raises(openai.RateLimitError):
        _client(url).completions.create(**COMPLETION, stream=True)
    engine.room, engine.broken_after = 8, 0
    answer = HTTP.post(f"{url}/v1/completions", json=COMPLETION | {"stream": True})
    assert "secret" not in _refused(answer, 500)["message"]


def test_a_request_that_the_engine_refuses_is_a_bad_request(server) -> None:
    answer = HTTP.post(f"{server[0]}/v1/completions", json=COMPLETION | {"prompt": [5, 5, 5]})
    assert "refuses this prompt" in _refused(answer, 400)["message"]


@pytest.mark.parametrize(("failure", "message"), [("lost_after", "trusted node"), ("broken_after", "failed")])
def test_an_error_in_a_stream_is_its_last_event(serve, failure: str, message: str) -> None:
    url, engine = serve(**{failure: 2})
    body = COMPLETION | {"stream": True, "ignore_eos": True, "return_token_ids": True}
    *chunks, last, nothing = HTTP.post(f"{url}/v1/completions", json=body).text.split("\n\n")
    assert (len(chunks), nothing) == (2, "")
    error = json.loads(last.removeprefix("data: "))["error"]
    assert message in error["message"]
    assert "secret" not in error["message"]
    with pytest.raises(openai.APIError, match=message):
        list(_client(url).completions.create(**COMPLETION, stream=True, extra_body={"ignore_eos": True}))
    assert engine.idle.wait(5)


def test_a_defect_is_a_500_without_details(serve) -> None:
    url, _ = serve(broken_after=1)
    answer = HTTP.post(
        f"{url}/v1/completions", json=COMPLETION | {"ignore_eos": True}, headers={"X-Request-Id": "job-7"}
    )
    assert "secret" not in _refused(answer, 500)["message"]
    assert answer.headers["x-request-id"] == "job-7"


def test_a_request_longer_than_the_context_is_refused(server) -> None:
    url, engine = server
    fits = COMPLETION | {"prompt": [7] * 100, "max_tokens": 28}
    assert HTTP.post(f"{url}/v1/completions", json=fits).status_code == 200
    error = _refused(HTTP.post(f"{url}/v1/completions", json=fits | {"max_tokens": 29}), 400)
    assert error["code"] == "context_length_exceeded"
    assert f"maximum context length is {engine.context_tokens} tokens" in error["message"]
    for prompt in ([7] * 128, "fox " * 2000):
        assert (
            _refused(HTTP.post(f"{url}/v1/completions", json=COMPLETION | {"prompt": prompt}), 400)["code"]
            == error["code"]
        )
    long = {"messages": [{"role": "user", "content": "fox " * 2000}]}
    assert _refused(HTTP.post(f"{url}/v1/chat/completions", json=CHAT | long), 400)["code"] == error["code"]


TOOL = {"type": "function", "function": {"name": "f", "description": "fox " * 200}}
CALL = {"id": "1", "function": {"name": "f", "arguments": "fox " * 2000}}


@pytest.mark.parametrize(
    "change",
    [
        {"messages": [{"role": "user", "content": ""}] * 1000},
        {"messages": [{"role": "user", "content": "fox " * 10}] * 100},
        {"messages": [*CHAT["messages"], {"role": "assistant", "tool_calls": [CALL]}]},
        {"tools": [TOOL] * 50},
    ],
    ids=["empty messages", "many messages", "a call", "many tools"],
)
def test_a_long_conversation_is_refused_before_it_becomes_tokens(serve, monkeypatch, change: dict[str, object]) -> None:
    url, _ = serve()
    monkeypatch.delattr(Text, "encode_chat")  # it would block all streams
    error = _refused(HTTP.post(f"{url}/v1/chat/completions", json=CHAT | change), 400)
    assert error["code"] == "context_length_exceeded"


def test_a_large_body_is_refused_whether_its_length_is_announced_or_not(server) -> None:
    url = f"{server[0]}/v1/completions"
    large = json.dumps(COMPLETION | {"user": "x" * 70_000}).encode()
    kind = {"Content-Type": "application/json"}
    _refused(HTTP.post(url, content=large, headers=kind), 413)
    _refused(HTTP.post(url, content=iter([large[:40_000], large[40_000:]]), headers=kind), 413)
    assert HTTP.post(url, content=iter([json.dumps(COMPLETION).encode()]), headers=kind).status_code == 200


def test_an_application_mounted_beside_the_api_has_its_own_limits(model, text, server) -> None:
    async def size(request: Request) -> Response:
        return Response(str(len(await request.body())))

    app = create_app(server[1], text, MODEL, LimitsConfig(body="1 KiB"), {}, False)
    app.mount("/control", Starlette(routes=[Route("/size", size, methods=["POST"])]))
    with TestClient(app) as client:
        assert client.post("/control/size", content=b"x" * 5000).text == "5000"
        _refused(client.post("/v1/completions", content=b"x" * 5000), 413)


def test_a_body_that_stops_arriving_is_refused_within_seconds(server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(request_body, "PAUSE_S", 0.2)  # the deadline is two minutes
    host, port = server[0].removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
        assert connection.recv(4096).startswith(b"HTTP/1.1 408 ")


@pytest.mark.parametrize("key", ["", "Bearer guessed"])
def test_without_a_key_no_byte_of_the_body_is_asked_for(serve, key: str) -> None:
    url, _ = serve(require_key=True)
    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: {key}\r\nContent-Length: 100\r\n"
        connection.sendall(head.encode() + b"Expect: 100-continue\r\n\r\n")
        assert connection.recv(4096).startswith(b"HTTP/1.1 401 ")


def test_a_body_that_never_ends_is_refused_at_the_deadline(serve) -> None:
    url, _ = serve(limits={"deadline": "200 ms"})
    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
        assert connection.recv(4096).startswith(b"HTTP/1.1 408 ")


def test_the_deadline_is_a_504_and_frees_the_engine(serve) -> None:
    url, engine = serve(step_s=0.05)
    late = {"X-Resplit-Deadline-S": "0.2"}
    answer = HTTP.post(f"{url}/v1/completions", json=COMPLETION | {"max_tokens": 100, "ignore_eos": True}, headers=late)
    assert _refused(answer, 504)["code"] == "deadline_exceeded"
    assert engine.idle.wait(5)
    streamed = COMPLETION | {"max_tokens": 100, "stream": True, "ignore_eos": True}
    *_, last, nothing = HTTP.post(f"{url}/v1/completions", json=streamed, headers=late).text.split("\n\n")
    assert json.loads(last.removeprefix("data: "))["error"]["code"] == "deadline_exceeded"
    assert nothing == ""


@pytest.mark.parametrize("header", ["nan", "inf", "-1", "0", "soon"])
def test_a_deadline_that_is_not_a_positive_number_is_refused(server, header: str) -> None:
    _refused(HTTP.post(f"{server[0]}/v1/completions", json=COMPLETION, headers={"X-Resplit-Deadline-S": header}), 400)


def test_an_unknown_class_is_refused(server) -> None:
    answer = HTTP.post(f"{server[0]}/v1/completions", json=COMPLETION, headers={"X-Resplit-Class": "premium"})
    assert _refused(answer, 400)["param"] == "X-Resplit-Class"


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_cancels_its_generation(serve, stream: bool) -> None:
    url, engine = serve(step_s=0.1)
    body = COMPLETION | {"max_tokens": 120, "stream": stream, "ignore_eos": True}
    with suppress(httpx.ReadTimeout), HTTP.stream("POST", f"{url}/v1/completions", json=body, timeout=0.35) as answer:
        next(answer.iter_raw())
    assert engine.idle.wait(5)  # 120 steps would have taken 12 s
    assert _sample(url, "resplit_requests_total", 'status="499"') == 1
    assert _sample(url, "resplit_sessions_live", "interactive") == 0


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_before_the_first_token_cancels_its_prompt(serve, stream: bool) -> None:
    url, engine = serve(first_s=30.0)
    with suppress(httpx.ReadTimeout):
        HTTP.post(f"{url}/v1/completions", json=COMPLETION | {"stream": stream}, timeout=0.35)
    assert engine.idle.wait(5)


def test_a_key_is_required_for_all_paths_except_health_and_metrics(serve) -> None:
    url, _ = serve(require_key=True)
    for path in ("/v1/models", f"/v1/models/{MODEL}"):
        _refused(HTTP.get(url + path), 401)
    for headers in (
        {},
        {"Authorization": "Basic key-batch"},
        {"Authorization": "Bearer"},
        {"Authorization": b"Bearer \xff"},
    ):
        _refused(HTTP.post(f"{url}/v1/completions", json=COMPLETION, headers=headers), 401)
    assert [HTTP.get(url + path).status_code for path in ("/healthz", "/readyz", "/metrics")] == [200] * 3


def test_unknown_paths_and_methods_get_the_same_error_objects(server) -> None:
    _refused(HTTP.get(f"{server[0]}/v1/nothing"), 404)
    _refused(HTTP.get(f"{server[0]}/v1/completions"), 405)


def test_readyz_gives_the_reason_while_healthz_stays_ok(serve) -> None:
    url, engine = serve(unready="no node can hold the head")
    assert HTTP.get(f"{url}/healthz").status_code == 200
    answer = HTTP.get(f"{url}/readyz")
    assert (answer.status_code, answer.json()["reason"]) == (503, "no node can hold the head")
    engine.unready = None
    assert HTTP.get(f"{url}/readyz").status_code == 200


def _sample(url: str, name: str, label: str) -> float:
    lines = HTTP.get(f"{url}/metrics").text.splitlines()
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(name + "{") and label in line)


def test_metrics_count_requests_and_tokens_by_class_and_status(serve) -> None:
    url, engine = serve()
    body = COMPLETION | {"ignore_eos": True}
    for headers in ({}, {"X-Resplit-Class": "batch"}, {"X-Resplit-Class": "batch"}):
        HTTP.post(f"{url}/v1/completions", json=body, headers=headers)
    HTTP.post(f"{url}/v1/completions", json={})
    engine.lost_after = 2
    HTTP.post(f"{url}/v1/completions", json=body | {"stream": True})
    assert eventually(lambda: _sample(url, "resplit_requests_total", "") == 5)
    assert _sample(url, "resplit_requests_total", 'request_class="batch",status="200"') == 2
    assert _sample(url, "resplit_requests_total", 'request_class="unknown",status="400"') == 1
    assert _sample(url, "resplit_requests_total", 'request_class="interactive",status="503"') == 1
    assert _sample(url, "resplit_new_tokens_total", "batch") == 8
    assert _sample(url, "resplit_prompt_tokens_total", "batch") == 2 * len(engine.seen[0].prompt_ids)
    assert _sample(url, "resplit_time_to_first_token_seconds_count", "batch") == 2
    assert _sample(url, "resplit_time_per_token_seconds_count", "batch") == 6
    assert _sample(url, "resplit_request_latency_seconds_count", "interactive") == 1
    assert _sample(url, "resplit_queue_depth", "") == 0


def test_metrics_show_running_and_waiting_requests(serve) -> None:
    url, engine = serve(step_s=0.2)
    body = COMPLETION | {"max_tokens": 50, "stream": True, "ignore_eos": True}
    with HTTP.stream("POST", f"{url}/v1/completions", json=body) as answer:
        chunks = answer.iter_raw()
        next(chunks)
        assert _sample(url, "resplit_sessions_live", "interactive") == 1
        assert _sample(url, "resplit_queue_depth", "interactive") == 0
    assert engine.idle.wait(5)


def test_a_key_with_an_unknown_class_is_a_configuration_error(model, text, server) -> None:
    with pytest.raises(ConfigError, match="premium"):
        create_app(server[1], text, MODEL, LimitsConfig(), {b"": "premium"}, True)


async def test_a_request_ends_if_its_client_reads_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("resplit.gateway.openai.middleware._GRACE_S", 0.05)
    closed = asyncio.Event()

    async def app(scope, receive, send) -> None:
        try:
            await send({"type": "http.response.start", "status": 200, "headers": []})
        finally:
            closed.set()

    async def send(message) -> None:
        await asyncio.Future()

    bodies = [{"type": "http.request", "body": b"", "more_body": False}]

    async def receive():
        return bodies.pop() if bodies else await asyncio.Future()

    limited = RequestLimits(app, RequestMetrics(), LimitsConfig(deadline="50 ms"), (), ApiKeys({}, required=False))
    started_s = time.monotonic()
    await limited({"type": "http", "path": "/v1/completions", "headers": []}, receive, send)
    assert closed.is_set()
    assert time.monotonic() - started_s >= 0.1


def test_a_token_that_the_tokenizer_knows_and_the_model_does_not_is_a_bad_request(server, tokenizer_folder) -> None:
    text = Text.from_folder(tokenizer_folder, vocabulary=4)  # the special tokens only
    with TestClient(create_app(server[1], text, MODEL, LimitsConfig(), {}, False)) as client:
        chat = {"model": MODEL, "messages": [{"role": "user", "content": "fox"}]}
        for path, body, key in (
            ("completions", COMPLETION, "prompt"),
            ("completions", COMPLETION | {"prompt": [4]}, "prompt"),
            ("chat/completions", chat, "messages"),
        ):
            refused = client.post(f"/v1/{path}", json=body)
            assert refused.status_code == 400, refused.text
            assert f"invalid '{key}': token ids must be below 4" in refused.json()["error"]["message"]
