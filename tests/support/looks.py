"""Accessibility of a page, measured in the page itself."""

from typing import Any

from tests.support.browser import Page

CONTRAST = """
(() => {
  const parse = (color) => color.match(/[\\d.]+/g).map(Number);
  const linear = (part) => (part /= 255) <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4;
  const luminance = ([r, g, b]) => 0.2126 * linear(r) + 0.7152 * linear(g) + 0.0722 * linear(b);
  const ground = (element) => {
    for (let at = element; at; at = at.parentElement) {
      const color = parse(getComputedStyle(at).backgroundColor);
      if (color.length === 3 || color[3] === 1) return color;
    }
    return [255, 255, 255];
  };
  const found = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  for (let node = walker.nextNode(); node; node = walker.nextNode()) {
    const element = node.parentElement;
    if (!node.data.trim() || !element.checkVisibility() || element.closest(":disabled")) continue;
    const both = [luminance(parse(getComputedStyle(element).color)), luminance(ground(element))];
    const ratio = (Math.max(...both) + 0.05) / (Math.min(...both) + 0.05);
    found.push([node.data.trim(), ratio]);
  }
  return found;
})()
"""
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
