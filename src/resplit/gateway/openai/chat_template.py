"""A model's chat template: renders a conversation as the text on which the model was trained.

Templates come with models, so they run in Jinja's sandbox. They see what transformers' templates see.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, ClassVar

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError
from jinja2.utils import Namespace

from resplit.errors import ModelError, RequestError
from resplit.gateway.openai.template_input import TemplateMessage, TemplateTool
from resplit.gateway.openai.tools import explained, form_of


class _Namespace(Namespace):  # type: ignore[misc]
    """Jinja's namespace without names of Python's internals, with which templates could leave the sandbox."""

    def __init__(*arguments: Any, **named: Any) -> None:
        self, *pairs = arguments
        values = dict(*pairs, **named)
        for name in values:
            _ensure_plain(name)
        Namespace.__init__(self, values)

    def __setitem__(self, name: str, value: Any) -> None:
        _ensure_plain(name)
        super().__setitem__(name, value)


def _ensure_plain(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a namespace may not have the attribute {name!r}")


class _GenerationTag(Extension):  # type: ignore[misc]  # jinja2 is not followed here
    """The block `generation`, with which templates mark the assistant's text: it is rendered as it stands."""

    tags: ClassVar[set[str]] = {"generation"}

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        body: list[nodes.Node] = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return body


class ChatTemplate:
    """A compiled template; `special_tokens` are its variables, such as `bos_token`. ModelError if it is malformed."""

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _GenerationTag]
        )
        environment.filters["tojson"] = _tojson
        # Of Jinja's own globals, those that cannot be used to leave the sandbox.
        environment.globals = {
            "range": environment.globals["range"],
            "dict": lambda *pairs, **named: dict(*pairs, **named),
            "namespace": _Namespace,
            "raise_exception": _raise,
            "strftime_now": lambda form: datetime.now().strftime(form),
        }
        self._special_tokens = dict(special_tokens)
        self.form = form_of(source)
        self._knows_tools = "tools" in source
        try:
            self._template = environment.from_string(source)
        except TemplateError as error:
            raise ModelError(f"the model's chat template is malformed: {error}") from error

    def render(self, messages: Sequence[TemplateMessage], tools: Sequence[TemplateTool] = ()) -> str:
        """The conversation as text, up to the start of the assistant's answer; RequestError if it is refused.

        A template that does not know `tools` gets them in the conversation.
        """
        if not self._knows_tools:
            messages, tools = explained(messages, tools), ()
        try:
            text: str = self._template.render(
                messages=list(messages),
                add_generation_prompt=True,
                tools=list(tools) or None,
                documents=None,
                **self._special_tokens,
            )
        except Exception as error:  # a template is foreign code, and calls such as `items` raise any kind
            raise RequestError(f"the model's chat template refuses these messages: {error}") from error
        return text


def _raise(message: str) -> None:
    raise TemplateError(message)


def _tojson(value: Any, indent: int | None = None) -> str:
    # Jinja's own filter escapes characters for HTML.
    return json.dumps(value, ensure_ascii=False, indent=indent)
