"""Who is who: the authority, each member's certificate, and the keys for commands and shards.

Knows key files and TLS contexts; knows nothing of what members say to each other.
"""

from __future__ import annotations

import ipaddress
import json
import re
import shutil
import ssl
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Protocol

from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from joserfc.jwk import OKPKey

from resplit.errors import CommandRefusedError, ConfigError
from resplit.files import write_atomically

AUTHORITY = "authority"
CONTROLLER = "controller"
HONOUR_OLD_S = 86_400.0
_AUTHORITY_DAYS = 3650
_MEMBER_DAYS = 365
_BACKDATE = timedelta(hours=1)  # a member whose clock is behind still accepts a fresh certificate
_NAME = re.compile(r"[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?")  # one DNS label, because TLS checks it as a host name

_CA, _CA_KEY = "ca.pem", "ca.key"
_CERTIFICATE, _KEY = "cert.pem", "key.pem"
_COMMANDS, _COMMANDS_KEY = "commands.jwks", "commands.key"
_WRAP_KEY = "wrap.key"
_OWNER_ONLY = 0o600


class _HasCertificate(Protocol):
    def getpeercert(self) -> Any: ...


@dataclass(frozen=True)
class Member:
    """One node or the controller, as its own folder describes it: what it is called, and how it proves that.

    `command_keys` are the public keys whose commands it honours (RFC 7517, newest first; `exp` where one
    retires). A node has `wrap_key` (X25519, PEM); the controller has `signing_key` (Ed25519, PEM) and every
    node's public wrap key.
    """

    name: str
    folder: Path
    command_keys: tuple[dict[str, Any], ...]
    signing_key: bytes | None = field(default=None, repr=False)
    wrap_key: bytes | None = field(default=None, repr=False)

    @classmethod
    def load(cls, folder: Path) -> Member:
        """Read a member's folder; ConfigError names the file that is missing, malformed or out of date."""
        certificate = _certificate_in(folder)
        name = _common_name(certificate)
        if certificate.not_valid_after_utc < datetime.now(UTC):
            raise ConfigError(
                str(folder / _CERTIFICATE),
                f"expired on {certificate.not_valid_after_utc:%Y-%m-%d}; renew it with `resplit keys --rotate`",
            )
        is_controller = name == CONTROLLER
        return cls(
            name=name,
            folder=folder,
            command_keys=_read_key_set(folder / _COMMANDS),
            signing_key=_read(folder / _COMMANDS_KEY) if is_controller else None,
            wrap_key=None if is_controller else _read(folder / _WRAP_KEY),
        )

    def public_wrap_key(self, node: str) -> bytes:
        """The public key (PEM) under which the controller wraps shard keys for `node`; ConfigError if unknown."""
        return _read(self.folder / _wrap_name(node))

    def server_context(self) -> ssl.SSLContext:
        """TLS for a listener: only members of this authority get in. Ask `peer_name` which one it is."""
        return self._mutual(ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER))

    def client_context(self) -> ssl.SSLContext:
        """TLS for connecting. The peer must prove the *name* that is given as `server_hostname`.

        The address does not matter, so it works on loopback and behind address translation. With grpclib:
        `Channel(host, port, ssl=member.client_context(), config=Configuration(ssl_target_name_override=name))`.
        """
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.hostname_checks_common_name = False
        return self._mutual(context)

    def _mutual(self, context: ssl.SSLContext) -> ssl.SSLContext:
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        context.verify_mode = ssl.CERT_REQUIRED
        context.verify_flags |= ssl.VerifyFlags.VERIFY_X509_STRICT
        try:
            context.load_cert_chain(self.folder / _CERTIFICATE, self.folder / _KEY)
            context.load_verify_locations(self.folder / _CA)
        except (OSError, ssl.SSLError) as error:
            raise ConfigError(str(self.folder), f"its certificate cannot be used ({error}); issue it again") from None
        context.set_alpn_protocols(["h2"])
        return context


def peer_name(ssl_object: _HasCertificate) -> str:
    """The member at the other end of an established TLS connection; CommandRefusedError if it proved none."""
    return certificate_name(ssl_object.getpeercert())


def certificate_name(certificate: Mapping[str, Any] | None) -> str:
    """The member that a verified certificate names, as `getpeercert()` or grpclib's `stream.peer.cert()` give it."""
    for relative_name in (certificate or {}).get("subject", ()):
        for key, value in relative_name:
            if key == "commonName":
                return str(value)
    raise CommandRefusedError("unauthenticated", "the peer showed no certificate that names a member")


def make_authority(folder: Path) -> None:
    """Create the certificate authority and the command-signing key in `folder/authority`; never overwrites."""
    home = folder / AUTHORITY
    if home.exists():
        raise ConfigError(str(home), "an authority stands here already; rotate its keys, or choose another folder")
    key = Ed25519PrivateKey.generate()
    certificate = _authority_certificate(key)
    signing_key = Ed25519PrivateKey.generate()
    _store(
        home,
        {
            _CA: certificate.public_bytes(serialization.Encoding.PEM),
            _CA_KEY: _private_pem(key),
            _COMMANDS_KEY: _private_pem(signing_key),
            _COMMANDS: _key_set([_public_jwk(signing_key)]),
        },
    )


def issue(folder: Path, name: str, hosts: Sequence[str] = ()) -> None:
    """Give the member `name` its folder `folder/name`, to be copied to its machine; never overwrites.

    `name` is a node or "controller"; `hosts` are further host names and addresses for its certificate.
    """
    if not _NAME.fullmatch(name) or name == AUTHORITY:
        raise ConfigError(str(folder), f"{name!r} cannot name a member: one DNS label, and not {AUTHORITY!r}")
    if (folder / name).exists():
        raise ConfigError(str(folder / name), "this member has its keys already; renew them with `--rotate`")
    _refuse_taken(folder, name, hosts)
    _issue(folder, name, hosts)


def rotate(folder: Path, *, honour_old_s: float = HONOUR_OLD_S) -> None:
    """Renew the command-signing key and every member's key and certificate; the authority stays.

    The old signing key is honoured for `honour_old_s` more seconds, so that members can be given their new
    folders one by one (nodes first, the controller last); with 0 it is dead wherever the new folder has arrived.
    Wrap keys stay: a node that keeps its folder a while longer goes on opening shards.
    """
    home = folder / AUTHORITY
    new, retires_s = Ed25519PrivateKey.generate(), int(time.time() + honour_old_s)
    old = _read_key_set(home / _COMMANDS)[0]
    kept = [{**old, "exp": retires_s}] if honour_old_s > 0 else []
    # The public keys first: killed in between, the controller signs on with the old key, and rotates again.
    _store(home, {_COMMANDS: _key_set([_public_jwk(new), *kept]), _COMMANDS_KEY: _private_pem(new)})
    for name in _members(folder):
        _issue(folder, name, _hosts_in(_certificate_in(folder / name), name))


def keys_command(folder: Path, cluster: Path | Sequence[str], rotate_keys: bool = False) -> None:
    """Make what is missing of the authority, the controller's and the nodes' folders; then renew all if asked.

    `cluster` is a cluster file, or the nodes' names. Repeating it changes nothing.
    """
    names = _cluster_names(cluster) if isinstance(cluster, Path) else list(cluster)
    if CONTROLLER in names:
        raise ConfigError(str(cluster), f"no node can be called {CONTROLLER!r}: that is the controller's own name")
    if not (folder / AUTHORITY).exists():
        make_authority(folder)
    for name in [*names, CONTROLLER]:
        if not (folder / name).exists():
            issue(folder, name)
    if rotate_keys:
        rotate(folder)


def _cluster_names(file: Path) -> list[str]:
    from resplit.config import load_cluster

    return load_cluster(file).node_names


def _issue(folder: Path, name: str, hosts: Sequence[str]) -> None:
    home = folder / AUTHORITY
    files = {_CA: _read(home / _CA), _COMMANDS: _read(home / _COMMANDS), **_identity(home, name, hosts)}
    if name == CONTROLLER:
        wrap_keys = {path.name: _read(path) for path in home.glob(_wrap_name("*"))}
        _store(folder / name, files | wrap_keys | {_COMMANDS_KEY: _read(home / _COMMANDS_KEY)})
        return
    kept = folder / name / _WRAP_KEY
    wrap_key = _read(kept) if kept.exists() else _private_pem(X25519PrivateKey.generate())
    _publish_wrap_key(folder, name, wrap_key)
    _store(folder / name, files | {_WRAP_KEY: wrap_key})


def _publish_wrap_key(folder: Path, name: str, wrap_key: bytes) -> None:
    """Tell the authority, and the controller if it has its folder, under which key to wrap for this node."""
    private = serialization.load_pem_private_key(wrap_key, password=None)
    public = private.public_key().public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    for place in (folder / AUTHORITY, folder / CONTROLLER):
        if place.exists():
            _store(place, {_wrap_name(name): public})


def _identity(home: Path, name: str, hosts: Sequence[str]) -> dict[str, bytes]:
    """A fresh key and its certificate, signed by the authority in `home`."""
    issuer = _certificate_at(home / _CA)
    issuer_key = serialization.load_pem_private_key(_read(home / _CA_KEY), password=None)
    assert isinstance(issuer_key, Ed25519PrivateKey)
    key = Ed25519PrivateKey.generate()
    usages = [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
    certificate = (
        _builder(name, issuer.subject, key, _MEMBER_DAYS)
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(name), *map(_general_name, hosts)]), critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_key_usage(digital_signature=True), critical=True)
        .add_extension(x509.ExtendedKeyUsage(usages), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key.public_key()), critical=False)
        .sign(issuer_key, None)
    )
    return {_CERTIFICATE: certificate.public_bytes(serialization.Encoding.PEM), _KEY: _private_pem(key)}


def _authority_certificate(key: Ed25519PrivateKey) -> x509.Certificate:
    name = "resplit authority"
    return (
        _builder(name, _subject(name), key, _AUTHORITY_DAYS)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_key_usage(key_cert_sign=True), critical=True)
        .sign(key, None)
    )


def _builder(name: str, issuer: x509.Name, key: Ed25519PrivateKey, days: int) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(_subject(name))
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _BACKDATE)
        .not_valid_after(now + timedelta(days=days))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    )


def _subject(name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])


def _key_usage(*, digital_signature: bool = False, key_cert_sign: bool = False) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=digital_signature,
        key_cert_sign=key_cert_sign,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        crl_sign=False,
        encipher_only=False,
        decipher_only=False,
    )


def _general_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        pass
    try:
        return x509.DNSName(host)
    except ValueError as error:
        raise ConfigError("hosts", f"{host!r} is neither an address nor a host name ({error})") from None


def _refuse_taken(folder: Path, name: str, hosts: Sequence[str]) -> None:
    """No certificate may carry another member's name: TLS would take the one for the other."""
    for other in [CONTROLLER, *_members(folder)]:
        if other == name:
            continue
        if other in hosts:
            raise ConfigError(str(folder), f"host {other!r} of {name!r} is the name of another member")
        if (folder / other).exists() and name in _hosts_in(_certificate_in(folder / other), other):
            raise ConfigError(str(folder), f"{name!r} is already a host of {other!r}; choose another name")


def _members(folder: Path) -> list[str]:
    return sorted(path.parent.name for path in folder.glob(f"[!.]*/{_CERTIFICATE}"))


def _hosts_in(certificate: x509.Certificate, name: str) -> list[str]:
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    return [str(entry.value) for entry in names if entry.value != name]


def _common_name(certificate: x509.Certificate) -> str:
    return str(certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)[0].value)


def _certificate_in(folder: Path) -> x509.Certificate:
    return _certificate_at(folder / _CERTIFICATE)


def _certificate_at(path: Path) -> x509.Certificate:
    try:
        return x509.load_pem_x509_certificate(_read(path))
    except ValueError as error:
        raise ConfigError(str(path), f"is not a certificate ({error})") from None


def _wrap_name(node: str) -> str:
    return f"wrap-{node}.pub"


def _private_pem(key: Ed25519PrivateKey | X25519PrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def _public_jwk(key: Ed25519PrivateKey) -> dict[str, Any]:
    public = OKPKey.import_key(key.public_key())
    return {**public.as_dict(private=False), "kid": public.thumbprint()}


def _key_set(keys: list[dict[str, Any]]) -> bytes:
    return json.dumps({"keys": keys}, indent=1).encode()


def _read_key_set(path: Path) -> tuple[dict[str, Any], ...]:
    try:
        newest, *older = json.loads(_read(path))["keys"]
    except (ValueError, KeyError, TypeError):
        raise ConfigError(str(path), "is not a set of public keys; copy the member's folder again") from None
    return (newest, *older)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(str(path), f"cannot be read ({error.strerror}); `resplit keys` makes it") from None


def _store(folder: Path, files: Mapping[str, bytes]) -> None:
    """Create a folder whole or not at all; of one that exists, replace these files one by one."""
    new = folder.with_name(f".{folder.name}.new")
    try:
        if folder.exists():
            for name, content in files.items():
                write_atomically(folder / name, content, _OWNER_ONLY)
            return
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir(mode=0o700, parents=True)
        for name, content in files.items():
            write_atomically(new / name, content, _OWNER_ONLY)
        new.rename(folder)
    except OSError as error:
        shutil.rmtree(new, ignore_errors=True)
        raise ConfigError(str(folder), f"cannot be written ({error.strerror})") from None
