"""``loramux doctor``: what is installed, what a replica would run on, and what would fit."""

from __future__ import annotations

import asyncio
import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Final

import typer

from loramux.addresses import Address, is_many, resolve
from loramux.cli import shell
from loramux.cli.doctor_view import show
from loramux.cli.documents import emit
from loramux.cli.exits import Exit
from loramux.cli.serving import SERVING, check
from loramux.client import BUILDER, INFERENCE
from loramux.doctor.installed import Extra, extras, versions
from loramux.doctor.machine import (
    Inference,
    Machine,
    Place,
    look_at_inference,
    look_at_machine,
    look_at_store,
)
from loramux.doctor.sizes import Sizes, read_base, sizes_of, weight_files_bytes
from loramux_shared.faults import Fault, ServerUnavailable, SettingsInvalid
from loramux_shared.settings import InferenceSettings, load_settings

SOME_LLAMA: Final = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 1,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "vocab_size": 32000,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "torch_dtype": "bfloat16",
}
"""Stands for a base in bfloat16 where none is named."""

DEFAULT_STORE: Final[str] = InferenceSettings.model_fields["store"].default
DEFAULT_CACHE: Final[Path] = InferenceSettings.model_fields["cache_dir"].default.expanduser()

Store = Annotated[
    str | None, typer.Option("--store", metavar="URI", help="Must answer; default: the one that is set.")
]
Base = Annotated[
    Path | None, typer.Option("--base", metavar="PATH", help="A checkpoint, or its config.json: what fits?")
]
KvGb = Annotated[
    float | None,
    typer.Option("--kv-gb", metavar="GB", min=0.001, help="KV cache; default: what a replica takes."),
]


@dataclass(frozen=True)
class Diagnosis:
    """Everything that was looked at."""

    problems: tuple[str, ...]
    """Problems that break a requested feature; empty when all is well."""
    versions: dict[str, str | None]
    extras: tuple[Extra, ...]
    machine: Machine
    inference: Inference | str
    """The device of a replica, or why there can be none."""
    places: tuple[Place, ...]
    base: Sizes | None


@shell.command
def doctor(
    store: Store = None,
    grpc: shell.Grpc = INFERENCE,
    builder: shell.Builder = BUILDER,
    base: Base = None,
    kv_gb: KvGb = None,
    as_json: shell.Json = False,
) -> None:
    """Look at this installation; exit 1 if something is wrong.

    What is not installed or does not run is told, and is nothing wrong.

    Example: loramux doctor --base ./my-base --kv-gb 8
    """
    found = examine(store, grpc, builder, base, kv_gb)
    if as_json:
        emit({"diagnosis": found})
    else:
        show(found)
    if found.problems:
        raise typer.Exit(Exit.FAILED)


def examine(store: str | None, grpc: str, builder: str, base: Path | None, kv_gb: float | None) -> Diagnosis:
    """Look at everything; raises `CheckpointInvalid` for a base that is none."""
    config: dict[str, Any] = read_base(base) if base else dict(SOME_LLAMA)
    problems: list[str] = []
    inference: Inference | str
    try:
        settings = load_settings(InferenceSettings, deployment="none", store=store, kv_memory_gb=kv_gb)
        uri, cache_dir = settings.store, settings.cache_dir
        with shell.working("asking the inference service what it would run on"):
            inference = _inference(config)
    except SettingsInvalid as fault:
        settings = InferenceSettings.model_construct(deployment="none", kv_memory_gb=kv_gb)
        uri, cache_dir, inference = store or DEFAULT_STORE, DEFAULT_CACHE, fault.message
        problems.append(fault.message)
    with shell.working("asking the store and the services"):
        places = (look_at_store(uri), *asyncio.run(services(grpc, builder)))
    if store and not places[0].ok:
        problems.append(f"store {store}: {places[0].state}")
    if isinstance(inference, str):
        problems += [inference] if base else []
    elif inference.warning:
        problems.append(inference.warning)
    machine = look_at_machine(cache_dir)
    return Diagnosis(
        problems=tuple(dict.fromkeys(problems)),
        versions=versions(),
        extras=tuple(extras()),
        machine=machine,
        inference=inference,
        places=places,
        base=_sizes(base, config, settings, inference, machine) if base else None,
    )


def _inference(config: dict[str, Any]) -> Inference | str:
    with tempfile.TemporaryDirectory(prefix="loramux-") as folder:
        (Path(folder) / "config.json").write_text(json.dumps(config), encoding="utf-8")
        return look_at_inference(Path(folder))


def _sizes(
    base: Path,
    config: dict[str, Any],
    settings: InferenceSettings,
    inference: Inference | str,
    machine: Machine,
) -> Sizes:
    files = weight_files_bytes(base)
    if isinstance(inference, str):
        return sizes_of(config, settings, machine.memory_bytes, file_bytes=files)
    graphs = (inference.device, inference.backend) == ("cuda", "triton")
    free, dtype, device = inference.free_bytes, inference.dtype, inference.device
    return sizes_of(config, settings, free, dtype, device, graphs=graphs, file_bytes=files)


async def services(grpc: str, builder: str) -> list[Place]:
    """Return the health of the builder, and of each replica of a list or a name."""
    try:
        replicas = resolve(grpc) if is_many(grpc) else (Address(grpc),)
    except SettingsInvalid as fault:
        return [await _service("builder", Address(builder)), Place("inference", grpc, fault.message, ok=False)]
    asked = [_service("builder", Address(builder)), *(_service("inference", each) for each in replicas)]
    return await asyncio.gather(*asked)


async def _service(name: str, address: Address) -> Place:
    try:
        status = await check(address.target, tls_name=address.name)
    except ServerUnavailable:
        return Place(name, address.target, "nothing answers there", ok=False)
    except Fault as fault:
        return Place(name, address.target, fault.message, ok=False)
    return Place(name, address.target, status, ok=status == SERVING)
