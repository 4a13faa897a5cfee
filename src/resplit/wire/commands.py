"""The commands that the controller sends to a node, as values and as JSON.

`security.signing` signs and verifies the JSON without looking inside.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar

from pydantic import ConfigDict, Field, PlainSerializer, PlainValidator, TypeAdapter, ValidationError, with_config
from typing_extensions import TypedDict  # pydantic reads the one of `typing` from Python 3.12 on only

from resplit.errors import CommandRefusedError, ConfigError
from resplit.model.spec import ModelSpec
from resplit.wire.emulated_link import Shape
from resplit.wire.routes import AddressText, Route

_Numbers = Annotated[list[Annotated[int, Field(ge=0, lt=2**53)]], Field(max_length=10_000)]
Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]
MOST_SESSIONS, _MOST_NAME_CHARS = 10_000, 100
_SessionNames = Annotated[list[Annotated[str, Field(max_length=_MOST_NAME_CHARS)]], Field(max_length=MOST_SESSIONS)]


@with_config(ConfigDict(extra="forbid"))
class Reply(TypedDict, total=False):
    """The changes by a command: blocks `loaded`, `dropped` or `cleared`, epochs `ended`.

    `sessions` are those of which the node holds something, as far as it was asked for them.
    """

    loaded: _Numbers
    dropped: _Numbers
    cleared: _Numbers
    ended: _Numbers
    sessions: _SessionNames


@dataclass(frozen=True)
class WrappedShard:
    """The name of a block's shard in the registry, its size, and its data key, wrapped for one node."""

    name: str
    sealed_bytes: Annotated[int, Field(ge=0)]
    key: Annotated[bytes, PlainValidator(bytes.fromhex), PlainSerializer(bytes.hex)]


@dataclass(frozen=True)
class Prepare:
    """Fetch and load the node's blocks of a route; serve nothing with them yet.

    `replace_current`: the current blocks cannot serve any more and may be dropped first. `private` are the indices of
    the private blocks, `kv_tokens` the tokens for which each block needs room in its cache, `shards` are by block.
    The controller waits for the answer for `within_s`; it sets this when it sends the command.
    """

    kind: ClassVar[str] = "prepare"
    route: Route
    replace_current: bool
    model: ModelSpec
    private: frozenset[int]
    kv_tokens: int
    shards: Mapping[int, WrappedShard]
    within_s: Seconds = 60.0


@dataclass(frozen=True)
class Standby:
    """Keep these `blocks` ready beside those of epochs, as far as memory is free; the most wanted come first.

    It replaces the command before it. `shards` are by block.
    """

    kind: ClassVar[str] = "standby"
    blocks: tuple[int, ...]
    model: ModelSpec
    private: frozenset[int]
    shards: Mapping[int, WrappedShard]


@dataclass(frozen=True)
class Clear:
    """Drop the weights that the node does not need for a route, and keep the caches until they are transferred."""

    kind: ClassVar[str] = "clear"
    route: Route


@dataclass(frozen=True)
class Commit:
    """Serve a prepared epoch. Earlier epochs are served too until they are released."""

    kind: ClassVar[str] = "commit"
    epoch: int


@dataclass(frozen=True)
class Abort:
    """Forget a prepared epoch and free the blocks that only it needs."""

    kind: ClassVar[str] = "abort"
    epoch: int


@dataclass(frozen=True)
class Release:
    """End all epochs before `epoch` and free the blocks that only they need."""

    kind: ClassVar[str] = "release"
    epoch: int


@dataclass(frozen=True)
class Recall:
    """Give back the passes of epochs before `epoch` that wait and have not begun: they take the next route."""

    kind: ClassVar[str] = "recall"
    epoch: int


@dataclass(frozen=True)
class Trust:
    """Set whether the node is trusted. An untrusted node drops the `private` blocks at once."""

    kind: ClassVar[str] = "trust"
    trusted: bool
    private: frozenset[int]


@dataclass(frozen=True)
class Connect(Trust):
    """Connect to the other nodes over emulated `links`, and tell of which sessions the node holds something."""

    kind: ClassVar[str] = "connect"
    addresses: Mapping[str, AddressText]
    links: Mapping[str, Shape]


@dataclass(frozen=True)
class Profile:
    """Load the `blocks` one after another, time each, and drop it again; `shards` are by block.

    The controller waits for the answer for `within_s`; it sets this when it sends the command.
    """

    kind: ClassVar[str] = "profile"
    blocks: tuple[int, ...]
    model: ModelSpec
    private: frozenset[int]
    shards: Mapping[int, WrappedShard]
    within_s: Seconds = 60.0


@dataclass(frozen=True)
class Emulate:
    """Change the hardware or links of an emulated node. None, or a link that is not named, changes nothing.

    `kill`: end its process at once, as a crash does.
    """

    kind: ClassVar[str] = "emulate"
    slowdown: float | None = None
    background_utilization: float | None = None
    links: Mapping[str, Shape] = field(default_factory=dict)
    kill: bool = False


NodeCommand = Prepare | Standby | Clear | Commit | Abort | Release | Recall | Trust | Connect | Profile | Emulate

_ADAPTERS: dict[str, TypeAdapter[Any]] = {
    command.kind: TypeAdapter(command)
    for command in (Prepare, Standby, Clear, Commit, Abort, Release, Recall, Trust, Connect, Profile, Emulate)
}


def to_body(command: NodeCommand) -> dict[str, Any]:
    """A command's body as JSON; its kind travels beside it."""
    body: dict[str, Any] = _ADAPTERS[command.kind].dump_python(command, mode="json")
    return body


def parse_command(kind: str, body: dict[str, Any]) -> NodeCommand:
    """The inverse of `to_body`. CommandRefusedError for an unknown kind, or a body that cannot be read."""
    if kind not in _ADAPTERS:
        raise CommandRefusedError("kind", f"{kind!r} is not a command for nodes")
    try:
        command: NodeCommand = _ADAPTERS[kind].validate_python(body)
    except (ValidationError, ConfigError) as error:
        raise CommandRefusedError("malformed", f"the body of {kind!r} cannot be read: {_reason(error)}") from None
    return command


def _reason(error: ValidationError | ConfigError) -> str:
    if isinstance(error, ConfigError):
        return str(error)
    first = error.errors()[0]
    return f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
