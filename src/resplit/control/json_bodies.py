"""Bodies of the control API: JSON with finite numbers, whole characters and little nesting, or an error in words.

Python's parser accepts more: values that could then not be written to a file, a database or an answer.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.routing import APIRoute
from pydantic import JsonValue

_MAX_DEPTH = 32


def parse_body(body: bytes) -> JsonValue:
    """The value of a JSON text. ValueError with the rule that the text breaks."""
    try:
        value: JsonValue = json.loads(body)
    except RecursionError:
        raise ValueError(f"is nested deeper than {_MAX_DEPTH} levels") from None
    _check(value, 0)
    return value


def _check(value: JsonValue, depth: int) -> None:
    if depth > _MAX_DEPTH:
        raise ValueError(f"is nested deeper than {_MAX_DEPTH} levels")
    match value:
        case float() if not math.isfinite(value):
            raise ValueError("has a number that is not finite, or too large")
        case str():
            _check_text(value)
        case list():
            for item in value:
                _check(item, depth + 1)
        case dict():
            for key, item in value.items():
                _check_text(key)
                _check(item, depth + 1)


def _check_text(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("has a text with half of a surrogate pair") from None


class StrictRoute(APIRoute):
    """A route whose body is parsed by `parse_body`."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """The handler of FastAPI, behind a request that parses strictly."""
        handler = super().get_route_handler()

        async def handle(request: Request) -> Response:
            return await handler(_StrictRequest(request.scope, request.receive))

        return handle


class _StrictRequest(Request):
    async def json(self) -> Any:
        try:
            return parse_body(await self.body())
        except json.JSONDecodeError:
            raise
        except ValueError as error:  # FastAPI passes on the reason of this exception only
            raise json.JSONDecodeError(str(error), "", 0) from None


async def invalid_request(request: Request, error: Exception) -> JSONResponse:
    """A 422 that names the place and the rule. It does not repeat the input, which might be impossible to send back."""
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    place, rule = ".".join(map(str, first["loc"])), first["msg"]
    if first["type"] == "json_invalid":
        place, rule = "the body", first["ctx"]["error"]
    message = f"{place}: {rule}".encode("ascii", "backslashreplace").decode()
    return JSONResponse({"error": {"message": message, "type": "RequestValidationError"}}, 422)
