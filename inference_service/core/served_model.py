"""A model under one of its names, and the defaults that an adapter brings beside its weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from inference_service.core.adapter import Adapter, Mixture
from inference_service.text.chat_template import ChatTemplate
from inference_service.text.text import Text, special_tokens, template_in
from loramux_shared.bundle.added_tokens import OwnTokens
from loramux_shared.bundle.kinds import SILENT, AdapterKind
from loramux_shared.bundle.manifest import OWN_TOKENS_FILE, TEXT_FILES
from loramux_shared.deployment import Repository, SourceKind
from loramux_shared.faults import AdapterInvalid, CheckpointInvalid, Finding, RequestInvalid
from loramux_shared.untrusted_json import parse_json

TEMPLATE, GENERATION, TOKENIZER = TEXT_FILES


@dataclass(frozen=True)
class AdapterDefaults:
    """The defaults of an adapter, which come before the base's where a request leaves something open."""

    template: ChatTemplate | None = None
    """None: the base's."""
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    stop_token_ids: frozenset[int] = frozenset()
    """Stop tokens beside the base's."""
    text: Text | None = None
    """Tokenizer, where it has other tokens than the base; None: the base's."""


NO_DEFAULTS: Final = AdapterDefaults()


def read_adapter_defaults(name: str, texts: Mapping[str, bytes], base: Text) -> AdapterDefaults:
    """Read the text files of an adapter's bundle. Raise AdapterInvalid for a file that cannot be read or
    parsed, and BundleCorrupt for own tokens of an unknown format.
    """
    if not texts:
        return NO_DEFAULTS
    generation, tokenizer = (_fields(name, file, texts) for file in (GENERATION, TOKENIZER))
    special = base.special_tokens | special_tokens(tokenizer)
    text = _text(name, texts, base)
    sampled = generation.get("do_sample") is True  # transformers' default: otherwise greedy
    return AdapterDefaults(
        template=_template(name, texts, tokenizer, special),
        temperature=_or(generation.get("temperature"), 1.0) if sampled else None,
        top_p=generation.get("top_p") if sampled else None,
        top_k=generation.get("top_k") if sampled else None,
        stop_token_ids=_eos(generation, tokenizer, text or base),
        text=text,
    )


def _text(name: str, texts: Mapping[str, bytes], base: Text) -> Text | None:
    if OWN_TOKENS_FILE not in texts:
        return None
    try:
        return base.with_tokens(OwnTokens.from_bytes(texts[OWN_TOKENS_FILE], what=OWN_TOKENS_FILE))
    except ValueError as error:
        raise _refused(name, OWN_TOKENS_FILE, "tokens that can be added to the base's", str(error)) from error


def _template(
    name: str, texts: Mapping[str, bytes], tokenizer: Mapping[str, Any], special: Mapping[str, str]
) -> ChatTemplate | None:
    file = TEMPLATE if TEMPLATE in texts else TOKENIZER
    try:
        source = texts[TEMPLATE].decode() if TEMPLATE in texts else template_in(tokenizer)
        return ChatTemplate(source, special) if source else None
    except (CheckpointInvalid, ValueError) as error:
        raise _refused(name, file, "a chat template", str(error)) from error


def _eos(generation: Mapping[str, Any], tokenizer: Mapping[str, Any], base: Text) -> frozenset[int]:
    """Return the ends that the adapter was trained to write."""
    value = generation.get("eos_token_id")
    ids = set(value if isinstance(value, list) else [] if value is None else [value])
    token = special_tokens(tokenizer).get("eos_token")
    if token and (number := base.token_id(token)) is not None:
        ids.add(number)
    return frozenset(ids)


def _fields(name: str, file: str, texts: Mapping[str, bytes]) -> dict[str, Any]:
    try:
        fields = parse_json(texts.get(file, b"{}"))
    except ValueError as error:
        raise _refused(name, file, "JSON", str(error)) from error
    if not isinstance(fields, dict):
        raise _refused(name, file, "an object", type(fields).__name__)
    return fields


def _refused(name: str, file: str, expected: str, found: str) -> AdapterInvalid:
    fix = "Correct or remove the file in the adapter's repository, and build again."
    finding = Finding(
        code="E_BAD_TEXT", adapter=name, where=file, expected=expected, found=found[:200], fix=fix
    )
    return AdapterInvalid(f"adapter {name!r} brings a {file} that cannot be used", [finding])


def _or(value: float | None, default: float) -> float:
    return default if value is None else value


@dataclass(frozen=True, slots=True)
class ServedModel:
    """The base, or a version of an adapter on it, under one of its names."""

    name: str
    adapter: Adapter | None = None
    """Its handle in the engine, which all names of a digest share; None for the base, and for an adapter that
    is merged into the weights, or for a mixture."""
    source: str = ""
    """The repository that it was built from, with the revision."""
    digest: str = ""
    """The bundle's; empty for the base."""
    ranks: tuple[int, ...] = ()
    """Like the next two empty while unknown: of an older release's generation, until the adapter was loaded."""
    modules: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    weights_bytes: int | None = None
    """Bytes of its matrices, in the storage type; None while they are not known."""
    defaults: AdapterDefaults | None = NO_DEFAULTS
    """None while nobody has read them."""
    load_time: datetime = field(default_factory=lambda: datetime.now(UTC))
    load_s: float = 0.0
    """Seconds that reading, checking and packing it took."""
    mixture: Mixture | None = None
    """Several adapters with scales; only a request has such a model, see `names.blend`."""
    parts: tuple[ServedModel, ...] = ()
    """Those that a mixture is of."""
    affine: bool = False
    """True if it multiplies outputs of the base, or adds biases to them."""
    vocab: int | None = None
    """Its tokens; None: as many as the base has."""
    num_labels: int | None = None
    """Labels of its score head; None where it generates text."""
    kinds: tuple[str, ...] = ()
    """Kinds of the adapter, as in its manifest; empty for the base."""
    replaced: tuple[tuple[str, int], ...] = ()
    """Numbers of rows of embeddings and head that it replaces, by the module's name."""
    licence: str = ""
    """Licence that its repository names; empty where it names none."""

    @property
    def invocation(self) -> tuple[int, ...]:
        """Return the tokens from which on it acts; none where it acts on everything."""
        return self.adapter.invocation if self.adapter is not None else ()

    @property
    def names(self) -> tuple[str, ...]:
        """The names that a request is counted under."""
        return tuple([part.name for part in self.parts]) or (self.name,)


def display_source(repository: Repository) -> str:
    """Say where a model came from, to everybody who may ask; a folder's path is nobody's business."""
    place = repository.label
    place = Path(place).name if repository.source is SourceKind.LOCAL else place
    return f"{place}@{repository.revision}" if repository.revision else place


def require_text(model: ServedModel, *, of_base: bool) -> None:
    """Raise RequestInvalid for text from a model that was trained for scores or vectors.

    Of_base says whether the base generates text; where it does not, no model does.
    """
    parts = model.parts or (model,)
    silent = next((each for each in parts if not (of_base and SILENT.isdisjoint(each.kinds))), None)
    if silent is None:
        return
    found, fix = "one that makes vectors of texts", "Ask /v1/embeddings for them."
    if silent.num_labels is not None:
        found = "one that classifies texts"
        fix = "Ask /classify, /score or /rerank for its scores, or /v1/embeddings for vectors."
    if AdapterKind.TOKEN_CLASSIFIER in silent.kinds:
        found, fix = "one that classifies tokens", "Ask /classify for entities, or /v1/embeddings for vectors."
    raise refused_model(silent.name, "a model that generates text", found, fix)


def refused_model(name: str, expected: str, found: str, fix: str = "") -> RequestInvalid:
    """Return the fault of a model that does something else than it is asked for."""
    problem = "the model does not support this API."
    return RequestInvalid.of_field(problem, "model", expected, f"{name}, {found}", fix)
