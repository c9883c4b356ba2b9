"""Several adapters with scales as one model: how that is written, what is refused, and what it is called."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Final

from inference_service.adapters.defaults import AdapterDefaults
from inference_service.adapters.served_model import ServedModel
from inference_service.core.adapter import MOST_PARTS, Adapter, Mixture
from loramux_shared.bundle.manifest import apart
from loramux_shared.faults import Finding, RequestInvalid
from loramux_shared.wording import is_number

MOST_SCALE: Final = 8.0
"""An adapter's scale, either way: beyond, an answer is noise before it is anything else."""
EXCERPT: Final = 80
"""Characters of what a finding repeats."""
_PART: Final = re.compile(r"([^*+]+)(?:\*\s*([-+]?[^\s*+eE]+(?:[eE][-+]?[0-9]+)?)\s*)?")
"""A name, and behind a star its scale: a number as JSON has it, or with a sign."""


@dataclass(frozen=True)
class ScaledAdapter:
    """An adapter as a request names it."""

    name: str
    scale: float = 1.0


def written(text: str) -> tuple[ScaledAdapter, ...]:
    """Read ``a*0.7 + b*0.5``, up to one part more than there may be; nothing where it is no mixture.

    Raises:
        RequestInvalid: there is one, and what stands around it is not a name or a number.
    """
    if "+" not in text and "*" not in text:
        return ()
    parts: list[ScaledAdapter] = []
    at = 0
    while True:
        found = _PART.match(text, at)
        name = found[1].strip() if found else ""
        if found is None or not name or text[found.end() : found.end() + 1] not in ("", "+"):
            raise _refused("model", "names with + between them, each with or without *SCALE", text)
        parts.append(ScaledAdapter(name, _number(found[2], text)))
        if found.end() == len(text) or len(parts) > MOST_PARTS:
            return tuple(parts)
        at = found.end() + 1


def _number(scale: str | None, text: str) -> float:
    if scale is not None and not is_number(scale):
        raise _refused("model", "a number after every *", text)
    return 1.0 if scale is None else float(scale)


def check(parts: Sequence[ScaledAdapter], most: int, where: str) -> None:
    """Look at what can be judged without knowing the adapters.

    Raises:
        RequestInvalid: too many, or a scale out of bounds.
    """
    if len(parts) > MOST_PARTS:
        raise _refused(where, f"at most {MOST_PARTS} adapters", "more")
    for part in parts:
        if not -MOST_SCALE <= part.scale <= MOST_SCALE:
            raise _refused(
                where, f"scales from {-MOST_SCALE:g} to {MOST_SCALE:g}", f"{part.name}*{part.scale:g}"
            )
    if len({part.name for part in parts if part.scale}) > most:
        fix = "Ask for fewer at once, or raise LORAMUX_MAX_BATCH_ADAPTERS."
        raise _refused(where, f"at most {most} adapters, as many as a step may have", f"{len(parts)}", fix)


def mixed(
    parts: Sequence[tuple[ServedModel, float]], base: Callable[[], ServedModel], where: str
) -> ServedModel:
    """Return the model that adapters with scales are together.

    That is an adapter itself where its scale is 1 and no other is left, and the base where none is.

    Raises:
        ModelNotFound: nothing is left, and the base is not served.
        RequestInvalid: one of them cannot be scaled.
    """
    for model, _ in parts:
        if model.adapter is None:
            reason = (
                "this one is merged into the weights"
                if model.digest
                else "the base is part of every answer already"
            )
            raise _refused(where, f"adapters that can be scaled; {reason}", model.name)
    mixture = Mixture.of((model.adapter, scale) for model, scale in parts if model.adapter is not None)
    if mixture is None:
        return base()
    members = [(model, scale) for model, scale in parts if model.adapter in mixture.members]
    if not isinstance(mixture, Mixture):
        return members[0][0]
    for model, _ in members:
        if reason := _unscalable(model, mixture.members):
            raise _refused(where, f"adapters that can be scaled; this one {reason}", model.name)
    name = "+".join(model.name if scale == 1.0 else f"{model.name}*{scale:g}" for model, scale in members)
    models = tuple(dict.fromkeys(model for model, _ in members))
    unread = any(model.defaults is None for model in models)
    shared = None if unread else agreed([model.defaults for model in models if model.defaults is not None])
    return replace(
        members[0][0],
        name=name,
        adapter=None,
        mixture=mixture,
        source="",
        digest=mixture.digest,
        ranks=(),
        modules=(),
        warnings=(),
        weights_bytes=None,
        defaults=shared,
        parts=models,
        kinds=(),
        licence="",
    )


def _unscalable(model: ServedModel, members: Sequence[Adapter]) -> str:
    """Say why an adapter cannot be part of a mixture; nothing where it can."""
    if model.affine:
        return "is DoRA, or has biases or scales of its own: their blend is not their sum"
    own = next(adapter for adapter in members if adapter is model.adapter)
    return apart(own.invocation, model.modules, model.vocab, model.num_labels)


def agreed(defaults: Sequence[AdapterDefaults]) -> AdapterDefaults:
    """Return what adapters bring that act together: what all of them say alike, and every stop token.

    Raises:
        RequestInvalid: their tokens are not the same.
    """

    def alike(values: Sequence[object]) -> bool:
        return all(value == values[0] for value in values)

    first = defaults[0]
    if not alike([each.text for each in defaults]):
        what = "their tokenizers have different tokens"
        raise _refused("adapters", "adapters with the same tokens", what, "Train both with the same tokenizer.")
    stops = frozenset[int]().union(*(each.stop_token_ids for each in defaults))
    return AdapterDefaults(
        first.template if alike([each.template for each in defaults]) else None,
        first.temperature if alike([each.temperature for each in defaults]) else None,
        first.top_p if alike([each.top_p for each in defaults]) else None,
        first.top_k if alike([each.top_k for each in defaults]) else None,
        stops,
        first.text,
    )


def _refused(where: str, expected: str, found: str, fix: str = "") -> RequestInvalid:
    finding = Finding(code="E_BAD_FIELD", where=where, expected=expected, found=found[:EXCERPT], fix=fix)
    return RequestInvalid("the request names adapters that cannot be blended.", [finding])
