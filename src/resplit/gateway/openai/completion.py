"""From generated tokens to an answer: pieces of final text, and the bodies of the OpenAI API that contain them."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any, Literal, cast

from resplit.gateway.engine import Engine, GeneratedToken, GenerationRequest
from resplit.gateway.openai.metrics import Stopwatch
from resplit.gateway.openai.text import Detokenizer, StopStrings, Text

Finish = Literal["stop", "length"]


@dataclass(frozen=True)
class Piece:
    """What one token adds to the answer: `text` that is final, possibly "". The last piece has a `finish`."""

    text: str
    token_id: int
    finish: Finish | None


async def pieces(
    engine: Engine, request: GenerationRequest, text: Text, stops: Sequence[str], stopwatch: Stopwatch
) -> AsyncGenerator[Piece]:
    """One piece for each token of `request`, up to the first stop string. Closing the iterator cancels the generation.

    Raises the errors of the engine, and TimeoutError at the request's deadline.
    """
    deadline = None if request.deadline_s is None else asyncio.get_running_loop().time() + request.deadline_s
    maker = _PieceMaker(text, stops)
    generation = cast("AsyncGenerator[GeneratedToken]", engine.generate(request))
    async with aclosing(generation) as tokens:
        finish: Finish | None = None
        while finish is None:
            async with asyncio.timeout_at(deadline):
                token = await anext(tokens)
            stopwatch.token(len(request.prompt_ids))
            piece = maker.piece(token)
            finish = piece.finish
            yield piece


class _PieceMaker:
    """Turns the tokens of one request into pieces."""

    def __init__(self, text: Text, stops: Sequence[str]) -> None:
        self._detokenizer = Detokenizer(text)
        self._stops = StopStrings(stops)

    def piece(self, token: GeneratedToken) -> Piece:
        """The piece of the next token; the token that ends the text is not shown."""
        shown = "" if token.finish == "stop" else self._stops.push(self._detokenizer.push(token.token_id))
        if token.finish:
            shown += self._stops.push(self._detokenizer.flush()) + self._stops.flush()
        return Piece(shown, token.token_id, "stop" if self._stops.found else token.finish)


@dataclass(frozen=True)
class Envelope:
    """The fields of an answer's body, or of the chunks of a streamed answer, that surround the text.

    `chat` chooses between the forms of the two endpoints; `token_ids` adds the ids beside the text (an extension).
    """

    model: str
    chat: bool
    prompt_tokens: int
    token_ids: bool = False
    key: str = field(default_factory=lambda: uuid.uuid4().hex)
    created: int = field(default_factory=lambda: int(time.time()))

    def whole(self, parts: Sequence[Piece]) -> dict[str, Any]:
        """The body of an answer that is not streamed."""
        text = "".join(part.text for part in parts)
        content: dict[str, Any] = {"text": text}
        if self.chat:
            content = {"message": {"role": "assistant", "content": text, "refusal": None}}
        choice = self._choice(content, [part.token_id for part in parts], parts[-1].finish)
        return self._body("chat.completion", [choice]) | {"usage": self._usage(len(parts))}

    def opening(self) -> list[dict[str, Any]]:
        """The chunks before the first token."""
        role = {"delta": {"role": "assistant", "content": ""}}
        return [self._chunk([self._choice(role, [], None)])] if self.chat else []

    def chunk(self, piece: Piece) -> list[dict[str, Any]]:
        """The chunk of one piece; none if the piece adds nothing."""
        if not (piece.text or piece.finish or self.token_ids):
            return []
        content: dict[str, Any] = {"text": piece.text}
        if self.chat:
            content = {"delta": {"content": piece.text} if piece.text else {}}
        return [self._chunk([self._choice(content, [piece.token_id], piece.finish)])]

    def usage_chunk(self, new_tokens: int) -> dict[str, Any]:
        """The last chunk of a stream that includes usage."""
        return self._chunk([]) | {"usage": self._usage(new_tokens)}

    def _choice(self, content: dict[str, Any], token_ids: list[int], finish: Finish | None) -> dict[str, Any]:
        choice = {"index": 0, **content, "logprobs": None, "finish_reason": finish}
        return choice | {"token_ids": token_ids} if self.token_ids else choice

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return self._body("chat.completion.chunk", choices)

    def _body(self, chat_object: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": f"{'chatcmpl' if self.chat else 'cmpl'}-{self.key}",
            "object": chat_object if self.chat else "text_completion",
            "created": self.created,
            "model": self.model,
            "choices": choices,
        }

    def _usage(self, new_tokens: int) -> dict[str, int]:
        total = self.prompt_tokens + new_tokens
        return {"prompt_tokens": self.prompt_tokens, "completion_tokens": new_tokens, "total_tokens": total}
