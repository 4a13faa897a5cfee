"""The authority: the folders that `resplit keys` writes, their renewal, and what it refuses."""

from __future__ import annotations

import ipaddress
import stat
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.x509.oid import ExtendedKeyUsageOID

from resplit.errors import CommandRefusedError, ConfigError
from resplit.security.authority import HONOUR_OLD_S, issue, keys_command, make_authority, rotate
from resplit.security.identity import Member
from resplit.security.signing import CommandSigner, CommandVerifier, audience_of
from tests.support.tls_echo import echo_server, say


def test_only_their_owner_can_read_key_files(ours: Path) -> None:
    files = [path for path in ours.rglob("*") if path.is_file()]
    assert len(files) > 15
    assert {stat.S_IMODE(path.stat().st_mode) for path in files} == {0o600}
    assert {stat.S_IMODE(path.stat().st_mode) for path in ours.iterdir()} == {0o700}


def test_a_folder_contains_only_what_its_member_needs(ours: Path) -> None:
    common = {"ca.pem", "cert.pem", "key.pem", "commands.jwks"}
    wrap_keys = {"wrap-node-a.pub", "wrap-node-b.pub"}
    assert {path.name for path in (ours / "node-a").iterdir()} == common | {"wrap.key"}
    assert {path.name for path in (ours / "controller").iterdir()} == common | wrap_keys | {"commands.key"}
    assert "PRIVATE" not in (ours / "node-a" / "commands.jwks").read_text()


def _extensions(path: Path) -> dict[type[x509.ExtensionType], tuple[bool, x509.ExtensionType]]:
    """The extensions of a certificate: by type, whether it is critical, and its value."""
    certificate = x509.load_pem_x509_certificate(path.read_bytes())
    return {type(each.value): (each.critical, each.value) for each in certificate.extensions}


def _key_usage(**used: bool) -> x509.KeyUsage:
    unused = (
        "digital_signature", "content_commitment", "key_encipherment", "data_encipherment", "key_agreement",
        "key_cert_sign", "crl_sign", "encipher_only", "decipher_only",
    )  # fmt: skip
    return x509.KeyUsage(**(dict.fromkeys(unused, False) | used))


def test_the_authority_signs_certificates_of_members_and_nothing_else(ours: Path) -> None:
    found = _extensions(ours / "authority" / "ca.pem")
    assert found.keys() == {x509.SubjectKeyIdentifier, x509.BasicConstraints, x509.KeyUsage}
    assert found[x509.BasicConstraints] == (True, x509.BasicConstraints(ca=True, path_length=0))
    assert found[x509.KeyUsage] == (True, _key_usage(key_cert_sign=True))
    assert not found[x509.SubjectKeyIdentifier][0]


def test_a_member_signs_no_certificates_and_speaks_for_its_own_hosts_only(tmp_path: Path) -> None:
    make_authority(tmp_path)
    issue(tmp_path, "node-a", ["10.0.0.7", "nas.home"])
    found = _extensions(tmp_path / "node-a" / "cert.pem")
    address = x509.IPAddress(ipaddress.ip_address("10.0.0.7"))
    names = x509.SubjectAlternativeName([x509.DNSName("node-a"), address, x509.DNSName("nas.home")])
    both = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH])
    authority = _extensions(tmp_path / "authority" / "ca.pem")[x509.SubjectKeyIdentifier][1]
    del found[x509.SubjectKeyIdentifier]
    assert found == {
        x509.SubjectAlternativeName: (False, names),
        x509.BasicConstraints: (True, x509.BasicConstraints(ca=False, path_length=None)),
        x509.KeyUsage: (True, _key_usage(digital_signature=True)),
        x509.ExtendedKeyUsage: (False, both),
        x509.AuthorityKeyIdentifier: (False, x509.AuthorityKeyIdentifier(authority.digest, None, None)),
    }


def test_an_authority_and_a_member_are_never_overwritten(ours: Path) -> None:
    before = _contents(ours)
    with pytest.raises(ConfigError, match="already"):
        make_authority(ours)
    with pytest.raises(ConfigError, match="already"):
        issue(ours, "node-a", [])
    keys_command(ours, ["node-a", "node-b"])
    assert _contents(ours) == before


def test_what_an_interrupted_issue_left_behind_is_not_in_the_way(tmp_path: Path) -> None:
    make_authority(tmp_path)
    (tmp_path / ".node-a.new").mkdir()
    (tmp_path / ".node-a.new" / "half-written").write_bytes(b"x")
    issue(tmp_path, "node-a")
    assert not (tmp_path / "node-a" / "half-written").exists()
    assert not (tmp_path / ".node-a.new").exists()
    assert Member.load(tmp_path / "node-a").name == "node-a"


def test_the_controller_gets_the_wrap_key_of_a_node_added_later(tmp_path: Path) -> None:
    keys_command(tmp_path, ["node-a"])
    keys_command(tmp_path, ["node-a", "node-b"])
    assert b"PUBLIC KEY" in Member.load(tmp_path / "controller").public_wrap_key("node-b")
    with pytest.raises(ConfigError, match="node-c"):
        Member.load(tmp_path / "controller").public_wrap_key("node-c")


@pytest.mark.parametrize("name", ["", "authority", "Node", "a.b", "../up", "-a", "a" * 64])
def test_a_name_that_is_not_a_dns_label_is_refused(ours: Path, name: str) -> None:
    with pytest.raises(ConfigError, match="cannot name a member"):
        issue(ours, name, [])


def test_no_node_can_be_called_controller(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="controller"):
        keys_command(tmp_path, ["controller", "node-a"])


def test_a_host_cannot_be_the_name_of_another_member(tmp_path: Path) -> None:
    make_authority(tmp_path)
    issue(tmp_path, "node-a", ["10.0.0.7", "nas.home", "::1"])
    with pytest.raises(ConfigError, match="another member"):
        issue(tmp_path, "node-b", ["node-a"])
    with pytest.raises(ConfigError, match="another member"):
        issue(tmp_path, "node-b", ["controller"])
    issue(tmp_path, "node-c", ["node-d"])
    with pytest.raises(ConfigError, match="already a host"):
        issue(tmp_path, "node-d", [])


def test_a_host_that_is_neither_address_nor_name_is_refused(tmp_path: Path) -> None:
    make_authority(tmp_path)
    with pytest.raises(ConfigError, match="hôst"):
        issue(tmp_path, "node-a", ["hôst"])
    assert not (tmp_path / "node-a").exists()


def test_keys_are_made_for_all_members_of_a_cluster_file(tmp_path: Path) -> None:
    (tmp_path / "cluster.yaml").write_text(
        "name: two\nsource: n1\nkv_tokens: 64\ntrusted: [n1]\n"
        "nodes: [{name: n1, memory: 1 GiB}, {name: n2, memory: 1 GiB}]\n"
        "classes: [{name: chat, rate_rps: 1, prompt_tokens: 8, new_tokens: 8}]\n"
    )
    keys_command(tmp_path / "keys", tmp_path / "cluster.yaml")
    members = {Member.load(tmp_path / "keys" / name).name for name in ("n1", "n2", "controller")}
    assert members == {"n1", "n2", "controller"}


async def test_rotation_renews_certificates_and_keeps_hosts_and_wrap_keys(tmp_path: Path) -> None:
    make_authority(tmp_path)
    issue(tmp_path, "node-a", ["10.0.0.7", "nas.home"])
    issue(tmp_path, "node-b", [])
    issue(tmp_path, "controller", [])
    before, old = _contents(tmp_path), Member.load(tmp_path / "node-b").client_context()
    rotate(tmp_path)
    after = _contents(tmp_path)
    changed = {path for path in before if after[path] != before[path]}
    renewed = {f"{member}/{file}" for member in ("node-a", "node-b", "controller") for file in ("cert.pem", "key.pem")}
    commands = {f"{member}/commands.jwks" for member in ("authority", "node-a", "node-b", "controller")}
    assert after.keys() == before.keys()
    assert changed == renewed | commands | {"authority/commands.key", "controller/commands.key"}
    names = x509.load_pem_x509_certificate(after["node-a/cert.pem"]).extensions
    hosts = names.get_extension_for_class(x509.SubjectAlternativeName).value
    assert [str(host.value) for host in hosts] == ["node-a", "10.0.0.7", "nas.home"]
    async with echo_server(Member.load(tmp_path / "node-a"), []) as port:
        assert await say(port, old, "node-a") == b"hello\n"  # node-b still has its old folder


def test_an_old_signing_key_is_accepted_until_it_expires(tmp_path: Path) -> None:
    keys_command(tmp_path, ["node-a"])
    old_signer = CommandSigner(Member.load(tmp_path / "controller"))
    old_node = CommandVerifier(Member.load(tmp_path / "node-a"))
    keys_command(tmp_path, ["node-a"], rotate_keys=True)
    new_signer = CommandSigner(Member.load(tmp_path / "controller"))
    node = Member.load(tmp_path / "node-a")
    retires_s = node.command_keys[1]["exp"]

    def verify(verifier: CommandVerifier, signer: CommandSigner) -> str:
        audience = audience_of("node-a", verifier.nonce)
        return verifier.verify(signer.sign("ping", {}, audience=audience, epoch=0), kind="ping", current_epoch=0).kind

    assert verify(CommandVerifier(node), old_signer) == verify(CommandVerifier(node), new_signer) == "ping"
    assert retires_s == pytest.approx(time.time() + HONOUR_OLD_S, abs=60)
    with pytest.raises(CommandRefusedError, match="authority"):
        verify(old_node, new_signer)
    old_signer._clock = lambda: retires_s
    assert verify(CommandVerifier(node, lambda: retires_s), old_signer) == "ping"
    old_signer._clock = new_signer._clock = lambda: retires_s + 2.0
    later = CommandVerifier(node, lambda: retires_s + 2.0)
    assert verify(later, new_signer) == "ping"
    with pytest.raises(CommandRefusedError, match="authority"):
        verify(later, old_signer)


def test_an_old_signing_key_can_be_dropped_at_once(tmp_path: Path) -> None:
    keys_command(tmp_path, ["node-a"])
    old = Member.load(tmp_path / "node-a").command_keys
    rotate(tmp_path, honour_old_s=0)
    new = Member.load(tmp_path / "node-a").command_keys
    assert (len(old), len(new)) == (1, 1)
    assert old != new


def test_a_full_disk_leaves_the_keys_as_they_were(
    tmp_path: Path, full_disk: Callable[[int], AbstractContextManager[None]]
) -> None:
    with full_disk(50), pytest.raises(ConfigError, match="cannot be written"):
        keys_command(tmp_path, ["node-a"])
    assert list(tmp_path.iterdir()) == []
    keys_command(tmp_path, ["node-a"])
    before = _contents(tmp_path)
    with full_disk(50), pytest.raises(ConfigError, match="cannot be written"):
        rotate(tmp_path)
    assert _contents(tmp_path) == before


def _contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
