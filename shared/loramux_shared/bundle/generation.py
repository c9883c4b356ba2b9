"""The generations of a deployment: the records that name bundles.

::

    deployments/<name>/generations/<n>.json            immutable
    deployments/<name>/generations/<n>.json.sig        its signature, where a builder signs
    deployments/<name>/claims/<n>-<token>              empty; a builder is about to write generation n
    deployments/<name>/resolved/<adapter>              empty; put again while requests use it
    deployments/<name>/current.json                    which generation is served, with its digest
    builds/<name>/<place>-<id>-<builder>.json          an accepted change that has not ended
    builders/<builder>.json                            put again while the builder lives
"""

from __future__ import annotations

from datetime import datetime
from typing import Final, Literal

from pydantic import Field

from loramux_shared.bundle.manifest import (
    FORMAT_VERSION,
    AdapterSummary,
    FileDigest,
    Record,
    Sha256,
    Tokens,
    apart,
)
from loramux_shared.bundle.names import ModelNames, StoredName
from loramux_shared.deployment import Aliases, Dtype, Merge, Model, ModelLimits, Repository, Resolve
from loramux_shared.faults import DeploymentInvalid
from loramux_shared.runtime import Pooling, ReasoningParser, Rounding, ToolParser, ToolParserName, unset

BUILDS_PREFIX: Final = "builds/"
BUILDERS_PREFIX: Final = "builders/"
DEPLOYMENTS_PREFIX: Final = "deployments/"
CONVERTER: Final = 1
"""Raised when the same adapter would be judged otherwise or give another bundle: then all are built again."""


class AdapterRecord(Model):
    """An adapter of a generation."""

    digest: str = Sha256
    source: Repository
    """Repository with the resolved revision."""
    summary: AdapterSummary | None = Field(default=None, exclude_if=unset)
    """None in generations of older releases, as are the next two."""
    listing: str | None = Field(default=None, pattern=r"^[0-9a-f]{64}$", exclude_if=unset)
    """sha256 of what the source said of the files when it was asked for them: where it says the same again,
    nothing of the adapter has changed. None where a source says nothing that can be relied on."""
    converter: int | None = Field(default=None, ge=1, exclude_if=unset)
    """The builder's rules and arithmetic by which the bundle was made; see `CONVERTER`."""
    invocation_tokens: Tokens = Field(default=(), exclude_if=unset)
    """Those of its manifest."""
    licence: str = Field(default="", exclude_if=lambda licence: not licence)
    """Licence that the repository names."""
    added: bool = Field(default=False, exclude_if=lambda added: not added)
    """True if it came by an update or a push. A build of the deployment's file leaves it where it is."""

    @property
    def apart(self) -> str:
        """Why it is never merged into the weights; empty: it may be."""
        if self.summary is None:
            return apart(self.invocation_tokens, ())
        summary = self.summary
        return apart(self.invocation_tokens, summary.modules, summary.vocab, summary.num_labels)

    def same_content(self, other: AdapterRecord) -> bool:
        """True when only what sources say of the same files differs."""
        return self is other or self == other.model_copy(update={"listing": self.listing})


class BaseRecord(Model):
    """The base checkpoint of a generation."""

    source: Repository
    """Repository with the resolved revision."""
    files: dict[str, FileDigest]
    """Every file that serving needs, by its path in the repository's subfolder."""
    licence: str = Field(default="", exclude_if=lambda licence: not licence)
    """Licence that the repository names."""

    @property
    def weights_bytes(self) -> int:
        """Bytes of the files of weights."""
        return sum(file.size for name, file in self.files.items() if name.endswith((".safetensors", ".gguf")))


class SpeculatorRecord(Model):
    """The draft model of a generation."""

    model: BaseRecord
    tokens: int = Field(ge=1)
    """Tokens of a request that are drafted in a step, at most."""


class Recipe(Model):
    """The settings of a build that a generation does not tell otherwise: what comes in later obeys them too."""

    truncate_to_rank: int | None = Field(default=None, ge=1)
    prove: bool = False
    signed_by: tuple[str, ...] = Field(default=(), exclude_if=lambda signers: not signers)
    """Signers that each adapter must have."""


class Generation(Record):
    """A generation of a deployment; immutable."""

    format_version: Literal[1] = FORMAT_VERSION
    deployment: StoredName
    number: int = Field(ge=1)
    create_time: datetime
    served_model_name: StoredName
    base: BaseRecord
    adapters: dict[StoredName, AdapterRecord]
    max_seq_len: int | None = None
    max_lora_rank: int
    lora_target_modules: tuple[str, ...] = ()
    lora_dtype: Dtype
    request_default_max_tokens: int | None = None
    speculative_tokens: int | None = Field(default=None, ge=0, exclude_if=unset)
    speculator: SpeculatorRecord | None = Field(default=None, exclude_if=unset)
    quantization: Rounding = Field(default=Rounding.NONE, exclude_if=lambda kind: kind is Rounding.NONE)
    tensor_parallel_count: int = Field(default=1, ge=1, exclude_if=lambda count: count == 1)
    tool_parser: ToolParserName = Field(
        default=ToolParser.AUTO, exclude_if=lambda name: name is ToolParser.AUTO
    )
    pooling: Pooling | None = Field(default=None, exclude_if=unset)
    reasoning_parser: ReasoningParser = Field(
        default=ReasoningParser.AUTO, exclude_if=lambda name: name is ReasoningParser.AUTO
    )
    serve_base: bool = True
    merge: Merge = Merge.AUTO
    aliases: Aliases = Field(default_factory=dict, exclude_if=unset)
    """May name adapters that later generations do not have, while one of the others answers."""
    limits: ModelLimits = Field(default_factory=ModelLimits, exclude_if=lambda limits: limits == ModelLimits())
    resolve: Resolve | None = Field(default=None, exclude_if=unset)
    recipe: Recipe | None = Field(default=None, exclude_if=unset)
    """None in generations of older releases."""
    changes: tuple[str, ...] = Field(default=(), max_length=10_000, exclude_if=lambda ids: not ids)
    """Ids of the changes that led here, the newest first, so that none is applied again."""

    @property
    def merged(self) -> str | None:
        """The adapter that is merged into the weights at load, if one is."""
        if len(self.adapters) != 1 or self.serve_base or self.merge is Merge.NEVER:
            return None
        return next((name for name, record in self.adapters.items() if not record.apart), None)

    @property
    def drafted(self) -> int | None:
        """Return the tokens of a request that are drafted in a step, at most; None: the device's default."""
        return self.speculative_tokens if self.speculator is None else self.speculator.tokens

    @property
    def names(self) -> ModelNames:
        """The names that it serves."""
        merge_always = self.merge is Merge.ALWAYS
        return ModelNames(self.served_model_name, self.adapters, self.aliases, self.serve_base, merge_always)

    def check_names(self) -> None:
        """Raise `DeploymentInvalid` if its names conflict: it must not be published."""
        if findings := list(self.names.findings()):
            raise DeploymentInvalid(f"deployment {self.deployment}: its names conflict", findings)

    def same_content(self, other: Generation) -> bool:
        """True when only number and time differ, and what sources say of files that are the same."""
        if self.adapters.keys() != other.adapters.keys():
            return False
        aside = {
            "number": self.number,
            "create_time": self.create_time,
            "adapters": {},
            "changes": self.changes,
        }
        return self.model_copy(update={"adapters": {}}) == other.model_copy(update=aside) and all(
            record.same_content(other.adapters[name]) for name, record in self.adapters.items()
        )


class Current(Record):
    """The one mutable object of a deployment: which generation is served."""

    generation: int = Field(ge=1)
    sha256: str = Sha256
    """SHA-256 of the generation's bytes."""


def generation_key(deployment: str, number: int) -> str:
    """Return the key of a generation; numbers are padded, so that listings are in order."""
    return f"deployments/{deployment}/generations/{number:08d}.json"


def signature_key(key: str) -> str:
    """Return the key of the signature of a generation."""
    return f"{key}.sig"


def claim_key(deployment: str, number: int, token: str) -> str:
    """Return the key of a builder's claim to a number that it will publish a generation under."""
    return f"deployments/{deployment}/claims/{number:08d}-{token}"


def resolved_key(deployment: str, name: str = "") -> str:
    """Return the key that marks an adapter as added by a request; without a name, the prefix of all of them."""
    return f"deployments/{deployment}/resolved/{name}"


def current_key(deployment: str) -> str:
    """Return the key of the pointer to the served generation."""
    return f"deployments/{deployment}/current.json"
