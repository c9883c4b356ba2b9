"""A model card of the hub, and the model's origin that it names."""

from __future__ import annotations

import re
from typing import Any, Final, get_args

from huggingface_hub.hf_api import ModelInfo

from loramux_shared.bundle.generation import Descent

MODEL: Final = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)
"""The name of a model on a hub."""
MOST: Final = 8
"""Parents that are read; merges have several."""
_RELATIONS: Final = get_args(Descent.model_fields["relation"].annotation)
_TAG: Final = "base_model:"


def descent_of(model: str, info: ModelInfo) -> tuple[Descent, ...]:
    """Read what the card says, and what the hub made of it: tags ``base_model:RELATION:MODEL``."""
    base, stated = (getattr(info.card_data, name, None) for name in ("base_model", "base_model_relation"))
    by_relation = [tag.removeprefix(_TAG).split(":") for tag in info.tags or () if tag.startswith(_TAG)]
    tagged = {words[1]: words[0] for words in by_relation if len(words) == 2}
    parents = dict.fromkeys([*(base if isinstance(base, list) else [base]), *tagged])
    names = [parent for parent in parents if isinstance(parent, str) and MODEL.fullmatch(parent)]
    return tuple(
        Descent(model=model, relation=_relation(stated, tagged.get(parent)), parent=parent)
        for parent in names[:MOST]
    )


def _relation(*stated: Any) -> Any:
    """Return the first of what is said that is known."""
    return next((relation for relation in stated if relation and relation in _RELATIONS), "")
