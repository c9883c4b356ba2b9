"""Which files an adapter's folder must have, and what others are a sign of."""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Final

from builder_service.domain.config_rules import MLX_FIX
from shared.faults import Finding

CONFIG: Final = "adapter_config.json"
WEIGHTS: Final = "adapter_model.safetensors"
INPUTS: Final = (CONFIG, WEIGHTS)
"""The files that a bundle is made from."""

_MLX: Final = "adapters.safetensors"
_PICKLES: Final = ("adapter_model.bin", "adapter_model.pt", "adapter_model.pth")
_SHARD: Final = re.compile(r"adapter_model-\d+-of-\d+\.safetensors|adapter_model\.safetensors\.index\.json")
_FULL: Final = re.compile(r"model(-\d+-of-\d+)?\.safetensors|pytorch_model.*\.bin")


def file_findings(names: Collection[str]) -> list[Finding]:
    """Return what is wrong with a folder's files; names are paths inside the adapter's folder."""
    top = sorted(name for name in names if "/" not in name)
    if _MLX in top and WEIGHTS not in top:
        return [Finding(code="E_MLX", where=_MLX, expected=WEIGHTS, found="an MLX adapter", fix=MLX_FIX)]
    found = []
    if CONFIG not in top:
        found.append(
            Finding(
                code="E_NO_CONFIG",
                where=CONFIG,
                expected="the file",
                found=_listed(top),
                fix=_advice(names, top),
            )
        )
    if WEIGHTS in top:
        return found
    if shards := [name for name in top if _SHARD.fullmatch(name)]:
        fix = "Save the adapter as one file (PEFT does); only adapters with whole embeddings get so big."
        found.append(
            Finding(code="E_SHARDED", where=shards[0], expected=WEIGHTS, found=_listed(shards), fix=fix)
        )
    elif pickles := [name for name in top if name in _PICKLES]:
        fix = "Pickle is refused, it can run code. Save again with safe_serialization=True."
        found.append(
            Finding(code="E_BIN_ONLY", where=pickles[0], expected=WEIGHTS, found=_listed(pickles), fix=fix)
        )
    elif CONFIG in top:
        fix = "The folder has a config and no weights: save or upload the adapter again."
        found.append(
            Finding(code="E_NO_WEIGHTS", where=WEIGHTS, expected="the file", found=_listed(top), fix=fix)
        )
    return found


def _advice(names: Collection[str], top: list[str]) -> str:
    folders = sorted(name.removesuffix(f"/{CONFIG}") for name in names if name.endswith(f"/{CONFIG}"))
    if folders:
        return f"The adapter is in {' or '.join(map(repr, folders[:5]))}: set subfolder."
    if any(_FULL.fullmatch(name) for name in top):
        return "This is a full model, no adapter: name it as the base, or name the adapter's repository."
    return "Name the repository or the folder that PEFT's save_pretrained wrote."


def _listed(names: list[str]) -> str:
    return ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "") or "no files"
