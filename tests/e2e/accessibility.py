"""Accessibility of a page, measured in the page itself."""

from pathlib import Path
from typing import Any

from tests.e2e.browser import Page

CONTRAST = Path(__file__).with_name("contrast.js").read_text()
"""Pairs of each text that is shown and its contrast, as WCAG 2 defines it."""


async def faint(page: Page) -> list[tuple[str, float]]:
    """Return the texts whose contrast is below 4.5, with it."""
    found: list[tuple[str, float]] = await page.eval(CONTRAST)
    assert len(found) > 20, found
    return [(text, ratio) for text, ratio in found if ratio < 4.5]


async def nameless(page: Page) -> list[Any]:
    """Return the controls that a screen reader has no name for."""
    nodes = (await page.call("Accessibility.getFullAXTree"))["nodes"]
    controls = [node for node in nodes if not node["ignored"] and _is_control(node)]
    assert len(controls) > 10, controls
    return [node for node in controls if not node.get("name", {}).get("value", "").strip()]


def _is_control(node: dict[str, Any]) -> bool:
    properties = {item["name"]: item["value"].get("value") for item in node.get("properties", [])}
    return node["role"]["value"] != "RootWebArea" and bool(properties.get("focusable"))


async def overflow(page: Page) -> int:
    """Return by how many CSS pixels the page is wider than the screen."""
    root = "document.documentElement"
    return int(await page.eval(f"{root}.scrollWidth - {root}.clientWidth"))
