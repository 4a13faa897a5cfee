"""Text to token ids and back: tokenizer, chat template, incremental detokenization and stop strings."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from resplit.errors import ModelError, RequestError

# Decoders show this for bytes that are not a complete character.
_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


class Text:
    """The tokenizer and chat template of one model (a Hugging Face tokenizer), and the tokens that end a text."""

    def __init__(self, tokenizer: Any, stop_ids: Iterable[int] = ()) -> None:
        self._tokenizer = tokenizer
        self.vocabulary = len(tokenizer)
        self.stop_ids = frozenset(stop_ids) | ({tokenizer.eos_token_id} - {None})
        self._longest_token = max(map(len, tokenizer.get_vocab()))

    @classmethod
    def from_folder(cls, folder: Path, stop_ids: Iterable[int] = ()) -> Text:
        """Read the tokenizer and generation settings of a local model folder; `stop_ids` end a text as well.

        Raises ModelError if the tokenizer cannot be read.
        """
        from transformers import AutoTokenizer

        try:
            tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
            return cls(tokenizer, frozenset(stop_ids) | _generation_stop_ids(folder))
        except (OSError, ValueError, ImportError) as error:
            reason = str(error).strip().splitlines()[0]
            rule = "give a folder with tokenizer.json; its generation_config.json, if present, must be valid JSON"
            raise ModelError(f"{folder}: the tokenizer cannot be read ({reason}); {rule}") from error

    def encode(self, text: str) -> tuple[int, ...]:
        """Token ids of a plain prompt, with the special tokens that the tokenizer puts before every text."""
        return tuple(self._tokenizer(text, verbose=False)["input_ids"])

    def encode_chat(self, messages: Sequence[dict[str, str]]) -> tuple[int, ...]:
        """Token ids of a conversation (`role` and `content` each), up to the start of the assistant's answer.

        Raises RequestError if the model has no chat template, or if the template refuses the conversation.
        """
        from jinja2 import TemplateError

        if not self._tokenizer.chat_template:
            raise RequestError("this model has no chat template; use /v1/completions")
        try:
            rendered = self._tokenizer.apply_chat_template(list(messages), add_generation_prompt=True, tokenize=False)
        except TemplateError as error:
            raise RequestError(f"the model's chat template refuses these messages: {error}") from error
        return tuple(self._tokenizer(rendered, add_special_tokens=False, verbose=False)["input_ids"])

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`, without special tokens."""
        text: str = self._tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text

    def least_tokens(self, text: str) -> int:
        """A lower bound on the number of tokens of `text`, without tokenizing it."""
        return len(text) // self._longest_token


class Detokenizer:
    """Text from tokens as they come. Every piece is final, and all pieces together equal `Text.decode` of all tokens.

    This holds for decoders that join the bytes of their tokens (every byte-level BPE). A token is decoded together
    with those of the piece before it, because a decoder may treat the first token of a text differently.
    """

    def __init__(self, text: Text) -> None:
        self._text = text
        self._ids: list[int] = []  # the tokens of the last piece, then the tokens not shown yet
        self._shown = 0  # how many of them belong to the last piece

    def push(self, token_id: int) -> str:
        """The text that `token_id` completes; "" while a character is incomplete."""
        self._ids.append(token_id)
        piece = self._pending()
        if not piece or piece.endswith(_REPLACEMENT):
            return ""
        self._ids = self._ids[self._shown :]
        self._shown = len(self._ids)
        return piece

    def flush(self) -> str:
        """The rest at the end of the text, with incomplete characters as U+FFFD."""
        piece = self._pending()
        self._ids, self._shown = [], 0
        return piece

    def _pending(self) -> str:
        return self._text.decode(self._ids)[len(self._text.decode(self._ids[: self._shown])) :]


class StopStrings:
    """Passes text on up to the first complete stop string, and holds back text that may become one.

    Of several stop strings, the one that is complete first counts; if several end together, the longest. So the result
    does not depend on how the text was cut into pieces.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = [stop for stop in stops if stop]
        self._held = ""
        self.found = False

    def push(self, piece: str) -> str:
        """The text that can be shown now; "" after a stop string was found."""
        if self.found:
            return ""
        text = self._held + piece
        if ends := [(at + len(stop), at) for stop in self._stops if (at := text.find(stop)) >= 0]:
            self.found, self._held = True, ""
            return text[: min(ends)[1]]
        keep = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def flush(self) -> str:
        """At the end of the text: the text that was held back."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest suffix of `text` that is a proper prefix of `stop`."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)


def _generation_stop_ids(folder: Path) -> frozenset[int]:
    """`eos_token_id` (one or several) of the folder's generation_config.json, at which `generate` stops as well."""
    path = folder / "generation_config.json"
    stop = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id") if path.exists() else None
    return frozenset([stop] if isinstance(stop, int) else stop or ())
