"""Signed commands: the commands that a member obeys, and the reason of each refusal."""

from __future__ import annotations

import base64
import json
import time
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from joserfc import jws
from joserfc.jwk import OctKey, OKPKey

from resplit.errors import CommandRefusedError, ConfigError
from resplit.security import signing
from resplit.security.identity import Member
from resplit.security.signing import (
    CLOCK_SKEW_S,
    MAX_LIFETIME_S,
    MAX_TOKEN_CHARS,
    REASONS,
    CommandSigner,
    CommandVerifier,
    audience_of,
)
from tests.support.properties import examples

NONCE = "5" * 32
HERE = audience_of("node-a", NONCE)


class Clock:
    """A clock that the test sets."""

    def __init__(self) -> None:
        self.now = 1_800_000_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def signer(ours: Path, clock: Clock) -> CommandSigner:
    return CommandSigner(Member.load(ours / "controller"), clock)


@pytest.fixture
def verifier(ours: Path, clock: Clock) -> CommandVerifier:
    return CommandVerifier(Member.load(ours / "node-a"), clock, NONCE)


def prepare(signer: CommandSigner, epoch: int = 7, **more: object) -> str:
    return signer.sign("prepare", {"blocks": ["layer.0"]}, **{"audience": HERE, "epoch": epoch} | more)


def assert_refused(
    verifier: CommandVerifier, token: str, reason: str, kind: str = "prepare", epoch: int = 0, says: str = ""
) -> None:
    before = verifier.refusals[reason]
    with pytest.raises(CommandRefusedError) as refusal:
        verifier.verify(token, kind=kind, current_epoch=epoch)
    assert refusal.value.reason == reason
    assert says in str(refusal.value)
    assert reason in REASONS
    assert verifier.refusals[reason] == before + 1


def resign(signer: CommandSigner, token: str, **changed: object) -> str:
    """The same command with other claims, signed by the controller itself."""
    claims = json.loads(_decoded(token.split(".")[1])) | changed
    return jws.serialize_compact(signer._header, json.dumps(claims), signer._key, algorithms=["Ed25519"])


def _decoded(segment: str) -> bytes:
    return base64.urlsafe_b64decode(segment + "=" * (-len(segment) % 4))


def _encoded(content: bytes) -> str:
    return base64.urlsafe_b64encode(content).rstrip(b"=").decode()


def test_a_verified_command_is_the_one_that_was_signed(
    signer: CommandSigner, verifier: CommandVerifier, clock: Clock
) -> None:
    command = verifier.verify(prepare(signer), kind="prepare", current_epoch=6)
    assert (command.kind, command.epoch, command.body) == ("prepare", 7, {"blocks": ["layer.0"]})
    assert (command.issuer, command.audience) == ("controller", HERE)
    assert (command.issued_s, command.expires_s) == (clock.now, clock.now + 30)
    assert not verifier.refusals


def test_a_command_has_no_characters_to_spare(signer: CommandSigner) -> None:
    payload = _decoded(prepare(signer).split(".")[1]).decode()
    assert payload == json.dumps(json.loads(payload), separators=(",", ":"))


def test_only_the_controller_can_sign(ours: Path) -> None:
    with pytest.raises(ConfigError, match="only the controller"):
        CommandSigner(Member.load(ours / "node-a"))


def test_an_unsigned_command_is_refused(signer: CommandSigner, verifier: CommandVerifier) -> None:
    header, payload, signature = prepare(signer).split(".")
    nothing = _encoded(json.dumps({"alg": "none", "kid": signer._header["kid"]}).encode())
    assert_refused(verifier, f"{header}.{payload}.", "unsigned")
    assert_refused(verifier, f"{nothing}.{payload}.", "unsigned")
    assert_refused(verifier, f"{nothing}.{payload}.{signature}", "unsigned")


@pytest.mark.parametrize("identity", [["kid"], {"kid": "kid"}, 7, None])
def test_a_key_that_is_not_named_by_a_text_is_refused(
    signer: CommandSigner, verifier: CommandVerifier, identity: object
) -> None:
    _, payload, signature = prepare(signer).split(".")
    header = _encoded(json.dumps({"alg": "Ed25519", "kid": identity}).encode())
    with pytest.raises(CommandRefusedError, match=r"node-a does not accept its key|its header cannot be read"):
        verifier.verify(f"{header}.{payload}.{signature}", kind="prepare", current_epoch=0)


@pytest.mark.parametrize("lifetime_s", [0.0, -1.0, MAX_LIFETIME_S + 1e-6])
def test_a_command_that_no_member_would_obey_is_not_signed(signer: CommandSigner, lifetime_s: float) -> None:
    with pytest.raises(ValueError, match="no verifier accepts it"):
        prepare(signer, lifetime_s=lifetime_s)


@pytest.mark.parametrize("lifetime_s", [0.5, MAX_LIFETIME_S])
def test_a_command_may_be_valid_for_less_than_a_second_and_for_the_longest_time(
    signer: CommandSigner, verifier: CommandVerifier, clock: Clock, lifetime_s: float
) -> None:
    command = verifier.verify(prepare(signer, lifetime_s=lifetime_s), kind="prepare", current_epoch=0)
    assert command.expires_s == clock.now + lifetime_s


def test_an_altered_command_is_refused(signer: CommandSigner, verifier: CommandVerifier) -> None:
    token = prepare(signer)
    header, payload, signature = token.split(".")
    other = _encoded(_decoded(payload).replace(b"layer.0", b"layer.1"))
    assert_refused(verifier, f"{header}.{other}.{signature}", "altered")
    assert_refused(verifier, f"{header}.{payload}.{prepare(signer).split('.')[2]}", "altered")


def test_a_public_key_used_as_a_shared_secret_is_refused(signer: CommandSigner, verifier: CommandVerifier) -> None:
    payload = _decoded(prepare(signer).split(".")[1])
    header = {"alg": "HS512", "kid": signer._header["kid"]}
    secret = OctKey.import_key(_decoded(signer._key.as_dict(private=False)["x"]))
    assert_refused(verifier, jws.serialize_compact(header, payload, secret, algorithms=["HS512"]), "altered")


@examples(150)
@given(where=st.floats(0, 1, exclude_max=True), letter=st.sampled_from("ABCghxyz0189-_.=+ \n"))
def test_no_character_of_a_command_can_be_changed(ours: Path, where: float, letter: str) -> None:
    token = prepare(CommandSigner(Member.load(ours / "controller")))
    verifier = CommandVerifier(Member.load(ours / "node-a"), nonce=NONCE)
    place = int(where * len(token))
    other = letter if letter != token[place] else "D"
    with pytest.raises(CommandRefusedError):
        verifier.verify(token[:place] + other + token[place + 1 :], kind="prepare", current_epoch=0)
    with pytest.raises(CommandRefusedError):
        verifier.verify(token[:place] + letter + token[place:], kind="prepare", current_epoch=0)
    assert sum(verifier.refusals.values()) == 2


def test_a_command_has_only_one_encoding(signer: CommandSigner, verifier: CommandVerifier) -> None:
    token = prepare(signer)
    letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
    same_signature = token[:-1] + letters[letters.index(token[-1]) + 1]  # differs in unused bits only
    assert _decoded(same_signature.split(".")[2]) == _decoded(token.split(".")[2])
    assert_refused(verifier, same_signature, "malformed")
    assert_refused(verifier, token + "==", "malformed")
    assert_refused(verifier, token + "\n", "malformed")


def test_a_replayed_command_is_refused(signer: CommandSigner, verifier: CommandVerifier) -> None:
    token = prepare(signer)
    verifier.verify(token, kind="prepare", current_epoch=0)
    assert_refused(verifier, token, "replayed")


@pytest.mark.parametrize("restarted_after_s", [-CLOCK_SKEW_S, 0.0, 0.1, 20.0])
def test_a_restarted_member_refuses_earlier_commands(
    ours: Path, signer: CommandSigner, clock: Clock, restarted_after_s: float
) -> None:
    token = prepare(signer)
    clock.now += restarted_after_s
    assert_refused(CommandVerifier(Member.load(ours / "node-a"), clock), token, "replayed")


def test_no_two_processes_of_a_member_obey_the_same_command(ours: Path, signer: CommandSigner, clock: Clock) -> None:
    one, other = (CommandVerifier(Member.load(ours / "node-a"), clock) for _ in range(2))
    token = prepare(signer, audience=audience_of("node-a", one.nonce))
    assert_refused(other, token, "replayed")
    assert one.verify(token, kind="prepare", current_epoch=0).epoch == 7
    assert_refused(one, prepare(signer, audience="node-a"), "replayed")


def test_the_highest_epoch_is_that_of_any_obeyed_command(signer: CommandSigner, verifier: CommandVerifier) -> None:
    assert verifier.highest_epoch == 0
    verifier.verify(prepare(signer, epoch=7), kind="prepare", current_epoch=0)
    verifier.verify(signer.sign("abort", {}, audience=HERE, epoch=9), kind="abort", current_epoch=0)
    verifier.verify(signer.sign("abort", {}, audience=HERE, epoch=8), kind="abort", current_epoch=0)
    assert_refused(verifier, prepare(signer, epoch=50, audience="node-b/1"), "misaddressed")
    assert verifier.highest_epoch == 9


def test_an_expired_command_is_refused(signer: CommandSigner, verifier: CommandVerifier, clock: Clock) -> None:
    token, other = prepare(signer), prepare(signer)
    clock.now += 29
    verifier.verify(other, kind="prepare", current_epoch=0)
    clock.now += 2
    assert_refused(verifier, token, "expired", says="by this clock it was signed ")


def test_a_command_with_a_long_lifetime_is_refused(signer: CommandSigner, verifier: CommandVerifier) -> None:
    with pytest.raises(ValueError, match="no verifier"):
        prepare(signer, lifetime_s=MAX_LIFETIME_S + 1)
    assert_refused(verifier, resign(signer, prepare(signer), exp=2e9), "expired")


def test_a_command_from_the_future_is_refused(signer: CommandSigner, verifier: CommandVerifier, clock: Clock) -> None:
    clock.now += 60
    token = prepare(signer)
    clock.now -= 60
    assert_refused(verifier, token, "early", says=" s behind the controller's; set the clocks")


def test_times_are_accepted_up_to_their_limits(ours: Path, signer: CommandSigner, clock: Clock) -> None:
    start_s = clock.now
    verifier = CommandVerifier(Member.load(ours / "node-a"), clock, NONCE)

    def signed_at(offset_s: float, lifetime_s: float = 30) -> str:
        clock.now = start_s + offset_s
        return prepare(signer, lifetime_s=lifetime_s)

    def verify_at(offset_s: float, token: str) -> None:
        clock.now = start_s + offset_s
        verifier.verify(token, kind="prepare", current_epoch=0)

    def refuse_at(offset_s: float, token: str, reason: str) -> None:
        clock.now = start_s + offset_s
        assert_refused(verifier, token, reason)

    verify_at(0, signed_at(CLOCK_SKEW_S))
    refuse_at(0, signed_at(CLOCK_SKEW_S + 0.5), "early")
    verify_at(0, signed_at(-CLOCK_SKEW_S))
    verify_at(0, signed_at(-20.0))
    verify_at(30, signed_at(0, 30))
    refuse_at(30.5, signed_at(0, 30), "expired")
    verify_at(0, signed_at(0, MAX_LIFETIME_S))
    refuse_at(0, resign(signer, signed_at(0), exp=start_s + MAX_LIFETIME_S + 0.5), "expired")
    for lifetime_s in (0, -1, MAX_LIFETIME_S + 0.5):
        with pytest.raises(ValueError, match="no verifier"):
            signed_at(0, lifetime_s)


def test_a_command_cannot_be_replayed_at_the_very_end_of_its_lifetime(
    signer: CommandSigner, verifier: CommandVerifier, clock: Clock
) -> None:
    token = prepare(signer, lifetime_s=30)
    verifier.verify(token, kind="prepare", current_epoch=0)
    clock.now += 30
    assert_refused(verifier, token, "replayed")


def test_a_misaddressed_command_is_refused(signer: CommandSigner, verifier: CommandVerifier) -> None:
    assert_refused(verifier, prepare(signer, audience=audience_of("node-b", NONCE)), "misaddressed")
    assert_refused(verifier, prepare(signer, audience=""), "misaddressed")


def test_a_command_of_another_authority_is_refused(theirs: Path, verifier: CommandVerifier, clock: Clock) -> None:
    token = prepare(CommandSigner(Member.load(theirs / "controller"), clock))
    assert_refused(verifier, token, "authority")
    impostor = OKPKey.generate_key("Ed25519")
    header = {"alg": "Ed25519", "kid": next(iter(verifier._keys))}
    payload = _decoded(token.split(".")[1])
    assert_refused(verifier, jws.serialize_compact(header, payload, impostor, algorithms=["Ed25519"]), "altered")
    without_key = jws.serialize_compact({"alg": "Ed25519"}, payload, impostor, algorithms=["Ed25519"])
    assert_refused(verifier, without_key, "authority")


def test_a_command_of_another_kind_is_refused(signer: CommandSigner, verifier: CommandVerifier) -> None:
    assert_refused(verifier, prepare(signer), "kind", kind="commit")


def test_a_command_for_a_replaced_epoch_is_refused(signer: CommandSigner, verifier: CommandVerifier) -> None:
    assert_refused(verifier, prepare(signer, epoch=4), "stale", epoch=5)
    verifier.verify(prepare(signer, epoch=8), kind="prepare", current_epoch=5)
    assert_refused(verifier, prepare(signer, epoch=7), "stale", epoch=5)
    commit = signer.sign("commit", {}, audience=HERE, epoch=8)
    verifier.verify(commit, kind="commit", current_epoch=5)
    assert_refused(verifier, signer.sign("abort", {}, audience=HERE, epoch=7), "stale", kind="abort", epoch=5)
    assert_refused(verifier, signer.sign("commit", {}, audience=HERE, epoch=7), "stale", kind="commit", epoch=5)


@pytest.mark.parametrize(
    ("kind", "epoch", "current", "earlier", "is_obeyed"),
    [
        ("prepare", 5, 5, [], True),
        ("prepare", 4, 5, [], False),
        ("prepare", 6, 5, [("prepare", 6)], True),
        ("prepare", 5, 5, [("prepare", 6)], False),
        ("prepare", 6, 5, [("commit", 6)], True),
        ("prepare", 5, 5, [("commit", 6)], False),
        ("prepare", 6, 5, [("prepare", 9), ("commit", 9)], False),
        ("clear", 6, 5, [("prepare", 6)], True),
        ("clear", 5, 5, [("prepare", 6)], False),
        ("clear", 5, 5, [("commit", 6)], False),
        ("commit", 5, 5, [], True),
        ("commit", 4, 5, [], False),
        ("commit", 6, 5, [("commit", 6)], True),
        ("commit", 6, 5, [("prepare", 7)], True),
        ("commit", 6, 5, [("commit", 7)], False),
        ("abort", 5, 5, [], True),
        ("abort", 4, 5, [], False),
        ("abort", 6, 5, [("commit", 6)], True),
        ("abort", 6, 5, [("prepare", 7)], True),
        ("abort", 6, 5, [("commit", 7)], False),
        ("release", 1, 5, [("commit", 7)], True),
        ("commit", 6, 5, [("abort", 8), ("release", 8), ("clear", 8)], True),
    ],
)
def test_a_command_is_stale_only_if_its_epoch_is_below_the_committed_one_or_was_replaced(
    signer: CommandSigner,
    verifier: CommandVerifier,
    kind: str,
    epoch: int,
    current: int,
    earlier: list[tuple[str, int]],
    is_obeyed: bool,
) -> None:
    def sign(kind: str, epoch: int) -> str:
        return signer.sign(kind, {}, audience=HERE, epoch=epoch)

    for earlier_kind, earlier_epoch in earlier:
        verifier.verify(sign(earlier_kind, earlier_epoch), kind=earlier_kind, current_epoch=current)
    if is_obeyed:
        assert verifier.verify(sign(kind, epoch), kind=kind, current_epoch=current).epoch == epoch
    else:
        assert_refused(verifier, sign(kind, epoch), "stale", kind, current)


def test_a_refused_command_replaces_no_epoch(signer: CommandSigner, verifier: CommandVerifier) -> None:
    assert_refused(verifier, prepare(signer, epoch=900, audience=audience_of("node-b", NONCE)), "misaddressed")
    assert verifier.verify(prepare(signer, epoch=7), kind="prepare", current_epoch=5).epoch == 7


def test_an_earlier_epoch_can_be_committed_after_a_later_one_was_prepared(
    signer: CommandSigner, verifier: CommandVerifier
) -> None:
    verifier.verify(prepare(signer, epoch=9), kind="prepare", current_epoch=7)
    commit = signer.sign("commit", {}, audience=HERE, epoch=8)
    assert verifier.verify(commit, kind="commit", current_epoch=7).epoch == 8


def test_a_release_is_never_stale(signer: CommandSigner, verifier: CommandVerifier) -> None:
    verifier.verify(prepare(signer, epoch=9), kind="prepare", current_epoch=7)
    release = signer.sign("release", {}, audience=HERE, epoch=6)
    assert verifier.verify(release, kind="release", current_epoch=9).epoch == 6


@pytest.mark.parametrize("claims", [{"epoch": "x"}, {"body": 3}, {"iat": None}, {"exp": [1]}])
def test_signed_claims_of_another_form_are_refused(
    signer: CommandSigner, verifier: CommandVerifier, claims: dict[str, object]
) -> None:
    assert_refused(verifier, resign(signer, prepare(signer), **claims), "malformed")


@examples(200)
@given(garbage=st.text() | st.from_regex(r"[\w-]{0,40}(\.[\w-]{0,40}){0,4}") | st.binary().map(_encoded))
def test_garbage_is_refused(ours: Path, garbage: str) -> None:
    verifier = CommandVerifier(Member.load(ours / "node-a"), nonce=NONCE)
    with pytest.raises(CommandRefusedError):
        verifier.verify(garbage, kind="prepare", current_epoch=0)


def with_header(header: bytes) -> str:
    """A token with this header, an empty payload and a signature of the right length."""
    return f"{_encoded(header)}.e30.{'A' * 86}"


@examples(200)
@given(
    header=st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(max_size=5),
        lambda inner: (
            st.dictionaries(st.sampled_from(["alg", "kid", "crit", "b64", "typ", "jwk", "x"]), inner, max_size=4)
            | st.lists(inner, max_size=3)
        ),
        max_leaves=8,
    )
)
def test_any_header_is_refused_without_a_crash(ours: Path, header: object) -> None:
    verifier = CommandVerifier(Member.load(ours / "node-a"), nonce=NONCE)
    if isinstance(header, dict) and "kid" in header:
        header["kid"] = next(iter(verifier._keys))
    with pytest.raises(CommandRefusedError):
        verifier.verify(with_header(json.dumps(header).encode()), kind="prepare", current_epoch=0)


@pytest.mark.parametrize(
    "odd",
    [
        "A" * (10 * MAX_TOKEN_CHARS),
        "a." * MAX_TOKEN_CHARS,
        with_header(b"[" * 380),
        with_header(b"[" * 700_000),
        f"e30.{'A' * (MAX_TOKEN_CHARS - 100)}.{'A' * 86}",
        with_header(b'["alg"]'),
        with_header(b'"alg"'),
    ],
)
def test_huge_or_odd_input_is_refused(verifier: CommandVerifier, odd: str) -> None:
    assert_refused(verifier, odd, "malformed")


def test_the_largest_command_that_can_be_signed_is_obeyed(signer: CommandSigner, verifier: CommandVerifier) -> None:
    token = signer.sign("prepare", {"x": "x" * 700_000}, audience=HERE, epoch=1)
    assert len(verifier.verify(token, kind="prepare", current_epoch=0).body["x"]) == 700_000
    with pytest.raises(ValueError, match="no verifier"):
        signer.sign("prepare", {"x": "x" * MAX_TOKEN_CHARS}, audience=HERE, epoch=1)


def test_a_command_may_be_exactly_as_long_as_the_limit(
    ours: Path, signer: CommandSigner, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    long, longer = len(prepare(signer)), prepare(signer, epoch=10_000)
    monkeypatch.setattr(signing, "MAX_TOKEN_CHARS", long)
    verifier = CommandVerifier(Member.load(ours / "node-a"), clock, NONCE)
    assert verifier.verify(prepare(signer), kind="prepare", current_epoch=0).epoch == 7
    assert_refused(verifier, longer, "malformed")
    with pytest.raises(ValueError, match="no verifier"):
        prepare(signer, epoch=10_000)


def test_an_expired_key_of_the_controller_is_refused(ours: Path, signer: CommandSigner, clock: Clock) -> None:
    member = Member.load(ours / "node-a")
    key = {**member.command_keys[0], "exp": clock.now}
    verifier = CommandVerifier(replace(member, command_keys=(key,)), clock, NONCE)
    verifier.verify(prepare(signer), kind="prepare", current_epoch=0)
    clock.now += 0.5
    assert_refused(verifier, prepare(signer), "authority")


def test_remembered_commands_are_limited_and_forgotten_when_they_expire(
    signer: CommandSigner, verifier: CommandVerifier, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(signing, "_MAX_REMEMBERED", 3)
    for _ in range(3):
        verifier.verify(prepare(signer), kind="prepare", current_epoch=0)
    assert_refused(verifier, prepare(signer), "flooded")
    clock.now += 31
    verifier.verify(prepare(signer), kind="prepare", current_epoch=0)
    assert len(verifier._seen._ids) == len(verifier._seen._by_expiry) == 1


def test_a_token_with_the_real_clock_is_accepted(ours: Path) -> None:
    verifier = CommandVerifier(Member.load(ours / "node-a"), nonce=NONCE)
    command = verifier.verify(prepare(CommandSigner(Member.load(ours / "controller"))), kind="prepare", current_epoch=0)
    assert abs(command.issued_s - time.time()) < 60
