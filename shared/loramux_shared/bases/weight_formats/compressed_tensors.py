"""``compressed-tensors``, the format of llm-compressor: groups of linears, each with a scheme of its own."""

from typing import Any, Final

from loramux_shared.bases.hf_config import HfConfig
from loramux_shared.bases.weight_format import Quantization, WeightFormat, WeightScheme, block_of
from loramux_shared.faults import CheckpointInvalid

_BITS: Final[dict[str, dict[tuple[str, int], str]]] = {
    "pack-quantized": {("int", 4): "int4", ("int", 8): "int8"},
    "int-quantized": {("int", 8): "int8"},
    "float-quantized": {("float", 8): "fp8"},
    "naive-quantized": {("int", 8): "int8", ("float", 8): "fp8"},
}
"""Supported number formats of a compressor, by the type and bits of weights."""


def read_compressed(config: HfConfig) -> Quantization:
    """Read the groups. Of which one a linear is, its tensors show: targets and ignore lists are not asked.

    Raises:
        CheckpointInvalid: a group, or something beside the weights, is not read.
    """
    config.require("kv_cache_scheme", None)
    config.block("sparsity_config").require("format", "dense")
    config.block("transform_config").require("config_groups", {})
    groups = config.block("config_groups")
    if not groups.fields:
        raise CheckpointInvalid(f"config.json: {config.at}config_groups: expected a group, found none.")
    overall = config.fields.get("format")
    schemes = [_group(groups.block(name), overall) for name in groups.fields]
    return Quantization("compressed-tensors", tuple(dict.fromkeys(schemes)))


def _group(group: HfConfig, overall: Any) -> WeightScheme:
    group = HfConfig({"format": overall, **_present(group.fields)}, group.architecture, at=group.at)
    group.require("output_activations", None)
    group.require("format", *_BITS)
    weights = group.block("weights")
    weights.require("dynamic", False)
    served = _BITS[group.text("format", next(iter(_BITS)))]
    numbers = weights.text("type", "int"), weights.size("num_bits", 8)
    if numbers not in served:
        names = ", ".join(f"{kind} of {bits} bits" for kind, bits in served)
        raise CheckpointInvalid(
            f"config.json: {weights.at}num_bits: {numbers[0]} of {numbers[1]} bits is not supported in "
            f"{group.text('format', '')}; supported: {names}."
        )
    rows, columns = _shared(weights)
    symmetric = weights.flag("symmetric", default=True)
    return WeightScheme(served[numbers], rows, columns, zero_points=not symmetric)


def _shared(weights: HfConfig) -> tuple[int | None, int | None]:
    """Return the rows and columns that share a scale."""
    size = weights.integer("group_size", 0)
    inferred = "group" if size > 0 else "channel" if size else "tensor"
    weights.require("strategy", inferred, "tensor", "channel", "group", "block")
    strategy = weights.text("strategy", inferred)
    if strategy == "block":
        rows, columns = block_of(weights, "block_structure")
        return rows, columns
    if strategy == "group":
        return 1, weights.size("group_size")
    return (1 if strategy == "channel" else None), None


def _present(fields: Any) -> dict[str, Any]:
    return {key: value for key, value in fields.items() if value is not None}


COMPRESSED_TENSORS: Final = WeightFormat(
    "compressed-tensors",
    ("compressed-tensors",),
    "int4 and int8 packed, per group, row or tensor, with or without zero points and g_idx; int8 (W8A8); "
    "FP8 per tensor, row or block; several groups and ignored linears",
    read_compressed,
)
