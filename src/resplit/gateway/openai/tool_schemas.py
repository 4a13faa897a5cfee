"""Tools and structured answers as a request asks for them."""

from __future__ import annotations

from typing import Annotated, Literal, cast

from pydantic import Field

from resplit.gateway.openai.messages import LenientPart
from resplit.gateway.openai.template_input import Schema, TemplateTool

Name = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")]


class Function(LenientPart):
    """A function that the model may call; `parameters` is a JSON schema."""

    name: Name
    description: str | None = None
    parameters: Schema | None = None


class Tool(LenientPart):
    """A tool; all are functions."""

    type: Literal["function"]
    function: Function

    def plain(self) -> TemplateTool:
        """The tool for a chat template."""
        return cast("TemplateTool", self.model_dump(exclude_none=True))


class _NamedFunction(LenientPart):
    name: Name


class NamedTool(LenientPart):
    """The one tool that must be called."""

    type: Literal["function"]
    function: _NamedFunction


class JsonSchema(LenientPart):
    """A named schema."""

    name: Name
    schema_: Schema = Field(default_factory=dict, alias="schema")


class ResponseFormat(LenientPart):
    """The form of an answer: any text, any JSON object, or JSON by a schema."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    def schema_of_answer(self) -> Schema | None:
        """The schema that the answer follows; None for any text."""
        if self.type == "json_schema":
            return self.json_schema.schema_ if self.json_schema else {}
        return {"type": "object"} if self.type == "json_object" else None


ToolChoice = Literal["none", "auto", "required"] | NamedTool
