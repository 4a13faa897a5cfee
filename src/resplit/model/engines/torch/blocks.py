"""Any supported Hugging Face decoder as a chain of blocks: embed, layer.0 .. layer.n-1, head.

The only module that depends on the architecture. It builds the computation of a block, says which tensors of the
checkpoint belong to which block, and states the features of each block.
"""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig

from resplit.errors import ModelError
from resplit.privacy import sensitivity
from resplit.types import BlockFeatures, Split

Kind = Literal["embed", "layer", "attention", "mlp", "head"]


class KeyValueCache(Protocol):
    """The cache interface of the attention modules: append new keys and values, and get all of them back."""

    def update(
        self, keys: torch.Tensor, values: torch.Tensor, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]: ...


@dataclass(frozen=True)
class PassContext:
    """The values that all blocks of one pass share.

    `positions` is (1, tokens), `rotation` the rotary embedding at these positions (None if the family has none), and
    `cached_tokens` the number of tokens cached before this pass.
    """

    positions: torch.Tensor
    rotation: tuple[torch.Tensor, torch.Tensor] | None
    cached_tokens: int


@dataclass(frozen=True)
class _Architecture:
    """Names of the submodules of an architecture. All of them are pre-norm residual decoders."""

    base: str
    embed: str
    positions: str | None
    layers: str
    norm: str
    rotary: str | None
    attention_norm: str
    attention: str
    mlp_norm: str
    mlp: str


_LLAMA = _Architecture(
    "model",
    "embed_tokens",
    None,
    "layers",
    "norm",
    "rotary_emb",
    "input_layernorm",
    "self_attn",
    "post_attention_layernorm",
    "mlp",
)
_GPT2 = _Architecture("transformer", "wte", "wpe", "h", "ln_f", None, "ln_1", "attn", "ln_2", "mlp")
# Rotary embeddings that transformers changes when a pass is long, and that would stay so for the next request.
_STATEFUL_ROTARY = ("dynamic", "longrope")
_FAMILIES = {"llama": _LLAMA, "mistral": _LLAMA, "qwen2": _LLAMA, "qwen3": _LLAMA, "gpt2": _GPT2}


@dataclass(frozen=True)
class BlockSpec:
    """One block of the chain: its name, kind, and layer (None for embed and head)."""

    name: str
    kind: Kind
    layer: int | None


class Chain:
    """The blocks of one model, without weights.

    Modules stay on torch's meta device, which needs no memory, until `materialise` gives a block its tensors.
    """

    def __init__(self, config: PretrainedConfig, split: Split = "layer") -> None:
        family = _FAMILIES.get(config.model_type)
        if family is None:
            raise ModelError(f"model type {config.model_type!r} is not supported; supported: {', '.join(_FAMILIES)}")
        config._attn_implementation = "sdpa"
        with torch.device("meta"):
            skeleton = AutoModelForCausalLM.from_config(config, trust_remote_code=False).eval()
        self.config = config
        self.specs = _specs(config.num_hidden_layers, split)
        self._family = family
        self._skeleton = skeleton
        base = getattr(skeleton, family.base)
        # The rotary table is computed, not loaded, so it cannot stay on the meta device.
        self.rotary = type(base.rotary_emb)(config=config) if family.rotary else None
        self._keeps_state = getattr(self.rotary, "rope_type", None) in _STATEFUL_ROTARY

    def on(self, device: torch.device) -> Chain:
        """This chain, with what is not loaded in the memory of `device`."""
        if self.rotary is not None:
            self.rotary = self.rotary.to(device)
        return self

    @property
    def cache_shape(self) -> tuple[int, int]:
        """The number of key/value heads, and the width of one head."""
        heads = getattr(self.config, "num_key_value_heads", None) or self.config.num_attention_heads
        return heads, getattr(
            self.config, "head_dim", None
        ) or self.config.hidden_size // self.config.num_attention_heads

    def tensor_names(self, index: int) -> dict[str, str]:
        """Tensors of block `index`: name within the block -> name in the state of the whole model."""
        return {
            f"{part}.{name}": f"{prefix}.{name}"
            for part, prefix in self._parts(index).items()
            for name in self._skeleton.get_submodule(prefix).state_dict()
        }

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every tensor that a block needs, by its name in the whole model."""
        names = {name for index in range(len(self.specs)) for name in self.tensor_names(index).values()}
        return {name: tuple(_tensor_at(self._skeleton, name).shape) for name in sorted(names)}

    @property
    def base(self) -> str:
        """The prefix of the base model's tensors."""
        return self._family.base

    @property
    def tied(self) -> dict[str, str]:
        """The head's tensor, if it shares the weights of the embedding, and the embedding's name."""
        embedding = f"{self._family.base}.{self._family.embed}.weight"
        return {"lm_head.weight": embedding} if self.config.tie_word_embeddings else {}

    def materialise(self, index: int, tensors: dict[str, torch.Tensor]) -> BlockModule:
        """Block `index` with these weights; ModelError if names or shapes differ from the model's."""
        parts = nn.ModuleDict({part: self._new_part(prefix) for part, prefix in self._parts(index).items()})
        try:
            parts.load_state_dict(tensors, assign=True)
        except RuntimeError as error:
            raise ModelError(f"block {self.specs[index].name}: {error}") from None
        spec = self.specs[index]
        types = getattr(self.config, "layer_types", None)
        sliding = spec.layer is not None and types is not None and types[spec.layer] == "sliding_attention"
        if self.config.model_type == "mistral":
            sliding = self.config.sliding_window is not None
        return BlockModule(spec, parts.eval().requires_grad_(False), self.config.sliding_window if sliding else None)

    def prepare_pass(self, start: int, tokens: int, like: torch.Tensor) -> PassContext:
        """The context of a pass over `tokens` positions from `start`; `like` has the dtype of the hidden states."""
        positions = torch.arange(start, start + tokens, device=like.device).unsqueeze(0)  # (1, tokens)
        rotary = copy.deepcopy(self.rotary) if self._keeps_state else self.rotary
        rotation = rotary(like, position_ids=positions) if rotary is not None else None
        return PassContext(positions, rotation, start)

    def _parts(self, index: int) -> dict[str, str]:
        """Submodules of a block: name within the block -> path in the model."""
        family, spec = self._family, self.specs[index]
        if spec.kind == "embed":
            parts = {"tokens": f"{family.base}.{family.embed}"}
            return parts | ({"positions": f"{family.base}.{family.positions}"} if family.positions else {})
        if spec.kind == "head":
            return {"norm": f"{family.base}.{family.norm}", "projection": "lm_head"}
        layer = f"{family.base}.{family.layers}.{spec.layer}"
        attention = {"attention_norm": f"{layer}.{family.attention_norm}", "attention": f"{layer}.{family.attention}"}
        mlp = {"mlp_norm": f"{layer}.{family.mlp_norm}", "mlp": f"{layer}.{family.mlp}"}
        return {"layer": attention | mlp, "attention": attention, "mlp": mlp}[spec.kind]

    def _new_part(self, path: str) -> nn.Module:
        """A copy, on the meta device, of the submodule at `path`."""
        part: nn.Module = copy.deepcopy(self._skeleton.get_submodule(path))
        return part


class BlockModule:
    """One block with its weights: hidden states in, hidden states out."""

    def __init__(self, spec: BlockSpec, parts: nn.ModuleDict, sliding_window: int | None) -> None:
        self.spec = spec
        self.weight_bytes = sum(tensor.nbytes for tensor in parts.state_dict().values())
        self._parts = parts
        self._sliding_window = sliding_window
        self._cache_argument = _cache_argument(parts["attention"]) if "attention" in parts else ""

    @property
    def has_cache(self) -> bool:
        """Whether the block caches keys and values."""
        return self.spec.kind in ("layer", "attention")

    def watch(self, names: Collection[str], observe: Callable[[str, torch.Tensor], None]) -> None:
        """Call `observe` with the name and the inputs of the modules with these names, whenever the block computes."""
        for name, module in self._parts.named_modules():
            if name in names:
                module.register_forward_pre_hook(lambda _, inputs, name=name: observe(name, inputs[0]))

    def __call__(self, hidden: torch.Tensor, context: PassContext, cache: KeyValueCache | None) -> torch.Tensor:
        """Compute the block. `hidden` is hidden states (1, tokens, width), or token ids (1, tokens) for embed.

        Returns hidden states of the same shape, or, for the head, the logits of the last position (1, vocabulary).
        """
        if self.spec.kind == "embed":
            return self._embed(hidden, context)
        if self.spec.kind == "head":
            hidden = self._parts["projection"](self._parts["norm"](hidden[:, -1, :]))
        if self.spec.kind in ("layer", "attention"):
            hidden = hidden + self._attend(self._parts["attention_norm"](hidden), context, cache)
        if self.spec.kind in ("layer", "mlp"):
            hidden = hidden + self._parts["mlp"](self._parts["mlp_norm"](hidden))
        return hidden

    def _embed(self, token_ids: torch.Tensor, context: PassContext) -> torch.Tensor:
        hidden: torch.Tensor = self._parts["tokens"](token_ids)
        return hidden + self._parts["positions"](context.positions) if "positions" in self._parts else hidden

    def _attend(self, hidden: torch.Tensor, context: PassContext, cache: KeyValueCache | None) -> torch.Tensor:
        rotation = {"position_embeddings": context.rotation} if context.rotation is not None else {}
        mask = _mask(context.cached_tokens, hidden.shape[1], self._sliding_window)
        mask = None if mask is None else mask.to(hidden.device)
        output: torch.Tensor = self._parts["attention"](
            hidden_states=hidden,
            attention_mask=mask,
            position_ids=context.positions,
            **{self._cache_argument: cache},
            **rotation,
        )[0]
        return output


def _cache_argument(attention: nn.Module) -> str:
    """The name of an attention module's cache: transformers 5.24 changed it, and warns of the old one."""
    return "cache" if "cache" in inspect.signature(attention.forward).parameters else "past_key_values"


def _mask(context: int, tokens: int, window: int | None) -> torch.Tensor | None:
    """The attention mask (1, 1, tokens, context + tokens), or None where torch's causal path has the same result.

    `generate` takes that path too, so the results are equal bit for bit.
    """
    fits = window is None or context + tokens <= window
    if fits and (context == 0 or tokens == 1):
        return None
    query = torch.arange(context, context + tokens).unsqueeze(1)
    key = torch.arange(context + tokens).unsqueeze(0)
    mask = (key <= query) if window is None else (key <= query) & (key > query - window)
    return mask[None, None]


def _specs(layers: int, split: Split) -> tuple[BlockSpec, ...]:
    kinds: tuple[Kind, ...] = ("layer",) if split == "layer" else ("attention", "mlp")
    inner = [
        BlockSpec(f"layer.{k}" if kind == "layer" else f"layer.{k}.{kind}", kind, k)
        for k in range(layers)
        for kind in kinds
    ]
    return (BlockSpec("embed", "embed", None), *inner, BlockSpec("head", "head", None))


def features(chain: Chain, weight_bytes: Sequence[float], item_bytes: int) -> tuple[BlockFeatures, ...]:
    """Features of every block, none marked as private.

    `weight_bytes` has the size of each packaged block, and `item_bytes` is the size of an item of hidden states and
    caches.
    """
    config = chain.config
    key_value_heads, head_width = chain.cache_shape
    all_shapes, result = chain.shapes(), []
    for index, spec in enumerate(chain.specs):
        shapes = [all_shapes[name] for name in chain.tensor_names(index).values()]
        products = 0 if spec.kind == "embed" else sum(math.prod(shape) for shape in shapes if len(shape) == 2)
        attends = spec.kind in ("layer", "attention")
        result.append(
            BlockFeatures(
                name=spec.name,
                kind=spec.kind,
                parameters=sum(map(math.prod, shapes)),
                flops_per_token=2.0 * products,
                flops_per_context_token=4.0 * config.num_attention_heads * head_width if attends else 0.0,
                weight_bytes=weight_bytes[index],
                kv_bytes_per_token=float(2 * key_value_heads * head_width * item_bytes) if attends else 0.0,
                activation_bytes_per_token=4.0 if spec.kind == "head" else float(config.hidden_size * item_bytes),
                private=False,
                sensitivity=sensitivity(spec.layer, config.num_hidden_layers),
            )
        )
    return tuple(result)


def _tensor_at(model: nn.Module, name: str) -> torch.Tensor:
    module, _, tensor = name.rpartition(".")
    found: torch.Tensor = getattr(model.get_submodule(module), tensor)
    return found
