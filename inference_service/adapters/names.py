"""The names of requests: versions, models of an alias, adapters with scales, and faults of names."""

import difflib
import math
import re
import secrets
from bisect import bisect
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from dataclasses import replace
from hashlib import blake2b
from typing import Final

from inference_service.core.adapter import MOST_PARTS, Adapter, Mixture, ScaledAdapter
from inference_service.core.served_model import AdapterDefaults, ServedModel
from loramux_shared.bundle.manifest import apart
from loramux_shared.faults import ModelNotFound, RequestInvalid
from loramux_shared.wording import is_number, listed

MOST_SCALE: Final = 8.0
"""An adapter's scale, either way: beyond, an answer is noise before it is anything else."""
FOUND_CHARS: Final = 80
"""Characters of what a finding repeats."""
_PART: Final = re.compile(r"([^*+]+)(?:\*\s*([-+]?[^\s*+eE]+(?:[eE][-+]?[0-9]+)?)\s*)?")
"""A name, and behind a star its scale: a number as JSON has it, or with a sign."""


def blend_parts(text: str) -> tuple[ScaledAdapter, ...]:
    """Read ``a*0.7 + b*0.5``, up to one part more than there may be; nothing where it is no mixture. Raise
    RequestInvalid where a part is no name or no number.
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


def check_blend(parts: Sequence[ScaledAdapter], most: int, where: str) -> None:
    """Raise RequestInvalid for too many adapters, or a scale out of bounds; none has to be known."""
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


def blend(
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


async def defaults_of(
    model: ServedModel, read: Callable[[ServedModel], Awaitable[AdapterDefaults]]
) -> AdapterDefaults:
    """Return what is known of a model's defaults, what the parts of a blend agree on, or what read returns."""
    if model.defaults is not None:
        return model.defaults
    if model.parts:
        return agreed([await defaults_of(part, read) for part in model.parts])
    return await read(model)


def agreed(defaults: Sequence[AdapterDefaults]) -> AdapterDefaults:
    """Return what adapters bring that act together: what all of them say alike, and every stop token; raise
    RequestInvalid where their tokens differ.
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
    problem = "the request names adapters that cannot be blended."
    return RequestInvalid.of_field(problem, where, expected, found[:FOUND_CHARS], fix)


_DRAWS: Final = 2**64


def choose(alias: str, weights: Mapping[str, int], sticky_key: str) -> str:
    """Return one of the models of an alias; at least one has a weight above 0.

    The same key finds the same model on every replica. A change of weights moves as few keys as possible: each
    model draws a time from the key, exponential with its weight, and the earliest one wins (weighted rendezvous
    hashing, https://www.ietf.org/archive/id/draft-ietf-bess-weighted-hrw-02.html). Without a key one is drawn
    at random.
    """
    key = sticky_key or secrets.token_hex(8)
    return min(
        (name for name, weight in weights.items() if weight), key=lambda name: _time(alias, name, key, weights)
    )


def _time(alias: str, name: str, key: str, weights: Mapping[str, int]) -> tuple[float, str]:
    drawn = blake2b("\0".join((alias, name, key)).encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return -math.log((int.from_bytes(drawn) + 0.5) / _DRAWS) / weights[name], name


EXCERPT: Final = 128
"""Characters of a name that is repeated."""
COMPARED: Final = 200
"""Names, those around it in the order of the alphabet, that a wrong one is compared with."""
LEAST_DIGITS: Final = 8
"""Least digits of a digest behind a name."""
TOLD_DIGITS: Final = 12


def model_not_found(name: str, names: Sequence[str]) -> ModelNotFound:
    """Return the fault of a name; names are those that the caller may use."""
    shortened = name[:EXCERPT]
    near = difflib.get_close_matches(shortened, _around(shortened, names), n=3)
    meant = f" Did you mean {' or '.join(near)}?" if near else ""
    return ModelNotFound(f"no model {shortened!r} is served here.{meant} Served: {listed(names)}.")


def version_not_found(name: str, prefix: str, digests: Collection[str]) -> ModelNotFound:
    """Return the fault of a version that is not, or no longer, known; digests are those that are."""
    known = listed([digest[:TOLD_DIGITS] for digest in digests])
    return ModelNotFound(f"model {name!r} has no version {prefix[:64]} here. Known: {known}.")


def ambiguous_version(name: str, prefix: str, digests: Collection[str]) -> RequestInvalid:
    """Return the fault of digits with which several versions begin."""
    problem, expected = "the request names an ambiguous version.", "the first digits of one version"
    found = f"{prefix}, with which {len(digests)} of {name} begin: {listed(sorted(digests))}"
    return RequestInvalid.of_field(problem, "model", expected, found, "Give more digits.")


def bad_version(name: str, prefix: str) -> RequestInvalid:
    """Return the fault of what stands behind a name and is no beginning of a digest."""
    expected = f"{name}@ and {LEAST_DIGITS} to 64 hex digits of its digest"
    problem = "the request names a version that is not valid."
    return RequestInvalid.of_field(problem, "model", expected, repr(prefix[:EXCERPT]))


def _around(name: str, names: Sequence[str]) -> Sequence[str]:
    ordered = sorted(names)
    place = max(0, bisect(ordered, name) - COMPARED // 2)
    return ordered[max(0, min(place, len(ordered) - COMPARED)) :][:COMPARED]
