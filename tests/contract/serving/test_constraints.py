"""Structured output: whatever the model, an answer that stops is of the language that was asked for."""

import asyncio
import json
import sys
import threading
from collections.abc import AsyncIterator
from functools import partial
from typing import Any

import pytest
import pytest_asyncio
from tokenizers import Tokenizer

from inference_service.core.constraint import Constraint, Kind
from inference_service.core.request import AnswerDelta, AnswerFinished, Request
from inference_service.core.sequence import EndReason
from inference_service.driver import constraints
from inference_service.driver.constraints import Constraints
from inference_service.startup.load import Ready
from inference_service.text.sandbox.process import SandboxProcess
from inference_service.text.text import Text
from loramux_shared.faults import RequestInvalid
from loramux_shared.storage.memory import MemoryStore
from tests.support.cases import cases
from tests.support.grammars import mask_of
from tests.support.service import Service, open_service
from tests.support.steps import engine_without_time
from tests.support.tiny import World
from tests.support.waiting import BOUND_S, result_of, until

PROMPT = [5, 6, 7, 8]
# A random model hardly ever closes a brace by itself.
CLOSING = {3 + ord(char) - 32: 6.0 for char in '"}],:'} | {2: 4.0}
DRAWN: dict[str, Any] = {"max_tokens": 120, "temperature": 1.0, "logit_bias": CLOSING}


pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shared(world: tuple[World, MemoryStore]) -> AsyncIterator[Service]:
    """A loaded service for all tests, which tries constraints for a third of a second."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(constraints, "SandboxProcess", partial(SandboxProcess, cpu_s=0.3))
        service = await open_service(world)
    yield service
    await service.close()


@pytest.fixture
def ready(service: Service) -> Ready:
    """The service, which holds nothing."""
    return service.ready


async def ask(ready: Ready, kind: Kind, text: str = "", **fields: Any) -> list[tuple[str, EndReason]]:
    request = Request.of(fields.pop("model", "base"), PROMPT, constraint=Constraint(kind, text), **fields)
    texts, ends = ["" for _ in range(request.output.n)], {}
    async for event in ready.service.generate(request):
        if isinstance(event, AnswerDelta):
            texts[event.index] += event.text
        elif isinstance(event, AnswerFinished):
            ends[event.index] = event.reason
    return [(text, ends[index]) for index, text in enumerate(texts)]


POINT = {
    "type": "object",
    "properties": {"x": {"type": "integer"}, "tag": {"enum": ["a", "b"]}},
    "required": ["x", "tag"],
    "additionalProperties": False,
}


async def test_the_end_of_sequence_comes_only_where_the_text_may_end(ready: Ready) -> None:
    """The grammar requires three letters before the end, whatever the model and the adapter prefer."""
    fields = DRAWN | {"logit_bias": {2: 100.0}}
    assert await ask(
        ready, "regex", "[a-z]{3,9}", **fields | {"temperature": 0.0, "logit_bias": {2: 100.0, 70: 90.0}}
    ) == [("ccc", EndReason.STOP)]
    for model in ("base", "all"):
        ((text, end),) = await ask(ready, "regex", "[a-z]{3,9}", model=model, **fields)
        assert (len(text), end) == (3, EndReason.STOP)


async def test_drafts_change_no_constrained_answer(world: tuple[World, MemoryStore]) -> None:
    """Drafts of forced tokens and of earlier text change no constrained answer."""
    again = {"max_tokens": 60, "temperature": 0.0}
    found, accepted = [], []
    for tokens in (0, 8):
        service = await open_service(world, speculative_tokens=tokens, build=engine_without_time())
        ready = service.ready  # on its clock rows are free
        stated, count = [], []
        for model in ("base", "all"):
            for kind, text, fields in (
                ("json_schema", json.dumps(POINT), {"seed": 1, **DRAWN, "logit_bias": {}}),
                ("regex", "([a-c]{2}(say it again|stop)){9}", again),
                ("regex", "(abc|abd){20}", again),
                ("lark", "start: A+\nA: /[x-z]/", {"seed": 2, "temperature": 1.0, "max_tokens": 60}),
            ):
                before = ready.engine.stats.tokens_accepted
                stated.append(await ask(ready, kind, text, model=model, **fields))
                count.append(ready.engine.stats.tokens_accepted - before)
        await service.close()
        found.append(stated)
        accepted.append(count)
    assert found[0] == found[1]
    assert not any(accepted[0])
    assert min(accepted[1][at] for at in (1, 2, 5, 6)) > 10, accepted[1]


async def test_masks_along_a_draft_are_those_that_it_leads_to(ready: Ready) -> None:
    """The masks along a draft follow its tokens; the draft is cut where the grammar allows no continuation."""
    text = ready.service.text
    compiled = await Constraints(frozenset({2})).compile(Constraint("regex", "ab(c|de)f?"), text)
    a, b, c, d, e, f = (3 + ord(letter) - 32 for letter in "abcdef")
    grammar, other = compiled.begin(frozenset({2})), compiled.begin(frozenset({2}))
    assert grammar.forced() == [a, b]
    for drafted, taken in (
        ([a, b, d, c], 3),
        ([b], 0),
        ([a, 2], 1),
        ([], 0),
        ([a, b, c, f], 3),
        ([a, b, d, e], 4),
    ):
        assert grammar.draft(drafted) == taken
    for ahead, token in enumerate([a, b, d]):
        assert grammar.mask(ahead) == other.mask()
        other.accept(token)
    for token in (a, b, c):  # the last is another than the draft's
        grammar.accept(token)
        assert not grammar.complete
    assert grammar.draft([f]) == 0  # nothing is drawn behind it
    assert grammar.mask() == mask_of({f, 2}).ljust(len(grammar.mask()), b"\0")
    grammar.accept(f)
    assert (grammar.complete, grammar.failure) == (True, "")


DEEP: list[tuple[Kind, str, str]] = [
    ("json_schema", '{"items":' * 900 + "{" + "}" * 901, "JSON"),
    ("gbnf", "root ::= " + "(" * 3000 + '"a"' + ")" * 3000, "too deeply nested"),
    ("lark", "start: r0\n" + "".join(f"r{i}: r{i + 1}\n" for i in range(3000)) + 'r3000: "a"', "nested"),
]


@pytest.mark.parametrize(
    ("kind", "text", "why"),
    [*cases(__file__, "test_a_constraint_that_cannot_be_used_is_refused_with_the_reason"), *DEEP],
)
async def test_a_constraint_that_cannot_be_used_is_refused_with_the_reason(
    ready: Ready, kind: Kind, text: str, why: str
) -> None:
    """Bad syntax, unsupported features and dangerous patterns are refused with the field's name."""
    with pytest.raises(RequestInvalid) as caught:
        await ask(ready, kind, text)
    (finding,) = caught.value.findings
    assert finding.where == "response_format"
    assert why in finding.found
    assert finding.expected
    assert not any(word in finding.found for word in ("verbose", "NoExt", "coerce", "start: /", "%llg", "(And"))


async def test_an_answer_that_cannot_go_on_ends_with_the_reason(ready: Ready) -> None:
    """A request is refused where no token of the model continues the text, or a step takes too much."""
    doubling = "start: r0\n" + "".join(f"r{i}: r{i + 1} r{i + 1}\n" for i in range(60)) + 'r60: "a"'
    cases: list[tuple[Kind, str, str]] = [
        ("regex", "a\u1234", "no token"),
        ("lark", doubling, "Too many items"),
    ]
    for kind, text, why in cases:
        with pytest.raises(RequestInvalid) as caught:
            await ask(ready, kind, text, max_tokens=5)
        assert caught.value.findings[0].where == "response_format"
        assert why in caught.value.findings[0].found
    assert await ask(ready, "regex", "aa", max_tokens=5) == [("aa", EndReason.STOP)]


class HeldText(Text):
    """A text side whose tokenizer waits until it may go on."""

    def __init__(self, text: Text) -> None:
        super().__init__(Tokenizer.from_str(text.tokenizer_json()), None, text.vocab)
        self.go = threading.Event()
        self.threads: set[int] = set()

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        self.threads.add(threading.get_ident())
        assert self.go.wait(BOUND_S)
        return super().encode(text, add_special_tokens=add_special_tokens)


async def test_constraints_are_compiled_once_and_off_the_loop(ready: Ready) -> None:
    """A constraint is compiled once for all concurrent and later requests; the loop continues meanwhile."""
    own, constraint, held = Constraints(frozenset({2})), Constraint("regex", "a+"), HeldText(ready.service.text)
    tasks = [asyncio.create_task(own.compile(constraint, held)) for _ in range(4)]
    await until(lambda: held.threads, "a compilation")
    assert await ask(ready, "regex", "aa", max_tokens=5) == [("aa", EndReason.STOP)]
    assert not any(task.done() for task in tasks)
    held.go.set()
    await result_of(asyncio.gather(*tasks), "all requests")
    assert len({id(task.result().start) for task in tasks}) == 1
    assert len(held.threads) == 1
    assert threading.get_ident() not in held.threads
    assert (await own.compile(constraint, held)).start is tasks[0].result().start


async def test_a_sandbox_that_was_taken_over_refuses_its_grammar_alone(ready: Ready) -> None:
    """An answer without a grammar refuses the request that asked; the next request has another process."""
    text, own = ready.service.text, Constraints(frozenset({2}))
    command, own.trial.command = own.trial.command, (sys.executable, "-c", "input(); print('{}')")
    with pytest.raises(RequestInvalid, match="refused") as refused:
        await own.compile(Constraint("gbnf", 'root ::= "a"'), text)
    assert "without a grammar" in refused.value.findings[0].found
    own.trial.close()
    own.trial.command = command
    assert (await own.compile(Constraint("gbnf", 'root ::= "b"'), text)).begin(frozenset({2})).forced()
    own.trial.close()
