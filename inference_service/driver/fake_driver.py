"""A driver without an engine: every request is answered by a script, a step whenever the API wants more."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Final

from inference_service.adapters.catalog import Catalog
from inference_service.adapters.texts import Scorer
from inference_service.core.request import Request, ResolvedModel
from inference_service.core.sampling import SamplingParams
from inference_service.core.sequence import EndReason, StepOutput, Token, Vector
from inference_service.core.served_model import NO_DEFAULTS, AdapterDefaults, ServedModel
from inference_service.driver.delivery import Outputs
from inference_service.driver.port import DeployedTerms, Submission
from inference_service.text.text import Text
from loramux_shared.faults import InternalFault

LOGPROB: Final = -0.5
"""Log probability of every token of an answer."""


@dataclass(frozen=True)
class Script:
    """The words of the engine to a request."""

    answers: Sequence[Sequence[str]] = ()
    """The texts of the steps of each answer; one of a vector has none."""
    reason: EndReason = EndReason.STOP
    failure: Exception | None = None
    """Ends the request in place of a reason."""
    pooled: Vector | None = None
    prompt: tuple[Token, ...] = ()
    """Scores of the prompt, where they are asked for."""


@dataclass(frozen=True)
class FakeView:
    """The progress with an answer."""

    num_cached: int = 1
    began_s: float | None = None
    failure: str = ""


class ScriptedOutputs(Outputs):
    """The steps of a script, one whenever the reader wants more."""

    def __init__(
        self, ids: Sequence[str], steps: Iterator[list[StepOutput]], failure: Exception | None
    ) -> None:
        super().__init__(dict.fromkeys(ids, FakeView()), lambda _: None)
        self._steps = steps
        self._fault = failure or InternalFault("the script is over.")

    async def get(self) -> dict[str, list[StepOutput]]:
        """Return the next step that no sink takes; raise the failure of the script behind the last one."""
        for outputs in self._steps:
            await asyncio.sleep(0)
            step = {outputs[0].seq_id: outputs}
            if self._sink is None or not self._sink(step):
                return step
        raise self._fault


class FakeDriver:
    """Answers as scripts say."""

    def __init__(
        self, catalog: Catalog, text: Text, script_of: Callable[[Submission], Script], max_queue: int = 16
    ) -> None:
        """Answer for the models of a catalog, in tokens of a text."""
        self.max_queue = max_queue
        self.submitted: list[Submission] = []
        """Submissions so far, the oldest first."""
        self._catalog = catalog
        self._text = text
        self._script_of = script_of
        self._numbers = itertools.count()

    @property
    def deployed(self) -> DeployedTerms:
        """Return what the served generation says about requests now."""
        return self._catalog.deployed

    async def choose(self, request: Request) -> ResolvedModel:
        """Return the model of a name; raise ModelNotFound for others."""
        return ResolvedModel(self._catalog.get(request.model.name), self._catalog.generation)

    def admit(self, _model: ServedModel) -> AbstractContextManager[FakeDriver]:
        """Let every request in."""
        return nullcontext(self)

    async def defaults(self, model: ServedModel) -> AdapterDefaults:
        """Return those of a model; none where nobody set some."""
        return model.defaults or NO_DEFAULTS

    async def scorer(self, model: ServedModel) -> Scorer:
        """Refuse: no model classifies."""
        raise InternalFault(f"{model.name!r} has no score head.")

    async def submit(self, submission: Submission) -> Outputs:
        """Begin the script of a request."""
        self.submitted.append(submission)
        script, number = self._script_of(submission), next(self._numbers)
        ids = [f"{number}.{index}" for index in range(submission.n)]
        return ScriptedOutputs(ids, self._steps(script, submission.sampling, ids), script.failure)

    def _steps(
        self, script: Script, sampling: SamplingParams, ids: Sequence[str]
    ) -> Iterator[list[StepOutput]]:
        """Yield the steps of the answers, which take turns, and then their ends."""
        prompt = script.prompt if sampling.prompt_logprobs is not None else ()
        longest = max(map(len, script.answers), default=0)
        for nth, (seq_id, answer) in itertools.product(range(longest), zip(ids, script.answers, strict=False)):
            tokens = self._text.encode(answer[nth], add_special_tokens=False) if nth < len(answer) else []
            if tokens:
                step = [StepOutput(seq_id, _scored(token, sampling.logprobs)) for token in tokens]
                step[0].first, step[0].prompt, prompt = nth == 0, prompt, ()
                yield step
        if script.failure is None:
            yield from ([StepOutput(each, None, script.reason, pooled=script.pooled)] for each in ids)


def _scored(token: int, logprobs: int | None) -> Token:
    return Token(token) if logprobs is None else Token(token, LOGPROB, ((token, LOGPROB),)[:logprobs])
