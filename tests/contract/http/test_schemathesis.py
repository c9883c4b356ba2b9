"""The HTTP API against its own description, judged by schemathesis: everything described is tried.

The short run sends the document's examples; the sweep walks through every keyword of every schema as well, and
draws many requests from them.
"""

import asyncio
import json
import shutil
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import pytest_asyncio

from inference_service.api.http.app import ENDPOINTS
from inference_service.api.http.server import HttpServer
from loramux_shared.access.guard import NOBODY_GUARDS, Guard
from loramux_shared.access.keyring import Keyring
from tests.support.access import lines, new_entry
from tests.support.openai_api import openai_world
from tests.support.root import ROOT
from tests.support.services.managed_replica import digest_of, managed_replica
from tests.support.waiting import BOUND_S

COMMAND = shutil.which("schemathesis", path=str(Path(sys.executable).parent))
pytestmark = [
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.skipif(COMMAND is None, reason="needs schemathesis, which is in the extra `test`"),
]
HOOKS = ROOT / "tests/support/schemathesis_hooks.py"
MODELS = ["base", "all"]
"""Names that requests are drawn with: a name that nobody has is 404, whatever else a request says."""
PAUSE = "/pause"
"""Not tried: the requests behind it wait."""
RULED = [each.path for each in ENDPOINTS if each.body and "model" in each.body.model_fields]
"""Routes that refuse some of what has the described form: whether a model does what is asked, and whether the
prompt fits, is no property of a body, and JSON Schema cannot say that a choice names one of the tools.
"""
STATEFUL = ["/v1/load_lora_adapter"]
"""Routes that refuse what was done already: the name is taken."""
CONFIGURATION = f"""
    warnings = false
    hooks = "hooks.py"
    [[operations]]
    include-path = {json.dumps([*RULED, *STATEFUL])}
    checks.positive_data_acceptance.enabled = false  # `is_as_described` judges what is refused
"""


@dataclass
class Judged:
    """A running server without keys, the same with keys, and its description there."""

    url: str
    guarded_url: str
    key: str
    document: dict[str, Any]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def judged(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Judged]:
    """The tiny model, and adapters that a builder would have made."""
    world, store = openai_world(tmp_path_factory.mktemp("judged"))
    ready = world.load(store, stream_interval_ms=0)
    key, entry = new_entry("all", "infer", "metrics", "admin")
    servers = [
        HttpServer(
            "127.0.0.1:0", ready.service, guard, adapters=managed_replica(bundles=(digest_of(77),)).manager
        )
        for guard in (NOBODY_GUARDS, Guard(Keyring(text=lines(entry))))
    ]
    for server in servers:
        await server.start()
    ready.engine.start()
    url, guarded_url = (f"http://{server.address}" for server in servers)
    async with httpx.AsyncClient(headers={"authorization": f"Bearer {key}"}, timeout=BOUND_S) as client:
        document = (await client.get(f"{guarded_url}/openapi.json")).json()
    try:
        yield Judged(url, guarded_url, key, narrowed(document))
    finally:
        for server in servers:
            await server.drain(BOUND_S)
        await ready.engine.stop()


def narrowed(document: dict[str, Any]) -> dict[str, Any]:
    """Return a description of less: models that exist; answers without more."""
    for schema in document["components"]["schemas"].values():
        properties = schema.get("properties", {})
        if (
            properties and "additionalProperties" not in schema
        ):  # of an answer: what is not described is not there
            schema["additionalProperties"] = False
        elif "model" in properties:
            for branch in properties["model"].get("anyOf", [properties["model"]]):
                if branch.get("type") == "string":
                    branch["enum"] = MODELS
    return document


async def judge(folder: Path, *arguments: str) -> str:
    """Run the command, and return its output; the test fails where the command finds a fault."""
    (folder / "schemathesis.toml").write_text(CONFIGURATION)
    shutil.copy(HOOKS, folder / "hooks.py")
    assert COMMAND is not None
    process = await asyncio.create_subprocess_exec(
        *(COMMAND, "run", "--exclude-path", PAUSE, "--no-color", *arguments),
        cwd=folder,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    reported = (await process.communicate())[0].decode()
    assert process.returncode == 0, reported
    return reported


async def judge_narrowed(judged: Judged, folder: Path, *arguments: str) -> str:
    """Do the same with a key, by the description of less."""
    (folder / "openapi.json").write_text(json.dumps(judged.document))
    target = ("openapi.json", "--url", judged.guarded_url, "-H", f"Authorization: Bearer {judged.key}")
    return await judge(folder, *target, *arguments)


async def test_the_api_is_as_it_is_described(judged: Judged, tmp_path: Path) -> None:
    """The examples of every route get the documented answers, with a key and where none is required."""
    await judge(tmp_path, f"{judged.url}/openapi.json", "--phases", "examples")
    reported = await judge_narrowed(judged, tmp_path, "--phases", "examples")
    assert f"Selected: {len(ENDPOINTS) - 1}/{len(ENDPOINTS)}" in reported


@pytest.mark.sweep
@pytest.mark.timeout(1800)
async def test_every_keyword_of_the_description_is_true(judged: Judged, tmp_path: Path) -> None:
    """Each bound from both sides, methods that are not described, wrong keys, and many draws."""
    await judge_narrowed(judged, tmp_path, "-n", "25", "--seed", "1", "--continue-on-failure")


@pytest.mark.sweep
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("seed", ["1", "2"])
async def test_a_run_that_knows_the_url_alone_finds_nothing(judged: Judged, tmp_path: Path, seed: str) -> None:
    """A server without keys is as it says itself, by all checks of the command."""
    await judge(tmp_path, f"{judged.url}/openapi.json", "-n", "25", "--seed", seed, "--continue-on-failure")
