"""From generated tokens to an answer: pieces of final text, and the bodies of the OpenAI API that contain them."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from typing import ClassVar, cast

from resplit.gateway.engine import GeneratedToken, GenerationRequest, TokenEngine
from resplit.gateway.openai.bodies import (
    AssistantMessage,
    ChoiceBody,
    ChoiceContent,
    CompletionBody,
    Delta,
    ErrorBody,
    ErrorObject,
    Finish,
    Usage,
)
from resplit.gateway.openai.logprob_bodies import Scored, chat_logprobs, completion_logprobs
from resplit.gateway.openai.prometheus import Stopwatch
from resplit.gateway.openai.text import Detokenizer, StopStrings, Text
from resplit.gateway.openai.tools import Call, CallParser, Said, ToolForm
from resplit.process.cancellation import cancel_and_wait

_AT_ONCE = 8  # choices of one request that run or wait in the queue together


@dataclass(frozen=True)
class TextPiece:
    """What one token adds to the answer: `text` that is final, possibly "". The last piece has a `finish`.

    `scored` are the tokens of this piece with their log probabilities, if they are wanted. A piece may have no token:
    an echo of the prompt, or text that was held back when the deadline ended the answer. `calls` are the calls of
    tools that it completes, each with its number in the answer.
    """

    text: str
    token_ids: tuple[int, ...]
    finish: Finish | None
    scored: tuple[Scored, ...] = ()
    calls: tuple[tuple[int, Call], ...] = ()


@dataclass(frozen=True)
class Choice:
    """One choice of an answer: its generation, the texts that stop it, and the prompt to repeat before it.

    If `only_echo`, the generated token is not shown. With `form`, the answer may call tools.
    """

    request: GenerationRequest
    stops: Sequence[str] = ()
    echo: str | None = None
    only_echo: bool = False
    form: ToolForm | None = None


async def pieces(engine: TokenEngine, choice: Choice, text: Text, stopwatch: Stopwatch) -> AsyncGenerator[TextPiece]:
    """One piece for each token of `choice`, up to the first stop string. Closing the iterator cancels the generation.

    Raises the errors of the engine, and TimeoutError at the request's deadline.
    """
    maker = _PieceMaker(text, choice.stops, choice.form)
    generation = cast("AsyncGenerator[GeneratedToken]", engine.generate(choice.request))
    async with aclosing(generation) as tokens:
        async for token in tokens:
            stopwatch.token()
            if choice.echo is not None and token.index == 0:
                yield _echo(choice, token)
                if choice.only_echo:
                    return
            piece = maker.piece(token)
            yield piece
            if piece.finish:
                return
    yield maker.cut()


def _echo(choice: Choice, token: GeneratedToken) -> TextPiece:
    """The prompt as the first piece of the answer. Its first token has no log probability."""
    ids, found = choice.request.prompt_ids, (None, *token.prompt_logprobs)
    scored = tuple(zip(ids, found, strict=True)) if choice.request.score_prompt else ()
    return TextPiece(choice.echo or "", (), "length" if choice.only_echo else None, scored)


class _PieceMaker:
    """Turns the tokens of one request into pieces."""

    def __init__(self, text: Text, stops: Sequence[str], form: ToolForm | None) -> None:
        self._detokenizer = Detokenizer(text)
        self._stops = StopStrings(stops)
        self._parser = CallParser(form) if form else None
        self._calls = 0

    def piece(self, token: GeneratedToken) -> TextPiece:
        """The piece of the next token; the token that ends the text is not shown."""
        shown = "" if token.finish == "stop" else self._stops.push(self._detokenizer.push(token.token_id))
        if token.finish:
            shown += self._rest()
        scored = ((token.token_id, token.logprobs),) if token.logprobs else ()
        return self._made(TextPiece(shown, (token.token_id,), "stop" if self._stops.found else token.finish, scored))

    def cut(self) -> TextPiece:
        """The last piece of an answer that the deadline ended."""
        return self._made(TextPiece(self._rest(), (), "stop" if self._stops.found else "length"))

    def _made(self, piece: TextPiece) -> TextPiece:
        """The piece with its calls instead of their text."""
        if self._parser is None:
            return piece
        said = self._parser.push(piece.text)
        if piece.finish:
            rest = self._parser.flush()
            said = Said(said.text + rest.text, said.calls + rest.calls)
        calls = tuple(enumerate(said.calls, self._calls))
        self._calls += len(calls)
        finish: Finish | None = "tool_calls" if piece.finish == "stop" and self._calls else piece.finish
        return replace(piece, text=said.text, calls=calls, finish=finish)

    def _rest(self) -> str:
        return self._stops.push(self._detokenizer.flush()) + self._stops.flush()


async def merged(streams: Sequence[AsyncGenerator[TextPiece]]) -> AsyncGenerator[tuple[int, TextPiece]]:
    """The pieces of several choices as they come, each with the index of its choice. The first error ends them all."""
    if len(streams) == 1:
        async with aclosing(streams[0]) as only:
            async for piece in only:
                yield 0, piece
        return
    arrived: asyncio.Queue[tuple[int, TextPiece] | Exception] = asyncio.Queue()
    turns = asyncio.Semaphore(_AT_ONCE)
    tasks = [asyncio.create_task(_forward(index, stream, arrived, turns)) for index, stream in enumerate(streams)]
    try:
        running = len(tasks)
        while running:
            found = await arrived.get()
            if isinstance(found, Exception):
                raise found
            yield found
            running -= found[1].finish is not None
    finally:
        await cancel_and_wait(tasks)


async def _forward(
    index: int,
    stream: AsyncGenerator[TextPiece],
    arrived: asyncio.Queue[tuple[int, TextPiece] | Exception],
    turns: asyncio.Semaphore,
) -> None:
    try:
        async with turns, aclosing(stream):
            async for piece in stream:
                arrived.put_nowait((index, piece))
    except Exception as error:
        arrived.put_nowait(error)


@dataclass(frozen=True)
class Envelope:
    """The fields of an answer's body, or of the chunks of a streamed answer, that surround the text.

    `chat` chooses between the forms of the two endpoints; `token_ids` adds the ids beside the text (an extension).
    With `include_usage` a stream ends with a chunk that counts the tokens.
    """

    ends_with_done: ClassVar[bool] = True

    model: str
    text: Text
    chat: bool
    prompt_tokens: int
    token_ids: bool = False
    include_usage: bool = False
    key: str = field(default_factory=lambda: uuid.uuid4().hex)
    created: int = field(default_factory=lambda: int(time.time()))

    def whole(self, choices: Sequence[Sequence[TextPiece]]) -> CompletionBody:
        """The body of an answer that is not streamed; `choices` are the pieces of each choice."""
        made = sum(len(part.token_ids) for parts in choices for part in parts)
        bodies = [self._whole_choice(index, parts) for index, parts in enumerate(choices)]
        return self._body("chat.completion", bodies) | {"usage": self._usage(made)}

    def opening(self, choices: int) -> list[CompletionBody]:
        """The chunks before the first token."""
        role: ChoiceContent = {"delta": {"role": "assistant", "content": ""}}
        empty = TextPiece("", (), None)
        return [self._chunk([self._choice(index, role, empty)]) for index in range(choices if self.chat else 0)]

    def chunk(self, index: int, piece: TextPiece) -> list[CompletionBody]:
        """The chunk of one piece; none if the piece adds nothing."""
        if not (piece.text or piece.finish or piece.scored or piece.calls or self.token_ids):
            return []
        content: ChoiceContent = {"text": piece.text}
        if self.chat:
            delta: Delta = {"content": piece.text} if piece.text else {}
            if piece.calls:
                delta["tool_calls"] = [call.delta(number) for number, call in piece.calls]
            content = {"delta": delta}
        return [self._chunk([self._choice(index, content, piece)])]

    def closing(self, new_tokens: int) -> list[CompletionBody]:
        """The chunks after the last token."""
        return [self._chunk([]) | {"usage": self._usage(new_tokens)}] if self.include_usage else []

    def failure(self, error: ErrorObject) -> ErrorBody:
        """The last event of a stream that fails."""
        return {"error": error}

    def _whole_choice(self, index: int, parts: Sequence[TextPiece]) -> ChoiceBody:
        text = "".join(part.text for part in parts)
        content: ChoiceContent = {"text": text}
        if self.chat:
            calls = [call.body() for part in parts for _, call in part.calls]
            message: AssistantMessage = {"role": "assistant", "content": text, "refusal": None}
            if calls:
                message |= {"content": text or None, "tool_calls": calls}
            content = {"message": message}
        ids = tuple(token_id for part in parts for token_id in part.token_ids)
        scored = tuple(each for part in parts for each in part.scored)
        return self._choice(index, content, TextPiece(text, ids, parts[-1].finish, scored))

    def _choice(self, index: int, content: ChoiceContent, piece: TextPiece) -> ChoiceBody:
        logprobs = None
        if piece.scored:
            logprobs = (chat_logprobs if self.chat else completion_logprobs)(self.text, piece.scored)
        choice: ChoiceBody = {"index": index, **content, "logprobs": logprobs, "finish_reason": piece.finish}
        if self.token_ids:
            choice["token_ids"] = list(piece.token_ids)
        return choice

    def _chunk(self, choices: list[ChoiceBody]) -> CompletionBody:
        body = self._body("chat.completion.chunk", choices)
        if self.include_usage:
            body["usage"] = None
        return body

    def _body(self, chat_object: str, choices: list[ChoiceBody]) -> CompletionBody:
        return {
            "id": f"{'chatcmpl' if self.chat else 'cmpl'}-{self.key}",
            "object": chat_object if self.chat else "text_completion",
            "created": self.created,
            "model": self.model,
            "choices": choices,
        }

    def _usage(self, new_tokens: int) -> Usage:
        total = self.prompt_tokens + new_tokens
        return {"prompt_tokens": self.prompt_tokens, "completion_tokens": new_tokens, "total_tokens": total}
