"""Required files of an adapter's folder, and signs of others."""

import re
from collections.abc import Collection
from typing import Final

from builder_service.domain.rules.config import MLX_FIX
from loramux_shared.adapter_files import CONFIG, INDEX, SHARD, WEIGHTS, weight_files
from loramux_shared.faults import Finding
from loramux_shared.wording import listed

_MLX: Final = "adapters.safetensors"
_PICKLES: Final = ("adapter_model.bin", "adapter_model.pt", "adapter_model.pth")
_FULL: Final = re.compile(r"model(-\d+-of-\d+)?\.safetensors|pytorch_model.*\.bin")
_LLAMA_CPP: Final = "llama.cpp"
# Files of other programs' containers, in the folder itself or one below.
_CONTAINERS: Final = tuple(
    (name, re.compile(pattern))
    for name, pattern in (
        ("mistral-finetune", r"(lora|consolidated.*)\.safetensors|(.*/)?consolidated\..*"),
        ("NeMo", r".*\.nemo|(.*/)?model_weights\.ckpt|.*\.distcp|model_config\.yaml"),
        ("torchtune", r"adapter_\d+\.pt|hf_model_\d+_\d+\.pt|recipe_state\.pt"),
        ("Orbax (Gemma, JAX)", r"(.*/)?(manifest\.ocdbt|_CHECKPOINT_METADATA|_METADATA|checkpoint)"),
        ("diffusers", r"pytorch_lora_weights\.(safetensors|bin)"),
        (_LLAMA_CPP, r".*\.gguf"),
    )
)
# Files that trainers leave beside an adapter, and files that look like its weights.
_EXTRA: Final = re.compile(
    r"checkpoint-\d+/.*|global_step\d+/.*|(optimizer|scheduler|scaler|rng_state.*|trainer_state|training_args)"
    r"\.(pt|pth|bin|json)|.*\.(bin|pt|pth|ckpt|gguf|safetensors)"
)


def file_findings(names: Collection[str]) -> list[Finding]:
    """Return what is wrong with a folder's files; names are paths inside the adapter's folder."""
    if CONFIG not in weight_files(names):
        return []
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
    if shards := [name for name in top if name == INDEX or SHARD.fullmatch(name)]:
        found += _incomplete(shards)
    elif pickles := [name for name in top if name in _PICKLES]:
        fix = "Pickle is refused, since it can run code. Save again with safe_serialization=True."
        found.append(
            Finding(code="E_BIN_ONLY", where=pickles[0], expected=WEIGHTS, found=_listed(pickles), fix=fix)
        )
    elif container := _container(names):
        name, file = container
        fix = "Convert it to PEFT's form: adapter_config.json and adapter_model.safetensors."
        if name == _LLAMA_CPP:
            fix = "Name the file of the adapter alone; a model is named as the base."
        found = [
            Finding(code="E_CONTAINER", where=file, expected=WEIGHTS, found=f"a {name} container", fix=fix)
        ]
    elif CONFIG in top:
        fix = "The folder has a config and no weights: save or upload the adapter again."
        found.append(
            Finding(code="E_NO_WEIGHTS", where=WEIGHTS, expected="the file", found=_listed(top), fix=fix)
        )
    return found


def _incomplete(shards: list[str]) -> list[Finding]:
    """Report files of weights of which some, or the index, are not there."""
    parts = [match for name in shards if (match := SHARD.fullmatch(name))]
    numbers = [int(part["number"]) for part in parts]
    counts = {int(part["count"]) for part in parts}
    if INDEX in shards and counts == {len(parts)} and numbers == [*range(1, len(parts) + 1)]:
        return []
    count = max(counts, default=1)
    expected = f"{INDEX}, and files 00001 to {count:05d} of {count:05d}"
    fix = "Upload all of them, or save the adapter as one file, as PEFT does."
    return [Finding(code="E_SHARDED", where=shards[0], expected=expected, found=_listed(shards), fix=fix)]


def extra_files(names: Collection[str]) -> list[Finding]:
    """Return a warning about files that are not used, where one could think that they are."""
    used = weight_files(names)
    extra = sorted(name for name in names if name not in used and _EXTRA.fullmatch(name))
    if not extra:
        return []
    return [Finding(code="W_EXTRA_FILES", where=_listed(extra), found="ignored", expected=_listed([*used]))]


def _container(names: Collection[str]) -> tuple[str, str] | None:
    if any(name.endswith(f"/{CONFIG}") or _FULL.fullmatch(name) for name in names):
        return None
    for name, pattern in _CONTAINERS:
        if found := sorted(file for file in names if pattern.fullmatch(file)):
            return name, found[0]
    return None


def _advice(names: Collection[str], top: list[str]) -> str:
    folders = sorted(name.removesuffix(f"/{CONFIG}") for name in names if name.endswith(f"/{CONFIG}"))
    if folders:
        return f"The adapter is in {' or '.join(map(repr, folders[:5]))}: set subfolder, or name that folder."
    if any(_FULL.fullmatch(name) for name in top):
        return "This is a full model, not an adapter: name it as the base, or name the adapter's repository."
    return "Name the repository or the folder that PEFT's save_pretrained wrote."


def _listed(names: list[str]) -> str:
    return listed(names, 6, none="no files")
