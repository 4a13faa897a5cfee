"""A tiny real model, and a cluster of node processes on this machine that serves it.

For a cluster inside the test's own process, see `in_process`.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from resplit.cluster.first_plan import first_plan
from resplit.cluster.local import Cluster, running
from tests.support.tokenizers import tiny_tokenizer

MODEL = "tiny-llama"
NODES = ("alpha", "beta", "gamma", "delta")
TRUSTED = NODES[:2]
# Other load on this machine must not keep blocks from being placed, so nodes may be used almost fully.
CLUSTER = """
name: test
source: alpha
trusted: [alpha, beta]
nodes:
  - {name: alpha, memory: 4 MiB, max_utilization: 0.999}
  - {name: beta, memory: 4 MiB, max_utilization: 0.999}
  - {name: gamma, memory: 4 MiB, max_utilization: 0.999}
  - {name: delta, memory: 4 MiB, max_utilization: 0.999}
classes:
  - {name: chat, slo: 30 s, rate_rps: 0.5, prompt_tokens: 12, new_tokens: 40}
limits: {context_tokens: 256, sessions: 16, queue: 8, deadline: 60 s, copy_every: 4}
kv_tokens: 2048
"""
_TEXT = ["the quick brown fox jumps over the lazy dog", "pack my box with five dozen liquor jugs", "0123456789"]


def make_model(parent: Path, **shape: float) -> Path:
    """Save a random six-layer Llama and its tokenizer in a folder of `parent`; `shape` changes its configuration."""
    folder = parent / MODEL
    tokenizer = tiny_tokenizer(_TEXT)
    torch.manual_seed(3)
    usual = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
    }
    config = LlamaConfig(vocab_size=len(tokenizer), eos_token_id=0, bos_token_id=None, **(usual | shape))
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def load_unsplit(folder: Path) -> PreTrainedModel:
    """The saved model in one piece, in fp32 on one thread."""
    torch.set_num_threads(1)
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.eval()


def reference(model: PreTrainedModel, prompt: list[int], new_tokens: int) -> list[int]:
    """Greedy tokens of the unsplit model. Generation does not stop at an end token."""
    ids = torch.tensor([prompt])
    output: torch.Tensor = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=new_tokens,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    tokens: list[int] = output[0, len(prompt) :].tolist()
    return tokens


@contextlib.contextmanager
def started(folder: Path, model: Path, text: str = CLUSTER, plan: bool = True) -> Iterator[Cluster]:
    """Start node processes, gateway and controller of the cluster file `text`; deploy a first plan if `plan`."""
    (folder / "test.yaml").write_text(text)
    share_packaged_model(folder / "state", model)
    with running(folder / "test.yaml", folder / "state", str(model)) as cluster:
        if plan:
            first_plan(cluster)
        yield cluster


def share_packaged_model(state: Path, model: Path) -> None:
    """Have a cluster keep the packaged model beside the model, where others find it: packaging takes seconds."""
    store = model.resolve().parent / "models"
    store.mkdir(exist_ok=True)
    state.mkdir(mode=0o700, parents=True)
    (state / "models").symlink_to(store)


def random_placement(blocks: int, rng: random.Random) -> tuple[str, ...]:
    """Place private blocks (both ends and the first layer) on trusted nodes, the others anywhere."""
    middle = [rng.choice(NODES) for _ in range(blocks - 3)]
    return (rng.choice(TRUSTED), rng.choice(TRUSTED), *middle, rng.choice(TRUSTED))
