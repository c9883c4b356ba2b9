"""The served models by name, while generations come and go."""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from itertools import chain
from typing import Any, Final
from weakref import WeakValueDictionary

from inference_service.adapters.names import (
    LEAST_DIGITS,
    ambiguous_version,
    bad_version,
    blend,
    blend_parts,
    check_blend,
    choose,
    model_not_found,
    version_not_found,
)
from inference_service.core.adapter import MOST_PARTS, Adapter, ScaledAdapter
from inference_service.core.served_model import NO_DEFAULTS, ServedModel, display_source
from loramux_shared.access.keys import ACCESS, Access
from loramux_shared.bundle.generation import AdapterRecord, BaseRecord, Generation
from loramux_shared.bundle.names import BASE
from loramux_shared.deployment import Dtype, Repository, SourceKind
from loramux_shared.faults import ModelNotFound
from loramux_shared.spelling import name_of_path

EARLIER: Final = 8
"""Versions of a name before the present one that are still known."""
_PUBLISHED: Final = re.compile(r"publishers/[a-z0-9-]{1,63}/models/(.+)")
_DIGITS: Final = re.compile(rf"[0-9a-f]{{{LEAST_DIGITS},64}}")


@dataclass(frozen=True)
class NameChanges:
    """The changes of names by a generation."""

    added: tuple[str, ...]
    switched: tuple[str, ...]
    """They have another version now."""
    removed: tuple[str, ...]


class Catalog:
    """The base first, where it is served, then the adapters by name. A caller sees what it may use.

    It changes on the event loop alone. A request that has its model keeps it, whatever happens to the name.
    """

    def __init__(
        self, generation: int, base_name: str, models: Iterable[ServedModel], most_mixed: int = MOST_PARTS
    ) -> None:
        """List what is served; a request may name most_mixed adapters, as many as a step may have."""
        self.deployed = _bare(generation, base_name)
        """The generation that is served; until `apply`, nothing of it but its number and the base's name."""
        self.watchers: list[Callable[[], None]] = []
        """Called after each change of the generation."""
        self._most_mixed = most_mixed
        ordered = sorted(models, key=lambda model: (model.name != base_name, model.name))
        self._models = {model.name: model for model in ordered}
        self._base = self._models.get(base_name, ServedModel(base_name))
        self._earlier: dict[str, tuple[ServedModel, ...]] = {}
        self._by_digest: dict[str, tuple[str, ...]] = {}
        self._handles: WeakValueDictionary[str, Adapter] = WeakValueDictionary()
        """Handles by digest, kept alive by their users: a digest that comes back has the handle that it had."""
        for model in self._models.values():
            self._enter(model)

    def __iter__(self) -> Iterator[ServedModel]:
        access = ACCESS.get()
        return (model for model in self.everything if access.may_use(model.name))

    def __len__(self) -> int:
        return len(self._models)

    def apply(self, generation: Generation) -> NameChanges:
        """Take over another generation on the same base, in one step and from its records alone.

        What needs a restart must have been found before: where an adapter is merged into the weights, nothing
        else can be served on them.
        """
        adapters = generation.adapters
        models = {name: model for name, model in self._models.items() if name != self.base_name}
        added = [name for name in adapters if name not in models]
        removed = [name for name in models if name not in adapters]
        switched = [
            name for name, model in models.items() if name in adapters and adapters[name].digest != model.digest
        ]
        if (added or switched or removed) and not all(model.adapter for model in models.values()):
            raise ValueError("an adapter is merged into the weights: another generation needs a restart")
        for name in removed:
            self._leave(models.pop(name))
            self._earlier.pop(name, None)
        for name in switched:
            self._retire(models[name])
        now = datetime.now(UTC)
        for name, model in models.items():
            if model.licence != adapters[name].licence:
                models[name] = replace(model, licence=adapters[name].licence)
        for name in (*switched, *added):
            models[name] = self._registered(name, adapters[name], models, now)
            self._enter(models[name])
        self._show(generation, models)
        return NameChanges(tuple(added), tuple(switched), tuple(removed))

    def know(self, digest: str, **facts: Any) -> None:
        """Note what was read of a bundle: fields of its `ServedModel`, under all of its names."""
        for name in self._by_digest.get(digest, ()):
            self._models[name] = replace(self._models[name], **facts)

    @property
    def generation(self) -> int:
        """The number of the deployment's generation that is served."""
        return self.deployed.number

    @property
    def base_name(self) -> str:
        """The name of the base, whether it is served or not."""
        return self.deployed.served_model_name

    @property
    def base_licence(self) -> str:
        """Return the licence that the base's repository names; empty where no generation has one."""
        return self.deployed.base.licence

    @property
    def aliases(self) -> Mapping[str, Mapping[str, int]]:
        """Names that stand for several models, with their weights."""
        return self.deployed.aliases

    @property
    def everything(self) -> tuple[ServedModel, ...]:
        """Return all models, for every caller; may be called on another thread."""
        return tuple(self._models.values())

    def get(self, name: str) -> ServedModel:
        """Return a model by its exact name; raise ModelNotFound, with what is served, for every other name."""
        if name in self._models and ACCESS.get().may_use(name):
            return self._models[name]
        raise self._not_found(name)

    def resolve(self, requested: str, sticky_key: str = "") -> ServedModel:
        """Return what answers a request: of an exact name, an alias, ``NAME@DIGEST``, or another spelling.

        What is none of these may be several of them with scales, ``NAME*SCALE+NAME``. ``base`` is the base,
        ``BASE:NAME`` is Ray Serve's and SGLang's, ``publishers/NAMESPACE/models/NAME`` that of KServe's routes,
        and a repository's path is the adapter that a request added by it.

        Who may not use an alias cannot ask for it, and of its models one answers that the caller may use: by
        weight, the same one for the same key.

        Raises:
            ModelNotFound: there is no such name or version, or the caller may not use it.
            RequestInvalid: it names no version, or several, or adapters that cannot be mixed.
        """
        known = requested in self._models or requested in self.aliases
        if not known and (parts := blend_parts(requested)):
            return self.mix(parts, sticky_key)
        found = self._found(requested, sticky_key)
        if found is None:
            raise self._not_found(requested)
        return found

    def mix(self, parts: Sequence[ScaledAdapter], sticky_key: str = "", where: str = "model") -> ServedModel:
        """Return what answers a request for several adapters with scales, each named as `resolve` has it.

        Raises:
            ModelNotFound: there is no such name or version, or the caller may not use it.
            RequestInvalid: they cannot be mixed; where says by which field.
        """
        check_blend(parts, self._most_mixed, where)
        found: list[tuple[ServedModel, float]] = []
        for part in parts:
            model = self._found(part.name, sticky_key)
            if model is None:
                raise self._not_found(part.name)
            found.append((model, part.scale))
        return blend(found, lambda: self.get(self.base_name), where)

    def _found(self, requested: str, sticky_key: str) -> ServedModel | None:
        access = ACCESS.get()
        found = (self._named(name, sticky_key, access) for name in self._spellings(requested))
        return next((model for model in found if model is not None), None)

    def _spellings(self, requested: str) -> Iterator[str]:
        yield requested
        if requested == BASE:
            yield self.base_name
        of_base = requested.removeprefix(f"{self.base_name}:")
        if of_base not in (requested, self.base_name):
            yield of_base
        if published := _PUBLISHED.fullmatch(requested):
            yield published[1]
        if "/" in requested:
            yield name_of_path(requested)

    def _named(self, requested: str, sticky_key: str, access: Access) -> ServedModel | None:
        name, at, prefix = requested.partition("@")
        if not access.may_use(name):
            return None
        if at:
            return self._version(name, prefix) if name in self._models else None
        if name in self._models:
            return self._models[name]
        weights = {
            each: weight
            for each, weight in self.aliases.get(name, {}).items()
            if weight and each in self._models and access.may_use(each)
        }
        return self._models[choose(name, weights, sticky_key)] if weights else None

    def _version(self, name: str, prefix: str) -> ServedModel:
        if not _DIGITS.fullmatch(prefix):
            raise bad_version(name, prefix)
        versions = {
            each.digest: each for each in (*self._earlier.get(name, ()), self._models[name]) if each.digest
        }
        found = [each for digest, each in versions.items() if digest.startswith(prefix)]
        if not found:
            raise version_not_found(name, prefix, versions)
        if len(found) > 1:
            raise ambiguous_version(name, prefix, [each.digest for each in found])
        return found[0]

    def _not_found(self, name: str) -> ModelNotFound:
        access = ACCESS.get()
        return model_not_found(name, [each for each in (*self._models, *self.aliases) if access.may_use(each)])

    def handle(self, digest: str, invocation: tuple[int, ...] = ()) -> Adapter:
        """Return the one handle of a version, also of one that no name stands for any more."""
        adapter = self._handles.get(digest) or Adapter(digest, invocation=invocation)
        self._handles[digest] = adapter
        return adapter

    def _registered(
        self, name: str, record: AdapterRecord, models: Mapping[str, ServedModel], now: datetime
    ) -> ServedModel:
        adapter = self.handle(record.digest, record.invocation_tokens)
        source = display_source(record.source)
        known = self._known(name, record.digest, models)
        if known is not None:
            licence = record.licence
            return replace(known, name=name, adapter=adapter, source=source, load_time=now, licence=licence)
        summary = record.summary
        if summary is None:
            return ServedModel(
                name, adapter, source, record.digest, defaults=None, load_time=now, licence=record.licence
            )
        return ServedModel(
            name,
            adapter,
            source,
            record.digest,
            summary.ranks,
            summary.modules,
            summary.warnings,
            summary.weights_bytes,
            None if summary.texts else NO_DEFAULTS,
            now,
            affine=summary.affine,
            vocab=summary.vocab,
            kinds=summary.kinds,
            replaced=tuple(summary.replaced.items()),
            licence=record.licence,
            num_labels=summary.num_labels,
        )

    def _known(self, name: str, digest: str, models: Mapping[str, ServedModel]) -> ServedModel | None:
        """Return a model of this digest, of which more may have been read than a record says."""
        namesakes = (models[other] for other in self._by_digest.get(digest, ()) if other in models)
        candidates = chain(namesakes, self._earlier.get(name, ()))
        return next((each for each in candidates if each.digest == digest), None)

    def _retire(self, model: ServedModel) -> None:
        self._leave(model)
        others = [each for each in self._earlier.get(model.name, ()) if each.digest != model.digest]
        self._earlier[model.name] = (model, *others)[:EARLIER]

    def _enter(self, model: ServedModel) -> None:
        if model.adapter is not None:
            self._handles[model.digest] = model.adapter
            self._by_digest[model.digest] = (*self._by_digest.get(model.digest, ()), model.name)

    def _leave(self, model: ServedModel) -> None:
        names = tuple(name for name in self._by_digest.pop(model.digest, ()) if name != model.name)
        if names:
            self._by_digest[model.digest] = names

    def _show(self, generation: Generation, models: dict[str, ServedModel]) -> None:
        """Let everybody see the new names at once."""
        name = generation.served_model_name
        if self.base_name != name:
            self._base = replace(self._base, name=name)
        first = {name: self._base} if generation.serve_base else {}
        self._models = first | dict(sorted(models.items()))
        self.deployed = generation
        for watcher in self.watchers:
            watcher()


def _bare(number: int, base_name: str) -> Generation:
    """Return a generation of which only the number and the base's name are known."""
    source = Repository.model_construct(source=SourceKind.LOCAL, repo="")
    return Generation.model_construct(
        deployment="",
        number=number,
        create_time=datetime.now(UTC),
        served_model_name=base_name,
        base=BaseRecord.model_construct(source=source, files={}),
        adapters={},
        max_lora_rank=0,
        lora_dtype=Dtype.FLOAT32,
    )
