"""Which inputs the products of a model get on a sample text: 4-bit weights are fitted to them when it is packaged.

The text is the documentation strings of Python's own library, so that no other file is needed.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from resplit.model.engines.torch.blocks import Chain

Moments = dict[str, np.ndarray[Any, np.dtype[np.float32]]]
_WINDOWS, _WINDOW_TOKENS = 8, 256
# Products whose inputs are watched. Keys and values have the inputs of queries, and `up_proj` has those of the gate.
_PRODUCTS = ("attention.q_proj", "attention.o_proj", "mlp.gate_proj", "mlp.down_proj", "projection")
_MODULES = (  # there in every installation
    *("argparse", "asyncio", "collections", "contextlib", "csv", "datetime", "decimal", "difflib", "email.message"),
    *("enum", "fractions", "functools", "heapq", "http.client", "imaplib", "itertools", "json", "logging", "mailbox"),
    *("optparse", "pathlib", "pickle", "random", "sched", "shutil", "smtplib", "socket", "statistics", "string"),
    *("subprocess", "tarfile", "tempfile", "textwrap", "threading", "typing", "unittest", "urllib.request", "uuid"),
)


class Calibration:
    """Runs a sample of tokens through the blocks of a model, one after another, as they are packaged."""

    def __init__(self, chain: Chain, sample: Sequence[int]) -> None:
        self._chain = chain
        length = min(_WINDOW_TOKENS, chain.config.max_position_embeddings)
        stride = max(length, len(sample) // _WINDOWS)
        windows = [sample[first : first + length] for first in range(0, len(sample), stride)][:_WINDOWS]
        self._values = [torch.tensor([window]) for window in windows if window]
        self._tokens = sum(len(window) for window in windows)
        self._next = 0

    def moments(self, index: int, tensors: Mapping[str, torch.Tensor]) -> Moments:
        """The mean of x times its transpose over the inputs x of each watched product in block `index`, by its name.

        It computes the block in float32, so blocks must come in the order of the chain.
        """
        assert index == self._next, f"block {index} came, block {self._next} was due"
        self._next += 1
        if not self._values:
            return {}
        block = self._chain.materialise(index, {name: tensor.float() for name, tensor in tensors.items()})
        sums: dict[str, torch.Tensor] = {}

        def add(name: str, inputs: torch.Tensor) -> None:
            rows = inputs.reshape(-1, inputs.shape[-1])
            sums[name] = sums.get(name, 0) + rows.T @ rows

        block.watch(_PRODUCTS, add)
        with torch.inference_mode():
            for number, values in enumerate(self._values):
                context = self._chain.prepare_pass(0, values.shape[1], torch.empty(0))
                # The head takes the last position of each row.
                values = values.transpose(0, 1) if self._chain.specs[index].kind == "head" else values
                self._values[number] = block(values, context, None)
        return {name: (total / self._tokens).numpy() for name, total in sums.items()}


def sample_tokens(tokenizer: Any, vocabulary: int) -> list[int]:
    """The sample text as token ids below `vocabulary`; none where Python runs without documentation strings."""
    ids: list[int] = tokenizer("\n".join(_documentation()))["input_ids"]
    return [token for token in ids if token < vocabulary]


def _documentation() -> Iterator[str]:
    for name in _MODULES:
        module = importlib.import_module(name)
        for item in (module, *(vars(module)[key] for key in sorted(vars(module)))):
            text = vars(item).get("__doc__") if inspect.isclass(item) else getattr(item, "__doc__", None)
            if isinstance(text, str) and (inspect.isclass(item) or inspect.isroutine(item) or item is module):
                yield text
