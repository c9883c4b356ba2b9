"""The driver of an engine in the same process: names, limits, grammars; sequences are made here alone."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence as Seq
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

from inference_service.adapters.catalog import Catalog
from inference_service.adapters.fixed import fixed_manager
from inference_service.adapters.manager import AdapterManager
from inference_service.adapters.ports import GenerationFollower, Resolver
from inference_service.adapters.texts import AdapterTexts, Scorer
from inference_service.core.adapter import activation
from inference_service.core.constraint import Grammar
from inference_service.core.request import Request, ResolvedModel
from inference_service.core.sequence import Sequence
from inference_service.core.served_model import AdapterDefaults, ServedModel
from inference_service.driver.constraints import Constraints
from inference_service.driver.delivery import Outputs
from inference_service.driver.engine_thread import EngineThread, MakeOutputs, plain_outputs
from inference_service.driver.limits import Limiter, Ticket
from inference_service.driver.naming import Naming
from inference_service.driver.port import DeployedTerms, Submission
from inference_service.driver.telemetry.metrics import Metrics
from inference_service.driver.telemetry.model_series import MOST
from inference_service.text.text import Text
from loramux_shared.access.keys import ACCESS
from loramux_shared.faults import InternalFault, RequestInvalid

_numbers = itertools.count()


class EngineDriver:
    """Gives requests to an engine's thread."""

    def __init__(
        self,
        catalog: Catalog,
        engine: EngineThread,
        text: Text,
        eos_token_ids: frozenset[int],
        *,
        adapters: AdapterManager | None = None,
        follower: GenerationFollower | None = None,
        texts: AdapterTexts | None = None,
        resolver: Resolver | None = None,
        metrics_models: int = MOST,
    ) -> None:
        """Drive an engine whose base has a tokenizer and tokens that end its texts.

        adapters, follower and texts are None where the catalog's adapters never change, and bring no files;
        resolver is None where requests cannot add any. metrics_models is the number of models that have series
        of their own.
        """
        self.catalog = catalog
        self.engine = engine
        self.adapters = adapters or fixed_manager(catalog)
        self.texts = texts
        self.metrics = Metrics(catalog, engine, self.adapters, metrics_models)
        self._text = text
        self._naming = Naming(catalog, follower, texts, resolver)
        self._limiter = Limiter()
        self._constraints = Constraints(eos_token_ids)

    @property
    def max_queue(self) -> int:
        """Return the sequences that may wait."""
        return self.engine.max_queue

    @property
    def deployed(self) -> DeployedTerms:
        """Return what the served generation says about requests now."""
        return self.catalog.deployed

    async def choose(self, request: Request) -> ResolvedModel:
        """Return what answers a request; raise what `Naming.choose` does."""
        return await self._naming.choose(request)

    async def defaults(self, model: ServedModel) -> AdapterDefaults:
        """Return what an adapter brings beside its weights, or raise why it cannot be read."""
        return await self._naming.defaults(model)

    async def scorer(self, model: ServedModel) -> Scorer:
        """Return the score head of a model that classifies, or raise what `AdapterTexts.scorer` does."""
        if self.texts is None:
            raise InternalFault(f"the score head of {model.name!r} cannot be read here. Please report it.")
        return await self.texts.scorer(model.digest)

    @contextmanager
    def admit(self, model: ServedModel) -> Iterator[EngineAdmission]:
        """Let a request of the caller in until the end of the block; raise RateLimited where it may not."""
        with self._limiter.admit(model, ACCESS.get(), self.catalog.deployed.limits) as ticket:
            yield EngineAdmission(self, ticket)

    async def begin_of(self, submission: Submission) -> Callable[[], Grammar | None]:
        """Return a function that begins the grammar of an answer, or returns None; raise RequestInvalid where a
        constraint that is not optional cannot be followed.
        """
        constraint = submission.constraint
        if constraint is None:
            return lambda: None
        text = (await self.defaults(submission.model)).text or self._text
        try:
            compiled = await self._constraints.compile(constraint, text)
        except RequestInvalid:
            if not constraint.optional:
                raise
            return lambda: None
        return partial(compiled.begin, submission.ends, optional=constraint.optional)


@dataclass(frozen=True)
class EngineAdmission:
    """A request that was let in."""

    driver: EngineDriver
    ticket: Ticket

    async def submit(self, submission: Submission, make: MakeOutputs = plain_outputs) -> Outputs:
        """Put the answers of the request in the engine's queue, as `Admission.submit` does; make makes what the
        caller must close.
        """
        begin = await self.driver.begin_of(submission)
        seqs = self._sequences(submission, begin)
        self.ticket.check_tokens()
        meter = self.ticket.take if self.ticket.bounds else None
        outputs = self.driver.engine.submit(seqs, make, meter)
        self.ticket.submitted(seqs[0])
        return outputs

    def _sequences(self, submission: Submission, begin: Callable[[], Grammar | None]) -> Seq[Sequence]:
        model, number = submission.model, next(_numbers)
        adapter, invocation = activation(model.mixture or model.adapter, submission.prompt)
        return [
            Sequence(
                f"{number}.{index}",
                submission.prompt,
                submission.sampling.of_answer(index),
                adapter,
                priority=submission.priority,
                deadline_s=submission.deadline_s,
                grammar=begin(),
                invocation=invocation,
                pooling=submission.pooling,
                second=submission.second,
                cache_salt=submission.cache_salt,
                model=model.name,
                counted=model.names if model.parts else (),
                flow=self.ticket.flow,
                share=self.ticket.share,
                key_id=self.ticket.key_id,
            )
            for index in range(submission.n)
        ]
