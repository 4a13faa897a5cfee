"""Tiny random models of every supported family."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

from resplit.model.engines.base import Engine
from tests.support.engines import engine_with

_SMALL = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 48,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
CONFIGS = {
    "llama": lambda: LlamaConfig(**_SMALL),
    "llama-tied": lambda: LlamaConfig(**_SMALL, tie_word_embeddings=True),
    "qwen2": lambda: Qwen2Config(**_SMALL),
    "qwen2-sliding": lambda: Qwen2Config(**_SMALL, use_sliding_window=True, sliding_window=8, max_window_layers=2),
    "qwen3": lambda: Qwen3Config(**_SMALL, head_dim=32),
    "mistral-sliding": lambda: MistralConfig(**_SMALL, sliding_window=8),
    "gpt2": lambda: GPT2Config(
        vocab_size=97, n_embd=64, n_layer=5, n_head=4, n_positions=128, bos_token_id=1, eos_token_id=2
    ),
}


# Each family, packaged for each engine that can run it.
ENGINES = [(family, "torch") for family in CONFIGS] + [(family, "onnx") for family in CONFIGS if family != "gpt2"]


@pytest.fixture(scope="module", params=ENGINES, ids="-".join)
def packaged_family(request: pytest.FixtureRequest) -> tuple[torch.nn.Module, str]:
    """A tiny unsplit model, and the engine that shall run its blocks."""
    family, engine = request.param
    return unsplit(family), engine


@pytest.fixture
def new_engine(packaged_family: tuple[torch.nn.Module, str]) -> Callable[..., Engine[Any]]:
    """Makes engines that hold blocks of the model, all by default; options as of `engine_with`."""
    model, engine = packaged_family
    return partial(engine_with, model, engine=engine)


@pytest.fixture(scope="module", params=CONFIGS)
def family_model(request: pytest.FixtureRequest) -> torch.nn.Module:
    """One tiny unsplit model of each family: its tokens are the expected ones."""
    return unsplit(request.param)


def unsplit(family: str) -> torch.nn.Module:
    """A tiny random model of one family, in one piece."""
    torch.set_num_threads(1)
    torch.manual_seed(7)
    return AutoModelForCausalLM.from_config(CONFIGS[family]()).eval()
