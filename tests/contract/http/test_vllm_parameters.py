"""vLLM's own parameters, as clients that were written for it send them, over HTTP.

Their bounds are judged in tests/unit/http/test_bounds.py. That bodies hand them on by name is seen in
tests/unit/project/test_knobs.py, so each effect is shown with one kind of prompt, and streamed if it differs.
"""

import math
import re
from typing import Any

import pytest
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing

from loramux_shared.storage.memory import MemoryStore
from tests.support.openai_api import OpenAIApi, openai_world
from tests.support.tiny import World

pytestmark = pytest.mark.asyncio(loop_scope="module")
CHAT, PLAIN = "/v1/chat/completions", "/v1/completions"
PROMPTS: dict[str, dict[str, Any]] = {
    CHAT: {"messages": [{"role": "user", "content": "Hi"}]},
    PLAIN: {"prompt": "Hi"},
}
BOTH = pytest.mark.parametrize("path", [CHAT, PLAIN])


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> tuple[World, MemoryStore]:
    """A tokenizer that puts <1> before a text."""
    world, _ = openai_world(tmp_path_factory.mktemp("vllm"), built=False)
    path = str(world.base / "tokenizer.json")
    tokenizer = Tokenizer.from_file(path)
    tokenizer.post_processor = TemplateProcessing("<1> $A", special_tokens=[("<1>", 1)])
    tokenizer.save(path)
    return world, world.built()


def ids_of(chars: str) -> list[int]:
    """The tokens of characters."""
    return [3 + ord(char) - 32 for char in chars]


def body(path: str, **fields: Any) -> dict[str, Any]:
    """A greedy request of twelve tokens."""
    usual = {"model": "base", "temperature": 0, "max_tokens": 12, "ignore_eos": True}
    return PROMPTS[path] | usual | fields


async def whole(api: OpenAIApi, path: str = PLAIN, **fields: Any) -> dict[str, Any]:
    answer = await api.post(path, **body(path, **fields))
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


async def texts(api: OpenAIApi, path: str = PLAIN, **fields: Any) -> list[str]:
    """The text of each answer."""
    choices = (await whole(api, path, **fields))["choices"]
    return [choice["text"] if path == PLAIN else choice["message"]["content"] for choice in choices]


async def streamed(api: OpenAIApi, path: str, count: int, **fields: Any) -> list[str]:
    """The same from a stream of so many answers."""
    stated = [""] * count
    for chunk in await api.chunks(path, **body(path, **fields)):
        for choice in chunk["choices"]:
            stated[choice["index"]] += (
                choice["text"] if path == PLAIN else choice["delta"].get("content")
            ) or ""
    return stated


async def refusal(api: OpenAIApi, path: str = PLAIN, **fields: Any) -> tuple[str, str]:
    answer = await api.post(path, **body(path, **fields))
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    return error["param"], error["code"]


@BOTH
async def test_null_is_not_set_whatever_it_is_called(api: OpenAIApi, path: str) -> None:
    """Unknown fields with null are ignored; an unknown field with a value is refused."""
    unset = dict.fromkeys(("top_k", "stop", "bad_words", "structured_outputs", "documents"))
    back = {} if path == PLAIN else {"messages": [{"role": "user", "content": "Hi", "reasoning_content": None}]}
    assert await texts(api, path, **unset | back) == await texts(api, path)
    assert await api.chunks(path, **body(path, stream_options={"include_usage": None, "unknown": None}))
    assert await refusal(api, path, unknown=None, documents=[]) == ("documents", "unknown_parameter")


@BOTH
async def test_stops_can_stay_in_the_text(api: OpenAIApi, path: str) -> None:
    """The text ends with the stop text that ended it, or with the stop token's; streamed too."""
    [plain] = await texts(api, path)
    stop = plain[4:6]
    end = plain.index(stop)
    retained = {"stop": stop, "include_stop_str_in_output": True}
    assert await texts(api, path, stop=stop) == [plain[:end]]
    assert (
        await texts(api, path, **retained) == await streamed(api, path, 1, **retained) == [plain[:end] + stop]
    )
    [token] = api.ready.service.text.encode(plain[4], add_special_tokens=False)
    end = plain.index(plain[4])
    retained = {"stop_token_ids": [token], "include_stop_str_in_output": True, "n": 2}
    assert await texts(api, path, stop_token_ids=[token]) == [plain[:end]]
    assert (
        await texts(api, path, **retained) == await streamed(api, path, 2, **retained) == [plain[: end + 1]] * 2
    )


async def test_only_the_same_salt_finds_a_prompt_again(api: OpenAIApi) -> None:
    """Cached prompts are shared among requests with one salt, and among those without one."""
    found, stated = [], set()
    for salt in (None, None, "a", "a", "b", None):
        answer = await whole(api, cache_salt=salt, prompt="x" * 100, max_tokens=2)
        found.append(answer["usage"]["prompt_tokens_details"]["cached_tokens"] > 0)
        stated.add(str(answer["choices"]))
    assert found == [False, True, False, True, False, True]
    assert len(stated) == 1


async def test_what_leaves_nothing_is_refused_by_name(api: OpenAIApi) -> None:
    """Allowed tokens and bad words that exclude each other end the request on the way."""
    answer = await api.post(PLAIN, **body(PLAIN, allowed_token_ids=[5], bad_words=['"' * 9], n=2))
    assert answer.json()["error"]["param"] == "allowed_token_ids"
    assert "none after 8 tokens" in answer.json()["error"]["message"]
    await api.until_free()
    assert await texts(api, allowed_token_ids=[5], bad_words=['"' * 13]) == ['"' * 12]


async def test_special_tokens_are_added_or_not(api: OpenAIApi) -> None:
    """Special tokens are added by default to a text and not to messages; either way if requested."""
    for path, counts in ((CHAT, [7, 8, 7]), (PLAIN, [3, 3, 2])):
        answers = [await whole(api, path, add_special_tokens=add, max_tokens=1) for add in (None, True, False)]
        assert [answer["usage"]["prompt_tokens"] for answer in answers] == counts


@BOTH
async def test_a_prompt_is_cut_to_its_end(api: OpenAIApi, path: str) -> None:
    """The prompt keeps its last k tokens, or as many as leave room; a prompt that cannot be cut is refused."""

    def prompt(text: str) -> dict[str, Any]:
        return {"messages": [{"role": "user", "content": text}]} if path == CHAT else {"prompt": text + ";a:"}

    long, too_long = prompt("x" * 300 + "Hi"), (None, "context_length_exceeded")
    assert await refusal(api, path, **long) == too_long
    for cut, fields, expected in (
        (4, {"max_tokens": 2}, 4),
        (-1, {"max_tokens": 12}, 244),
        (-1, {"max_tokens": None}, 255 if path == CHAT else 240),
    ):
        answer = await whole(api, path, **long | fields, truncate_prompt_tokens=cut)
        assert answer["usage"]["prompt_tokens"] == expected
    for fields in ({"truncate_prompt_tokens": 256}, {"truncate_prompt_tokens": -1, "max_tokens": 256}):
        assert await refusal(api, path, **long | fields) == too_long
    four = await texts(api, path, **long, truncate_prompt_tokens=4, n=2)
    assert four == await texts(api, prompt=api.ready.service.text.encode("i;a:")[-4:], n=2)
    assert await refusal(api, path, **prompt("x" * 200_000), truncate_prompt_tokens=4) == too_long


async def test_an_answer_goes_on_with_the_last_message(api: OpenAIApi) -> None:
    """The prompt ends with the last message's own text, its spaces too, and the answer is the rest of it."""
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "i; So "}]
    fields = {"messages": turns, "add_generation_prompt": False, "continue_final_message": True}
    expected = await texts(api, prompt="u:Hi;a:i; So ", add_special_tokens=False, n=2)
    assert await texts(api, CHAT, **fields, n=2) == expected
    assert (await whole(api, CHAT, **fields, request_id="job-1"))["id"] == "chatcmpl-job-1"
    empty = {"messages": [{"role": "user", "content": ""}]}
    assert await refusal(api, CHAT, **fields | empty) == ("messages[0].content", "invalid_value")


GBNF = 'root ::= pair ("," pair)*\npair ::= [a-b] "=" ("x" | "yy")\n'
LARK = 'start: PAIR ("," PAIR)*\nPAIR: /[a-b]=(x|yy)/'
STRUCTURES: list[tuple[str, dict[str, Any], str]] = [
    (PLAIN, {"json": '{"enum": ["q", "z"]}'}, '"[qz]"'),
    (PLAIN, {"regex": "[a-c]{3}-?"}, "[a-c]{3}-?"),
    (CHAT, {"choice": ["a.b", "(c)|d", "e f\\", "ay#-&~"]}, r"a\.b|\(c\)\|d|e f\\|ay#-&~"),
    (PLAIN, {"grammar": GBNF}, "[ab]=(x|yy)(,[ab]=(x|yy))*"),
    (PLAIN, {"grammar": LARK}, "[ab]=(x|yy)(,[ab]=(x|yy))*"),
    (PLAIN, {"json_object": True, "regex": None}, r"\s*\{.*\}\s*"),
]


@pytest.mark.parametrize(("path", "query", "pattern"), STRUCTURES)
async def test_structured_outputs(api: OpenAIApi, path: str, query: dict[str, Any], pattern: str) -> None:
    """Every answer that stops is of the language that was asked for."""
    closing = {str(token): 9 for token in ids_of('"},;xy]')} | {"2": 9}
    fields = {"max_tokens": 40, "temperature": 1, "seed": 4, "n": 4, "logit_bias": closing, "ignore_eos": False}
    choices = (await whole(api, path, structured_outputs=query, **fields))["choices"]
    stopped = [choice for choice in choices if choice["finish_reason"] == "stop"]
    assert stopped
    for choice in stopped:
        assert re.fullmatch(
            pattern, choice["text"] if path == PLAIN else choice["message"]["content"], re.DOTALL
        )


async def test_one_structure_is_asked_for_at_a_time(api: OpenAIApi) -> None:
    """Beside tools an answer has the structure or calls one; a response format that is text changes nothing."""
    requests = {"structured_outputs": {"regex": "a"}}
    tools = [{"type": "function", "function": {"name": "f"}}]
    assert await texts(api, CHAT, **requests, tools=tools, logit_bias={"68": 100}) == ["a"]
    assert await texts(api, CHAT, **requests, response_format={"type": "text"}) == ["a"]


@pytest.mark.beside
@BOTH
async def test_log_probabilities_are_those_that_are_asked_for(api: OpenAIApi, path: str) -> None:
    """Processed log probabilities are divided by the temperature; the server's setting is the default."""
    few = {"allowed_token_ids": [40, 41], "temperature": 4.0, "seed": 1, "max_tokens": 1}
    few |= {"logprobs": True, "top_logprobs": 20} if path == CHAT else {"logprobs": 20}

    async def best(**mode: str) -> dict[str, float]:
        """The most likely tokens in the place of the answer's first one."""
        scores = (await whole(api, path, **few, **mode))["choices"][0]["logprobs"]
        if path == CHAT:
            return {each["token"]: each["logprob"] for each in scores["content"][0]["top_logprobs"]}
        return dict(scores["top_logprobs"][0])

    raw, processed = await best(), await best(logprobs_mode="processed")
    assert sum(math.exp(value) for value in raw.values()) < 1.0
    likely = [value for value in processed.values() if value > -9999]
    assert len(likely) == 2
    assert sum(map(math.exp, likely)) == pytest.approx(1.0, abs=1e-5)
    api.ready.service.logprobs_mode = "processed"
    try:
        assert (await best(), await best(logprobs_mode="raw")) == (processed, raw)
    finally:
        api.ready.service.logprobs_mode = "raw"


@BOTH
async def test_token_ids_are_reported(api: OpenAIApi, path: str) -> None:
    """The response has the prompt's token ids once, and each choice its own, hidden tokens included."""
    fields = {"return_token_ids": True, "n": 2, "temperature": 2, "seed": 1, "stop_token_ids": [2]}
    fields |= {"logit_bias": {"1": 95, "2": 94}, "ignore_eos": False}
    answer = await whole(api, path, **fields)
    prompt = api.ready.service.text.encode(
        "u:Hi;a:" if path == CHAT else "Hi", add_special_tokens=path == PLAIN
    )
    reported = [choice.get("prompt_token_ids") for choice in answer["choices"]]
    assert [answer.get("prompt_token_ids"), *reported] == (
        [prompt, None, None] if path == CHAT else [None, prompt, prompt]
    )
    ids = [choice["token_ids"] for choice in answer["choices"]]
    assert sum(map(len, ids)) == answer["usage"]["completion_tokens"]
    assert all(set(each[:-1]) == {1} or len(each) == 1 for each in ids)
    parts: list[list[int]] = [[], []]
    prompts = []
    for chunk in await api.chunks(path, **body(path, **fields)):
        for choice in chunk["choices"]:
            parts[choice["index"]] += choice["token_ids"]
            prompts += [part["prompt_token_ids"] for part in (chunk, choice) if "prompt_token_ids" in part]
    assert parts == ids
    assert prompts == [prompt] * (1 if path == CHAT else 2)
    plain = await whole(api, path)
    assert "token_ids" not in plain["choices"][0]
    assert "prompt_token_ids" not in {**plain, **plain["choices"][0]}


async def test_token_ids_of_an_echo_are_the_answers(api: OpenAIApi) -> None:
    """The prompt that is echoed has its own; calls that are read have theirs as well."""
    fields = {"return_token_ids": True, "echo": True, "max_tokens": 3, "prompt_logprobs": 0}
    [choice] = (await whole(api, **fields))["choices"]
    assert len(choice["token_ids"]) == 3
    assert len(choice["prompt_token_ids"]) == len(choice["prompt_logprobs"]) == 3
    chunks = await api.chunks(PLAIN, **body(PLAIN, **fields))
    assert sum("prompt_logprobs" in chunk["choices"][0] for chunk in chunks) == 1
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "maxProperties": 0}}}
    forced = {"tools": [tool], "tool_choice": "required", "max_tokens": 90, "return_token_ids": True}
    [choice] = (await whole(api, CHAT, **forced))["choices"]
    parts = [part for chunk in await api.chunks(CHAT, **body(CHAT, **forced)) for part in chunk["choices"]]
    assert choice["finish_reason"] == "tool_calls"
    assert [token for part in parts for token in part["token_ids"]] == choice["token_ids"]
