"""``/v1/embeddings`` with OpenAI's client, and the same over gRPC, in front of a tiny model."""

import base64
import shutil
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytest_asyncio

from loramux_shared.faults import RequestInvalid
from loramux_shared.runtime import FILE, Pooling
from loramux_shared.storage.memory import MemoryStore
from tests.support.grpc_api import open_client
from tests.support.openai_api import OpenAIApi, open_api
from tests.support.pooled import expected_of
from tests.support.tiny import World
from tests.support.waiting import BOUND_S

pytestmark = pytest.mark.asyncio(loop_scope="module")
PATH = "/v1/embeddings"
IDS = [5, 6, 7, 8, 9, 10]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def opened(world: tuple[World, MemoryStore]) -> AsyncIterator[OpenAIApi]:
    async with open_api(world, max_queue=5, max_batch_seqs=4) as api:
        yield api


async def made(api: OpenAIApi, **fields: Any) -> list[np.ndarray[Any, Any]]:
    answer = await api.post(PATH, **{"model": "base", "input": IDS} | fields)
    assert answer.status_code == 200, answer.text
    data = answer.json()["data"]
    assert [each["index"] for each in data] == list(range(len(data)))
    return [np.array(each["embedding"], np.float32) for each in data]


def unit(vector: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return vector / np.linalg.norm(vector)


@pytest.mark.parametrize("model", ["base", "all"])
async def test_openais_client_gets_what_transformers_gives(
    world: tuple[World, MemoryStore], api: OpenAIApi, model: str
) -> None:
    """Text and token ids, one and several, as base64 and as numbers; of length 1; the usage counts prompts."""
    text = api.ready.service.text.decode(IDS)
    required = unit(expected_of(world[0], model, IDS, Pooling.LAST))
    ids = api.ready.service.text.encode(text)
    of_text = unit(expected_of(world[0], model, ids, Pooling.LAST))
    for sent, expected, tokens in (
        (IDS, [required], 6),
        ([IDS, IDS[:3]], [required, unit(expected_of(world[0], model, IDS[:3], Pooling.LAST))], 9),
        (text, [of_text], len(ids)),
        ([text, text], [of_text, of_text], 2 * len(ids)),
    ):
        for encoding in ("base64", "float"):
            answer = await api.openai.embeddings.create(model=model, input=sent, encoding_format=encoding)
            assert answer.object == "list"
            assert answer.model == model
            assert (answer.usage.prompt_tokens, answer.usage.total_tokens) == (tokens, tokens)
            for one, other in zip(answer.data, expected, strict=True):
                found = one.embedding
                if isinstance(found, str):
                    found = np.frombuffer(base64.b64decode(found), "<f4")
                np.testing.assert_allclose(found, other, atol=1e-5)


async def test_grpc_gives_the_same_vectors(api: OpenAIApi) -> None:
    """Texts, ids, options and blends give the same with the Python client; wrong ones are refused by name."""
    text = api.ready.service.text.decode(IDS)
    async with open_client(api.ready) as client:
        found = await client.embed("all", [IDS, text, IDS[:2]], timeout_s=BOUND_S)
        over_http = await made(api, model="all", input=[IDS, api.ready.service.text.encode(text), IDS[:2]])
        np.testing.assert_allclose(found.vectors, over_http, atol=1e-6)
        assert (found.model, found.prompt_tokens) == ("all", 8 + len(api.ready.service.text.encode(text)))
        options: dict[str, Any] = {"pooling": "mean", "dimensions": 7, "normalize": False}
        cut = await client.embed("", [IDS], adapters=["rs", ("all", 0.5)], **options)
        np.testing.assert_allclose(cut.vectors, await made(api, model="rs+all*0.5", **options), atol=1e-6)
        with pytest.raises(RequestInvalid, match="dimensions"):
            await client.embed("base", ["x"], dimensions=49)


async def test_what_the_base_and_the_deployment_say_of_pooling(
    world: tuple[World, MemoryStore], tmp_path: Path
) -> None:
    """A file of the base is fetched and read with it; the deployment's word comes before it."""
    shutil.copytree(world[0].base, tmp_path / "base")
    (tmp_path / "base" / FILE).parent.mkdir()
    (tmp_path / "base" / FILE).write_text('{"pooling_mode_mean_tokens": true, "include_prompt": true}')
    trained, found = World(tmp_path / "base", {}, tmp_path), []
    for runtime in ({}, {"pooling": "last"}):
        store = MemoryStore()
        trained.build_with(store, runtime=runtime)
        async with open_api((trained, store)) as api:
            found += await made(api, normalize=False)
    expected = [expected_of(world[0], "base", IDS, pooling) for pooling in (Pooling.MEAN, Pooling.LAST)]
    np.testing.assert_allclose(found, expected, atol=1e-5)
