"""The pooling of a text's hidden states into one vector."""

from __future__ import annotations

import json
from enum import StrEnum
from pathlib import Path
from typing import Final

from loramux_shared.faults import CheckpointInvalid


class Pooling(StrEnum):
    """A choice among the hidden states behind the last norm, one for each token."""

    LAST = "last"
    """The hidden state of the last token."""
    MEAN = "mean"
    """Their mean."""


FILE: Final = "1_Pooling/config.json"
"""Pooling config of a base that was trained for vectors with sentence-transformers."""
MODES: Final = {"lasttoken": Pooling.LAST, "mean": Pooling.MEAN, "mean_tokens": Pooling.MEAN}
"""Names of the modes there: in ``pooling_mode``, or each as a switch of its own."""


def pooling_in(folder: Path) -> Pooling | None:
    """Return how the base in a folder was trained to make vectors: LAST where it says nothing.

    None where it says what is not served: the beginning, a maximum, weighted means, or several together.

    Raises:
        CheckpointInvalid: the file is no JSON object.
    """
    path = folder / FILE
    if not path.exists():
        return Pooling.LAST
    try:
        fields = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise CheckpointInvalid(f"the base's {FILE} is not valid JSON. Correct or remove it.") from error
    if not isinstance(fields, dict):
        raise CheckpointInvalid(f"the base's {FILE} must be an object. Correct or remove it.")
    mode = fields.get("pooling_mode")
    chosen = [mode] if mode is not None else [name for name in fields if fields[name] is True]
    modes = [str(name).removeprefix("pooling_mode_") for name in chosen if name not in ("include_prompt",)]
    return MODES.get(modes[0]) if len(modes) == 1 else None
