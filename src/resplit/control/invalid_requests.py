"""The control API's answer to a request that cannot be read."""

from __future__ import annotations

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse


async def invalid_request(request: Request, error: Exception) -> JSONResponse:
    """A 422 that names the place and the rule. It does not repeat the input, which might be impossible to send back."""
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    place, rule = ".".join(map(str, first["loc"])), first["msg"]
    if first["type"] == "json_invalid":
        place, rule = "the body", first["ctx"]["error"]
    message = f"{place}: {rule}".encode("ascii", "backslashreplace").decode()
    return JSONResponse({"error": {"message": message, "type": "RequestValidationError"}}, 422)
