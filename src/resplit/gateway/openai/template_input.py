"""Messages and tools as chat templates read them."""

from __future__ import annotations

from typing import Any, Literal, NotRequired, TypedDict

# A JSON schema as a client sends it. It can be any JSON object.
Schema = dict[str, Any]


class TemplateFunction(TypedDict):
    """A function that the model may call."""

    name: str
    description: NotRequired[str]
    parameters: NotRequired[Schema]


class TemplateTool(TypedDict):
    """A tool that the model may call."""

    type: Literal["function"]
    function: TemplateFunction


class TemplateFunctionCall(TypedDict):
    """A function that was called. The arguments are an object, or the text that the client sent if that is no JSON."""

    name: str
    arguments: object


class TemplateCall(TypedDict):
    """A call in an earlier answer."""

    id: NotRequired[str]
    type: Literal["function"]
    function: TemplateFunctionCall


class TemplateMessage(TypedDict):
    """One message of a conversation."""

    role: str
    content: str
    tool_calls: NotRequired[list[TemplateCall]]
    name: NotRequired[str]
    tool_call_id: NotRequired[str]
