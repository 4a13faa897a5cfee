"""JSON from clients: finite numbers, whole characters and bounded nesting, or an error in words.

Python's parser accepts more: values that could then not be written to a file, a database or an answer.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Coroutine
from typing import Any, ClassVar

from fastapi import Request, Response
from fastapi.routing import APIRoute
from pydantic import JsonValue


def read_json(text: str | bytes, most_levels: int) -> JsonValue:
    """The value of a JSON text. ValueError with the rule that the text breaks."""
    try:
        value: JsonValue = json.loads(text)
    except RecursionError:
        raise ValueError(f"is nested deeper than {most_levels} levels") from None
    _check(value, most_levels, 0)
    return value


def _check(value: JsonValue, most_levels: int, depth: int) -> None:
    if depth > most_levels:
        raise ValueError(f"is nested deeper than {most_levels} levels")
    match value:
        case float() if not math.isfinite(value):
            raise ValueError("has a number that is not finite, or too large")
        case str():
            _check_text(value)
        case list():
            for item in value:
                _check(item, most_levels, depth + 1)
        case dict():
            for key, item in value.items():
                _check_text(key)
                _check(item, most_levels, depth + 1)


def _check_text(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("has a text with half of a surrogate pair") from None


class StrictRoute(APIRoute):
    """A route whose body is read by `read_json`."""

    most_levels: ClassVar[int] = 32

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """The handler of FastAPI, behind a request that reads strictly."""
        handler, most_levels = super().get_route_handler(), self.most_levels

        class StrictRequest(Request):
            async def json(self) -> Any:
                try:
                    return read_json(await self.body(), most_levels)
                except json.JSONDecodeError:
                    raise
                except ValueError as error:  # FastAPI passes on the reason of this exception only
                    raise json.JSONDecodeError(str(error), "", 0) from None

        async def handle(request: Request) -> Response:
            return await handler(StrictRequest(request.scope, request.receive))

        return handle
