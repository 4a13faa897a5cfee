"""Text to token ids and back: tokenizer, chat template, incremental detokenization and stop strings."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from resplit.errors import ModelError, RequestError
from resplit.gateway.openai.chat_template import ChatTemplate
from resplit.gateway.openai.grammars import Grammars
from resplit.gateway.openai.special_tokens import SpecialTokens
from resplit.gateway.openai.template_input import TemplateMessage, TemplateTool
from resplit.gateway.openai.tools import TAGGED, ToolForm

# Decoders show this for bytes that are not a complete character.
_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
_BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")  # a byte in the vocabularies of SentencePiece


def _byte_of_character() -> dict[str, int]:
    """The byte of each character in a byte-level vocabulary (GPT-2's `bytes_to_unicode`)."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + place): byte for place, byte in enumerate(others)}


_BYTE_OF_CHARACTER = _byte_of_character()


class Text:
    """The tokenizer and chat template of one model, and the tokens that end a text.

    `vocabulary` is the number of tokens that the model knows; None: those of the tokenizer. What users write stays
    text, even where it reads like a special token; `special_prompts` allows special tokens in plain prompts.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        stop_ids: Iterable[int],
        template: ChatTemplate | None,
        vocabulary: int | None = None,
        special_prompts: bool = False,
    ) -> None:
        self._tokenizer = tokenizer
        self._literal = Tokenizer.from_str(tokenizer.to_str())  # reads special tokens as text
        self._literal.encode_special_tokens = True
        self._special = SpecialTokens(tokenizer)
        self._special_prompts = special_prompts
        self._template = template
        self.vocabulary = min(tokenizer.get_vocab_size(), vocabulary or tokenizer.get_vocab_size())
        self.stop_ids = frozenset(stop_ids)
        self._longest_token = max(map(len, tokenizer.get_vocab()))
        # Cached: the log probabilities of a long prompt name tens of thousands of tokens, few of them different.
        self._shown = functools.cache(lambda token_id: str(tokenizer.decode([token_id], skip_special_tokens=False)))

    @classmethod
    def from_folder(
        cls,
        folder: Path,
        stop_ids: Iterable[int] = (),
        vocabulary: int | None = None,
        special_prompts: bool = False,
    ) -> Text:
        """Read the tokenizer and generation settings of a local model folder; `stop_ids` end a text as well.

        Raises ModelError if the tokenizer or its template cannot be read.
        """
        try:
            # The library raises bare exceptions, also for a file that is not there.
            tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
            special_tokens = _special_tokens(folder)
            end = tokenizer.token_to_id(special_tokens.get("eos_token", ""))
            ends = {*stop_ids, *_generation_stop_ids(folder), *([] if end is None else [end])}
            source = _template_source(folder)
            template = ChatTemplate(source, special_tokens) if source else None
            return cls(tokenizer, ends, template, vocabulary, special_prompts)
        except ModelError as error:
            raise ModelError(f"{folder}: {error}") from error
        except Exception as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            rule = "give a folder with tokenizer.json; its other settings, where present, must be valid JSON"
            raise ModelError(f"{folder}: the tokenizer cannot be read ({reason}); {rule}") from error

    def encode(self, text: str) -> tuple[int, ...]:
        """Token ids of a plain prompt, with the special tokens that the tokenizer puts before every text."""
        tokenizer = self._tokenizer if self._special_prompts else self._literal
        return tuple(tokenizer.encode(text).ids)

    @property
    def tool_form(self) -> ToolForm:
        """How the model writes calls of tools."""
        return self._template.form if self._template else TAGGED

    def grammars(self) -> Grammars:
        """A compiler of grammars for the model's tokens."""
        return Grammars(self._tokenizer.to_str(), self.stop_ids, self.vocabulary)

    def encode_chat(self, messages: Sequence[TemplateMessage], tools: Sequence[TemplateTool] = ()) -> tuple[int, ...]:
        """Token ids of a conversation (`role` and `content` each), up to the start of the assistant's answer.

        The answer may call `tools`.

        Raises RequestError if the model has no chat template, or if the template refuses the conversation.
        """
        if self._template is None:
            raise RequestError("this model has no chat template; use /v1/completions")
        mark = self._special.mark_for([*messages, *tools])
        if mark is None:
            return self._encoded(self._tokenizer, self._template.render(messages, tools))
        ids: list[int] = []
        rendered = self._template.render(self._special.marked(messages, mark), self._special.marked(tools, mark))
        for special_id, part in self._special.split(rendered, mark):
            ids += self._encoded(self._literal, part) if special_id is None else [special_id]
        return tuple(ids)

    def _encoded(self, tokenizer: Tokenizer, text: str) -> tuple[int, ...]:
        return tuple(tokenizer.encode(text, add_special_tokens=False).ids)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`, without special tokens."""
        text: str = self._tokenizer.decode(ids, skip_special_tokens=True)
        return text

    def token(self, token_id: int) -> str:
        """The text of one token; `bytes:` and its bytes if it is no whole text."""
        shown = self._shown(token_id)
        if _REPLACEMENT not in shown:
            return shown
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in self.token_bytes(token_id))

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes of one token in UTF-8, which may be a part of a character."""
        shown = self._shown(token_id)
        if _REPLACEMENT not in shown:
            return shown.encode()
        name = self._tokenizer.id_to_token(token_id) or ""
        if found := _BYTE_TOKEN.fullmatch(name):
            return bytes([int(found[1], 16)])
        return bytes(_BYTE_OF_CHARACTER[each] for each in name if each in _BYTE_OF_CHARACTER)

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
    stop = _settings(folder, "generation_config.json").get("eos_token_id")
    return frozenset([stop] if isinstance(stop, int) else stop or ())


def _special_tokens(folder: Path) -> dict[str, str]:
    """The special tokens that tokenizer_config.json names, such as `eos_token`."""
    settings = _settings(folder, "tokenizer_config.json")
    named = {name: value.get("content") if isinstance(value, dict) else value for name, value in settings.items()}
    return {name: value for name, value in named.items() if name.endswith("_token") and isinstance(value, str)}


def _template_source(folder: Path) -> str | None:
    """The chat template, in a file of its own or in tokenizer_config.json; of several, the one named "default"."""
    file = folder / "chat_template.jinja"
    if file.exists():
        return file.read_text(encoding="utf-8")
    source = _settings(folder, "tokenizer_config.json").get("chat_template")
    if isinstance(source, list):
        source = {each["name"]: each["template"] for each in source}.get("default")
    return source


def _settings(folder: Path, name: str) -> dict[str, Any]:
    """A settings file of a model folder; empty if it is not there."""
    path = folder / name
    try:
        return dict(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else {}
    except ValueError as error:
        raise ModelError(f"{name} cannot be read ({error}); it must be a JSON object") from error
