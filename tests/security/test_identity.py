"""Connections between members, and the contents of a member's folder."""

from __future__ import annotations

import asyncio
import datetime
import ssl
from pathlib import Path

import pytest
from google.protobuf.wrappers_pb2 import StringValue
from grpclib.client import Channel, UnaryUnaryMethod
from grpclib.config import Configuration
from grpclib.const import Cardinality, Handler
from grpclib.server import Server

from resplit.errors import CommandRefusedError, ConfigError, ShardError
from resplit.security.authority import keys_command
from resplit.security.identity import Member, certificate_name
from resplit.shards.keyring import Keyring, KeyringEntry
from resplit.shards.registry import Registry
from resplit.shards.sealing import new_key, open_shard, seal, unwrap_key, wrap_key
from tests.support.tls_echo import echo_server, say

REFUSED = (ssl.SSLError, ConnectionError)


async def test_members_connect_on_loopback_and_see_the_names_of_their_callers(ours: Path) -> None:
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


async def test_a_member_cannot_impersonate_another(ours: Path) -> None:
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


def test_a_node_can_open_its_own_blocks_only(ours: Path, tmp_path: Path) -> None:
    registry, keyring = Registry(str(tmp_path / "shards")), Keyring(tmp_path / "keyring.json")
    controller, nodes = Member.load(ours / "controller"), [Member.load(ours / name) for name in ("node-a", "node-b")]
    for host in nodes:
        data_key = new_key()
        sealed = seal(host.name.encode(), data_key)
        entry = keyring.add(host.name, KeyringEntry(registry.put(sealed), len(sealed), data_key, ""))
        public = controller.public_wrap_key(host.name)
        wrapped = wrap_key(entry.key, public, node=host.name, shard=entry.shard)
        for node in nodes:
            if node == host:
                key = unwrap_key(wrapped, node.wrap_key, node=node.name, shard=entry.shard)
                assert open_shard(registry.get(entry.shard, entry.sealed_bytes), key) == host.name.encode()
            else:
                with pytest.raises(ShardError, match="is not for"):
                    unwrap_key(wrapped, node.wrap_key, node=node.name, shard=entry.shard)


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


@pytest.mark.parametrize(
    ("member", "file"), [("node-a", "key.pem"), ("node-a", "wrap.key"), ("controller", "commands.key")]
)
def test_a_private_key_that_others_may_read_is_refused(ours: Path, member: str, file: str) -> None:
    path = ours / member / file
    Member.load(ours / member)
    path.chmod(0o640)
    try:
        with pytest.raises(ConfigError, match=rf"{file}: other users .* \(mode 0640\).*chmod go="):
            Member.load(ours / member)
    finally:
        path.chmod(0o600)
