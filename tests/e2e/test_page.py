"""The page in a real browser, before a tiny model and before scripted models."""

import asyncio
import os
import re
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from loramux_shared.access.keyring import Keyring
from loramux_shared.faults import InternalFault, RequestInvalid
from loramux_shared.runtime import ReasoningParser
from tests.e2e.accessibility import faint, nameless, overflow
from tests.e2e.browser import CHROMIUM, CTRL, Page, browser
from tests.e2e.scripted_page import ScriptedPage, scripted_api
from tests.support.access import lines, new_entry
from tests.support.generations import change_deployed
from tests.support.openai_api import open_api, openai_world
from tests.support.root import ROOT
from tests.support.services.managed_replica import managed_replica
from tests.support.waiting import until

pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here: apt install chromium"),
    pytest.mark.asyncio(loop_scope="module"),
]
ARTIFACTS = Path(os.environ.get("TEST_ARTIFACTS", ROOT / "tests/artifacts"))
"""Folder of the page's pictures."""
SLIDE = "const slider = document.querySelector('#scales input'); slider.value = 0.5; "
SLIDE += "slider.dispatchEvent(new Event('input'))"
DONE = "document.querySelector('#stop').disabled && document.querySelector('article')"
MANY = [f"adapter-{number:03}" for number in range(300)]
HOSTILE = "<img src=x onerror=\"document.title='owned'\"><script>document.title='owned'</script>"
TIMERS = """window.due = [];
const wait = window.setTimeout;
window.setTimeout = (work, ms, ...more) => (ms === 1000 ? -due.push(work) : wait(work, ms, ...more));"""
"""Timers of a second are a test's, which fires them."""


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def tab(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Page]:
    async with browser(tmp_path_factory.mktemp("browser") / "profile") as tab:
        yield tab


@pytest_asyncio.fixture(loop_scope="module")
async def page(tab: Page) -> Page:
    """Return the browser's tab, empty, without errors of an earlier test."""
    await tab.call("Page.navigate", url="about:blank")
    await tab.until("location.href === 'about:blank'")
    tab.complaints.clear()
    return tab


async def _open(page: Page, url: str, models: int) -> None:
    await page.appear(1280, 800)
    await page.open(url)
    await page.until(f"document.querySelectorAll('.model').length === {models}")


async def _texts(page: Page) -> list[str]:
    return await page.texts(".model:not([hidden]) .name")


async def _ask(page: Page, prompt: str = "Hi") -> None:
    await page.type("#prompt", prompt)
    await page.press("Enter", CTRL)


async def test_base_and_adapters_answer_side_by_side(page: Page, tmp_path: Path) -> None:
    """Each chosen model, and the blend of the chosen adapters, has a card with its own answer and numbers."""
    async with open_api(openai_world(tmp_path)) as api:
        await _open(page, api.url, 4)
        listed = [model.name for model in api.ready.service.local.catalog]
        assert await page.texts(".model .name") == listed == ["base", "all", "rs", "wide"]
        await page.click(".model input[value=all]")
        assert await page.text("#chosen") == "3 of 4"
        await page.click("#mix summary")
        await page.eval(SLIDE)
        await page.click("#mix-asked")
        assert await page.text("#settings") == "greedy, temperature 0, max tokens 512"
        await page.click("#ask summary")
        await page.type("#max-tokens", "24")
        await page.type("#seed", "5")
        assert await page.text("#settings") == "greedy, temperature 0, max tokens 24, seed 5"
        await _ask(page)
        await page.until(DONE)
        requests = ["base", "rs", "wide", "rs*0.5+wide"]
        assert await page.text("#mix-note") == requests[-1]
        assert await page.texts("article h3") == requests
        body = {"messages": [{"role": "user", "content": "Hi"}], "temperature": 0, "max_completion_tokens": 24}
        answers = await asyncio.gather(
            *(api.post("/v1/chat/completions", model=name, **body) for name in requests)
        )
        parsed = [answer.json() for answer in answers]
        texts = [answer["choices"][0]["message"]["content"] for answer in parsed]
        assert await page.texts("article .text") == texts
        assert len(set(texts)) == 4
        assert all(
            re.fullmatch(r"\d+ ms|\d+\.\d s", reported) for reported in await page.texts("article .first")
        )
        assert all(re.fullmatch(r"[\d.]+ tok/s", reported) for reported in await page.texts("article .speed"))
        assert await page.texts("article .tokens") == [
            str(each["usage"]["completion_tokens"]) for each in parsed
        ]
        assert await page.texts("article .end") == [each["choices"][0]["finish_reason"] for each in parsed]
        assert await page.texts("article .rank") == ["base model", "rank 5", "rank 8", "rank 5, 8"]
        digests = [api.ready.service.local.catalog.get(name).digest for name in ("rs", "wide")]
        assert await page.texts("article .digest:not([hidden])") == [digest[:12] for digest in digests]
        tips = "[...document.querySelectorAll('.digest:not([hidden])')].map((each) => each.dataset.tip)"
        assert await page.eval(tips) == digests
        assert page.complaints == []


async def test_it_can_be_used_by_many(page: Page, tmp_path: Path) -> None:
    """The page fits desks, tablets and phones, light and dark, without side scroll or unnamed control."""
    says = {"bard": ["The sea is a vast and mysterious realm. " * 9]}
    async with scripted_api(ScriptedPage(tmp_path, ["bard", "json", "pirate"], says)) as url:
        await _open(page, url, 4)
        await _ask(page, "Tell me about the sea.")
        await page.until(DONE)
        for name, width, height, scheme in (
            ("light", 1280, 800, "light"),
            ("dark", 1280, 800, "dark"),
            ("tablet", 800, 1000, "light"),
            ("phone", 360, 740, "light"),
            ("phone-dark", 360, 740, "dark"),
        ):
            await page.appear(width, height, scheme)
            await page.click("#ask summary")
            await page.click("#mix summary")
            await page.photograph(ARTIFACTS / f"page-{name}.png")
            assert await overflow(page) == 0, name
            assert await faint(page) == [], name
            assert await nameless(page) == [], name
            await page.click("#mix summary")
            await page.click("#ask summary")
        lefts = "new Set([...document.querySelectorAll('main section, main .panel, article')].map("
        assert await page.eval(f"{lefts}(each) => each.getBoundingClientRect().left)).size") == 1  # one column
        assert page.complaints == []


async def test_hundreds_of_adapters_are_chosen_with_the_keyboard(page: Page, tmp_path: Path) -> None:
    """The filter finds a part of a name, arrows walk the list, space chooses, and Tab leaves it at once."""
    async with scripted_api(ScriptedPage(tmp_path, MANY, {})) as url:
        await _open(page, url, 301)
        await page.click("#choose-none")
        await page.type("#filter", "Adapter-07")
        assert await _texts(page) == [f"adapter-07{digit}" for digit in range(10)]
        await page.press("ArrowDown")
        await page.press(" ")
        await page.press("ArrowDown")
        await page.press("Tab")
        assert await page.eval("document.activeElement.id") == "prompt"
        await page.type("#filter", "adapter-07")
        await page.press("ArrowDown")
        await page.press("End")
        await page.press(" ")
        assert await page.text("#chosen") == "2 of 301"
        await page.type("#filter", "none such")
        assert await _texts(page) == []
        assert await page.text("#list-note") == "No model has such a name."
        assert await page.texts("#chips .label") == ["adapter-070", "adapter-079"]
        await page.click("#chips button")
        assert await page.texts("#chips .label") == ["adapter-079"]
        await page.appear(360, 740)
        assert await overflow(page) == 0


async def test_more_models_than_connections_take_turns(page: Page, tmp_path: Path) -> None:
    """Five models are asked at a time, for a browser's connections; Escape ends all and keeps their tokens."""
    says = {name: ["Ahoy", None] for name in MANY[:5]}
    service = ScriptedPage(tmp_path, MANY, says)
    async with scripted_api(service) as url:
        await _open(page, url, 301)
        await page.click("#choose-none")
        for name in MANY[:7]:
            await page.click(f".model input[value={name}]")
        await _ask(page)
        await page.until("document.querySelectorAll('article[data-state=streaming]').length === 5")
        assert sorted(service.asked) == MANY[:5]
        assert "5 answer at a time" in await page.text("#note")
        await page.press("Escape")
        await page.until("document.querySelectorAll('article[data-state=stopped]').length === 7")
        assert await page.texts("article .end") == ["stopped"] * 7
        assert await page.texts("article .tokens") == ["1"] * 5 + ["\N{EN DASH}"] * 2
        await until(lambda: service.let_go == 5, "the end of five requests", lambda: service.let_go)
        await page.click("#clear")
        assert await page.texts("article") == []
        assert await page.eval("document.activeElement.id") == "prompt"
    assert sorted(service.asked) == MANY[:5]


async def test_what_a_model_writes_stays_text(page: Page, tmp_path: Path) -> None:
    """No tag in an answer becomes an element, no script runs, and reasoning stands apart."""
    says = {"evil": [HOSTILE[:9], HOSTILE[9:]], "thinks": ["<think>Hm.", "</think>Ahoy."]}
    service = ScriptedPage(tmp_path, list(says), says)
    change_deployed(service.local.catalog, reasoning_parser=ReasoningParser.THINK)
    async with scripted_api(service) as url:
        await _open(page, url, 3)
        await _ask(page)
        await page.until(DONE)
        assert await page.texts("article .text") == ["Ahoy!", HOSTILE, "Hm.Ahoy."]
        assert await page.texts("article .thought") == ["", "", "Hm."]
        assert await page.eval("document.querySelectorAll('article script, article img').length") == 0
        assert await page.eval("document.title") == "loramux"


async def test_failures_have_the_servers_words(page: Page, tmp_path: Path) -> None:
    """A refusal, an end in the middle and a server that is gone each have a message, and spare the others."""
    broken, refused = InternalFault("the engine failed."), RequestInvalid("the prompt is empty.")
    says = {"breaks": ["A", broken], "refuses": [refused]}
    async with scripted_api(ScriptedPage(tmp_path, list(says), says)) as url:
        await _open(page, url, 3)
        await _ask(page)
        await page.until(DONE)
        assert await page.texts("article .text") == ["Ahoy!", "A", ""]
        assert await page.texts("article .error:not([hidden])") == [str(broken), str(refused)]
        assert await page.texts("article .end") == ["stop", "error", "error"]
    await page.until("document.querySelector('#link').textContent === 'not reachable'")
    await page.click("#send")
    await page.until("document.querySelector('#shared-error').checkVisibility()")
    assert await page.text("#shared-error") == "The server cannot be reached."
    await page.appear(390, 844)
    error, card = (f"document.querySelector('{each}')" for each in ("#shared-error", "article"))
    above = f"{error}.getBoundingClientRect().bottom <= {card}.getBoundingClientRect().top"
    assert await page.eval(above)  # on a phone not behind all cards
    assert await page.texts("article .error:not([hidden])") == []
    assert set(await page.texts("article .end")) == {"error"}
    await page.click("#clear")
    assert not await page.eval("document.querySelector('#shared-error').checkVisibility()")


async def test_what_a_desk_shows_without_scrolling(page: Page, tmp_path: Path) -> None:
    """The page at 1280x800 shows the numbers of the server and of long answers; names keep their ends."""
    names = [f"acme-corporation-customer-support-{number:03}-de" for number in range(60)]
    says = {name: ["The sea is a vast and mysterious realm. " * 60] for name in names[:3]}
    async with scripted_api(ScriptedPage(tmp_path, names, says)) as url:
        await _open(page, url, 61)
        await _ask(page, "Tell me about the sea.")
        await page.until(DONE)
        for selector in ("#server", "article dl"):
            place = f"document.querySelector('{selector}').getBoundingClientRect()"
            assert await page.eval(f"{place}.bottom") <= 800
        assert await page.texts("article h3") == ["base", *names[:3]]
        ends = "[...document.querySelectorAll('.model .tail, article h3')].every((each) => "
        ends += "!each.textContent || each.getBoundingClientRect().width >= each.scrollWidth - 1)"
        assert await page.eval(ends)
        await page.appear(390, 844)
        scrolled = "[...document.querySelectorAll('article .text')].filter("
        scrolled += "(each) => each.scrollHeight > each.clientHeight + 1).length"
        assert await page.eval(scrolled) == 3  # on a phone the page is what scrolls, and long answers are cut
        assert await page.texts("article .more:not([hidden])") == ["More"] * 3
        for nth in range(3):
            await page.eval(f"document.querySelectorAll('article .more:not([hidden])')[{nth}].click()")
        await page.until(f"{scrolled} === 0")
        assert await page.texts("article .more:not([hidden])") == ["Less"] * 3
        assert await overflow(page) == 0


async def test_a_server_with_keys_asks_for_one(page: Page, tmp_path: Path) -> None:
    """The page opens without a key, asks for one, and explains a refusal, also of what the key may not do."""
    key, entry = new_entry("ann", "infer", models=("one",))
    wrong, builder = new_entry("bob", "build")
    service = ScriptedPage(tmp_path, ["one", "two"], {})
    async with scripted_api(service, Keyring(text=lines(entry, builder))) as url:
        await page.open(url)
        await page.until("document.querySelector('#access').checkVisibility()")
        assert await page.text("#link") == "key needed"
        for typed, stated in (("lmx_nope", "does not know the API key"), (wrong, "has the scopes build")):
            await page.type("#key", typed)
            await page.press("Enter")
            await page.until(f"document.querySelector('#key-hint').textContent.includes('{stated}')")
            assert await page.text("#link") == "key refused"
        await page.type("#key", key)
        await page.press("Enter")
        await page.until("document.querySelectorAll('.model').length === 1")
        assert not await page.eval("document.querySelector('#access').checkVisibility()")
        assert await page.texts(".model .name") == ["one"]
        await page.until("document.querySelector('#at-work').textContent === 'one (2)'")
        await _ask(page)
        await page.until(DONE)
        assert await page.texts("article .text") == ["Ahoy!"]
        await page.click("#operate summary")
        await page.until("document.querySelector('#operated').textContent.includes('admin')")
        assert await page.text("#link") == "connected"
        assert key not in await page.eval("JSON.stringify(localStorage) + document.cookie + location.href")


async def test_the_panel_rests_while_nobody_looks(page: Page, tmp_path: Path) -> None:
    """The panel asks for the engine's numbers once a second, and pauses in a hidden tab."""
    looks = "performance.getEntriesByType('resource').filter((each) => each.name.endsWith('/state')).length"
    hide = "Object.defineProperty(document, 'hidden', {value: %s, configurable: true})"
    hide += ", document.dispatchEvent(new Event('visibilitychange'))"
    fire, due = "due.pop()()", "due.length === 1"
    script = await page.call("Page.addScriptToEvaluateOnNewDocument", source=TIMERS)
    try:
        async with scripted_api(ScriptedPage(tmp_path, ["one", "two"], {})) as url:
            await _open(page, url, 3)
            await page.until(due)
            assert await page.texts("#server dd") == ["3", "2", "0", "25 %", "25 %", "base, one (2)"]
            await page.eval(fire)
            await page.until(f"{due} && {looks} === 2")
            await page.eval(hide % "true")
            await page.eval(fire)
            assert await page.eval(f"[due.length, {looks}]") == [0, 2]
            await page.eval(hide % "false")
            await page.until(f"{due} && {looks} === 3")
    finally:
        await page.call("Page.removeScriptToEvaluateOnNewDocument", **script)


async def test_no_card_is_cut(page: Page, tmp_path: Path) -> None:
    """Five cards, as the demo has them, stand side by side on a laptop; more take another row."""
    names = ["bard", "json", "pirate", "legal", "medical", "support"]
    says = {name: ["The sea is a vast and mysterious realm. " * 9] for name in names}
    async with scripted_api(ScriptedPage(tmp_path, names, says)) as url:
        await _open(page, url, 7)
        for name in names[-2:]:
            await page.click(f".model input[value={name}]")
        for cards, rows in ((6, 2), (5, 1)):
            await _ask(page, "Tell me about the sea.")
            await page.until(f"{DONE} && document.querySelectorAll('article').length === {cards}")
            await page.photograph(ARTIFACTS / f"page-{cards}-cards.png")
            places = "[...document.querySelectorAll('article')].map((each) => each.getBoundingClientRect())"
            assert await page.eval(f"{places}.every((each) => each.left >= 0 && each.right <= innerWidth)")
            assert await page.eval(f"new Set({places}.map((each) => each.top)).size") == rows
            assert await overflow(page) == 0
            await page.click(f".model input[value={names[-1]}]")


async def test_an_admin_key_pins_loads_and_rolls_back(page: Page, tmp_path: Path) -> None:
    """The panel lists each name with version and place; an action is reported, and the list follows."""
    replica = managed_replica(["one", "two"])
    service = ScriptedPage(tmp_path, ["one", "two"], {})
    service.local.catalog = replica.names
    reported = "document.querySelector('#operated').textContent"
    async with scripted_api(service, adapters=replica.manager) as url:
        await _open(page, url, 3)
        assert await page.texts(".model .version") == ["000000 ○", "000000 ○"]
        await page.click("#operate summary")
        await page.until("document.querySelector('#replica').textContent.includes('generation 1, current')")
        assert (await page.text("#push")).endswith("--name my-adapter --deployment demo")
        await page.click("#pin")
        await page.until(f"{reported} === 'Pinned: one, two.'")
        await page.until("document.querySelectorAll('.tier')[1].textContent === '●'")
        await page.type("#load-name", "three")
        await page.type("#load-path", "org/three")
        await page.press("Enter")
        await page.until("document.querySelectorAll('.model').length === 4")
        counted = "document.querySelector('#replica').textContent.includes('3 of 3 adapters in memory')"
        await page.until(counted)
        await page.click("#roll-back")
        await page.until(f"{reported}.startsWith('Click again')")
        assert replica.names.generation == 2
        await page.click("#roll-back")
        await page.until("document.querySelectorAll('.model').length === 3")
        await page.until(f"{reported} === 'Served as generation 3.'")
        await page.click("#choose-none")
        await page.click(".model input[value=two]")
        await page.click("#remove")
        await page.until(f"{reported}.startsWith('Click again to take two out')")
        await page.click("#remove")
        await page.until("document.querySelectorAll('.model').length === 2")
        await page.until(f"{reported} === 'Removed: two.'")
        assert await page.eval("document.querySelector('#server').getBoundingClientRect().bottom") <= 800
        for width, height in ((1280, 800), (390, 844)):
            await page.appear(width, height)
            await page.photograph(ARTIFACTS / f"page-operate-{width}.png")
            assert await overflow(page) == 0
            assert await faint(page) == []
            assert await nameless(page) == []
