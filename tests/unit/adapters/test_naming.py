"""The model of a request's name, after the generation that it requests."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from types import SimpleNamespace
from typing import cast

import pytest

from inference_service.adapters.catalog import Catalog
from inference_service.adapters.follower import FollowerStanding
from inference_service.adapters.texts import AdapterTexts
from inference_service.core.request import Request
from inference_service.core.served_model import NO_DEFAULTS, AdapterDefaults
from inference_service.driver.naming import Naming
from loramux_shared.faults import DeadlineExceeded, ModelNotFound, ReplicaBehind, RequestInvalid
from tests.support.cases import cases
from tests.unit.adapters.test_catalog import BASE, digest, generation


class Follows:
    """A follower that does what a test says."""

    def __init__(self, catch_up: Callable[[int], Awaitable[None]]) -> None:
        self.standing = FollowerStanding(1, 1)
        self.catch_up = catch_up


def naming(*others: str, catch_up: Callable[[int], Awaitable[None]] | None = None) -> tuple[Naming, Catalog]:
    """Generation 1: a, and other names, all of version ``one``."""
    catalog = Catalog(1, "base", [BASE])
    catalog.apply(generation(1, dict.fromkeys(("a", *others), "one"), aliases={"alias": {"a": 1}}))
    return Naming(catalog, Follows(catch_up) if catch_up is not None else None), catalog


@pytest.mark.parametrize("catch_up", [None, lambda _: asyncio.sleep(0)])
async def test_a_replica_that_stays_behind_says_so(catch_up: Callable[[int], Awaitable[None]] | None) -> None:
    """The refusal comes without a follower, and with one that finds an older generation than was requested."""
    names, _ = naming(catch_up=catch_up)
    with pytest.raises(ReplicaBehind, match="generation 2, and this replica has 1") as behind:
        await names.choose(Request.of("a", "x", min_generation=2))
    assert behind.value.retry_after_s
    assert (await names.choose(Request.of("a", "x", min_generation=1))).generation == 1


async def test_a_deadline_ends_the_wait() -> None:
    """A request without time left does not wait, and a time-out of the follower is not the caller's."""
    names, _ = naming(catch_up=lambda _: asyncio.sleep(60))
    with pytest.raises(DeadlineExceeded):
        await names.choose(Request.of("a", "x", min_generation=2, deadline_s=time.monotonic() + 0.02))

    async def late(_: int) -> None:
        raise TimeoutError

    names, _ = naming(catch_up=late)
    with pytest.raises(TimeoutError):
        await names.choose(Request.of("a", "x", min_generation=2))


@pytest.mark.parametrize(("model", "path"), cases(__file__, "test_lora_path_may_say_the_same_again"))
async def test_lora_path_may_say_the_same_again(model: str, path: str) -> None:
    """A `lora_path` beside the model's name is accepted where both name one adapter."""
    names, _ = naming()
    assert (await names.choose(Request.of(model, "x", lora_path=path))).model.name == "a"


async def test_lora_path_names_an_adapter_of_the_base() -> None:
    """A request in SGLang's form has the base as model, and lora_path is the adapter on it."""
    names, _ = naming("b")
    for path in ("a", "base:a", "alias"):
        assert (await names.choose(Request.of("base", "x", lora_path=path))).model.name == "a"
    with pytest.raises(ModelNotFound):
        await names.choose(Request.of("base", "x", lora_path="nobody"))


async def test_lora_path_of_another_adapter_is_refused() -> None:
    """A contradiction of both is not guessed: not two adapters, not two names of one digest."""
    names, _ = naming("b")
    for model, path in (("a", "b"), ("a", "base")):
        with pytest.raises(RequestInvalid) as refused:
            await names.choose(Request.of(model, "x", lora_path=path))
        assert refused.value.findings[0].where == "lora_path"


async def test_defaults_are_read_where_nobody_has() -> None:
    """Known defaults cost nothing; others are read from the bundle, once for all names of its digest."""
    catalog = Catalog(1, "base", [BASE])
    catalog.apply(generation(1, {"old": "one"}, summary=None))
    calm, read = AdapterDefaults(temperature=0.1), []

    async def defaults(digest: str, name: str) -> AdapterDefaults:
        read.append((digest, name))
        return calm

    texts = cast(AdapterTexts, SimpleNamespace(defaults=defaults))
    assert await naming()[0].defaults(BASE) is NO_DEFAULTS
    names = Naming(catalog, texts=texts)
    for _ in range(2):
        assert await names.defaults(catalog.get("old")) is calm
    assert read == [(digest("one"), "old")]
