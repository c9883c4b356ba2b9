"""Checkpoints with weights of 8 or 4 bits: what their ``quantization_config`` says, and which are read.

FP8, GPTQ, AWQ, bitsandbytes and MXFP4 have one scheme for all linears; ``compressed-tensors``, the format of
llm-compressor, has groups of linears, each with a scheme of its own.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal

from loramux_shared.bases.hf_config import HfConfig
from loramux_shared.faults import CheckpointInvalid

Numbers = Literal["fp8", "int8", "int4", "nf4", "fp4", "mxfp4", "blocks"]
FormatName = Literal["fp8", "compressed-tensors", "gptq", "awq", "bitsandbytes", "mxfp4", "gguf"]


@dataclass(frozen=True)
class WeightScheme:
    """The storage format of a linear's weight."""

    numbers: Numbers
    rows: int | None = None
    """Rows that share a scale; None: all."""
    columns: int | None = None
    """Columns that share a scale; None: all."""
    zero_points: bool = False
    """True if zero is stored as another number than 0, which lies beside the scale."""

    def grid(self, rows: int, columns: int) -> tuple[int, int]:
        """Return how many scales a weight of that shape has, down and across."""
        return -(-rows // (self.rows or rows)), -(-columns // (self.columns or columns))


@dataclass(frozen=True)
class Quantization:
    """The storage formats of a checkpoint's weights; weights that are stored whole are served whole."""

    format: FormatName
    schemes: tuple[WeightScheme, ...]
    """Formats that a weight may have; its tensors tell which one it has."""
    columns_are_ordered: bool = False
    """True if each weight must have the group of each of its columns."""
    zeros_less_one: bool = False
    """True if zero points are stored less one, as in GPTQ's first version."""
    types: tuple[str, ...] = ()
    """Types of blocks of a file of GGUF, whose linears and tables take so many bytes."""
    linear_bytes: int = 0
    table_bytes: int = 0

    @property
    def label(self) -> str:
        """For people, for example ``gptq (int4)``."""
        numbers = dict.fromkeys(self.types or [scheme.numbers for scheme in self.schemes])
        plain = [name for name in numbers if name != self.format]
        return f"{self.format} ({', '.join(plain)})" if plain else self.format


@dataclass(frozen=True)
class Format:
    """A format that is read."""

    name: FormatName
    methods: tuple[str, ...]
    """``quant_method`` of ``quantization_config``."""
    reads: str
    """Description of what is read, for people."""
    read: Callable[[HfConfig], Quantization]
    """Raises CheckpointInvalid for what is not read."""


_BITS: Final[dict[str, dict[tuple[str, int], Numbers]]] = {
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


def block_of(config: HfConfig, key: str) -> tuple[int, int]:
    """Return the rows and columns of a block; raise CheckpointInvalid for no pair of positive integers."""
    block = config.array(key) or []
    if len(block) != 2 or not all(type(size) is int and size > 0 for size in block):
        raise CheckpointInvalid(
            f"config.json: {config.at}{key}: expected two positive integers, found {config.fields.get(key)!r}."
        )
    return block[0], block[1]


def _present(fields: Any) -> dict[str, Any]:
    return {key: value for key, value in fields.items() if value is not None}


FP8_BLOCK = (128, 128)
"""Block size of FP8 where a config names none, as in transformers."""
MXFP4_COLUMNS = 32


def read_fp8(config: HfConfig) -> Quantization:
    """Read DeepSeek's blocks, and scales of a tensor or of a row, as which Mistral and AutoFP8 have them."""
    config.require("activation_scheme", "dynamic", "static")
    config.require("scale_fmt", "float", "ue8m0")
    config.require("expert_dtype", "fp8")
    config.require("kv_cache_scheme", None)
    blocks = config.fields.get("weight_block_size", FP8_BLOCK)
    block = block_of(config, "weight_block_size") if blocks not in (None, FP8_BLOCK) else blocks
    schemes = [WeightScheme("fp8"), WeightScheme("fp8", rows=1)]
    if block is not None:
        schemes.insert(0, WeightScheme("fp8", *block))
    return Quantization("fp8", tuple(schemes))


def read_gptq(config: HfConfig) -> Quantization:
    """Read GPTQ, also where ``dynamic`` gives some linears other sizes."""
    config.require("pack_dtype", "int32")
    config.require("is_marlin_format", False)
    key = "checkpoint_format" if config.fields.get("checkpoint_format") else "format"
    config.require(key, "gptq", "gptq_v2")
    dynamic = [rule for rule in config.block("dynamic").fields.values() if isinstance(rule, dict)]
    schemes = [
        _gptq_scheme(HfConfig({**config.fields, **rule}, config.architecture, at=config.at))
        for rule in ({}, *dynamic)
    ]
    return Quantization(
        "gptq",
        tuple(dict.fromkeys(schemes)),
        columns_are_ordered=config.flag("desc_act", default=False),
        zeros_less_one=config.text(key, "gptq") == "gptq",
    )


def _gptq_scheme(config: HfConfig) -> WeightScheme:
    config.require("bits", 4, 8)
    numbers: Numbers = "int8" if config.integer("bits", 4) == 8 else "int4"
    return WeightScheme(numbers, 1, _group_size(config), zero_points=True)


def read_awq(config: HfConfig) -> Quantization:
    """Read AWQ as AutoAWQ packs it for its ``gemm``."""
    config.require("bits", 4)
    config.require("zero_point", True)
    key = "version" if config.fields.get("version") is not None else "format"
    lower: Any = config.text(key, "gemm").lower()
    HfConfig({key: lower}, config.architecture, at=config.at).require(key, "gemm")
    return Quantization("awq", (WeightScheme("int4", 1, _group_size(config), zero_points=True),))


def _group_size(config: HfConfig) -> int | None:
    size = config.integer("group_size", 128)
    if size == 0 or size < -1:
        raise CheckpointInvalid(
            f"config.json: {config.at}group_size: expected a positive integer, or -1 for rows, found {size}."
        )
    return None if size == -1 else size


def read_bitsandbytes(config: HfConfig) -> Quantization:
    """Read nf4 and fp4, whose blocks each weight describes itself, and int8 with a scale for each row."""
    four, eight = (config.flag(f"load_in_{bits}bit", default=False) for bits in (4, 8))
    if four == eight:
        raise CheckpointInvalid(
            f"config.json: {config.at}load_in_4bit and load_in_8bit: expected one of both to be true."
        )
    if eight:
        return Quantization("bitsandbytes", (WeightScheme("int8", rows=1),))
    config.require("bnb_4bit_quant_type", "fp4", "nf4")
    numbers: Numbers = "nf4" if config.text("bnb_4bit_quant_type", "fp4") == "nf4" else "fp4"
    return Quantization("bitsandbytes", (WeightScheme(numbers),))


def read_gguf(config: HfConfig) -> Quantization:
    """Read what `gguf.files` writes of a file."""
    sizes, types = config.block("bytes"), config.array("types") or []
    linears, tables = (sizes.integer(key, 0) for key in ("linears", "tables"))
    schemes = (WeightScheme("blocks"),)
    return Quantization("gguf", schemes, types=(*map(str, types),), linear_bytes=linears, table_bytes=tables)


QUANTIZE: Final = "quantize_config.json"
"""The file in which AutoGPTQ said how weights are kept, before ``config.json`` did."""
KEYS: Final = ("quantization_config", "compression_config", QUANTIZE)
"""The second is what compressed-tensors wrote first; under the third `with_quantize` puts that file."""
FBGEMM: Final = Quantization("fp8", (WeightScheme("fp8", rows=1),))
MXFP4: Final = Quantization("mxfp4", (WeightScheme("mxfp4", 1, MXFP4_COLUMNS),))
FORMATS: Final = (
    Format("fp8", ("fp8",), "e4m3 or e5m2 with scales per block, row or tensor", read_fp8),
    Format("fp8", ("fbgemm_fp8",), "e4m3 with scales per row", lambda _: FBGEMM),
    Format(
        "compressed-tensors",
        ("compressed-tensors",),
        "int4 and int8 packed, per group, row or tensor, with or without zero points and g_idx; int8 (W8A8); "
        "FP8 per tensor, row or block; several groups and ignored linears",
        read_compressed,
    ),
    Format(
        "gptq",
        ("gptq",),
        "int4 and int8, both forms of zero points, with or without desc_act; also by `quantize_config.json`",
        read_gptq,
    ),
    Format("awq", ("awq",), "int4 as AutoAWQ packs it for gemm", read_awq),
    Format(
        "bitsandbytes", ("bitsandbytes",), "nf4, fp4, with double quantisation or not; int8", read_bitsandbytes
    ),
    Format("mxfp4", ("mxfp4",), "experts in 3-D, as gpt-oss has them", lambda _: MXFP4),
    Format("gguf", ("gguf",), "blocks of llama.cpp, of a file of GGUF", read_gguf),
)


def read_quantization(*levels: Mapping[str, Any], architecture: str) -> Quantization | None:
    """Read the first ``quantization_config`` of a config's levels; None where weights are kept as they are.

    Raises:
        CheckpointInvalid: a format, or something of it, that is not read, with what is.
    """
    for fields in levels:
        for key in KEYS:
            if fields.get(key):
                block = HfConfig(fields, architecture).block(key)
                return _read(HfConfig(block.fields, architecture, at=f"{key}."))
    return None


def says_quantization(fields: Mapping[str, Any]) -> bool:
    """Return True if the fields of a ``config.json`` describe quantized weights."""
    text = fields.get("text_config")
    return any(level.get(key) for level in (fields, text if isinstance(text, dict) else {}) for key in KEYS)


def with_quantize(fields: Mapping[str, Any], quantize: Mapping[str, Any] | None) -> Mapping[str, Any]:
    """Return the fields of a ``config.json`` with those of the `QUANTIZE` beside it, if they say nothing.

    Without a method they are AutoGPTQ's, which had but one; newer gptqmodel calls it ``method``.
    """
    if quantize is None or says_quantization(fields):
        return fields
    method = quantize.get("quant_method") or quantize.get("method") or "gptq"
    return {**fields, QUANTIZE: {**quantize, "quant_method": method}}


def _read(config: HfConfig) -> Quantization:
    served = {method: format_ for format_ in FORMATS for method in format_.methods}
    method = config.fields.get("quant_method")
    if method is None and (config.fields.get("load_in_4bit") or config.fields.get("load_in_8bit")):
        method = "bitsandbytes"  # early configs of bitsandbytes lack quant_method
    if not isinstance(method, str) or method not in served:
        raise CheckpointInvalid(
            f"config.json: {config.at}quant_method {method!r} is not supported; supported: "
            f"{', '.join(served)}, and weights in bfloat16, float16 or float32."
        )
    return served[method].read(config)
