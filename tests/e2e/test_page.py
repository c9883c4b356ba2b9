"""The page in a real browser, with the demo's base and adapters behind it."""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from builder_service.pipeline.build import build
from builder_service.pipeline.context import BuildContext
from builder_service.pipeline.progress import Progress
from inference_service.openai_api.server import HttpServer
from inference_service.startup.load import load
from loramux_shared.settings import InferenceSettings
from loramux_shared.sources.open import open_sources
from loramux_shared.storage.memory import MemoryStore
from tests.e2e.real import EXAMPLES, deployment
from tests.support.browser import CHROMIUM, CTRL, Page, browser
from tests.support.looks import faint, nameless, overflow
from tests.support.openai_door import OpenAIDoor
from tests.support.root import ROOT

pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here: apt install chromium"),
    pytest.mark.asyncio(loop_scope="module"),
]
ARTIFACTS = Path(os.environ.get("TEST_ARTIFACTS", ROOT / "tests/artifacts"))
"""Where the pictures of the page are kept."""
PROMPT = "Tell me about the sea."
TOKENS = 24
SLIDE = "const slider = document.querySelector('#scales input'); slider.value = 0.5; "
SLIDE += "slider.dispatchEvent(new Event('input'))"
DONE = "document.querySelector('#stop').disabled && document.querySelector('article')"


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def door() -> AsyncIterator[OpenAIDoor]:
    found = deployment()
    roots = (EXAMPLES, Path(found.build.checkpoint_repository.repo))
    store = MemoryStore()
    build(found, BuildContext(store, open_sources(local_roots=roots)), Progress(found.build.lora_adapters))
    settings = InferenceSettings(
        deployment=found.model_name, dtype="float32", local_roots=roots, kv_memory_gb=0.2
    )
    ready = load(settings, store)
    server = HttpServer("127.0.0.1:0", ready.service)
    await server.start()
    ready.engine.start()
    door = OpenAIDoor(ready, server)
    yield door
    await door.http.aclose()
    await door.openai.close()
    await server.drain(5)
    await ready.engine.stop()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def tab(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Page]:
    async with browser(tmp_path_factory.mktemp("browser") / "profile") as tab:
        yield tab


@pytest_asyncio.fixture(loop_scope="module")
async def page(tab: Page, door: OpenAIDoor) -> AsyncIterator[Page]:
    """The page as somebody finds it who opens it on a desk; nothing may have gone wrong in the end."""
    await tab.appear(1280, 800)
    await tab.open(door.url)
    await tab.until("document.querySelectorAll('.model').length === 4")
    yield tab
    assert tab.complaints == []


async def _ask(page: Page, tokens: int) -> None:
    await page.click("#ask summary")
    await page.type("#max-tokens", str(tokens))
    await page.type("#temperature", "0")
    await page.click("#ask summary")
    await page.type("#prompt", PROMPT)
    await page.press("Enter", CTRL)


async def _numbers(page: Page) -> list[dict[str, str]]:
    names = ("first", "speed", "tokens", "end")
    columns = [await page.texts(f"article .{name}") for name in names]
    return [dict(zip(names, row, strict=True)) for row in zip(*columns, strict=True)]


async def _answers_of(door: OpenAIDoor, models: list[str]) -> list[dict[str, Any]]:
    body = {
        "messages": [{"role": "user", "content": PROMPT}],
        "temperature": 0,
        "max_completion_tokens": TOKENS,
    }
    asked = [door.post("/v1/chat/completions", model=name, **body) for name in models]
    return [answer.json() for answer in await asyncio.gather(*asked)]


async def test_base_and_adapters_answer_side_by_side(page: Page, door: OpenAIDoor) -> None:
    """Each chosen model has a card with its own answer, token for token, and its numbers, and so has the
    mixture of the chosen adapters; all run at once."""
    listed = [model.name for model in door.ready.service.catalog]
    assert await page.texts(".model .name") == listed
    await page.click(".model input[value=json]")
    assert await page.text("#chosen") == "3 of 4"
    await page.click("#mix summary")
    await page.eval(SLIDE)
    await _ask(page, TOKENS)
    await page.until("document.querySelectorAll('article[data-state=streaming]').length === 4")
    await page.until(DONE)
    chosen = [name for name in listed if name != "json"]
    asked = [*chosen, f"{chosen[1]}*0.5+{chosen[2]}"]
    assert await page.text("#mix-note") == asked[-1]
    assert await page.texts("article h3") == asked
    wanted = await _answers_of(door, asked)
    texts = [answer["choices"][0]["message"]["content"] for answer in wanted]
    assert await page.texts("article .text") == texts
    for told, answer in zip(await _numbers(page), wanted, strict=True):
        assert re.fullmatch(r"\d+ ms", told["first"])
        assert re.fullmatch(r"[\d.]+ tok/s", told["speed"])
        assert told["tokens"] == str(answer["usage"]["completion_tokens"])
        assert told["end"] == answer["choices"][0]["finish_reason"]
    assert await page.texts("article .rank") == ["base model", "rank 2", "rank 16", "rank 2, 16"]
    digests = [door.ready.service.catalog.get(name).digest for name in chosen[1:]]
    assert await page.texts("article .digest:not([hidden])") == [digest[:12] for digest in digests]
    tips = "[...document.querySelectorAll('.digest:not([hidden])')].map((each) => each.dataset.tip)"
    assert await page.eval(tips) == digests


async def test_escape_stops_every_answer(page: Page, door: OpenAIDoor) -> None:
    """Answers end where they are, with the tokens they had, and the server lets go of them."""
    await _ask(page, 1500)
    await page.until("document.querySelectorAll('article[data-state=streaming]').length === 4")
    await page.until("document.querySelector('#running').textContent > 0")
    assert await page.text("#at-work") != "none"
    await page.press("Escape")
    await page.until(DONE)
    numbers = await _numbers(page)
    assert all(int(told["tokens"]) > 0 for told in numbers)
    ends = {told["end"] for told in numbers}
    assert ends <= {"stopped", "stop"}
    assert "stopped" in ends
    await door.until_free()
    await page.click("#clear")
    assert await page.texts("article") == []
    assert await page.eval("document.activeElement.id") == "prompt"


async def test_it_can_be_used_by_many(page: Page) -> None:
    """On desks, tablets and phones, light and dark: no sideways scrolling, faint text or nameless control."""
    await _ask(page, TOKENS)
    await page.until(DONE)
    await page.until("document.querySelector('#running').textContent === '0'")
    for name, width, height, scheme in (
        ("light", 1280, 800, "light"),
        ("dark", 1280, 800, "dark"),
        ("tablet", 800, 1000, "light"),
        ("phone", 360, 740, "light"),
        ("phone-dark", 360, 740, "dark"),
    ):
        await page.appear(width, height, scheme)
        await page.photograph(ARTIFACTS / f"page-{name}.png")
        await page.click("#ask summary")
        await page.click("#mix summary")
        await page.photograph(ARTIFACTS / f"page-{name}-mix.png")
        assert await overflow(page) == 0, name
        assert await faint(page) == [], name
        assert await nameless(page) == [], name
        await page.click("#mix summary")
        await page.click("#ask summary")
    lefts = "new Set([...document.querySelectorAll('main section, main .panel, article')].map("
    assert await page.eval(f"{lefts}(each) => each.getBoundingClientRect().left)).size") == 1  # one column
