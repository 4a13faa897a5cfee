"""Models of every supported family, split into blocks, compute the same as the unsplit model."""

from __future__ import annotations

import itertools
import random
import warnings
from typing import Any

import pytest
import torch
from transformers import BloomConfig, LlamaConfig

from resplit.errors import ModelError
from resplit.model.activation import token_ids
from resplit.model.engines.base import Engine
from resplit.model.engines.torch.blocks import Chain, features
from resplit.model.packaging import packager_for
from resplit.model.room import cache_room
from resplit.model.sampling import sample
from resplit.privacy import with_private_layers
from resplit.types import Sampling
from tests.model.conftest import unsplit
from tests.support.cluster import reference
from tests.support.engines import engine_with, run_rows
from tests.support.properties import repeats

NEW_TOKENS = 16


def random_placement(blocks: int, nodes: int, rng: random.Random) -> list[int]:
    cuts = sorted(rng.sample(range(1, blocks), min(rng.randint(0, 5), blocks - 1)))
    bounds = [0, *cuts, blocks]
    placement: list[int] = []
    for first, last in itertools.pairwise(bounds):
        placement += [rng.randrange(nodes)] * (last - first)
    return placement


def generate(engines: list[Engine[Any]], placement: list[int], prompt: list[int]) -> list[int]:
    tokens: list[int] = []
    step, start = prompt, 0
    while len(tokens) < NEW_TOKENS:
        values = token_ids(step)
        for block, node in enumerate(placement):
            values = run_rows(engines[node], "s", (block, block), start, values)
        start += len(step)
        step = list(sample(values, Sampling(), start - 1))
        tokens += step
    return tokens


@pytest.mark.parametrize("split", ["layer", "sublayer"])
def test_random_splits_give_the_tokens_of_the_unsplit_model(
    packaged_family: tuple[torch.nn.Module, str], split: str
) -> None:
    model, engine = packaged_family
    rng = random.Random(split)
    for _ in range(repeats(4)):
        nodes = rng.randint(1, 5)
        blocks = len(engine_with(model, [], split, engine).kinds)
        placement = random_placement(blocks, nodes, rng)
        engines = [
            engine_with(model, [b for b, at in enumerate(placement) if at == n], split, engine) for n in range(nodes)
        ]
        prompt = [rng.randrange(97) for _ in range(rng.randint(1, 20))]
        assert generate(engines, placement, prompt) == reference(model, prompt, NEW_TOKENS)


def test_features_count_every_parameter_once(family_model: torch.nn.Module) -> None:
    chain = Chain(family_model.config)
    counted = sum(block.parameters for block in features(chain, [0.0] * len(chain.specs), 4))
    tied = family_model.config.tie_word_embeddings
    embedding = family_model.get_input_embeddings().weight.numel()
    assert counted == sum(p.numel() for p in family_model.parameters()) + (embedding if tied else 0)


def test_blocks_use_nothing_of_transformers_that_is_deprecated(family_model: torch.nn.Module) -> None:
    blocks = range(len(Chain(family_model.config).specs))
    engine = engine_with(family_model, list(blocks), "layer", "torch")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert generate([engine], [0] * len(blocks), [1, 2, 3])


@pytest.mark.parametrize("split", ["layer", "sublayer"])
def test_features_match_the_architecture(split: str) -> None:
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=False,
    )
    spec = packager_for(config, "bfloat16", split, "auto").spec([float(index) for index in range(8)])
    by_name = {block.name: block for block in spec.blocks}
    attention, mlp = 32 * 32 + 2 * 32 * 16 + 32 * 32, 3 * 32 * 48  # q, k and v, o; gate, up, down

    embed = by_name["embed"]
    assert (embed.parameters, embed.flops_per_token, embed.weight_bytes) == (97 * 32, 0, 0)
    assert (embed.activation_bytes_per_token, embed.kv_bytes_per_token, embed.sensitivity) == (64, 0, 1)

    head = by_name["head"]
    assert (head.parameters, head.flops_per_token, head.flops_per_context_token) == (32 + 97 * 32, 2 * 97 * 32, 0)
    assert (head.activation_bytes_per_token, head.kv_bytes_per_token, head.sensitivity) == (4, 0, 1)

    if split == "layer":
        parts = [(by_name["layer.1"], attention + mlp + 2 * 32, attention + mlp, True)]
    else:
        parts = [
            (by_name["layer.1.attention"], attention + 32, attention, True),
            (by_name["layer.1.mlp"], mlp + 32, mlp, False),
        ]
    for block, parameters, products, attends in parts:
        assert (block.parameters, block.flops_per_token) == (parameters, 2 * products)
        # 4 heads of width 8 attend to the keys and values of 2.
        assert block.flops_per_context_token == (4 * 4 * 8 if attends else 0)
        assert block.kv_bytes_per_token == (2 * 2 * 8 * 2 if attends else 0)
        assert (block.activation_bytes_per_token, block.sensitivity) == (64, pytest.approx(0.25))


def test_the_first_layers_and_both_ends_are_private(family_model: torch.nn.Module) -> None:
    chain = Chain(family_model.config)
    marked = with_private_layers(features(chain, [0.0] * len(chain.specs), 4), 2)
    private = [block.name for block in marked if block.private]
    assert private == ["embed", "layer.0", "layer.1", "head"]


def test_cache_bytes_grow_with_use_up_to_the_allocated_bytes(family_model: torch.nn.Module) -> None:
    engine = engine_with(family_model)
    weights, token_bytes = engine.held_bytes, sum(block.kv_bytes_per_token for block in engine.features)
    run_rows(engine, "s", (0, len(engine.kinds) - 1), 0, token_ids([1, 2, 3]), 32)
    assert engine.held_bytes - weights == token_bytes * cache_room(3, 32)
    run_rows(engine, "s", (0, len(engine.kinds) - 1), 3, token_ids([1] * 29), 32)
    assert engine.held_bytes - weights == token_bytes * 32 == sum(c._pair.nbytes for c in engine._caches.values())


def test_an_unsupported_architecture_is_refused_and_named() -> None:
    with pytest.raises(ModelError, match=r"bloom.*supported: llama"):
        Chain(BloomConfig())


def test_a_long_request_leaves_nothing_to_the_next_one() -> None:
    config = LlamaConfig(
        hidden_size=32, num_attention_heads=2, max_position_embeddings=32,
        rope_parameters={"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0},
    )  # fmt: skip
    fresh, used = Chain(config), Chain(config)
    used.prepare_pass(0, 120, torch.empty(()))
    for chain in (fresh, used):
        chain.prepare_pass(0, 60, torch.empty(()))
    (expected, _), (found, _) = (chain.prepare_pass(60, 1, torch.empty(())).rotation for chain in (fresh, used))
    assert torch.equal(found, expected)


def test_on_the_processor_by_name_the_tokens_are_the_same_and_a_missing_device_is_named() -> None:
    model = unsplit("llama")
    prompt = token_ids([5, 9, 2])
    answers = [run_rows(engine_with(model, device=device), "s", (0, 6), 0, prompt) for device in ("auto", "cpu")]
    assert answers[0].data == answers[1].data
    if not torch.cuda.is_available():
        with pytest.raises(ModelError, match=r"device cuda: torch finds none on this machine; set `device: cpu`"):
            engine_with(model, device="cuda")


def test_the_onnx_engine_refuses_a_gpu_and_says_what_to_do() -> None:
    with pytest.raises(ModelError, match=r"the onnx engine computes on cpu, not on cuda; set `engine: torch`"):
        engine_with(unsplit("llama"), engine="onnx", device="cuda")


def test_tensors_of_another_block_are_refused(family_model: torch.nn.Module) -> None:
    engine = engine_with(family_model, [])
    head = engine_with(family_model, [len(engine.kinds) - 1])._blocks[len(engine.kinds) - 1]
    with pytest.raises(ModelError, match=r"layer\.0"):
        engine.chain.materialise(1, dict(head._parts.state_dict()))
