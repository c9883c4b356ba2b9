"""Names of models: which can be one, and which fit together."""

from __future__ import annotations

from typing import Any

import pytest

from loramux_shared.bundle.names import OWN_NAME, ModelNames, bad_name


def judged(*adapters: str, in_file: bool = False, **fields: Any) -> list[tuple[str, str]]:
    """Return the places where names of a deployment with base "base" and alias "al" do not fit, and the names
    found.
    """
    aliases = {"al": {"one": 1, "two": 0}}
    names = ModelNames(**{"base": "base", "adapters": adapters, "aliases": aliases} | fields)
    return [(finding.where, finding.found) for finding in names.findings(in_file=in_file)]


@pytest.mark.parametrize("name", ["al", "AL", "Base", "ONE"])
def test_each_model_has_a_name_of_its_own(name: str) -> None:
    """Names differ in more than case, aliases included."""
    owner = {"al": "alias al", "base": "the base base", "one": "adapter one"}[name.lower()]
    assert judged("one", name) == [(f"adapters.{name}", owner)]
    [finding] = ModelNames("base", ("one", name), {"al": {"one": 1}}).findings()
    assert finding.expected == OWN_NAME
    assert ModelNames("base", ("one",), {"al": {"one": 1}}).owner(name) == owner


def test_an_alias_has_a_model_that_answers() -> None:
    """One that is served and has a weight; in a file all of them are models of the deployment."""
    assert judged("one") == []
    assert judged("two") == [("runtime.aliases.al", "one: 1, two: 0")]
    assert judged("one", in_file=True) == [("runtime.aliases.al", "two")]
    to_base = {"aliases": {"al": {"base": 1}}}
    assert judged(**to_base) == []
    assert judged("one", serve_base=False, **to_base) == [("runtime.aliases.al", "base: 1")]


def test_something_is_served() -> None:
    """A deployment serves something, and a merged adapter is alone."""
    assert judged(serve_base=False, aliases={}) == [("adapters", "none")]
    found = "adapters: one, two; runtime.serve_base: false"
    assert judged("one", "two", serve_base=False, merge_always=True) == [("adapters", found)]


@pytest.mark.parametrize("name", ["", "a b", "a*2", ".a", "x" * 129, "a\n"])
def test_what_is_no_name(name: str) -> None:
    """The cure is the rule."""
    finding = bad_name(name, "here")
    assert finding is not None
    assert finding.where == "here"
    assert "Begin with a letter" in finding.fix
    assert bad_name("a-b.c:d_1", "here") is None
