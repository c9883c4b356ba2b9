"""Where an activated adapter begins to act: "Activated LoRA", Greenewald et al., 2025, as PEFT reads it."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import Final

from inference_service.core.sequence import Adapter, Mixture

_ITEM: Final = array("i").itemsize


def activation(
    adapter: Adapter | Mixture | None, prompt: Sequence[int]
) -> tuple[Adapter | Mixture | None, int]:
    """Return what answers a prompt, and the position of the first token that it acts on.

    An activated adapter acts from the first token of the last place in the prompt where its invocation stands,
    and on all of the answer; a prompt without it is the base's. Others act on everything, and so do mixtures,
    of which no part is activated.
    """
    if not isinstance(adapter, Adapter) or not adapter.invocation:
        return adapter, 0
    place = _last(array("i", prompt), array("i", adapter.invocation))
    return (None, 0) if place is None else (adapter, place)


def _last(tokens: array[int], wanted: array[int]) -> int | None:
    data, part = tokens.tobytes(), wanted.tobytes()
    end = len(data)
    while (found := data.rfind(part, 0, end)) >= 0:
        if found % _ITEM == 0:
            return found // _ITEM
        end = found + len(part) - 1
    return None
