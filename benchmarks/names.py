"""What names cost: registering, switching and looking up among 10,000 adapters.

Prints a table; no model is run.
"""

from __future__ import annotations

import gc
import hashlib
import statistics
import time
import tracemalloc
from collections.abc import Callable, Collection
from contextlib import suppress
from datetime import UTC, datetime

from inference_service.serving.catalog import Catalog, ServedModel
from loramux_shared.bundle.generation import AdapterRecord, BaseRecord, Generation
from loramux_shared.bundle.manifest import AdapterSummary
from loramux_shared.deployment import Dtype, Repository, SourceKind
from loramux_shared.faults import ModelNotFound

ADAPTERS, ROUNDS = 10_000, 7
MODULES = ("attn_q", "attn_k", "attn_v", "attn_dense", "mlp_h_to_4h", "mlp_4h_to_h", "mlp_gate")


def main() -> None:
    """Measure everything."""
    first = _generation(1)
    one, all_of_them = _generation(2, {ADAPTERS // 2}), _generation(3, range(ADAPTERS))
    _tell("take over a first generation", lambda: _catalog(first))
    _tell("switch one of them", lambda names: names.apply(one), lambda: _catalog(first))
    _tell("switch all of them", lambda names: names.apply(all_of_them), lambda: _catalog(first))
    names = _catalog(first)
    _tell("look one up", lambda: names.resolve("adapter-05000"))
    _tell("look up one that is not there", lambda: _miss(names))
    data = first.to_bytes()
    print(f"{'bytes of each, with records read from a store':48} {_memory(data, keep=True):10.0f}")
    print(f"{'bytes of each, the generation forgotten':48} {_memory(data, keep=False):10.0f}")


def _tell(what: str, act: Callable[..., object], prepare: Callable[[], Catalog] | None = None) -> None:
    seconds = []
    for _ in range(ROUNDS):
        given = [prepare()] if prepare else []
        started = time.perf_counter()
        act(*given)
        seconds.append(time.perf_counter() - started)
    print(f"{what + ', ms':48} {statistics.median(seconds) * 1e3:10.4f}")


def _miss(names: Catalog) -> None:
    with suppress(ModelNotFound):
        names.resolve("adapter-o5000")


def _catalog(generation: Generation) -> Catalog:
    made = Catalog(1, "base", [ServedModel("base")])
    made.apply(generation)
    return made


def _memory(data: bytes, *, keep: bool) -> float:
    """Return the bytes per adapter of a catalog, and of the generation where that is kept."""
    gc.collect()
    tracemalloc.start()
    generation: Generation | None = Generation.from_bytes(data)
    assert generation is not None  # noqa: S101 - for the type
    names = _catalog(generation)
    generation = generation if keep else None
    gc.collect()
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return held / max(1, len(names.everything) - 1)


def _generation(number: int, switched: Collection[int] = ()) -> Generation:
    """A generation whose records say what the builder's do; those of the numbers have other digests."""
    source = Repository(source=SourceKind.HF, repo="org/base", revision="0" * 40)
    return Generation(
        deployment="d",
        number=number,
        create_time=datetime.now(UTC),
        served_model_name="base",
        base=BaseRecord(source=source, files={}),
        adapters={
            f"adapter-{nth:05}": AdapterRecord(
                digest=hashlib.sha256(f"{nth} {nth in switched}".encode()).hexdigest(),
                source=Repository(source=SourceKind.HF, repo=f"org/adapter-{nth:05}", revision=f"{nth:040x}"),
                summary=AdapterSummary(
                    ranks=(16,), modules=MODULES, tensors_used=420, weights_bytes=2**24, bundle_bytes=2**24
                ),
            )
            for nth in range(ADAPTERS)
        },
        max_lora_rank=64,
        lora_dtype=Dtype.BFLOAT16,
    )


if __name__ == "__main__":
    main()
