from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class ElementType(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    ELEMENT_TYPE_UNSPECIFIED: _ClassVar[ElementType]
    ELEMENT_TYPE_F32: _ClassVar[ElementType]
    ELEMENT_TYPE_BF16: _ClassVar[ElementType]
    ELEMENT_TYPE_F16: _ClassVar[ElementType]

class Profile(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    PROFILE_UNSPECIFIED: _ClassVar[Profile]
    PROFILE_EXACT: _ClassVar[Profile]
    PROFILE_NEUTRAL: _ClassVar[Profile]
    PROFILE_BALANCED: _ClassVar[Profile]

class SpanKind(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    SPAN_KIND_UNSPECIFIED: _ClassVar[SpanKind]
    SPAN_KIND_TEXT: _ClassVar[SpanKind]
    SPAN_KIND_FILE: _ClassVar[SpanKind]
    SPAN_KIND_IMAGE: _ClassVar[SpanKind]
    SPAN_KIND_VIDEO: _ClassVar[SpanKind]

class AttendMode(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    ATTEND_MODE_UNSPECIFIED: _ClassVar[AttendMode]
    ATTEND_MODE_EXACT: _ClassVar[AttendMode]
    ATTEND_MODE_BUDGET: _ClassVar[AttendMode]
    ATTEND_MODE_TARGET: _ClassVar[AttendMode]
ELEMENT_TYPE_UNSPECIFIED: ElementType
ELEMENT_TYPE_F32: ElementType
ELEMENT_TYPE_BF16: ElementType
ELEMENT_TYPE_F16: ElementType
PROFILE_UNSPECIFIED: Profile
PROFILE_EXACT: Profile
PROFILE_NEUTRAL: Profile
PROFILE_BALANCED: Profile
SPAN_KIND_UNSPECIFIED: SpanKind
SPAN_KIND_TEXT: SpanKind
SPAN_KIND_FILE: SpanKind
SPAN_KIND_IMAGE: SpanKind
SPAN_KIND_VIDEO: SpanKind
ATTEND_MODE_UNSPECIFIED: AttendMode
ATTEND_MODE_EXACT: AttendMode
ATTEND_MODE_BUDGET: AttendMode
ATTEND_MODE_TARGET: AttendMode

class LayerKind(_message.Message):
    __slots__ = ("sliding_window",)
    SLIDING_WINDOW_FIELD_NUMBER: _ClassVar[int]
    sliding_window: int
    def __init__(self, sliding_window: _Optional[int] = ...) -> None: ...

class ModelSpec(_message.Message):
    __slots__ = ("layers", "query_heads", "kv_heads", "head_dim", "layer_kinds", "scale", "softcap", "sink_logits", "kv_dtype", "fingerprint")
    LAYERS_FIELD_NUMBER: _ClassVar[int]
    QUERY_HEADS_FIELD_NUMBER: _ClassVar[int]
    KV_HEADS_FIELD_NUMBER: _ClassVar[int]
    HEAD_DIM_FIELD_NUMBER: _ClassVar[int]
    LAYER_KINDS_FIELD_NUMBER: _ClassVar[int]
    SCALE_FIELD_NUMBER: _ClassVar[int]
    SOFTCAP_FIELD_NUMBER: _ClassVar[int]
    SINK_LOGITS_FIELD_NUMBER: _ClassVar[int]
    KV_DTYPE_FIELD_NUMBER: _ClassVar[int]
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    layers: int
    query_heads: int
    kv_heads: int
    head_dim: int
    layer_kinds: _containers.RepeatedCompositeFieldContainer[LayerKind]
    scale: float
    softcap: float
    sink_logits: _containers.RepeatedScalarFieldContainer[float]
    kv_dtype: ElementType
    fingerprint: bytes
    def __init__(self, layers: _Optional[int] = ..., query_heads: _Optional[int] = ..., kv_heads: _Optional[int] = ..., head_dim: _Optional[int] = ..., layer_kinds: _Optional[_Iterable[_Union[LayerKind, _Mapping]]] = ..., scale: _Optional[float] = ..., softcap: _Optional[float] = ..., sink_logits: _Optional[_Iterable[float]] = ..., kv_dtype: _Optional[_Union[ElementType, str]] = ..., fingerprint: _Optional[bytes] = ...) -> None: ...

class Span(_message.Message):
    __slots__ = ("start", "end", "kind", "label")
    START_FIELD_NUMBER: _ClassVar[int]
    END_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    LABEL_FIELD_NUMBER: _ClassVar[int]
    start: int
    end: int
    kind: SpanKind
    label: str
    def __init__(self, start: _Optional[int] = ..., end: _Optional[int] = ..., kind: _Optional[_Union[SpanKind, str]] = ..., label: _Optional[str] = ...) -> None: ...

class Ack(_message.Message):
    __slots__ = ("accepted", "crash_safe", "power_safe", "sealed")
    ACCEPTED_FIELD_NUMBER: _ClassVar[int]
    CRASH_SAFE_FIELD_NUMBER: _ClassVar[int]
    POWER_SAFE_FIELD_NUMBER: _ClassVar[int]
    SEALED_FIELD_NUMBER: _ClassVar[int]
    accepted: int
    crash_safe: int
    power_safe: int
    sealed: int
    def __init__(self, accepted: _Optional[int] = ..., crash_safe: _Optional[int] = ..., power_safe: _Optional[int] = ..., sealed: _Optional[int] = ...) -> None: ...

class Budget(_message.Message):
    __slots__ = ("mode", "share", "tokens", "target_error", "read_wait_us")
    MODE_FIELD_NUMBER: _ClassVar[int]
    SHARE_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    TARGET_ERROR_FIELD_NUMBER: _ClassVar[int]
    READ_WAIT_US_FIELD_NUMBER: _ClassVar[int]
    mode: AttendMode
    share: float
    tokens: int
    target_error: float
    read_wait_us: int
    def __init__(self, mode: _Optional[_Union[AttendMode, str]] = ..., share: _Optional[float] = ..., tokens: _Optional[int] = ..., target_error: _Optional[float] = ..., read_wait_us: _Optional[int] = ...) -> None: ...

class Account(_message.Message):
    __slots__ = ("tokens_exact", "tokens_scanned", "tokens_read", "tokens_estimated", "bytes_ram", "bytes_nvme", "bytes_full", "bytes_exact_zone", "estimated_error", "codec_error", "ns_score", "ns_scan", "ns_fetch", "ns_exact_zone", "ns_total", "mode", "error_p95", "calibration_audits", "target_missed", "bytes_gpu", "tokens_late", "bytes_late")
    TOKENS_EXACT_FIELD_NUMBER: _ClassVar[int]
    TOKENS_SCANNED_FIELD_NUMBER: _ClassVar[int]
    TOKENS_READ_FIELD_NUMBER: _ClassVar[int]
    TOKENS_ESTIMATED_FIELD_NUMBER: _ClassVar[int]
    BYTES_RAM_FIELD_NUMBER: _ClassVar[int]
    BYTES_NVME_FIELD_NUMBER: _ClassVar[int]
    BYTES_FULL_FIELD_NUMBER: _ClassVar[int]
    BYTES_EXACT_ZONE_FIELD_NUMBER: _ClassVar[int]
    ESTIMATED_ERROR_FIELD_NUMBER: _ClassVar[int]
    CODEC_ERROR_FIELD_NUMBER: _ClassVar[int]
    NS_SCORE_FIELD_NUMBER: _ClassVar[int]
    NS_SCAN_FIELD_NUMBER: _ClassVar[int]
    NS_FETCH_FIELD_NUMBER: _ClassVar[int]
    NS_EXACT_ZONE_FIELD_NUMBER: _ClassVar[int]
    NS_TOTAL_FIELD_NUMBER: _ClassVar[int]
    MODE_FIELD_NUMBER: _ClassVar[int]
    ERROR_P95_FIELD_NUMBER: _ClassVar[int]
    CALIBRATION_AUDITS_FIELD_NUMBER: _ClassVar[int]
    TARGET_MISSED_FIELD_NUMBER: _ClassVar[int]
    BYTES_GPU_FIELD_NUMBER: _ClassVar[int]
    TOKENS_LATE_FIELD_NUMBER: _ClassVar[int]
    BYTES_LATE_FIELD_NUMBER: _ClassVar[int]
    tokens_exact: int
    tokens_scanned: int
    tokens_read: int
    tokens_estimated: int
    bytes_ram: int
    bytes_nvme: int
    bytes_full: int
    bytes_exact_zone: int
    estimated_error: float
    codec_error: float
    ns_score: int
    ns_scan: int
    ns_fetch: int
    ns_exact_zone: int
    ns_total: int
    mode: AttendMode
    error_p95: float
    calibration_audits: int
    target_missed: bool
    bytes_gpu: int
    tokens_late: int
    bytes_late: int
    def __init__(self, tokens_exact: _Optional[int] = ..., tokens_scanned: _Optional[int] = ..., tokens_read: _Optional[int] = ..., tokens_estimated: _Optional[int] = ..., bytes_ram: _Optional[int] = ..., bytes_nvme: _Optional[int] = ..., bytes_full: _Optional[int] = ..., bytes_exact_zone: _Optional[int] = ..., estimated_error: _Optional[float] = ..., codec_error: _Optional[float] = ..., ns_score: _Optional[int] = ..., ns_scan: _Optional[int] = ..., ns_fetch: _Optional[int] = ..., ns_exact_zone: _Optional[int] = ..., ns_total: _Optional[int] = ..., mode: _Optional[_Union[AttendMode, str]] = ..., error_p95: _Optional[float] = ..., calibration_audits: _Optional[int] = ..., target_missed: bool = ..., bytes_gpu: _Optional[int] = ..., tokens_late: _Optional[int] = ..., bytes_late: _Optional[int] = ...) -> None: ...
