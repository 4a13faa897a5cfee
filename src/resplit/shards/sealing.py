"""One block's bytes at rest: sealed under a key of its own, and that key wrapped for one node.

Knows bytes and keys; knows nothing of models, of tensors, or of where shards are kept.
"""

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
    """A fresh data key. A key seals one shard only."""
    return secrets.token_bytes(_KEY_BYTES)


def seal(plain: bytes, key: bytes) -> bytes:
    """`plain` as nonce, AES-256-GCM ciphertext and tag; its length is padded (`padded_length`)."""
    nonce = secrets.token_bytes(_NONCE_BYTES)
    encryptor = Cipher(algorithms.AES256(key), modes.GCM(nonce)).encryptor()
    framed_bytes = _LENGTH_BYTES + len(plain)
    padding = bytes(padded_length(framed_bytes) - framed_bytes)
    parts = (len(plain).to_bytes(_LENGTH_BYTES, "big"), plain, padding)
    return b"".join([nonce, *map(encryptor.update, parts), encryptor.finalize(), encryptor.tag])


def open_shard(sealed: bytes, key: bytes) -> bytes:
    """What `seal` was given; ShardError if the tag does not fit, and then nothing of the content is used."""
    if len(sealed) < _NONCE_BYTES + _LENGTH_BYTES + _TAG_BYTES or len(key) != _KEY_BYTES:
        raise ShardError(f"a shard of {len(sealed)} bytes under a key of {len(key)} is cut short; fetch it again")
    view = memoryview(sealed)
    nonce, tag = sealed[:_NONCE_BYTES], sealed[-_TAG_BYTES:]
    decryptor = Cipher(algorithms.AES256(key), modes.GCM(nonce, tag)).decryptor()
    framed = decryptor.update(view[_NONCE_BYTES:-_TAG_BYTES])
    try:
        decryptor.finalize()
    except InvalidTag:
        raise ShardError("a shard was altered, or its key is another's; package the model again") from None
    length = int.from_bytes(framed[:_LENGTH_BYTES], "big")
    return framed[_LENGTH_BYTES : _LENGTH_BYTES + length]


def padded_length(length: int) -> int:
    """The next length, in bytes, that is sparse in binary: Padmé (Nikitin et al., PETS 2019, algorithm 1).

    A length tells no more than its size to a few bits: 12 % longer at worst, under 3 % from 1 MiB on.
    """
    if length < 2:
        return length
    exponent = length.bit_length() - 1
    kept_bits = exponent.bit_length()
    mask = (1 << (exponent - kept_bits)) - 1 if exponent > kept_bits else 0
    return (length + mask) & ~mask


def wrap_key(key: bytes, public_wrap_key_pem: bytes, *, node: str, shard: str) -> bytes:
    """`key` for the holder of one X25519 key alone: HPKE (RFC 9180) in base mode, bound to node and shard."""
    public = serialization.load_pem_public_key(public_wrap_key_pem)
    if not isinstance(public, X25519PublicKey):
        raise ShardError(f"the public wrap key of {node!r} is not an X25519 key; issue the node's keys again")
    return _SUITE.encrypt(key, public, info=_info(node, shard))


def unwrap_key(wrapped: bytes, private_wrap_key_pem: bytes, *, node: str, shard: str) -> bytes:
    """The key in `wrapped`; ShardError if it was altered, or wrapped for another node or another shard."""
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
