"""A callback of transformers' trainers that pushes checkpoints as versions of an adapter.

https://huggingface.co/docs/transformers/main_classes/callback
"""

import asyncio
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import structlog
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from loramux.client import BUILDER, INFERENCE, AsyncClient
from loramux_arena.comparison import Comparison
from loramux_arena.examples import Example, read_examples
from loramux_arena.scoring import Plan, score_all
from loramux_shared.faults import Fault, ResourcesExhausted

log = structlog.get_logger()


@dataclass(frozen=True)
class PushedCheckpoint:
    """A checkpoint that was pushed, or why it was not."""

    step: int
    digest: str = ""
    """sha256 of the bundle's manifest, in hex."""
    generation: int = 0
    promoted: bool = False
    """Whether the adapter's name stands for it since then."""
    compared: Comparison | None = None
    """Log probabilities per token of the references, against the version before."""
    failure: Fault | None = None


class PushAdapter(TrainerCallback):  # type: ignore[misc]  # transformers has no types here
    """Push the adapter whenever a trainer saves a checkpoint, or after each evaluation.

    With examples, the version is first served as ``NAME-candidate``, and promoted to NAME unless it is worse
    than the present one: the references are less likely, beyond chance at 95 %. A push that fails is a warning,
    and training goes on. `pushed` has all of them.
    """

    def __init__(
        self,
        deployment: str,
        name: str,
        *,
        builder: str = BUILDER,
        inference: str = INFERENCE,
        examples: Path | str | None = None,
        on: Literal["save", "evaluate"] = "save",
    ) -> None:
        """Push to a deployment, of which a replica is asked where a file of examples is given.

        Raises:
            RequestInvalid: a line of the file is no example.
        """
        self._deployment = deployment
        self._name = name
        self._builder = builder
        self._inference = inference
        self._on = on
        self._examples: list[Example] = [] if examples is None else read_examples(Path(examples))
        self.pushed: list[PushedCheckpoint] = []

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Push the checkpoint that was saved."""
        del control
        if self._on == "save" and state.is_world_process_zero:
            self._take(Path(args.output_dir, f"checkpoint-{state.global_step}"), state.global_step)

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, *, model: Any, **_: Any
    ) -> None:
        """Push the adapter as it is now."""
        del args, control
        if self._on == "evaluate" and state.is_world_process_zero:
            self._take(None, state.global_step, model)

    def _take(self, folder: Path | None, step: int, model: Any = None) -> None:
        """Push a checkpoint of a folder, or a model as it is now."""
        try:
            with (
                tempfile.TemporaryDirectory() as own,
                ThreadPoolExecutor(1) as thread,  # a notebook has an event loop of its own
            ):
                if folder is None:
                    model.save_pretrained(folder := Path(own))
                pushed = thread.submit(asyncio.run, self._push(folder, step)).result()
        except (Fault, OSError) as error:
            fault = error if isinstance(error, Fault) else ResourcesExhausted(str(error))
            log.warning("checkpoint was not pushed", step=step, reason=fault.reason, problem=str(fault))
            self.pushed.append(PushedCheckpoint(step, failure=fault))
            return
        compared = round(pushed.compared.difference, 4) if pushed.compared else None
        log.info(
            "checkpoint pushed", step=step, digest=pushed.digest[:12], promoted=pushed.promoted, better=compared
        )
        self.pushed.append(pushed)

    async def _push(self, folder: Path, step: int) -> PushedCheckpoint:
        async with AsyncClient(builder=self._builder, inference=self._inference) as client:
            if not self._examples or self._name not in {model.name for model in await client.models()}:
                info = await client.push(self._deployment, self._name, folder)
                return PushedCheckpoint(step, info.digest, info.generation, promoted=True)
            candidate = f"{self._name}-candidate"
            info = await client.push(self._deployment, candidate, folder)
            try:
                compared = await self._compared(client, candidate, info.generation)
                promoted = compared.interval.high >= 0
                if promoted:
                    info = await client.push(self._deployment, self._name, folder)
            finally:
                try:
                    await client.update(self._deployment, remove=[candidate])
                except Fault as fault:  # what became of the checkpoint is known all the same
                    log.warning("candidate stays", adapter=candidate, reason=fault.reason, problem=str(fault))
            return PushedCheckpoint(step, info.digest, info.generation, promoted, compared)

    async def _compared(self, client: AsyncClient, candidate: str, generation: int) -> Comparison:
        """Return how likely a candidate finds the references, against the present version."""
        async for _ in client.generate(
            candidate, self._examples[0].prompt, max_tokens=1, min_generation=generation
        ):
            pass  # served from here on
        scores = await score_all(client, Plan((self._name, candidate)), self._examples)
        compared = scores.comparisons()
        if not compared:
            raise scores.failures[0].fault
        return compared[0]
