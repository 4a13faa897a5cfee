"""Numbers of a request, on their way to the node that samples."""

from __future__ import annotations

import json

import numpy as np
import pytest
from pydantic import ValidationError

from resplit.gateway.openai.schemas import CompletionRequest
from resplit.model.activation import Activation
from resplit.model.sampling import sample
from resplit.types import Sampling
from resplit.wire import node_pb2
from tests.support.fuzzing import NUMBERS


@pytest.mark.parametrize("parameter", ["temperature", "top_p", "seed"])
@pytest.mark.parametrize("number", [each for each in NUMBERS if len(each) < 400])
def test_a_node_can_sample_with_every_number_that_is_accepted(parameter: str, number: str) -> None:
    body = {"model": "m", "prompt": "a", "temperature": 1.0, "top_p": 0.5, parameter: json.loads(number)}
    try:
        sampling = CompletionRequest.model_validate(body).sampling()
    except ValidationError:
        return
    sent = node_pb2.Sampling(temperature=sampling.temperature, top_p=sampling.top_p, seed=sampling.seed % 2**62)
    assert (sent.temperature, sent.top_p) == (sampling.temperature, sampling.top_p)
    received = Sampling(sent.temperature, sent.top_p, sent.seed)
    logits = Activation("float32", (1, 16), np.linspace(-1, 1, 16, dtype=np.float32).tobytes())
    (drawn,) = sample(logits, received, 3)
    assert 0 <= drawn < 16
