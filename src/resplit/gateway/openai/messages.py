"""The messages of a conversation as clients send them, and as chat templates read them.

Clients replay what other servers answered, so fields that do not change the answer are ignored.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, PlainValidator, model_validator

from resplit.gateway.openai.template_input import TemplateCall, TemplateMessage
from resplit.strict_json import read_json

MOST_LEVELS = 200  # of JSON in a request: schemas are nested


def utf8(text: str) -> str:
    """The text itself; ValueError if it is not valid Unicode."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("must be valid Unicode; found half of a surrogate pair") from None
    return text


def joined_parts(value: object) -> str:
    """A text, or parts of type text joined; ValueError for anything else."""
    parts = [{"type": "text", "text": value}] if isinstance(value, str) else value
    if isinstance(parts, list) and parts and all(_is_text(part) for part in parts):
        return utf8("".join(part["text"] for part in parts))
    raise ValueError("must be a text or a list of parts of type 'text'")


def _joined_or_none(value: object) -> str | None:
    return None if value is None else joined_parts(value)


def _is_text(part: object) -> bool:
    kinds = ("text", "input_text", "output_text")  # the last two in /v1/responses
    return isinstance(part, dict) and part.get("type") in kinds and isinstance(part.get("text"), str)


Str = Annotated[str, AfterValidator(utf8)]


class LenientPart(BaseModel):
    """A part of a body whose unknown fields, such as `strict` of a tool, are ignored: they do not change the answer."""

    model_config = ConfigDict(extra="ignore", strict=True, frozen=True)


class TextPart(LenientPart):
    """A part of a message."""

    type: Literal["text"]
    text: str


Content = Annotated[str | None, PlainValidator(_joined_or_none, json_schema_input_type=str | list[TextPart] | None)]


class CalledFunction(LenientPart):
    """The function that an earlier answer called; `arguments` is JSON."""

    name: Str
    arguments: Str


class ToolCall(LenientPart):
    """A call in an earlier answer."""

    id: Str | None = None
    function: CalledFunction

    def plain(self) -> TemplateCall:
        """The call for a chat template, which gets the arguments as an object where they are valid JSON."""
        try:
            arguments = read_json(self.function.arguments, MOST_LEVELS)
        except ValueError:
            arguments = self.function.arguments
        call: TemplateCall = {"type": "function", "function": {"name": self.function.name, "arguments": arguments}}
        if self.id:
            call["id"] = self.id
        return call


class Message(LenientPart):
    """One message of a conversation. A client may send an answer back unchanged, also that of another server."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Content = None
    name: Str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: Str | None = None

    @model_validator(mode="after")
    def _only_answers_may_be_empty(self) -> Message:
        if self.content is None and self.role != "assistant":
            raise ValueError(f"a message of role '{self.role}' needs a 'content'")
        return self

    def plain(self) -> TemplateMessage:
        """The message for a chat template: templates still call the role `developer` `system`."""
        role = "system" if self.role == "developer" else self.role
        message: TemplateMessage = {"role": role, "content": self.content or ""}
        if self.tool_calls:
            message["tool_calls"] = [call.plain() for call in self.tool_calls]
        if self.role == "tool":
            if self.name:
                message["name"] = self.name
            if self.tool_call_id:
                message["tool_call_id"] = self.tool_call_id
        return message
