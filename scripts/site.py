"""Build the site: the pages of the repository, in its own folders, with a search; and llms.txt for programs."""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import yaml

from inference_service.api.http.app import ENDPOINTS
from inference_service.api.http.openapi.document import ServerFacts, document

ROOT: Final = Path(__file__).resolve().parent.parent
TOP: Final = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md")
LINK: Final = re.compile(r"\]\((?!\w+:)([^)#\s]+)")
LLMS: Final = "llms.txt"
OPENAPI: Final = "openapi.json"
_NO_TEXT: Final = re.compile(r"<!--.*?-->|```.*?```|^#[^\n]*", re.DOTALL | re.MULTILINE)
_SENTENCE_END: Final = re.compile(r"(?<=\.)\s+(?=[A-Z`*])")


def main() -> None:
    """Collect the pages and build; the exit status is that of MkDocs, 1 where a link leads nowhere."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--folder", type=Path, default=ROOT / "build" / "site", help="Where the site is written."
    )
    folder = parser.parse_args().folder.resolve()
    pages = folder.with_name(f"{folder.name}-pages")
    shutil.rmtree(pages, ignore_errors=True)
    collect(pages / "docs")
    config = pages / "mkdocs.yml"
    shutil.copy(ROOT / "mkdocs.yml", config)
    os.environ["NO_MKDOCS_2_WARNING"] = "1"
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--config-file", str(config)]
    if code := subprocess.run([*command, "--site-dir", str(folder)], check=False).returncode:  # noqa: S603 - ours
        sys.exit(code)
    write_plain(pages / "docs", folder)


def collect(folder: Path) -> None:
    """Copy the pages, and the files that they point to, below folder; decisions get a list of their own."""
    for page in sources():
        for path in (page, *linked(page)):
            target = folder / path.relative_to(ROOT)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, target)
    shutil.copy(ROOT / "docs" / "site.css", folder / "docs")
    notes = sorted((ROOT / "docs" / "decisions").glob("*.md"))
    titles = [note.read_text(encoding="utf-8").partition("\n")[0].removeprefix("# ") for note in notes]
    lines = [f"- [{title}]({note.name})" for title, note in zip(titles, notes, strict=True)]
    text = "\n".join(
        ["# Decision notes", "", "Why things are as they are, and what was tried.", "", *lines, ""]
    )
    (folder / "docs" / "decisions" / "index.md").write_text(text, encoding="utf-8")
    described = document(ENDPOINTS, ServerFacts("MODEL", "SCORER", "CLASSIFIER"))
    (folder / OPENAPI).write_text(json.dumps(described), encoding="utf-8")


def sources() -> Iterator[Path]:
    """Yield the pages of the repository."""
    yield from (ROOT / name for name in TOP if (ROOT / name).exists())
    yield from sorted((ROOT / "docs").rglob("*.md"))
    yield from sorted((ROOT / "extensions").rglob("README.md"))


def linked(page: Path) -> list[Path]:
    """Return the files of the repository that a page points to."""
    paths = [(page.parent / name).resolve() for name in LINK.findall(page.read_text(encoding="utf-8"))]
    return [path for path in paths if path.is_file() and path.is_relative_to(ROOT)]


def write_plain(pages: Path, folder: Path) -> None:
    """Write llms.txt, and each page as Markdown at the URL of its HTML with .md behind."""
    for page in pages.rglob("*.md"):
        target = folder / plain(str(page.relative_to(pages)))
        target.parent.mkdir(parents=True, exist_ok=True)
        text = LINK.sub(lambda link: f"]({plain(link[1])}", page.read_text(encoding="utf-8"))
        target.write_text(text, encoding="utf-8")
    (folder / LLMS).write_text("\n".join(listed(pages)), encoding="utf-8")


def plain(link: str) -> str:
    """Return where the Markdown of a page is; another file stays where it is."""
    if link.endswith("/"):
        link += "index.md"
    page = re.sub(r"(^|/)README\.md$", r"\1index.md", link)
    return re.sub(r"\.md$", ".html.md", page)


def listed(pages: Path) -> Iterator[str]:
    """Yield the lines of llms.txt: what loramux is, and the pages of the navigation."""
    about = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    yield from (f"# {about['name']}", "", f"> {about['description']}", "")
    for section, names in navigation():
        yield from (f"## {section}", "")
        for name in names:
            title, first = summary(pages / name)
            yield f"- [{title}]({plain(name)}): {first}"
        yield ""


def navigation() -> Iterator[tuple[str, list[str]]]:
    """Yield the sections of mkdocs.yml, each with the paths of its pages."""
    for section in _configured()["nav"]:
        for name, pages in section.items():
            yield (
                name,
                [path for page in pages for path in (page.values() if isinstance(page, dict) else [page])],
            )


def _configured() -> dict[str, Any]:
    """Return mkdocs.yml, without the objects that only MkDocs makes of it."""
    loader = yaml.SafeLoader((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    loader.add_multi_constructor("tag:yaml.org,2002:python/", lambda *_: None)
    return dict(loader.get_data())


def summary(page: Path) -> tuple[str, str]:
    """Return a page's title, and its first sentence."""
    text = page.read_text(encoding="utf-8")
    if page.name == OPENAPI:
        about = json.loads(text)["info"]
        return f"The HTTP API of {about['title']}, as OpenAPI", _first_sentence(about["description"])
    return text.partition("\n")[0].removeprefix("# "), _first_sentence(text)


def _first_sentence(text: str) -> str:
    """Return the first sentence of a page below its headings, in one line and without links."""
    paragraph = _NO_TEXT.sub("", text).strip().partition("\n\n")[0]
    sentence = " ".join(_SENTENCE_END.split(paragraph)[0].split()).rstrip(".:")
    return re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", sentence)


if __name__ == "__main__":
    main()
