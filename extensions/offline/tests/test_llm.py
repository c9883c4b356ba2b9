"""A model in the process of a program: lists of prompts, their order, faults, and Ctrl-C."""

import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from structlog.testing import capture_logs

import loramux
from loramux_offline.llm import LLM, Interrupted
from loramux_offline.local import LocalClient, WholeAnswers
from loramux_shared.faults import DeploymentInvalid, Fault, ModelNotFound, RequestInvalid, SettingsInvalid
from tests.support.openai_api import openai_world
from tests.support.tiny import World
from tests.support.waiting import wait_until

SETTINGS: dict[str, Any] = {"dtype": "float32", "kv_memory_gb": 0.01, "adapter_disk_gb": 0}
HELLO = [{"role": "user", "content": "hello"}]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """A checkpoint with a chat template, and adapters."""
    return openai_world(tmp_path_factory.mktemp("offline"), built=False)[0]


@pytest.fixture(scope="module")
def llm(world: World) -> Iterator[LLM]:
    """The world, loaded by the words for its base and its adapters."""
    with opened(world) as llm:
        yield llm


def opened(world: World) -> LLM:
    adapters = {name: str(folder) for name, folder in world.adapters.items()}
    store = f"file://{world.root}/store"
    return loramux.LLM(base=str(world.base), adapters=adapters, store=store, **SETTINGS)


def alone(llm: LLM, prompt: Any, model: str, **options: Any) -> str:
    """The text of one prompt that nothing else runs beside."""
    return llm.generate([prompt], model, **options)[0].text


def test_answers_come_in_the_order_of_the_prompts(llm: LLM, world: World) -> None:
    """Texts, tokens and messages, each for a model of its own, answer as each does alone."""
    models = ["", *world.adapters]
    prompts, names = [prompt for prompt in ("hello", [5, 6, 7], HELLO) for _ in models], models * 3
    answers = llm.generate(prompts, names, max_tokens=6)
    expected = [alone(llm, prompt, name, max_tokens=6) for prompt, name in zip(prompts, names, strict=True)]
    assert [answer.text for answer in answers] == expected
    assert [answer.started.model for answer in answers] == [name or "base" for name in names]
    assert len(set(expected)) > 3
    assert [each.text for each in llm.generate(prompts[:2], models[-1:], max_tokens=6)] == [
        alone(llm, prompt, models[-1], max_tokens=6) for prompt in prompts[:2]
    ]
    assert [model.name for model in llm.models()] == ["base", *sorted(world.adapters)]


@pytest.mark.parametrize(
    "options",
    [{}, {"logprobs": 2, "prompt_logprobs": 1}, {"n": 3, "temperature": 1.0, "seed": 5}, {"stop": True}],
)
def test_a_whole_answer_is_that_of_a_stream(llm: LLM, options: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Text, tokens, log probabilities, usage and ends are those of single deltas put together."""
    prompts, names = ["hello", [5, 6, 7]], [model.name for model in llm.models()[:2]]
    if options.get("stop"):
        options = {"stop": llm.generate(prompts, names, max_tokens=9)[0].text[3:5]}
    whole = llm.generate(prompts, names, max_tokens=9, **options)
    monkeypatch.setattr(WholeAnswers, "generate", lambda self, request: self._service.generate(request))
    streamed = llm.generate(prompts, names, max_tokens=9, **options)
    for one, other in zip(whole, streamed, strict=True):
        assert (one.choices, one.prompt) == (other.choices, other.prompt)


def warnings_of(lines: Sequence[Any]) -> list[Any]:
    return [line for line in lines if line["log_level"] == "warning"]


def test_a_text_without_marks_of_the_chat_template_is_warned_of_once(world: World) -> None:
    """Messages, tokens and a text with a mark are silent; the first plain text is named, with what it lacks."""
    with opened(world) as llm, capture_logs() as lines:
        template = llm.service.text.template
        assert template is not None
        mark, *_ = marks = llm.run(template.marks())
        llm.generate([f"{mark} hello", [5, 6, 7], HELLO], max_tokens=2)
        assert not warnings_of(lines)
        llm.generate([f"{mark} hello", "hello", "bye"], ["", *[*world.adapters][:2]], max_tokens=2)
        llm.generate(["hello"], max_tokens=2)
    [line] = warnings_of(lines)
    assert "call chat with messages" in line["event"]
    assert line["prompt"] in (1, 2)
    assert line["expected_marks"] == marks


def test_a_refused_prompt_ends_the_call_or_stands_in_its_place(llm: LLM) -> None:
    """The fault names the prompt; with return_exceptions the others are answered."""
    prompts: list[Any] = ["hello", [10**6], "bye"]
    with pytest.raises(RequestInvalid, match="prompt 1: "):
        llm.generate(["hello", "\ud800"], max_tokens=4)
    answers = llm.generate(prompts, max_tokens=4, return_exceptions=True)
    assert [isinstance(answer, Fault) for answer in answers] == [False, True, False]
    with pytest.raises(ModelNotFound, match="nobody"):
        llm.generate(["hello"], "nobody")


def test_vectors_and_scores_come_in_order(llm: LLM, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """A text has a model and a query of its own, or that of all; an adapter with several labels is refused."""
    models = ["", *world.adapters] * 2
    texts = (["hello", "bye", "yes"] * len(models))[: len(models)]
    expected = [llm.embed([text], model)[0] for text, model in zip(texts, models, strict=True)]
    assert llm.embed(texts, models) == expected

    async def classify(_: Any, model: str, pairs: Any) -> Any:
        return SimpleNamespace(texts=[SimpleNamespace(scores=[*pairs, *model[1:]])])

    monkeypatch.setattr(LocalClient, "classify", classify)
    assert llm.score("q", ["a", "b"], "1") == [("q", "a"), ("q", "b")]
    assert llm.score(["q", "r"], ["a", "b"], ["1", "2"]) == [("q", "a"), ("r", "b")]
    for wrong in ((["q"], ["a", "b"], "1"), (["q"], "a", "1"), ("q", ["a", "b"], ["1", "12"])):
        with pytest.raises(RequestInvalid):
            llm.score(*wrong)


class Interrupting(Sequence[str]):
    """Prompts that are interrupted by Ctrl-C while the last one is read."""

    def __len__(self) -> int:
        return 3

    def __getitem__(self, index: Any) -> Any:
        if index == 2:
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
        return "hello"


def test_ctrl_c_ends_a_call_and_not_the_model(llm: LLM) -> None:
    """The answers that are complete come with the exception; nothing runs on, and the next call is answered."""
    before = llm.service.local.engine.stats.tokens_generated
    with pytest.raises(Interrupted) as ended:
        llm.generate(Interrupting(), max_tokens=400, ignore_eos=True)
    assert len(ended.value.answers) == 3
    assert None in ended.value.answers
    assert alone(llm, "hello", "", max_tokens=2)
    wait_until(lambda: llm.service.local.engine.stats.running == 0, "nothing runs")
    assert llm.service.local.engine.stats.tokens_generated - before < 3 * 400


def test_a_start_says_what_it_does(world: World, capfd: pytest.CaptureFixture[str]) -> None:
    """A start writes what it builds and loads to stderr, as commands do, and nothing with progress=False."""
    adapters = {name: str(folder) for name, folder in [*world.adapters.items()][:1]}
    start = {"base": str(world.base), "adapters": adapters, "store": f"file://{world.root}/store", **SETTINGS}
    with loramux.LLM(**start):
        pass
    err = capfd.readouterr().err
    order = ("building 1 adapter", f"{next(iter(adapters))}: done", "loading the base", "reading the base, ")
    assert [part for part in order if part not in err] == []
    with loramux.LLM(**start, progress=False):
        pass
    assert not capfd.readouterr().err


def test_a_name_whose_packages_are_not_installed_names_its_extra() -> None:
    """A client has no tqdm, which `loramux.LLM` imports."""
    code = "import sys; sys.modules['tqdm'] = None; import loramux; loramux.LLM"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "not installed here (tqdm): pip install 'loramux[offline]'" in done.stderr


def test_a_start_that_fails_says_why_and_leaves_nothing(world: World, tmp_path: Path) -> None:
    """An adapter without files, a deployment beside a base, an unknown setting: each is its fault."""
    store = f"file://{tmp_path}/store"
    with pytest.raises(Fault) as refused:
        LLM(base=str(world.base), adapters={"a": str(tmp_path)}, store=store, **SETTINGS)
    assert "a" in str(refused.value)
    with pytest.raises(SettingsInvalid, match="one of the two"):
        LLM(world.deployment(), base=str(world.base))
    with pytest.raises(SettingsInvalid, match="no_such_setting: unknown setting"):
        LLM(world.deployment(), store=store, no_such_setting=1)
    for wrong in ({"base": "file:no repository"}, {"base": "org/base", "adapters": {"a/b": "org/a"}}):
        with pytest.raises(DeploymentInvalid):
            LLM(**wrong)
