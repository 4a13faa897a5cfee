"""Requests that are made to break the gateway: each is refused or answered, and none is a server error."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest

MODEL = "tiny-random-llama"
HTTP = httpx.Client(verify=False, timeout=60)
HALF = r'"\ud800"'  # of a surrogate pair
EVERY_PRIVATE_CHARACTER = "".join(map(chr, range(0xE000, 0xF900)))


def _nested(depth: int) -> str:
    return "[" * depth + "]" * depth


def _nested_schema(depth: int) -> str:
    return '{"type":"object","properties":{"a":' * depth + "{}" + "}}" * depth


def _chat(**fields: str) -> tuple[str, str]:
    return "chat/completions", _body(messages='[{"role":"user","content":"a"}]', max_tokens="2") | fields


def _response(**fields: str) -> tuple[str, str]:
    return "responses", _body(input='"a"', max_output_tokens="2") | fields


def _body(**fields: str) -> dict[str, str]:
    return {"model": f'"{MODEL}"', **fields}


def _tool(parameters: str = "{}", description: str = '"d"') -> str:
    return f'[{{"type":"function","function":{{"name":"f","description":{description},"parameters":{parameters}}}}}]'


def _called(arguments: str) -> str:
    call = f'{{"id":"1","function":{{"name":"f","arguments":{json.dumps(arguments)}}}}}'
    return f'[{{"role":"user","content":"a"}},{{"role":"assistant","tool_calls":[{call}]}}]'


def _format(schema: str) -> str:
    return f'{{"type":"json_schema","json_schema":{{"name":"a","schema":{schema}}}}}'


def _text_format(**fields: str) -> str:
    content = {"type": '"json_schema"', "name": '"a"', "schema": "{}"} | fields
    return f'{{"format":{_text(content)}}}'


def _text(fields: dict[str, str]) -> str:
    return "{" + ",".join(f'"{key}":{value}' for key, value in fields.items()) + "}"


BODIES = {
    "nested arguments of a call": _chat(messages=_called(_nested(5000))),
    "half a character in arguments": _chat(messages=_called('{"a": "\\ud800"}')),
    "a number as arguments": _chat(messages=_called("1" * 5000)),
    "half a character in a tool": _chat(tools=_tool(f"{{{HALF}:1}}")),
    "half a character in a description": _chat(tools=_tool(description=HALF)),
    "a nested tool": _chat(tools=_tool(_nested_schema(480))),
    "a deeply nested schema": _chat(response_format=_format(_nested_schema(480))),
    "a schema with no number": _chat(response_format=_format('{"const":NaN}')),
    "a schema that is itself": _chat(response_format=_format('{"$ref":"#"}')),
    "a schema on another machine": _chat(response_format=_format('{"$ref":"http://127.0.0.1:9/x"}')),
    "a schema of a wrong type": _chat(response_format=_format('{"type":5}')),
    "a schema that costs too much": _chat(tools=_tool('{"type":"integer","multipleOf":1000003}')),
    "every mark of special tokens": _chat(
        messages=json.dumps([{"role": "user", "content": EVERY_PRIVATE_CHARACTER + "<|end|>"}])
    ),
    "half a character in metadata": _response(metadata=f'{{"a":{HALF}}}'),
    "no number in metadata": _response(metadata='{"a":NaN}'),
    "an infinite number in metadata": _response(metadata='{"a":1e999}'),
    "nested metadata": _response(metadata=f'{{"a":{_nested(900)}}}'),
    "half a character in a format": _response(text=_text_format(description=HALF)),
    "no number in a format": _response(text=_text_format(strict="NaN")),
    "many empty messages": _chat(messages=json.dumps([{"role": "user", "content": ""}] * 2000)),
    "many stops": _chat(stop=json.dumps(["x"] * 10_000)),
    "many choices": _chat(n="100"),
}


@pytest.fixture(scope="module")
def roomy(serve: Any) -> str:
    url, _ = serve(context_tokens=4096, limits={"body": "1 MiB"})
    return str(url)


@pytest.mark.parametrize("case", BODIES)
def test_a_hostile_body_causes_no_server_error(roomy: str, case: str) -> None:
    path, body = BODIES[case]
    answer = HTTP.post(f"{roomy}/v1/{path}", content=_text(body), headers={"Content-Type": "application/json"})
    assert answer.status_code in (200, 400), answer.text[:300]
