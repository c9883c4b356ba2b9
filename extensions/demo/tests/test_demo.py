"""The demonstration on a terminal, against scripted services."""

import re
from collections.abc import Callable
from pathlib import Path

from tests.e2e.test_cli_processes import on_a_terminal


def test_the_demo_on_a_terminal(
    tmp_path: Path, scripted: dict[str, str], deployment: Callable[..., str]
) -> None:
    """The demo shows bars, the table, panels side by side and the next steps, within the terminal's width."""
    deployment("demo", "lora1", "lora2")
    text = on_a_terminal(["demo", "--examples", str(tmp_path), "--prompt", "hello"], scripted, [])
    assert "✓ builder service on 127.0.0.1" in text
    assert re.search(r"lora2 +done +━+ +5\.2 MB", text)
    assert re.search(r"╭─ base · base ─+╮╭─ lora1 · rank 8 ─+╮", text)
    assert "│ the grey sea sings (1)" in text
    assert "3 streams in one batch: 15 tokens" in text
    assert "loramux demo --keep" in text
    panels = [line.strip() for line in text.splitlines() if line.startswith(("│", "╭", "╰"))]
    assert max(map(len, panels)) <= 80
