"""Models, rights, requests and outputs as messages have them: lists of numbers, texts and bytes."""

from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import lru_cache
from typing import Any

import numpy as np

from inference_service.core.adapter import Adapter, Mixture, ScaledAdapter
from inference_service.core.constraint import Constraint
from inference_service.core.request import ModelReference
from inference_service.core.sampling import SamplingParams
from inference_service.core.sequence import EndReason, Sequence as EngineSequence, StepOutput, Token
from inference_service.core.served_model import NO_DEFAULTS, ServedModel
from inference_service.driver.port import Submission
from loramux_shared.access.keys import Access, Scope
from loramux_shared.faults import fault_from, fault_to
from loramux_shared.runtime import Limits, Pooling

Handles = Callable[[str, tuple[int, ...]], Adapter]
"""Returns the handle of an adapter, by its digest and the tokens from which on it acts."""


def access_to(access: Access) -> list[Any]:
    """Return the rights of a caller as a message has them."""
    models = None if access.models is None else sorted(access.models)
    limits = None if access.limits is None else access.limits.model_dump()
    return [access.key_id, sorted(access.scopes), models, limits]


def access_from(message: Sequence[Any]) -> Access:
    """Return the rights of a message."""
    key_id, scopes, models, limits = message
    return Access(
        key_id,
        frozenset(map(Scope, scopes)),
        None if models is None else frozenset(models),
        None if limits is None else Limits(**limits),
    )


def reference_to(reference: ModelReference) -> list[Any]:
    """Return a reference to a model as a message has it; that it was looked up is left out."""
    parts = [[part.name, part.scale] for part in reference.adapters]
    return [
        reference.name,
        parts,
        reference.lora_path,
        reference.min_generation,
        reference.sticky_key,
    ]


def reference_from(message: Sequence[Any]) -> ModelReference:
    """Return the reference of a message."""
    name, parts, *rest = message
    return ModelReference(name, tuple(ScaledAdapter(*part) for part in parts), *rest)


def model_to(model: ServedModel) -> list[Any]:
    """Return a model as a message has it, as far as answers depend on it."""
    adapter, mixture = model.adapter, model.mixture
    return [
        model.name,
        None if adapter is None else [adapter.digest, adapter.invocation],
        model.digest,
        model.vocab,
        model.num_labels,
        model.kinds,
        model.defaults is NO_DEFAULTS,
        None if mixture is None else [[each.digest, each.invocation, scale] for each, scale in mixture.parts],
        [model_to(part) for part in model.parts],
    ]


def model_from(message: Sequence[Any], handle: Handles) -> ServedModel:
    """Return the model of a message; its defaults are unread, unless it has none."""
    name, adapter, digest, vocab, num_labels, kinds, plain, mixture, parts = message
    return ServedModel(
        name,
        None if adapter is None else handle(adapter[0], tuple(adapter[1])),
        digest=digest,
        vocab=vocab,
        num_labels=num_labels,
        kinds=tuple(kinds),
        defaults=NO_DEFAULTS if plain else None,
        mixture=None
        if mixture is None
        else Mixture(tuple((handle(each, tuple(tokens)), scale) for each, tokens, scale in mixture)),
        parts=tuple(model_from(part, handle) for part in parts),
    )


def sampling_to(sampling: SamplingParams) -> dict[str, Any]:
    """Return the fields of a sampling that are not the default ones."""
    usual = SamplingParams()
    names = [each.name for each in fields(SamplingParams)]
    found = {name: getattr(sampling, name) for name in names if getattr(sampling, name) != getattr(usual, name)}
    if "stop_token_ids" in found:
        found["stop_token_ids"] = list(sampling.stop_token_ids)
    if "bad_words" in found:
        found["bad_words"] = [[length, list(lasts.items())] for length, lasts in sampling.bad_words.items()]
    return found


def sampling_from(message: dict[str, Any]) -> SamplingParams:
    """Return the sampling of a message."""
    if "stop_token_ids" in message:
        message["stop_token_ids"] = frozenset(message["stop_token_ids"])
    if "bad_words" in message:
        message["bad_words"] = {
            length: {tuple(before): tuple(lasts) for before, lasts in words}
            for length, words in message["bad_words"]
        }
    return SamplingParams(**message)


def constraint_to(constraint: Constraint) -> list[Any]:
    """Return a constraint as a message has it."""
    return [getattr(constraint, each.name) for each in fields(Constraint)]


def constraint_from(message: Sequence[Any]) -> Constraint:
    """Return the constraint of a message."""
    return Constraint(*message)


def pooling_from(message: str | None) -> Pooling | None:
    """Return the pooling of a message."""
    return None if message is None else Pooling(message)


def submission_to(submission: Submission) -> dict[str, Any]:
    """Return a submission as a message has it, by the names of its fields."""
    constraint = submission.constraint
    written = {
        "model": model_to(submission.model),
        "prompt": array("I", submission.prompt).tobytes(),
        "sampling": sampling_to(submission.sampling),
        "constraint": None if constraint is None else constraint_to(constraint),
        "ends": list(submission.ends),
    }
    return {each.name: getattr(submission, each.name) for each in fields(Submission)} | written


def submission_from(message: dict[str, Any], handle: Handles) -> Submission:
    """Return the submission of a message."""
    constraint = message["constraint"]
    read = {
        "model": model_from(message["model"], handle),
        "prompt": array("I", message["prompt"]).tolist(),
        "sampling": sampling_from(message["sampling"]),
        "constraint": None if constraint is None else constraint_from(constraint),
        "ends": frozenset(message["ends"]),
        "pooling": pooling_from(message["pooling"]),
    }
    return Submission(**message | read)


@dataclass
class AnswerState:
    """The progress with an answer, as far as the engine's process said."""

    num_cached: int = 0
    began_s: float | None = None
    failure: str = ""


def output_to(output: StepOutput, seq: EngineSequence) -> int | list[Any]:
    """Return an output of a sequence: the token's id, where there is nothing else to say."""
    token = output.token
    if (
        token is not None
        and output.finish is None
        and not output.first
        and token.logprob is None
        and token.finite
        and not token.impossible
    ):
        return token.id
    return [
        None if token is None else _token_to(token),
        None if output.finish is None else output.finish.value,
        output.first,
        [_token_to(each) for each in output.prompt],
        None if output.fault is None else fault_to(output.fault),
        None if output.pooled is None else output.pooled.tobytes(),
        seq.progress.num_cached,
        seq.progress.began_s,
        seq.grammar.failure if seq.grammar is not None and output.finish is EndReason.FAILED else "",
    ]


@lru_cache(1 << 16)
def plain(token: int) -> StepOutput:
    """Return an output of no certain sequence that has a token and nothing else.

    Two objects for each of them were half of the work of a process with 1,000 streams.
    """
    return StepOutput("", Token(token))


def output_from(message: int | list[Any], seq_id: str, state: AnswerState) -> StepOutput:
    """Return the output of a message, and note the engine's progress with the answer."""
    if isinstance(message, int):
        return plain(message)
    token, finish, first, prompt, fault, pooled, cached, began_s, failure = message
    state.num_cached, state.began_s, state.failure = cached, began_s, failure
    return StepOutput(
        seq_id,
        None if token is None else _token_from(token),
        None if finish is None else EndReason(finish),
        first,
        tuple(map(_token_from, prompt)),
        None if fault is None else fault_from(fault),
        None if pooled is None else np.frombuffer(pooled, np.float32),
    )


def _token_to(token: Token) -> list[Any]:
    return [token.id, token.logprob, token.top, token.rank, token.impossible, token.finite]


def _token_from(message: Sequence[Any]) -> Token:
    token, logprob, top, rank, impossible, finite = message
    return Token(token, logprob, tuple([(each, value) for each, value in top]), rank, impossible, finite)
