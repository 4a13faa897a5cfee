"""API keys: which request class a key belongs to, and whether a key is required."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from resplit.api_keys import digest
from resplit.errors import ConfigError
from resplit.gateway.openai.http_errors import http_error


@dataclass(frozen=True)
class ApiKeys:
    """The request class of each key, by the key's digest. Without `required` an unknown key has no effect."""

    classes: Mapping[bytes, str]
    required: bool

    @classmethod
    def of(cls, keys: Mapping[bytes, str], classes: tuple[str, ...], required: bool) -> ApiKeys:
        """Make it from keys' digests and their request classes; ConfigError if a class is not one of `classes`."""
        for name in keys.values():
            if name not in classes:
                raise ConfigError("api_keys", f"class {name!r} is not one of {', '.join(classes)}")
        return cls(keys, required)

    def class_of(self, authorization: str) -> str | None:
        """The class of the key in an Authorization header. Without a known key: None, or HTTPException (401)."""
        found = self.classes.get(_digest_in(authorization))
        if found is None and self.required:
            challenge = {"WWW-Authenticate": "Bearer"}
            rule = "a valid API key is required: Authorization: Bearer KEY"
            raise http_error(401, rule, "invalid_api_key", headers=challenge)
        return found

    def client_of(self, authorization: str, address: str) -> str:
        """Who sends a request: the holder of a known key, from wherever, else the address that it comes from."""
        known = _digest_in(authorization)
        return known.hex() if known in self.classes else address


def _digest_in(authorization: str) -> bytes:
    """The digest of the key in an Authorization header; b"" without one."""
    scheme, _, key = authorization.partition(" ")
    return digest(key.strip()) if scheme.lower() == "bearer" else b""
