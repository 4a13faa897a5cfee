"""The arrays that a packaged block of the ONNX engine contains, by kind of block.

Graphs are stored as bytes. `rotary` are the inverse frequencies of the rotary embedding, and its scale last.
"""

from __future__ import annotations

# A packaged layer has one attention graph for each of these numbers of rows; other numbers are sums of them.
ATTENTION_SLOTS = (1, 2, 4, 8)
_ATTENTION = ("before", "after", "rotary", *(f"attention.{slots}" for slots in ATTENTION_SLOTS))
_NAMES = {
    "embed": frozenset({"embed"}),
    "layer": frozenset(_ATTENTION),
    "attention": frozenset(_ATTENTION),
    "mlp": frozenset({"mlp"}),
    "head": frozenset({"head"}),
}


def expected_names(kind: str) -> frozenset[str]:
    """The arrays without which a block of this kind cannot be loaded."""
    return _NAMES[kind]
