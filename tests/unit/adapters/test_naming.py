"""From a request's name to what answers it: after the generation that it asks for."""

from __future__ import annotations

import asyncio
import time

import pytest

from inference_service.adapters.catalog import Catalog, ServedModel
from inference_service.adapters.defaults import NO_DEFAULTS, AdapterDefaults
from inference_service.serving.naming import Naming
from inference_service.serving.request import Request
from loramux_shared.faults import DeadlineExceeded, ModelNotFound, ReplicaBehind, RequestInvalid
from tests.unit.adapters.test_catalog import BASE, digest, generation


def naming(*others: str) -> tuple[Naming, Catalog]:
    """Generation 1: a, and other names, all of version ``one``."""
    catalog = Catalog(1, "base", [BASE])
    catalog.apply(generation(1, dict.fromkeys(("a", *others), "one"), aliases={"alias": {"a": 1}}))
    return Naming(catalog), catalog


async def test_the_name_is_looked_up_after_catching_up() -> None:
    """A client that has published reads what it wrote, by every name, and the answer says so."""
    names, catalog = naming()
    asked: list[int] = []

    async def catch_up(number: int) -> None:
        asked.append(number)
        await asyncio.sleep(0)
        catalog.apply(generation(number, {"a": "two", "new": "three"}))

    names.catch_up = catch_up
    served = await names.choose(Request("new", "x", min_generation=5))
    assert (served.model.digest, served.generation) == (digest("three"), 5)
    assert (await names.choose(Request("a", "x", min_generation=3))).model.digest == digest("two")
    assert asked == [5]


async def test_a_replica_that_stays_behind_says_so() -> None:
    """Without somebody who follows, with one who fails, and with one who finds less than was asked for."""
    names, _ = naming()
    for catch_up in (names.catch_up, lambda _: asyncio.sleep(0)):
        names.catch_up = catch_up
        with pytest.raises(ReplicaBehind, match="generation 2, and this replica has 1") as behind:
            await names.choose(Request("a", "x", min_generation=2))
        assert behind.value.retry_after_s
    assert (await names.choose(Request("a", "x", min_generation=1))).generation == 1


async def test_a_deadline_ends_the_wait() -> None:
    """Who has no time left is not kept, and a time-out of the follower's own is not the caller's."""
    names, _ = naming()
    names.catch_up = lambda _: asyncio.sleep(60)
    with pytest.raises(DeadlineExceeded):
        await names.choose(Request("a", "x", min_generation=2, deadline_s=time.monotonic() + 0.02))

    async def late(_: int) -> None:
        raise TimeoutError

    names.catch_up = late
    with pytest.raises(TimeoutError):
        await names.choose(Request("a", "x", min_generation=2))


@pytest.mark.parametrize(
    ("model", "path"),
    [
        ("a", "a"),
        ("alias", "a"),
        ("a", "base:a"),
        ("base:a", "a"),
        ("alias", "alias"),
        (f"a@{digest('one')}", "a"),
    ],
)
async def test_lora_path_may_say_the_same_again(model: str, path: str) -> None:
    """However both spell it."""
    names, _ = naming()
    assert (await names.choose(Request(model, "x", lora_path=path))).model.name == "a"


async def test_lora_path_names_an_adapter_of_the_base() -> None:
    """As SGLang has it: model is the base, and lora_path what is added to it."""
    names, _ = naming("b")
    for path in ("a", "base:a", "alias"):
        assert (await names.choose(Request("base", "x", lora_path=path))).model.name == "a"
    with pytest.raises(ModelNotFound):
        await names.choose(Request("base", "x", lora_path="nobody"))


async def test_lora_path_of_another_adapter_is_refused() -> None:
    """What stands in two places is not guessed: not two adapters, not two names of one digest."""
    names, _ = naming("b")
    for model, path in (("a", "b"), ("a", "base")):
        with pytest.raises(RequestInvalid) as refused:
            await names.choose(Request(model, "x", lora_path=path))
        assert refused.value.findings[0].where == "lora_path"


async def test_defaults_are_read_where_nobody_has() -> None:
    """What is known costs nothing; the rest is asked of whoever reads bundles."""
    names, catalog = naming()
    calm = AdapterDefaults(temperature=0.1)

    async def read(model: ServedModel) -> AdapterDefaults:
        assert model.name == "old"
        return calm

    names.defaults_of = read
    assert await names.defaults(catalog.get("a")) is NO_DEFAULTS
    assert await names.defaults(ServedModel("old", defaults=None)) is calm
