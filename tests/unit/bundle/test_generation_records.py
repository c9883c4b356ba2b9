"""The records of adapters in a generation, and in those of older releases."""

from __future__ import annotations

import hashlib
import json
from datetime import UTC, datetime

from loramux_shared.bundle.generation import Generation, Recipe
from loramux_shared.bundle.manifest import AdapterSummary

OLD = (
    '{"adapters":{"one":{"digest":"' + "a" * 64 + '","source":{"repo":"org/one","revision":"r",'
    '"runtime_secret_name":"","source":"HF","subfolder":""}}},"base":{"files":{},"source":{"repo":"org/base",'
    '"revision":"","runtime_secret_name":"","source":"HF","subfolder":""}},"create_time":"2026-01-01T00:00:00Z",'
    '"deployment":"tiny","format_version":1,"lora_dtype":"bfloat16","lora_target_modules":[],"max_lora_rank":8,'
    '"max_seq_len":null,"merge":"auto","number":1,"request_default_max_tokens":null,"serve_base":true,'
    '"served_model_name":"tiny"}\n'
).encode()
SUMMARY = AdapterSummary(ranks=(4, 8), modules=("attn_q",), tensors_used=4, weights_bytes=96, bundle_bytes=200)


def test_a_generation_of_an_older_release_keeps_its_bytes() -> None:
    """An absent field is not in its canonical bytes: pointers hold their digests."""
    found = Generation.from_bytes(OLD, sha256=hashlib.sha256(OLD).hexdigest())
    assert found.to_bytes() == OLD
    assert (found.recipe, found.adapters["one"].summary, found.adapters["one"].converter) == (None, None, None)


def test_what_a_generation_says_is_read_back() -> None:
    """Summaries and recipe are in the bytes, and come back the same."""
    old = Generation.from_bytes(OLD)
    record = old.adapters["one"].model_copy(update={"listing": "b" * 64, "summary": SUMMARY})
    new = old.model_copy(update={"adapters": {"one": record}, "recipe": Recipe(truncate_to_rank=4)})
    assert Generation.from_bytes(new.to_bytes()) == new
    body = json.loads(new.to_bytes())
    assert body["adapters"]["one"]["summary"]["ranks"] == [4, 8]
    assert body["recipe"] == {"prove": False, "truncate_to_rank": 4}


def test_content_is_the_same_whatever_a_source_says_of_the_same_files() -> None:
    """A folder that was touched makes no new generation; another digest does."""
    one = Generation.from_bytes(OLD)
    record = one.adapters["one"]
    touched = one.model_copy(
        update={
            "adapters": {"one": record.model_copy(update={"listing": "b" * 64})},
            "number": 2,
            "create_time": datetime.now(UTC),
        }
    )
    assert touched.same_content(one)
    other = record.model_copy(update={"digest": "c" * 64})
    assert not one.model_copy(update={"adapters": {"one": other}}).same_content(one)
