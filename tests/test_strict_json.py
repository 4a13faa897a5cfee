"""Bodies of the control API: what is read, what is refused, and in which words."""

from __future__ import annotations

import math

import httpx
import pytest
from fastapi import APIRouter, FastAPI
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, JsonValue

from resplit.control.invalid_requests import invalid_request
from resplit.strict_json import StrictRoute, read_json


def nested(depth: int, inner: bytes = b"1") -> bytes:
    """An inner value within `depth` lists and objects, in turns."""
    for level in range(depth):
        inner = b'{"a": ' + inner + b"}" if level % 2 else b"[" + inner + b"]"
    return inner


@pytest.mark.parametrize(
    ("body", "value"),
    [
        (b"0", 0),
        (b"-1.5e300", -1.5e300),
        (b"null", None),
        ('{"\u00e9": ["\u4e2d", true]}'.encode(), {"\u00e9": ["\u4e2d", True]}),
        (rb'"\ud83d\ude00"', "\U0001f600"),
    ],
)
def test_a_json_text_gives_its_value(body: bytes, value: JsonValue) -> None:
    assert read_json(body, 32) == value


def test_values_may_be_nested_in_32_levels_and_no_more() -> None:
    assert isinstance(read_json(nested(32), 32), dict)
    for levels in (33, 200_000):
        with pytest.raises(ValueError, match=r"^is nested deeper than 32 levels$"):
            read_json(nested(levels) if levels < 100 else b"[" * levels, 32)


@pytest.mark.parametrize(
    ("inner", "rule"),
    [
        (b"NaN", "has a number that is not finite, or too large"),
        (b"-1e400", "has a number that is not finite, or too large"),
        (rb'"\ud800"', "has a text with half of a surrogate pair"),
        (rb'{"\udc00": 1}', "has a text with half of a surrogate pair"),
    ],
)
@pytest.mark.parametrize("depth", [0, 1, 2, 3])
def test_a_value_that_cannot_be_stored_is_refused_at_every_depth(inner: bytes, rule: str, depth: int) -> None:
    with pytest.raises(ValueError, match=f"^{rule}$"):
        read_json(nested(depth, inner), 32)


class Body(BaseModel):
    """A body with a number and a text."""

    number: float = math.pi
    text: str = ""


@pytest.fixture
def api() -> httpx.AsyncClient:
    """An API with one call, which repeats its body."""
    router = APIRouter(route_class=StrictRoute)

    @router.post("/echo")
    async def echo(body: Body) -> Body:
        return body

    app = FastAPI()
    app.include_router(router)
    app.add_exception_handler(RequestValidationError, invalid_request)
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://control")


async def test_a_route_gets_the_parsed_body(api: httpx.AsyncClient) -> None:
    answer = await api.post("/echo", json={"number": 2.5, "text": "\u4e2d"})
    assert (answer.status_code, answer.json()) == (200, {"number": 2.5, "text": "\u4e2d"})


DIGITS = "(4300 digits) for integer string conversion: value has 5000 digits"


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b'{"number": 1e400}', "the body: has a number that is not finite, or too large"),
        (b'{"number": ' + b"9" * 5000 + b"}", f"the body: Exceeds the limit {DIGITS}"),
        (b"{", "the body: Expecting property name enclosed in double quotes"),
        (b'"\xff"', "the body: 'utf-8' codec can't decode byte 0xff in position 1: invalid start byte"),
        (b'{"number": []}', "body.number: Input should be a valid number"),
        (b'{"text": 1}', "body.text: Input should be a valid string"),
    ],
)
async def test_an_error_names_the_place_and_the_rule(api: httpx.AsyncClient, body: bytes, message: str) -> None:
    answer = await api.post("/echo", content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == 422
    error = answer.json()["error"]
    assert (error["message"].partition(";")[0], error["type"]) == (message, "RequestValidationError")


async def test_characters_of_an_error_that_are_not_ascii_are_escaped() -> None:
    error = RequestValidationError([{"type": "missing", "loc": ("body", "\udc00\u00e9"), "msg": "Field required"}])
    answer = await invalid_request(None, error)  # type: ignore[arg-type]
    assert b"body." in answer.body
    assert answer.body.isascii()
