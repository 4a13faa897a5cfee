"""The files in the authority's and the members' folders: their names, how they are read, and how they are written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NotRequired, TypedDict

from cryptography import x509
from cryptography.x509.oid import NameOID

from resplit.errors import ConfigError
from resplit.files import read_secret, write_atomically

CA, CA_KEY = "ca.pem", "ca.key"
CERTIFICATE, KEY = "cert.pem", "key.pem"
COMMANDS, COMMANDS_KEY = "commands.jwks", "commands.key"
WRAP_KEY = "wrap.key"
_FOLDER_MODE, _FILE_MODE = 0o700, 0o600


class PublicJwk(TypedDict):
    """A public Ed25519 key as a JSON Web Key (RFC 8037). `exp` is when it expires, in seconds since 1970."""

    kty: str
    crv: str
    x: str
    kid: str
    exp: NotRequired[float]


def public_wrap_key_name(node: str) -> str:
    """Name of the file with the public wrap key of `node`."""
    return f"wrap-{node}.pub"


def read(path: Path) -> bytes:
    """Content of a key file; ConfigError if it cannot be read."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise _unreadable(path, error) from None


def read_private(path: Path) -> bytes:
    """Content of a private key's file; ConfigError if it cannot be read, or if others than its owner may access it."""
    try:
        return read_secret(path)
    except OSError as error:
        raise _unreadable(path, error) from None


def read_certificate(path: Path) -> x509.Certificate:
    """The certificate at `path`; ConfigError if the file is missing or is no certificate."""
    try:
        return x509.load_pem_x509_certificate(read(path))
    except ValueError as error:
        raise ConfigError(str(path), f"is not a certificate ({error})") from None


def subject_name(certificate: x509.Certificate) -> str:
    """The member for whom a certificate was issued."""
    return str(certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)[0].value)


def key_set(keys: Sequence[PublicJwk]) -> bytes:
    """Public keys as a JSON Web Key Set (RFC 7517)."""
    return json.dumps({"keys": keys}).encode()


def read_key_set(path: Path) -> tuple[PublicJwk, ...]:
    """The public keys in the set at `path`, newest first, at least one; ConfigError if it is not such a set."""
    try:
        newest, *older = json.loads(read(path))["keys"]
    except (ValueError, KeyError, TypeError):
        raise ConfigError(str(path), "is not a set of public keys; copy the member's folder again") from None
    return (newest, *older)


def store(folder: Path, files: Mapping[str, bytes]) -> None:
    """Create `folder` with these files, all or nothing; in an existing folder, replace them one by one.

    Only the owner can read folder and files. ConfigError if they cannot be written.
    """
    new = folder.with_name(f".{folder.name}.new")
    try:
        if folder.exists():
            _write(folder, files)
            return
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir(mode=_FOLDER_MODE, parents=True)
        _write(new, files)
        new.rename(folder)
    except OSError as error:
        shutil.rmtree(new, ignore_errors=True)
        raise ConfigError(str(folder), f"cannot be written ({error.strerror})") from None


def _write(folder: Path, files: Mapping[str, bytes]) -> None:
    for name, content in files.items():
        write_atomically(folder / name, content, _FILE_MODE)


def _unreadable(path: Path, error: OSError) -> ConfigError:
    return ConfigError(str(path), f"cannot be read ({error.strerror}); `resplit keys` creates it")
