"""Vectors and scores of texts: records, and a client's calls for them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeAlias, TypedDict, Unpack, cast

from loramux.inference.v1 import inference_pb2 as pb
from loramux.requests import ADAPTERS, adapters_of, explicit_options, fitted, misfit
from loramux.steps import Steps, Stream
from loramux_shared.faults import Finding, InternalFault

TextInput: TypeAlias = str | Sequence[int] | tuple[str, str]
"""A text, token ids that are taken as they are, or two texts that are looked at together."""
INPUTS: Final = "a list of texts, of lists of token ids, or of pairs of texts"
_POOLINGS: Final = {"last": pb.POOLING_LAST, "mean": pb.POOLING_MEAN, "cls": pb.POOLING_CLS}


class ScoreOptions(TypedDict, total=False):
    """Options of scores; one that is absent or None is left to the server."""

    truncate_prompt_tokens: int | None
    """Leave out the beginning of a longer input; -1: of one that is longer than a sequence."""
    add_special_tokens: bool | None
    """Tokenize with the special tokens that the tokenizer adds itself; by default it does."""
    cache_salt: str | None
    """Only requests with the same one share cached prompts."""
    priority: int | None
    """Requests of a higher priority are scheduled first; 0 is the default."""
    min_generation: int | None
    """Answer with this generation of the deployment or a later one."""
    sticky_key: str | None
    """Key of an alias: requests with the same key get the same one of its models."""


class EmbedOptions(ScoreOptions, total=False):
    """Options of vectors."""

    pooling: str | None
    """last, mean, or of an encoder cls; by default what the deployment says."""
    normalize: bool | None
    """Vectors of length 1; they are by default."""
    dimensions: int | None
    """Number of leading numbers of each vector to return."""
    adapters: Sequence[tuple[str, float] | str] | None
    """Adapters with scales that act together; the model is "" or the base's name then."""


@dataclass(frozen=True)
class Embeddings:
    """The vectors of inputs, in their order."""

    vectors: tuple[tuple[float, ...], ...]
    model: str
    """Model that made them, as in `Started`."""
    adapter_digest: str
    generation: int
    prompt_tokens: int
    """Tokens of all inputs."""
    cached_tokens: int


@dataclass(frozen=True)
class Classification:
    """The scores of an input."""

    label: str
    """The one that scores best."""
    scores: tuple[float, ...]
    """Scores of the labels, as the head gives them."""
    probabilities: tuple[float, ...]


@dataclass(frozen=True)
class Classifications:
    """The scores of inputs, in their order."""

    texts: tuple[Classification, ...]
    labels: tuple[str, ...]
    model: str
    adapter_digest: str
    generation: int
    prompt_tokens: int
    cached_tokens: int


def embed_request(model: str, inputs: Sequence[TextInput], options: EmbedOptions) -> pb.EmbedRequest:
    """Return a request for vectors, or raise what `generate_request` does, for an input too."""
    explicit = explicit_options(options, EmbedOptions)
    pooling = explicit.pop("pooling", None)
    findings = []
    if pooling is not None and not (isinstance(pooling, str) and pooling in _POOLINGS):
        findings.append(misfit("pooling", " or ".join(_POOLINGS), repr(pooling)))
    elif pooling is not None:
        explicit["pooling"] = _POOLINGS[pooling]
    try:
        explicit["adapters"] = adapters_of(explicit.pop("adapters", ()))
    except (ValueError, TypeError) as error:
        findings.append(misfit("adapters", ADAPTERS, str(error)))
    return cast(pb.EmbedRequest, _request(pb.EmbedRequest, model, inputs, explicit, findings))


def classify_request(model: str, inputs: Sequence[TextInput], options: ScoreOptions) -> pb.ClassifyRequest:
    """Return a request for scores; it raises what `embed_request` does."""
    explicit = explicit_options(options, ScoreOptions)
    return cast(pb.ClassifyRequest, _request(pb.ClassifyRequest, model, inputs, explicit, []))


def _request(
    kind: Any, model: str, inputs: Sequence[TextInput], explicit: Mapping[str, Any], findings: list[Finding]
) -> Any:
    messages = []
    try:
        messages = [_input(each) for each in _several(inputs)]
    except (ValueError, TypeError) as error:
        findings.append(misfit("inputs", INPUTS, str(error)))
    return fitted(kind, findings, model=model, inputs=messages, **explicit)


def _several(inputs: Sequence[TextInput]) -> Sequence[TextInput]:
    if isinstance(inputs, str):
        raise TypeError("one text")
    return inputs


def _input(explicit: TextInput) -> pb.TextInput:
    if isinstance(explicit, str):
        return pb.TextInput(text=explicit)
    items = list(explicit)
    if items and all(isinstance(item, str) for item in items):
        first, second = items
        return pb.TextInput(pair=pb.TextPair(first=cast(str, first), second=cast(str, second)))
    return pb.TextInput(token_ids=pb.TokenIds(ids=cast(list[int], items)))


def classifications_of(messages: Sequence[pb.ClassifyResponse]) -> Classifications:
    """Return the scores of a stream."""
    labels = tuple(messages[0].labels) if messages else ()
    texts = []
    for each in messages:
        scores = tuple(each.scores)
        best = labels[max(range(len(scores)), key=scores.__getitem__)]
        texts.append(Classification(best, scores, tuple(each.probabilities)))
    return Classifications(tuple(texts), labels, **_conversation(messages))


def _conversation(messages: Sequence[Any]) -> dict[str, Any]:
    if not messages:
        raise InternalFault("the server ended the stream without an answer. Please report it.")
    first = messages[0]
    return {
        "model": first.model,
        "adapter_digest": first.adapter_digest,
        "generation": first.generation,
        "prompt_tokens": sum(each.usage.prompt_tokens for each in messages),
        "cached_tokens": sum(each.usage.cached_tokens for each in messages),
    }


class VectorMethods:
    """The methods of a client for vectors, classes and scores."""

    def embed(
        self,
        model: str,
        inputs: Sequence[TextInput],
        *,
        timeout_s: float | None = None,
        **options: Unpack[EmbedOptions],
    ) -> Steps[Embeddings]:
        """Return the vector of each input, by the base, an adapter or a blend."""
        request = embed_request(model, inputs, options)
        messages = yield Stream("inference", "Embed", request, timeout_s, lambda message: message)
        return Embeddings(tuple(tuple(each.values) for each in messages), **_conversation(messages))

    def classify(
        self,
        model: str,
        inputs: Sequence[TextInput],
        *,
        timeout_s: float | None = None,
        **options: Unpack[ScoreOptions],
    ) -> Steps[Classifications]:
        """Return the scores of each input by an adapter with a score head."""
        request = classify_request(model, inputs, options)
        messages = yield Stream("inference", "Classify", request, timeout_s, lambda message: message)
        return classifications_of(messages)
