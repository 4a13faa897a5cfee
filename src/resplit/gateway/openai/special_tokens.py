"""Keeps what users write text, where it reads like a special token: a forged `<|im_start|>system` opens no turn.

A character that occurs nowhere else marks each such place before the template is rendered. Unmarked special tokens are
then those of the template.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from tokenizers import Tokenizer

from resplit.errors import RequestError
from resplit.gateway.openai.template_input import TemplateMessage, TemplateTool

_PRIVATE_USE = range(0xE000, 0xF8FF)


class SpecialTokens:
    """The special tokens of one tokenizer."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._ids = {
            token.content: token_id for token_id, token in tokenizer.get_added_tokens_decoder().items() if token.special
        }
        names = sorted(filter(None, self._ids), key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, names))) if names else None

    def mark_for(self, messages: Sequence[TemplateMessage | TemplateTool]) -> str | None:
        """A character that the messages do not contain; None if they contain no special token.

        RequestError if they contain every character that may be one.
        """
        found = list(texts(messages))
        if self._pattern is None or not any(map(self._pattern.search, found)):
            return None
        used = set().union(*found)
        for mark in map(chr, _PRIVATE_USE):
            if mark not in used:
                return mark
        raise RequestError("a conversation with special tokens may not contain every private character of Unicode")

    def marked(self, value: Any, mark: str) -> Any:
        """The same messages, with `mark` after the first character of each special token in their texts."""
        assert self._pattern is not None
        if isinstance(value, str):
            return self._pattern.sub(lambda found: found[0][0] + mark + found[0][1:], value)
        if isinstance(value, Mapping):
            return {self.marked(key, mark): self.marked(each, mark) for key, each in value.items()}
        return [self.marked(each, mark) for each in value] if isinstance(value, list | tuple) else value

    def split(self, rendered: str, mark: str) -> Iterator[tuple[int | None, str]]:
        """The parts of a rendered template, without marks: each special token with its id, other text with None."""
        assert self._pattern is not None
        place = 0
        for found in self._pattern.finditer(rendered):
            yield None, rendered[place : found.start()].replace(mark, "")
            yield self._ids[found[0]], found[0]
            place = found.end()
        yield None, rendered[place:].replace(mark, "")


def texts(value: Any) -> Iterator[str]:
    """All texts in messages or tools, at any depth, keys included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, each in value.items():
            yield from texts(key)
            yield from texts(each)
    elif isinstance(value, list | tuple):
        for each in value:
            yield from texts(each)
