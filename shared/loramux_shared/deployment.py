"""A deployment: one base checkpoint, named adapters, a few settings. `deployment_file` reads it."""

from __future__ import annotations

import re
from enum import StrEnum
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, field_validator, model_validator

from loramux_shared.bundle.names import ModelNames, Name
from loramux_shared.runtime import (
    Limits,
    ReasoningParser,
    Rounding,
    ToolParser,
    ToolParserName,
    VectorPooling,
    unset,
)
from loramux_shared.signatures import is_file, parse_signer

DEFAULT_MAX_LORA_RANK = 64


class SourceKind(StrEnum):
    """A kind of source of repositories."""

    HF = "HF"
    S3 = "S3"
    GCS = "GCS"
    AZURE = "AZURE"
    REMOTE_URL = "REMOTE_URL"
    OCI = "OCI"
    MLFLOW = "MLFLOW"
    LOCAL = "LOCAL"
    PUSHED = "PUSHED"
    """Sent to the builder by PutAdapter; ``repo`` is the name under which it was."""
    BY_SCHEME = "BY_SCHEME"
    """Added by a package, and named by the scheme of the address: ``myhub://...``."""


SCHEMES = {
    "s3://": SourceKind.S3,
    "gs://": SourceKind.GCS,
    "azure://": SourceKind.AZURE,
    "https://": SourceKind.REMOTE_URL,
    "oci://": SourceKind.OCI,
    "mlflow://": SourceKind.MLFLOW,
}
"""The kinds that have a scheme of their own. All others, of new sources too, are BY_SCHEME."""
SPELLINGS = {"hf://": "hf:", "huggingface://": "hf:", "huggingface:": "hf:", "gcs://": "gs://"}
"""How other tools begin an address, and how loramux does."""
RESOLVED = rf"^(hf:[^\s@#?]+(@[^\s@#?]+)?|({'|'.join((*SPELLINGS, *SCHEMES))})[^\s@#?]+)$"
"""A pattern of repositories, of the hub's with one of revisions; folders of the builder's machine have none."""
PULL_REQUESTS = "refs/pr/"
"""Prefix of the revisions of a hub that any of its users may write."""


def spelled(address: str) -> str:
    """Return an address that begins as loramux writes it."""
    other = next(filter(address.startswith, SPELLINGS), None)
    return address if other is None else SPELLINGS[other] + address.removeprefix(other)


def scheme_of(address: str) -> str:
    """Return the scheme of an address, ``myhub://``; empty where it has none."""
    found = re.match(r"[a-z][a-z0-9+.-]*://", address)
    return found[0] if found else ""


class Dtype(StrEnum):
    """Storage types of a bundle's weights."""

    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"
    FLOAT32 = "float32"

    @property
    def itemsize(self) -> int:
        """Bytes of a value."""
        return 4 if self is Dtype.FLOAT32 else 2


class Merge(StrEnum):
    """When an adapter is merged into the weights."""

    AUTO = "auto"
    NEVER = "never"
    ALWAYS = "always"


class Model(BaseModel):
    """Frozen, and strict about unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Repository(Model):
    """A repository at a revision."""

    source: SourceKind
    """Kind of source."""
    repo: str = Field(min_length=1, max_length=4096)
    """``namespace/name`` for HF, an absolute directory for LOCAL, a name for PUSHED, else an address."""
    revision: str = ""
    """Branch, tag or commit (HF); else a digest: of archive (REMOTE_URL), manifest (OCI), or the used files,
    behind the version or run and a hyphen (MLFLOW)."""
    subfolder: str = ""
    """A folder inside the repository that holds the files; of HF also a file of GGUF."""
    runtime_secret_name: str = ""
    """The name of the secret that opens the repository; never the secret."""
    branches_only: bool = Field(default=False, exclude_if=lambda only: not only)
    """True: the revision must be a commit of a branch or tag (HF). A pull request, which any user of the hub
    may open, is refused, by its name and by its commits."""

    @field_validator("repo", "revision", "subfolder", "runtime_secret_name")
    @classmethod
    def _without_nul(cls, value: str) -> str:
        if "\0" in value:
            raise ValueError("text without NUL bytes")
        return value

    @field_validator("subfolder")
    @classmethod
    def _stays_inside(cls, value: str) -> str:
        if value.startswith("/") or ".." in value.split("/"):
            raise ValueError("must be a relative path inside the repository")
        return value.strip("/")

    @model_validator(mode="after")
    def _names_its_source(self) -> Repository:
        if self.source is SourceKind.BY_SCHEME and not scheme_of(self.repo):
            raise ValueError("an address that begins with the scheme of its source, as myhub://")
        return self

    @property
    def source_name(self) -> str:
        """The name of its source: the kind, or the scheme of one that a package adds."""
        return scheme_of(self.repo) if self.source is SourceKind.BY_SCHEME else self.source

    @property
    def label(self) -> str:
        """``repo`` for messages, logs and records: without what in an address may be secret."""
        if self.source in {SourceKind.HF, SourceKind.LOCAL, SourceKind.PUSHED}:
            return self.repo
        address = re.split(r"[?#]", self.repo, maxsplit=1)[0]
        # Before the alias of an MLflow model stands its name, which has no colon.
        password = "[^/]*:" if self.source is SourceKind.MLFLOW else ""
        return re.sub(rf"//{password}[^/]*@", "//", address)

    def __repr_args__(self) -> Any:
        for name, value in super().__repr_args__():
            yield name, self.label if name == "repo" else value


class LoraConfiguration(Model):
    """Ceilings for all adapters of the deployment."""

    max_lora_rank: int = Field(default=DEFAULT_MAX_LORA_RANK, ge=1, le=4096)
    """An adapter above it is refused, never truncated, unless truncate_to_rank asks for it."""
    truncate_to_rank: int | None = Field(default=None, ge=1, le=4096)
    """An explicit wish: rows of a higher rank are replaced by their best approximation of this rank."""
    lora_target_modules: tuple[str, ...] = ()
    """When given, an adapter that targets more is refused. Empty: taken from the adapters."""
    dtype: Dtype | None = None
    """Storage type of the bundles; the base checkpoint's when not given."""


class Build(Model):
    """The base and the adapters to build."""

    base_model: str = "decoder"
    """Kept for compatibility; only ``decoder`` is served."""
    checkpoint_repository: Repository
    """The base checkpoint."""
    max_seq_len: int | None = Field(default=None, ge=2)
    """Tokens of prompt and answer together; the model's own maximum when not given."""
    lora_adapters: dict[Name, Repository] = Field(default_factory=dict)
    """Adapters by the name under which they are served; no two of them, and the base's, differ only in case."""
    lora_configuration: LoraConfiguration = LoraConfiguration()
    """Ceilings for all adapters."""
    tensor_parallel_count: int = Field(default=1, ge=1, le=64)
    """Processes that compute the base of a replica together, on a GPU each: docs/guides/fleet.md says when. A
    replica's ``LORAMUX_TENSOR_PARALLEL`` comes first."""
    prove: bool = False
    """Record in every bundle what it should answer; replicas replay it before they serve. Needs torch."""
    signed_by: tuple[str, ...] = ()
    """Signers of which each adapter must have one, also one that is added later.

    Files of public keys or certificates (PEM), beside this file, or ``sigstore:ISSUER#IDENTITY``.
    """
    base_signed_by: tuple[str, ...] = ()
    """The same of the base checkpoint."""

    @model_validator(mode="before")
    @classmethod
    def _older_spelling(cls, data: Any) -> Any:
        """Accept ``max_lora_rank`` directly under ``build``."""
        if isinstance(data, dict) and "max_lora_rank" in data:
            data = dict(data)
            rank = data.pop("max_lora_rank")
            block = data.get("lora_configuration", {})
            if isinstance(block, dict):
                block = {"max_lora_rank": rank} | block
                if block["max_lora_rank"] != rank:
                    # Not a ValueError, which would hide what else is wrong with the build.
                    block["max_lora_rank"] = f"{block['max_lora_rank']} here and {rank} under build"
                data["lora_configuration"] = block
        return data

    @field_validator("signed_by", "base_signed_by")
    @classmethod
    def _signers(cls, words: tuple[str, ...]) -> tuple[str, ...]:
        """Check the signers that are no files; only the reader of the deployment file can read the others."""
        return tuple(word if is_file(word) else parse_signer(word) for word in words)

    @field_validator("base_model")
    @classmethod
    def _only_texts(cls, value: str) -> str:
        # Hosted builders name kinds of models here; config.json says which one a base is.
        if value == "whisper":
            raise ValueError(f"{value!r} reads sound; only models of text are served")
        return value


class ModelLimits(Model):
    """Limits of the models on each replica; those of API keys are in docs/guides/access.md."""

    default: Limits = Field(default_factory=Limits, exclude_if=lambda limits: limits == Limits())
    """Limits of each model that has none of its own: every model has its own count, not a part of one."""
    models: dict[Name, Limits] = Field(default_factory=dict, exclude_if=unset)
    """Limits of single models, by name; a limit that is not given is the default's."""

    def of(self, name: str) -> Limits:
        """Return the limits of a model."""
        own = self.models.get(name)
        return self.default if own is None else own.over(self.default)


Weight = Annotated[int, Field(ge=0, lt=2**31)]
Aliases = dict[Name, dict[Name, Weight]]
"""Names that an alias stands for, and the share of the requests that each of them gets, by alias."""


class Resolve(Model):
    """Adapters that are added when a request names their repository."""

    sources: tuple[Annotated[str, Field(max_length=4096, pattern=RESOLVED), AfterValidator(spelled)], ...] = (
        Field(min_length=1)
    )
    """Patterns of repositories: ``hf:my-org/*``, ``s3://bucket/adapters/*``; ``*`` is one part of a path.
    Those of the hub may end with one of revisions, ``hf:my-org/*@v*``; pull requests need one of their own."""
    max_adapters: int = Field(default=500, ge=1, lt=2**31)
    """Adapters that requests added; beyond it, the least recently used one leaves the deployment."""
    idle_hours: float = Field(default=72.0, gt=0, allow_inf_nan=False)
    """Hours without a request after which an adapter leaves the deployment."""
    runtime_secret_name: str = ""
    """The name of the secret that opens the repositories."""


class Speculator(Model):
    """A smaller base with the same tokenizer, which drafts tokens."""

    model: Repository
    """Its checkpoint. Compiled operations of a CPU round it to int8."""
    tokens: int = Field(default=8, ge=1, le=64)
    """Tokens of a request that are drafted in a step, at most, by prompt lookup too."""


class Runtime(Model):
    """The serving settings of a deployment."""

    served_model_name: Name | None = None
    """The base's name; ``model_name`` when not given."""
    request_default_max_tokens: int | None = Field(default=None, ge=1)
    """New tokens of a request that sets no limit; as many as fit when not given."""
    speculative_tokens: int | None = Field(default=None, ge=0, lt=2**31)
    """Tokens of a request that a step drafts at most, from what it said before. 0: none. A replica's
    ``LORAMUX_SPECULATIVE_TOKENS`` comes first; where neither says it, 8 on a CPU and none on a GPU."""
    speculator: Speculator | None = None
    """A draft model, beside prompt lookup."""
    serve_base: bool = True
    """False: the adapters only; the base's name is then unknown to clients."""
    merge: Merge = Merge.AUTO
    """Merging of the one adapter of a deployment that hides its base into the weights at load. ``always``
    refuses a deployment for which that is impossible."""
    quantization: Rounding = Rounding.NONE
    """Rounding of the base's linears when a replica loads them.

    ``fp8`` is for GPUs. Adapters stay as they are, and none is merged. A replica's ``LORAMUX_QUANTIZATION``
    comes first.
    """
    tool_parser: ToolParserName = ToolParser.AUTO
    """The form in which the models write calls of tools: docs/reference/openai.md has them. ``auto``: what the
    chat template of each shows; ``none``: calls stay text. A replica's ``LORAMUX_TOOL_PARSER`` comes first."""
    pooling: VectorPooling | None = None
    """Pooling of hidden states into a vector where a request names none: docs/guides/embeddings.md."""
    reasoning_parser: ReasoningParser = ReasoningParser.AUTO
    """The marks between which the models reason; the same of ``LORAMUX_REASONING_PARSER``."""
    aliases: Aliases = Field(default_factory=dict)
    """Names that pick one of several models by weight: ``{support: {support-v1: 90, support-v2: 10}}``.
    Requests with the same ``user``, or the same ``x-loramux-key``, get the same one; 0 gets none."""
    limits: ModelLimits = ModelLimits()
    """Limits of the models on each replica."""
    resolve: Resolve | None = None
    """Adapters that requests may add by naming a repository; when not given, an unknown name is refused."""


class NamesInvalid(ValueError):
    """The names of a deployment do not fit together."""


class Deployment(Model):
    """A deployment: what the file says, with every default filled in."""

    model_name: Name
    """Names the deployment in the store and on the command line."""
    build: Build
    """The base and the adapters to build."""
    runtime: Runtime = Runtime()
    """Serving settings."""

    @property
    def served_model_name(self) -> str:
        """The name under which the base is served."""
        return self.runtime.served_model_name or self.model_name

    @property
    def repositories(self) -> tuple[Repository, ...]:
        """Return all that it names: the base, a draft model, adapters."""
        draft = () if self.runtime.speculator is None else (self.runtime.speculator.model,)
        return (self.build.checkpoint_repository, *draft, *self.build.lora_adapters.values())

    @model_validator(mode="after")
    def _names_fit_together(self) -> Deployment:
        runtime, merge_always = self.runtime, self.runtime.merge is Merge.ALWAYS
        adapters = tuple(self.build.lora_adapters)
        names = ModelNames(self.served_model_name, adapters, runtime.aliases, runtime.serve_base, merge_always)
        if findings := list(names.findings(in_file=True)):
            raise NamesInvalid("; ".join(map(str, findings)))
        return self

    @model_validator(mode="after")
    def _limits_are_of_models(self) -> Deployment:
        for name in self.runtime.limits.models:
            if name != self.served_model_name and name not in self.build.lora_adapters:
                raise ValueError(f"models of this deployment in runtime.limits.models, unlike {name}")
        return self

    @model_validator(mode="after")
    def _settings_go_together(self) -> Deployment:
        if self.runtime.speculator is not None and self.runtime.speculative_tokens is not None:
            raise ValueError("runtime.speculator.tokens in place of runtime.speculative_tokens")
        if self.runtime.merge is Merge.ALWAYS and self.runtime.quantization is not Rounding.NONE:
            raise ValueError("runtime.quantization: none where runtime.merge is always")
        return self
