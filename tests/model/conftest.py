"""Tiny random models of every supported family."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

_SMALL = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
CONFIGS = {
    "llama": lambda: LlamaConfig(**_SMALL),
    "llama-tied": lambda: LlamaConfig(**_SMALL, tie_word_embeddings=True),
    "qwen2": lambda: Qwen2Config(**_SMALL),
    "qwen2-sliding": lambda: Qwen2Config(**_SMALL, use_sliding_window=True, sliding_window=8, max_window_layers=2),
    "qwen3": lambda: Qwen3Config(**_SMALL, head_dim=8),
    "mistral-sliding": lambda: MistralConfig(**_SMALL, sliding_window=8),
    "gpt2": lambda: GPT2Config(
        vocab_size=97, n_embd=32, n_layer=5, n_head=4, n_positions=128, bos_token_id=1, eos_token_id=2
    ),
}


@pytest.fixture(scope="module", params=CONFIGS)
def family_model(request: pytest.FixtureRequest) -> torch.nn.Module:
    """One tiny unsplit model of each family: its tokens are the expected ones."""
    torch.set_num_threads(1)
    torch.manual_seed(7)
    return AutoModelForCausalLM.from_config(CONFIGS[request.param]()).eval()
