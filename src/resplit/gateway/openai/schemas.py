"""Requests of the OpenAI API as this gateway accepts them.

Some parameters are not implemented. Those that would change the answer must be absent or have their neutral value. The
others are ignored.
"""

from __future__ import annotations

import secrets
import struct
from typing import Annotated, Any

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    PlainValidator,
    model_validator,
)
from pydantic_core import CoreSchema, core_schema

from resplit.gateway.openai.grammars import json_rule
from resplit.gateway.openai.messages import Message, Str, utf8
from resplit.gateway.openai.schema_cost import ensure_compilable
from resplit.gateway.openai.steering import Grammar, RequestSteering
from resplit.gateway.openai.template_input import Schema, TemplateTool
from resplit.gateway.openai.tool_schemas import NamedTool, ResponseFormat, Tool, ToolChoice
from resplit.gateway.openai.tools import ToolForm, answer_grammar
from resplit.types import Sampling

# Below this temperature sampling is greedy in effect (a lead of 0.01 in the logits is a factor of e^100), and the
# division could overflow.
_GREEDY_BELOW = 1e-4
_MOST_CHOICES = 128  # of one request
_MOST_STOPS = 16
_MOST_BIASES = 1024
MOST_LIKELY = 20
_MOST_TOOLS = 128


class Neutral:
    """Marks a parameter that is not implemented: it must be absent, null, or one of the neutral `values`."""

    def __init__(self, *values: object) -> None:
        self._values = (None, *values)

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_after_validator_function(self._check, handler(source))

    def __get_pydantic_json_schema__(self, _core: CoreSchema, _handler: GetJsonSchemaHandler) -> Schema:
        return {"enum": list(self._values)}

    def _check(self, value: object) -> object:
        if any(value == neutral and isinstance(value, bool) == isinstance(neutral, bool) for neutral in self._values):
            return value
        raise ValueError("this gateway does not support this value; leave the parameter out")


def _prompts(value: object) -> tuple[str | list[int], ...]:
    several = isinstance(value, list) and bool(value) and isinstance(value[0], (str, list))
    prompts = value if several else [value]
    if isinstance(prompts, list) and len(prompts) <= _MOST_CHOICES and all(map(_is_prompt, prompts)):
        return tuple(utf8(prompt) if isinstance(prompt, str) else prompt for prompt in prompts)
    raise ValueError(f"must be a text, a list of token ids, or a list of up to {_MOST_CHOICES} of these, none empty")


def _is_prompt(value: object) -> bool:
    if isinstance(value, list):
        return bool(value) and all(type(item) is int and item >= 0 for item in value)
    return isinstance(value, str) and bool(value)


def _stops(value: object) -> tuple[str, ...]:
    stops = [] if value is None else [value] if isinstance(value, str) else value
    if isinstance(stops, list) and len(stops) <= _MOST_STOPS and all(isinstance(stop, str) and stop for stop in stops):
        return tuple(map(utf8, stops))
    raise ValueError(f"must be one text or a list of up to {_MOST_STOPS}, none of them empty")


def _float32(value: float) -> float:
    rounded: float = struct.unpack("f", struct.pack("f", value))[0]
    return rounded


# Nodes get such numbers in single precision. Rounded here, a value that vanishes there counts as zero everywhere.
Float32 = Annotated[float, AfterValidator(_float32)]
TokenId = Annotated[int, Field(ge=0, lt=2**31)]
TokenKey = Annotated[str, Field(pattern=r"^[0-9]{1,9}$")]
Temperature = Annotated[Float32, Field(ge=0, le=2, allow_inf_nan=False)]
TopP = Annotated[Float32, Field(ge=0, le=1, allow_inf_nan=False)]
Bias = Annotated[Float32, Field(ge=-100, le=100, allow_inf_nan=False)]
Prompts = Annotated[
    tuple[str | list[int], ...],
    PlainValidator(_prompts, json_schema_input_type=str | list[int] | list[str] | list[list[int]]),
]
Stops = Annotated[tuple[str, ...], PlainValidator(_stops, json_schema_input_type=str | list[str] | None)]


class StrictBody(BaseModel):
    """A body, or a part of one."""

    # Unknown parameters are refused, as by OpenAI: if a misspelt one were ignored, the answer would be wrong.
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class StreamOptions(StrictBody):
    """What a stream contains besides the text."""

    include_usage: bool | None = None
    include_obfuscation: Any = None
    continuous_usage_stats: Annotated[Any, Neutral(False)] = None


class RequestNotes(StrictBody):
    """Keys of every request that do not change the answer. They are ignored."""

    user: Any = None
    metadata: Any = None
    store: Any = None
    service_tier: Any = None
    safety_identifier: Any = None
    prompt_cache_key: Any = None
    prompt_cache_retention: Any = None
    cache_prompt: Any = None
    cache_salt: Any = None
    request_id: Any = None
    priority: Any = None


class _Generation(RequestNotes):
    """The parameters of both endpoints."""

    model: Str
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Temperature | None = None
    top_p: TopP | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: Stops = ()
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    n: Annotated[int, Field(ge=1, le=_MOST_CHOICES)] | None = None
    frequency_penalty: Annotated[Float32, Field(ge=-2, le=2, allow_inf_nan=False)] | None = None
    presence_penalty: Annotated[Float32, Field(ge=-2, le=2, allow_inf_nan=False)] | None = None
    logit_bias: dict[TokenKey, Bias] | None = Field(default=None, max_length=_MOST_BIASES)

    # Extensions, named as by other servers.
    top_k: Annotated[int, Field(ge=-1, lt=2**31)] | None = None
    min_p: Annotated[Float32, Field(ge=0, le=1, allow_inf_nan=False)] | None = None
    stop_token_ids: Annotated[list[TokenId], Field(max_length=_MOST_BIASES)] | None = None
    ignore_eos: bool | None = None

    # Of other servers, whose clients and benchmarks send them in each request.
    repetition_penalty: Annotated[Any, Neutral(1)] = None
    repeat_penalty: Annotated[Any, Neutral(1)] = None
    length_penalty: Annotated[Any, Neutral(1)] = None
    typical_p: Annotated[Any, Neutral(1)] = None
    min_tokens: Annotated[Any, Neutral(0)] = None
    use_beam_search: Annotated[Any, Neutral(False)] = None
    skip_special_tokens: Annotated[Any, Neutral(True)] = None
    spaces_between_special_tokens: Any = None  # they are skipped
    include_stop_str_in_output: Annotated[Any, Neutral(False)] = None
    prompt_logprobs: Annotated[Any, Neutral()] = None
    truncate_prompt_tokens: Annotated[Any, Neutral()] = None

    @model_validator(mode="after")
    def _options_need_a_stream(self) -> _Generation:
        if self.stream_options is not None and not self.stream:
            raise ValueError("'stream_options' is only allowed when 'stream' is true")
        return self

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with a chunk that counts the tokens."""
        return bool(self.stream_options and self.stream_options.include_usage)

    @property
    def new_tokens(self) -> int | None:
        """The requested number of new tokens, or None."""
        return self.max_tokens

    @property
    def default_tokens(self) -> int | None:
        """New tokens if none are requested; None: as many as the class expects."""
        return None

    def sampling(self) -> Sampling:
        """How to choose tokens: greedy without a temperature, and with a random seed if none is given."""
        temperature = self.temperature or 0.0
        top_p = 1.0 if self.top_p is None else self.top_p
        if temperature < _GREEDY_BELOW or top_p == 0:
            return Sampling()
        seed = secrets.randbits(32) if self.seed is None else self.seed % 2**63
        return Sampling(temperature, top_p, seed, max(0, self.top_k or 0), self.min_p or 0.0)

    def bias(self) -> dict[int, float]:
        """What is added to the logits of tokens, by token id."""
        return {int(token): value for token, value in (self.logit_bias or {}).items()}

    def steering(self, grammar: Grammar | None = None) -> RequestSteering | None:
        """The changes of logits that are asked for; None if there are none."""
        bias, frequency, presence = self.bias(), self.frequency_penalty or 0.0, self.presence_penalty or 0.0
        wanted = bias or frequency or presence or grammar
        return RequestSteering(bias, frequency, presence, grammar) if wanted else None


class TokenizeRequest(StrictBody):
    """Body of POST /tokenize: one of `prompt` and `messages`."""

    model: Str | None = None
    prompt: Str | None = None
    messages: list[Message] | None = None
    add_special_tokens: Any = None
    add_generation_prompt: Any = None

    @model_validator(mode="after")
    def _one_of_both(self) -> TokenizeRequest:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("give either 'prompt' or 'messages'")
        return self


class DetokenizeRequest(StrictBody):
    """Body of POST /detokenize."""

    model: Str | None = None
    tokens: list[TokenId]


class CompletionRequest(_Generation):
    """Body of POST /v1/completions. `return_token_ids` is an extension."""

    prompt: Prompts
    return_token_ids: bool | None = None

    max_tokens: Annotated[int, Field(ge=0)] | None = None
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=MOST_LIKELY)] | None = None

    best_of: Annotated[Any, Neutral(1)] = None
    add_special_tokens: Annotated[Any, Neutral(True)] = None
    suffix: Annotated[Any, Neutral("")] = None

    @model_validator(mode="after")
    def _choices_are_few(self) -> CompletionRequest:
        if len(self.prompt) * (self.n or 1) > _MOST_CHOICES:
            raise ValueError(f"prompts times 'n' may be at most {_MOST_CHOICES}")
        if self.max_tokens == 0 and not self.echo:
            raise ValueError("'max_tokens' may be 0 only with 'echo'")
        return self

    @property
    def most_likely(self) -> int | None:
        """How many of the most likely tokens are wanted with log probabilities; None if neither is wanted."""
        return self.logprobs

    @property
    def default_tokens(self) -> int:
        """New tokens if none are requested: 16, as in OpenAI's API."""
        return 16


class ChatRequest(_Generation):
    """Body of POST /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1, fail_fast=True)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None

    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MOST_LIKELY)] | None = None

    tools: Annotated[list[Tool], Field(max_length=_MOST_TOOLS)] | None = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    response_format: ResponseFormat | None = None

    echo: Annotated[Any, Neutral(False)] = None
    add_special_tokens: Annotated[Any, Neutral(False)] = None
    add_generation_prompt: Annotated[Any, Neutral(True)] = None
    continue_final_message: Annotated[Any, Neutral(False)] = None
    chat_template: Annotated[Any, Neutral()] = None
    chat_template_kwargs: Annotated[Any, Neutral({})] = None
    functions: Annotated[Any, Neutral([])] = None
    function_call: Annotated[Any, Neutral("none", "auto")] = None
    modalities: Annotated[Any, Neutral(["text"])] = None
    audio: Annotated[Any, Neutral()] = None
    prediction: Annotated[Any, Neutral()] = None
    reasoning_effort: Annotated[Any, Neutral("none")] = None
    verbosity: Annotated[Any, Neutral()] = None
    web_search_options: Annotated[Any, Neutral()] = None

    @property
    def new_tokens(self) -> int | None:
        """The requested number of new tokens; None: as many as is usual."""
        return self.max_completion_tokens or self.max_tokens

    @property
    def most_likely(self) -> int | None:
        """How many of the most likely tokens are wanted with log probabilities; None: none of both."""
        return (self.top_logprobs or 0) if self.logprobs else None

    @model_validator(mode="after")
    def _a_form_ends_the_answer(self) -> ChatRequest:
        if self.ignore_eos and (self.callable_tools() or self.response_format):
            raise ValueError("'ignore_eos' cannot be combined with 'tools' or 'response_format', which end the answer")
        return self

    @model_validator(mode="after")
    def _a_required_tool_exists(self) -> ChatRequest:
        names = [tool.function.name for tool in self.tools or ()]
        wanted = self.tool_choice.function.name if isinstance(self.tool_choice, NamedTool) else None
        if (wanted is not None and wanted not in names) or (self.tool_choice == "required" and not names):
            raise ValueError("'tool_choice' requires a tool that is not in 'tools'")
        return self

    def callable_tools(self) -> list[TemplateTool]:
        """The tools that may be called, for a chat template."""
        return [] if self.tool_choice == "none" else [tool.plain() for tool in self.tools or ()]

    def lark(self, form: ToolForm) -> str | None:
        """The grammar that the answer follows, with calls in the form of the model; None for any text.

        RequestError if it would take too long to compile.
        """
        tools = self.callable_tools()
        schema = self.response_format.schema_of_answer() if self.response_format else None
        if isinstance(self.tool_choice, NamedTool):
            tools = [tool for tool in tools if tool["function"]["name"] == self.tool_choice.function.name]
        ensure_compilable([schema or {}, *(tool["function"].get("parameters") or {} for tool in tools)])
        if tools:
            named = isinstance(self.tool_choice, NamedTool)  # then it is called once
            several = self.parallel_tool_calls is not False and not named
            return answer_grammar(form, tools, named or self.tool_choice == "required", several, schema)
        return None if schema is None else f"start: {json_rule(schema)}"

    @model_validator(mode="after")
    def _top_logprobs_need_logprobs(self) -> ChatRequest:
        if self.top_logprobs and not self.logprobs:
            raise ValueError("'top_logprobs' is only allowed when 'logprobs' is true")
        return self
