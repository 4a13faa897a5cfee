"""A real engine, which runs a tiny random Llama with a cache, and the app in front of it under uvicorn."""

from __future__ import annotations

import asyncio
import math
import socket
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
import uvicorn
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from resplit.api_keys import digest
from resplit.config import LimitsConfig
from resplit.errors import CapacityError, NodeLostError, RequestError
from resplit.gateway.engine import GeneratedToken, GenerationRequest
from resplit.gateway.openai.app import create_app
from resplit.gateway.openai.text import Text
from resplit.model.activation import Activation, of_array
from resplit.model.sampling import logprobs, sample
from resplit.types import Logprobs
from tests.support.tokenizers import tiny_tokenizer

MODEL = "tiny-random-llama"
KEYS = {digest("key-interactive"): "interactive", digest("key-batch"): "batch"}
CORPUS = [
    "the quick brown fox jumps over the lazy dog and runs away from the hungry bear",
    "Müller läßt grüßen; 日本語の文章もあります 🙂🙃 and some more plain words follow here",
] * 5
TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'assistant' and loop.first %}"
    "{{ raise_exception('a conversation starts with a user') }}{% endif %}"
    "<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}<|assistant|>"
)


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level BPE tokenizer with few tokens: many characters take several."""
    folder = tmp_path_factory.mktemp("tokenizer")
    special = ["<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]
    tiny_tokenizer(CORPUS, 320, special, TEMPLATE).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def text(tokenizer_folder: Path) -> Text:
    """The tokenizer of `tokenizer_folder`."""
    return Text.from_folder(tokenizer_folder)


@dataclass
class TinyEngine:
    """Generates with a transformers model, for up to `room` requests at once."""

    model: LlamaForCausalLM
    context_tokens: int = 128
    classes: tuple[str, ...] = ("interactive", "batch")
    default_class: str = "interactive"
    room: int = 8
    lost_after: int | None = None  # the nodes are lost after this many tokens
    broken_after: int | None = None  # a defect raises after this many tokens
    step_s: float = 0.0
    unready: str | None = None
    usual: int = 20  # tokens of a request that names no limit
    first_s: float = 0.0  # the first token takes so much longer
    live: int = 0
    seen: list[GenerationRequest] = field(default_factory=list)
    idle: threading.Event = field(default_factory=threading.Event)

    def usual_tokens(self, request_class: str, prompt_tokens: int, deadline_s: float) -> int:
        return self.usual

    def ready(self) -> str | None:
        return self.unready

    async def generate(self, request: GenerationRequest) -> AsyncIterator[GeneratedToken]:
        self.seen.append(request)
        if self.live >= self.room:
            raise CapacityError(f"all {self.room} sessions are taken", retry_after_s=1.5)
        if request.prompt_ids[:3] == (5, 5, 5):
            raise RequestError("the engine refuses this prompt")
        self.live += 1
        self.idle.clear()
        try:
            async for token in self._tokens(request):
                yield token
        finally:
            self.live -= 1
            if not self.live:
                self.idle.set()

    async def _tokens(self, request: GenerationRequest) -> AsyncIterator[GeneratedToken]:
        cache = DynamicCache(config=self.model.config)
        ids = list(request.prompt_ids)
        due_s = asyncio.get_running_loop().time() + (request.deadline_s or math.inf)
        made: list[int] = []
        for index in range(request.max_new_tokens):
            if self.lost_after == index:
                raise NodeLostError("the last trusted node is gone")
            if self.broken_after == index:
                raise KeyError("a secret detail")
            try:
                async with asyncio.timeout_at(due_s):
                    await asyncio.sleep(self.step_s if index else self.step_s + self.first_s)
            except TimeoutError:
                if index and request.until_deadline:
                    return
                raise
            logits = of_array(self.model(torch.tensor([ids]), past_key_values=cache).logits[0].detach().numpy())
            changes = request.steering.changes(made, ()) if request.steering else ()
            (token,) = sample(logits, request.sampling, index, changes, 1)
            found = _logprobs(logits, request, (*request.prompt_ids[1:], token) if index == 0 else (token,))
            ids = [token]
            made.append(token)
            last = index == request.max_new_tokens - 1
            finish = "stop" if token in request.stop_ids else "length" if last else None
            yield GeneratedToken(token, index, finish, *found)
            if finish:
                return


def _logprobs(
    logits: Activation, request: GenerationRequest, tokens: tuple[int, ...]
) -> tuple[Logprobs | None, tuple[Logprobs, ...]]:
    """The log probabilities of the last of `tokens`, and of those before it, as far as they are wanted."""
    if request.logprobs is None:
        return None, ()
    *scored, last = logprobs(logits, tokens, request.logprobs)
    return last, tuple(scored) if request.score_prompt else ()


@pytest.fixture(scope="session")
def model(text: Text) -> LlamaForCausalLM:
    torch.manual_seed(7)
    torch.set_num_threads(1)
    config = LlamaConfig(
        vocab_size=text.vocabulary,
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        eos_token_id=next(iter(text.stop_ids)),
        initializer_range=0.4,
    )
    llama = LlamaForCausalLM(config).eval().requires_grad_(False)
    llama.lm_head.weight[0] *= 2  # so that some texts end
    return llama


@contextmanager
def serving(app: object) -> Iterator[str]:
    """Run the app under uvicorn on a free loopback port, in a thread; yields its URL."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = uvicorn.Server(uvicorn.Config(app, log_level="critical", lifespan="off"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join(timeout=10)


Serve = Callable[..., tuple[str, TinyEngine]]


@pytest.fixture(scope="module")
def serve(model: LlamaForCausalLM, text: Text) -> Iterator[Serve]:
    """Starts an app: `serve(require_key=False, limits={}, **engine fields)` returns its URL and its engine."""
    stops = []

    def start(
        require_key: bool = False, limits: dict[str, str] | None = None, **fields: object
    ) -> tuple[str, TinyEngine]:
        engine = TinyEngine(model, **fields)
        app = create_app(engine, text, MODEL, LimitsConfig(**{"body": "64 KiB", **(limits or {})}), KEYS, require_key)
        stops.append(serving(app))
        return stops[-1].__enter__(), engine

    yield start
    for stop in stops:
        stop.__exit__(None, None, None)


@pytest.fixture(scope="module")
def server(serve: Serve) -> tuple[str, TinyEngine]:
    """One app whose engine has room for every request of these tests."""
    return serve()
