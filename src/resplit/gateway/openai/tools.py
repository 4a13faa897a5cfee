"""Calls of tools in the forms that families of models were trained on: in the prompt, as a grammar, and in the answer.

- tagged (Qwen, Hermes, and models that were trained on none): `<tool_call>` lines with a name and arguments;
- listed (Mistral): a JSON list of calls; the token before it is special, and not in the text;
- bare (Llama 3): one JSON object with a name and parameters.
"""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field

from resplit.gateway.openai.bodies import ToolCallBody
from resplit.gateway.openai.grammars import json_rule
from resplit.gateway.openai.template_input import Schema, TemplateMessage, TemplateTool

_TAGGED = re.compile(r"\s*<tool_call>\s*(.*?)\s*</tool_call>\s*", re.DOTALL)
_TAG = "<tool_call>"
_PREAMBLE = """# Tools

You may call one or more functions to assist with the user query.

You are provided with function signatures within <tools></tools> XML tags:
<tools>
{tools}
</tools>

For each function call, return a json object with function name and arguments within <tool_call></tool_call> XML tags:
<tool_call>
{{"name": <function-name>, "arguments": <args-json-object>}}
</tool_call>"""


@dataclass(frozen=True)
class Call:
    """A call of a tool; `arguments` is JSON."""

    name: str
    arguments: str
    key: str = field(default_factory=lambda: f"call_{uuid.uuid4().hex[:24]}")

    def body(self) -> ToolCallBody:
        """The call in an answer."""
        return {"id": self.key, "type": "function", "function": {"name": self.name, "arguments": self.arguments}}

    def delta(self, index: int) -> ToolCallBody:
        """The call in a chunk of an answer, with its index."""
        return {"index": index, **self.body()}


@dataclass(frozen=True)
class Said:
    """What is certain of an answer: text to show, and complete calls."""

    text: str = ""
    calls: tuple[Call, ...] = ()


@dataclass(frozen=True)
class ToolForm:
    """How one family writes calls: the texts around them, and the key of the arguments."""

    opening: str
    closing: str
    between: str
    arguments: str = "arguments"
    one_only: bool = False

    def rules(self, tools: Sequence[TemplateTool], several: bool) -> str:
        """Lark rules for `calls`, of any of these functions."""
        more = f"({json.dumps(self.between)} call)*" if several and not self.one_only else ""
        closing = self.closing and json.dumps(self.closing)
        lines = [f"opened: call {more} {closing}", f"calls: {self.opening and json.dumps(self.opening)} opened"]
        lines.append("call: " + " | ".join(f"call_{place}" for place in range(len(tools))))
        for place, tool in enumerate(tools):
            function = tool["function"]
            before = json.dumps(f'{{"name": {json.dumps(function["name"])}, "{self.arguments}": ')
            lines.append(f'call_{place}: {before} arguments_{place} "}}"')
            lines.append(f"arguments_{place}: {json_rule(function.get('parameters') or {'type': 'object'})}")
        return "\n".join(lines) + "\n"

    def text_rule(self) -> str:
        """A Lark terminal for texts that are no call, nor the beginning of one."""
        if self is TAGGED:
            opening = json.dumps(self.opening)
            return f"TEXT: /(?s:.+)/ & ~/(?s:.*{_TAG}.*)/\nopening[suffix={opening}]: /(?s:.*)/\n"
        return "TEXT: /(?s:[^\\[{\\s].*)/\n"


TAGGED = ToolForm("<tool_call>\n", "\n</tool_call>", "\n</tool_call>\n<tool_call>\n")
LISTED = ToolForm("[", "]", ", ")
BARE = ToolForm("", "", "", "parameters", one_only=True)


def form_of(template: str) -> ToolForm:
    """The form on which a model was trained, by the source of its chat template."""
    if _TAG in template or "tools" not in template:
        return TAGGED
    return LISTED if "[TOOL_CALLS]" in template else BARE


def answer_grammar(
    form: ToolForm, tools: Sequence[TemplateTool], must_call: bool, several: bool, schema: Schema | None
) -> str:
    """The Lark grammar of answers with calls of tools, or, unless one must be called, of other answers.

    Those follow `schema` if there is one.
    """
    rules = form.rules(tools, several)
    if must_call:
        return f"start: calls\n{rules}"
    if schema is not None:
        return f"start: calls | other\nother: {json_rule(schema)}\n{rules}"
    calls = "opening opened" if form is TAGGED else "calls"
    return f"start: TEXT | {calls}\n{rules}{form.text_rule()}"


def explained(messages: Sequence[TemplateMessage], tools: Sequence[TemplateTool]) -> list[TemplateMessage]:
    """A conversation in which tools, calls and their results are text, for a template that does not know them."""
    plain = [_as_text(message) for message in messages]
    if not tools:
        return plain
    preamble = _PREAMBLE.format(tools="\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools))
    if plain[0]["role"] == "system":
        return [{"role": "system", "content": f"{plain[0]['content']}\n\n{preamble}"}, *plain[1:]]
    return [{"role": "system", "content": preamble}, *plain]


def _as_text(message: TemplateMessage) -> TemplateMessage:
    if message["role"] == "tool":
        return {"role": "user", "content": f"<tool_response>\n{message['content']}\n</tool_response>"}
    calls = [json.dumps(call["function"], ensure_ascii=False) for call in message.get("tool_calls", ())]
    tagged = [f"<tool_call>\n{call}\n</tool_call>" for call in calls]
    return {"role": message["role"], "content": "\n".join(filter(None, [message["content"], *tagged]))}


class CallParser:
    """Separates the calls of an answer from its text, as the answer arrives."""

    def __init__(self, form: ToolForm) -> None:
        self._form = form
        self._held = ""
        self._is_text = False  # certain once other text came first, where calls stand alone

    def push(self, text: str) -> Said:
        """What becomes certain with more text."""
        self._held += text
        if self._form is TAGGED:
            return self._tagged()
        if not self._is_text and self._held.lstrip()[:1] not in ("", "[", "{"):
            self._is_text = True
        return self.flush() if self._is_text else Said()

    def flush(self) -> Said:
        """The rest at the end of the answer. What looks like a call but is none stays text."""
        held, self._held = self._held, ""
        calls = () if self._form is TAGGED or self._is_text else _calls(held, self._form)
        return Said("", calls) if calls else Said(held)

    def _tagged(self) -> Said:
        """The calls that are complete, and the text before anything that may become one."""
        shown, calls = "", list[Call]()
        while found := _TAGGED.search(self._held):
            call = _calls(found[1], self._form)
            shown += self._held[: found.start()] + ("" if call else found[0])
            calls += call
            self._held = self._held[found.end() :]
        certain = self._held.find(_TAG)
        if certain < 0:
            certain = len(self._held) - _overlap(self._held, _TAG)
        certain = len(self._held[:certain].rstrip())  # the white space before a call belongs to it
        shown, self._held = shown + self._held[:certain], self._held[certain:]
        return Said(shown, tuple(calls))


def _overlap(text: str, word: str) -> int:
    """Length of the longest suffix of `text` that is a proper prefix of `word`."""
    return next((size for size in range(len(word) - 1, 0, -1) if text.endswith(word[:size])), 0)


def _calls(text: str, form: ToolForm) -> tuple[Call, ...]:
    """The calls that a JSON text contains; none if it is something else."""
    try:
        content = json.loads(text)
    except ValueError:
        return ()
    found = content if isinstance(content, list) else [content]
    if not found or not all(isinstance(each, dict) and isinstance(each.get("name"), str) for each in found):
        return ()
    if not all(isinstance(each.get(form.arguments), dict) for each in found):
        return ()
    return tuple(Call(each["name"], json.dumps(each[form.arguments], ensure_ascii=False)) for each in found)
