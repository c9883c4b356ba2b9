"""The page's files as a browser gets them, and the state that its panel shows; without a browser."""

import re
from collections.abc import AsyncIterator
from importlib.resources import files
from pathlib import Path
from typing import Any, cast

import httpx
import pytest

from inference_service.api.http.app import ENDPOINTS, create_app
from inference_service.engine.engine import SequenceCounts
from loramux_shared.access.keyring import Keyring
from tests.support.access import lines, new_entry
from tests.support.services.silent import silent_service
from tests.support.web import web_client

FILES = {file.name: file for file in files("inference_service.api.http.page").iterdir() if file.is_file()}
SCRIPTS = {name: FILES[name].read_text() for name in FILES if name.endswith(".js")}
ROUTES = [endpoint.path for endpoint in ENDPOINTS if endpoint.path == "/" or endpoint.path.startswith("/page/")]


@pytest.fixture
async def web(tmp_path: Path) -> AsyncIterator[httpx.AsyncClient]:
    async with web_client(create_app(silent_service(tmp_path))) as web:
        yield web


@pytest.mark.parametrize("path", ROUTES)
async def test_a_browser_is_to_trust_nothing_else(path: str, web: httpx.AsyncClient) -> None:
    """Every file has its media type, and headers that forbid inline code, other origins and framing."""
    answer = await web.get(path)
    kinds = {".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml", "": "text/html"}
    assert answer.status_code == 200
    assert answer.headers["content-type"] == f"{kinds[Path(path).suffix]}; charset=utf-8"
    policy = dict(part.split(" ", 1) for part in answer.headers["content-security-policy"].split("; "))
    assert policy.pop("default-src") == "'none'"
    assert set(policy.values()) == {"'self'", "'none'"}
    assert policy["frame-ancestors"] == "'none'"
    assert answer.headers["x-content-type-options"] == "nosniff"


async def test_every_file_is_served_and_no_other(web: httpx.AsyncClient) -> None:
    """A file that the page names is served; the module that serves it is not."""
    expected = {f"/page/{name}" for name in FILES if not name.endswith(".py")} - {"/page/index.html"}
    assert set(ROUTES) == expected | {"/"}
    html = (await web.get("/")).text
    named = re.findall(r'(?:src|href)="([^#"]+)"', html)
    imported = [f"page/{name}" for text in SCRIPTS.values() for name in re.findall(r'from "\./(.+?)"', text)]
    assert {f"/{name}" for name in named + imported} == expected
    assert (await web.get("/page/__init__.py")).status_code == 404


def test_nothing_comes_from_elsewhere_or_becomes_markup() -> None:
    """No file names another host (but for SVG's namespace), and no script turns text into elements or code."""
    for name, file in FILES.items():
        found = set(re.findall(r"\w+://[^\s\"']+", file.read_text())) if not name.endswith(".py") else set()
        assert found <= {"http://www.w3.org/2000/svg"}, name
    for name, text in SCRIPTS.items():
        forbidden = r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b|new Function"
        assert not re.search(forbidden, text), name


async def test_the_state_names_the_callers_models_only(tmp_path: Path) -> None:
    """A key that is limited to a model does not learn which others are at work."""
    key, entry = new_entry("ann", "infer", models=("wide",))
    service = silent_service(tmp_path)
    cast(Any, service.local.engine).sequence_counts = SequenceCounts({"base": 1, "rs": 2}, {"wide": 2})
    app = create_app(service, Keyring(text=lines(entry)))
    async with web_client(app, headers={"authorization": f"Bearer {key}"}) as web:
        assert (await web.get("/state")).json()["models"] == {"wide": {"running": 0, "waiting": 2}}
