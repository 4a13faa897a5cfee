"""The certificate authority: issues and renews every member's certificate and keys (`resplit keys`)."""

from __future__ import annotations

import ipaddress
import re
import time
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Literal

from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from joserfc.jwk import OKPKey

from resplit.errors import ConfigError
from resplit.security.identity import CONTROLLER
from resplit.security.key_files import (
    CA,
    CA_KEY,
    CERTIFICATE,
    COMMANDS,
    COMMANDS_KEY,
    KEY,
    WRAP_KEY,
    PublicJwk,
    key_set,
    public_wrap_key_name,
    read,
    read_certificate,
    read_key_set,
    read_private,
    store,
)

AUTHORITY = "authority"
HONOUR_OLD_S = 86_400.0  # for so long members accept the signing key before the last rotation
_AUTHORITY_DAYS = 3650
_MEMBER_DAYS = 365
_KEY_USES = (
    "digital_signature",
    "content_commitment",
    "key_encipherment",
    "data_encipherment",
    "key_agreement",
    "key_cert_sign",
    "crl_sign",
    "encipher_only",
    "decipher_only",
)
_BACKDATE = timedelta(hours=1)  # a member whose clock is behind still accepts a fresh certificate
_NAME = re.compile(r"[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?")  # one DNS label, because TLS checks it as a host name


def make_authority(folder: Path) -> None:
    """Create the certificate authority and the command-signing key in `folder/authority`.

    ConfigError if there already is an authority: it is never overwritten.
    """
    home = folder / AUTHORITY
    if home.exists():
        raise ConfigError(str(home), "there already is an authority; rotate its keys or choose another folder")
    key = Ed25519PrivateKey.generate()
    certificate = _authority_certificate(key)
    signing_key = Ed25519PrivateKey.generate()
    store(
        home,
        {
            CA: certificate.public_bytes(serialization.Encoding.PEM),
            CA_KEY: _private_pem(key),
            COMMANDS_KEY: _private_pem(signing_key),
            COMMANDS: key_set([_public_jwk(signing_key)]),
        },
    )


def issue(folder: Path, name: str, hosts: Sequence[str] = ()) -> None:
    """Create the folder `folder/name` with the keys and the certificate of one member, to be copied to its machine.

    `name` is the name of a node, or "controller". `hosts` are additional host names and addresses in the certificate.
    ConfigError if the name cannot be used, is taken, or already has a folder.
    """
    if not _NAME.fullmatch(name) or name == AUTHORITY:
        raise ConfigError(
            str(folder), f"{name!r} cannot name a member: it must be one DNS label other than {AUTHORITY!r}"
        )
    if (folder / name).exists():
        raise ConfigError(str(folder / name), "this member already has keys; renew them with `--rotate`")
    _refuse_taken(folder, name, hosts)
    _issue(folder, name, hosts)


def rotate(folder: Path, *, honour_old_s: float = HONOUR_OLD_S) -> None:
    """Renew the command-signing key, and the key and certificate of every member. The authority's own key stays.

    Members accept the old signing key for `honour_old_s` more seconds, so that their new folders can be copied one
    after another (nodes first, the controller last). With 0 a member rejects the old key as soon as it has its new
    folder. Wrap keys stay, so that a node with an old folder can still open shards.
    """
    home = folder / AUTHORITY
    new, retires_s = Ed25519PrivateKey.generate(), int(time.time() + honour_old_s)
    old = read_key_set(home / COMMANDS)[0]
    kept: list[PublicJwk] = [{**old, "exp": retires_s}] if honour_old_s > 0 else []
    # The public keys are written first. A process that is killed in between leaves a controller that signs with the
    # old key, which members still accept; the operator then rotates again.
    store(home, {COMMANDS: key_set([_public_jwk(new), *kept]), COMMANDS_KEY: _private_pem(new)})
    for name in _members(folder):
        _issue(folder, name, _hosts_in(read_certificate(folder / name / CERTIFICATE), name))


def keys_command(folder: Path, cluster: Path | Sequence[str], rotate_keys: bool = False) -> None:
    """Create the folders of the authority, the controller and the nodes that do not exist yet.

    `cluster` is a cluster file, or the names of the nodes. A second call changes nothing, unless `rotate_keys` renews
    all keys. ConfigError if a node is called like the controller or has a name that cannot be used.
    """
    names = _cluster_names(cluster) if isinstance(cluster, Path) else list(cluster)
    if CONTROLLER in names:
        raise ConfigError(str(cluster), f"no node can be called {CONTROLLER!r}, the name of the controller")
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
    files = {CA: read(home / CA), COMMANDS: read(home / COMMANDS), **_identity(home, name, hosts)}
    if name == CONTROLLER:
        wrap_keys = {path.name: read(path) for path in home.glob(public_wrap_key_name("*"))}
        store(folder / name, files | wrap_keys | {COMMANDS_KEY: read_private(home / COMMANDS_KEY)})
        return
    kept = folder / name / WRAP_KEY
    wrap_key = read_private(kept) if kept.exists() else _private_pem(X25519PrivateKey.generate())
    _publish_wrap_key(folder, name, wrap_key)
    store(folder / name, files | {WRAP_KEY: wrap_key})


def _publish_wrap_key(folder: Path, name: str, wrap_key: bytes) -> None:
    """Store a node's public wrap key with the authority, and with the controller if its folder exists."""
    private = serialization.load_pem_private_key(wrap_key, password=None)
    public = private.public_key().public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    for place in (folder / AUTHORITY, folder / CONTROLLER):
        if place.exists():
            store(place, {public_wrap_key_name(name): public})


def _identity(home: Path, name: str, hosts: Sequence[str]) -> dict[str, bytes]:
    """A new key and its certificate, signed by the authority in `home`: file name -> content."""
    issuer = read_certificate(home / CA)
    issuer_key = serialization.load_pem_private_key(read_private(home / CA_KEY), password=None)
    assert isinstance(issuer_key, Ed25519PrivateKey)
    key = Ed25519PrivateKey.generate()
    usages = [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
    certificate = (
        _builder(name, issuer.subject, key, _MEMBER_DAYS)
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(name), *map(_general_name, hosts)]), critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_key_usage("digital_signature"), critical=True)
        .add_extension(x509.ExtendedKeyUsage(usages), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key.public_key()), critical=False)
        .sign(issuer_key, None)
    )
    return {CERTIFICATE: certificate.public_bytes(serialization.Encoding.PEM), KEY: _private_pem(key)}


def _authority_certificate(key: Ed25519PrivateKey) -> x509.Certificate:
    name = "resplit authority"
    return (
        _builder(name, _subject(name), key, _AUTHORITY_DAYS)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_key_usage("key_cert_sign"), critical=True)
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


def _key_usage(use: Literal["digital_signature", "key_cert_sign"]) -> x509.KeyUsage:
    """A key for one use only."""
    return x509.KeyUsage(**{each: each == use for each in _KEY_USES})


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
    """Refuse a certificate that contains another member's name: with it, one member could pose as the other."""
    for other in [CONTROLLER, *_members(folder)]:
        if other == name:
            continue
        if other in hosts:
            raise ConfigError(str(folder), f"host {other!r} of {name!r} is the name of another member")
        if (folder / other).exists() and name in _hosts_in(read_certificate(folder / other / CERTIFICATE), other):
            raise ConfigError(str(folder), f"{name!r} is already a host of {other!r}; choose another name")


def _members(folder: Path) -> list[str]:
    return sorted(path.parent.name for path in folder.glob(f"[!.]*/{CERTIFICATE}"))


def _hosts_in(certificate: x509.Certificate, name: str) -> list[str]:
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    return [str(entry.value) for entry in names if entry.value != name]


def _private_pem(key: Ed25519PrivateKey | X25519PrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def _public_jwk(key: Ed25519PrivateKey) -> PublicJwk:
    public = OKPKey.import_key(key.public_key())
    parts = public.as_dict(private=False)
    return PublicJwk(kty=parts["kty"], crv=parts["crv"], x=parts["x"], kid=public.thumbprint())
