"""Entities in a text, of the scores of its tokens: what transformers' token classification pipeline returns."""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import numpy as np

from inference_service.core.sequence import Vector
from inference_service.text.spans import Spans

Aggregation = Literal["none", "simple", "first", "average", "max"]
"""The pipeline's: tokens as they are; runs of one label; or the same of words, each with the label of its first
token, of the mean of its tokens, or of the token that is most certain."""


@dataclass(frozen=True)
class Entity:
    """A token, or several that follow one another, with one label."""

    label: str
    score: np.float32
    word: str
    start: int
    """First character."""
    end: int
    """Character behind the last one."""
    place: int
    """Place of its first token."""


def entities_of(
    spans: Spans, shares: Vector, labels: Sequence[str], how: Aggregation, ignored: Collection[str]
) -> list[Entity]:
    """Return the entities of a text from probabilities [tokens, labels], but those of labels to ignore."""
    if how in ("none", "simple"):
        found = [_entity(spans, [place], shares[place], spans.word(place), labels) for place in spans.places]
    else:
        found = [_word(spans, places, shares[places], labels, how) for places in _words(spans)]
    if how != "none":
        found = [_merged(spans, run) for run in _runs(found)]
    return [entity for entity in found if entity.label not in ignored]


def _entity(spans: Spans, places: Sequence[int], shares: Vector, word: str, labels: Sequence[str]) -> Entity:
    best = int(shares.argmax())
    start, end = spans.bounds(places[0])[0], spans.bounds(places[-1])[1]
    return Entity(labels[best], shares[best], word, start, end, places[0])


def _words(spans: Spans) -> Iterator[list[int]]:
    """Yield the places of the tokens of each word."""
    word: list[int] = []
    for place in spans.places:
        if word and not spans.is_part(place):
            yield word
            word = []
        word.append(place)
    if word:
        yield word


def _word(
    spans: Spans, places: Sequence[int], shares: Vector, labels: Sequence[str], how: Aggregation
) -> Entity:
    """Return a word of the probabilities [tokens, labels] of its tokens."""
    chosen = shares[0]
    if how == "average":
        chosen = shares.mean(0)
    elif how == "max":
        chosen = shares[int(shares.max(1).argmax())]
    return _entity(spans, places, chosen, spans.wording.join([spans.word(place) for place in places]), labels)


def _runs(found: Sequence[Entity]) -> Iterator[list[Entity]]:
    """Yield entities that follow one another with the same label, where none but the first begins with B."""
    run = [*found[:1]]
    for before, entity in pairwise(found):
        if entity.label.startswith("B-") or _tag(entity) != _tag(before):
            yield run
            run = []
        run.append(entity)
    if run:
        yield run


def _tag(entity: Entity) -> str:
    return entity.label[2:] if entity.label.startswith(("B-", "I-")) else entity.label


def _merged(spans: Spans, run: Sequence[Entity]) -> Entity:
    label, score = run[0].label.split("-", 1)[-1], np.mean([entity.score for entity in run])
    word = spans.wording.join([entity.word for entity in run])
    return Entity(label, score, word, run[0].start, run[-1].end, run[0].place)
