"""Grammars of answers: JSON by a schema, and calls of tools. The gateway computes them; no node knows a grammar.

llguidance says which tokens may follow the tokens so far. Nodes get that as changes of logits, so a session may move,
be lost or verify drafts as any other does.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping, Sequence
from typing import Any

from llguidance import LLMatcher, LLParserLimits, LLTokenizer

from resplit.errors import RequestError
from resplit.gateway.openai.closed_schemas import closed

# Without this a small model may write spaces without end.
_JSON_STYLE = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
# What one answer may take: about a tenth of a second to prepare its patterns, and 50 MB for their states.
_LIMITS = LLParserLimits(initial_lexer_fuel=200_000, max_lexer_states=25_000)


def json_rule(schema: Mapping[str, Any]) -> str:
    """The right side of a Lark rule for the JSON texts of a schema, in the usual spacing.

    Objects have the listed properties only, unless the schema speaks of others.
    """
    return "%json " + json.dumps({**closed(schema), "x-guidance": _JSON_STYLE})


class Grammars:
    """Compiles grammars for the tokens of one model. May be called from any thread."""

    def __init__(self, tokenizer_json: str, stop_ids: frozenset[int], vocabulary: int) -> None:
        self._tokenizer_json = tokenizer_json
        self._stop_ids = sorted(stop_ids)
        self._mask_bytes = (vocabulary + 7) // 8
        self._lock = threading.Lock()
        self._tokenizer: LLTokenizer | None = None  # made when it is first needed: it takes a second

    def compiled(self, lark: str) -> TokenGrammar:
        """The grammar of the texts that a Lark grammar describes; RequestError if it cannot be compiled."""
        with self._lock:
            if self._tokenizer is None:
                self._tokenizer = LLTokenizer(self._tokenizer_json, eos_token=self._stop_ids or None)
            source = LLMatcher.grammar_from_lark("%llguidance {}\n" + lark)
            matcher = LLMatcher(self._tokenizer, source, log_level=0, limits=_LIMITS)
            if not matcher.is_error():
                matcher.compute_bitmask()  # prepares the patterns, here instead of on the event loop
        if matcher.is_error():
            reason = matcher.get_error().strip().splitlines() or ["unknown error"]
            raise RequestError(f"the schema cannot be used as a grammar: {reason[0][:300]}")
        return TokenGrammar(matcher, self._mask_bytes)


class TokenGrammar:
    """A compiled grammar at some place in an answer."""

    def __init__(self, matcher: LLMatcher, mask_bytes: int) -> None:
        self._matcher = matcher
        self._mask_bytes = mask_bytes
        self._followed = 0  # tokens of the answer so far

    def copy(self) -> TokenGrammar:
        """The same grammar at the start of another answer. To be called before the first use."""
        return TokenGrammar(self._matcher.deep_copy(), self._mask_bytes)

    def allowed(self, made: Sequence[int], drafts: Sequence[int]) -> list[bytes]:
        """The tokens that may follow `made`, and those that may follow each of `drafts`, as in `LogitChange`.

        After a draft that is not allowed, nothing is restricted: no token there will be used. RequestError if the
        grammar became too complex.
        """
        self._follow(made)
        masks, entered = [self._mask()], 0
        for draft in drafts:
            if not _has(masks[-1], draft) or not self._matcher.consume_token(draft):
                break
            entered += 1
            masks.append(self._mask())
        if entered:
            self._matcher.rollback(entered)
        return masks + [b""] * (1 + len(drafts) - len(masks))

    def _follow(self, made: Sequence[int]) -> None:
        for token in made[self._followed :]:
            self._matcher.consume_token(token)
        self._followed = len(made)

    def _mask(self) -> bytes:
        mask: bytes = self._matcher.compute_bitmask()
        if self._matcher.is_error():
            raise RequestError(f"the answer cannot follow its grammar: {self._matcher.get_error()[:300]}")
        return mask[: self._mask_bytes]


def _has(mask: bytes, token: int) -> bool:
    return token // 8 < len(mask) and bool(mask[token // 8] >> token % 8 & 1)
