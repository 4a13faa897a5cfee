"""Encryption of shards: each block is sealed with a data key of its own, which is wrapped for one node at a time."""

from __future__ import annotations

import json
import secrets

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.hpke import AEAD, KDF, KEM, Suite

from resplit.errors import ShardError

_SUITE = Suite(KEM.X25519, KDF.HKDF_SHA256, AEAD.AES_256_GCM)
_KEY_BYTES = 32
_NONCE_BYTES = 12
_TAG_BYTES = 16
_LENGTH_BYTES = 8


def new_key() -> bytes:
    """A new data key, for one shard only."""
    return secrets.token_bytes(_KEY_BYTES)


def seal(plain: bytes, key: bytes) -> bytes:
    """Encrypt `plain`: nonce, AES-256-GCM ciphertext, tag. The length is padded to `padded_length`."""
    nonce = secrets.token_bytes(_NONCE_BYTES)
    encryptor = Cipher(algorithms.AES256(key), modes.GCM(nonce)).encryptor()
    framed_bytes = _LENGTH_BYTES + len(plain)
    padding = bytes(padded_length(framed_bytes) - framed_bytes)
    parts = (len(plain).to_bytes(_LENGTH_BYTES, "big"), plain, padding)
    return b"".join([nonce, *map(encryptor.update, parts), encryptor.finalize(), encryptor.tag])


def open_shard(sealed: bytes, key: bytes) -> bytes:
    """Decrypt a sealed shard; ShardError, before any content is used, if it was altered or the key is wrong."""
    if len(sealed) < _NONCE_BYTES + _LENGTH_BYTES + _TAG_BYTES or len(key) != _KEY_BYTES:
        raise ShardError(f"a shard of {len(sealed)} bytes with a key of {len(key)} bytes is truncated; fetch it again")
    view = memoryview(sealed)
    nonce, tag = sealed[:_NONCE_BYTES], sealed[-_TAG_BYTES:]
    decryptor = Cipher(algorithms.AES256(key), modes.GCM(nonce, tag)).decryptor()
    framed = decryptor.update(view[_NONCE_BYTES:-_TAG_BYTES])
    try:
        decryptor.finalize()
    except InvalidTag:
        raise ShardError("a shard was altered, or the key belongs to another shard; package the model again") from None
    length = int.from_bytes(framed[:_LENGTH_BYTES], "big")
    return framed[_LENGTH_BYTES : _LENGTH_BYTES + length]


def padded_length(length: int) -> int:
    """The length in bytes to which `length` is padded: Padmé (Nikitin et al., PETS 2019, algorithm 1).

    With E = floor(log2 length), the length is rounded up to its leading floor(log2 E) + 2 bits, and the padded length
    reveals no more than these. It is at most 12 % longer, and less than 4 % from 1 MiB.
    """
    exponent = max(length, 1).bit_length() - 1
    mask = (1 << (exponent - exponent.bit_length())) - 1  # the bits that are rounded away
    return (length + mask) & ~mask


def wrap_key(key: bytes, public_wrap_key_pem: bytes, *, node: str, shard: str) -> bytes:
    """Encrypt `key` for the owner of one X25519 key: HPKE (RFC 9180) in base mode, bound to node and shard.

    ShardError if the public key is of another type.
    """
    public = serialization.load_pem_public_key(public_wrap_key_pem)
    if not isinstance(public, X25519PublicKey):
        raise ShardError(f"the public wrap key of {node!r} is not an X25519 key; issue the node's keys again")
    return _SUITE.encrypt(key, public, info=_info(node, shard))


def unwrap_key(wrapped: bytes, private_wrap_key_pem: bytes, *, node: str, shard: str) -> bytes:
    """Decrypt a wrapped key; ShardError if it was altered, or wrapped for another node or shard."""
    try:
        private = serialization.load_pem_private_key(private_wrap_key_pem, password=None)
    except ValueError:
        private = None
    if not isinstance(private, X25519PrivateKey):
        raise ShardError(f"the wrap key of {node!r} is not an X25519 key; copy the node's folder again")
    try:
        return _SUITE.decrypt(wrapped, private, info=_info(node, shard))
    except InvalidTag:
        raise ShardError(f"the key of shard {shard:.80} was altered, or is not for {node!r}; prepare again") from None


def _info(node: str, shard: str) -> bytes:
    return json.dumps(["resplit shard key", node, shard]).encode()
