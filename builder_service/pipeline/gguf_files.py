"""Adapters that llama.cpp's converter has turned into GGUF: the same rules, another container.

Tensors get PEFT's names, and lie as PEFT saves them: the converter reorders the rows of queries and keys of
some architectures, and transposes A of embeddings. The scale is alpha / r in both.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from builder_service.domain.adapter_config import parse_config
from builder_service.domain.derived import Derived, TensorRecipe
from builder_service.domain.gguf_tensors import in_halves
from builder_service.domain.grouping import Grouping
from builder_service.domain.rules.adapter import invocation_findings, most_tensors, too_many
from builder_service.domain.rules.checked import CheckedAdapter, Rulebook
from builder_service.domain.rules.config import INVOCATION
from builder_service.domain.rules.tensor_passes import TensorCheck, check_tensors, empty_finding
from builder_service.domain.safetensors_header import Tensor, TensorFile
from loramux_shared.bases.config import ModelConfig
from loramux_shared.bases.files import GGUF_SUFFIX
from loramux_shared.bundle.npy import Array
from loramux_shared.faults import CheckpointInvalid, Finding
from loramux_shared.gguf.files import AROUND, OF_LAYER, is_adapter
from loramux_shared.gguf.header import SIZES, GgufHeader, TensorPlace, read_header

ARCHITECTURES: Final = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "llama",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "Qwen3MoeForCausalLM": "qwen3moe",
    "GemmaForCausalLM": "gemma",
    "Gemma2ForCausalLM": "gemma2",
    "Gemma3ForCausalLM": "gemma3",
    "Gemma3ForConditionalGeneration": "gemma3",
    "GraniteForCausalLM": "granite",
    "SmolLM3ForCausalLM": "smollm3",
    "Phi3ForCausalLM": "phi3",
}
"""Architectures of GGUF by those of bases."""
TURNED: Final = frozenset({"llama", "granite", "smollm3"})
"""Those whose rows of queries and keys lie in pairs that are rotated together."""
_FUSED: Final = {"attn_qkv": "self_attn.qkv_proj", "ffn_up": "mlp.gate_up_proj"}
_OF_LAYER: Final = {part: path for part, path in OF_LAYER.items() if path.endswith("_proj")}
_FACTOR: Final = re.compile(
    r"(?:blk\.(?P<layer>0|[1-9][0-9]{0,5})\.)?(?P<part>[a-z_]+)\.weight\.lora_(?P<side>[ab])"
)
_PACKED: Final = "Q8_0"
"""The one type of blocks that the converter writes."""
_HUB: Final = "https://huggingface.co/"
_AGAIN: Final = "Convert the adapter again with convert_lora_to_gguf.py, or name the original in PEFT's form."


@dataclass(frozen=True)
class _Layout:
    """The way from a tensor of the file to PEFT's."""

    sources: tuple[str, ...]
    packed: bool = False
    head: int = 0
    """Rows of a head whose rotated pairs are neighbours; 0: rows stay as they are."""
    transposed: bool = False

    def of(self, *wholes: Array) -> Array:
        """Return the tensor."""
        [whole] = wholes
        if self.packed:
            whole = _unpacked(whole)
        if self.head:
            whole = in_halves(whole, self.head)
        return np.ascontiguousarray(whole.T if self.transposed else whole)


def _unpacked(words: Array) -> Array:
    """Return the values of blocks, each a scale and 32 numbers of 8 bits, that were read as float16."""
    blocks = np.ascontiguousarray(words).reshape(-1, SIZES[_PACKED][1] // 2)
    numbers = np.ascontiguousarray(blocks[:, 1:]).view(np.int8).astype(np.float32)
    with np.errstate(invalid="ignore"):  # later checks report values that are not finite
        values: Array = numbers * blocks[:, :1].astype(np.float32)
    return values.reshape(*words.shape[:-1], -1)


def check(folder: Path, rules: Rulebook, advance: Callable[[int], None]) -> CheckedAdapter:
    """Check the file of a folder; advance counts bytes that were read."""
    opened = open_check(folder, rules, advance)
    return opened if isinstance(opened, CheckedAdapter) else check_tensors(opened)


def open_check(
    folder: Path, rules: Rulebook, advance: Callable[[int], None] = lambda _: None
) -> TensorCheck | CheckedAdapter:
    """Return the check of the tensors of a folder's one file, or why there are none to check."""
    [path] = folder.glob(f"*{GGUF_SUFFIX}")
    base = rules.limits.base
    try:
        header = read_header(path)
        if wrong := _wrong_file(header, base):
            return CheckedAdapter((wrong,))
        fields = _fields(header)
    except CheckpointInvalid as error:
        found = error.message.removeprefix(f"{path.name}: ")[:300]
        return CheckedAdapter((_finding("E_BAD_WEIGHTS", path.name, "an adapter of llama.cpp", found, _AGAIN),))
    if len(header.tensors) > most_tensors(base):
        return CheckedAdapter((too_many(str(len(header.tensors)), base, path.name),))
    report = Grouping()
    file = _as_peft(path, header, base, report)
    names = {name.rpartition(".lora_")[0].rpartition(".")[2] for name in file.tensors}
    ranks = {tensor.shape[-1] for name, tensor in file.tensors.items() if "_B" in name}
    fields |= {"target_modules": sorted(names), "r": ranks.pop() if len(ranks) == 1 else None}
    parsed = parse_config(json.dumps(fields).encode())
    findings = list(parsed.findings)
    if parsed.config is None:
        return CheckedAdapter((*findings, *report.findings()))
    findings += invocation_findings(parsed.config, base)
    if not header.tensors:
        return CheckedAdapter((*findings, empty_finding(parsed.config)))
    return TensorCheck(file, parsed.config, rules, advance, findings, report)


def _wrong_file(header: GgufHeader, base: ModelConfig) -> Finding | None:
    """Return what is wrong with a file that is no adapter, or one of another base."""
    name, of_base = header.text("general.architecture"), ARCHITECTURES.get(base.architecture)
    if not is_adapter(header):
        fix = "This is a model, not an adapter: name it as the base, or name the adapter's file."
        return _finding("E_CONTAINER", header.name, "an adapter of llama.cpp", "another file of GGUF", fix)
    if of_base is None:
        expected = f"a base of {', '.join(ARCHITECTURES)}"
        return _finding("E_CONTAINER", header.name, expected, base.architecture, "Name the original of PEFT.")
    if name != of_base:
        fix = "The adapter was trained on another base."
        return _finding("E_BASE", f"{header.name}: general.architecture", of_base, name[:80], fix)
    return None


def _finding(code: str, where: str, expected: str, found: str, fix: str) -> Finding:
    return Finding(code=code, where=where, expected=expected, found=found, fix=fix)


def _fields(header: GgufHeader) -> dict[str, Any]:
    """Return the fields of a config that the metadata stand for.

    Raises:
        CheckpointInvalid: they are those of no LoRA, or of another type.
    """
    if (kind := header.text("adapter.type")) != "lora":
        raise header.invalid(f"adapter.type: expected lora, found {kind!r:.80}.")
    alpha = header.number("adapter.lora.alpha")
    if not alpha:
        raise header.invalid("adapter.lora.alpha: expected another number than 0, which llama.cpp reads as r.")
    return {
        "peft_type": "LORA",
        "lora_alpha": alpha,
        "base_model_name_or_path": header.text("general.base_model.0.repo_url").removeprefix(_HUB),
        INVOCATION: header.array("adapter.alora.invocation_tokens", int) or None,
    }


def _as_peft(path: Path, header: GgufHeader, base: ModelConfig, report: Grouping) -> TensorFile:
    """Return the tensors as PEFT saves them; report those that are no A or B of a module."""
    inner, tensors, recipes = dict[str, Tensor](), dict[str, Tensor](), dict[str, TensorRecipe]()
    for own, place in header.tensors.items():
        factor = _FACTOR.fullmatch(own)
        name = factor and _name(factor, base)
        if factor is None or name is None:
            expected = f"A and B of {', '.join((*_OF_LAYER, 'token_embd', 'output'))}"
            fix = "Train without these modules, or merge the adapter into the base."
            report.add("E_UNKNOWN_KEY", own, expected=expected, found="other tensors", fix=fix)
            continue
        layout = _layout(factor, place, base)
        shape = place.shape[::-1] if layout.transposed else place.shape
        tensors[name] = Tensor(name, "F32" if layout.packed else place.type, shape, 0, place.num_bytes)
        inner[own] = _as_words(own, place) if layout.packed else _tensor(own, place)
        recipes[name] = layout
    return Derived(path, tensors, TensorFile(path, inner), recipes)


def _name(factor: re.Match[str], base: ModelConfig) -> str | None:
    """Return PEFT's name of A or B; None where the base has no such module."""
    part, side = factor["part"], factor["side"].upper()
    if factor["layer"] is None:
        module = AROUND.get(part, "norm")
        of_table = f"lora_embedding_{side}" if part == "token_embd" else f"lora_{side}.weight"
        return None if module.endswith("norm") else f"base_model.model.{module}.{of_table}"
    fused = _FUSED.get(part, "")
    path = fused if fused.rpartition(".")[2] in base.dims.fused else _OF_LAYER.get(part)
    return path and f"base_model.model.model.layers.{factor['layer']}.{path}.lora_{side}.weight"


def _layout(factor: re.Match[str], place: TensorPlace, base: ModelConfig) -> _Layout:
    """Return the way from a tensor to PEFT's; shapes that do not fit the base are left to the rules."""
    part, heads = factor["part"], 0
    if ARCHITECTURES[base.architecture] in TURNED and factor["side"] == "b":
        heads = {"attn_q": base.dims.num_heads, "attn_k": base.dims.num_kv_heads}.get(part, 0)
    head = place.shape[0] // heads if heads and place.shape[0] % (2 * heads) == 0 else 0
    transposed = part == "token_embd" and factor["side"] == "a"
    return _Layout((factor[0],), place.type == _PACKED, head, transposed)


def _tensor(own: str, place: TensorPlace) -> Tensor:
    return Tensor(own, place.type, place.shape, place.offset, place.num_bytes)


def _as_words(own: str, place: TensorPlace) -> Tensor:
    """Return blocks as float16, of which each has a whole number."""
    words = place.num_bytes // math.prod(place.shape[:-1]) // 2
    return Tensor(own, "F16", (*place.shape[:-1], words), place.offset, place.num_bytes)
