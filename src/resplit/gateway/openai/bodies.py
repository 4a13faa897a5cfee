"""The JSON that the API answers, field by field. What it reads is checked by pydantic models instead."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NotRequired

# FastAPI documents answers of these types, and for that it needs this TypedDict below Python 3.12.
from typing_extensions import TypedDict

Finish = Literal["stop", "length", "tool_calls"]
Status = Literal["in_progress", "completed", "incomplete"]  # of a response


class ModelCard(TypedDict):
    """The model as /v1/models lists it."""

    id: str
    object: str
    created: int
    owned_by: str
    max_model_len: int


class ModelList(TypedDict):
    """All models, of which there is one."""

    object: str
    data: list[ModelCard]


class TokenizedPrompt(TypedDict):
    """The token ids of a prompt."""

    count: int
    max_model_len: int
    tokens: Sequence[int]


class DetokenizedPrompt(TypedDict):
    """The text of token ids, named as by vLLM."""

    prompt: str


class ErrorObject(TypedDict):
    """What was wrong, and with which parameter."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(TypedDict):
    """The body of an answer, or the event of a stream, that failed."""

    error: ErrorObject


class Usage(TypedDict):
    """The tokens of a completion or a chat."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class TokenLogprob(TypedDict):
    """A token of a chat and its log probability."""

    token: str
    logprob: float
    bytes: list[int]


class ChosenLogprob(TokenLogprob):
    """A token that was generated, beside the most likely ones."""

    top_logprobs: list[TokenLogprob]


class ChatLogprobs(TypedDict):
    """The log probabilities of a chat's choice."""

    content: list[ChosenLogprob]
    refusal: None


class CompletionLogprobs(TypedDict):
    """The log probabilities of a completion's choice, each list by token."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class FunctionCall(TypedDict):
    """The function that is called; `arguments` is JSON."""

    name: str
    arguments: str


class ToolCallBody(TypedDict):
    """A call of a tool; in a chunk with its index."""

    index: NotRequired[int]
    id: str
    type: Literal["function"]
    function: FunctionCall


class Delta(TypedDict, total=False):
    """What a chunk adds to the message of a chat."""

    role: str
    content: str
    tool_calls: list[ToolCallBody]


class AssistantMessage(TypedDict):
    """The answer to a chat."""

    role: Literal["assistant"]
    content: str | None
    refusal: None
    tool_calls: NotRequired[list[ToolCallBody]]


class ChoiceContent(TypedDict, total=False):
    """One of these: the text of a completion, the message of a chat, or what a chunk adds to that message.

    The ids of its tokens stand beside it if they are wanted.
    """

    text: str
    message: AssistantMessage
    delta: Delta
    token_ids: list[int]


class ChoiceBody(ChoiceContent):
    """One choice of a completion or a chat, or what a chunk adds to it."""

    index: int
    logprobs: ChatLogprobs | CompletionLogprobs | None
    finish_reason: Finish | None


class CompletionBody(TypedDict):
    """The answer of a completion or a chat, or a chunk of it."""

    id: str
    object: str
    created: int
    model: str
    choices: list[ChoiceBody]
    usage: NotRequired[Usage | None]


class CachedTokens(TypedDict):
    """The tokens of a prompt that were read from a cache, and written to one."""

    cached_tokens: int
    cache_write_tokens: int


class ReasoningTokens(TypedDict):
    """The tokens that a model generated and did not show."""

    reasoning_tokens: int


class ResponseUsage(TypedDict):
    """The tokens of a response."""

    input_tokens: int
    input_tokens_details: CachedTokens
    output_tokens: int
    output_tokens_details: ReasoningTokens
    total_tokens: int


class OutputText(TypedDict):
    """The text of a response's message."""

    type: Literal["output_text"]
    text: str
    annotations: list[object]
    logprobs: list[object]


class OutputMessage(TypedDict):
    """The message of a response."""

    id: str
    type: Literal["message"]
    status: Status
    role: Literal["assistant"]
    content: list[OutputText]


class IncompleteDetails(TypedDict):
    """Why a response ended early."""

    reason: Literal["max_output_tokens"]


class TextSettings(TypedDict):
    """The form of a response's text, as it was requested."""

    format: dict[str, object]


class ResponseBody(TypedDict):
    """A response, with the settings that were requested."""

    id: str
    object: Literal["response"]
    created_at: int
    status: Status
    error: None
    incomplete_details: IncompleteDetails | None
    instructions: str | None
    max_output_tokens: int | None
    metadata: dict[str, str]
    model: str
    output: list[OutputMessage]
    parallel_tool_calls: bool
    previous_response_id: None
    store: bool
    temperature: float
    text: TextSettings
    tool_choice: str
    tools: list[object]
    top_p: float
    truncation: str
    usage: ResponseUsage | None


class PartContent(TypedDict, total=False):
    """What an event tells about the text of a response's message."""

    part: OutputText
    delta: str
    text: str
    logprobs: list[object]


class EventContent(PartContent, total=False):
    """The fields of an event of a response; each type has some of them."""

    response: ResponseBody
    item: OutputMessage
    item_id: str
    output_index: int
    content_index: int
    code: str | None
    message: str
    param: str | None
    error: ErrorObject


class ResponseEvent(EventContent):
    """An event of a response that is streamed."""

    type: str
    sequence_number: int


Event = CompletionBody | ResponseEvent | ErrorBody
