"""Certificates and keys: who can connect to whom, and what `resplit keys` writes."""

from __future__ import annotations

import asyncio
import datetime
import ssl
import stat
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractContextManager, asynccontextmanager
from pathlib import Path

import pytest
from cryptography import x509
from google.protobuf.wrappers_pb2 import StringValue
from grpclib.client import Channel, UnaryUnaryMethod
from grpclib.config import Configuration
from grpclib.const import Cardinality, Handler
from grpclib.server import Server

from resplit.errors import CommandRefusedError, ConfigError, ShardError
from resplit.security.authority import HONOUR_OLD_S, issue, keys_command, make_authority, rotate
from resplit.security.identity import Member, certificate_name, peer_name
from resplit.security.signing import CommandSigner, CommandVerifier
from resplit.shards.keyring import Keyring
from resplit.shards.registry import Registry
from resplit.shards.sealing import new_key, open_shard, seal, unwrap_key, wrap_key


@asynccontextmanager
async def echo_server(member: Member, callers: list[str]) -> AsyncIterator[int]:
    """A TLS server that records each caller's name and returns one line; yields its port."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        callers.append(peer_name(writer.get_extra_info("ssl_object")))
        writer.write(await reader.readline())
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=member.server_context())
    async with server:
        yield server.sockets[0].getsockname()[1]


async def say(port: int, context: ssl.SSLContext, to: str) -> bytes:
    """Send one line and read it back; a refused client gets an ssl.SSLError or a closed connection."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port, ssl=context, server_hostname=to)
    try:
        writer.write(b"hello\n")
        await writer.drain()
        answer = await reader.read()
    finally:
        writer.close()
    if not answer:
        raise ConnectionResetError("closed without an answer")
    return answer


REFUSED = (ssl.SSLError, ConnectionError)


async def test_members_connect_on_loopback_and_learn_each_others_name(ours: Path) -> None:
    callers: list[str] = []
    async with echo_server(Member.load(ours / "node-a"), callers) as port:
        assert await say(port, Member.load(ours / "node-b").client_context(), "node-a") == b"hello\n"
        assert await say(port, Member.load(ours / "controller").client_context(), "node-a") == b"hello\n"
    assert callers == ["node-b", "controller"]


async def test_tls_1_2_is_refused_by_server_and_by_client(ours: Path) -> None:
    old = Member.load(ours / "node-b").client_context()
    old.minimum_version = ssl.TLSVersion.TLSv1_2
    old.maximum_version = ssl.TLSVersion.TLSv1_2
    callers: list[str] = []
    async with echo_server(Member.load(ours / "node-a"), callers) as port:
        with pytest.raises(REFUSED):
            await say(port, old, "node-a")
    assert callers == []

    server_context = Member.load(ours / "node-a").server_context()
    server_context.minimum_version = ssl.TLSVersion.TLSv1_2
    server_context.maximum_version = ssl.TLSVersion.TLSv1_2
    server = await asyncio.start_server(lambda reader, writer: None, "127.0.0.1", 0, ssl=server_context)
    async with server:
        with pytest.raises(REFUSED):
            await say(server.sockets[0].getsockname()[1], Member.load(ours / "node-b").client_context(), "node-a")


async def test_a_client_without_a_certificate_is_refused(ours: Path) -> None:
    nameless = ssl.create_default_context(cafile=str(ours / "node-b" / "ca.pem"))
    callers: list[str] = []
    async with echo_server(Member.load(ours / "node-a"), callers) as port:
        with pytest.raises(REFUSED):
            await say(port, nameless, "node-a")
    assert callers == []


async def test_a_certificate_of_another_authority_is_refused_on_both_sides(ours: Path, theirs: Path) -> None:
    callers: list[str] = []
    stranger = Member.load(theirs / "node-b").client_context()
    async with echo_server(Member.load(ours / "node-a"), callers) as port:
        with pytest.raises(ssl.SSLCertVerificationError):
            await say(port, stranger, "node-a")
        stranger.load_verify_locations(ours / "node-a" / "ca.pem")  # now only the server can refuse
        with pytest.raises(REFUSED):
            await say(port, stranger, "node-a")
    assert callers == []


async def test_a_member_cannot_pose_as_another(ours: Path) -> None:
    callers: list[str] = []
    async with echo_server(Member.load(ours / "node-a"), callers) as port:
        with pytest.raises(ssl.SSLCertVerificationError, match="node-b"):
            await say(port, Member.load(ours / "controller").client_context(), "node-b")
        with pytest.raises(ssl.SSLCertVerificationError):
            await say(port, Member.load(ours / "controller").client_context(), "127.0.0.1")
    assert callers == []


class Greeter:
    """A grpclib service that answers with the caller's name."""

    async def greet(self, stream) -> None:
        await stream.recv_message()
        await stream.send_message(StringValue(value=certificate_name(stream.peer.cert())))

    def __mapping__(self) -> dict[str, Handler]:
        return {"/test.Greeter/Greet": Handler(self.greet, Cardinality.UNARY_UNARY, StringValue, StringValue)}


async def test_grpclib_works_with_these_contexts(ours: Path) -> None:
    server = Server([Greeter()])
    await server.start("127.0.0.1", 0, ssl=Member.load(ours / "node-a").server_context())
    port = server._server.sockets[0].getsockname()[1]
    context = Member.load(ours / "node-b").client_context()
    channel = Channel("127.0.0.1", port, ssl=context, config=Configuration(ssl_target_name_override="node-a"))
    try:
        answer = await UnaryUnaryMethod(channel, "/test.Greeter/Greet", StringValue, StringValue)(StringValue())
        assert answer.value == "node-b"
        tls = channel._protocol.connection._transport.get_extra_info("ssl_object")
        assert (tls.version(), tls.selected_alpn_protocol()) == ("TLSv1.3", "h2")
    finally:
        channel.close()
        server.close()
        await server.wait_closed()


async def test_captured_traffic_shows_tls_only(ours: Path) -> None:
    captured = bytearray()

    async def copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(65536):
            captured.extend(data)
            writer.write(data)
        writer.close()

    async def relay(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        back, forth = await asyncio.open_connection("127.0.0.1", port)
        await asyncio.gather(copy(reader, forth), copy(back, writer))

    async with echo_server(Member.load(ours / "node-a"), []) as port:
        tap = await asyncio.start_server(relay, "127.0.0.1", 0)
        async with tap:
            context = Member.load(ours / "node-b").client_context()
            assert await say(tap.sockets[0].getsockname()[1], context, "node-a") == b"hello\n"
    assert captured.startswith(b"\x16\x03")  # a TLS handshake record
    assert b"hello" not in captured
    assert b"node-b" not in captured  # in TLS 1.3 even certificates are encrypted


def test_a_peer_without_a_certificate_has_no_name() -> None:
    with pytest.raises(CommandRefusedError) as refusal:
        certificate_name(None)
    assert refusal.value.reason == "unauthenticated"


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


def test_an_authority_and_a_member_are_never_overwritten(ours: Path) -> None:
    before = _contents(ours)
    with pytest.raises(ConfigError, match="already"):
        make_authority(ours)
    with pytest.raises(ConfigError, match="already"):
        issue(ours, "node-a", [])
    keys_command(ours, ["node-a", "node-b"])
    assert _contents(ours) == before


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


def test_a_node_can_open_its_own_blocks_only(ours: Path, tmp_path: Path) -> None:
    registry, keyring = Registry(str(tmp_path / "shards")), Keyring(tmp_path / "keyring.json")
    controller, nodes = Member.load(ours / "controller"), [Member.load(ours / name) for name in ("node-a", "node-b")]
    for host in nodes:
        data_key = new_key()
        entry = keyring.add(host.name, "", registry.put(seal(host.name.encode(), data_key)), data_key)
        public = controller.public_wrap_key(host.name)
        wrapped = wrap_key(entry.key, public, node=host.name, shard=entry.shard)
        for node in nodes:
            if node == host:
                key = unwrap_key(wrapped, node.wrap_key, node=node.name, shard=entry.shard)
                assert open_shard(registry.get(entry.shard), key) == host.name.encode()
            else:
                with pytest.raises(ShardError, match="is not for"):
                    unwrap_key(wrapped, node.wrap_key, node=node.name, shard=entry.shard)


def test_an_old_signing_key_is_accepted_until_it_expires(tmp_path: Path) -> None:
    keys_command(tmp_path, ["node-a"])
    old_signer = CommandSigner(Member.load(tmp_path / "controller"))
    old_node = CommandVerifier(Member.load(tmp_path / "node-a"))
    keys_command(tmp_path, ["node-a"], rotate_keys=True)
    new_signer = CommandSigner(Member.load(tmp_path / "controller"))
    node = Member.load(tmp_path / "node-a")
    retires_s = node.command_keys[1]["exp"]

    def verify(verifier: CommandVerifier, signer: CommandSigner) -> str:
        return verifier.verify(signer.sign("ping", {}, audience="node-a", epoch=0), kind="ping", current_epoch=0).kind

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


def test_an_error_names_the_missing_or_broken_file_of_a_member(tmp_path: Path) -> None:
    keys_command(tmp_path, ["node-a"])
    with pytest.raises(ConfigError, match=r"nowhere/cert\.pem"):
        Member.load(tmp_path / "nowhere")
    (tmp_path / "node-a" / "commands.jwks").write_text("[]")
    with pytest.raises(ConfigError, match=r"commands\.jwks"):
        Member.load(tmp_path / "node-a")
    (tmp_path / "node-a" / "cert.pem").write_text("no certificate")
    with pytest.raises(ConfigError, match=r"cert\.pem.*not a certificate"):
        Member.load(tmp_path / "node-a")


def test_an_expired_certificate_says_how_to_renew_it(ours: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class InTwoYears(datetime.datetime):
        @classmethod
        def now(cls, tz: datetime.tzinfo | None = None) -> datetime.datetime:
            return datetime.datetime.now(tz) + datetime.timedelta(days=730)

    monkeypatch.setattr("resplit.security.identity.datetime", InTwoYears)
    with pytest.raises(ConfigError, match="--rotate"):
        Member.load(ours / "node-a")


def _contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
