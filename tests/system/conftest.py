"""A tiny real model and a cluster of real node processes, without emulation."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from resplit.launch import Cluster, running
from resplit.start import first_plan

NODES = ("alpha", "beta", "gamma", "delta")
CLUSTER = """
name: test
source: alpha
trusted: [alpha, beta]
nodes:
  - {name: alpha, memory: 4 MiB}
  - {name: beta, memory: 4 MiB}
  - {name: gamma, memory: 4 MiB}
  - {name: delta, memory: 4 MiB}
classes:
  - {name: chat, slo: 30 s, rate_rps: 0.5, prompt_tokens: 12, new_tokens: 40}
limits: {context_tokens: 256, sessions: 16, queue: 8, deadline: 60 s}
kv_tokens: 2048
"""
_TEXT = ["the quick brown fox jumps over the lazy dog", "pack my box with five dozen liquor jugs", "0123456789"]


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random six-layer Llama and its tokenizer, as a local folder."""
    folder = tmp_path_factory.mktemp("model") / "tiny-llama"
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<|end|>"], initial_alphabet=alphabet)
    tokenizer.train_from_iterator(_TEXT, trainer)
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=len(tokenizer.get_vocab()),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        eos_token_id=0,
        bos_token_id=None,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>").save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def whole(model_folder: Path) -> torch.nn.Module:
    """The unsplit model, the oracle."""
    torch.set_num_threads(1)
    return AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def cluster(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Four node processes, gateway and controller, with a first plan deployed."""
    folder = tmp_path_factory.mktemp("cluster")
    (folder / "test.yaml").write_text(CLUSTER)
    with running(folder / "test.yaml", folder / "state", str(model_folder)) as started:
        first_plan(started)
        yield started


def reference(model: torch.nn.Module, prompt: list[int], new_tokens: int) -> list[int]:
    """Greedy tokens of the unsplit model; generation does not end early."""
    ids = torch.tensor([prompt])
    output = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=new_tokens,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    return output[0, len(prompt) :].tolist()
