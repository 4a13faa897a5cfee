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
def test_what_was_sealed_comes_back(plain: bytes) -> None:
    key = new_key()
    assert open_shard(seal(plain, key), key) == plain


@settings(deadline=None)
@given(plain=st.binary(max_size=300), where=st.floats(0, 1, exclude_max=True))
def test_a_flipped_bit_anywhere_is_caught(plain: bytes, where: float) -> None:
    key = new_key()
    sealed = bytearray(seal(plain, key))
    bit = int(where * len(sealed) * 8)
    sealed[bit // 8] ^= 1 << (bit % 8)
    with pytest.raises(ShardError, match="altered"):
        open_shard(bytes(sealed), key)


@settings(deadline=None)
@given(plain=st.binary(max_size=300), where=st.floats(0, 1, exclude_max=True), more=st.binary(min_size=1, max_size=40))
def test_a_shard_cut_short_or_drawn_out_is_caught(plain: bytes, where: float, more: bytes) -> None:
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


def test_another_key_does_not_open_a_shard() -> None:
    with pytest.raises(ShardError, match="altered"):
        open_shard(seal(b"weights", new_key()), new_key())


def test_the_same_content_is_never_sealed_alike() -> None:
    key = new_key()
    assert seal(b"weights", key) != seal(b"weights", key)


def test_a_sealed_shard_shows_nothing_of_its_content() -> None:
    plain = b'{"model.layers.0.self_attn.q_proj.weight":{"dtype":"F32"}}' + bytes(4000)
    sealed = seal(plain, new_key())
    assert b"self_attn" not in sealed
    assert bytes(16) not in sealed


@settings(deadline=None)
@given(length=st.integers(1, 2**40))
def test_a_padded_length_is_little_longer_and_one_of_few(length: int) -> None:
    padded = padded_length(length)
    significant = padded // (padded & -padded)  # without the zeros at the end
    assert length <= padded <= length * 1.12
    assert significant.bit_length() <= 7
    assert padded_length(padded) == padded


def test_shards_of_nearly_equal_content_are_equally_long() -> None:
    assert len({len(seal(bytes(length), new_key())) for length in range(1_000_100, 1_010_000, 700)}) == 1


@pytest.fixture
def wrap_keys() -> dict[str, tuple[bytes, bytes]]:
    """Each node's private and public wrap key."""
    return {name: _pem_pair(X25519PrivateKey.generate()) for name in ("node-a", "node-b")}


def test_a_wrapped_key_opens_for_its_node(wrap_keys: dict[str, tuple[bytes, bytes]]) -> None:
    private, public = wrap_keys["node-a"]
    key = new_key()
    assert unwrap_key(wrap_key(key, public, node="node-a", shard=SHARD), private, node="node-a", shard=SHARD) == key


def test_a_wrapped_key_opens_for_no_other_node_and_no_other_shard(wrap_keys: dict[str, tuple[bytes, bytes]]) -> None:
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
def test_a_flipped_bit_in_a_wrapped_key_is_caught(where: float) -> None:
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


def test_a_wrap_key_of_another_sort_is_refused() -> None:
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
