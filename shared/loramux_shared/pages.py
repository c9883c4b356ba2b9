"""The pages of the documents that messages and helps name."""

import re
from functools import cache
from importlib.metadata import PackageNotFoundError, distribution


def page(path: str) -> str:
    """Return the URL of a page; its path in the sources, where the build names no repository."""
    return f"{_begin()}{path}"


@cache
def _begin() -> str:
    try:
        return begin_of_pages(distribution("loramux").read_text("METADATA") or "")
    except PackageNotFoundError:  # imported from its sources
        return ""


def begin_of_pages(metadata: str) -> str:
    """Return what the URLs of all pages begin with, of a package's metadata; empty where those have none."""
    found = re.search(r"^Project-URL: Documentation, (.*)docs/index\.md$", metadata, re.M)
    return found[1] if found else ""
