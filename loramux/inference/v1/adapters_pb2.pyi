from google.protobuf import timestamp_pb2 as _timestamp_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Tier(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    TIER_UNSPECIFIED: _ClassVar[Tier]
    TIER_STORE: _ClassVar[Tier]
    TIER_HOST: _ClassVar[Tier]
    TIER_DEVICE: _ClassVar[Tier]

class Residency(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    RESIDENCY_UNSPECIFIED: _ClassVar[Residency]
    RESIDENCY_ABSENT: _ClassVar[Residency]
    RESIDENCY_LOADING: _ClassVar[Residency]
    RESIDENCY_HELD: _ClassVar[Residency]
    RESIDENCY_COPYING: _ClassVar[Residency]
    RESIDENCY_RESIDENT: _ClassVar[Residency]
TIER_UNSPECIFIED: Tier
TIER_STORE: Tier
TIER_HOST: Tier
TIER_DEVICE: Tier
RESIDENCY_UNSPECIFIED: Residency
RESIDENCY_ABSENT: Residency
RESIDENCY_LOADING: Residency
RESIDENCY_HELD: Residency
RESIDENCY_COPYING: Residency
RESIDENCY_RESIDENT: Residency

class ListAdaptersRequest(_message.Message):
    __slots__ = ("page_size", "page_token")
    PAGE_SIZE_FIELD_NUMBER: _ClassVar[int]
    PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    page_size: int
    page_token: str
    def __init__(self, page_size: _Optional[int] = ..., page_token: _Optional[str] = ...) -> None: ...

class ListAdaptersResponse(_message.Message):
    __slots__ = ("adapters", "next_page_token")
    ADAPTERS_FIELD_NUMBER: _ClassVar[int]
    NEXT_PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    adapters: _containers.RepeatedCompositeFieldContainer[AdapterState]
    next_page_token: str
    def __init__(self, adapters: _Optional[_Iterable[_Union[AdapterState, _Mapping]]] = ..., next_page_token: _Optional[str] = ...) -> None: ...

class GetAdapterRequest(_message.Message):
    __slots__ = ("name",)
    NAME_FIELD_NUMBER: _ClassVar[int]
    name: str
    def __init__(self, name: _Optional[str] = ...) -> None: ...

class GetAdapterResponse(_message.Message):
    __slots__ = ("adapter",)
    ADAPTER_FIELD_NUMBER: _ClassVar[int]
    adapter: AdapterState
    def __init__(self, adapter: _Optional[_Union[AdapterState, _Mapping]] = ...) -> None: ...

class PinAdapterRequest(_message.Message):
    __slots__ = ("name",)
    NAME_FIELD_NUMBER: _ClassVar[int]
    name: str
    def __init__(self, name: _Optional[str] = ...) -> None: ...

class PinAdapterResponse(_message.Message):
    __slots__ = ("adapter",)
    ADAPTER_FIELD_NUMBER: _ClassVar[int]
    adapter: AdapterState
    def __init__(self, adapter: _Optional[_Union[AdapterState, _Mapping]] = ...) -> None: ...

class UnpinAdapterRequest(_message.Message):
    __slots__ = ("name",)
    NAME_FIELD_NUMBER: _ClassVar[int]
    name: str
    def __init__(self, name: _Optional[str] = ...) -> None: ...

class UnpinAdapterResponse(_message.Message):
    __slots__ = ("adapter",)
    ADAPTER_FIELD_NUMBER: _ClassVar[int]
    adapter: AdapterState
    def __init__(self, adapter: _Optional[_Union[AdapterState, _Mapping]] = ...) -> None: ...

class LoadAdapterRequest(_message.Message):
    __slots__ = ("name", "path", "replace")
    NAME_FIELD_NUMBER: _ClassVar[int]
    PATH_FIELD_NUMBER: _ClassVar[int]
    REPLACE_FIELD_NUMBER: _ClassVar[int]
    name: str
    path: str
    replace: bool
    def __init__(self, name: _Optional[str] = ..., path: _Optional[str] = ..., replace: bool = ...) -> None: ...

class LoadAdapterResponse(_message.Message):
    __slots__ = ("adapter", "everywhere")
    ADAPTER_FIELD_NUMBER: _ClassVar[int]
    EVERYWHERE_FIELD_NUMBER: _ClassVar[int]
    adapter: AdapterState
    everywhere: bool
    def __init__(self, adapter: _Optional[_Union[AdapterState, _Mapping]] = ..., everywhere: bool = ...) -> None: ...

class UnloadAdapterRequest(_message.Message):
    __slots__ = ("name",)
    NAME_FIELD_NUMBER: _ClassVar[int]
    name: str
    def __init__(self, name: _Optional[str] = ...) -> None: ...

class UnloadAdapterResponse(_message.Message):
    __slots__ = ("generation",)
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    generation: int
    def __init__(self, generation: _Optional[int] = ...) -> None: ...

class RollbackReplicaRequest(_message.Message):
    __slots__ = ("to",)
    TO_FIELD_NUMBER: _ClassVar[int]
    to: int
    def __init__(self, to: _Optional[int] = ...) -> None: ...

class RollbackReplicaResponse(_message.Message):
    __slots__ = ("generation",)
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    generation: int
    def __init__(self, generation: _Optional[int] = ...) -> None: ...

class GetReplicaRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetReplicaResponse(_message.Message):
    __slots__ = ("replica",)
    REPLICA_FIELD_NUMBER: _ClassVar[int]
    replica: ReplicaState
    def __init__(self, replica: _Optional[_Union[ReplicaState, _Mapping]] = ...) -> None: ...

class WatchReplicaRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class WatchReplicaResponse(_message.Message):
    __slots__ = ("replica",)
    REPLICA_FIELD_NUMBER: _ClassVar[int]
    replica: ReplicaState
    def __init__(self, replica: _Optional[_Union[ReplicaState, _Mapping]] = ...) -> None: ...

class AdapterState(_message.Message):
    __slots__ = ("name", "digest", "resident_digest", "generation", "tier", "residency", "pinned", "in_flight", "waiting", "bytes", "last_used", "last_failure", "only_here", "kinds")
    NAME_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    RESIDENT_DIGEST_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    TIER_FIELD_NUMBER: _ClassVar[int]
    RESIDENCY_FIELD_NUMBER: _ClassVar[int]
    PINNED_FIELD_NUMBER: _ClassVar[int]
    IN_FLIGHT_FIELD_NUMBER: _ClassVar[int]
    WAITING_FIELD_NUMBER: _ClassVar[int]
    BYTES_FIELD_NUMBER: _ClassVar[int]
    LAST_USED_FIELD_NUMBER: _ClassVar[int]
    LAST_FAILURE_FIELD_NUMBER: _ClassVar[int]
    ONLY_HERE_FIELD_NUMBER: _ClassVar[int]
    KINDS_FIELD_NUMBER: _ClassVar[int]
    name: str
    digest: str
    resident_digest: str
    generation: int
    tier: Tier
    residency: Residency
    pinned: bool
    in_flight: int
    waiting: int
    bytes: int
    last_used: _timestamp_pb2.Timestamp
    last_failure: LoadFailure
    only_here: bool
    kinds: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, name: _Optional[str] = ..., digest: _Optional[str] = ..., resident_digest: _Optional[str] = ..., generation: _Optional[int] = ..., tier: _Optional[_Union[Tier, str]] = ..., residency: _Optional[_Union[Residency, str]] = ..., pinned: bool = ..., in_flight: _Optional[int] = ..., waiting: _Optional[int] = ..., bytes: _Optional[int] = ..., last_used: _Optional[_Union[_timestamp_pb2.Timestamp, _Mapping]] = ..., last_failure: _Optional[_Union[LoadFailure, _Mapping]] = ..., only_here: bool = ..., kinds: _Optional[_Iterable[str]] = ...) -> None: ...

class LoadFailure(_message.Message):
    __slots__ = ("reason", "message")
    REASON_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    reason: str
    message: str
    def __init__(self, reason: _Optional[str] = ..., message: _Optional[str] = ...) -> None: ...

class ReplicaState(_message.Message):
    __slots__ = ("deployment", "generation", "newest_generation", "state", "reason", "paused", "bank_bytes", "bank_bytes_used", "registered", "resident", "arriving", "pinned", "loads", "load_failures", "evictions", "start_time", "version")
    DEPLOYMENT_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    NEWEST_GENERATION_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    PAUSED_FIELD_NUMBER: _ClassVar[int]
    BANK_BYTES_FIELD_NUMBER: _ClassVar[int]
    BANK_BYTES_USED_FIELD_NUMBER: _ClassVar[int]
    REGISTERED_FIELD_NUMBER: _ClassVar[int]
    RESIDENT_FIELD_NUMBER: _ClassVar[int]
    ARRIVING_FIELD_NUMBER: _ClassVar[int]
    PINNED_FIELD_NUMBER: _ClassVar[int]
    LOADS_FIELD_NUMBER: _ClassVar[int]
    LOAD_FAILURES_FIELD_NUMBER: _ClassVar[int]
    EVICTIONS_FIELD_NUMBER: _ClassVar[int]
    START_TIME_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    deployment: str
    generation: int
    newest_generation: int
    state: str
    reason: str
    paused: bool
    bank_bytes: int
    bank_bytes_used: int
    registered: int
    resident: int
    arriving: int
    pinned: int
    loads: int
    load_failures: int
    evictions: int
    start_time: _timestamp_pb2.Timestamp
    version: str
    def __init__(self, deployment: _Optional[str] = ..., generation: _Optional[int] = ..., newest_generation: _Optional[int] = ..., state: _Optional[str] = ..., reason: _Optional[str] = ..., paused: bool = ..., bank_bytes: _Optional[int] = ..., bank_bytes_used: _Optional[int] = ..., registered: _Optional[int] = ..., resident: _Optional[int] = ..., arriving: _Optional[int] = ..., pinned: _Optional[int] = ..., loads: _Optional[int] = ..., load_failures: _Optional[int] = ..., evictions: _Optional[int] = ..., start_time: _Optional[_Union[_timestamp_pb2.Timestamp, _Mapping]] = ..., version: _Optional[str] = ...) -> None: ...
