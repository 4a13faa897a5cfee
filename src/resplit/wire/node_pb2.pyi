from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Tensor(_message.Message):
    __slots__ = ("dtype", "shape", "data")
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    SHAPE_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    dtype: str
    shape: _containers.RepeatedScalarFieldContainer[int]
    data: bytes
    def __init__(self, dtype: _Optional[str] = ..., shape: _Optional[_Iterable[int]] = ..., data: _Optional[bytes] = ...) -> None: ...

class Sampling(_message.Message):
    __slots__ = ("temperature", "top_p", "seed", "top_k", "min_p")
    TEMPERATURE_FIELD_NUMBER: _ClassVar[int]
    TOP_P_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    TOP_K_FIELD_NUMBER: _ClassVar[int]
    MIN_P_FIELD_NUMBER: _ClassVar[int]
    temperature: float
    top_p: float
    seed: int
    top_k: int
    min_p: float
    def __init__(self, temperature: _Optional[float] = ..., top_p: _Optional[float] = ..., seed: _Optional[int] = ..., top_k: _Optional[int] = ..., min_p: _Optional[float] = ...) -> None: ...

class LogitChange(_message.Message):
    __slots__ = ("allowed", "token_ids", "added")
    ALLOWED_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    ADDED_FIELD_NUMBER: _ClassVar[int]
    allowed: bytes
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    added: _containers.RepeatedScalarFieldContainer[float]
    def __init__(self, allowed: _Optional[bytes] = ..., token_ids: _Optional[_Iterable[int]] = ..., added: _Optional[_Iterable[float]] = ...) -> None: ...

class Logprobs(_message.Message):
    __slots__ = ("chosen", "token_ids", "logprobs")
    CHOSEN_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    chosen: float
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    logprobs: _containers.RepeatedScalarFieldContainer[float]
    def __init__(self, chosen: _Optional[float] = ..., token_ids: _Optional[_Iterable[int]] = ..., logprobs: _Optional[_Iterable[float]] = ...) -> None: ...

class SegmentTime(_message.Message):
    __slots__ = ("waited_s", "computed_s", "background_utilization", "decodes", "prefill_tokens", "first_half_s", "prompt_half")
    WAITED_S_FIELD_NUMBER: _ClassVar[int]
    COMPUTED_S_FIELD_NUMBER: _ClassVar[int]
    BACKGROUND_UTILIZATION_FIELD_NUMBER: _ClassVar[int]
    DECODES_FIELD_NUMBER: _ClassVar[int]
    PREFILL_TOKENS_FIELD_NUMBER: _ClassVar[int]
    FIRST_HALF_S_FIELD_NUMBER: _ClassVar[int]
    PROMPT_HALF_FIELD_NUMBER: _ClassVar[int]
    waited_s: float
    computed_s: float
    background_utilization: float
    decodes: int
    prefill_tokens: int
    first_half_s: float
    prompt_half: int
    def __init__(self, waited_s: _Optional[float] = ..., computed_s: _Optional[float] = ..., background_utilization: _Optional[float] = ..., decodes: _Optional[int] = ..., prefill_tokens: _Optional[int] = ..., first_half_s: _Optional[float] = ..., prompt_half: _Optional[int] = ...) -> None: ...

class Step(_message.Message):
    __slots__ = ("number", "session", "epoch", "segment", "start", "values", "sampling", "gateway", "attempt", "more", "permit", "stepwise", "acknowledge", "times", "drafts", "changes", "logprobs", "scored", "follow_until", "stop_ids", "left_s")
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    SESSION_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    SEGMENT_FIELD_NUMBER: _ClassVar[int]
    START_FIELD_NUMBER: _ClassVar[int]
    VALUES_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    GATEWAY_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    MORE_FIELD_NUMBER: _ClassVar[int]
    PERMIT_FIELD_NUMBER: _ClassVar[int]
    STEPWISE_FIELD_NUMBER: _ClassVar[int]
    ACKNOWLEDGE_FIELD_NUMBER: _ClassVar[int]
    TIMES_FIELD_NUMBER: _ClassVar[int]
    DRAFTS_FIELD_NUMBER: _ClassVar[int]
    CHANGES_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    SCORED_FIELD_NUMBER: _ClassVar[int]
    FOLLOW_UNTIL_FIELD_NUMBER: _ClassVar[int]
    STOP_IDS_FIELD_NUMBER: _ClassVar[int]
    LEFT_S_FIELD_NUMBER: _ClassVar[int]
    number: int
    session: str
    epoch: int
    segment: int
    start: int
    values: Tensor
    sampling: Sampling
    gateway: str
    attempt: int
    more: bool
    permit: PermitRequest
    stepwise: bool
    acknowledge: bool
    times: _containers.RepeatedCompositeFieldContainer[SegmentTime]
    drafts: int
    changes: _containers.RepeatedCompositeFieldContainer[LogitChange]
    logprobs: int
    scored: _containers.RepeatedScalarFieldContainer[int]
    follow_until: int
    stop_ids: _containers.RepeatedScalarFieldContainer[int]
    left_s: float
    def __init__(self, number: _Optional[int] = ..., session: _Optional[str] = ..., epoch: _Optional[int] = ..., segment: _Optional[int] = ..., start: _Optional[int] = ..., values: _Optional[_Union[Tensor, _Mapping]] = ..., sampling: _Optional[_Union[Sampling, _Mapping]] = ..., gateway: _Optional[str] = ..., attempt: _Optional[int] = ..., more: _Optional[bool] = ..., permit: _Optional[_Union[PermitRequest, _Mapping]] = ..., stepwise: _Optional[bool] = ..., acknowledge: _Optional[bool] = ..., times: _Optional[_Iterable[_Union[SegmentTime, _Mapping]]] = ..., drafts: _Optional[int] = ..., changes: _Optional[_Iterable[_Union[LogitChange, _Mapping]]] = ..., logprobs: _Optional[int] = ..., scored: _Optional[_Iterable[int]] = ..., follow_until: _Optional[int] = ..., stop_ids: _Optional[_Iterable[int]] = ..., left_s: _Optional[float] = ...) -> None: ...

class Ack(_message.Message):
    __slots__ = ("number",)
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    number: int
    def __init__(self, number: _Optional[int] = ...) -> None: ...

class Version(_message.Message):
    __slots__ = ("wire", "release")
    WIRE_FIELD_NUMBER: _ClassVar[int]
    RELEASE_FIELD_NUMBER: _ClassVar[int]
    wire: int
    release: str
    def __init__(self, wire: _Optional[int] = ..., release: _Optional[str] = ...) -> None: ...

class TokensRequest(_message.Message):
    __slots__ = ("version",)
    VERSION_FIELD_NUMBER: _ClassVar[int]
    version: Version
    def __init__(self, version: _Optional[_Union[Version, _Mapping]] = ...) -> None: ...

class Hello(_message.Message):
    __slots__ = ("nonce", "epoch", "clock_s", "version")
    NONCE_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    CLOCK_S_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    nonce: str
    epoch: int
    clock_s: float
    version: Version
    def __init__(self, nonce: _Optional[str] = ..., epoch: _Optional[int] = ..., clock_s: _Optional[float] = ..., version: _Optional[_Union[Version, _Mapping]] = ...) -> None: ...

class Token(_message.Message):
    __slots__ = ("session", "epoch", "position", "token_ids", "error", "error_kind", "attempt", "times", "logprobs", "followed", "hello", "news")
    SESSION_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    POSITION_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    ERROR_KIND_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    TIMES_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    FOLLOWED_FIELD_NUMBER: _ClassVar[int]
    HELLO_FIELD_NUMBER: _ClassVar[int]
    NEWS_FIELD_NUMBER: _ClassVar[int]
    session: str
    epoch: int
    position: int
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    error: str
    error_kind: str
    attempt: int
    times: _containers.RepeatedCompositeFieldContainer[SegmentTime]
    logprobs: _containers.RepeatedCompositeFieldContainer[Logprobs]
    followed: bool
    hello: Hello
    news: bool
    def __init__(self, session: _Optional[str] = ..., epoch: _Optional[int] = ..., position: _Optional[int] = ..., token_ids: _Optional[_Iterable[int]] = ..., error: _Optional[str] = ..., error_kind: _Optional[str] = ..., attempt: _Optional[int] = ..., times: _Optional[_Iterable[_Union[SegmentTime, _Mapping]]] = ..., logprobs: _Optional[_Iterable[_Union[Logprobs, _Mapping]]] = ..., followed: _Optional[bool] = ..., hello: _Optional[_Union[Hello, _Mapping]] = ..., news: _Optional[bool] = ...) -> None: ...

class Call(_message.Message):
    __slots__ = ("number", "name", "content")
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    CONTENT_FIELD_NUMBER: _ClassVar[int]
    number: int
    name: str
    content: bytes
    def __init__(self, number: _Optional[int] = ..., name: _Optional[str] = ..., content: _Optional[bytes] = ...) -> None: ...

class Answer(_message.Message):
    __slots__ = ("number", "content", "status", "error")
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    CONTENT_FIELD_NUMBER: _ClassVar[int]
    STATUS_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    number: int
    content: bytes
    status: int
    error: str
    def __init__(self, number: _Optional[int] = ..., content: _Optional[bytes] = ..., status: _Optional[int] = ..., error: _Optional[str] = ...) -> None: ...

class CommandRequest(_message.Message):
    __slots__ = ("kind", "signed")
    KIND_FIELD_NUMBER: _ClassVar[int]
    SIGNED_FIELD_NUMBER: _ClassVar[int]
    kind: str
    signed: str
    def __init__(self, kind: _Optional[str] = ..., signed: _Optional[str] = ...) -> None: ...

class CommandReply(_message.Message):
    __slots__ = ("body", "error", "error_kind")
    BODY_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    ERROR_KIND_FIELD_NUMBER: _ClassVar[int]
    body: str
    error: str
    error_kind: str
    def __init__(self, body: _Optional[str] = ..., error: _Optional[str] = ..., error_kind: _Optional[str] = ...) -> None: ...

class ReportRequest(_message.Message):
    __slots__ = ("after",)
    AFTER_FIELD_NUMBER: _ClassVar[int]
    after: int
    def __init__(self, after: _Optional[int] = ...) -> None: ...

class ReportReply(_message.Message):
    __slots__ = ("body", "last")
    BODY_FIELD_NUMBER: _ClassVar[int]
    LAST_FIELD_NUMBER: _ClassVar[int]
    body: str
    last: int
    def __init__(self, body: _Optional[str] = ..., last: _Optional[int] = ...) -> None: ...

class MeasureRequest(_message.Message):
    __slots__ = ("nodes",)
    NODES_FIELD_NUMBER: _ClassVar[int]
    nodes: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, nodes: _Optional[_Iterable[str]] = ...) -> None: ...

class MeasureReply(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class EchoRequest(_message.Message):
    __slots__ = ("payload",)
    PAYLOAD_FIELD_NUMBER: _ClassVar[int]
    payload: bytes
    def __init__(self, payload: _Optional[bytes] = ...) -> None: ...

class EchoReply(_message.Message):
    __slots__ = ("absent_s",)
    ABSENT_S_FIELD_NUMBER: _ClassVar[int]
    absent_s: float
    def __init__(self, absent_s: _Optional[float] = ...) -> None: ...

class CachePart(_message.Message):
    __slots__ = ("session", "blocks", "first", "values", "attempt", "transfer", "ends")
    SESSION_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    FIRST_FIELD_NUMBER: _ClassVar[int]
    VALUES_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    TRANSFER_FIELD_NUMBER: _ClassVar[int]
    ENDS_FIELD_NUMBER: _ClassVar[int]
    session: str
    blocks: _containers.RepeatedScalarFieldContainer[int]
    first: int
    values: Tensor
    attempt: int
    transfer: int
    ends: bool
    def __init__(self, session: _Optional[str] = ..., blocks: _Optional[_Iterable[int]] = ..., first: _Optional[int] = ..., values: _Optional[_Union[Tensor, _Mapping]] = ..., attempt: _Optional[int] = ..., transfer: _Optional[int] = ..., ends: _Optional[bool] = ...) -> None: ...

class CacheReply(_message.Message):
    __slots__ = ("error", "transfer")
    ERROR_FIELD_NUMBER: _ClassVar[int]
    TRANSFER_FIELD_NUMBER: _ClassVar[int]
    error: str
    transfer: int
    def __init__(self, error: _Optional[str] = ..., transfer: _Optional[int] = ...) -> None: ...

class TransferRequest(_message.Message):
    __slots__ = ("session", "target", "first", "last", "attempt", "background")
    SESSION_FIELD_NUMBER: _ClassVar[int]
    TARGET_FIELD_NUMBER: _ClassVar[int]
    FIRST_FIELD_NUMBER: _ClassVar[int]
    LAST_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    BACKGROUND_FIELD_NUMBER: _ClassVar[int]
    session: str
    target: _containers.RepeatedScalarFieldContainer[str]
    first: int
    last: int
    attempt: int
    background: bool
    def __init__(self, session: _Optional[str] = ..., target: _Optional[_Iterable[str]] = ..., first: _Optional[int] = ..., last: _Optional[int] = ..., attempt: _Optional[int] = ..., background: _Optional[bool] = ...) -> None: ...

class TransferReply(_message.Message):
    __slots__ = ("bytes", "error")
    BYTES_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    bytes: int
    error: str
    def __init__(self, bytes: _Optional[int] = ..., error: _Optional[str] = ...) -> None: ...

class PermitRequest(_message.Message):
    __slots__ = ("session", "attempt", "capacity", "epochs", "senders", "keep")
    class SendersEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: int
        value: str
        def __init__(self, key: _Optional[int] = ..., value: _Optional[str] = ...) -> None: ...
    SESSION_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    CAPACITY_FIELD_NUMBER: _ClassVar[int]
    EPOCHS_FIELD_NUMBER: _ClassVar[int]
    SENDERS_FIELD_NUMBER: _ClassVar[int]
    KEEP_FIELD_NUMBER: _ClassVar[int]
    session: str
    attempt: int
    capacity: int
    epochs: _containers.RepeatedScalarFieldContainer[int]
    senders: _containers.ScalarMap[int, str]
    keep: bool
    def __init__(self, session: _Optional[str] = ..., attempt: _Optional[int] = ..., capacity: _Optional[int] = ..., epochs: _Optional[_Iterable[int]] = ..., senders: _Optional[_Mapping[int, str]] = ..., keep: _Optional[bool] = ...) -> None: ...

class PermitReply(_message.Message):
    __slots__ = ("lengths",)
    class LengthsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: int
        value: int
        def __init__(self, key: _Optional[int] = ..., value: _Optional[int] = ...) -> None: ...
    LENGTHS_FIELD_NUMBER: _ClassVar[int]
    lengths: _containers.ScalarMap[int, int]
    def __init__(self, lengths: _Optional[_Mapping[int, int]] = ...) -> None: ...

class CloseRequest(_message.Message):
    __slots__ = ("sessions",)
    SESSIONS_FIELD_NUMBER: _ClassVar[int]
    sessions: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, sessions: _Optional[_Iterable[str]] = ...) -> None: ...

class CloseReply(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...
