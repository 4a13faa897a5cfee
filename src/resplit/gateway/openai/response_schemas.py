"""Requests of OpenAI's newer endpoint, /v1/responses, as far as they are about text.

Such a request says the same as one to /v1/chat/completions, and becomes one.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from resplit.gateway.openai.messages import Message, Str
from resplit.gateway.openai.schemas import ChatRequest, Neutral, RequestNotes, StrictBody, Temperature, TopP
from resplit.gateway.openai.template_input import Schema
from resplit.gateway.openai.tool_schemas import JsonSchema, Name, ResponseFormat


def _as_messages(value: object) -> object:
    return [{"role": "user", "content": value}] if isinstance(value, str) else value


Input = Annotated[
    list[Message],
    Field(min_length=1, fail_fast=True),
    BeforeValidator(_as_messages, json_schema_input_type=str | list[Message]),
]


class TextFormat(StrictBody):
    """The form of an answer: any text, any JSON object, or JSON by a schema."""

    type: Literal["text", "json_object", "json_schema"] = "text"
    name: Name | None = None
    schema_: Annotated[Schema, Field(alias="schema")] = Field(default_factory=dict)
    description: Any = None
    strict: Any = None

    def for_chat(self) -> ResponseFormat:
        """The same form as a chat names it."""
        return ResponseFormat(type=self.type, json_schema=JsonSchema(name=self.name or "answer", schema=self.schema_))


class TextOptions(StrictBody):
    """How the answer is written."""

    format: TextFormat = TextFormat()
    verbosity: Annotated[Any, Neutral("medium")] = None


class ResponseStreamOptions(StrictBody):
    """What a stream contains besides the text."""

    include_obfuscation: Any = None


class ResponseRequest(RequestNotes):
    """Body of POST /v1/responses."""

    model: Str
    input: Input
    instructions: Str | None = None
    max_output_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Temperature | None = None
    top_p: TopP | None = None
    text: TextOptions | None = None
    stream: bool | None = None
    stream_options: ResponseStreamOptions | None = None

    # Nothing is stored, so nothing can be referred to. Tools are called in /v1/chat/completions.
    background: Annotated[Any, Neutral(False)] = None
    conversation: Annotated[Any, Neutral()] = None
    include: Annotated[Any, Neutral([], ["reasoning.encrypted_content"])] = None
    max_tool_calls: Annotated[Any, Neutral()] = None
    previous_response_id: Annotated[Any, Neutral()] = None
    prompt: Annotated[Any, Neutral()] = None
    reasoning: Annotated[Any, Neutral({}, {"effort": "none"})] = None
    tool_choice: Annotated[Any, Neutral("none", "auto")] = None
    tools: Annotated[Any, Neutral([])] = None
    top_logprobs: Annotated[Any, Neutral(0)] = None
    truncation: Annotated[Any, Neutral("disabled")] = None

    parallel_tool_calls: Any = None  # ignored: without tools it does not change the answer

    @property
    def text_format(self) -> TextFormat:
        """The form of the answer."""
        return self.text.format if self.text else TextFormat()

    def chat(self) -> ChatRequest:
        """The same request as a chat."""
        before = [] if self.instructions is None else [Message(role="system", content=self.instructions)]
        return ChatRequest(
            model=self.model,
            messages=[*before, *self.input],
            max_completion_tokens=self.max_output_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            response_format=self.text_format.for_chat(),
            stream=self.stream,
        )
