"""Names across generations: the adapter of a request, the rights of a caller, and the cost."""

import tracemalloc
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest

from inference_service.adapters.catalog import EARLIER, Catalog
from inference_service.core.adapter import Adapter
from inference_service.core.served_model import AdapterDefaults, ServedModel
from loramux_shared.access.keys import ACCESS, Access, Scope
from loramux_shared.bundle.generation import Generation
from loramux_shared.bundle.manifest import AdapterSummary
from loramux_shared.faults import ModelNotFound, RequestInvalid
from tests.support import generations

BASE = ServedModel("base", warnings=("W_HEAD",))
SUMMARY = AdapterSummary(
    ranks=(8,), modules=("attn_q",), tensors_used=2, weights_bytes=64, bundle_bytes=99, texts=()
)


def digest(text: str) -> str:
    return generations.record(text).digest


def generation(number: int, adapters: Mapping[str, str], summary=SUMMARY, **fields: Any) -> Generation:
    """A generation of adapters, by name, with digests that begin as said."""
    records = {name: generations.record(begin, summary=summary) for name, begin in adapters.items()}
    values = {"number": number, "served_model_name": "base", "adapters": records}
    return generations.generation(**(values | fields))


def catalog(adapters: Mapping[str, str], **fields: Any) -> Catalog:
    made = Catalog(1, "base", [BASE])
    made.apply(generation(1, adapters, **fields))
    return made


@contextmanager
def caller(*models: str) -> Iterator[None]:
    token = ACCESS.set(Access("ann", frozenset({Scope.INFER}), frozenset(models)))
    try:
        yield
    finally:
        ACCESS.reset(token)


def test_what_an_adapter_is_and_who_may_use_it_is_known_from_its_record() -> None:
    """A model has kinds, replaced rows, invocation and licence from its record; a licence can change alone."""
    summary = SUMMARY.model_copy(update={"kinds": ("lora", "head"), "replaced": {"head": 3}})
    first = generation(1, {"a": "one"}, summary=summary)
    emitted = {"licence": "mit", "invocation_tokens": (5, 6)}
    record = first.adapters["a"].model_copy(update=emitted)
    known = Catalog(1, "base", [BASE])
    known.apply(first.model_copy(update={"adapters": {"a": record}}))
    model = known.get("a")
    assert (model.kinds, model.replaced, model.licence) == (("lora", "head"), (("head", 3),), "mit")
    assert (model.invocation, known.get("base").kinds, known.base_licence) == ((5, 6), (), "")
    again = record.model_copy(update={"licence": "other"})
    base = first.base.model_copy(update={"licence": "gemma"})
    known.apply(first.model_copy(update={"adapters": {"a": again}, "base": base, "number": 2}))
    assert (known.get("a").licence, known.base_licence) == ("other", "gemma")
    assert known.get("a").adapter is model.adapter


def test_the_base_can_be_renamed_and_hidden() -> None:
    """The base has the name of the deployment, or none where it is not served."""
    names = catalog({"a": "one"})
    names.apply(generation(2, {"a": "one", "base": "two"}, served_model_name="other"))
    assert [model.name for model in names] == ["other", "a", "base"]
    assert names.get("other").warnings == ("W_HEAD",)
    assert names.get("base").digest == digest("two")
    names.apply(generation(3, {"a": "one"}, served_model_name="other", serve_base=False))
    assert [model.name for model in names] == ["a"]
    names.apply(generation(4, {"a": "one"}))
    assert names.get("base").warnings == ("W_HEAD",)


def test_nothing_is_served_beside_a_merged_adapter() -> None:
    """A generation beside a merged adapter needs a restart, as the adapter's weights are in the base."""
    merged = Catalog(1, "base", [ServedModel("only", digest=digest("one"))])
    merged.apply(generation(2, {"only": "one"}, serve_base=False))
    assert merged.generation == 2
    with pytest.raises(ValueError, match="restart"):
        merged.apply(generation(3, {"only": "two"}, serve_base=False))
    assert (merged.generation, merged.get("only").digest) == (2, digest("one"))


def test_a_version_is_found_by_the_first_digits_of_its_digest() -> None:
    """NAME@DIGEST names one of the latest versions; another is refused with the known ones."""
    names = catalog({"a": "z00", "ab": "else"})
    for number in range(1, EARLIER + 3):
        names.apply(generation(number + 1, {"a": f"z{number:02}"}))
    for number in range(2, EARLIER + 3):
        assert names.resolve(f"a@{digest(f'z{number:02}')[:8]}").digest == digest(f"z{number:02}")
    with pytest.raises(ModelNotFound, match=f"has no version {digest('z01')}"):
        names.resolve(f"a@{digest('z01')}")
    for wrong in ("", digest("z05")[:6], "z05z05z05", digest("z05").upper(), digest("z05") + "0"):
        with pytest.raises(RequestInvalid, match="8 to 64 hex digits") as refused:
            names.resolve(f"a@{wrong}")
        assert refused.value.findings[0].where == "model"
    names.apply(generation(99, {"ab": "else"}))
    with pytest.raises(ModelNotFound, match="Served"):
        names.resolve(f"a@{digest('z05')}")
    names.apply(generation(100, {"a": "z99"}))
    with pytest.raises(ModelNotFound, match=f"Known: {digest('z99')[:12]}\\.$"):
        names.resolve(f"a@{digest('z05')}")


def test_digits_of_several_versions_are_refused() -> None:
    """Digits that several versions begin with are refused, and more digits cure it."""
    names = catalog({"a": "samesame1"})
    names.apply(generation(2, {"a": "samesame2"}))
    with pytest.raises(RequestInvalid, match="Give more digits"):
        names.resolve(f"a@{digest('samesame')[:16]}")
    assert names.resolve(f"a@{digest('samesame1')}").digest == digest("samesame1")


def test_an_alias_keeps_its_weights_and_its_keys() -> None:
    """Each key finds one model, on all replicas; all keys and all draws keep to the weights."""
    weights = {"alias": {"a": 90, "b": 10, "c": 0}}
    adapters = {"a": "one", "b": "two", "c": "three"}
    names, other = (catalog(adapters, aliases=weights) for _ in range(2))
    keys = [f"user-{number}" for number in range(2000)]
    picked = {key: names.resolve("alias", key).name for key in keys}
    assert picked == {key: other.resolve("alias", key).name for key in keys}
    counts = Counter(picked.values())
    assert counts["c"] == 0
    assert 140 <= counts["b"] <= 260
    drawn = Counter(names.resolve("alias").name for _ in range(2000))
    assert 140 <= drawn["b"] <= 260
    names.apply(generation(2, adapters, aliases={"alias": {"a": 80, "b": 20}}))
    moved = [key for key in keys if names.resolve("alias", key).name != picked[key]]
    assert all(picked[key] == "a" for key in moved)
    assert 140 <= len(moved) <= 260


def test_a_caller_gets_no_model_through_another_name() -> None:
    """An alias, its models, versions and prefixes check the rights; a forbidden model does not exist."""
    adapters = {"a": "one", "b": "two"}
    names = catalog(adapters, aliases={"alias": {"a": 1, "b": 99}, "secret": {"a": 1}})
    with caller("alias", "a"):
        assert {names.resolve("alias", str(key)).name for key in range(50)} == {"a"}
        assert names.resolve("base:a").name == "a"
        for hidden in ("b", "base", "base:b", f"b@{digest('two')[:8]}", "secret"):
            with pytest.raises(ModelNotFound, match=r"Served: a, alias\.$"):
                names.resolve(hidden)
    with caller("alias"), pytest.raises(ModelNotFound):
        names.resolve("alias")
    with caller("a", "b"), pytest.raises(ModelNotFound):
        names.resolve("alias")


def test_thousands_of_adapters_are_cheap() -> None:
    """A registered adapter costs less than 2 KB, and a switch of one changes no other."""
    adapters = {f"adapter-{number:05}": f"d{number:05}" for number in range(2_000)}
    first = generation(1, adapters)
    names = Catalog(1, "base", [BASE])
    tracemalloc.start()
    before, _ = tracemalloc.get_traced_memory()
    names.apply(first)
    after, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert (after - before) / len(adapters) < 2048
    retained = names.everything
    assert names.apply(generation(2, adapters | {"adapter-00500": "other"})).switched == ("adapter-00500",)
    same = [now is then for now, then in zip(names.everything, retained, strict=True)]
    assert same.count(False) == 1
    with pytest.raises(ModelNotFound, match="Did you mean adapter-005"):
        names.get("adapter-0050O")


def test_base_is_a_name_of_the_base() -> None:
    """`base` is the base where nothing else has the name, a base is served, and the caller may use it."""
    known = Catalog(1, "tiny", [ServedModel("tiny"), ServedModel("a", Adapter("a"))])
    assert known.resolve("base") == known.get("tiny")
    with caller("a"), pytest.raises(ModelNotFound, match="no model 'base'"):
        known.resolve("base")
    named = Catalog(1, "tiny", [ServedModel("tiny"), ServedModel("base", Adapter("b"))])
    assert named.resolve("base").adapter is not None
    with pytest.raises(ModelNotFound):
        Catalog(1, "tiny", [ServedModel("a", Adapter("a"))]).resolve("base")


def test_a_mixture_opens_nothing_that_its_parts_do_not() -> None:
    """Each part must be a model that the caller may use, the base where nothing is left; and none is merged."""
    known = catalog({"a": "one", "b": "two"})
    with caller("a"):
        assert known.resolve("a*0.5").names == ("a",)
        for request, missing in (("a+b", "b"), ("a*0", "base")):
            with pytest.raises(ModelNotFound, match=f"no model '{missing}'"):
                known.resolve(request)
    merged = Catalog(1, "base", [ServedModel("m", digest=digest("one"))])
    with pytest.raises(RequestInvalid, match="merged into the weights"):
        merged.resolve("m*0.5")


def test_what_adapters_of_a_mixture_bring_alike_counts() -> None:
    """A blend has the defaults and stop tokens that all its adapters share, read on demand."""
    ours = AdapterDefaults(temperature=0.5, top_p=0.9, stop_token_ids=frozenset({7}))
    other = AdapterDefaults(temperature=0.5, top_p=0.8, stop_token_ids=frozenset({8}))
    models = [
        ServedModel(name, Adapter(name), defaults=own, digest=name) for name, own in (("a", ours), ("b", other))
    ]
    known = Catalog(1, "base", models)
    together = AdapterDefaults(temperature=0.5, stop_token_ids=frozenset({7, 8}))
    assert known.resolve("a+b").defaults == together
    assert known.resolve("a*0.5").defaults == ours
    unread = Catalog(1, "base", [replace(each, defaults=None) for each in models])
    assert unread.resolve("a+b").defaults is None
