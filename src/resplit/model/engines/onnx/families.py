"""The decoder families that the ONNX engine computes, described as data.

All are pre-norm residual decoders with RMS normalisation, rotary positions, grouped-query attention and a gated MLP.
They differ in biases, in the normalisation of queries and keys, and in which layers attend to a window only.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

WIDTHS = ("float32", "int8", "int4")
# Rotary embeddings whose frequencies do not change with the length of the request.
_STATIC_ROTARY = ("default", "linear", "llama3", "yarn")


@dataclass(frozen=True)
class Decoder:
    """The shape of one model; `windows` has each layer's attention window in tokens, or -1 for full attention."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_width: int
    inner: int
    vocabulary: int
    epsilon: float
    qkv_bias: bool
    output_bias: bool
    mlp_bias: bool
    qk_norm: bool
    tied: bool
    windows: tuple[int, ...]

    @property
    def query_width(self) -> int:
        """Width of all query heads together."""
        return self.heads * self.head_width

    @property
    def kv_width(self) -> int:
        """Width of all key heads together, and of all value heads."""
        return self.kv_heads * self.head_width


@dataclass(frozen=True)
class _Family:
    """What the config of a family does not say; `bias_key` names the config key of the attention's biases."""

    bias_key: str | None = None
    always_qkv_bias: bool = False
    qk_norm: bool = False
    window_everywhere: bool = False


_FAMILIES = {
    "llama": _Family(bias_key="attention_bias"),
    "mistral": _Family(window_everywhere=True),
    "qwen2": _Family(always_qkv_bias=True),
    "qwen3": _Family(bias_key="attention_bias", qk_norm=True),
}


def unsupported_reason(config: dict[str, Any], weights: str) -> str | None:
    """None if the ONNX engine can compute the model with this Hugging Face config in this width, else the reason."""
    if weights not in WIDTHS:
        return f"it has weights in {', '.join(WIDTHS)}, not {weights}"
    if config["model_type"] not in _FAMILIES:
        return f"it computes {', '.join(_FAMILIES)}, not {config['model_type']}"
    if config.get("hidden_act") != "silu":
        return f"it computes hidden_act silu, not {config.get('hidden_act')}"
    if _head_width(config) % 16:
        return f"it needs heads whose width is a multiple of 16, not {_head_width(config)}"
    rotary = (config.get("rope_parameters") or {}).get("rope_type", "default")
    if rotary not in _STATIC_ROTARY:
        return f"it computes rotary embeddings of the types {', '.join(_STATIC_ROTARY)}, not {rotary}"
    return None


def decoder_of(config: dict[str, Any]) -> Decoder:
    """The shape of the model with this Hugging Face config, which the engine supports."""
    family = _FAMILIES[config["model_type"]]
    heads, layers = config["num_attention_heads"], config["num_hidden_layers"]
    biased = bool(family.bias_key and config.get(family.bias_key))
    return Decoder(
        layers=layers,
        hidden=config["hidden_size"],
        heads=heads,
        kv_heads=config.get("num_key_value_heads") or heads,
        head_width=_head_width(config),
        inner=config["intermediate_size"],
        vocabulary=config["vocab_size"],
        epsilon=config["rms_norm_eps"],
        qkv_bias=biased or family.always_qkv_bias,
        output_bias=biased,
        mlp_bias=bool(config.get("mlp_bias")),
        qk_norm=family.qk_norm,
        tied=bool(config.get("tie_word_embeddings")),
        windows=tuple(_window(config, family, layer) for layer in range(layers)),
    )


def _head_width(config: dict[str, Any]) -> int:
    width: int = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    return width


def _window(config: dict[str, Any], family: _Family, layer: int) -> int:
    types = config.get("layer_types")
    slides = family.window_everywhere if types is None else types[layer] == "sliding_attention"
    window = config.get("sliding_window")
    return window if slides and window else -1
