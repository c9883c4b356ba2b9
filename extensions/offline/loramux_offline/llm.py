"""``loramux.LLM``: lists of prompts in, answers out, without a server."""

import asyncio
import atexit
import logging
import sys
import threading
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Literal, Self, TypeVar, Unpack, cast, overload

import structlog
from pydantic import ValidationError
from tqdm import tqdm  # type: ignore[import-untyped,unused-ignore]

from inference_service.api.requests.service import GenerationService
from inference_service.core.request import Request
from loramux import Classification, Completion, ModelInfo, load_deployment
from loramux.records import GenerateOptions, Prompt
from loramux.vectors import EmbedOptions, ScoreOptions, TextInput
from loramux_offline.local import LocalClient, load
from loramux_shared.bundle.names import BASE
from loramux_shared.deployment import Build, Deployment, Runtime
from loramux_shared.deployment_file import findings_of
from loramux_shared.faults import DeploymentInvalid, Fault, Finding, RequestInvalid, SettingsInvalid
from loramux_shared.spelling import parse_repository

STORE: Final = "file://~/.local/share/loramux/store"
Models = str | Sequence[str]
"""A name of a model for all prompts, or one for each; empty: the base."""
T = TypeVar("T")
log = structlog.get_logger()


class LLM:
    """A base and its adapters, loaded into this process.

    ::

        llm = LLM(base="HuggingFaceTB/SmolLM2-135M-Instruct", adapters={"support": "./support-lora"})
        asked = [[{"role": "user", "content": text}] for text in ("Where is my order?", "Hello")]
        for answer in llm.chat(asked, "support", max_tokens=64):
            print(answer.text)

    Methods may be called by several threads at once; their prompts share the steps of the engine. The model is
    freed by `close`, at the end of a ``with`` block, or when the program ends.
    """

    def __init__(
        self,
        deployment: str | Path | Deployment | None = None,
        *,
        base: str = "",
        adapters: Mapping[str, str] | None = None,
        store: str = STORE,
        progress: bool = True,
        **settings: Any,
    ) -> None:
        """Build and load a deployment (a file or an object), or a base with adapters by their names.

        Repositories are written as on the command line: ``org/name@revision``, a folder, ``s3://bucket/prefix``.
        Bundles are kept in the store, so that the next start converts nothing again. progress says on stderr
        what is built and loaded. settings are those of a replica (docs/reference/settings.md), such as
        ``threads=8`` or ``dtype="bfloat16"``.

        Raises:
            SettingsInvalid: a setting is unknown or its value is not allowed.
            DeploymentInvalid: the file, or a repository, cannot be read as one.
            Fault: an adapter is refused, or the base cannot be loaded.
        """
        if not structlog.is_configured():
            quiet = structlog.make_filtering_bound_logger(logging.WARNING)
            structlog.configure(wrapper_class=quiet, logger_factory=structlog.PrintLoggerFactory(sys.stderr))
        loaded = _deployment(deployment, base, adapters or {})
        self._base = loaded.served_model_name
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="loramux", daemon=True)
        self._thread.start()
        self._closed = False
        self._warned, self._warning = False, asyncio.Lock()
        self._marks: dict[str, tuple[str, ...]] = {}
        try:
            self._replica = self.run(load(loaded, store, progress=progress, **settings))
            self.run(self._begin())
        except BaseException:
            self._end()
            raise
        self._client = LocalClient(replica=self._replica)
        atexit.register(self.close)

    def models(self) -> list[ModelInfo]:
        """Return the base, then the adapters by name."""
        return self.run(self._client.models())

    @overload
    def generate(
        self,
        prompts: Sequence[Prompt],
        model: Models = "",
        *,
        progress: bool | None = None,
        return_exceptions: Literal[False] = False,
        **options: Unpack[GenerateOptions],
    ) -> list[Completion]: ...

    @overload
    def generate(
        self,
        prompts: Sequence[Prompt],
        model: Models = "",
        *,
        progress: bool | None = None,
        return_exceptions: Literal[True],
        **options: Unpack[GenerateOptions],
    ) -> list[Completion | Fault]: ...

    def generate(
        self,
        prompts: Sequence[Prompt],
        model: Models = "",
        *,
        progress: bool | None = None,
        return_exceptions: bool = False,
        **options: Unpack[GenerateOptions],
    ) -> Any:
        """Return the answer to each prompt, in the order of the prompts.

        A prompt is text, a list of token ids, or a list of messages for the chat template; model is a name, or
        one for each prompt. Options are those of `loramux.Client.complete`. progress shows a bar; by default
        where stderr is a terminal. A warning, once, names a text without a mark of its model's chat template:
        models that were trained on chats often end such an answer at once.

        Raises:
            Interrupted: Ctrl-C; it has the answers that are complete.
            Fault: why a prompt was refused or failed; the others are cancelled. With return_exceptions a fault
                stands in the list, at the place of its prompt.
        """
        if isinstance(prompts, str):
            raise _no_list("prompts")

        async def ask(index: int, name: str) -> Completion:
            prompt = prompts[index]
            if isinstance(prompt, str):
                await self._warn_of_plain_text(index, prompt, name)
            return await self._client.complete(name, prompt, **options)

        return self._ask_all(ask, self._names(model, len(prompts)), progress, return_exceptions)

    def embed(
        self,
        texts: Sequence[TextInput],
        model: Models = "",
        *,
        progress: bool | None = None,
        **options: Unpack[EmbedOptions],
    ) -> list[tuple[float, ...]]:
        """Return the vector of each text; options are those of `loramux.Client.embed`.

        Raises:
            Interrupted: Ctrl-C; it has the vectors that are complete.
            Fault: why a text was refused or failed.
        """

        async def ask(index: int, name: str) -> tuple[float, ...]:
            return (await self._client.embed(name, [texts[index]], **options)).vectors[0]

        return self._of_texts(ask, texts, model, progress)

    def classify(
        self,
        texts: Sequence[TextInput],
        model: Models,
        *,
        progress: bool | None = None,
        **options: Unpack[ScoreOptions],
    ) -> list[Classification]:
        """Return how each text, or pair of texts, scores under an adapter with a score head."""

        async def ask(index: int, name: str) -> Classification:
            return (await self._client.classify(name, [texts[index]], **options)).texts[0]

        return self._of_texts(ask, texts, model, progress)

    def score(
        self,
        queries: str | Sequence[str],
        texts: Sequence[str],
        model: Models,
        *,
        progress: bool | None = None,
        **options: Unpack[ScoreOptions],
    ) -> list[float]:
        """Return how well each text fits its query, or the one query of all, under an adapter with one label.

        Scores are those of `/score` of the HTTP API.

        Raises:
            RequestInvalid: there is not a query for each text, or an adapter has several labels.
        """
        several = [queries] * len(texts) if isinstance(queries, str) else queries
        if isinstance(texts, str) or len(several) != len(texts):
            expected, found = "one text, or one for each of texts, a list", f"{len(several)} and {len(texts)}"
            raise RequestInvalid.of_field("queries and texts do not fit together", "queries", expected, found)
        pairs = list(zip(several, texts, strict=True))
        scores = [each.scores for each in self.classify(pairs, model, progress=progress, **options)]
        if labels := max(map(len, scores), default=1) - 1:
            expected, found = "an adapter with one label", f"{labels + 1} labels"
            raise RequestInvalid.of_field("the adapter classifies", "model", expected, found)
        return [score for (score,) in scores]

    chat = generate
    """vLLM's name of `generate` for prompts that are messages."""

    def close(self) -> None:
        """Stop the engine and free the model; calls that are under way end with a fault."""
        if not self._closed:
            atexit.unregister(self.close)
            self.run(self._stop())
            self._end()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _names(self, model: Models, count: int) -> list[str]:
        names = [model] if isinstance(model, str) else list(model)
        names = names * count if len(names) == 1 else names
        if len(names) != count:
            expected, found = f"one name, or {count}: one for each prompt", f"{len(names)} names"
            finding = Finding(code="E_BAD_FIELD", where="model", expected=expected, found=found)
            raise RequestInvalid("models and prompts do not fit together", [finding])
        return [name or self._base for name in names]

    async def _warn_of_plain_text(self, index: int, text: str, name: str) -> None:
        """Warn, once, of a text that has no mark of its model's chat template."""
        async with self._warning:
            if not self._warned and name not in self._marks:
                self._marks[name] = await self._marks_of(name)
            marks = () if self._warned else self._marks[name]
            if not marks or any(mark in text for mark in marks):
                return
            self._warned = True
        log.warning(
            "prompt has no mark of its model's chat template, so the answer may end at once: call chat with "
            "messages; not said again",
            prompt=index,
            model=name,
            expected_marks=marks,
        )

    async def _marks_of(self, name: str) -> tuple[str, ...]:
        """Return marks of the chat template of a model; none where it has none, or cannot be asked."""
        try:
            served = await self.service.choose(Request.of(name, ""))
            defaults = await self.service.defaults(served.model)
            template = defaults.template or self.service.text.template
            return await template.marks() if template is not None else ()
        except Fault:
            return ()

    def _of_texts(
        self,
        ask: Callable[[int, str], Awaitable[T]],
        texts: Sequence[TextInput],
        model: Models,
        progress: bool | None,
    ) -> list[T]:
        if isinstance(texts, str):
            raise _no_list("texts")
        return cast(list[T], self._ask_all(ask, self._names(model, len(texts)), progress, False))

    def _ask_all(
        self,
        ask: Callable[[int, str], Awaitable[T]],
        names: Sequence[str],
        progress: bool | None,
        return_exceptions: bool,
    ) -> list[T | Fault]:
        found: dict[int, T | Fault] = {}
        disable = None if progress is None else not progress  # None: where stderr is no terminal
        with tqdm(total=len(names), unit="prompt", disable=disable) as bar:

            async def answer(index: int, seats: asyncio.Semaphore) -> None:
                async with seats:
                    try:
                        found[index] = await ask(index, names[index])
                    except Fault as fault:
                        if not return_exceptions:
                            raise fault.with_message(f"prompt {index}: {fault.message}") from fault
                        found[index] = fault
                bar.update()

            async def answer_all() -> None:
                seats = asyncio.Semaphore(self.service.max_queue)
                async with asyncio.TaskGroup() as group:
                    for index in range(len(names)):
                        group.create_task(answer(index, seats))

            try:
                self.run(answer_all())
            except KeyboardInterrupt:
                raise Interrupted([found.get(index) for index in range(len(names))]) from None
            except BaseExceptionGroup as group:
                raise group.exceptions[0] from None
        return [found[index] for index in range(len(names))]

    async def _begin(self) -> None:
        async def nobody_listens() -> None:
            pass

        self._replica.begin(nobody_listens)

    async def _stop(self) -> None:
        await self._replica.operators.end()
        await self._replica.stop()

    @property
    def service(self) -> GenerationService:
        """The service behind the APIs, for an application that is served within this process."""
        return self._replica.ready.service

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine on the loop of this model, and return its result; Ctrl-C cancels it."""
        if self._closed:
            work.close()
            raise SettingsInvalid("this LLM is closed: make another one.")
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        except KeyboardInterrupt:
            future.cancel()
            asyncio.run_coroutine_threadsafe(asyncio.sleep(0), self._loop).result()
            raise

    def _end(self) -> None:
        self._closed = True
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


class Interrupted(KeyboardInterrupt):
    """Ctrl-C ended a call for a list."""

    def __init__(self, answers: Sequence[Any]) -> None:
        done = sum(answer is not None for answer in answers)
        super().__init__(f"{done} of {len(answers)} answers are complete: see .answers")
        self.answers = list(answers)
        """The answers in the order of the prompts, None for those that are not complete."""


def _deployment(
    deployment: str | Path | Deployment | None, base: str, adapters: Mapping[str, str]
) -> Deployment:
    if (deployment is None) != bool(base) or (deployment is not None and adapters):
        raise SettingsInvalid("LLM takes a deployment, or base= with adapters=: give one of the two.")
    if isinstance(deployment, Deployment):
        return deployment
    if deployment is not None:
        return load_deployment(Path(deployment)).deployment
    fields = {"checkpoint_repository": parse_repository(base)}
    try:
        build = Build(**fields, lora_adapters={name: parse_repository(each) for name, each in adapters.items()})
    except ValidationError as error:
        raise DeploymentInvalid("adapters: not every name can be one", findings_of(error, Build)) from error
    # The store may have other deployments of the base: the name is a hash of this build.
    name = f"offline-{sha256(build.model_dump_json().encode()).hexdigest()[:16]}"
    return Deployment(model_name=name, build=build, runtime=Runtime(served_model_name=BASE))


def _no_list(where: str) -> RequestInvalid:
    finding = Finding(code="E_BAD_FIELD", where=where, expected="a list of prompts", found="one text")
    return RequestInvalid(f"{where} is one text", [finding])
