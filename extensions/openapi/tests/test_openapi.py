"""The OpenAPI document: the demands of the specification, and agreement with the server."""

import json
import re
from pathlib import Path

import httpx
import pytest
from starlette.routing import Route

from inference_service.http.app import ENDPOINTS, Application, create_app
from loramux_openapi.document import ServerFacts, document
from loramux_shared.access.keys import Scope
from tests.contract.http.test_http_rules import web as web
from tests.openapi_golden import RECORDED, described
from tests.support.root import ROOT
from tests.support.silent import silent_service

DOCUMENT = document(ENDPOINTS, ServerFacts("base"))
OPERATIONS = [
    (path, method, operation)
    for path, methods in DOCUMENT["paths"].items()
    for method, operation in methods.items()
]
DOCS = (ROOT / "docs" / "reference" / "openai.md").read_text(encoding="utf-8")


async def test_the_document_is_what_the_route_says(web: httpx.AsyncClient) -> None:
    """The OpenAPI document is JSON, with a title and a version."""
    answer = await web.get("/openapi.json")
    assert answer.headers["content-type"] == "application/json"
    first = (await web.get("/v1/models")).json()["data"][0]["id"]
    served = document(ENDPOINTS, ServerFacts(first, keyless=True))
    assert answer.json() == json.loads(json.dumps(served))
    assert re.fullmatch(r"3\.1\.\d+", DOCUMENT["openapi"])
    assert {"title", "version"} <= set(DOCUMENT["info"])
    assert set(DOCUMENT) == {"openapi", "info", "paths", "components"}


def test_a_server_without_keys_describes_none() -> None:
    """The document without keys lacks security and the answers to a wrong key, and is equal otherwise."""
    found = document(ENDPOINTS, ServerFacts("base", keyless=True))
    assert "securitySchemes" not in found["components"]
    for path, method, reported in OPERATIONS:
        open_to_all = found["paths"][path][method]
        assert not open_to_all["security"]
        keys = {"401", "403"} if reported["security"] else set()
        assert reported["responses"].keys() - open_to_all["responses"].keys() in (keys, keys - {"403"})


@pytest.mark.parametrize("scorer", ["", "best"])
@pytest.mark.parametrize("classifier", ["", "kinds"])
def test_examples_ask_models_that_answer_them(scorer: str, classifier: str) -> None:
    """Scores and classes have examples where a model has such a head, and these name it."""
    found = document(ENDPOINTS, ServerFacts("base", scorer, classifier))
    for path, model in {"/score": scorer, "/v1/rerank": scorer, "/classify": classifier}.items():
        read = found["paths"][path]["post"]["requestBody"]["content"]["application/json"]
        assert {each["value"]["model"] for each in read.get("examples", {}).values()} == ({model} - {""})


def test_the_paths_are_those_of_the_app(tmp_path: Path) -> None:
    """Every route of the application is described with its method, and nothing else is."""
    app = create_app(silent_service(tmp_path))._app
    assert isinstance(app, Application)
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
    assert described() == RECORDED.read_bytes()
