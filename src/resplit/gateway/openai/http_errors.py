"""Errors in the OpenAI API's form: status, type, code, and a message without internal details."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any, cast

from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

from resplit.errors import CapacityError, QueueTimeoutError, http_status
from resplit.gateway.openai.bodies import ErrorObject

_CODES = {413: "too_large", 429: "rate_limit_exceeded", 503: "service_unavailable", 504: "deadline_exceeded"}
RETRY_AFTER_S = "2"  # while nodes are lost: a new placement takes about so long
_MAX_SHOWN_CHARS = 200  # of a client's input in an error message


def http_error(
    status: int,
    message: str,
    code: str | None = None,
    param: str | None = None,
    headers: Mapping[str, str] | None = None,
) -> HTTPException:
    """An exception to raise: it becomes an answer with `status` and an error object in the form of OpenAI."""
    kind = "rate_limit_error" if status == 429 else "server_error" if status >= 500 else "invalid_request_error"
    return HTTPException(status, {"message": message, "type": kind, "param": param, "code": code}, headers)  # type: ignore[arg-type]


def as_http(error: Exception) -> HTTPException:
    """Any error as an HTTPException in the form of `http_error`. A defect becomes a 500 without details."""
    match error:
        case HTTPException():
            ours = isinstance(error.detail, dict)
            return (
                error
                if ours
                else http_error(error.status_code, error.detail, _CODES.get(error.status_code), headers=error.headers)
            )
        case RequestValidationError():
            return _invalid(error.errors()[0])
    status = http_status(error)
    if status == 500:
        return http_error(500, "the server failed to process the request; see its log", "internal_error")
    message = str(error) or "the request missed its deadline"  # a TimeoutError has no message of its own
    wait_s = {503: RETRY_AFTER_S}.get(status)
    if isinstance(error, CapacityError | QueueTimeoutError):
        wait_s = str(max(1, math.ceil(error.retry_after_s)))
    return http_error(status, message, _CODES.get(status), headers={"Retry-After": wait_s} if wait_s else None)


def error_object(error: HTTPException) -> ErrorObject:
    """What was given to `http_error`.

    As JSON it must be ASCII, because a message may repeat input that is not valid Unicode.
    """
    return cast("ErrorObject", error.detail)


def response(error: Exception) -> Response:
    """The HTTP answer to `error`."""
    answer = as_http(error)
    return Response(json.dumps({"error": error_object(answer)}), answer.status_code, answer.headers, "application/json")


def _invalid(found: Mapping[str, Any]) -> HTTPException:
    """A 400 that names the first error that pydantic found in a request's body or headers."""
    param = ".".join(map(str, found["loc"][1:]))[:_MAX_SHOWN_CHARS]
    match found["type"]:
        case "json_invalid":
            return http_error(400, f"the body is not valid JSON: {found['ctx']['error']}")
        case "extra_forbidden":
            return http_error(400, f"unrecognized request argument supplied: {param}", "unknown_parameter", param)
        case "missing" if param:
            return http_error(400, f"missing required parameter: '{param}'", "missing_required_parameter", param)
        case "value_error" if param:
            return http_error(400, f"invalid '{param}': {found['ctx']['error']}", "invalid_value", param)
        case "value_error":
            return http_error(400, str(found["ctx"]["error"]), "invalid_value")
        case "missing" | "model_attributes_type" if not param:
            return http_error(400, "the body must be a JSON object, sent with the content type application/json")
    return http_error(400, f"invalid '{param or 'body'}': {found['msg']}", "invalid_value", param or None)
