"""Commands from the controller to one member, as signed statements (JWS, RFC 7515) that cannot be reused.

Knows who may speak, to whom and when; knows nothing of what a command does or how it travels.
"""

from __future__ import annotations

import heapq
import json
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

_log = structlog.get_logger(__name__)

Reason = Literal[
    "malformed",  # not a command at all, or too long
    "unsigned",
    "authority",  # signed with a key that this member does not honour
    "altered",  # the signature does not fit the content
    "misaddressed",  # for another member
    "kind",  # another kind of command than was expected here
    "expired",
    "early",  # signed in the future
    "stale",  # of an epoch that was overtaken
    "replayed",  # seen before, or signed before this member started
    "flooded",  # more live commands than can be remembered
]
REASONS: tuple[Reason, ...] = get_args(Reason)

MAX_TOKEN_CHARS = 2**20
MAX_LIFETIME_S = 300.0
CLOCK_SKEW_S = 5.0
_MAX_REMEMBERED = 100_000
_ALGORITHM = "Ed25519"
# Strict base64url: no padding, no skipped characters, no spare bits, so that a command has exactly one spelling.
_COMPACT = re.compile(r"[A-Za-z0-9_-]+\.[A-Za-z0-9_-]+\.(?:[A-Za-z0-9_-]{85}[AQgw])?")
# A command is stale if a later epoch's command of one of these kinds was obeyed. A commit or an abort may still
# come after a later prepare: a controller that was killed in between finishes the earlier epoch first.
_OVERTAKEN_BY = {
    "prepare": ("prepare", "commit"),
    "clear": ("prepare", "commit"),
    "commit": ("commit",),
    "abort": ("commit",),
}


@dataclass(frozen=True)
class Command:
    """A command that was proven: what to do (`kind`, `body`), in which epoch, and its unique id."""

    kind: str
    body: dict[str, Any]
    epoch: int
    issuer: str
    audience: str
    issued_s: float
    expires_s: float
    unique_id: str


class CommandSigner:
    """Signs commands with the controller's key."""

    def __init__(self, member: Member, clock: Callable[[], float] = time.time) -> None:
        if member.signing_key is None:
            raise ConfigError(str(member.folder), f"{member.name!r} has no signing key; only the controller commands")
        self._key = OKPKey.import_key(member.signing_key)
        self._header = {"alg": _ALGORITHM, "kid": self._key.thumbprint()}
        self._issuer = member.name
        self._clock = clock

    def sign(self, kind: str, body: Mapping[str, Any], *, audience: str, epoch: int, lifetime_s: float = 30) -> str:
        """A command for the member `audience` alone, valid for `lifetime_s`, as a compact JWS.

        `body` is JSON. ValueError if the command would be longer or live longer than a verifier accepts.
        """
        now = self._clock()
        claims = {
            "iss": self._issuer,
            "aud": audience,
            "epoch": epoch,
            "iat": now,
            "exp": now + lifetime_s,
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
    """Decides which commands one member obeys, counts the others in `refusals` by reason, and remembers those obeyed.

    Commands signed before it was made are refused as replays: what an earlier process obeyed it cannot know.
    Not for several threads at once.
    """

    def __init__(self, member: Member, clock: Callable[[], float] = time.time) -> None:
        self.refusals: Counter[str] = Counter()
        self._name = member.name
        self._clock = clock
        self._started_s = clock()
        self._keys = {key["kid"]: _imported(key) for key in member.command_keys}
        self._registry = JWSRegistry(algorithms=[_ALGORITHM])
        self._registry.max_payload_length = MAX_TOKEN_CHARS
        self._highest_epoch: Counter[str] = Counter()
        self._seen = _Seen()

    def verify(self, token: str, *, kind: str, current_epoch: int) -> Command:
        """The command in `token` if it is to be obeyed now; CommandRefusedError with one of `REASONS` if not.

        `current_epoch` is the member's committed epoch. A command that is returned is used up.
        """
        try:
            now = self._clock()
            command = _parse(self._payload(token, now))
            self._check_address(command, kind)
            _check_time(command, now)
            self._check_epoch(command, current_epoch)
            self._check_first_use(command, now)
        except CommandRefusedError as refusal:
            self.refusals[refusal.reason] += 1
            _log.warning("command refused", member=self._name, kind=kind, reason=refusal.reason, detail=str(refusal))
            raise
        self._highest_epoch[kind] = max(self._highest_epoch[kind], command.epoch)
        return command

    def _payload(self, token: str, now: float) -> bytes:
        """The signed content, once the signature is known to be the controller's."""
        signed = self._extract(token)
        header = signed.headers()
        if header.get("alg") == "none" or token.endswith("."):
            raise _refused("unsigned", "it carries no signature")
        identity = header.get("kid")
        key, retires_s = self._keys.get(identity, (None, 0.0)) if isinstance(identity, str) else (None, 0.0)
        if key is None or now > retires_s:
            raise _refused("authority", f"its key {identity!r:.60} is not honoured by {self._name}")
        # No other header is ever signed, and joserfc stumbles over odd ones (`crit`), so none reaches it.
        if header != {"alg": _ALGORITHM, "kid": identity} or not jws.validate_compact(
            signed, key, registry=self._registry
        ):
            raise _refused("altered", "its signature does not fit its content")
        content: bytes = signed.payload
        return content

    def _extract(self, token: str) -> CompactSignature:
        if len(token) > MAX_TOKEN_CHARS or not _COMPACT.fullmatch(token):
            raise _refused("malformed", f"{len(token)} characters that are no compact JWS")
        try:
            signed = jws.extract_compact(token.encode(), registry=self._registry)
        except (JoseError, ValueError, TypeError, RecursionError) as error:
            raise _refused("malformed", f"its header cannot be read ({type(error).__name__})") from None
        if not isinstance(signed.headers(), dict):
            raise _refused("malformed", "its header is no object")
        return signed

    def _check_address(self, command: Command, kind: str) -> None:
        if command.audience != self._name:
            raise _refused("misaddressed", f"it is for {command.audience!r:.60}, not for {self._name!r}")
        if command.kind != kind:
            raise _refused("kind", f"it says {command.kind!r:.60} where {kind!r} was expected")

    def _check_epoch(self, command: Command, current_epoch: int) -> None:
        if command.kind not in _OVERTAKEN_BY:
            return
        overtaken = max(self._highest_epoch[kind] for kind in _OVERTAKEN_BY[command.kind])
        if command.epoch < max(current_epoch, overtaken):
            raise _refused("stale", f"{command.kind} of epoch {command.epoch} after {max(current_epoch, overtaken)}")

    def _check_first_use(self, command: Command, now: float) -> None:
        if command.issued_s < self._started_s - CLOCK_SKEW_S:
            raise _refused("replayed", "it was signed before this member started; sign it again")
        self._seen.add(command.unique_id, command.expires_s, now)


class _Seen:
    """The ids of commands obeyed, each until it expires, `_MAX_REMEMBERED` at most."""

    def __init__(self) -> None:
        self._ids: set[str] = set()
        self._by_expiry: list[tuple[float, str]] = []

    def add(self, unique_id: str, expires_s: float, now: float) -> None:
        while self._by_expiry and self._by_expiry[0][0] < now:
            self._ids.discard(heapq.heappop(self._by_expiry)[1])
        if unique_id in self._ids:
            raise _refused("replayed", "it was obeyed before")
        if len(self._ids) >= _MAX_REMEMBERED:
            raise _refused("flooded", f"{_MAX_REMEMBERED} commands are live already; try again in {MAX_LIFETIME_S} s")
        self._ids.add(unique_id)
        heapq.heappush(self._by_expiry, (expires_s, unique_id))


def _imported(key: dict[str, Any]) -> tuple[OKPKey, float]:
    """A public key and the moment until which it is honoured."""
    public = {part: key[part] for part in ("kty", "crv", "x")}
    return OKPKey.import_key(public), float(key.get("exp", "inf"))


def _parse(payload: bytes) -> Command:
    """The command that a signed payload states; the controller signed it, so this fails only on another version's."""
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
        raise _refused("malformed", f"its claims are not a command's ({error!r:.80})") from None


def _check_time(command: Command, now: float) -> None:
    if command.issued_s > now + CLOCK_SKEW_S:
        raise _refused("early", f"it was signed {command.issued_s - now:.1f} s from now; set the clocks")
    if command.expires_s < now or command.expires_s - command.issued_s > MAX_LIFETIME_S:
        raise _refused("expired", f"it expired {now - command.expires_s:.1f} s ago, or was to live too long")


def _refused(reason: Reason, detail: str) -> CommandRefusedError:
    return CommandRefusedError(reason, detail)
