"""The lineage of bases, asked of a hub, and read in cards and tags."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub.hf_api import ModelInfo

from builder_service.builds.views import stored_view
from builder_service.pipeline.context import BuildContext
from loramux_lineage.asking import PARENTS, descent_of
from loramux_shared.deployment import Deployment
from loramux_shared.sources.open import open_sources
from loramux_shared.storage.memory import MemoryStore
from tests.support.adapters import write_adapter, write_base
from tests.support.cases import cases
from tests.support.folders import Built, built, deployment_of
from tests.support.hub import Hub, HubRepo, serve_hub

COMMIT = "c" * 40
INFO = "/api/models/"
TOKEN = "hf_not_a_real_one"  # noqa: S105 - of the small hub


def card(relation: str, parent: str) -> HubRepo:
    """Return a repository with nothing but a card that names the parent model."""
    return HubRepo({"main": COMMIT}, {}, card={"base_model": parent, "base_model_relation": relation})


def content(folder: Path) -> HubRepo:
    return HubRepo({"main": COMMIT}, {path.name: path.read_bytes() for path in folder.iterdir()})


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    """A hub with the base `lab/Tiny-1B` and its relatives."""
    with serve_hub() as hub:
        hub.repos["lab/Tiny-1B"] = content(write_base(tmp_path / "base"))
        hub.repos["some/copy"] = card("quantized", "lab/Tiny-1B")
        hub.repos["some/copy-of-it"] = card("quantized", "some/copy")
        hub.repos["some/tuned"] = card("finetune", "lab/Tiny-1B")
        yield hub


@pytest.fixture
def context(hub: Hub, tmp_path: Path) -> BuildContext:
    """A workshop that reads folders and the small hub, with a token for the hub."""
    sources = open_sources(
        local_roots=[tmp_path], hub_endpoint=hub.endpoint, environment={"HF_TOKEN": TOKEN}, work_dir=tmp_path
    )
    return BuildContext(MemoryStore(), sources, tmp_path / "work")


def deployment(folder: Path, base: str = "", **adapters: str) -> Deployment:
    """Adapters in folders that say that they were trained on these bases, for one on the hub or in a folder."""
    for name, trained_on in adapters.items():
        write_adapter(folder / name, base_model_name_or_path=trained_on)
    required = {"source": "LOCAL" if base.startswith("/") else "HF", "repo": base or "lab/Tiny-1B"}
    return deployment_of(folder, *adapters, checkpoint_repository=required)


def found_by(required: Deployment, context: BuildContext) -> tuple[Built, dict[str, str]]:
    """Build, and return the findings about base names, by adapter."""
    done = built(required, context)
    warnings = {name: done.warnings(name) for name in required.build.lora_adapters}
    return done, {name: each.found for name in warnings for each in warnings[name] if each.code == "W_BASE"}


def models_asked(hub: Hub) -> list[str]:
    """The models that the hub was asked about, beside the base."""
    names = [path.removeprefix(INFO) for _, path in hub.requests if path.startswith(INFO)]
    return [name for name in names if not name.startswith("lab/")]


def test_copies_are_the_base_and_others_are_named(hub: Hub, context: BuildContext, tmp_path: Path) -> None:
    """A build asks once for each model; the generation stores the answer, and no request shows a token."""
    hub.repos["some/private"] = HubRepo({"main": COMMIT}, {}, token=TOKEN, card={"base_model": "lab/Tiny-1B"})
    names = {"one": "some/copy", "two": "some/copy-of-it", "three": "some/tuned", "four": "some/tuned"}
    expected = deployment(tmp_path, **names, five="some/private", six="unsloth/Tiny-1B-bnb-4bit")
    _, found = found_by(expected, context)
    tuned = "some/tuned; some/tuned is a finetune of lab/Tiny-1B, as the hub says"
    assert found == {"three": tuned, "four": tuned, "five": "some/private"}
    assert sorted(models_asked(hub)) == ["some/copy", "some/copy-of-it", "some/private", "some/tuned"]
    printed = stored_view(context.store, "tiny")
    words = {a.name: [w.found for w in a.warnings if w.code == "W_BASE"] for a in printed.adapters}
    assert words == {name: [found[name]] if name in found else [] for name in expected.build.lora_adapters}

    hub.requests.clear()
    again, found_again = found_by(expected, context)
    assert again.unchanged
    assert found_again == found
    assert models_asked(hub) == []


def test_the_deployment_s_base_may_be_the_copy(hub: Hub, context: BuildContext, tmp_path: Path) -> None:
    """The origin of the deployment's base is looked up too."""
    hub.repos["some/weights"] = content(tmp_path / "base")
    hub.repos["some/weights"].card = {"base_model": "lab/Tiny-1B"}
    hub.repos["some/weights"].tags = ("base_model:lab/Tiny-1B", "base_model:quantized:lab/Tiny-1B")
    _, found = found_by(deployment(tmp_path, "some/weights", one="lab/Tiny-1B", two="lab/Other"), context)
    assert found == {"two": "lab/Other; some/weights is a quantised copy of lab/Tiny-1B, as the hub says"}


@pytest.mark.parametrize(("status", "questions"), [(500, 1), (429, 1), (404, 2), (403, 2), (200, 1)])
def test_no_failure_of_the_question_fails_a_build(
    hub: Hub, context: BuildContext, tmp_path: Path, status: int, questions: int
) -> None:
    """A failing hub leaves the warning unchanged, and is asked once."""
    hub.repos["some/copy"].status = hub.repos["some/tuned"].status = status
    _, found = found_by(deployment(tmp_path, one="some/copy", two="some/tuned"), context)
    assert found == {"one": "some/copy", "two": "some/tuned"}
    assert len(models_asked(hub)) == questions


def test_folders_ask_nobody(hub: Hub, context: BuildContext, tmp_path: Path) -> None:
    """No hub is asked where base and adapter are folders."""
    _, found = found_by(deployment(tmp_path, str(tmp_path / "base"), one="some/copy"), context)
    assert found == {"one": "some/copy"}
    assert hub.requests == []


@pytest.mark.parametrize(
    ("card", "tags", "expected"),
    [
        *cases(__file__, "test_cards_and_tags_are_read"),
        ({"base_model": ["../x", 7, None, "a b/c", "a/" + "b" * 97]}, ["base_model:x:y:z", "base_model:"], []),
        ({"base_model": [f"a/{i}" for i in range(99)]}, [], [["", f"a/{i}"] for i in range(PARENTS)]),
    ],
)
def test_cards_and_tags_are_read(card: dict[str, Any], tags: list[str], expected: list[list[str]]) -> None:
    """The card's name wins over the hub's; text that is no model's name is not repeated."""
    info = ModelInfo(id="org/mine", cardData=card, tags=tags)
    assert [[each.relation, each.parent] for each in descent_of("org/mine", info)] == expected
