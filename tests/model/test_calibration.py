"""The inputs that a block is fitted to are those of the unsplit model."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from resplit.model.calibration import Calibration, sample_tokens
from resplit.model.engines.torch.engine import chain_of
from tests.model.conftest import unsplit

SAMPLE = [(7 * position) % 97 for position in range(700)]
PATHS = {
    "attention.q_proj": "self_attn.q_proj",
    "attention.o_proj": "self_attn.o_proj",
    "mlp.gate_proj": "mlp.gate_proj",
    "mlp.down_proj": "mlp.down_proj",
}


def inputs_of(model: torch.nn.Module, path: str, window: list[int]) -> np.ndarray:
    """The inputs (tokens, width) of one module of the unsplit model."""
    found: list[torch.Tensor] = []
    hook = model.get_submodule(path).register_forward_pre_hook(lambda module, inputs: found.append(inputs[0]))
    with torch.inference_mode():
        model(torch.tensor([window]))
    hook.remove()
    return found[0][0].numpy()


@pytest.mark.parametrize("split", ["layer", "sublayer"])
@pytest.mark.parametrize("family", ["qwen3", "mistral-sliding"])
def test_moments_are_those_of_the_unsplit_model(family: str, split: Any) -> None:
    model = unsplit(family)
    chain = chain_of(model.config.to_dict(), split)
    calibration, state = Calibration(chain, SAMPLE), model.state_dict()
    windows = [SAMPLE[first : first + 256] for first in range(0, len(SAMPLE), 256)]
    for index, spec in enumerate(chain.specs):
        tensors = {name: state[path] for name, path in chain.tensor_names(index).items()}
        moments = calibration.moments(index, tensors)
        paths = {"projection": "lm_head"} if spec.kind == "head" else {}
        if spec.layer is not None:
            parts = ("attention", "mlp") if spec.kind == "layer" else (spec.kind,)
            paths = {n: f"model.layers.{spec.layer}.{p}" for n, p in PATHS.items() if n.split(".")[0] in parts}
        assert moments.keys() == paths.keys()
        for name, path in paths.items():
            rows = np.concatenate([inputs_of(model, path, window) for window in windows])
            np.testing.assert_allclose(moments[name], rows.T @ rows / len(rows), rtol=1e-3, atol=1e-5)


def test_blocks_out_of_order_are_refused() -> None:
    chain = chain_of(unsplit("llama").config.to_dict(), "layer")
    with pytest.raises(AssertionError, match="block 1 came, block 0 was due"):
        Calibration(chain, SAMPLE).moments(1, {})


def test_the_sample_has_text_and_only_tokens_that_the_model_knows() -> None:
    ids = sample_tokens(lambda text: {"input_ids": [ord(character) for character in text]}, 128)
    assert len(ids) > 8 * 256
    assert max(ids) < 128
