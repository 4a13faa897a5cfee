"""Signed commands from the controller to one member (JWS, RFC 7515), each accepted at most once.

Checks the signer, the addressee, the epoch and the time of a command. The meaning of its content is checked elsewhere.
"""

from __future__ import annotations

import heapq
import json
import math
import re
import time
import uuid
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import structlog
from joserfc import jws
from joserfc.errors import JoseError
from joserfc.jwk import OKPKey
from joserfc.jws import CompactSignature, JWSRegistry

from resplit.errors import CommandRefusedError, ConfigError
from resplit.security.identity import Member
from resplit.security.key_files import PublicJwk

_log = structlog.get_logger(__name__)

Reason = Literal[
    "malformed",  # not a command, or too long
    "unsigned",
    "authority",  # signed with a key that this member does not accept
    "altered",  # the signature does not match the content
    "misaddressed",  # for another member
    "kind",  # of another kind than expected here
    "expired",
    "early",  # signed in the future
    "stale",  # of an epoch that a later one replaced
    "replayed",  # accepted before, or for an earlier process of this member
    "flooded",  # more unexpired commands than are remembered
]
REASONS: tuple[Reason, ...] = get_args(Reason)

MAX_TOKEN_CHARS = 2**20
MAX_LIFETIME_S = 300.0
CLOCK_SKEW_S = 5.0
_MAX_REMEMBERED = 100_000
_ALGORITHM = "Ed25519"
# Strict base64url: no padding, no skipped characters, no unused bits. A command then has exactly one encoding.
_COMPACT = re.compile(r"[A-Za-z0-9_-]+\.[A-Za-z0-9_-]+\.(?:[A-Za-z0-9_-]{85}[AQgw])?")
# A command is stale after a command of one of these kinds for a later epoch. A commit or an abort may still follow
# the prepare of a later epoch: a controller that was killed in between finishes the earlier epoch first.
_OVERTAKEN_BY = {
    "prepare": ("prepare", "commit"),
    "clear": ("prepare", "commit"),
    "commit": ("commit",),
    "abort": ("commit",),
}


@dataclass(frozen=True)
class Command:
    """A verified command: its kind, its content (`body`), its epoch and its unique id. Times are Unix times."""

    kind: str
    body: dict[str, Any]
    epoch: int
    issuer: str
    audience: str
    issued_s: float
    expires_s: float
    unique_id: str


def audience_of(member: str, nonce: str) -> str:
    """The audience of commands to one process of a member."""
    return f"{member}/{nonce}"


class CommandSigner:
    """Signs commands with the controller's key."""

    def __init__(self, member: Member, clock: Callable[[], float] = time.time) -> None:
        if member.signing_key is None:
            raise ConfigError(
                str(member.folder), f"{member.name!r} has no signing key; only the controller signs commands"
            )
        self._key = OKPKey.import_key(member.signing_key)
        self._header = {"alg": _ALGORITHM, "kid": self._key.thumbprint()}
        self._issuer = member.name
        self._clock = clock

    def sign(self, kind: str, body: Mapping[str, Any], *, audience: str, epoch: int, lifetime_s: float = 30) -> str:
        """A command for one process of one member (`audience_of`), valid for `lifetime_s`, as a compact JWS.

        `body` must be representable as JSON. ValueError if verifiers would refuse the command for its length or its
        lifetime.
        """
        now_s = self._clock()
        claims = {
            "iss": self._issuer,
            "aud": audience,
            "epoch": epoch,
            "iat": now_s,
            "exp": now_s + lifetime_s,
            "jti": uuid.uuid4().hex,
            "kind": kind,
            "body": dict(body),
        }
        payload = json.dumps(claims, separators=(",", ":"), allow_nan=False)
        token: str = jws.serialize_compact(self._header, payload, self._key, algorithms=[_ALGORITHM])
        if len(token) > MAX_TOKEN_CHARS or not 0 < lifetime_s <= MAX_LIFETIME_S:
            raise ValueError(f"{kind} command of {len(token)} characters for {lifetime_s} s: no verifier accepts it")
        return token


class CommandVerifier:
    """Decides which commands one process obeys, and counts the refused ones in `refusals` by reason. Not thread-safe.

    An earlier process of this member may have obeyed any command. So commands are for one process: its `nonce` is part
    of their audience. The controller learns it over TLS from the member itself.
    """

    def __init__(self, member: Member, clock: Callable[[], float] = time.time, nonce: str | None = None) -> None:
        self.refusals: Counter[str] = Counter()
        self.nonce = nonce or uuid.uuid4().hex
        self._name = member.name
        self._clock = clock
        self._keys = {key["kid"]: _imported(key) for key in member.command_keys}
        self._registry = JWSRegistry(algorithms=[_ALGORITHM])
        self._registry.max_payload_length = MAX_TOKEN_CHARS
        self._highest_epoch: Counter[str] = Counter()
        self._seen = _ObeyedIds()

    @property
    def highest_epoch(self) -> int:
        """The highest epoch of an obeyed command; 0 before the first."""
        return max(self._highest_epoch.values(), default=0)

    def verify(self, token: str, *, kind: str, current_epoch: int) -> Command:
        """The command in `token` if the member must obey it now; CommandRefusedError with one of `REASONS` if not.

        `current_epoch` is the member's committed epoch. The same command is refused the next time.
        """
        try:
            now_s = self._clock()
            command = _parse(self._payload(token, now_s))
            self._check_address(command, kind)
            _check_time(command, now_s)
            self._check_epoch(command, current_epoch)
            self._seen.add(command.unique_id, command.expires_s, now_s)
        except CommandRefusedError as refusal:
            self.refusals[refusal.reason] += 1
            _log.warning("command refused", member=self._name, kind=kind, reason=refusal.reason, detail=str(refusal))
            raise
        self._highest_epoch[kind] = max(self._highest_epoch[kind], command.epoch)
        return command

    def _payload(self, token: str, now_s: float) -> bytes:
        """The content of a token whose signature is the controller's."""
        signed = self._extract(token)
        header = signed.headers()
        if header.get("alg") == "none" or token.endswith("."):
            raise _refused("unsigned", "it has no signature")
        identity = header.get("kid")
        key, retires_s = self._keys.get(identity, (None, 0.0)) if isinstance(identity, str) else (None, 0.0)
        if key is None or now_s > retires_s:
            raise _refused("authority", f"{self._name} does not accept its key {identity!r:.60}")
        # The controller signs no other header, and joserfc fails on unusual ones (`crit`): they must not reach it.
        if header != {"alg": _ALGORITHM, "kid": identity} or not jws.validate_compact(
            signed, key, registry=self._registry
        ):
            raise _refused("altered", "its signature does not match its content")
        content: bytes = signed.payload
        return content

    def _extract(self, token: str) -> CompactSignature:
        if len(token) > MAX_TOKEN_CHARS or not _COMPACT.fullmatch(token):
            raise _refused("malformed", f"its {len(token)} characters are not a compact JWS")
        try:
            signed = jws.extract_compact(token.encode(), registry=self._registry)
        except (JoseError, ValueError, TypeError, RecursionError) as error:
            raise _refused("malformed", f"its header cannot be read ({type(error).__name__})") from None
        if not isinstance(signed.headers(), dict):
            raise _refused("malformed", "its header is not an object")
        return signed

    def _check_address(self, command: Command, kind: str) -> None:
        name, _, nonce = command.audience.partition("/")
        if name != self._name:
            raise _refused("misaddressed", f"it is for {command.audience!r:.60}, not for {self._name!r}")
        if nonce != self.nonce:
            raise _refused("replayed", f"it is for another process of {self._name!r}; send it again")
        if command.kind != kind:
            raise _refused("kind", f"it is of kind {command.kind!r:.60}, expected {kind!r}")

    def _check_epoch(self, command: Command, current_epoch: int) -> None:
        if command.kind not in _OVERTAKEN_BY:
            return
        overtaken = max(self._highest_epoch[kind] for kind in _OVERTAKEN_BY[command.kind])
        if command.epoch < max(current_epoch, overtaken):
            raise _refused(
                "stale", f"it is for epoch {command.epoch}; epoch {max(current_epoch, overtaken)} has replaced it"
            )


class _ObeyedIds:
    """The ids of the obeyed commands that have not expired, at most `_MAX_REMEMBERED`."""

    def __init__(self) -> None:
        self._ids: set[str] = set()
        self._by_expiry: list[tuple[float, str]] = []

    def add(self, unique_id: str, expires_s: float, now_s: float) -> None:
        while self._by_expiry and self._by_expiry[0][0] < now_s:
            self._ids.discard(heapq.heappop(self._by_expiry)[1])
        if unique_id in self._ids:
            raise _refused("replayed", "it was obeyed before")
        if len(self._ids) >= _MAX_REMEMBERED:
            raise _refused(
                "flooded", f"{_MAX_REMEMBERED} obeyed commands have not expired yet; try again in {MAX_LIFETIME_S} s"
            )
        self._ids.add(unique_id)
        heapq.heappush(self._by_expiry, (expires_s, unique_id))


def _imported(key: PublicJwk) -> tuple[OKPKey, float]:
    """A public key, and the time in seconds since 1970 until which it is accepted."""
    public = {"kty": key["kty"], "crv": key["crv"], "x": key["x"]}
    return OKPKey.import_key(public), float(key.get("exp", math.inf))


def _parse(payload: bytes) -> Command:
    """The command in a payload that the controller signed. Fails only if the controller runs another version."""
    try:
        claims = json.loads(payload)
        return Command(
            kind=str(claims["kind"]),
            body=dict(claims["body"]),
            epoch=int(claims["epoch"]),
            issuer=str(claims["iss"]),
            audience=str(claims["aud"]),
            issued_s=float(claims["iat"]),
            expires_s=float(claims["exp"]),
            unique_id=str(claims["jti"]),
        )
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise _refused("malformed", f"its claims are not those of a command ({error!r:.80})") from None


def _check_time(command: Command, now_s: float) -> None:
    if command.issued_s > now_s + CLOCK_SKEW_S:
        ahead_s = command.issued_s - now_s
        raise _refused("early", f"this clock is {ahead_s:.1f} s behind the controller's; set the clocks (NTP)")
    if command.expires_s < now_s or command.expires_s - command.issued_s > MAX_LIFETIME_S:
        age_s, valid_s = now_s - command.issued_s, command.expires_s - command.issued_s
        reason = f"by this clock it was signed {age_s:.1f} s ago, and it was valid for {valid_s:g} s"
        raise _refused("expired", f"{reason}: it was delayed, or this clock is ahead of the controller's (NTP)")


def _refused(reason: Reason, detail: str) -> CommandRefusedError:
    return CommandRefusedError(reason, detail)
