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

from resplit.gateway.openai.messages import Message, Str, utf8
from resplit.types import Sampling

# Below this temperature sampling is greedy in effect (a lead of 0.01 in the logits is a factor of e^100), and the
# division could overflow.
_GREEDY_BELOW = 1e-4


class _Neutral:
    """Marks a parameter that is not implemented: it must be absent, null, or one of the neutral `values`."""

    def __init__(self, *values: object) -> None:
        self._values = (None, *values)

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_after_validator_function(self._check, handler(source))

    def __get_pydantic_json_schema__(self, _core: CoreSchema, _handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return {"enum": list(self._values)}

    def _check(self, value: object) -> object:
        if any(value == neutral and isinstance(value, bool) == isinstance(neutral, bool) for neutral in self._values):
            return value
        raise ValueError("this gateway does not support this value; leave the parameter out")


def _one_prompt(value: object) -> str | list[int]:
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], (str, list)):
        value = value[0]
    if isinstance(value, str) and value:
        return utf8(value)
    if isinstance(value, list) and value and all(type(item) is int and item >= 0 for item in value):
        return value
    raise ValueError("must be one text or one list of token ids, and not empty")


def _up_to_four(value: object) -> tuple[str, ...]:
    stops = [] if value is None else [value] if isinstance(value, str) else value
    if isinstance(stops, list) and len(stops) <= 4 and all(isinstance(stop, str) and stop for stop in stops):
        return tuple(map(utf8, stops))
    raise ValueError("must be one text or a list of up to four, none of them empty")


def _float32(value: float) -> float:
    rounded: float = struct.unpack("f", struct.pack("f", value))[0]
    return rounded


# Nodes get such numbers in single precision. Rounded here, a value that vanishes there counts as zero everywhere.
Float32 = Annotated[float, AfterValidator(_float32)]
Prompt = Annotated[
    str | list[int],
    PlainValidator(_one_prompt, json_schema_input_type=str | list[int] | list[str] | list[list[int]]),
]
Stops = Annotated[tuple[str, ...], PlainValidator(_up_to_four, json_schema_input_type=str | list[str] | None)]


class _Request(BaseModel):
    # Unknown parameters are refused, as by OpenAI: if a misspelt one were ignored, the answer would be wrong.
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class StreamOptions(_Request):
    """What a stream contains besides the text."""

    include_usage: bool | None = None
    include_obfuscation: Any = None


class _Generation(_Request):
    """The parameters of both endpoints."""

    model: Str
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[Float32, Field(ge=0, le=2, allow_inf_nan=False)] | None = None
    top_p: Annotated[Float32, Field(ge=0, le=1, allow_inf_nan=False)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: Stops = ()
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    # Not implemented.
    n: Annotated[Any, _Neutral(1)] = None
    frequency_penalty: Annotated[Any, _Neutral(0)] = None
    presence_penalty: Annotated[Any, _Neutral(0)] = None
    logit_bias: Annotated[Any, _Neutral({})] = None

    # Ignored: these do not change the answer.
    user: Any = None
    metadata: Any = None
    store: Any = None
    service_tier: Any = None
    safety_identifier: Any = None
    prompt_cache_key: Any = None
    prompt_cache_retention: Any = None

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
        return Sampling(temperature, top_p, seed)


class TokenizeRequest(_Request):
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


class CompletionRequest(_Generation):
    """Body of POST /v1/completions. `ignore_eos` and `return_token_ids` are extensions."""

    prompt: Prompt
    ignore_eos: bool | None = None
    return_token_ids: bool | None = None

    best_of: Annotated[Any, _Neutral(1)] = None
    echo: Annotated[Any, _Neutral(False)] = None
    logprobs: Annotated[Any, _Neutral()] = None
    suffix: Annotated[Any, _Neutral("")] = None

    @property
    def default_tokens(self) -> int:
        """New tokens if none are requested: 16, as in OpenAI's API."""
        return 16


class ChatRequest(_Generation):
    """Body of POST /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1, fail_fast=True)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None

    logprobs: Annotated[Any, _Neutral(False)] = None
    top_logprobs: Annotated[Any, _Neutral(0)] = None
    tools: Annotated[Any, _Neutral([])] = None
    tool_choice: Annotated[Any, _Neutral("none", "auto")] = None
    functions: Annotated[Any, _Neutral([])] = None
    function_call: Annotated[Any, _Neutral("none", "auto")] = None
    response_format: Annotated[Any, _Neutral({"type": "text"})] = None
    modalities: Annotated[Any, _Neutral(["text"])] = None
    audio: Annotated[Any, _Neutral()] = None
    prediction: Annotated[Any, _Neutral()] = None
    reasoning_effort: Annotated[Any, _Neutral("none")] = None
    verbosity: Annotated[Any, _Neutral()] = None
    web_search_options: Annotated[Any, _Neutral()] = None
    parallel_tool_calls: Any = None

    @property
    def new_tokens(self) -> int | None:
        """The requested number of new tokens; None: as many as is usual."""
        return self.max_completion_tokens or self.max_tokens
