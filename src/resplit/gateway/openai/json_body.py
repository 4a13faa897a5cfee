"""JSON from clients, read so strictly that everything after it can use and repeat what it found."""

from __future__ import annotations

import json
from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request, Response
from fastapi.routing import APIRoute
from pydantic_core import from_json

from resplit.gateway.openai.http_errors import http_error


def read_json(text: str | bytes) -> Any:
    """The value of a JSON text; ValueError unless its texts are Unicode, its numbers finite, its depth at most 200.

    Python's own parser accepts halves of surrogate pairs, NaN, and so many levels that a later step runs out of stack.
    """
    value = from_json(text, allow_inf_nan=False)
    json.dumps(value, allow_nan=False)  # 1e999 was read as infinity
    return value


class JsonRoute(APIRoute):
    """A route that reads its body by `read_json`; HTTPException (400) if that fails."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """The handler of FastAPI, with such requests."""
        handler = super().get_route_handler()

        async def handle(request: Request) -> Response:
            return await handler(_StrictRequest(request.scope, request.receive))

        return handle


class _StrictRequest(Request):
    async def json(self) -> Any:
        try:
            return read_json(await self.body())
        except ValueError as error:
            raise http_error(400, f"the body is not valid JSON: {error}") from error
