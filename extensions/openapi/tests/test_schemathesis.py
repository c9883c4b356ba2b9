"""The HTTP API against its own description, judged by schemathesis: everything described is tried.

The short run sends the document's examples; the sweep walks through every keyword of every schema as well, and
draws many requests from them.
"""

import asyncio
import json
import os
import shutil
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import pytest_asyncio

from inference_service.http.app import ENDPOINTS
from inference_service.http.server import HttpServer
from loramux_shared.access.guard import Guard
from loramux_shared.access.keyring import Keyring
from tests.support.access import lines, new_entry
from tests.support.openai_api import openai_world
from tests.support.root import ROOT
from tests.support.services.operators import digest_of, operated
from tests.support.waiting import BOUND_S

pytestmark = pytest.mark.asyncio(loop_scope="module")
COMMAND = shutil.which("schemathesis", path=str(Path(sys.executable).parent))
HOOKS = ROOT / "extensions/openapi/tests/schemathesis_hooks.py"
MODELS = ["base", "all"]
"""Names that requests are drawn with: a name that nobody has is 404, whatever else a request says."""
STATEFUL = ("/v1/load_lora_adapter", "/v1/adapters/{name}/pin", "/v1/adapters/{name}/unpin")
"""Routes that accept a valid body only after certain loads."""
RULED = {"messages", "prompt", "input", "documents", "text_1"}
"""Fields of the bodies that make requests."""


@dataclass
class Judged:
    """A running server, with keys, and its description."""

    url: str
    key: str
    document: dict[str, Any]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def judged(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Judged]:
    """The tiny model, and adapters that a builder would have made."""
    world, store = openai_world(tmp_path_factory.mktemp("judged"))
    ready = world.load(store, stream_interval_ms=0)
    key, entry = new_entry("all", "infer", "metrics", "admin")
    guard, manager = Guard(Keyring(text=lines(entry))), operated(bundles=(digest_of(77),)).manager
    server = HttpServer("127.0.0.1:0", ready.service, guard, adapters=manager)
    await server.start()
    ready.engine.start()
    url = f"http://{server.address}"
    async with httpx.AsyncClient(headers={"authorization": f"Bearer {key}"}, timeout=BOUND_S) as client:
        document = (await client.get(f"{url}/openapi.json")).json()
    try:
        yield Judged(url, key, narrowed(document, ready.service.text.vocab))
    finally:
        await server.drain(BOUND_S)
        await ready.engine.stop()


def narrowed(document: dict[str, Any], vocab: int) -> dict[str, Any]:
    """Return a description of less: models and tokens that exist; answers without more."""
    for schema in document["components"]["schemas"].values():
        properties = schema.get("properties", {})
        if schema.get("additionalProperties") is not False:  # of an answer: what is not described is not there
            if properties:
                schema.setdefault("additionalProperties", False)
            continue
        for name, reported in properties.items():
            for branch in reported.get("anyOf", [reported]):
                if name == "model" and branch.get("type") == "string":
                    branch["enum"] = MODELS
                if name == "prompt" and name in schema.get("required", ()) and branch.get("type") == "string":
                    branch["minLength"] = 1  # as long as its tokenizer adds no token of its own
                _only_tokens(branch, vocab)
    return document


def _only_tokens(schema: dict[str, Any], vocab: int) -> None:
    """Let lists of ids hold tokens of the model alone."""
    items = schema.get("items", {})
    if items.get("type") == "integer":
        items["maximum"] = vocab - 1
    for branch in items.get("anyOf", ()):
        if branch.get("type") == "string":
            branch["minLength"] = 1
        _only_tokens(branch, vocab)


def configuration() -> str:
    """Return the requests and the checks of answers, as a file of schemathesis."""
    # Some of their rules are between fields, which the document does not tell: `is_as_described` judges these.
    ruled = [each.path for each in ENDPOINTS if each.body and RULED & each.body.model_fields.keys()]
    return f"""
        seed = 1
        warnings = false
        hooks = "hooks.py"
        [generation]
        deterministic = true
        database = "none"
        allow-extra-parameters = false  # unknown headers are everybody's
        [[operations]]
        include-path = {json.dumps([*ruled, *STATEFUL])}
        checks.positive_data_acceptance.enabled = false
    """


async def judge(judged: Judged, folder: Path, *arguments: str) -> str:
    """Run the command, and return its output; the test fails where the command finds a fault."""
    (folder / "openapi.json").write_text(json.dumps(judged.document))
    (folder / "schemathesis.toml").write_text(configuration())
    shutil.copy(HOOKS, folder / "hooks.py")
    assert COMMAND is not None
    process = await asyncio.create_subprocess_exec(
        *(COMMAND, "run", "openapi.json", "--url", judged.url, "-H", f"Authorization: Bearer {judged.key}"),
        *("--no-color", *arguments),
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(folder)},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    reported = (await process.communicate())[0].decode()
    assert process.returncode == 0, reported
    return reported


@pytest.mark.skipif(COMMAND is None, reason="needs schemathesis, which is in the extra `test`")
async def test_the_api_is_as_it_is_described(judged: Judged, tmp_path: Path) -> None:
    """The examples of every route get the documented answers."""
    reported = await judge(judged, tmp_path, "--phases", "examples")
    assert f"Selected: {len(ENDPOINTS)}/{len(ENDPOINTS)}" in reported


@pytest.mark.sweep
@pytest.mark.skipif(COMMAND is None, reason="needs schemathesis, which is in the extra `test`")
@pytest.mark.timeout(1800)
async def test_every_keyword_of_the_description_is_true(judged: Judged, tmp_path: Path) -> None:
    """Each bound from both sides, methods that are not described, wrong keys, and many draws."""
    await judge(
        judged, tmp_path, "--phases", "examples,coverage,fuzzing,stateful", "-n", "25", "--continue-on-failure"
    )
