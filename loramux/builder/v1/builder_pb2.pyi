from google.protobuf import timestamp_pb2 as _timestamp_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class SourceKind(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    SOURCE_KIND_UNSPECIFIED: _ClassVar[SourceKind]
    SOURCE_KIND_HF: _ClassVar[SourceKind]
    SOURCE_KIND_S3: _ClassVar[SourceKind]
    SOURCE_KIND_GCS: _ClassVar[SourceKind]
    SOURCE_KIND_AZURE: _ClassVar[SourceKind]
    SOURCE_KIND_REMOTE_URL: _ClassVar[SourceKind]
    SOURCE_KIND_LOCAL: _ClassVar[SourceKind]
    SOURCE_KIND_PUSHED: _ClassVar[SourceKind]
    SOURCE_KIND_OCI: _ClassVar[SourceKind]
    SOURCE_KIND_MLFLOW: _ClassVar[SourceKind]
    SOURCE_KIND_BY_SCHEME: _ClassVar[SourceKind]

class Dtype(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    DTYPE_UNSPECIFIED: _ClassVar[Dtype]
    DTYPE_BFLOAT16: _ClassVar[Dtype]
    DTYPE_FLOAT16: _ClassVar[Dtype]
    DTYPE_FLOAT32: _ClassVar[Dtype]

class Merge(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    MERGE_UNSPECIFIED: _ClassVar[Merge]
    MERGE_NEVER: _ClassVar[Merge]
    MERGE_ALWAYS: _ClassVar[Merge]

class Quantization(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    QUANTIZATION_UNSPECIFIED: _ClassVar[Quantization]
    QUANTIZATION_FP8: _ClassVar[Quantization]
    QUANTIZATION_INT8: _ClassVar[Quantization]
    QUANTIZATION_INT4: _ClassVar[Quantization]
SOURCE_KIND_UNSPECIFIED: SourceKind
SOURCE_KIND_HF: SourceKind
SOURCE_KIND_S3: SourceKind
SOURCE_KIND_GCS: SourceKind
SOURCE_KIND_AZURE: SourceKind
SOURCE_KIND_REMOTE_URL: SourceKind
SOURCE_KIND_LOCAL: SourceKind
SOURCE_KIND_PUSHED: SourceKind
SOURCE_KIND_OCI: SourceKind
SOURCE_KIND_MLFLOW: SourceKind
SOURCE_KIND_BY_SCHEME: SourceKind
DTYPE_UNSPECIFIED: Dtype
DTYPE_BFLOAT16: Dtype
DTYPE_FLOAT16: Dtype
DTYPE_FLOAT32: Dtype
MERGE_UNSPECIFIED: Merge
MERGE_NEVER: Merge
MERGE_ALWAYS: Merge
QUANTIZATION_UNSPECIFIED: Quantization
QUANTIZATION_FP8: Quantization
QUANTIZATION_INT8: Quantization
QUANTIZATION_INT4: Quantization

class Repository(_message.Message):
    __slots__ = ("source", "repo", "revision", "subfolder", "runtime_secret_name", "branches_only")
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    REPO_FIELD_NUMBER: _ClassVar[int]
    REVISION_FIELD_NUMBER: _ClassVar[int]
    SUBFOLDER_FIELD_NUMBER: _ClassVar[int]
    RUNTIME_SECRET_NAME_FIELD_NUMBER: _ClassVar[int]
    BRANCHES_ONLY_FIELD_NUMBER: _ClassVar[int]
    source: SourceKind
    repo: str
    revision: str
    subfolder: str
    runtime_secret_name: str
    branches_only: bool
    def __init__(self, source: _Optional[_Union[SourceKind, str]] = ..., repo: _Optional[str] = ..., revision: _Optional[str] = ..., subfolder: _Optional[str] = ..., runtime_secret_name: _Optional[str] = ..., branches_only: bool = ...) -> None: ...

class Adapter(_message.Message):
    __slots__ = ("name", "repository")
    NAME_FIELD_NUMBER: _ClassVar[int]
    REPOSITORY_FIELD_NUMBER: _ClassVar[int]
    name: str
    repository: Repository
    def __init__(self, name: _Optional[str] = ..., repository: _Optional[_Union[Repository, _Mapping]] = ...) -> None: ...

class DeploymentSpec(_message.Message):
    __slots__ = ("model_name", "base", "adapters", "max_seq_len", "max_lora_rank", "lora_target_modules", "served_model_name", "request_default_max_tokens", "lora_dtype", "truncate_to_rank", "prove", "hide_base", "merge", "aliases", "default_limits", "model_limits", "speculative_tokens", "quantization", "signed_by", "base_signed_by", "tool_parser", "reasoning_parser", "pooling", "resolve", "tensor_parallel_count", "speculator")
    class ModelLimitsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: Limits
        def __init__(self, key: _Optional[str] = ..., value: _Optional[_Union[Limits, _Mapping]] = ...) -> None: ...
    MODEL_NAME_FIELD_NUMBER: _ClassVar[int]
    BASE_FIELD_NUMBER: _ClassVar[int]
    ADAPTERS_FIELD_NUMBER: _ClassVar[int]
    MAX_SEQ_LEN_FIELD_NUMBER: _ClassVar[int]
    MAX_LORA_RANK_FIELD_NUMBER: _ClassVar[int]
    LORA_TARGET_MODULES_FIELD_NUMBER: _ClassVar[int]
    SERVED_MODEL_NAME_FIELD_NUMBER: _ClassVar[int]
    REQUEST_DEFAULT_MAX_TOKENS_FIELD_NUMBER: _ClassVar[int]
    LORA_DTYPE_FIELD_NUMBER: _ClassVar[int]
    TRUNCATE_TO_RANK_FIELD_NUMBER: _ClassVar[int]
    PROVE_FIELD_NUMBER: _ClassVar[int]
    HIDE_BASE_FIELD_NUMBER: _ClassVar[int]
    MERGE_FIELD_NUMBER: _ClassVar[int]
    ALIASES_FIELD_NUMBER: _ClassVar[int]
    DEFAULT_LIMITS_FIELD_NUMBER: _ClassVar[int]
    MODEL_LIMITS_FIELD_NUMBER: _ClassVar[int]
    SPECULATIVE_TOKENS_FIELD_NUMBER: _ClassVar[int]
    QUANTIZATION_FIELD_NUMBER: _ClassVar[int]
    SIGNED_BY_FIELD_NUMBER: _ClassVar[int]
    BASE_SIGNED_BY_FIELD_NUMBER: _ClassVar[int]
    TOOL_PARSER_FIELD_NUMBER: _ClassVar[int]
    REASONING_PARSER_FIELD_NUMBER: _ClassVar[int]
    POOLING_FIELD_NUMBER: _ClassVar[int]
    RESOLVE_FIELD_NUMBER: _ClassVar[int]
    TENSOR_PARALLEL_COUNT_FIELD_NUMBER: _ClassVar[int]
    SPECULATOR_FIELD_NUMBER: _ClassVar[int]
    model_name: str
    base: Repository
    adapters: _containers.RepeatedCompositeFieldContainer[Adapter]
    max_seq_len: int
    max_lora_rank: int
    lora_target_modules: _containers.RepeatedScalarFieldContainer[str]
    served_model_name: str
    request_default_max_tokens: int
    lora_dtype: Dtype
    truncate_to_rank: int
    prove: bool
    hide_base: bool
    merge: Merge
    aliases: _containers.RepeatedCompositeFieldContainer[Alias]
    default_limits: Limits
    model_limits: _containers.MessageMap[str, Limits]
    speculative_tokens: int
    quantization: Quantization
    signed_by: _containers.RepeatedScalarFieldContainer[str]
    base_signed_by: _containers.RepeatedScalarFieldContainer[str]
    tool_parser: str
    reasoning_parser: str
    pooling: str
    resolve: Resolve
    tensor_parallel_count: int
    speculator: Speculator
    def __init__(self, model_name: _Optional[str] = ..., base: _Optional[_Union[Repository, _Mapping]] = ..., adapters: _Optional[_Iterable[_Union[Adapter, _Mapping]]] = ..., max_seq_len: _Optional[int] = ..., max_lora_rank: _Optional[int] = ..., lora_target_modules: _Optional[_Iterable[str]] = ..., served_model_name: _Optional[str] = ..., request_default_max_tokens: _Optional[int] = ..., lora_dtype: _Optional[_Union[Dtype, str]] = ..., truncate_to_rank: _Optional[int] = ..., prove: bool = ..., hide_base: bool = ..., merge: _Optional[_Union[Merge, str]] = ..., aliases: _Optional[_Iterable[_Union[Alias, _Mapping]]] = ..., default_limits: _Optional[_Union[Limits, _Mapping]] = ..., model_limits: _Optional[_Mapping[str, Limits]] = ..., speculative_tokens: _Optional[int] = ..., quantization: _Optional[_Union[Quantization, str]] = ..., signed_by: _Optional[_Iterable[str]] = ..., base_signed_by: _Optional[_Iterable[str]] = ..., tool_parser: _Optional[str] = ..., reasoning_parser: _Optional[str] = ..., pooling: _Optional[str] = ..., resolve: _Optional[_Union[Resolve, _Mapping]] = ..., tensor_parallel_count: _Optional[int] = ..., speculator: _Optional[_Union[Speculator, _Mapping]] = ...) -> None: ...

class Speculator(_message.Message):
    __slots__ = ("model", "tokens")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    model: Repository
    tokens: int
    def __init__(self, model: _Optional[_Union[Repository, _Mapping]] = ..., tokens: _Optional[int] = ...) -> None: ...

class Resolve(_message.Message):
    __slots__ = ("sources", "max_adapters", "idle_hours", "runtime_secret_name")
    SOURCES_FIELD_NUMBER: _ClassVar[int]
    MAX_ADAPTERS_FIELD_NUMBER: _ClassVar[int]
    IDLE_HOURS_FIELD_NUMBER: _ClassVar[int]
    RUNTIME_SECRET_NAME_FIELD_NUMBER: _ClassVar[int]
    sources: _containers.RepeatedScalarFieldContainer[str]
    max_adapters: int
    idle_hours: float
    runtime_secret_name: str
    def __init__(self, sources: _Optional[_Iterable[str]] = ..., max_adapters: _Optional[int] = ..., idle_hours: _Optional[float] = ..., runtime_secret_name: _Optional[str] = ...) -> None: ...

class Alias(_message.Message):
    __slots__ = ("name", "weights")
    class WeightsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    NAME_FIELD_NUMBER: _ClassVar[int]
    WEIGHTS_FIELD_NUMBER: _ClassVar[int]
    name: str
    weights: _containers.ScalarMap[str, int]
    def __init__(self, name: _Optional[str] = ..., weights: _Optional[_Mapping[str, int]] = ...) -> None: ...

class Limits(_message.Message):
    __slots__ = ("weight", "max_running", "max_waiting", "tokens_per_minute")
    WEIGHT_FIELD_NUMBER: _ClassVar[int]
    MAX_RUNNING_FIELD_NUMBER: _ClassVar[int]
    MAX_WAITING_FIELD_NUMBER: _ClassVar[int]
    TOKENS_PER_MINUTE_FIELD_NUMBER: _ClassVar[int]
    weight: float
    max_running: int
    max_waiting: int
    tokens_per_minute: int
    def __init__(self, weight: _Optional[float] = ..., max_running: _Optional[int] = ..., max_waiting: _Optional[int] = ..., tokens_per_minute: _Optional[int] = ...) -> None: ...

class BuildDeploymentRequest(_message.Message):
    __slots__ = ("deployment", "request_id", "verify", "exact")
    DEPLOYMENT_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    VERIFY_FIELD_NUMBER: _ClassVar[int]
    EXACT_FIELD_NUMBER: _ClassVar[int]
    deployment: DeploymentSpec
    request_id: str
    verify: bool
    exact: bool
    def __init__(self, deployment: _Optional[_Union[DeploymentSpec, _Mapping]] = ..., request_id: _Optional[str] = ..., verify: bool = ..., exact: bool = ...) -> None: ...

class BuildDeploymentResponse(_message.Message):
    __slots__ = ("deployment",)
    DEPLOYMENT_FIELD_NUMBER: _ClassVar[int]
    deployment: Deployment
    def __init__(self, deployment: _Optional[_Union[Deployment, _Mapping]] = ...) -> None: ...

class UpdateDeploymentRequest(_message.Message):
    __slots__ = ("name", "add", "remove", "expected_generation", "request_id", "must_be_new")
    NAME_FIELD_NUMBER: _ClassVar[int]
    ADD_FIELD_NUMBER: _ClassVar[int]
    REMOVE_FIELD_NUMBER: _ClassVar[int]
    EXPECTED_GENERATION_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    MUST_BE_NEW_FIELD_NUMBER: _ClassVar[int]
    name: str
    add: _containers.RepeatedCompositeFieldContainer[Adapter]
    remove: _containers.RepeatedScalarFieldContainer[str]
    expected_generation: int
    request_id: str
    must_be_new: bool
    def __init__(self, name: _Optional[str] = ..., add: _Optional[_Iterable[_Union[Adapter, _Mapping]]] = ..., remove: _Optional[_Iterable[str]] = ..., expected_generation: _Optional[int] = ..., request_id: _Optional[str] = ..., must_be_new: bool = ...) -> None: ...

class UpdateDeploymentResponse(_message.Message):
    __slots__ = ("deployment",)
    DEPLOYMENT_FIELD_NUMBER: _ClassVar[int]
    deployment: Deployment
    def __init__(self, deployment: _Optional[_Union[Deployment, _Mapping]] = ...) -> None: ...

class RollbackDeploymentRequest(_message.Message):
    __slots__ = ("name", "to", "expected_generation")
    NAME_FIELD_NUMBER: _ClassVar[int]
    TO_FIELD_NUMBER: _ClassVar[int]
    EXPECTED_GENERATION_FIELD_NUMBER: _ClassVar[int]
    name: str
    to: int
    expected_generation: int
    def __init__(self, name: _Optional[str] = ..., to: _Optional[int] = ..., expected_generation: _Optional[int] = ...) -> None: ...

class RollbackDeploymentResponse(_message.Message):
    __slots__ = ("generation", "unchanged", "restored")
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    UNCHANGED_FIELD_NUMBER: _ClassVar[int]
    RESTORED_FIELD_NUMBER: _ClassVar[int]
    generation: int
    unchanged: bool
    restored: int
    def __init__(self, generation: _Optional[int] = ..., unchanged: bool = ..., restored: _Optional[int] = ...) -> None: ...

class ListGenerationsRequest(_message.Message):
    __slots__ = ("name", "page_size", "page_token")
    NAME_FIELD_NUMBER: _ClassVar[int]
    PAGE_SIZE_FIELD_NUMBER: _ClassVar[int]
    PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    name: str
    page_size: int
    page_token: str
    def __init__(self, name: _Optional[str] = ..., page_size: _Optional[int] = ..., page_token: _Optional[str] = ...) -> None: ...

class ListGenerationsResponse(_message.Message):
    __slots__ = ("generations", "next_page_token")
    GENERATIONS_FIELD_NUMBER: _ClassVar[int]
    NEXT_PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    generations: _containers.RepeatedCompositeFieldContainer[Generation]
    next_page_token: str
    def __init__(self, generations: _Optional[_Iterable[_Union[Generation, _Mapping]]] = ..., next_page_token: _Optional[str] = ...) -> None: ...

class Generation(_message.Message):
    __slots__ = ("number", "create_time", "served", "adapters", "changes", "change_count", "other_settings", "damage")
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    CREATE_TIME_FIELD_NUMBER: _ClassVar[int]
    SERVED_FIELD_NUMBER: _ClassVar[int]
    ADAPTERS_FIELD_NUMBER: _ClassVar[int]
    CHANGES_FIELD_NUMBER: _ClassVar[int]
    CHANGE_COUNT_FIELD_NUMBER: _ClassVar[int]
    OTHER_SETTINGS_FIELD_NUMBER: _ClassVar[int]
    DAMAGE_FIELD_NUMBER: _ClassVar[int]
    number: int
    create_time: _timestamp_pb2.Timestamp
    served: bool
    adapters: int
    changes: _containers.RepeatedCompositeFieldContainer[AdapterChange]
    change_count: int
    other_settings: bool
    damage: str
    def __init__(self, number: _Optional[int] = ..., create_time: _Optional[_Union[_timestamp_pb2.Timestamp, _Mapping]] = ..., served: bool = ..., adapters: _Optional[int] = ..., changes: _Optional[_Iterable[_Union[AdapterChange, _Mapping]]] = ..., change_count: _Optional[int] = ..., other_settings: bool = ..., damage: _Optional[str] = ...) -> None: ...

class AdapterChange(_message.Message):
    __slots__ = ("name", "digest", "digest_before")
    NAME_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    DIGEST_BEFORE_FIELD_NUMBER: _ClassVar[int]
    name: str
    digest: str
    digest_before: str
    def __init__(self, name: _Optional[str] = ..., digest: _Optional[str] = ..., digest_before: _Optional[str] = ...) -> None: ...

class PutAdapterRequest(_message.Message):
    __slots__ = ("upload", "chunk")
    UPLOAD_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    upload: AdapterUpload
    chunk: FileChunk
    def __init__(self, upload: _Optional[_Union[AdapterUpload, _Mapping]] = ..., chunk: _Optional[_Union[FileChunk, _Mapping]] = ...) -> None: ...

class AdapterUpload(_message.Message):
    __slots__ = ("deployment", "name", "config", "expected_generation", "other_files")
    DEPLOYMENT_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    CONFIG_FIELD_NUMBER: _ClassVar[int]
    EXPECTED_GENERATION_FIELD_NUMBER: _ClassVar[int]
    OTHER_FILES_FIELD_NUMBER: _ClassVar[int]
    deployment: str
    name: str
    config: bytes
    expected_generation: int
    other_files: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, deployment: _Optional[str] = ..., name: _Optional[str] = ..., config: _Optional[bytes] = ..., expected_generation: _Optional[int] = ..., other_files: _Optional[_Iterable[str]] = ...) -> None: ...

class FileChunk(_message.Message):
    __slots__ = ("file", "data")
    FILE_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    file: str
    data: bytes
    def __init__(self, file: _Optional[str] = ..., data: _Optional[bytes] = ...) -> None: ...

class PutAdapterResponse(_message.Message):
    __slots__ = ("digest", "generation", "unchanged", "adapter")
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    UNCHANGED_FIELD_NUMBER: _ClassVar[int]
    ADAPTER_FIELD_NUMBER: _ClassVar[int]
    digest: str
    generation: int
    unchanged: bool
    adapter: AdapterBuild
    def __init__(self, digest: _Optional[str] = ..., generation: _Optional[int] = ..., unchanged: bool = ..., adapter: _Optional[_Union[AdapterBuild, _Mapping]] = ...) -> None: ...

class GetDeploymentRequest(_message.Message):
    __slots__ = ("name",)
    NAME_FIELD_NUMBER: _ClassVar[int]
    name: str
    def __init__(self, name: _Optional[str] = ...) -> None: ...

class GetDeploymentResponse(_message.Message):
    __slots__ = ("deployment",)
    DEPLOYMENT_FIELD_NUMBER: _ClassVar[int]
    deployment: Deployment
    def __init__(self, deployment: _Optional[_Union[Deployment, _Mapping]] = ...) -> None: ...

class ListDeploymentsRequest(_message.Message):
    __slots__ = ("page_size", "page_token")
    PAGE_SIZE_FIELD_NUMBER: _ClassVar[int]
    PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    page_size: int
    page_token: str
    def __init__(self, page_size: _Optional[int] = ..., page_token: _Optional[str] = ...) -> None: ...

class ListDeploymentsResponse(_message.Message):
    __slots__ = ("deployments", "next_page_token")
    DEPLOYMENTS_FIELD_NUMBER: _ClassVar[int]
    NEXT_PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    deployments: _containers.RepeatedCompositeFieldContainer[Deployment]
    next_page_token: str
    def __init__(self, deployments: _Optional[_Iterable[_Union[Deployment, _Mapping]]] = ..., next_page_token: _Optional[str] = ...) -> None: ...

class WatchDeploymentRequest(_message.Message):
    __slots__ = ("name", "changes_only", "follow", "request_id")
    NAME_FIELD_NUMBER: _ClassVar[int]
    CHANGES_ONLY_FIELD_NUMBER: _ClassVar[int]
    FOLLOW_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    name: str
    changes_only: bool
    follow: bool
    request_id: str
    def __init__(self, name: _Optional[str] = ..., changes_only: bool = ..., follow: bool = ..., request_id: _Optional[str] = ...) -> None: ...

class WatchDeploymentResponse(_message.Message):
    __slots__ = ("deployment",)
    DEPLOYMENT_FIELD_NUMBER: _ClassVar[int]
    deployment: Deployment
    def __init__(self, deployment: _Optional[_Union[Deployment, _Mapping]] = ...) -> None: ...

class CancelBuildRequest(_message.Message):
    __slots__ = ("name",)
    NAME_FIELD_NUMBER: _ClassVar[int]
    name: str
    def __init__(self, name: _Optional[str] = ...) -> None: ...

class CancelBuildResponse(_message.Message):
    __slots__ = ("deployment",)
    DEPLOYMENT_FIELD_NUMBER: _ClassVar[int]
    deployment: Deployment
    def __init__(self, deployment: _Optional[_Union[Deployment, _Mapping]] = ...) -> None: ...

class Deployment(_message.Message):
    __slots__ = ("name", "state", "generation", "create_time", "update_time", "adapters", "failure", "unchanged")
    class State(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        STATE_UNSPECIFIED: _ClassVar[Deployment.State]
        STATE_BUILDING: _ClassVar[Deployment.State]
        STATE_ACTIVE: _ClassVar[Deployment.State]
        STATE_FAILED: _ClassVar[Deployment.State]
    STATE_UNSPECIFIED: Deployment.State
    STATE_BUILDING: Deployment.State
    STATE_ACTIVE: Deployment.State
    STATE_FAILED: Deployment.State
    NAME_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    CREATE_TIME_FIELD_NUMBER: _ClassVar[int]
    UPDATE_TIME_FIELD_NUMBER: _ClassVar[int]
    ADAPTERS_FIELD_NUMBER: _ClassVar[int]
    FAILURE_FIELD_NUMBER: _ClassVar[int]
    UNCHANGED_FIELD_NUMBER: _ClassVar[int]
    name: str
    state: Deployment.State
    generation: int
    create_time: _timestamp_pb2.Timestamp
    update_time: _timestamp_pb2.Timestamp
    adapters: _containers.RepeatedCompositeFieldContainer[AdapterBuild]
    failure: Failure
    unchanged: bool
    def __init__(self, name: _Optional[str] = ..., state: _Optional[_Union[Deployment.State, str]] = ..., generation: _Optional[int] = ..., create_time: _Optional[_Union[_timestamp_pb2.Timestamp, _Mapping]] = ..., update_time: _Optional[_Union[_timestamp_pb2.Timestamp, _Mapping]] = ..., adapters: _Optional[_Iterable[_Union[AdapterBuild, _Mapping]]] = ..., failure: _Optional[_Union[Failure, _Mapping]] = ..., unchanged: bool = ...) -> None: ...

class AdapterBuild(_message.Message):
    __slots__ = ("name", "stage", "bytes_done", "bytes_total", "digest", "ranks", "modules", "tensors_used", "bundle_bytes", "warnings", "reused", "repaired", "kept", "kinds", "added")
    class Stage(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        STAGE_UNSPECIFIED: _ClassVar[AdapterBuild.Stage]
        STAGE_WAITING: _ClassVar[AdapterBuild.Stage]
        STAGE_FETCHING: _ClassVar[AdapterBuild.Stage]
        STAGE_VALIDATING: _ClassVar[AdapterBuild.Stage]
        STAGE_CONVERTING: _ClassVar[AdapterBuild.Stage]
        STAGE_PUBLISHING: _ClassVar[AdapterBuild.Stage]
        STAGE_DONE: _ClassVar[AdapterBuild.Stage]
        STAGE_REFUSED: _ClassVar[AdapterBuild.Stage]
        STAGE_PROVING: _ClassVar[AdapterBuild.Stage]
    STAGE_UNSPECIFIED: AdapterBuild.Stage
    STAGE_WAITING: AdapterBuild.Stage
    STAGE_FETCHING: AdapterBuild.Stage
    STAGE_VALIDATING: AdapterBuild.Stage
    STAGE_CONVERTING: AdapterBuild.Stage
    STAGE_PUBLISHING: AdapterBuild.Stage
    STAGE_DONE: AdapterBuild.Stage
    STAGE_REFUSED: AdapterBuild.Stage
    STAGE_PROVING: AdapterBuild.Stage
    NAME_FIELD_NUMBER: _ClassVar[int]
    STAGE_FIELD_NUMBER: _ClassVar[int]
    BYTES_DONE_FIELD_NUMBER: _ClassVar[int]
    BYTES_TOTAL_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    RANKS_FIELD_NUMBER: _ClassVar[int]
    MODULES_FIELD_NUMBER: _ClassVar[int]
    TENSORS_USED_FIELD_NUMBER: _ClassVar[int]
    BUNDLE_BYTES_FIELD_NUMBER: _ClassVar[int]
    WARNINGS_FIELD_NUMBER: _ClassVar[int]
    REUSED_FIELD_NUMBER: _ClassVar[int]
    REPAIRED_FIELD_NUMBER: _ClassVar[int]
    KEPT_FIELD_NUMBER: _ClassVar[int]
    KINDS_FIELD_NUMBER: _ClassVar[int]
    ADDED_FIELD_NUMBER: _ClassVar[int]
    name: str
    stage: AdapterBuild.Stage
    bytes_done: int
    bytes_total: int
    digest: str
    ranks: _containers.RepeatedScalarFieldContainer[int]
    modules: _containers.RepeatedScalarFieldContainer[str]
    tensors_used: int
    bundle_bytes: int
    warnings: _containers.RepeatedCompositeFieldContainer[Finding]
    reused: bool
    repaired: bool
    kept: bool
    kinds: _containers.RepeatedScalarFieldContainer[str]
    added: bool
    def __init__(self, name: _Optional[str] = ..., stage: _Optional[_Union[AdapterBuild.Stage, str]] = ..., bytes_done: _Optional[int] = ..., bytes_total: _Optional[int] = ..., digest: _Optional[str] = ..., ranks: _Optional[_Iterable[int]] = ..., modules: _Optional[_Iterable[str]] = ..., tensors_used: _Optional[int] = ..., bundle_bytes: _Optional[int] = ..., warnings: _Optional[_Iterable[_Union[Finding, _Mapping]]] = ..., reused: bool = ..., repaired: bool = ..., kept: bool = ..., kinds: _Optional[_Iterable[str]] = ..., added: bool = ...) -> None: ...

class Finding(_message.Message):
    __slots__ = ("code", "adapter", "where", "expected", "found", "fix")
    CODE_FIELD_NUMBER: _ClassVar[int]
    ADAPTER_FIELD_NUMBER: _ClassVar[int]
    WHERE_FIELD_NUMBER: _ClassVar[int]
    EXPECTED_FIELD_NUMBER: _ClassVar[int]
    FOUND_FIELD_NUMBER: _ClassVar[int]
    FIX_FIELD_NUMBER: _ClassVar[int]
    code: str
    adapter: str
    where: str
    expected: str
    found: str
    fix: str
    def __init__(self, code: _Optional[str] = ..., adapter: _Optional[str] = ..., where: _Optional[str] = ..., expected: _Optional[str] = ..., found: _Optional[str] = ..., fix: _Optional[str] = ...) -> None: ...

class Failure(_message.Message):
    __slots__ = ("reason", "message", "findings")
    REASON_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    FINDINGS_FIELD_NUMBER: _ClassVar[int]
    reason: str
    message: str
    findings: _containers.RepeatedCompositeFieldContainer[Finding]
    def __init__(self, reason: _Optional[str] = ..., message: _Optional[str] = ..., findings: _Optional[_Iterable[_Union[Finding, _Mapping]]] = ...) -> None: ...

class CheckAdapterRequest(_message.Message):
    __slots__ = ("adapter", "base", "max_lora_rank", "lora_target_modules", "lora_dtype", "truncate_to_rank", "signed_by")
    ADAPTER_FIELD_NUMBER: _ClassVar[int]
    BASE_FIELD_NUMBER: _ClassVar[int]
    MAX_LORA_RANK_FIELD_NUMBER: _ClassVar[int]
    LORA_TARGET_MODULES_FIELD_NUMBER: _ClassVar[int]
    LORA_DTYPE_FIELD_NUMBER: _ClassVar[int]
    TRUNCATE_TO_RANK_FIELD_NUMBER: _ClassVar[int]
    SIGNED_BY_FIELD_NUMBER: _ClassVar[int]
    adapter: Repository
    base: Repository
    max_lora_rank: int
    lora_target_modules: _containers.RepeatedScalarFieldContainer[str]
    lora_dtype: Dtype
    truncate_to_rank: int
    signed_by: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, adapter: _Optional[_Union[Repository, _Mapping]] = ..., base: _Optional[_Union[Repository, _Mapping]] = ..., max_lora_rank: _Optional[int] = ..., lora_target_modules: _Optional[_Iterable[str]] = ..., lora_dtype: _Optional[_Union[Dtype, str]] = ..., truncate_to_rank: _Optional[int] = ..., signed_by: _Optional[_Iterable[str]] = ...) -> None: ...

class CheckAdapterResponse(_message.Message):
    __slots__ = ("report",)
    REPORT_FIELD_NUMBER: _ClassVar[int]
    report: AdapterReport
    def __init__(self, report: _Optional[_Union[AdapterReport, _Mapping]] = ...) -> None: ...

class AdapterReport(_message.Message):
    __slots__ = ("accepted", "adapter", "base", "files", "findings", "rows", "dtype", "bundle_bytes", "base_model_name", "licence", "base_licence", "kinds", "replaced_rows", "invocation_tokens", "labels", "problem_type")
    class ReplacedRowsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    ACCEPTED_FIELD_NUMBER: _ClassVar[int]
    ADAPTER_FIELD_NUMBER: _ClassVar[int]
    BASE_FIELD_NUMBER: _ClassVar[int]
    FILES_FIELD_NUMBER: _ClassVar[int]
    FINDINGS_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    BUNDLE_BYTES_FIELD_NUMBER: _ClassVar[int]
    BASE_MODEL_NAME_FIELD_NUMBER: _ClassVar[int]
    LICENCE_FIELD_NUMBER: _ClassVar[int]
    BASE_LICENCE_FIELD_NUMBER: _ClassVar[int]
    KINDS_FIELD_NUMBER: _ClassVar[int]
    REPLACED_ROWS_FIELD_NUMBER: _ClassVar[int]
    INVOCATION_TOKENS_FIELD_NUMBER: _ClassVar[int]
    LABELS_FIELD_NUMBER: _ClassVar[int]
    PROBLEM_TYPE_FIELD_NUMBER: _ClassVar[int]
    accepted: bool
    adapter: Repository
    base: Repository
    files: _containers.RepeatedCompositeFieldContainer[AdapterFile]
    findings: _containers.RepeatedCompositeFieldContainer[Finding]
    rows: _containers.RepeatedCompositeFieldContainer[AdapterRow]
    dtype: Dtype
    bundle_bytes: int
    base_model_name: str
    licence: str
    base_licence: str
    kinds: _containers.RepeatedScalarFieldContainer[str]
    replaced_rows: _containers.ScalarMap[str, int]
    invocation_tokens: _containers.RepeatedScalarFieldContainer[int]
    labels: _containers.RepeatedScalarFieldContainer[str]
    problem_type: str
    def __init__(self, accepted: bool = ..., adapter: _Optional[_Union[Repository, _Mapping]] = ..., base: _Optional[_Union[Repository, _Mapping]] = ..., files: _Optional[_Iterable[_Union[AdapterFile, _Mapping]]] = ..., findings: _Optional[_Iterable[_Union[Finding, _Mapping]]] = ..., rows: _Optional[_Iterable[_Union[AdapterRow, _Mapping]]] = ..., dtype: _Optional[_Union[Dtype, str]] = ..., bundle_bytes: _Optional[int] = ..., base_model_name: _Optional[str] = ..., licence: _Optional[str] = ..., base_licence: _Optional[str] = ..., kinds: _Optional[_Iterable[str]] = ..., replaced_rows: _Optional[_Mapping[str, int]] = ..., invocation_tokens: _Optional[_Iterable[int]] = ..., labels: _Optional[_Iterable[str]] = ..., problem_type: _Optional[str] = ...) -> None: ...

class AdapterFile(_message.Message):
    __slots__ = ("name", "size", "sha256")
    NAME_FIELD_NUMBER: _ClassVar[int]
    SIZE_FIELD_NUMBER: _ClassVar[int]
    SHA256_FIELD_NUMBER: _ClassVar[int]
    name: str
    size: int
    sha256: str
    def __init__(self, name: _Optional[str] = ..., size: _Optional[int] = ..., sha256: _Optional[str] = ...) -> None: ...

class AdapterRow(_message.Message):
    __slots__ = ("layer", "module_id", "module", "rank", "in_features", "out_features", "scale", "norm_a", "norm_b", "norm_ba", "truncated_from", "truncation_error", "expert", "vectors")
    LAYER_FIELD_NUMBER: _ClassVar[int]
    MODULE_ID_FIELD_NUMBER: _ClassVar[int]
    MODULE_FIELD_NUMBER: _ClassVar[int]
    RANK_FIELD_NUMBER: _ClassVar[int]
    IN_FEATURES_FIELD_NUMBER: _ClassVar[int]
    OUT_FEATURES_FIELD_NUMBER: _ClassVar[int]
    SCALE_FIELD_NUMBER: _ClassVar[int]
    NORM_A_FIELD_NUMBER: _ClassVar[int]
    NORM_B_FIELD_NUMBER: _ClassVar[int]
    NORM_BA_FIELD_NUMBER: _ClassVar[int]
    TRUNCATED_FROM_FIELD_NUMBER: _ClassVar[int]
    TRUNCATION_ERROR_FIELD_NUMBER: _ClassVar[int]
    EXPERT_FIELD_NUMBER: _ClassVar[int]
    VECTORS_FIELD_NUMBER: _ClassVar[int]
    layer: int
    module_id: int
    module: str
    rank: int
    in_features: int
    out_features: int
    scale: float
    norm_a: float
    norm_b: float
    norm_ba: float
    truncated_from: int
    truncation_error: float
    expert: int
    vectors: int
    def __init__(self, layer: _Optional[int] = ..., module_id: _Optional[int] = ..., module: _Optional[str] = ..., rank: _Optional[int] = ..., in_features: _Optional[int] = ..., out_features: _Optional[int] = ..., scale: _Optional[float] = ..., norm_a: _Optional[float] = ..., norm_b: _Optional[float] = ..., norm_ba: _Optional[float] = ..., truncated_from: _Optional[int] = ..., truncation_error: _Optional[float] = ..., expert: _Optional[int] = ..., vectors: _Optional[int] = ...) -> None: ...
