"""``loramux doctor``: what is installed, what a replica would run on, what would fit, and what is wrong."""

import asyncio
import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Final

import typer
from rich.filesize import decimal

from loramux.cli import shell
from loramux.cli.doctor.installed import Extra, extras, versions
from loramux.cli.doctor.machine import (
    Inference,
    Machine,
    Place,
    look_at_inference,
    look_at_machine,
    look_at_store,
)
from loramux.cli.doctor.sizes import PROCESS_BYTES, Sizes, read_base, sizes_of, weight_files_bytes
from loramux.cli.documents import emit
from loramux.cli.exits import Exit
from loramux.cli.serving import SERVING, check
from loramux.client import BUILDER, INFERENCE
from loramux.connection import Address, is_many, resolve
from loramux_shared.faults import Fault, ServerUnavailable, SettingsInvalid
from loramux_shared.settings import InferenceSettings, load_settings
from loramux_shared.wording import counted

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
HELD: Final = "held in 12 bits"
"""A part of the product that a replica reports where weights are compact."""
DEFAULT_STORE: Final[str] = InferenceSettings.model_fields["store"].default
DEFAULT_CACHE: Final[Path] = InferenceSettings.model_fields["cache_dir"].default.expanduser()

Store = Annotated[
    str | None,
    typer.Option("--store", metavar="URI", help="Store that must answer; default: the one that is set."),
]
Base = Annotated[
    Path | None, typer.Option("--base", metavar="PATH", help="Checkpoint, or its config.json, to size.")
]
KvGb = Annotated[
    float | None,
    typer.Option("--kv-gb", metavar="GB", min=0.001, help="GB of KV cache; default: a replica's."),
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

    What is not installed or does not run is reported, and is nothing wrong.

    Example: loramux doctor --base ./my-base --kv-gb 8
    """
    found = examine(store, grpc, builder, base, kv_gb)
    if as_json:
        emit({"diagnosis": found})
    else:
        show_diagnosis(found)
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
        return sizes_of(config, settings, machine.usable_bytes, file_bytes=files)
    graphs = (inference.device, inference.backend) == ("cuda", "triton")
    free, dtype, device = inference.free_bytes, inference.dtype, inference.device
    return sizes_of(config, settings, free, dtype, device, graphs=graphs, file_bytes=files)


async def services(grpc: str, builder: str) -> list[Place]:
    """Return the health of the builder, and of each replica of a list or a name."""
    try:
        replicas = resolve(grpc) if is_many(grpc) else (Address(grpc),)
    except SettingsInvalid as fault:
        return [await _service("builder", Address(builder)), Place("inference", grpc, fault.message, ok=False)]
    checks = [_service("builder", Address(builder)), *(_service("inference", each) for each in replicas)]
    return await asyncio.gather(*checks)


async def _service(name: str, address: Address) -> Place:
    try:
        status = await check(address.target, tls_name=address.name)
    except ServerUnavailable:
        return Place(name, address.target, "nothing answers there", ok=False)
    except Fault as fault:
        return Place(name, address.target, fault.message, ok=False)
    return Place(name, address.target, status, ok=status == SERVING)


def show_diagnosis(found: Diagnosis) -> None:
    """Print a diagnosis: the verdict, what a replica would run on and reach, then what is installed."""
    for problem in found.problems:
        shell.show(f"wrong: {problem}", "bold red")
    risks = () if isinstance(found.inference, str) else found.inference.risks
    for risk in risks:
        shell.show(f"risk: {risk}", "yellow")
    if not found.problems and not risks:
        shell.show("nothing is wrong", "bold green")
    shell.show()
    machine = found.machine
    memory = decimal(machine.memory_bytes)
    if machine.memory_limit_bytes is not None:
        memory = f"{decimal(machine.memory_limit_bytes)} (a container's limit) of {memory}"
    _line("machine", f"{machine.system}, {machine.cores} cores, {memory} of memory, Python {machine.python}")
    _line("cache", f"{machine.cache_dir}, {decimal(machine.cache_free_bytes)} free")
    _show_inference(found)
    for place in found.places:
        _line(place.name, f"{place.address}: {place.state}")
    if found.base:
        shell.show()
        chosen = None if isinstance(found.inference, str) else found.inference
        on_cpu = chosen is not None and chosen.device == "cpu"
        _show_sizes(found.base, on_cpu=on_cpu, compact=chosen is not None and HELD in chosen.product)
    shell.show()
    _show_installed(found)


def _show_installed(found: Diagnosis) -> None:
    """Print versions, the extras that lack something, and the others in one line."""
    present = {name: version for name, version in found.versions.items() if version}
    _line("installed", ", ".join(f"{name} {version}" for name, version in present.items()))
    for extra in found.extras:
        if extra.missing:
            _line(f"[{extra.name}]", f"lacks {', '.join(extra.missing)}: {extra.cure}")
    if complete := [extra.name for extra in found.extras if not extra.missing]:
        _line("extras", f"complete: {', '.join(complete)}")


def _show_inference(found: Diagnosis) -> None:
    chosen = found.inference
    if isinstance(chosen, str):
        _line("runs on", f"nothing: {chosen}")
        return
    free, memory = decimal(chosen.free_bytes), decimal(chosen.memory_bytes)
    threads = counted(chosen.threads, "thread") + (f" ({chosen.threads_why})" if chosen.threads_why else "")
    _line("runs on", f"{chosen.device}: {chosen.name}, {free} of {memory} free, {threads}")
    if chosen.cuda:
        _line("driven by", chosen.cuda)
        _line("locks", f"{decimal(chosen.pinned_bytes)} of the host's memory for adapters, at most")
    _line("computes in", f"{chosen.dtype}, backend {chosen.backend}: {chosen.how}")
    _line("multiplies", chosen.product)
    if found.base and chosen.reading:
        _line("reads", chosen.reading)


def _show_sizes(sizes: Sizes, *, on_cpu: bool, compact: bool) -> None:
    weights, left = decimal(sizes.weights_bytes), decimal(sizes.free_bytes)
    _line("weights", f"{weights} as {sizes.dtype}; {left} are free")
    if compact:
        _line("", f"a linear's weights are {HELD} once it is loaded: a quarter less")
    if sizes.widened:
        _line("", sizes.widened)
    _line("steps", f"{decimal(sizes.steps_bytes)} for the largest")
    if on_cpu:
        ready = decimal(sizes.ready_bytes)
        _line("process", f"{decimal(PROCESS_BYTES)}; a replica is ready with {ready}, before the cache fills")
    token, behind = sizes.kv_token_bytes, sizes.kv_behind_bytes
    each = decimal(token) + (f", {decimal(behind)} behind the windows of layers" if behind < token else "")
    states = f", {sizes.state_slots} states of {decimal(sizes.state_bytes)}" if sizes.state_bytes else ""
    kind = f" in {sizes.kv_dtype}" if sizes.kv_dtype else ""
    _line("KV cache", f"{decimal(sizes.kv_bytes)}: {sizes.kv_tokens} tokens of {each}{kind}{states}")
    if sizes.refusal:
        shell.show(f"it does not fit: {sizes.refusal}", "yellow")
        if sizes.ranks:
            shell.show(f"with LORAMUX_TENSOR_PARALLEL={sizes.ranks} and as many such GPUs it fits", "yellow")
    rows = [(str(fit.rank), decimal(fit.adapter_bytes), str(fit.adapters)) for fit in sizes.fits]
    headers = ("rank, all modules", "one adapter", "adapters that fit")
    shell.table(headers, rows, frozenset(headers))
    if not sizes.kv_is_set and not sizes.refusal:
        gb = sizes.kv_bytes // 10**6 / 1e3
        shell.show(f"with LORAMUX_KV_MEMORY_GB={gb}; without it, the cache takes less beside adapters", "dim")


def _line(name: str, text: str) -> None:
    shell.show(f"{name:<12} {text}")
