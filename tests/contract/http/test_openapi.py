"""The OpenAPI document: the demands of the specification, and agreement with the server."""

import json
import re
from pathlib import Path
from typing import Any

import httpx
import jsonschema
import pytest
from starlette.routing import Route

from inference_service.api.http.app import ENDPOINTS, Application
from inference_service.api.http.openapi.document import ServerFacts, document, facts_of
from loramux_shared.access.keys import Scope
from tests.contract.http.conftest import api as api, opened as opened, world as world
from tests.contract.http.test_http_rules import web as web
from tests.golden.openapi.write import RECORDED, recorded
from tests.support.cases import cases
from tests.support.openai_api import OpenAIApi
from tests.support.root import ROOT
from tests.support.services.silent import silent_service

DOCUMENT = document(ENDPOINTS, ServerFacts("base"))
OPERATIONS = [
    (path, method, operation)
    for path, methods in DOCUMENT["paths"].items()
    for method, operation in methods.items()
]
DOCS = (ROOT / "docs" / "reference" / "openai.md").read_text(encoding="utf-8")


async def test_the_document_is_what_the_route_says(web: httpx.AsyncClient, api: OpenAIApi) -> None:
    """The OpenAPI document is JSON, with a title and a version."""
    answer = await web.get("/openapi.json")
    assert answer.headers["content-type"] == "application/json"
    facts = facts_of(api.ready.service, keyless=True)
    assert answer.json() == json.loads(json.dumps(document(ENDPOINTS, facts)))
    assert (facts.model, facts.begins) == ((await web.get("/v1/models")).json()["data"][0]["id"], False)
    assert re.fullmatch(r"3\.1\.\d+", DOCUMENT["openapi"])
    assert {"title", "version"} <= set(DOCUMENT["info"])
    assert set(DOCUMENT) == {"openapi", "info", "paths", "components"}


def test_a_server_without_keys_describes_none() -> None:
    """The document without keys lacks security and 401; 403 is what pages of other sites get."""
    found = document(ENDPOINTS, ServerFacts("base", keyless=True))
    assert "securitySchemes" not in found["components"]
    for path, method, reported in OPERATIONS:
        open_to_all = found["paths"][path][method]
        assert not open_to_all["security"]
        keys = {"401"} if reported["security"] else set()
        assert reported["responses"].keys() - open_to_all["responses"].keys() == keys
        assert "403" in open_to_all["responses"]


@pytest.mark.parametrize("scorer", ["", "best"])
@pytest.mark.parametrize("classifier", ["", "kinds"])
def test_examples_ask_models_that_answer_them(scorer: str, classifier: str) -> None:
    """Scores and classes have examples where a model has such a head, and these name it."""
    found = document(ENDPOINTS, ServerFacts("base", scorer, classifier))
    for path, model in {"/score": scorer, "/v1/rerank": scorer, "/classify": classifier}.items():
        read = found["paths"][path]["post"]["requestBody"]["content"]["application/json"]
        assert {each["value"]["model"] for each in read.get("examples", {}).values()} == ({model} - {""})


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize(
    ("path", "body", "refused"), cases(__file__, "test_rules_between_fields_are_described")
)
async def test_rules_between_fields_are_described(
    path: str, body: dict[str, Any], refused: str, api: OpenAIApi
) -> None:
    """The document allows what the server takes, and nothing that the server refuses."""
    answer = await api.post(path, **{"model": "base", **body})
    assert accepts(DOCUMENT, path, {"model": "base", **body}) is not bool(refused)
    assert (answer.status_code, refused in answer.text) == (400 if refused else 200, True), answer.text


def accepts(found: dict[str, Any], path: str, body: dict[str, Any]) -> bool:
    """Return what a document says of a body."""
    schema = found["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]
    return bool(jsonschema.Draft202012Validator(schema | {"components": found["components"]}).is_valid(body))


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize(("path", "body", "most"), cases(__file__, "test_bounds_of_the_server_are_described"))
async def test_bounds_of_the_server_are_described(
    path: str, body: dict[str, Any], most: list[Any], api: OpenAIApi
) -> None:
    """The document of a server allows the largest value that it takes, and not the next one."""
    found = document(ENDPOINTS, facts_of(api.ready.service, keyless=True))
    for value, taken in zip(most, (True, False), strict=True):
        whole = {"model": "base", **json.loads(json.dumps(body).replace('"MOST"', json.dumps(value)))}
        assert accepts(found, path, whole) is taken
        assert (await api.post(path, **whole)).status_code == (200 if taken else 400)


@pytest.mark.parametrize(("begins", "valid"), [(True, True), (False, False)])
@pytest.mark.parametrize("path", ["/v1/embeddings", "/v1/completions", "/score", "/rerank"])
def test_an_empty_text_is_a_prompt_where_a_token_begins_it(path: str, begins: bool, valid: bool) -> None:
    """A tokenizer that adds no token leaves nothing to compute, which the document says."""
    found = document(ENDPOINTS, ServerFacts("base", begins=begins))
    name = found["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]["$ref"]
    known = found["components"]["schemas"][name.rpartition("/")[2]]["properties"]
    empty = {
        "input": "",
        "prompt": "",
        "text_2": "",
        "documents": [""],
        "model": "base",
        "text_1": "a",
        "query": "a",
    }
    assert accepts(found, path, {field: value for field, value in empty.items() if field in known}) is valid


def test_the_paths_are_those_of_the_app(tmp_path: Path) -> None:
    """Every route of the application is described with its method, and nothing else is."""
    app = Application(silent_service(tmp_path))
    served = {
        (route.path.replace(":path}", "}"), method.lower())
        for route in app.routes
        if isinstance(route, Route)
        for method in (route.methods or set()) - {"HEAD"}
    }
    assert served == {(path, method) for path, method, _ in OPERATIONS}


def test_the_table_of_the_docs_names_the_same_routes_and_scopes() -> None:
    """The page of the files stands for all of them; an empty cell is the scope of most routes."""
    table = DOCS[DOCS.index("## Routes") : DOCS.index("<a id=")]
    reported = {
        (method, path, row.split("|")[3].strip(" `"))
        for row in table.splitlines()
        for method, path in re.findall(r"`(GET|POST|DELETE) (/[^`]*)`", row)
    }
    served = {
        (
            each.method,
            re.sub(r"^/page/.*", "/page/*", each.path).replace("{model:path}", "{id}").replace(":path}", "}"),
            {None: "none", Scope.INFER: ""}.get(each.scope, str(each.scope)),
        )
        for each in ENDPOINTS
    }
    assert reported == served


def test_the_description_is_the_recorded_one() -> None:
    """The recorded description shows a change of bodies and answers in its diff."""
    assert recorded() == RECORDED.read_text(encoding="utf-8")
