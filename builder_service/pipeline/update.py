"""An update: adapters made for the base of the newest generation, and a generation that follows from that."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence

import structlog
from pydantic import Field, model_validator

from builder_service.pipeline.build import BuildResult, digests_of, result_of_replay
from builder_service.pipeline.context import BuildContext
from builder_service.pipeline.keep import Moved, ReusableAdapters, keep, same_conditions
from builder_service.pipeline.making import AdapterMaker, Workshop, hold, open_workshop, require_prover
from builder_service.pipeline.progress import Progress
from builder_service.pipeline.push import PushedAdapter
from loramux_shared.bundle.claims import generation_numbers
from loramux_shared.bundle.deployments import (
    NAMELESS,
    Identity,
    newest_generation,
    publish_change,
    read_generation,
    require,
)
from loramux_shared.bundle.generation import AdapterRecord, Generation, Recipe
from loramux_shared.bundle.names import Name, StoredName
from loramux_shared.deployment import Build, LoraConfiguration, Model, Repository
from loramux_shared.faults import AdapterExists, AdapterNotFound, GenerationMismatch, GenerationNotFound
from loramux_shared.storage.base import Store
from loramux_shared.storage.patient import PatientStore
from loramux_shared.wording import listed


class Update(Model):
    """Adapters that come into a deployment, take the place of others, or leave it."""

    name: StoredName
    """The deployment's."""
    add: dict[Name, Repository] = Field(default_factory=dict)
    """Adapters by name; one that is there is replaced."""
    remove: tuple[StoredName, ...] = ()
    expected_generation: int | None = Field(default=None, ge=1)
    """The newest one when this is published; None: whatever it is."""
    must_be_new: bool = Field(default=False, exclude_if=lambda new: not new)
    """Refuse it where the deployment has one of the adapters that are added."""

    @property
    def touched(self) -> frozenset[str]:
        """The adapters that it changes."""
        return frozenset((*self.add, *self.remove))

    @model_validator(mode="after")
    def _says_something(self) -> Update:
        if not self.add and not self.remove:
            raise ValueError("an adapter to add or to remove")
        if both := sorted(self.add.keys() & set(self.remove)):
            raise ValueError(f"adapters to add and others to remove, unlike {both[0]}")
        return self


def join_updates(wishes: Sequence[Update]) -> Update:
    """Return changes of a deployment as one; they touch different adapters and agree on the rest."""
    add = {name: repository for wish in wishes for name, repository in wish.add.items()}
    remove = tuple(name for wish in wishes for name in wish.remove)
    return wishes[0].model_copy(update={"add": add, "remove": remove})


log = structlog.get_logger()


def update(
    wish: Update, context: BuildContext, progress: Progress, identity: Identity = NAMELESS
) -> BuildResult:
    """Make what comes in and publish the generation that follows. Blocks.

    Adapters that the wish does not name are not even resolved. An update that was published under the same
    identity is not repeated.

    Raises:
        AdapterInvalid: with every violation of every adapter.
        Fault: as `judge`, and what the base, a source or the store raises.
    """
    store = PatientStore(context.store, progress.check)
    known: Generation | None = None
    while True:
        before = known = newest_generation(store, wish.name, known)
        if identity.applied_in(before):
            return result_of_replay(store, before, wish.add, progress)
        judge(before, wish)
        records: dict[str, AdapterRecord] = {}
        if wish.add:
            with open_workshop(context, store, progress) as workshop:
                records = _maker(workshop, before).make(wish.add, ReusableAdapters(before))
        try:
            return _publish(context, before, wish, records, progress.check, identity)
        except Moved:
            log.info("base or settings changed during the update, making it again", deployment=wish.name)


def push(pushed: PushedAdapter, workshop: Workshop, expected: int | None) -> tuple[BuildResult, AdapterRecord]:
    """Make an adapter whose files are here and publish the generation that follows. Blocks.

    Raises:
        GenerationMismatch: the newest generation is another one, or has another base now.
        AdapterInvalid: with every violation.
        DeploymentInvalid: the name is taken.
        Fault: what the base's source and the store raise.
    """
    store, check = workshop.store, workshop.progress.check
    before = newest_generation(store, pushed.deployment)
    require(before, expected)
    fetched = pushed.fetched(before.recipe.signed_by if before.recipe else ())
    same = ReusableAdapters(before).find_by_revision(pushed.name, fetched.source)
    reused = keep(store, [same], before.base, workshop.progress, verify=False) if same else {}
    record = reused.get(pushed.name) or _maker(workshop, before).make_fetched(fetched)
    try:
        wish = Update(name=pushed.deployment, add={pushed.name: record.source}, expected_generation=expected)
        result = _publish(workshop.context, before, wish, {pushed.name: record}, check, NAMELESS)
    except Moved as moved:
        raise GenerationMismatch(
            f"deployment {pushed.deployment}: its base or settings changed while the adapter was made. "
            "Push it again."
        ) from moved
    return result, record


def changed(
    before: Generation, records: Mapping[str, AdapterRecord | None], remove: Collection[str]
) -> Generation:
    """Return a generation with other adapters; of a record that is not known yet, only the name counts."""
    adapters = {name: record for name, record in before.adapters.items() if name not in remove}
    new = {name: record and _added(record, before.adapters.get(name)) for name, record in records.items()}
    recipe = before.recipe or (Recipe() if records else None)
    return before.model_copy(update={"adapters": dict(sorted({**adapters, **new}.items())), "recipe": recipe})


def _added(record: AdapterRecord, before: AdapterRecord | None) -> AdapterRecord:
    """Return a record as one that is not of the deployment's file, unless it is the file's own again."""
    own = before is not None and not before.added and record.same_content(before)
    return record.model_copy(update={"added": not own})


def check_update(store: Store, wish: Update, identity: Identity) -> None:
    """Raise what `newest_generation` and `judge` do, unless the update was published before. Blocks."""
    newest = newest_generation(store, wish.name)
    if not identity.applied_in(newest):
        judge(newest, wish)


def judge(before: Generation, wish: Update) -> None:
    """Refuse an update that cannot follow a generation.

    Raises:
        GenerationMismatch: it expects another one.
        AdapterNotFound: an adapter that is to leave is not there.
        AdapterExists: one that must be new is there.
        DeploymentInvalid: the names do not fit together.
    """
    require(before, wish.expected_generation)
    if missing := sorted(set(wish.remove) - before.adapters.keys()):
        raise AdapterNotFound(
            f"deployment {before.deployment} has no adapter {listed(missing)}; it has {listed(before.adapters)}"
        )
    if wish.must_be_new:
        _require_new(before, wish.add.keys() & before.adapters.keys())
    changed(before, dict.fromkeys(wish.add), wish.remove).check_names()


def _require_new(generation: Generation, there: Collection[str]) -> None:
    if there:
        raise AdapterExists(
            f"deployment {generation.deployment}: expected new adapters, found existing ones: "
            f"{listed(sorted(there))}. Choose another name, or replace it."
        )


def _maker(workshop: Workshop, before: Generation) -> AdapterMaker:
    settings = _settings_of(before)
    if settings.prove:
        require_prover()
    base = workshop.context.bases.recall(before.base, before.max_seq_len, workshop.weights(before.base))
    return AdapterMaker.for_base(workshop, base, settings, digests_of(before), before.merge)


def _settings_of(generation: Generation) -> Build:
    recipe = generation.recipe or Recipe()
    return Build(
        checkpoint_repository=generation.base.source,
        max_seq_len=generation.max_seq_len,
        lora_configuration=LoraConfiguration(
            max_lora_rank=generation.max_lora_rank,
            truncate_to_rank=recipe.truncate_to_rank,
            lora_target_modules=generation.lora_target_modules,
            dtype=generation.lora_dtype,
        ),
        prove=recipe.prove,
        signed_by=recipe.signed_by,
    )


def _publish(
    context: BuildContext,
    before: Generation,
    wish: Update,
    records: Mapping[str, AdapterRecord],
    check: Callable[[], None],
    identity: Identity,
) -> BuildResult:
    def change(current: Generation) -> Generation:
        if records and not same_conditions(before, current):
            raise Moved
        planned = changed(current, records, wish.remove)
        if wish.must_be_new:
            there = records.keys() & current.adapters.keys()
            _require_new(current, {name for name in there if current.adapters[name] != planned.adapters[name]})
        return planned

    name, store = before.deployment, PatientStore(context.store)
    check()  # an update that is stopped from here on is published all the same
    with context.publishing(name):
        generation, new = publish_change(
            store, name, change, identity, expected=wish.expected_generation, known=before, check=check
        )
    return BuildResult(generation, unchanged=not new)


def rollback(name: str, to: int | None, expected: int | None, context: BuildContext) -> BuildResult:
    """Publish what an older generation says; None: the one before the newest. Blocks.

    Raises:
        DeploymentNotFound: there is no such deployment.
        GenerationNotFound: it has no such generation; the message lists those that it has.
        DeploymentInvalid: the names of the older generation do not fit together.
        GenerationMismatch: the newest generation is another than the expected one.
        BundleCorrupt: the older generation, or a bundle to which it refers, is not whole any more.
        StoreUnavailable: the store does not answer.
    """
    store = PatientStore(context.store)
    before = newest_generation(store, name)
    require(before, expected)
    numbers = generation_numbers(store, name)
    chosen = to or max((number for number in numbers if number < before.number), default=0)
    if chosen not in numbers:
        which = f"no generation {to}" if to else "no generation before the newest"
        raise GenerationNotFound(
            f"deployment {name} has {which}; it has {listed([str(number) for number in reversed(numbers)])}"
        )
    target = read_generation(store, name, chosen)
    held: set[str] = set(digests_of(before))

    def change(current: Generation) -> Generation:
        lost = digests_of(target) - digests_of(current) - held
        hold(store, lost)
        held.update(lost)
        return target

    hold(store, digests_of(target) - held)
    with context.publishing(name):
        generation, new = publish_change(store, name, change, expected=expected, known=before)
    return BuildResult(generation, unchanged=not new, restored=chosen)
