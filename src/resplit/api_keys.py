"""API keys as a cluster file names them: a key is known by its SHA-256 as soon as it is read, and kept nowhere."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, model_validator

from resplit.errors import ConfigError
from resplit.files import read_secret


def digest(key: str) -> bytes:
    """The SHA-256 of a key, under which it is looked up: the time of a look-up then reveals nothing about a key."""
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


class ApiKeySource(BaseModel):
    """An entry of `api_keys`: a key's SHA-256 in hexadecimal, an environment variable, or a file of its owner's only.

    Variable and file hold keys separated by white space. A key in clear is accepted too, and becomes its SHA-256.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")] | None = None
    env: Annotated[str, Field(min_length=1)] | None = None
    file: Path | None = None

    @model_validator(mode="before")
    @classmethod
    def _of_clear_text(cls, entry: Any) -> Any:
        return hidden(entry)

    @model_validator(mode="after")
    def _names_one_source(self) -> ApiKeySource:
        if [self.sha256, self.env, self.file].count(None) != 2:
            raise ValueError("give a key, or one of `sha256`, `env` and `file`")
        return self

    def digests(self, place: str) -> tuple[bytes, ...]:
        """The digests of the keys, read now. ConfigError, at `place`, if there is no key to be read."""
        if self.sha256:
            return (bytes.fromhex(self.sha256),)
        if self.env:
            text, source = os.environ.get(self.env, ""), f"the environment variable {self.env}"
        else:
            assert self.file is not None
            text, source = _read_keys(self.file), str(self.file)
        if not text.split():
            raise ConfigError(place, f"{source} holds no key; put one there, or remove the entry")
        return tuple(map(digest, text.split()))


def hidden(entry: Any) -> Any:
    """An entry of `api_keys` without a key in clear; ValueError for a key that no client can send."""
    if isinstance(entry, str) and (not entry or entry.split() != [entry]):
        raise ValueError("a key has at least one character, and no white space")
    return {"sha256": digest(entry).hex()} if isinstance(entry, str) else entry


def _read_keys(path: Path) -> str:
    try:
        return read_secret(path).decode()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(str(path), f"cannot be read as a file of API keys ({error})") from None
