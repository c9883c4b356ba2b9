"""Build the site: the pages of the repository, in its own folders, with a search."""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).resolve().parent.parent
TOP: Final = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md")
LINK: Final = re.compile(r"\]\((?!\w+:)([^)#\s]+)")


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
    sys.exit(subprocess.run([*command, "--site-dir", str(folder)], check=False).returncode)  # noqa: S603 - ours


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


def sources() -> Iterator[Path]:
    """Yield the pages of the repository."""
    yield from (ROOT / name for name in TOP if (ROOT / name).exists())
    yield from sorted((ROOT / "docs").rglob("*.md"))
    yield from sorted((ROOT / "extensions").rglob("README.md"))


def linked(page: Path) -> list[Path]:
    """Return the files of the repository that a page points to."""
    paths = [(page.parent / name).resolve() for name in LINK.findall(page.read_text(encoding="utf-8"))]
    return [path for path in paths if path.is_file() and path.is_relative_to(ROOT)]


if __name__ == "__main__":
    main()
