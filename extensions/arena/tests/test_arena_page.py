"""The report of an arena in a real browser: it shows the results, and answers stay text."""

from collections.abc import AsyncIterator
from datetime import UTC, datetime
from pathlib import Path

import pytest
import pytest_asyncio

from loramux_arena.contest import Found
from loramux_arena.page import page as report_page
from loramux_arena.plan import Entrant, Plan
from loramux_arena.questions import Question
from loramux_arena.records import Answer, Failure
from loramux_arena.standings import standings
from tests.support.browser import CHROMIUM, Page, browser

pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here: apt install chromium"),
    pytest.mark.asyncio(loop_scope="module"),
]
OWNED = "document.title='owned'"
HOSTILE = f'</script><script>{OWNED}</script><img src=x onerror="{OWNED}">\u2028@@DATA@@'
MODELS = ("base", "constructor", "<b>bold</b>")
PLAN = Plan(MODELS, "base", scores=("strip",))


def written(path: Path, count: int) -> str:
    """Write a report about so many questions, of which one in three is won; returns its address."""
    found = Found({model: Entrant(model, model, "a" * 64 if model != "base" else "") for model in MODELS})
    questions = []
    for number in range(count):
        name = ("__proto__", "constructor")[number] if number < 2 else f"q{number}"
        tags = ("<i>odd</i>",) if number % 2 else ()
        questions.append(
            Question(name, HOSTILE if number == 2 else f"What is {number}?", "yes", "Be kind.", tags)
        )
        for model in MODELS:
            right = model != "base" and number % 3 == 0
            text = "yes" if right else HOSTILE
            answer = Answer("", model, "", name, 0, text, number == 1, 5, 9, 0, 0.1, 0.01, 1.0)
            found.answers[model, name, 0] = answer
    found.failures.append(Failure("answer", "base", "q2", 0, "PROMPT_TOO_LONG", HOSTILE))
    text = report_page(PLAN, questions, found, standings(PLAN, questions, found), datetime.now(UTC))
    path.write_text(text, encoding="utf-8")
    return path.as_uri()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def tab(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[tuple[Page, str]]:
    folder = tmp_path_factory.mktemp("browser")
    async with browser(folder / "profile") as tab:
        yield tab, written(folder / "report.html", 60)


@pytest_asyncio.fixture(loop_scope="module")
async def page(tab: tuple[Page, str]) -> Page:
    """The report in a freshly opened page."""
    page, url = tab
    await page.appear(1280, 800)
    await page.open(url)
    return page


async def choose(page: Page, field: str, value: str) -> None:
    """Set a filter as a person does."""
    script = f"document.getElementById('{field}')"
    await page.eval(
        f"({script}.value = {value!r}, {script}.dispatchEvent(new Event('input', {{bubbles: true}})))"
    )


async def test_everything_is_shown_as_text(page: Page) -> None:
    """Untrusted names, answers, failures and tags become no element, and nothing of them runs."""
    assert await page.texts("#standings tbody th") == ["base (baseline)", "constructor", "<b>bold</b>"]
    assert await page.eval("document.querySelectorAll('#failures td')[5].textContent") == HOSTILE
    await page.eval("document.querySelectorAll('details').forEach((each) => { each.open = true; })")
    await page.until("document.querySelectorAll('.card').length === 100")
    assert HOSTILE in await page.texts("#questions pre")
    assert await page.eval("document.querySelectorAll('main :is(script, img, b, i)').length") == 0
    assert await page.eval("document.title") == "Arena: 3 versions, 60 questions"
    assert page.complaints == []


async def test_questions_are_found_by_outcome_tag_and_words(page: Page) -> None:
    """Filters show the number of questions and the scores of both versions."""
    assert await page.text("#count") == "60 of 60 questions; strip: constructor 0.333, base 0.000 (+0.333)"
    await choose(page, "outcome", "won")
    assert len(await page.texts("#questions > li")) == 20
    await choose(page, "tag", "=<i>odd</i>")
    assert await page.text("#count") == "10 of 60 questions; strip: constructor 1.000, base 0.000 (+1.000)"
    await choose(page, "text", "what is 3?")
    assert await page.texts("summary .asked") == ["What is 3?"]
    for field in ("outcome", "tag", "text"):
        await choose(page, field, "")
    assert len(await page.texts("#questions > li")) == 50
    await page.click("#more")
    assert len(await page.texts("#questions > li")) == 60
