from kvtier.v1 import types_pb2 as _types_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class CreateLeaseRequest(_message.Message):
    __slots__ = ("ttl_seconds", "holder")
    TTL_SECONDS_FIELD_NUMBER: _ClassVar[int]
    HOLDER_FIELD_NUMBER: _ClassVar[int]
    ttl_seconds: int
    holder: str
    def __init__(self, ttl_seconds: _Optional[int] = ..., holder: _Optional[str] = ...) -> None: ...

class CreateLeaseResponse(_message.Message):
    __slots__ = ("lease_id", "ttl_seconds")
    LEASE_ID_FIELD_NUMBER: _ClassVar[int]
    TTL_SECONDS_FIELD_NUMBER: _ClassVar[int]
    lease_id: int
    ttl_seconds: int
    def __init__(self, lease_id: _Optional[int] = ..., ttl_seconds: _Optional[int] = ...) -> None: ...

class RenewLeaseRequest(_message.Message):
    __slots__ = ("lease_id",)
    LEASE_ID_FIELD_NUMBER: _ClassVar[int]
    lease_id: int
    def __init__(self, lease_id: _Optional[int] = ...) -> None: ...

class RenewLeaseResponse(_message.Message):
    __slots__ = ("ttl_seconds",)
    TTL_SECONDS_FIELD_NUMBER: _ClassVar[int]
    ttl_seconds: int
    def __init__(self, ttl_seconds: _Optional[int] = ...) -> None: ...

class RevokeLeaseRequest(_message.Message):
    __slots__ = ("lease_id",)
    LEASE_ID_FIELD_NUMBER: _ClassVar[int]
    lease_id: int
    def __init__(self, lease_id: _Optional[int] = ...) -> None: ...

class RevokeLeaseResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class OpenSequenceRequest(_message.Message):
    __slots__ = ("sequence_id", "spec", "profile", "name", "fork_of", "fork_at", "lease_id", "fork_prefix")
    SEQUENCE_ID_FIELD_NUMBER: _ClassVar[int]
    SPEC_FIELD_NUMBER: _ClassVar[int]
    PROFILE_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    FORK_OF_FIELD_NUMBER: _ClassVar[int]
    FORK_AT_FIELD_NUMBER: _ClassVar[int]
    LEASE_ID_FIELD_NUMBER: _ClassVar[int]
    FORK_PREFIX_FIELD_NUMBER: _ClassVar[int]
    sequence_id: str
    spec: _types_pb2.ModelSpec
    profile: _types_pb2.Profile
    name: str
    fork_of: str
    fork_at: int
    lease_id: int
    fork_prefix: Prefix
    def __init__(self, sequence_id: _Optional[str] = ..., spec: _Optional[_Union[_types_pb2.ModelSpec, _Mapping]] = ..., profile: _Optional[_Union[_types_pb2.Profile, str]] = ..., name: _Optional[str] = ..., fork_of: _Optional[str] = ..., fork_at: _Optional[int] = ..., lease_id: _Optional[int] = ..., fork_prefix: _Optional[_Union[Prefix, _Mapping]] = ...) -> None: ...

class Prefix(_message.Message):
    __slots__ = ("tokens", "name")
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    tokens: int
    name: bytes
    def __init__(self, tokens: _Optional[int] = ..., name: _Optional[bytes] = ...) -> None: ...

class OpenSequenceResponse(_message.Message):
    __slots__ = ("sequence_id", "ack", "spec", "profile", "name", "exact_until", "handle")
    SEQUENCE_ID_FIELD_NUMBER: _ClassVar[int]
    ACK_FIELD_NUMBER: _ClassVar[int]
    SPEC_FIELD_NUMBER: _ClassVar[int]
    PROFILE_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    EXACT_UNTIL_FIELD_NUMBER: _ClassVar[int]
    HANDLE_FIELD_NUMBER: _ClassVar[int]
    sequence_id: str
    ack: _types_pb2.Ack
    spec: _types_pb2.ModelSpec
    profile: _types_pb2.Profile
    name: str
    exact_until: int
    handle: int
    def __init__(self, sequence_id: _Optional[str] = ..., ack: _Optional[_Union[_types_pb2.Ack, _Mapping]] = ..., spec: _Optional[_Union[_types_pb2.ModelSpec, _Mapping]] = ..., profile: _Optional[_Union[_types_pb2.Profile, str]] = ..., name: _Optional[str] = ..., exact_until: _Optional[int] = ..., handle: _Optional[int] = ...) -> None: ...

class MatchPrefixRequest(_message.Message):
    __slots__ = ("spec", "profile", "token_ids", "allow_sparse")
    SPEC_FIELD_NUMBER: _ClassVar[int]
    PROFILE_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    ALLOW_SPARSE_FIELD_NUMBER: _ClassVar[int]
    spec: _types_pb2.ModelSpec
    profile: _types_pb2.Profile
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    allow_sparse: bool
    def __init__(self, spec: _Optional[_Union[_types_pb2.ModelSpec, _Mapping]] = ..., profile: _Optional[_Union[_types_pb2.Profile, str]] = ..., token_ids: _Optional[_Iterable[int]] = ..., allow_sparse: bool = ...) -> None: ...

class MatchPrefixResponse(_message.Message):
    __slots__ = ("matched", "sequence_id", "prefix")
    MATCHED_FIELD_NUMBER: _ClassVar[int]
    SEQUENCE_ID_FIELD_NUMBER: _ClassVar[int]
    PREFIX_FIELD_NUMBER: _ClassVar[int]
    matched: int
    sequence_id: str
    prefix: Prefix
    def __init__(self, matched: _Optional[int] = ..., sequence_id: _Optional[str] = ..., prefix: _Optional[_Union[Prefix, _Mapping]] = ...) -> None: ...

class AppendRequest(_message.Message):
    __slots__ = ("sequence_id", "layer", "start", "k", "v", "dtype", "convert", "token_ids", "token_text", "spans", "queries", "sparse_provenance")
    SEQUENCE_ID_FIELD_NUMBER: _ClassVar[int]
    LAYER_FIELD_NUMBER: _ClassVar[int]
    START_FIELD_NUMBER: _ClassVar[int]
    K_FIELD_NUMBER: _ClassVar[int]
    V_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    CONVERT_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    TOKEN_TEXT_FIELD_NUMBER: _ClassVar[int]
    SPANS_FIELD_NUMBER: _ClassVar[int]
    QUERIES_FIELD_NUMBER: _ClassVar[int]
    SPARSE_PROVENANCE_FIELD_NUMBER: _ClassVar[int]
    sequence_id: str
    layer: int
    start: int
    k: bytes
    v: bytes
    dtype: _types_pb2.ElementType
    convert: bool
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    token_text: _containers.RepeatedScalarFieldContainer[bytes]
    spans: _containers.RepeatedCompositeFieldContainer[_types_pb2.Span]
    queries: bytes
    sparse_provenance: bool
    def __init__(self, sequence_id: _Optional[str] = ..., layer: _Optional[int] = ..., start: _Optional[int] = ..., k: _Optional[bytes] = ..., v: _Optional[bytes] = ..., dtype: _Optional[_Union[_types_pb2.ElementType, str]] = ..., convert: bool = ..., token_ids: _Optional[_Iterable[int]] = ..., token_text: _Optional[_Iterable[bytes]] = ..., spans: _Optional[_Iterable[_Union[_types_pb2.Span, _Mapping]]] = ..., queries: _Optional[bytes] = ..., sparse_provenance: bool = ...) -> None: ...

class AppendResponse(_message.Message):
    __slots__ = ("ack",)
    ACK_FIELD_NUMBER: _ClassVar[int]
    ack: _types_pb2.Ack
    def __init__(self, ack: _Optional[_Union[_types_pb2.Ack, _Mapping]] = ...) -> None: ...

class AttendItem(_message.Message):
    __slots__ = ("sequence_id", "start", "q", "k", "v", "token_ids", "token_text", "partial_output", "partial_lse")
    SEQUENCE_ID_FIELD_NUMBER: _ClassVar[int]
    START_FIELD_NUMBER: _ClassVar[int]
    Q_FIELD_NUMBER: _ClassVar[int]
    K_FIELD_NUMBER: _ClassVar[int]
    V_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    TOKEN_TEXT_FIELD_NUMBER: _ClassVar[int]
    PARTIAL_OUTPUT_FIELD_NUMBER: _ClassVar[int]
    PARTIAL_LSE_FIELD_NUMBER: _ClassVar[int]
    sequence_id: str
    start: int
    q: bytes
    k: bytes
    v: bytes
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    token_text: _containers.RepeatedScalarFieldContainer[bytes]
    partial_output: bytes
    partial_lse: bytes
    def __init__(self, sequence_id: _Optional[str] = ..., start: _Optional[int] = ..., q: _Optional[bytes] = ..., k: _Optional[bytes] = ..., v: _Optional[bytes] = ..., token_ids: _Optional[_Iterable[int]] = ..., token_text: _Optional[_Iterable[bytes]] = ..., partial_output: _Optional[bytes] = ..., partial_lse: _Optional[bytes] = ...) -> None: ...

class AttendRequest(_message.Message):
    __slots__ = ("layer", "dtype", "budget", "items")
    LAYER_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    BUDGET_FIELD_NUMBER: _ClassVar[int]
    ITEMS_FIELD_NUMBER: _ClassVar[int]
    layer: int
    dtype: _types_pb2.ElementType
    budget: _types_pb2.Budget
    items: _containers.RepeatedCompositeFieldContainer[AttendItem]
    def __init__(self, layer: _Optional[int] = ..., dtype: _Optional[_Union[_types_pb2.ElementType, str]] = ..., budget: _Optional[_Union[_types_pb2.Budget, _Mapping]] = ..., items: _Optional[_Iterable[_Union[AttendItem, _Mapping]]] = ...) -> None: ...

class AttendResult(_message.Message):
    __slots__ = ("output", "lse", "account", "ack", "error_code", "error_message")
    OUTPUT_FIELD_NUMBER: _ClassVar[int]
    LSE_FIELD_NUMBER: _ClassVar[int]
    ACCOUNT_FIELD_NUMBER: _ClassVar[int]
    ACK_FIELD_NUMBER: _ClassVar[int]
    ERROR_CODE_FIELD_NUMBER: _ClassVar[int]
    ERROR_MESSAGE_FIELD_NUMBER: _ClassVar[int]
    output: bytes
    lse: bytes
    account: _types_pb2.Account
    ack: _types_pb2.Ack
    error_code: int
    error_message: str
    def __init__(self, output: _Optional[bytes] = ..., lse: _Optional[bytes] = ..., account: _Optional[_Union[_types_pb2.Account, _Mapping]] = ..., ack: _Optional[_Union[_types_pb2.Ack, _Mapping]] = ..., error_code: _Optional[int] = ..., error_message: _Optional[str] = ...) -> None: ...

class AttendResponse(_message.Message):
    __slots__ = ("results",)
    RESULTS_FIELD_NUMBER: _ClassVar[int]
    results: _containers.RepeatedCompositeFieldContainer[AttendResult]
    def __init__(self, results: _Optional[_Iterable[_Union[AttendResult, _Mapping]]] = ...) -> None: ...

class AttendStreamRequest(_message.Message):
    __slots__ = ("request",)
    REQUEST_FIELD_NUMBER: _ClassVar[int]
    request: AttendRequest
    def __init__(self, request: _Optional[_Union[AttendRequest, _Mapping]] = ...) -> None: ...

class AttendStreamResponse(_message.Message):
    __slots__ = ("response", "error_code", "error_message")
    RESPONSE_FIELD_NUMBER: _ClassVar[int]
    ERROR_CODE_FIELD_NUMBER: _ClassVar[int]
    ERROR_MESSAGE_FIELD_NUMBER: _ClassVar[int]
    response: AttendResponse
    error_code: int
    error_message: str
    def __init__(self, response: _Optional[_Union[AttendResponse, _Mapping]] = ..., error_code: _Optional[int] = ..., error_message: _Optional[str] = ...) -> None: ...

class PrefetchRequest(_message.Message):
    __slots__ = ("sequence_id", "layers")
    SEQUENCE_ID_FIELD_NUMBER: _ClassVar[int]
    LAYERS_FIELD_NUMBER: _ClassVar[int]
    sequence_id: str
    layers: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, sequence_id: _Optional[str] = ..., layers: _Optional[_Iterable[int]] = ...) -> None: ...

class PrefetchResponse(_message.Message):
    __slots__ = ("bytes_queued",)
    BYTES_QUEUED_FIELD_NUMBER: _ClassVar[int]
    bytes_queued: int
    def __init__(self, bytes_queued: _Optional[int] = ...) -> None: ...

class ReadKVRequest(_message.Message):
    __slots__ = ("sequence_id", "layer", "start", "count")
    SEQUENCE_ID_FIELD_NUMBER: _ClassVar[int]
    LAYER_FIELD_NUMBER: _ClassVar[int]
    START_FIELD_NUMBER: _ClassVar[int]
    COUNT_FIELD_NUMBER: _ClassVar[int]
    sequence_id: str
    layer: int
    start: int
    count: int
    def __init__(self, sequence_id: _Optional[str] = ..., layer: _Optional[int] = ..., start: _Optional[int] = ..., count: _Optional[int] = ...) -> None: ...

class ReadKVResponse(_message.Message):
    __slots__ = ("k", "v", "dtype", "exact")
    K_FIELD_NUMBER: _ClassVar[int]
    V_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    EXACT_FIELD_NUMBER: _ClassVar[int]
    k: bytes
    v: bytes
    dtype: _types_pb2.ElementType
    exact: bool
    def __init__(self, k: _Optional[bytes] = ..., v: _Optional[bytes] = ..., dtype: _Optional[_Union[_types_pb2.ElementType, str]] = ..., exact: bool = ...) -> None: ...

class TruncateRequest(_message.Message):
    __slots__ = ("sequence_id", "length")
    SEQUENCE_ID_FIELD_NUMBER: _ClassVar[int]
    LENGTH_FIELD_NUMBER: _ClassVar[int]
    sequence_id: str
    length: int
    def __init__(self, sequence_id: _Optional[str] = ..., length: _Optional[int] = ...) -> None: ...

class TruncateResponse(_message.Message):
    __slots__ = ("ack",)
    ACK_FIELD_NUMBER: _ClassVar[int]
    ack: _types_pb2.Ack
    def __init__(self, ack: _Optional[_Union[_types_pb2.Ack, _Mapping]] = ...) -> None: ...

class FlushRequest(_message.Message):
    __slots__ = ("sequence_id", "seal")
    SEQUENCE_ID_FIELD_NUMBER: _ClassVar[int]
    SEAL_FIELD_NUMBER: _ClassVar[int]
    sequence_id: str
    seal: bool
    def __init__(self, sequence_id: _Optional[str] = ..., seal: bool = ...) -> None: ...

class FlushResponse(_message.Message):
    __slots__ = ("ack",)
    ACK_FIELD_NUMBER: _ClassVar[int]
    ack: _types_pb2.Ack
    def __init__(self, ack: _Optional[_Union[_types_pb2.Ack, _Mapping]] = ...) -> None: ...

class CloseSequenceRequest(_message.Message):
    __slots__ = ("sequence_id",)
    SEQUENCE_ID_FIELD_NUMBER: _ClassVar[int]
    sequence_id: str
    def __init__(self, sequence_id: _Optional[str] = ...) -> None: ...

class CloseSequenceResponse(_message.Message):
    __slots__ = ("ack",)
    ACK_FIELD_NUMBER: _ClassVar[int]
    ack: _types_pb2.Ack
    def __init__(self, ack: _Optional[_Union[_types_pb2.Ack, _Mapping]] = ...) -> None: ...

class DeleteSequenceRequest(_message.Message):
    __slots__ = ("sequence_id",)
    SEQUENCE_ID_FIELD_NUMBER: _ClassVar[int]
    sequence_id: str
    def __init__(self, sequence_id: _Optional[str] = ...) -> None: ...

class DeleteSequenceResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class PinRequest(_message.Message):
    __slots__ = ("sequence_id", "lease_id", "start", "end")
    SEQUENCE_ID_FIELD_NUMBER: _ClassVar[int]
    LEASE_ID_FIELD_NUMBER: _ClassVar[int]
    START_FIELD_NUMBER: _ClassVar[int]
    END_FIELD_NUMBER: _ClassVar[int]
    sequence_id: str
    lease_id: int
    start: int
    end: int
    def __init__(self, sequence_id: _Optional[str] = ..., lease_id: _Optional[int] = ..., start: _Optional[int] = ..., end: _Optional[int] = ...) -> None: ...

class PinResponse(_message.Message):
    __slots__ = ("pin_id", "bytes")
    PIN_ID_FIELD_NUMBER: _ClassVar[int]
    BYTES_FIELD_NUMBER: _ClassVar[int]
    pin_id: int
    bytes: int
    def __init__(self, pin_id: _Optional[int] = ..., bytes: _Optional[int] = ...) -> None: ...

class UnpinRequest(_message.Message):
    __slots__ = ("pin_id",)
    PIN_ID_FIELD_NUMBER: _ClassVar[int]
    pin_id: int
    def __init__(self, pin_id: _Optional[int] = ...) -> None: ...

class UnpinResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...
