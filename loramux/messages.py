"""Deployments and findings as messages of ``loramux.builder.v1``, in both directions."""

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from datetime import datetime
from typing import Any, TypeVar

from google.protobuf.message import Message
from google.protobuf.timestamp_pb2 import Timestamp

from loramux.builder.v1 import builder_pb2 as pb
from loramux.requests import fitted
from loramux_shared.deployment import Deployment, Dtype, LoraConfiguration, Merge, Repository
from loramux_shared.deployment_file import parse_deployment
from loramux_shared.faults import DeploymentInvalid, Finding
from loramux_shared.runtime import Limits, Rounding
from loramux_shared.wording import listed

_PREFIX = "SOURCE_KIND_"
DTYPES = {
    None: pb.DTYPE_UNSPECIFIED,
    Dtype.BFLOAT16: pb.DTYPE_BFLOAT16,
    Dtype.FLOAT16: pb.DTYPE_FLOAT16,
    Dtype.FLOAT32: pb.DTYPE_FLOAT32,
}
_QUANTIZATIONS = {
    Rounding.NONE: pb.QUANTIZATION_UNSPECIFIED,
    Rounding.FP8: pb.QUANTIZATION_FP8,
    Rounding.INT8: pb.QUANTIZATION_INT8,
    Rounding.INT4: pb.QUANTIZATION_INT4,
}
_MERGES = {Merge.AUTO: pb.MERGE_UNSPECIFIED, Merge.NEVER: pb.MERGE_NEVER, Merge.ALWAYS: pb.MERGE_ALWAYS}
DTYPE_NAMES = {value: name for name, value in DTYPES.items()}
_M = TypeVar("_M", bound=Message)


def message_of(kind: type[_M], record: object, **others: Any) -> _M:
    """Return a message whose fields are a record's, by their names, apart from the others."""
    names = [name for name in kind.DESCRIPTOR.fields_by_name if name not in others]
    fields = {name: getattr(record, name) for name in names} | others
    times = {name: stamp(value) for name, value in fields.items() if isinstance(value, datetime)}
    return kind(**fields | times)


def stamp(moment: datetime) -> Timestamp:
    """Return a time as a message."""
    message = Timestamp()
    message.FromDatetime(moment)
    return message


def deployment_to_message(deployment: Deployment) -> pb.DeploymentSpec:
    """Return a deployment as a message."""
    build, runtime = deployment.build, deployment.runtime
    return fitted(
        pb.DeploymentSpec,
        model_name=deployment.model_name,
        base=repository_to_message(build.checkpoint_repository),
        adapters=adapters_to_message(build.lora_adapters),
        max_seq_len=build.max_seq_len or 0,
        max_lora_rank=build.lora_configuration.max_lora_rank,
        lora_target_modules=build.lora_configuration.lora_target_modules,
        served_model_name=runtime.served_model_name or "",
        request_default_max_tokens=runtime.request_default_max_tokens or 0,
        speculative_tokens=runtime.speculative_tokens,
        lora_dtype=DTYPES[build.lora_configuration.dtype],
        truncate_to_rank=build.lora_configuration.truncate_to_rank or 0,
        prove=build.prove,
        tensor_parallel_count=0 if build.tensor_parallel_count == 1 else build.tensor_parallel_count,
        signed_by=build.signed_by,
        base_signed_by=build.base_signed_by,
        hide_base=not runtime.serve_base,
        merge=_MERGES[runtime.merge],
        quantization=_QUANTIZATIONS[runtime.quantization],
        tool_parser="" if runtime.tool_parser == "auto" else runtime.tool_parser,
        pooling=runtime.pooling or "",
        reasoning_parser="" if runtime.reasoning_parser == "auto" else runtime.reasoning_parser,
        aliases=[pb.Alias(name=name, weights=weights) for name, weights in runtime.aliases.items()],
        default_limits=_limits_to_message(runtime.limits.default),
        model_limits={name: _limits_to_message(limits) for name, limits in runtime.limits.models.items()},
        resolve=None if runtime.resolve is None else pb.Resolve(**runtime.resolve.model_dump()),
        speculator=None
        if runtime.speculator is None
        else pb.Speculator(
            model=repository_to_message(runtime.speculator.model), tokens=runtime.speculator.tokens
        ),
    )


def deployment_from_message(message: pb.DeploymentSpec) -> Deployment:
    """Return the deployment that a message describes; fields of zero or "" are unset. Raise DeploymentInvalid
    with one finding per violation.
    """
    adapters = adapters_from_message(message.adapters)
    _require_distinct("alias", message.aliases)
    lora: dict[str, Any] = {"lora_target_modules": tuple(message.lora_target_modules)}
    if message.lora_dtype:
        lora["dtype"] = DTYPE_NAMES.get(message.lora_dtype, "unknown")
    build: dict[str, Any] = {
        "checkpoint_repository": _repository_fields(message.base),
        "lora_adapters": adapters,
        "lora_configuration": lora,
        "prove": message.prove,
        "signed_by": tuple(message.signed_by),
        "base_signed_by": tuple(message.base_signed_by),
    }
    merge = next((name for name, value in _MERGES.items() if value == message.merge), "unknown")
    quantization = next(
        (name for name, value in _QUANTIZATIONS.items() if value == message.quantization), "unknown"
    )
    runtime: dict[str, Any] = {
        "serve_base": not message.hide_base,
        "merge": merge,
        "quantization": quantization,
        "aliases": {alias.name: dict(alias.weights) for alias in message.aliases},
        "limits": {
            "default": _set_fields(message.default_limits),
            "models": {name: _set_fields(limits) for name, limits in message.model_limits.items()},
        },
    }
    for block, field in (
        (lora, "max_lora_rank"),
        (lora, "truncate_to_rank"),
        (build, "max_seq_len"),
        (build, "tensor_parallel_count"),
        (runtime, "served_model_name"),
        (runtime, "request_default_max_tokens"),
        (runtime, "tool_parser"),
        (runtime, "reasoning_parser"),
        (runtime, "pooling"),
    ):
        if value := getattr(message, field):
            block[field] = value
    if message.HasField("speculative_tokens"):  # 0 is said, too
        runtime["speculative_tokens"] = message.speculative_tokens
    if message.HasField("resolve"):
        runtime["resolve"] = _set_fields(message.resolve) | {"sources": tuple(message.resolve.sources)}
    if message.HasField("speculator"):
        runtime["speculator"] = _set_fields(message.speculator) | {
            "model": _repository_fields(message.speculator.model)
        }
    data = {"model_name": message.model_name, "build": build, "runtime": runtime}
    return parse_deployment(data).deployment


def _limits_to_message(limits: Limits) -> pb.Limits:
    return pb.Limits(**limits.model_dump())


def _set_fields(message: pb.Limits | pb.Resolve | pb.Speculator) -> dict[str, Any]:
    return {field.name: value for field, value in message.ListFields()}


def _require_distinct(kind: str, named: Collection[pb.Adapter] | Collection[pb.Alias]) -> None:
    counted = Counter(item.name for item in named)
    if twice := sorted(name for name, count in counted.items() if count > 1):
        raise DeploymentInvalid(f"{kind} names must be distinct, found twice: {listed(twice)}")


def adapters_from_message(messages: Collection[pb.Adapter]) -> dict[str, dict[str, Any]]:
    """Return repositories' fields by the adapters' names; raise DeploymentInvalid where two have one name."""
    _require_distinct("adapter", messages)
    return {item.name: _repository_fields(item.repository) for item in messages}


def adapters_to_message(adapters: Mapping[str, Repository]) -> list[pb.Adapter]:
    """Return repositories by name as messages."""
    return [
        fitted(pb.Adapter, name=name, repository=repository_to_message(repository))
        for name, repository in adapters.items()
    ]


def check_request(
    adapter: Repository, base: Repository, lora: LoraConfiguration, signed_by: Sequence[str] = ()
) -> pb.CheckAdapterRequest:
    """Return the request for the check of an adapter."""
    return fitted(
        pb.CheckAdapterRequest,
        adapter=repository_to_message(adapter),
        base=repository_to_message(base),
        max_lora_rank=lora.max_lora_rank,
        lora_target_modules=lora.lora_target_modules,
        lora_dtype=DTYPES[lora.dtype],
        truncate_to_rank=lora.truncate_to_rank or 0,
        signed_by=signed_by,
    )


def finding_to_message(finding: Finding) -> pb.Finding:
    """Return a finding as a message."""
    return message_of(pb.Finding, finding)


def finding_from_message(message: pb.Finding) -> Finding:
    """Return the finding that a message holds."""
    return Finding(**{name: getattr(message, name) for name in Finding.model_fields})


def repository_to_message(repository: Repository) -> pb.Repository:
    """Return a repository as a message."""
    fields = repository.model_dump() | {"source": _PREFIX + repository.source}
    return fitted(pb.Repository, **fields)


def repository_from_message(message: pb.Repository) -> Repository:
    """Return the repository of a service's answer."""
    return Repository(**_repository_fields(message))


def _repository_fields(message: pb.Repository) -> dict[str, Any]:
    kind = pb.SourceKind.Name(message.source) if message.source in pb.SourceKind.values() else "unknown"
    fields = {name: getattr(message, name) for name in Repository.model_fields}
    return fields | {"source": kind.removeprefix(_PREFIX)}
