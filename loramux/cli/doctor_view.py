"""The view of a diagnosis: a line per item, problems last."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.filesize import decimal

from loramux.cli import shell
from loramux.doctor.sizes import PROCESS_BYTES, Sizes

if TYPE_CHECKING:
    from loramux.cli.doctor import Diagnosis


def show(found: Diagnosis) -> None:
    """Print a diagnosis."""
    present = {name: version for name, version in found.versions.items() if version}
    _line("installed", ", ".join(f"{name} {version}" for name, version in present.items()))
    for extra in found.extras:
        lacks = f"lacks {', '.join(extra.missing)}: {extra.cure}"
        _line(f"[{extra.name}]", lacks if extra.missing else "ok")
    machine = found.machine
    memory = decimal(machine.memory_bytes)
    _line("machine", f"{machine.system}, {machine.cores} cores, {memory} of memory, Python {machine.python}")
    _line("cache", f"{machine.cache_dir}, {decimal(machine.cache_free_bytes)} free")
    _show_inference(found)
    for place in found.places:
        _line(place.name, f"{place.address}: {place.state}")
    if found.base:
        shell.show()
        on_cpu = not isinstance(found.inference, str) and found.inference.device == "cpu"
        _show_sizes(found.base, on_cpu=on_cpu)
    shell.show()
    for problem in found.problems:
        shell.show(f"wrong: {problem}", "bold red")
    if not found.problems:
        shell.show("nothing is wrong", "bold green")


def _show_inference(found: Diagnosis) -> None:
    chosen = found.inference
    if isinstance(chosen, str):
        _line("runs on", f"nothing: {chosen}")
        return
    free, memory = decimal(chosen.free_bytes), decimal(chosen.memory_bytes)
    _line("runs on", f"{chosen.device}: {chosen.name}, {free} of {memory} free, {chosen.threads} threads")
    _line("computes in", f"{chosen.dtype}, backend {chosen.backend}: {chosen.how}")
    _line("multiplies", chosen.product)
    if found.base and chosen.reading:
        _line("reads", chosen.reading)


def _show_sizes(sizes: Sizes, *, on_cpu: bool) -> None:
    weights, left = decimal(sizes.weights_bytes), decimal(sizes.free_bytes)
    _line("weights", f"{weights} as {sizes.dtype}; {left} are free")
    if sizes.widened:
        _line("", sizes.widened)
    _line("steps", f"{decimal(sizes.steps_bytes)} for the largest")
    if on_cpu:
        ready = decimal(sizes.ready_bytes)
        _line("process", f"{decimal(PROCESS_BYTES)}; a replica is ready with {ready}, before the cache fills")
    token, behind = sizes.kv_token_bytes, sizes.kv_behind_bytes
    each = decimal(token) + (f", {decimal(behind)} behind the windows of layers" if behind < token else "")
    states = f", {sizes.state_slots} states of {decimal(sizes.state_bytes)}" if sizes.state_bytes else ""
    _line("KV cache", f"{decimal(sizes.kv_bytes)}: {sizes.kv_tokens} tokens of {each}{states}")
    if sizes.refusal:
        shell.show(f"it does not fit: {sizes.refusal}", "yellow")
    rows = [(str(fit.rank), decimal(fit.adapter_bytes), str(fit.adapters)) for fit in sizes.fits]
    headers = ("rank, all modules", "one adapter", "adapters that fit")
    shell.table(headers, rows, frozenset(headers))
    if not sizes.kv_is_set and not sizes.refusal:
        gb = sizes.kv_bytes // 10**6 / 1e3
        shell.show(f"with LORAMUX_KV_MEMORY_GB={gb}; without it, the cache takes less beside adapters", "dim")


def _line(name: str, text: str) -> None:
    shell.show(f"{name:<12} {text}")
