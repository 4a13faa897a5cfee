"""The identity of a member: its credentials, the TLS contexts made from them, and the names of its peers."""

from __future__ import annotations

import ssl
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol

from resplit.errors import CommandRefusedError, ConfigError
from resplit.security.key_files import (
    CA,
    CERTIFICATE,
    COMMANDS,
    COMMANDS_KEY,
    KEY,
    WRAP_KEY,
    PublicJwk,
    public_wrap_key_name,
    read,
    read_certificate,
    read_key_set,
    read_private,
    subject_name,
)

CONTROLLER = "controller"
# What a TLS connection carries, as its ends agree in the handshake (ALPN): gRPC, for commands, or a stream of other
# calls, of steps, of caches or of tokens.
GRPC = "h2"
CALLS = "resplit-calls"
STEPS = "resplit-steps"
CACHES = "resplit-caches"
TOKENS = "resplit-tokens"


class _HasCertificate(Protocol):
    def getpeercert(self) -> Any: ...


@dataclass(frozen=True)
class Member:
    """One node or the controller: its name and its credentials, read from its own folder.

    `command_keys` are the public keys that may sign commands to this member (RFC 7517, newest first; `exp` is the
    time at which a key expires). A node has a `wrap_key` (X25519, PEM). The controller has a `signing_key`
    (Ed25519, PEM), and the public wrap key of every node in its folder.
    """

    name: str
    folder: Path
    command_keys: tuple[PublicJwk, ...]
    signing_key: bytes | None = field(default=None, repr=False)
    wrap_key: bytes | None = field(default=None, repr=False)

    @classmethod
    def load(cls, folder: Path) -> Member:
        """Read a member's folder; ConfigError names the file that is missing, malformed, expired or open to others."""
        certificate = read_certificate(folder / CERTIFICATE)
        name = subject_name(certificate)
        if certificate.not_valid_after_utc < datetime.now(UTC):
            raise ConfigError(
                str(folder / CERTIFICATE),
                f"expired on {certificate.not_valid_after_utc:%Y-%m-%d}; renew it with `resplit keys --rotate`",
            )
        read_private(folder / KEY)  # TLS reads this file by its path
        is_controller = name == CONTROLLER
        return cls(
            name=name,
            folder=folder,
            command_keys=read_key_set(folder / COMMANDS),
            signing_key=read_private(folder / COMMANDS_KEY) if is_controller else None,
            wrap_key=None if is_controller else read_private(folder / WRAP_KEY),
        )

    @classmethod
    def load_as(cls, name: str, folder: Path) -> Member:
        """Read the folder of the member `name`; ConfigError also if the folder is another member's."""
        member = cls.load(folder)
        if member.name != name:
            rule = f"has the keys of {member.name!r}, not of {name!r}; copy the folder `keys/{name}` to this machine"
            raise ConfigError(str(folder), rule)
        return member

    def public_wrap_key(self, node: str) -> bytes:
        """The public key (PEM) with which the controller wraps shard keys for `node`; ConfigError if it has none."""
        return read(self.folder / public_wrap_key_name(node))

    def server_context(self) -> ssl.SSLContext:
        """TLS for a server: only members of this authority can connect. `peer_name` says which one did."""
        return self._mutual(ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), GRPC, CALLS, STEPS, CACHES, TOKENS)

    def client_context(self, protocol: str = GRPC) -> ssl.SSLContext:
        """TLS for a client. The server must prove that it owns the name given as `server_hostname`.

        `protocol` is what the connection will carry: `GRPC`, `CALLS`, `STEPS`, `CACHES` or `TOKENS`.

        Its address is not checked, so this works on loopback and behind address translation. With grpclib:
        `Channel(host, port, ssl=member.client_context(), config=Configuration(ssl_target_name_override=name))`.
        """
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.hostname_checks_common_name = False
        return self._mutual(context, protocol)

    def _mutual(self, context: ssl.SSLContext, *protocols: str) -> ssl.SSLContext:
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        context.verify_mode = ssl.CERT_REQUIRED
        context.verify_flags |= ssl.VerifyFlags.VERIFY_X509_STRICT
        try:
            context.load_cert_chain(self.folder / CERTIFICATE, self.folder / KEY)
            context.load_verify_locations(self.folder / CA)
        except (OSError, ssl.SSLError) as error:
            raise ConfigError(str(self.folder), f"the certificate cannot be used ({error}); issue it again") from None
        context.set_alpn_protocols(list(protocols))
        return context


def peer_name(ssl_object: _HasCertificate) -> str:
    """The member at the other end of an established TLS connection; CommandRefusedError if it showed no certificate."""
    return certificate_name(ssl_object.getpeercert())


def certificate_name(certificate: Mapping[str, Any] | None) -> str:
    """The member named in a verified certificate, as `getpeercert()` or grpclib's `stream.peer.cert()` return it.

    CommandRefusedError if there is no certificate or no name in it.
    """
    for relative_name in (certificate or {}).get("subject", ()):
        for key, value in relative_name:
            if key == "commonName":
                return str(value)
    raise CommandRefusedError("unauthenticated", "the peer showed no certificate with a member's name")
