"""Several adapters with scales in a request, as PEFT's ``add_weighted_adapter`` has them with "cat"."""

import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from inference_service.core.adapter import Mixture
from loramux_shared.faults import Fault, ModelNotFound, RequestInvalid
from loramux_shared.storage.memory import MemoryStore
from tests.models.conftest import Counted
from tests.support import tiny
from tests.support.cases import cases

NEW = 8
Parts = tuple[tuple[str, float], ...]
Oracle = Callable[[Parts, Sequence[int]], list[int]]
SECOND = "all, second"
"""The folder of a second version of an adapter."""
EIGHT: Parts = (("wide", 0.5), ("all", -0.25), ("wide", -0.75), ("rs", 0.5), ("all", 1.0))
"""A blend of three adapters, two of them named twice."""


def text(parts: Parts) -> str:
    return " + ".join(f"{name}*{scale}" for name, scale in parts)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> tiny.World:
    """Three adapters, of other ranks and modules each, and a second version of one."""
    world = tiny.make_world(tmp_path_factory.mktemp("tiny"))
    tiny.make_adapter(world.base, world.root / SECOND, 99, **tiny.ADAPTERS["all"])
    return world


@pytest.fixture(scope="module")
def peft(world: tiny.World) -> Oracle:
    """Greedy tokens of a mixture in PEFT; a base and an adapter alone are mixtures of none and one."""
    model = tiny.oracle(world.base, world.adapters["wide"])
    for name in ("wide", "all", "rs", SECOND):
        model.load_adapter(str(world.root / name), name)

    def answer(parts: Parts, prompt: Sequence[int]) -> list[int]:
        summed: dict[str, float] = {}
        for name, scale in sorted(
            parts, key=lambda part: part[0] == "rs"
        ):  # the first one's rsLoRA would be all's
            summed[name] = summed.get(name, 0.0) + scale
        if not any(summed.values()):
            with model.disable_adapter():
                return tiny.oracle_tokens(model, prompt, NEW)
        if list(summed) == ["rs"]:
            summed["wide"] = 0.0
            summed = dict(sorted(summed.items(), reverse=True))
        model.add_weighted_adapter(list(summed), list(summed.values()), "mixed", combination_type="cat")
        model.set_adapter("mixed")
        found = tiny.oracle_tokens(model, prompt, NEW)
        model.delete_adapter("mixed")
        return found

    return answer


def drawn(seed: int, count: int) -> list[tuple[Parts, list[int]]]:
    """Requests of the base, adapters, adapters with a scale and mixtures, in a random order."""
    draw = random.Random(seed)
    requests: list[tuple[Parts, list[int]]] = []
    for _ in range(count):
        names = draw.choices(list(tiny.ADAPTERS), k=draw.choice([0, 1, 1, 2, 2, 3, 8]))
        scales = [draw.choice([1.0, 1.0, 0.5, -0.5, 0.0, 1.5, round(draw.uniform(-2, 2), 3)]) for _ in names]
        prompt = [draw.randrange(3, tiny.VOCAB) for _ in range(draw.choice([1, 14, 30, 40]))]
        requests.append((tuple(zip(names, scales, strict=True)), prompt))
    return requests


def answers(ready: tiny.Replica, requests: Sequence[tuple[Parts, list[int]]]) -> list[list[int]]:
    return tiny.run_engine(ready, [(text(parts) or "base", prompt) for parts, prompt in requests], NEW)


@pytest.mark.parametrize("backend", ["native", "torch"])
def test_random_mixtures_in_one_batch_equal_peft(
    world: tiny.World, store: MemoryStore, peft: Oracle, counted: Counted, backend: str
) -> None:
    """Blends answer as PEFT beside plain adapters and alone, in chunks, with prefixes, and after preemption."""
    requests = [(EIGHT, [7, 8, 9]), *drawn(0, 9)]
    expected = [peft(*request) for request in requests]
    settings: dict[str, Any] = {"native": backend == "native", "block_size": 16}
    ready = world.load(store, max_batch_tokens=32, **settings)
    for situation in ("mixed batch", "prefix hits"):
        counted("mixtures", backend, situation, answers(ready, requests), expected)
    assert ready.engine.stats.prefix_tokens_hit > 0
    alone = [answers(ready, [request])[0] for request in requests]
    counted("mixtures", backend, "alone", alone, expected)
    small = world.load(store, kv_memory_gb=128 * 2 * 2 * 2 * 8 * 4 / 1e9, **settings)
    counted("mixtures", backend, "preemption", answers(small, requests), expected)
    assert small.engine.stats.preemptions > 0


def test_one_form_of_a_mixture_has_one_prefix(world: tiny.World, store: MemoryStore) -> None:
    """Cached prompts of a blend are found in every spelling, and those of other scales are not."""
    ready = world.load(store, block_size=16)
    prompt = list(range(3, 3 + 40))
    for request, hit in cases(__file__, "test_one_form_of_a_mixture_has_one_prefix"):
        before = ready.engine.stats.prefix_tokens_hit
        tiny.run_engine(ready, [(request, prompt)], 1)
        assert ready.engine.stats.prefix_tokens_hit - before == hit, request


REFUSED: list[tuple[str, type[Fault], str]] = [
    ("wide*0.5+nobody", ModelNotFound, "no model 'nobody'"),
    ("wide+", RequestInvalid, "with \\+ between"),
    ("wide**2", RequestInvalid, "with \\+ between"),
    ("wide*+all", RequestInvalid, "a number after every \\*"),
    ("wide*nan", RequestInvalid, "a number after every \\*, found wide\\*nan"),
    ("wide*-8.5", RequestInvalid, "scales from -8 to 8"),
    ("+".join(["wide"] * 9), RequestInvalid, "at most 8 adapters, found more"),
    ("wide+all+rs", RequestInvalid, "at most 2 adapters, as many as a step may have"),
    ("base*0.5+wide", RequestInvalid, "the base is part of every answer already, found base"),
    ("wide@00000000*0.5", ModelNotFound, "no version"),
]


def test_what_cannot_be_mixed_is_refused_by_name(world: tiny.World, store: MemoryStore) -> None:
    """A blend that cannot be computed is refused by name before the engine."""
    catalog = world.load(store, max_batch_adapters=2).service.local.catalog
    assert isinstance(catalog.resolve("wide*1e-1+all*2E+0+rs*0").mixture, Mixture)
    for request, fault, stated in REFUSED:
        with pytest.raises(fault, match=stated):
            catalog.resolve(request)
