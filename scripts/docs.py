"""Write the generated pages of docs/; with --check, say whether that changes anything."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

from scripts import (
    api_doc,
    client_doc,
    deployment_doc,
    errors_doc,
    models_doc,
    servers_doc,
    settings_doc,
    wild_doc,
)
from scripts.pages import replaced

DOCS = Path(__file__).resolve().parent.parent / "docs"
EXTENSIONS = DOCS.parent / "extensions"


def extensions() -> str:
    """Return the page on extensions with the titles of their pages."""
    pages = sorted(EXTENSIONS.glob("*/README.md"))
    titles = [(page.parent.name, page.read_text().partition("\n")[0]) for page in pages]
    lines = [f"- [{name}]({name}/README.md): {title[2:]}\n" for name, title in titles]
    return replaced((EXTENSIONS / "README.md").read_text(), "extensions", "".join(lines))


PAGES: dict[str, Callable[[], str]] = {
    "reference/grpc.md": api_doc.page,
    "reference/deployment-file.md": deployment_doc.page,
    "reference/deployment.schema.json": deployment_doc.json_schema,
    "reference/errors.md": errors_doc.page,
    "reference/models.md": models_doc.page,
    "reference/python.md": client_doc.page,
    "reference/servers.md": servers_doc.page,
    "reference/settings.md": settings_doc.page,
    "reference/wild-adapters.md": wild_doc.page,
}
if EXTENSIONS.exists():
    PAGES["../extensions/README.md"] = extensions


def main() -> None:
    """Write, or compare."""
    fresh = {DOCS / name: page() for name, page in PAGES.items()}
    stale = [path for path, text in fresh.items() if not path.exists() or path.read_text() != text]
    if "--check" not in sys.argv:
        for path in stale:
            path.write_text(fresh[path])
    elif stale:
        raise SystemExit(f"out of date: {', '.join(path.name for path in stale)}. Run `make docs`.")


if __name__ == "__main__":
    main()
