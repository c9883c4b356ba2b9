"""Files that an adapter brings beside its weights travel in its bundle, and are used for that adapter alone."""

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from inference_service.api.requests.terms import Terms
from inference_service.core.request import Request
from inference_service.core.sampling import SamplingParams
from inference_service.core.served_model import AdapterDefaults
from inference_service.startup.load import Ready
from loramux_shared.bundle.manifest import TEXT_FILES
from loramux_shared.faults import AdapterInvalid, RequestInvalid
from tests.support.tiny import World, make_world

MESSAGES = [{"role": "user", "content": "Hello"}]


def write(folder: Path, **files: Any) -> None:
    """Write text files: ``chat_template`` unchanged, the others as JSON."""
    names = dict(zip(("chat_template", "generation_config", "tokenizer_config"), TEXT_FILES, strict=True))
    for name in TEXT_FILES:
        (folder / name).unlink(missing_ok=True)
    for key, content in files.items():
        (folder / names[key]).write_text(content if isinstance(content, str) else json.dumps(content))


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """A base with a template, an adapter that brings all three files, one with an old-style template."""
    made = make_world(tmp_path_factory.mktemp("tiny"))
    base = {"chat_template": "{{ bos_token }}{{ messages[0].content }}", "bos_token": "<1>", "eos_token": "<2>"}
    write(made.base, tokenizer_config=base)
    write(
        made.adapters["wide"],
        chat_template="{{ bos_token }}!{{ messages[0].content }}{{ eos_token }}",
        generation_config={
            "do_sample": True, "temperature": 0.25, "top_p": 0.5, "top_k": 7, "eos_token_id": [2, 50],
            "num_beams": 2,
        },
        tokenizer_config={"eos_token": {"content": "$"}, "chat_template": "the file above comes first"},
    )  # fmt: skip
    write(
        made.adapters["rs"],
        generation_config={"temperature": 0.9, "top_p": 0.1, "eos_token_id": 60},
        tokenizer_config={"chat_template": [{"name": "default", "template": "?{{ messages[0].content }}"}]},
    )
    return made


def serving(world: World, **files: Any) -> Ready:
    """Load the world after a build in which the adapter ``all`` brings these files."""
    write(world.adapters["all"], **files)
    store = world.built()
    write(world.adapters["all"])
    return world.load(store)


@pytest.fixture(scope="module")
def ready(world: World) -> Ready:
    return serving(world)


def defaults(ready: Ready, model: str) -> AdapterDefaults:
    """Return a model's defaults beside its weights, as a request for it finds them."""
    return asyncio.run(ready.service.defaults(ready.service.local.catalog.get(model)))


def prompt(ready: Ready, model: str) -> str:
    service = ready.service
    template = defaults(ready, model).template
    tokens = asyncio.run(service.text.encode_messages(MESSAGES, 256, template))
    return "".join(service.text.token_text(token) for token in tokens)


def sampling(ready: Ready, model: str, **fields: Any) -> SamplingParams:
    service = ready.service
    terms = Terms(Request.of(model, "x", **fields), defaults(ready, model), service.text, service.limits, None)
    return asyncio.run(terms.sampling(1))


def test_each_model_has_its_own_template(ready: Ready) -> None:
    """A prompt is rendered with the adapter's template, or with the base's where it has none."""
    prompts = [prompt(ready, model) for model in ("base", "wide", "rs", "all")]
    assert prompts == ["<1>Hello", "<1>!Hello$", "?Hello", "<1>Hello"]


def test_sampling_defaults_fill_what_a_request_leaves_open(ready: Ready) -> None:
    """A field that the request sets wins, 0 included; the base and the others stay greedy."""
    left = sampling(ready, "wide")
    assert (left.temperature, left.top_p, left.top_k) == (0.25, 0.5, 7)
    stated = sampling(ready, "wide", temperature=0.0, top_k=0, top_p=1.0)
    assert (stated.temperature, stated.top_p, stated.top_k) == (0.0, 1.0, 0)
    assert sampling(ready, "wide", temperature=2.0).top_k == 7
    for model in ("base", "all", "rs"):  # rs gives a temperature without do_sample: transformers is greedy then
        assert sampling(ready, model).greedy


def test_stop_tokens_are_added_to_those_of_the_base(ready: Ready) -> None:
    """Stop tokens come from generation_config.json, and from the end token of tokenizer_config.json."""
    dollar = ready.service.text.token_id("$")
    assert sampling(ready, "base").stop_token_ids == {2}
    assert sampling(ready, "wide").stop_token_ids == {2, 50, dollar}
    assert sampling(ready, "rs", stop_token_ids=(9,)).stop_token_ids == {2, 60, 9}
    assert sampling(ready, "wide", ignore_eos=True).stop_token_ids == frozenset()


@pytest.mark.parametrize(
    "files",
    [{"chat_template": "{% if %}"}, {"tokenizer_config": {"chat_template": "{{ messages"}}],
    ids=["jinja", "tokenizer"],
)
def test_a_template_that_cannot_be_parsed_refuses_the_adapter(world: World, files: dict[str, Any]) -> None:
    """The builder has no jinja; the replica refuses requests with the adapter's name and the file's."""
    ready = serving(world, **files)
    with pytest.raises(AdapterInvalid, match="'all' brings a") as error:
        defaults(ready, "all")
    assert defaults(ready, "wide").top_k == 7
    [finding] = error.value.findings
    assert (finding.code, finding.adapter, finding.where in TEXT_FILES) == ("E_BAD_TEXT", "all", True)


def test_a_template_may_refuse_messages(world: World) -> None:
    """An exception of the adapter's template is the request's fault, as with the base's."""
    ready = serving(world, chat_template="{{ raise_exception('no') }}")
    with pytest.raises(RequestInvalid):
        prompt(ready, "all")
