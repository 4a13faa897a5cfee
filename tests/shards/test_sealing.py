"""Sealing shards, and wrapping their keys."""

from __future__ import annotations

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, generate_private_key
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from hypothesis import given, settings
from hypothesis import strategies as st

from resplit.errors import ShardError
from resplit.shards.sealing import new_key, open_shard, padded_length, seal, unwrap_key, wrap_key

SHARD = "ab" * 32


@settings(deadline=None)
@given(plain=st.binary(max_size=5000))
def test_opening_a_sealed_shard_gives_the_plain_content(plain: bytes) -> None:
    key = new_key()
    assert open_shard(seal(plain, key), key) == plain


@settings(deadline=None)
@given(plain=st.binary(max_size=300), where=st.floats(0, 1, exclude_max=True))
def test_a_flipped_bit_anywhere_is_detected(plain: bytes, where: float) -> None:
    key = new_key()
    sealed = bytearray(seal(plain, key))
    bit = int(where * len(sealed) * 8)
    sealed[bit // 8] ^= 1 << (bit % 8)
    with pytest.raises(ShardError, match="altered"):
        open_shard(bytes(sealed), key)


@settings(deadline=None)
@given(plain=st.binary(max_size=300), where=st.floats(0, 1, exclude_max=True), more=st.binary(min_size=1, max_size=40))
def test_a_truncated_or_extended_shard_is_refused(plain: bytes, where: float, more: bytes) -> None:
    key = new_key()
    sealed = seal(plain, key)
    with pytest.raises(ShardError):
        open_shard(sealed[: int(where * len(sealed))], key)
    with pytest.raises(ShardError):
        open_shard(sealed + more, key)


@settings(deadline=None)
@given(garbage=st.binary(max_size=200), key=st.binary(max_size=40))
def test_garbage_is_refused(garbage: bytes, key: bytes) -> None:
    with pytest.raises(ShardError):
        open_shard(garbage, key)


def test_a_shard_without_room_for_nonce_length_and_tag_is_called_truncated() -> None:
    with pytest.raises(ShardError, match="truncated"):
        open_shard(bytes(12 + 8 + 16 - 1), new_key())
    with pytest.raises(ShardError, match="altered"):
        open_shard(bytes(12 + 8 + 16), new_key())


def test_another_key_does_not_open_a_shard() -> None:
    with pytest.raises(ShardError, match="altered"):
        open_shard(seal(b"weights", new_key()), new_key())


def test_sealing_the_same_content_twice_gives_different_shards() -> None:
    key = new_key()
    assert seal(b"weights", key) != seal(b"weights", key)


def test_a_sealed_shard_reveals_nothing_of_its_content() -> None:
    plain = b'{"model.layers.0.self_attn.q_proj.weight":{"dtype":"F32"}}' + bytes(4000)
    sealed = seal(plain, new_key())
    assert b"self_attn" not in sealed
    assert bytes(16) not in sealed


@settings(deadline=None)
@given(length=st.integers(1, 2**40))
def test_a_padded_length_is_at_most_12_percent_longer_and_has_few_significant_bits(length: int) -> None:
    padded = padded_length(length)
    significant = padded // (padded & -padded)  # without its trailing zero bits
    assert length <= padded <= length * 1.12
    assert significant.bit_length() <= 7
    assert padded_length(padded) == padded


@pytest.mark.parametrize(
    ("length", "padded"),
    [
        (0, 0),
        (1, 1),
        (2, 2),
        (7, 7),
        (8, 8),  # from here on, one bit is rounded away
        (9, 10),
        (10, 10),
        (11, 12),
        (15, 16),
        (16, 16),
        (17, 18),
        (31, 32),
        (32, 32),  # two bits
        (33, 36),
        (100, 104),
        (255, 256),
        (256, 256),
        (257, 272),
        (1024, 1024),
        (1025, 1088),
        (2**20, 2**20),
        (2**20 + 1, 2**20 + 2**15),
        (2**21 - 1, 2**21),
    ],
)
def test_padded_lengths_are_those_of_the_published_algorithm(length: int, padded: int) -> None:
    assert padded_length(length) == padded


@pytest.mark.parametrize(("plain_bytes", "framed_bytes"), [(0, 8), (1, 10), (2, 10), (24, 32), (25, 36), (28, 36)])
def test_a_shard_is_nonce_and_tag_longer_than_its_padded_frame(plain_bytes: int, framed_bytes: int) -> None:
    assert len(seal(bytes(plain_bytes), new_key())) == 12 + framed_bytes + 16


def test_shards_of_similar_size_have_the_same_length() -> None:
    assert len({len(seal(bytes(length), new_key())) for length in range(1_000_100, 1_010_000, 700)}) == 1


@pytest.fixture
def wrap_keys() -> dict[str, tuple[bytes, bytes]]:
    """Each node's private and public wrap key."""
    return {name: _pem_pair(X25519PrivateKey.generate()) for name in ("node-a", "node-b")}


def test_a_node_can_unwrap_its_own_key(wrap_keys: dict[str, tuple[bytes, bytes]]) -> None:
    private, public = wrap_keys["node-a"]
    key = new_key()
    assert unwrap_key(wrap_key(key, public, node="node-a", shard=SHARD), private, node="node-a", shard=SHARD) == key


def test_a_key_cannot_be_unwrapped_for_another_node_or_shard(wrap_keys: dict[str, tuple[bytes, bytes]]) -> None:
    private, public = wrap_keys["node-a"]
    wrapped = wrap_key(new_key(), public, node="node-a", shard=SHARD)
    for key, node, shard in (
        (wrap_keys["node-b"][0], "node-a", SHARD),
        (wrap_keys["node-b"][0], "node-b", SHARD),
        (private, "node-b", SHARD),
        (private, "node-a", "cd" * 32),
    ):
        with pytest.raises(ShardError, match="altered, or is not for"):
            unwrap_key(wrapped, key, node=node, shard=shard)


@settings(deadline=None)
@given(where=st.floats(0, 1, exclude_max=True))
def test_a_flipped_bit_in_a_wrapped_key_is_detected(where: float) -> None:
    private, public = _pem_pair(X25519PrivateKey.generate())
    wrapped = bytearray(wrap_key(new_key(), public, node="node-a", shard=SHARD))
    bit = int(where * len(wrapped) * 8)
    wrapped[bit // 8] ^= 1 << (bit % 8)
    with pytest.raises(ShardError):
        unwrap_key(bytes(wrapped), private, node="node-a", shard=SHARD)


@settings(deadline=None)
@given(garbage=st.binary(max_size=200))
def test_a_garbled_wrapped_key_is_refused(garbage: bytes) -> None:
    private, _ = _pem_pair(X25519PrivateKey.generate())
    with pytest.raises(ShardError):
        unwrap_key(garbage, private, node="node-a", shard=SHARD)


def test_a_wrap_key_of_another_type_is_refused() -> None:
    private, public = _pem_pair(generate_private_key(SECP256R1()))
    with pytest.raises(ShardError, match="not an X25519 key"):
        wrap_key(new_key(), public, node="node-a", shard=SHARD)
    for other in (private, b"", b"no key"):
        with pytest.raises(ShardError, match="not an X25519 key"):
            unwrap_key(bytes(80), other, node="node-a", shard=SHARD)


def _pem_pair(key) -> tuple[bytes, bytes]:
    pem = serialization.Encoding.PEM
    return (
        key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()),
        key.public_key().public_bytes(pem, serialization.PublicFormat.SubjectPublicKeyInfo),
    )
