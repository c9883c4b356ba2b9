"""Text Embeddings Inference's routes with the hub's own client, in front of a tiny model."""

from collections.abc import AsyncIterator
from typing import Any

import numpy as np
import pytest
import pytest_asyncio
from huggingface_hub import AsyncInferenceClient
from huggingface_hub.errors import HfHubHTTPError

from loramux_shared.access.guard import Guard
from loramux_shared.access.keyring import Keyring
from loramux_shared.storage.memory import MemoryStore
from tests.contract.http.test_scores import DOCUMENTS, NAMES, logits, made as made
from tests.support.access import lines, new_entry
from tests.support.openai_api import OpenAIApi, answer_of, assert_close, open_api
from tests.support.tiny import World

pytestmark = pytest.mark.asyncio(loop_scope="module")
LONG = "".join(chr(97 + place % 26) for place in range(400))


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def opened(made: tuple[World, MemoryStore]) -> AsyncIterator[OpenAIApi]:
    async with open_api(made) as api:
        yield api


async def vectors(api: OpenAIApi, **body: Any) -> list[Any]:
    """Return what OpenAI's route answers."""
    return [each["embedding"] for each in (await answer_of(api, "/v1/embeddings", **body))["data"]]


async def test_the_hubs_client_gets_vectors_of_the_base(api: OpenAIApi) -> None:
    """A text and texts are those of `/v1/embeddings`; a long text loses the end that the client names."""
    client = AsyncInferenceClient(model=f"{api.url}/embed")
    assert_close(await client.feature_extraction("abc"), await vectors(api, model="base", input=["abc"]))
    options: dict[str, Any] = {"normalize": False, "dimensions": 7}
    found = await client.feature_extraction(["abc", "a cat"], **options)
    assert_close(found, await vectors(api, model="base", input=["abc", "a cat"], **options))
    for name, text in (("query", "find: abc"), ("document", "abc")):
        found = await client.feature_extraction("abc", prompt_name=name)
        assert_close(found, await vectors(api, model="base", input=[text]))
    ids = api.ready.service.text.encode(LONG)
    most = api.ready.service.limits.max_seq_len
    for side, kept in (("left", ids[-most:]), ("right", ids[:most]), (None, ids[:most])):
        found = await client.feature_extraction(LONG, truncate=True, truncation_direction=side)
        assert_close(found, await vectors(api, model="base", input=[kept]))
        body = {"inputs": ids, "truncate": True, "truncation_direction": side and side.capitalize()}
        assert_close((await api.post("/embed", **body)).json(), found)
    with pytest.raises(HfHubHTTPError, match="Shorten the prompt"):
        await client.feature_extraction(LONG)


async def test_texts_are_ranked(made: tuple[World, MemoryStore], api: OpenAIApi) -> None:
    """The shape is that of Text Embeddings Inference, probabilities by default; texts come where asked for."""
    pairs = [api.ready.service.text.encode_pair(("a cat", document), 256)[0] for document in DOCUMENTS]
    expected = logits(made[0], "ranker", pairs)[:, 0]
    order = sorted(range(len(DOCUMENTS)), key=lambda index: (-expected[index], index))
    body: dict[str, Any] = {"model": "ranker", "query": "a cat", "texts": DOCUMENTS}
    found = (await api.post("/rerank", **body)).json()
    assert [each["index"] for each in found] == order
    assert set(found[0]) == {"index", "score"}
    assert_close([each["score"] for each in found], 1 / (1 + np.exp(-expected[order])))
    raw = (await api.post("/rerank", **body, raw_scores=True, return_text=True)).json()
    assert_close([each["score"] for each in raw], expected[order])
    assert [each["text"] for each in raw] == [DOCUMENTS[index] for index in order]
    long = body | {"texts": [LONG]}
    assert (await api.post("/rerank", **long)).status_code == 400
    sides = [
        (await api.post("/rerank", **long, truncate=True, truncation_direction=side)).json()[0]["score"]
        for side in ("Left", "Right")
    ]
    assert sides[0] != sides[1]


async def test_a_request_without_a_model_asks_the_one_that_its_key_opens(
    made: tuple[World, MemoryStore],
) -> None:
    """A key for one model names it to clients that name none; a key for all means the base, without a head."""
    keys = {name: new_entry(name, "infer") for name in ("ranker", "topics", "encoder", "all")}
    entries = [
        entry if name == "all" else entry.model_copy(update={"models": (name,)})
        for name, (_, entry) in keys.items()
    ]
    async with open_api(made, Guard(Keyring(text=lines(*entries)))) as api:
        for name, (key, _) in keys.items():
            api.http.headers["authorization"] = f"Bearer {key}"
            client = AsyncInferenceClient(model=f"{api.url}/embed", token=key)
            model = "base" if name == "all" else name
            assert_close(await client.feature_extraction("abc"), await vectors(api, model=model, input="abc"))
            info = (await api.http.get("/info")).json()
            assert info["model_id"] == model
            if name == "ranker":
                assert info["model_type"] == {
                    "reranker": {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}
                }
                assert len((await api.post("/rerank", query="a", texts=["b", "c"])).json()) == 2
            elif name == "topics":
                assert list(info["model_type"]["classifier"]["id2label"].values()) == NAMES
                best = await AsyncInferenceClient(model=f"{api.url}/predict", token=key).text_classification(
                    "abc"
                )
                [known] = (await answer_of(api, "/classify", model=name, input="abc"))["data"]
                assert getattr(best, "label", None) == known["label"]
            else:
                assert info["model_type"] == {"embedding": {"pooling": "last"}}
                refusal = (await api.post("/predict", inputs="a")).json()["error"]
                assert refusal["param"] == "model"
                assert "Name such an adapter" in refusal["message"]
