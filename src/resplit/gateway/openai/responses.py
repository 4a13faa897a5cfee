"""Answers of /v1/responses: one message of one text, whole or as the events of a stream."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from typing_extensions import Unpack

from resplit.gateway.openai.bodies import (
    ErrorObject,
    EventContent,
    Finish,
    OutputMessage,
    OutputText,
    PartContent,
    ResponseBody,
    ResponseEvent,
    ResponseUsage,
    Status,
)
from resplit.gateway.openai.completion import TextPiece
from resplit.gateway.openai.response_schemas import ResponseRequest


@dataclass(eq=False)
class ResponseForm:
    """The answer to one request, as far as it has come. Every event has a number that counts from 0."""

    ends_with_done: ClassVar[bool] = False

    request: ResponseRequest
    prompt_tokens: int
    key: str = field(default_factory=lambda: uuid.uuid4().hex)
    created: int = field(default_factory=lambda: int(time.time()))
    _text: str = ""
    _finish: Finish | None = None
    _events: int = 0

    def whole(self, choices: Sequence[Sequence[TextPiece]]) -> ResponseBody:
        """The body of an answer that is not streamed."""
        (parts,) = choices
        for part in parts:
            self._add(part)
        return self._ended(sum(len(part.token_ids) for part in parts))

    def opening(self, _choices: int) -> list[ResponseEvent]:
        """The events before the first token."""
        begun = self._response("in_progress", [])
        return [
            self._event("response.created", response=begun),
            self._event("response.in_progress", response=begun),
            self._event("response.output_item.added", output_index=0, item=self._message("in_progress", [])),
            self._part_event("response.content_part.added", part=self._part()),
        ]

    def chunk(self, _index: int, piece: TextPiece) -> list[ResponseEvent]:
        """The event of one piece; none if the piece adds nothing."""
        self._add(piece)
        if not piece.text:
            return []
        return [self._part_event("response.output_text.delta", delta=piece.text, logprobs=[])]

    def closing(self, new_tokens: int) -> list[ResponseEvent]:
        """The events after the last token."""
        ended = self._ended(new_tokens)
        return [
            self._part_event("response.output_text.done", text=self._text, logprobs=[]),
            self._part_event("response.content_part.done", part=self._part()),
            self._event("response.output_item.done", output_index=0, item=ended["output"][0]),
            self._event(f"response.{ended['status']}", response=ended),
        ]

    def failure(self, error: ErrorObject) -> ResponseEvent:
        """The last event of a stream that fails. By its `error` the client knows that it has to raise."""
        code, message, param = error["code"], error["message"], error["param"]
        return self._event("error", code=code, message=message, param=param, error=error)

    def _add(self, piece: TextPiece) -> None:
        self._text += piece.text
        self._finish = piece.finish

    def _ended(self, new_tokens: int) -> ResponseBody:
        status: Status = "incomplete" if self._finish == "length" else "completed"
        output = [self._message(status, [self._part()])]
        return self._response(status, output) | {"usage": self._usage(new_tokens)}

    def _response(self, status: Status, output: list[OutputMessage]) -> ResponseBody:
        request = self.request
        return {
            "id": f"resp_{self.key}",
            "object": "response",
            "created_at": self.created,
            "status": status,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "instructions": request.instructions,
            "max_output_tokens": request.max_output_tokens,
            "metadata": request.metadata or {},
            "model": request.model,
            "output": output,
            "parallel_tool_calls": True,
            "previous_response_id": None,
            "store": False,
            "temperature": request.temperature or 0.0,
            "text": {"format": request.text_format.model_dump(by_alias=True, exclude_unset=True) or {"type": "text"}},
            "tool_choice": "auto",
            "tools": [],
            "top_p": 1.0 if request.top_p is None else request.top_p,
            "truncation": "disabled",
            "usage": None,
        }

    def _message(self, status: Status, content: list[OutputText]) -> OutputMessage:
        return {"id": self._message_id, "type": "message", "status": status, "role": "assistant", "content": content}

    def _part(self) -> OutputText:
        return {"type": "output_text", "text": self._text, "annotations": [], "logprobs": []}

    def _part_event(self, kind: str, **content: Unpack[PartContent]) -> ResponseEvent:
        return self._event(kind, item_id=self._message_id, output_index=0, content_index=0, **content)

    def _event(self, kind: str, **content: Unpack[EventContent]) -> ResponseEvent:
        self._events += 1
        return {"type": kind, "sequence_number": self._events - 1, **content}

    @property
    def _message_id(self) -> str:
        return f"msg_{self.key}"

    def _usage(self, new_tokens: int) -> ResponseUsage:
        return {
            "input_tokens": self.prompt_tokens,
            "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
            "output_tokens": new_tokens,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": self.prompt_tokens + new_tokens,
        }
