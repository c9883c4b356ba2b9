"""Routes of vLLM: trainers pause a replica and read what it is, and texts become tokens and back."""

import json
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import httpx
import pytest
import pytest_asyncio
from pydantic import ValidationError
from tokenizers import Tokenizer

from inference_service.api.http.app import create_app
from inference_service.api.http.compat.tokens import DetokenizeBody, TokenizeBody
from inference_service.api.http.wire.errors import error_body, invalid_body
from inference_service.core.served_model import NO_DEFAULTS
from loramux_shared.bundle.added_tokens import OwnTokens
from tests.contract.http.conftest import api as api, opened as opened
from tests.contract.http.test_vllm_parameters import world as world
from tests.contract.rpc.test_both_apis import TURNS
from tests.support.openai_api import OpenAIApi
from tests.support.services.managed_replica import ManagedReplica, managed_replica
from tests.support.services.silent import IDLE, SilentEngine, silent_service
from tests.support.web import web_client

pytestmark = pytest.mark.asyncio(loop_scope="module")
USER = {"role": "user", "content": "Hi"}


@pytest.fixture
def replica() -> ManagedReplica:
    """Two adapters and a builder."""
    return managed_replica()


@pytest_asyncio.fixture(loop_scope="module")
async def web(replica: ManagedReplica, tmp_path: Path) -> AsyncIterator[httpx.AsyncClient]:
    app = create_app(silent_service(tmp_path, replica.names), adapters=replica.manager)
    async with web_client(app) as web:
        yield web


async def test_a_page_of_another_site_pauses_nothing(web: httpx.AsyncClient) -> None:
    """A browser's own statement counts where there is no body that it would ask about first."""
    for path in ("/pause", "/resume"):
        assert (await web.post(path, headers={"sec-fetch-site": "cross-site"})).status_code == 403, path


async def test_trainers_learn_which_server_it_is(web: httpx.AsyncClient) -> None:
    """World size, and the configuration as far as they read it."""
    assert (await web.get("/get_world_size")).json() == {"world_size": 2}
    info = (await web.get("/server_info", params={"config_format": "json"})).json()["vllm_config"]
    assert info["model_config"]["dtype"] == "bfloat16"
    assert info["lora_config"] == {"max_loras": 4, "max_lora_rank": 64}
    assert (await web.get("/server_info", params={"config_format": "text"})).status_code == 400


async def test_the_load_is_at_both_paths(tmp_path: Path) -> None:
    """Sequences, seats and tokens of the cache are at the two paths that gateways try."""
    service = silent_service(tmp_path)
    cast(Any, service.local.engine).stats = replace(IDLE, running=3, waiting=2, blocks_free=6, seats=4)
    async with web_client(create_app(service)) as web:
        for path in ("/loads?model=base", "/v1/loads?include=core,disagg,queues,memory"):
            [load] = (await web.get(path)).json()["loads"]
            assert [load[f"num_{name}_reqs"] for name in ("running", "waiting", "total")] == [3, 2, 5]
            assert (load["max_running_requests"], load["utilization"]) == (4, 0.75)
            assert (load["num_used_tokens"], load["max_total_num_tokens"], load["token_usage"]) == (
                32,
                128,
                0.25,
            )


@pytest.mark.parametrize(
    ("query", "mode"),
    [
        ("?mode=keep", "keep"),
        ("", "abort"),
        ("?mode=wait", "wait"),
        ("?wait_for_inflight_requests=true", "wait"),
    ],
)
async def test_trainers_pause_and_resume(tmp_path: Path, query: str, mode: str) -> None:
    """Trainers use vLLM's modes, and its own default."""
    service = silent_service(tmp_path)
    engine = cast(SilentEngine, service.local.engine)
    async with web_client(create_app(service, adapters=managed_replica().manager)) as web:
        assert (await web.post(f"/pause{query}")).json() == {"status": "paused"}
        assert (engine.mode, (await web.get("/is_paused")).json()) == (mode, {"is_paused": True})
        assert (await web.post("/resume")).json() == {"status": "resumed"}
        assert (await web.get("/is_paused")).json() == {"is_paused": False}
        assert (await web.post("/pause?mode=never")).status_code == 400


async def test_a_prompt_is_not_rendered(web: httpx.AsyncClient) -> None:
    """Options of rendering messages are refused beside a text, rather than ignored."""
    answer = await web.post("/tokenize", json={"prompt": "Hi", "add_generation_prompt": True})
    assert answer.status_code == 400
    assert "only with messages" in answer.json()["error"]["message"]


async def test_a_prompt_or_messages_are_tokenized_and_not_both() -> None:
    """A body with neither prompt nor messages, or with both, is refused; null is the same as unset."""
    for fields in ({}, {"prompt": "a", "messages": [USER]}):
        with pytest.raises(ValidationError) as caught:
            TokenizeBody.model_validate_json(json.dumps(fields))
        message = error_body(invalid_body(caught.value, ()))["error"]["message"]
        assert message.count("either prompt or messages") == 1
    for kind, needed in ((TokenizeBody, {"prompt": "x"}), (DetokenizeBody, {"tokens": (5,)})):
        unset = {name: None for name, field in kind.model_fields.items() if not field.is_required()}
        assert kind.model_validate(unset | needed) == kind.model_validate(needed)


async def test_text_becomes_tokens_and_back(api: OpenAIApi) -> None:
    """A prompt, messages as the template renders them, and tokens; special tokens are added or not."""
    text = api.ready.service.text
    query: dict[str, Any] = {"model": "base:rs", "prompt": "HELLO", "return_token_strs": True}
    tokenized = (await api.post("/tokenize", **query, add_special_tokens=False)).json()
    assert (tokenized["count"], tokenized["max_model_len"]) == (5, 256)
    assert tokenized["token_strs"] == list("HELLO")
    body = (await api.post("/detokenize", model="base", tokens=tokenized["tokens"])).json()
    assert body == {"prompt": "HELLO"}
    for fields, rendered in (({"prompt": "Hi"}, "Hi"), ({"messages": [USER]}, "u:Hi;a:")):
        for flag in (True, False):
            found = (await api.post("/tokenize", **fields, add_special_tokens=flag)).json()
            assert found["tokens"] == text.encode(rendered, add_special_tokens=flag)
            assert (found["tokens"][0] == 1, found["token_strs"]) == (flag, None)
        usual = (await api.post("/tokenize", **fields)).json()["tokens"]
        assert (usual[0] == 1) == ("prompt" in fields)
    assert (await api.post("/detokenize", tokens=[500])).status_code == 400
    assert (await api.post("/tokenize", model="nope", prompt="A")).status_code == 404


async def test_an_adapters_own_tokens_are_read(api: OpenAIApi) -> None:
    """A model with added tokens has the texts and the ids of its own vocabulary."""
    service = api.ready.service
    new = Tokenizer.from_str(service.text.tokenizer_json()).get_vocab_size()
    flags = dict.fromkeys(("special", "lstrip", "rstrip", "single_word", "normalized"), False)
    token = {"id": new, "content": "<tool>", **flags}
    own = OwnTokens.model_validate({"vocab": new + 1, "tokens": [token]})
    digest = service.local.catalog.get("wide").digest
    service.local.catalog.know(digest, defaults=replace(NO_DEFAULTS, text=service.text.with_tokens(own)))
    for model, ids in (("wide", [new]), ("base", service.text.encode("<tool>"))):
        found = await api.post("/tokenize", model=model, prompt="<tool>", add_special_tokens=model == "base")
        assert found.json()["tokens"] == ids
        back = await api.post("/detokenize", model=model, tokens=found.json()["tokens"])
        assert back.json()["prompt"].endswith("<tool>")


async def test_messages_that_end_within_the_last_one(api: OpenAIApi) -> None:
    """The last message's own text ends the prompt, its spaces too; one without text is refused by its place."""
    turns = [USER, {"role": "assistant", "content": "i; So "}]
    fields = {"messages": turns, "add_generation_prompt": False, "continue_final_message": True}
    reported = await api.post("/tokenize", **fields)
    assert reported.json()["tokens"] == api.ready.service.text.encode("u:Hi;a:i; So ", add_special_tokens=False)
    answer = await api.post("/tokenize", **fields | {"messages": [{"role": "user", "content": ""}]})
    assert answer.json()["error"]["param"] == "messages[0].content"


@pytest.mark.parametrize(("messages", "options", "taken"), TURNS)
async def test_turns_are_judged_where_they_are_only_counted(
    api: OpenAIApi, messages: list[dict[str, Any]], options: dict[str, Any], taken: bool
) -> None:
    """Messages, tools and variables of the template are judged as in a chat."""
    answer = await api.post("/tokenize", messages=messages, **options)
    assert answer.status_code == (200 if taken else 400)
