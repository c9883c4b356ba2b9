"""Chat templates: as Hugging Face renders them, and bounded whatever they do."""

import asyncio
import itertools
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from inference_service.text import chat_template
from inference_service.text.chat_template import ChatTemplate
from inference_service.text.sandbox import templates as rendering
from inference_service.text.sandbox.loop import MAX_ANSWER_BYTES
from inference_service.text.sandbox.process import SandboxPool, SandboxProcess
from loramux_shared.faults import CheckpointInvalid, RequestInvalid
from tests.support.cases import cases
from tests.support.waiting import BOUND_S

MODULE = rendering.__name__
QWEN = Path(__file__).with_name("qwen.jinja").read_text()
CALL = {"type": "function", "function": {"name": "look", "arguments": {"at": "<é & 'ü'>"}}}
MESSAGES: list[dict[str, Any]] = [
    {"role": "system", "content": "Be <brief> & kind."},
    {"role": "user", "content": "What's there? \N{GRINNING FACE}"},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "content": "nothing", "tool_call_id": "1"},
]
TOOLS = [{"type": "function", "function": {"name": "look", "parameters": {"type": "object", "b": 1, "a": 1.5}}}]


async def test_a_template_renders_as_hugging_face_does() -> None:
    """Tools, calls, JSON, whitespace, loops and training marks come out as transformers renders them."""
    template = ChatTemplate(QWEN, {})
    for tools, prompt in itertools.product(([], TOOLS), (False, True)):
        expected, _ = render_jinja_template(
            [MESSAGES], tools=tools or None, chat_template=QWEN, add_generation_prompt=prompt
        )
        assert await template.render(MESSAGES, tools, add_generation_prompt=prompt) == expected[0]


LOOP = "{% for i in range(10**5) %}{% for j in range(10**5) %}{% endfor %}{% endfor %}"


@pytest.fixture(scope="module")
def little_time() -> Iterator[SandboxPool]:
    """A pool whose templates have a tenth of a second of a core."""
    pool = SandboxPool("templates", 2, cpu_s=0.4)
    yield pool
    pool.close()


@pytest.fixture
def impatient(little_time: SandboxPool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Render all templates in this pool."""
    monkeypatch.setattr(chat_template, "_RENDERERS", little_time)


@pytest.mark.parametrize(
    ("source", "why"),
    [(LOOP, "more than 0.4 s"), *cases(__file__, "test_a_template_that_takes_too_much_ends_with_its_reason")],
)
async def test_a_template_that_takes_too_much_ends_with_its_reason(
    source: str, why: str, request: pytest.FixtureRequest
) -> None:
    """A template with loops, powers, doubling or forbidden calls fails its request, and no other."""
    if source is LOOP:  # others may take a slow machine longer than that
        request.getfixturevalue("impatient")
    with pytest.raises(RequestInvalid) as caught:
        await ChatTemplate(source, {}).render(MESSAGES)
    assert why in caught.value.findings[0].found
    assert await ChatTemplate("ok", {}).render(MESSAGES) == "ok"


@pytest.mark.parametrize(
    "source", ["{% for %}", "{{ x | no_such_filter }}", "{{" + "(" * 3000, "x" * 1_000_001]
)
def test_a_template_that_cannot_be_compiled_is_refused_at_load(source: str) -> None:
    """A broken template stops the start."""
    with pytest.raises(CheckpointInvalid):
        ChatTemplate(source, {})


async def test_a_template_that_loops_delays_no_other() -> None:
    """Each template has a queue and takes one process: many requests of a bad one delay no good one."""
    loop = ChatTemplate(LOOP, {})
    waiting = [asyncio.create_task(loop.render(MESSAGES)) for _ in range(2)]
    await asyncio.sleep(0)
    assert await ChatTemplate("good", {}).render(MESSAGES) == "good"
    assert not any(task.done() for task in waiting)
    waiting[1].cancel()
    with pytest.raises(RequestInvalid, match="more than 1 s"):
        await waiting[0]


def test_a_process_that_is_gone_is_started_again() -> None:
    """A sandbox that ended while it was idle, or that stands still, is replaced."""
    before, process = set(_processes()), SandboxProcess("templates")
    question = {"source": "hi", "variables": {}}

    def child() -> psutil.Process:
        [found] = set(_processes()) - before
        return found

    for end in (lambda _: process.close(), psutil.Process.kill, psutil.Process.kill):
        assert process.ask(question) == {"text": "hi"}
        end(found := child())  # the first as after a long idle time
        found.wait(BOUND_S)
    assert process.ask(question) == {"text": "hi"}
    child().suspend()
    process.still_s = 0
    assert "did not answer" in process.ask(question)["error"]
    process.still_s = BOUND_S
    assert process.ask(question) == {"text": "hi"}
    process.close()


def _processes() -> list[psutil.Process]:
    """The processes that render templates now."""
    found = psutil.Process().children()
    return [each for each in found if each.status() != psutil.STATUS_ZOMBIE and MODULE in each.cmdline()]


def test_processes_that_nobody_asks_end() -> None:
    """A pool without questions has no processes after its idle time, and answers the next question."""
    before = set(_processes())
    pool = SandboxPool("templates", most=2, idle_s=0.2)
    question = {"source": "hi", "variables": {}}
    answers = [pool.ask(str(number), question) for number in range(4)]
    assert [answer.result() for answer in answers] == [{"text": "hi"}] * 4
    own = set(_processes()) - before
    assert 1 <= len(own) <= 2
    psutil.wait_procs(own, timeout=BOUND_S)
    assert not set(_processes()) & own
    assert pool.ask("again", question).result() == {"text": "hi"}
    pool.close()


async def test_what_cannot_be_written_or_is_no_text_refuses_the_messages() -> None:
    """A message with half a character or endless nesting is refused by name."""
    template = ChatTemplate("{{ messages[0].content }}", {})
    deep: Any = 0
    for _ in range(100_000):
        deep = [deep]
    for content in ("\ud800", deep):
        with pytest.raises(RequestInvalid) as caught:
            await template.render([{"content": content}])
        assert caught.value.findings[0].where == "messages"
        str(caught.value).encode()


@pytest.mark.parametrize(
    ("template", "prompt"),
    [
        ("{% for m in messages %}<{{ m.content }}>{% endfor %}", "<Hi.><So,  "),
        ("{% for m in messages %}<{{ m.content | trim }}>{% endfor %}", "<Hi.><So,"),
        ("{% for m in messages %}<{{ m.content }}>{% endfor %}{{ messages[-1].role }}So,  ", "<Hi.><So,  "),
    ],
)
async def test_a_prompt_can_end_within_the_last_message(template: str, prompt: str) -> None:
    """The prompt ends where the content does, with the spaces that the template keeps."""
    turns = [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "So,  "}]
    render = ChatTemplate(template, {}).render
    assert await render(turns, add_generation_prompt=False, continue_final_message=True) == prompt
    assert turns[1]["content"] == "So,  "


async def test_a_template_that_hides_the_last_message_cannot_go_on_with_it() -> None:
    """A template that drops the last message is refused, and not continued somewhere else."""
    template = ChatTemplate("{% for m in messages[:-1] %}<{{ m.content }}>{% endfor %}", {})
    with pytest.raises(RequestInvalid, match="changes the last message"):
        await template.render([{"role": "user", "content": "Hi."}], continue_final_message=True)


@pytest.mark.parametrize(
    "program",
    [
        "print([])",
        "print('{}{}')",
        "print('{\"text\": 1}')",
        r"print('{\"text\": \"\\ud800\"}')",
        "import os\nwhile True: os.write(1, b'x' * 2**20)",
    ],
    ids=["a list", "two", "no text", "half a character", "endless"],
)
def test_what_is_no_answer_ends_the_sandbox(program: str) -> None:
    """A template that took its process over cannot make the service read something else than texts."""
    before, process = set(psutil.Process().children()), SandboxProcess("templates")
    process.command = (sys.executable, "-c", program)
    assert "something else than an answer" in process.ask({})["error"]
    assert set(psutil.Process().children()) <= before


def test_long_templates_are_compiled_again() -> None:
    """A process remembers short templates alone: long ones of one adapter would take the memory of others."""
    compiled = rendering.compiler()
    assert compiled("hi") is compiled("hi")
    long = "a" * (rendering.MAX_CACHED_CHARS + 1)
    assert compiled(long) is not compiled(long)


def test_the_longest_prompt_is_an_answer() -> None:
    """A prompt of as many characters as may be is read, however many bytes they take."""
    assert 12 * rendering.MAX_CHARS + 1000 < MAX_ANSWER_BYTES


def test_a_process_that_does_not_start_is_no_deep_template(capfd: pytest.CaptureFixture[str]) -> None:
    """A sandbox that lacks a module has a clear error, and its reason in the log; half an answer is none."""
    assert "does not start" in SandboxProcess("no_such_module").ask({})["error"]
    assert "no_such_module" in capfd.readouterr().err
    process = SandboxProcess("templates")
    process.command = (sys.executable, "-c", "print('{', end='')")
    assert "does not start" in process.ask({})["error"]
