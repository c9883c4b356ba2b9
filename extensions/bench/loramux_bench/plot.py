"""A run as a picture."""

import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from loramux_bench.figures import Outcome
from loramux_shared.faults import SettingsInvalid

NAMED = 10
"""Models with a colour and a name of their own; more are drawn grey, and all together in black."""
BINS = 60


def require_plot(path: Path) -> None:
    """Look before a run whether its picture can be made.

    Raises:
        SettingsInvalid: matplotlib is missing, or the file is no PNG in a folder that exists.
    """
    if path.suffix.lower() != ".png" or not path.resolve().parent.is_dir():
        raise SettingsInvalid(f"--plot={path}: expected a .png file in a folder that exists")
    if importlib.util.find_spec("matplotlib") is None:
        raise SettingsInvalid("--plot needs matplotlib, not installed here: pip install 'loramux[bench]'")


def plot(outcomes: Sequence[Outcome], models: Sequence[str], path: Path) -> None:
    """Write a PNG: how the times are distributed, per model and together, and tokens per second."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 4.5), layout="constrained")
    axes = figure.subplots(1, 3)
    answered = [each for each in outcomes if not each.error]
    _distribution(axes[0], "first token, ms", answered, models, lambda each: each.first_token_s)
    _distribution(axes[1], "time per token, ms", answered, models, lambda each: each.per_token_s)
    _speed(axes[2], answered)
    figure.savefig(path, dpi=120)


def _distribution(
    axis: Any,
    title: str,
    outcomes: Sequence[Outcome],
    models: Sequence[str],
    value: Callable[[Outcome], float | None],
) -> None:
    few = len(models) <= NAMED
    for name in models:
        _steps(axis, [value(each) for each in outcomes if each.model == name], name if few else None)
    _steps(axis, [value(each) for each in outcomes], "all", colour="black")
    axis.set(xlabel=title, ylabel="part of the requests", ylim=(0, 1), xlim=(0, None))
    axis.grid(alpha=0.3)
    axis.legend(loc="lower right", fontsize="small")


def _steps(axis: Any, values: Sequence[float | None], name: str | None, colour: str | None = None) -> None:
    found = sorted(1e3 * value for value in values if value is not None)
    if not found:
        return
    parts = [(index + 1) / len(found) for index in range(len(found))]
    grey = "lightgrey" if name is None else colour
    axis.step(found, parts, where="post", label=name, color=grey, linewidth=2 if colour else 1)


def _speed(axis: Any, outcomes: Sequence[Outcome]) -> None:
    """Draw tokens per second, each answer's tokens spread evenly from its first to its last."""
    end = max((each.last for each in outcomes), default=0.0) or 1.0
    width = end / BINS
    heights = [0.0] * BINS
    for each in outcomes:
        if each.first is None:
            continue
        begin, last = min(int(each.first / width), BINS - 1), min(int(each.last / width), BINS - 1)
        for index in range(begin, last + 1):
            heights[index] += each.tokens / (last - begin + 1) / width
    axis.step([index * width for index in range(BINS)], heights, where="post", color="black")
    axis.set(xlabel="seconds", ylabel="tokens per second", ylim=(0, None), xlim=(0, end))
    axis.grid(alpha=0.3)
