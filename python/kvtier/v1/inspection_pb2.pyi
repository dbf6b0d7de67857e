from kvtier.v1 import types_pb2 as _types_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class TierStatus(_message.Message):
    __slots__ = ("name", "bytes_used", "bytes_limit", "pieces", "hits", "misses", "bytes_read", "bytes_written", "evictions", "corruptions", "late_reads")
    NAME_FIELD_NUMBER: _ClassVar[int]
    BYTES_USED_FIELD_NUMBER: _ClassVar[int]
    BYTES_LIMIT_FIELD_NUMBER: _ClassVar[int]
    PIECES_FIELD_NUMBER: _ClassVar[int]
    HITS_FIELD_NUMBER: _ClassVar[int]
    MISSES_FIELD_NUMBER: _ClassVar[int]
    BYTES_READ_FIELD_NUMBER: _ClassVar[int]
    BYTES_WRITTEN_FIELD_NUMBER: _ClassVar[int]
    EVICTIONS_FIELD_NUMBER: _ClassVar[int]
    CORRUPTIONS_FIELD_NUMBER: _ClassVar[int]
    LATE_READS_FIELD_NUMBER: _ClassVar[int]
    name: str
    bytes_used: int
    bytes_limit: int
    pieces: int
    hits: int
    misses: int
    bytes_read: int
    bytes_written: int
    evictions: int
    corruptions: int
    late_reads: int
    def __init__(self, name: _Optional[str] = ..., bytes_used: _Optional[int] = ..., bytes_limit: _Optional[int] = ..., pieces: _Optional[int] = ..., hits: _Optional[int] = ..., misses: _Optional[int] = ..., bytes_read: _Optional[int] = ..., bytes_written: _Optional[int] = ..., evictions: _Optional[int] = ..., corruptions: _Optional[int] = ..., late_reads: _Optional[int] = ...) -> None: ...

class GPUAudits(_message.Message):
    __slots__ = ("compared", "largest_error", "largest_lse_error", "given_up")
    COMPARED_FIELD_NUMBER: _ClassVar[int]
    LARGEST_ERROR_FIELD_NUMBER: _ClassVar[int]
    LARGEST_LSE_ERROR_FIELD_NUMBER: _ClassVar[int]
    GIVEN_UP_FIELD_NUMBER: _ClassVar[int]
    compared: int
    largest_error: float
    largest_lse_error: float
    given_up: str
    def __init__(self, compared: _Optional[int] = ..., largest_error: _Optional[float] = ..., largest_lse_error: _Optional[float] = ..., given_up: _Optional[str] = ...) -> None: ...

class GPUStatus(_message.Message):
    __slots__ = ("segments_sealed", "segments_kept", "pinned_bytes", "segments_ahead", "segments_ahead_used")
    SEGMENTS_SEALED_FIELD_NUMBER: _ClassVar[int]
    SEGMENTS_KEPT_FIELD_NUMBER: _ClassVar[int]
    PINNED_BYTES_FIELD_NUMBER: _ClassVar[int]
    SEGMENTS_AHEAD_FIELD_NUMBER: _ClassVar[int]
    SEGMENTS_AHEAD_USED_FIELD_NUMBER: _ClassVar[int]
    segments_sealed: int
    segments_kept: int
    pinned_bytes: int
    segments_ahead: int
    segments_ahead_used: int
    def __init__(self, segments_sealed: _Optional[int] = ..., segments_kept: _Optional[int] = ..., pinned_bytes: _Optional[int] = ..., segments_ahead: _Optional[int] = ..., segments_ahead_used: _Optional[int] = ...) -> None: ...

class GetStatusRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetStatusResponse(_message.Message):
    __slots__ = ("version", "data_dir", "uptime_seconds", "tiers", "sequences", "sequences_open", "leases", "tail_bytes", "tail_bytes_limit", "attends", "appends", "audits", "audit_error_mean", "audit_error_p95", "rss_bytes", "seals_pending", "audit_coverage", "gpu_audits", "gpu")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    DATA_DIR_FIELD_NUMBER: _ClassVar[int]
    UPTIME_SECONDS_FIELD_NUMBER: _ClassVar[int]
    TIERS_FIELD_NUMBER: _ClassVar[int]
    SEQUENCES_FIELD_NUMBER: _ClassVar[int]
    SEQUENCES_OPEN_FIELD_NUMBER: _ClassVar[int]
    LEASES_FIELD_NUMBER: _ClassVar[int]
    TAIL_BYTES_FIELD_NUMBER: _ClassVar[int]
    TAIL_BYTES_LIMIT_FIELD_NUMBER: _ClassVar[int]
    ATTENDS_FIELD_NUMBER: _ClassVar[int]
    APPENDS_FIELD_NUMBER: _ClassVar[int]
    AUDITS_FIELD_NUMBER: _ClassVar[int]
    AUDIT_ERROR_MEAN_FIELD_NUMBER: _ClassVar[int]
    AUDIT_ERROR_P95_FIELD_NUMBER: _ClassVar[int]
    RSS_BYTES_FIELD_NUMBER: _ClassVar[int]
    SEALS_PENDING_FIELD_NUMBER: _ClassVar[int]
    AUDIT_COVERAGE_FIELD_NUMBER: _ClassVar[int]
    GPU_AUDITS_FIELD_NUMBER: _ClassVar[int]
    GPU_FIELD_NUMBER: _ClassVar[int]
    version: str
    data_dir: str
    uptime_seconds: int
    tiers: _containers.RepeatedCompositeFieldContainer[TierStatus]
    sequences: int
    sequences_open: int
    leases: int
    tail_bytes: int
    tail_bytes_limit: int
    attends: int
    appends: int
    audits: int
    audit_error_mean: float
    audit_error_p95: float
    rss_bytes: int
    seals_pending: int
    audit_coverage: float
    gpu_audits: GPUAudits
    gpu: GPUStatus
    def __init__(self, version: _Optional[str] = ..., data_dir: _Optional[str] = ..., uptime_seconds: _Optional[int] = ..., tiers: _Optional[_Iterable[_Union[TierStatus, _Mapping]]] = ..., sequences: _Optional[int] = ..., sequences_open: _Optional[int] = ..., leases: _Optional[int] = ..., tail_bytes: _Optional[int] = ..., tail_bytes_limit: _Optional[int] = ..., attends: _Optional[int] = ..., appends: _Optional[int] = ..., audits: _Optional[int] = ..., audit_error_mean: _Optional[float] = ..., audit_error_p95: _Optional[float] = ..., rss_bytes: _Optional[int] = ..., seals_pending: _Optional[int] = ..., audit_coverage: _Optional[float] = ..., gpu_audits: _Optional[_Union[GPUAudits, _Mapping]] = ..., gpu: _Optional[_Union[GPUStatus, _Mapping]] = ...) -> None: ...

class SequenceInfo(_message.Message):
    __slots__ = ("sequence_id", "name", "profile", "ack", "open", "sealed_bytes", "created_unix", "used_unix", "parent_id", "damage")
    SEQUENCE_ID_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    PROFILE_FIELD_NUMBER: _ClassVar[int]
    ACK_FIELD_NUMBER: _ClassVar[int]
    OPEN_FIELD_NUMBER: _ClassVar[int]
    SEALED_BYTES_FIELD_NUMBER: _ClassVar[int]
    CREATED_UNIX_FIELD_NUMBER: _ClassVar[int]
    USED_UNIX_FIELD_NUMBER: _ClassVar[int]
    PARENT_ID_FIELD_NUMBER: _ClassVar[int]
    DAMAGE_FIELD_NUMBER: _ClassVar[int]
    sequence_id: str
    name: str
    profile: _types_pb2.Profile
    ack: _types_pb2.Ack
    open: bool
    sealed_bytes: int
    created_unix: int
    used_unix: int
    parent_id: str
    damage: str
    def __init__(self, sequence_id: _Optional[str] = ..., name: _Optional[str] = ..., profile: _Optional[_Union[_types_pb2.Profile, str]] = ..., ack: _Optional[_Union[_types_pb2.Ack, _Mapping]] = ..., open: bool = ..., sealed_bytes: _Optional[int] = ..., created_unix: _Optional[int] = ..., used_unix: _Optional[int] = ..., parent_id: _Optional[str] = ..., damage: _Optional[str] = ...) -> None: ...

class ListSequencesRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListSequencesResponse(_message.Message):
    __slots__ = ("sequences",)
    SEQUENCES_FIELD_NUMBER: _ClassVar[int]
    sequences: _containers.RepeatedCompositeFieldContainer[SequenceInfo]
    def __init__(self, sequences: _Optional[_Iterable[_Union[SequenceInfo, _Mapping]]] = ...) -> None: ...

class SealedSpan(_message.Message):
    __slots__ = ("start", "limit", "tokens", "span_id", "bytes", "low_planes", "references", "bits_per_value")
    START_FIELD_NUMBER: _ClassVar[int]
    LIMIT_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    SPAN_ID_FIELD_NUMBER: _ClassVar[int]
    BYTES_FIELD_NUMBER: _ClassVar[int]
    LOW_PLANES_FIELD_NUMBER: _ClassVar[int]
    REFERENCES_FIELD_NUMBER: _ClassVar[int]
    BITS_PER_VALUE_FIELD_NUMBER: _ClassVar[int]
    start: int
    limit: int
    tokens: int
    span_id: bytes
    bytes: int
    low_planes: bool
    references: int
    bits_per_value: float
    def __init__(self, start: _Optional[int] = ..., limit: _Optional[int] = ..., tokens: _Optional[int] = ..., span_id: _Optional[bytes] = ..., bytes: _Optional[int] = ..., low_planes: bool = ..., references: _Optional[int] = ..., bits_per_value: _Optional[float] = ...) -> None: ...

class DescribeSequenceRequest(_message.Message):
    __slots__ = ("sequence_id", "token_ids")
    SEQUENCE_ID_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    sequence_id: str
    token_ids: bool
    def __init__(self, sequence_id: _Optional[str] = ..., token_ids: bool = ...) -> None: ...

class DescribeSequenceResponse(_message.Message):
    __slots__ = ("info", "spec", "sealed", "spans", "token_ids", "exact_until")
    INFO_FIELD_NUMBER: _ClassVar[int]
    SPEC_FIELD_NUMBER: _ClassVar[int]
    SEALED_FIELD_NUMBER: _ClassVar[int]
    SPANS_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    EXACT_UNTIL_FIELD_NUMBER: _ClassVar[int]
    info: SequenceInfo
    spec: _types_pb2.ModelSpec
    sealed: _containers.RepeatedCompositeFieldContainer[SealedSpan]
    spans: _containers.RepeatedCompositeFieldContainer[_types_pb2.Span]
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    exact_until: int
    def __init__(self, info: _Optional[_Union[SequenceInfo, _Mapping]] = ..., spec: _Optional[_Union[_types_pb2.ModelSpec, _Mapping]] = ..., sealed: _Optional[_Iterable[_Union[SealedSpan, _Mapping]]] = ..., spans: _Optional[_Iterable[_Union[_types_pb2.Span, _Mapping]]] = ..., token_ids: _Optional[_Iterable[int]] = ..., exact_until: _Optional[int] = ...) -> None: ...

class ExplainRequest(_message.Message):
    __slots__ = ("sequence_id", "layer", "top", "top_spans")
    SEQUENCE_ID_FIELD_NUMBER: _ClassVar[int]
    LAYER_FIELD_NUMBER: _ClassVar[int]
    TOP_FIELD_NUMBER: _ClassVar[int]
    TOP_SPANS_FIELD_NUMBER: _ClassVar[int]
    sequence_id: str
    layer: int
    top: int
    top_spans: int
    def __init__(self, sequence_id: _Optional[str] = ..., layer: _Optional[int] = ..., top: _Optional[int] = ..., top_spans: _Optional[int] = ...) -> None: ...

class ExplainToken(_message.Message):
    __slots__ = ("position", "weight", "how", "text", "token_id", "label")
    POSITION_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_FIELD_NUMBER: _ClassVar[int]
    HOW_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    TOKEN_ID_FIELD_NUMBER: _ClassVar[int]
    LABEL_FIELD_NUMBER: _ClassVar[int]
    position: int
    weight: float
    how: str
    text: bytes
    token_id: int
    label: str
    def __init__(self, position: _Optional[int] = ..., weight: _Optional[float] = ..., how: _Optional[str] = ..., text: _Optional[bytes] = ..., token_id: _Optional[int] = ..., label: _Optional[str] = ...) -> None: ...

class ExplainHead(_message.Message):
    __slots__ = ("query_head", "tokens", "mass_exact", "mass_read", "mass_scanned", "mass_estimated", "true_error")
    QUERY_HEAD_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    MASS_EXACT_FIELD_NUMBER: _ClassVar[int]
    MASS_READ_FIELD_NUMBER: _ClassVar[int]
    MASS_SCANNED_FIELD_NUMBER: _ClassVar[int]
    MASS_ESTIMATED_FIELD_NUMBER: _ClassVar[int]
    TRUE_ERROR_FIELD_NUMBER: _ClassVar[int]
    query_head: int
    tokens: _containers.RepeatedCompositeFieldContainer[ExplainToken]
    mass_exact: float
    mass_read: float
    mass_scanned: float
    mass_estimated: float
    true_error: float
    def __init__(self, query_head: _Optional[int] = ..., tokens: _Optional[_Iterable[_Union[ExplainToken, _Mapping]]] = ..., mass_exact: _Optional[float] = ..., mass_read: _Optional[float] = ..., mass_scanned: _Optional[float] = ..., mass_estimated: _Optional[float] = ..., true_error: _Optional[float] = ...) -> None: ...

class ExplainSpan(_message.Message):
    __slots__ = ("span", "mass", "head_mass", "mass_exact", "mass_read", "mass_scanned", "mass_estimated")
    SPAN_FIELD_NUMBER: _ClassVar[int]
    MASS_FIELD_NUMBER: _ClassVar[int]
    HEAD_MASS_FIELD_NUMBER: _ClassVar[int]
    MASS_EXACT_FIELD_NUMBER: _ClassVar[int]
    MASS_READ_FIELD_NUMBER: _ClassVar[int]
    MASS_SCANNED_FIELD_NUMBER: _ClassVar[int]
    MASS_ESTIMATED_FIELD_NUMBER: _ClassVar[int]
    span: _types_pb2.Span
    mass: float
    head_mass: _containers.RepeatedScalarFieldContainer[float]
    mass_exact: float
    mass_read: float
    mass_scanned: float
    mass_estimated: float
    def __init__(self, span: _Optional[_Union[_types_pb2.Span, _Mapping]] = ..., mass: _Optional[float] = ..., head_mass: _Optional[_Iterable[float]] = ..., mass_exact: _Optional[float] = ..., mass_read: _Optional[float] = ..., mass_scanned: _Optional[float] = ..., mass_estimated: _Optional[float] = ...) -> None: ...

class ExplainResponse(_message.Message):
    __slots__ = ("position", "account", "pages_total", "pages_scored", "leaves_scored", "leaves_scanned", "leaves_refined", "values_read", "heads", "spans", "mass_unlabelled")
    POSITION_FIELD_NUMBER: _ClassVar[int]
    ACCOUNT_FIELD_NUMBER: _ClassVar[int]
    PAGES_TOTAL_FIELD_NUMBER: _ClassVar[int]
    PAGES_SCORED_FIELD_NUMBER: _ClassVar[int]
    LEAVES_SCORED_FIELD_NUMBER: _ClassVar[int]
    LEAVES_SCANNED_FIELD_NUMBER: _ClassVar[int]
    LEAVES_REFINED_FIELD_NUMBER: _ClassVar[int]
    VALUES_READ_FIELD_NUMBER: _ClassVar[int]
    HEADS_FIELD_NUMBER: _ClassVar[int]
    SPANS_FIELD_NUMBER: _ClassVar[int]
    MASS_UNLABELLED_FIELD_NUMBER: _ClassVar[int]
    position: int
    account: _types_pb2.Account
    pages_total: int
    pages_scored: int
    leaves_scored: int
    leaves_scanned: int
    leaves_refined: int
    values_read: int
    heads: _containers.RepeatedCompositeFieldContainer[ExplainHead]
    spans: _containers.RepeatedCompositeFieldContainer[ExplainSpan]
    mass_unlabelled: float
    def __init__(self, position: _Optional[int] = ..., account: _Optional[_Union[_types_pb2.Account, _Mapping]] = ..., pages_total: _Optional[int] = ..., pages_scored: _Optional[int] = ..., leaves_scored: _Optional[int] = ..., leaves_scanned: _Optional[int] = ..., leaves_refined: _Optional[int] = ..., values_read: _Optional[int] = ..., heads: _Optional[_Iterable[_Union[ExplainHead, _Mapping]]] = ..., spans: _Optional[_Iterable[_Union[ExplainSpan, _Mapping]]] = ..., mass_unlabelled: _Optional[float] = ...) -> None: ...

class Audit(_message.Message):
    __slots__ = ("number", "sequence_id", "layer", "position", "positions", "budget", "share_read", "estimated_error", "error_p95", "true_error", "head_errors", "head_raw_errors")
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    SEQUENCE_ID_FIELD_NUMBER: _ClassVar[int]
    LAYER_FIELD_NUMBER: _ClassVar[int]
    POSITION_FIELD_NUMBER: _ClassVar[int]
    POSITIONS_FIELD_NUMBER: _ClassVar[int]
    BUDGET_FIELD_NUMBER: _ClassVar[int]
    SHARE_READ_FIELD_NUMBER: _ClassVar[int]
    ESTIMATED_ERROR_FIELD_NUMBER: _ClassVar[int]
    ERROR_P95_FIELD_NUMBER: _ClassVar[int]
    TRUE_ERROR_FIELD_NUMBER: _ClassVar[int]
    HEAD_ERRORS_FIELD_NUMBER: _ClassVar[int]
    HEAD_RAW_ERRORS_FIELD_NUMBER: _ClassVar[int]
    number: int
    sequence_id: str
    layer: int
    position: int
    positions: int
    budget: _types_pb2.Budget
    share_read: float
    estimated_error: float
    error_p95: float
    true_error: float
    head_errors: _containers.RepeatedScalarFieldContainer[float]
    head_raw_errors: _containers.RepeatedScalarFieldContainer[float]
    def __init__(self, number: _Optional[int] = ..., sequence_id: _Optional[str] = ..., layer: _Optional[int] = ..., position: _Optional[int] = ..., positions: _Optional[int] = ..., budget: _Optional[_Union[_types_pb2.Budget, _Mapping]] = ..., share_read: _Optional[float] = ..., estimated_error: _Optional[float] = ..., error_p95: _Optional[float] = ..., true_error: _Optional[float] = ..., head_errors: _Optional[_Iterable[float]] = ..., head_raw_errors: _Optional[_Iterable[float]] = ...) -> None: ...

class ListAuditsRequest(_message.Message):
    __slots__ = ("sequence_id", "after", "limit")
    SEQUENCE_ID_FIELD_NUMBER: _ClassVar[int]
    AFTER_FIELD_NUMBER: _ClassVar[int]
    LIMIT_FIELD_NUMBER: _ClassVar[int]
    sequence_id: str
    after: int
    limit: int
    def __init__(self, sequence_id: _Optional[str] = ..., after: _Optional[int] = ..., limit: _Optional[int] = ...) -> None: ...

class LayerCalibration(_message.Message):
    __slots__ = ("fingerprint", "profile", "layer", "budget", "audits", "coverage", "stated_over_true", "factor_median", "factor_p95")
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    PROFILE_FIELD_NUMBER: _ClassVar[int]
    LAYER_FIELD_NUMBER: _ClassVar[int]
    BUDGET_FIELD_NUMBER: _ClassVar[int]
    AUDITS_FIELD_NUMBER: _ClassVar[int]
    COVERAGE_FIELD_NUMBER: _ClassVar[int]
    STATED_OVER_TRUE_FIELD_NUMBER: _ClassVar[int]
    FACTOR_MEDIAN_FIELD_NUMBER: _ClassVar[int]
    FACTOR_P95_FIELD_NUMBER: _ClassVar[int]
    fingerprint: bytes
    profile: _types_pb2.Profile
    layer: int
    budget: str
    audits: int
    coverage: float
    stated_over_true: float
    factor_median: float
    factor_p95: float
    def __init__(self, fingerprint: _Optional[bytes] = ..., profile: _Optional[_Union[_types_pb2.Profile, str]] = ..., layer: _Optional[int] = ..., budget: _Optional[str] = ..., audits: _Optional[int] = ..., coverage: _Optional[float] = ..., stated_over_true: _Optional[float] = ..., factor_median: _Optional[float] = ..., factor_p95: _Optional[float] = ...) -> None: ...

class ListAuditsResponse(_message.Message):
    __slots__ = ("audits", "layers", "gpu")
    AUDITS_FIELD_NUMBER: _ClassVar[int]
    LAYERS_FIELD_NUMBER: _ClassVar[int]
    GPU_FIELD_NUMBER: _ClassVar[int]
    audits: _containers.RepeatedCompositeFieldContainer[Audit]
    layers: _containers.RepeatedCompositeFieldContainer[LayerCalibration]
    gpu: GPUAudits
    def __init__(self, audits: _Optional[_Iterable[_Union[Audit, _Mapping]]] = ..., layers: _Optional[_Iterable[_Union[LayerCalibration, _Mapping]]] = ..., gpu: _Optional[_Union[GPUAudits, _Mapping]] = ...) -> None: ...

class ResidencyRequest(_message.Message):
    __slots__ = ("sequence_id",)
    SEQUENCE_ID_FIELD_NUMBER: _ClassVar[int]
    sequence_id: str
    def __init__(self, sequence_id: _Optional[str] = ...) -> None: ...

class PlaneResidency(_message.Message):
    __slots__ = ("plane", "bytes_total", "bytes_ram", "bytes_nvme")
    PLANE_FIELD_NUMBER: _ClassVar[int]
    BYTES_TOTAL_FIELD_NUMBER: _ClassVar[int]
    BYTES_RAM_FIELD_NUMBER: _ClassVar[int]
    BYTES_NVME_FIELD_NUMBER: _ClassVar[int]
    plane: str
    bytes_total: int
    bytes_ram: int
    bytes_nvme: int
    def __init__(self, plane: _Optional[str] = ..., bytes_total: _Optional[int] = ..., bytes_ram: _Optional[int] = ..., bytes_nvme: _Optional[int] = ...) -> None: ...

class LayerResidency(_message.Message):
    __slots__ = ("layer", "ram_share")
    LAYER_FIELD_NUMBER: _ClassVar[int]
    RAM_SHARE_FIELD_NUMBER: _ClassVar[int]
    layer: int
    ram_share: _containers.RepeatedScalarFieldContainer[float]
    def __init__(self, layer: _Optional[int] = ..., ram_share: _Optional[_Iterable[float]] = ...) -> None: ...

class ResidencyResponse(_message.Message):
    __slots__ = ("planes", "layers")
    PLANES_FIELD_NUMBER: _ClassVar[int]
    LAYERS_FIELD_NUMBER: _ClassVar[int]
    planes: _containers.RepeatedCompositeFieldContainer[PlaneResidency]
    layers: _containers.RepeatedCompositeFieldContainer[LayerResidency]
    def __init__(self, planes: _Optional[_Iterable[_Union[PlaneResidency, _Mapping]]] = ..., layers: _Optional[_Iterable[_Union[LayerResidency, _Mapping]]] = ...) -> None: ...

class VerifyRequest(_message.Message):
    __slots__ = ("sequence_id",)
    SEQUENCE_ID_FIELD_NUMBER: _ClassVar[int]
    sequence_id: str
    def __init__(self, sequence_id: _Optional[str] = ...) -> None: ...

class VerifyResponse(_message.Message):
    __slots__ = ("bytes_done", "bytes_total", "segments_done", "damage", "finished")
    BYTES_DONE_FIELD_NUMBER: _ClassVar[int]
    BYTES_TOTAL_FIELD_NUMBER: _ClassVar[int]
    SEGMENTS_DONE_FIELD_NUMBER: _ClassVar[int]
    DAMAGE_FIELD_NUMBER: _ClassVar[int]
    FINISHED_FIELD_NUMBER: _ClassVar[int]
    bytes_done: int
    bytes_total: int
    segments_done: int
    damage: _containers.RepeatedScalarFieldContainer[str]
    finished: bool
    def __init__(self, bytes_done: _Optional[int] = ..., bytes_total: _Optional[int] = ..., segments_done: _Optional[int] = ..., damage: _Optional[_Iterable[str]] = ..., finished: bool = ...) -> None: ...
