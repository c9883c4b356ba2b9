"""Runtime settings of a deployment: parsers of chat answers, pooling, limits and the range of temperatures."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Final, TypeAlias

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainValidator, WithJsonSchema
from pydantic_core import PydanticKnownError

from loramux_shared.faults import CheckpointInvalid
from loramux_shared.ports import names
from loramux_shared.untrusted_json import JsonInvalid, parse_json


class Rounding(StrEnum):
    """The format to which the weights of a base's linears are rounded when they are loaded."""

    NONE = "none"
    FP8 = "fp8"
    INT8 = "int8"
    INT4 = "int4"

    @property
    def of_head(self) -> Rounding:
        """Return what a head is rounded to: 8 bits of integers, where layers have 4 of them."""
        return {Rounding.INT4: Rounding.INT8, Rounding.FP8: Rounding.NONE}.get(self, self)

    def weight_bytes(self, count: int, item_bytes: int) -> int:
        """Return what so many weights take that would be numbers of item_bytes; without scales of rows."""
        if self is Rounding.INT4:
            return count // 2 + 2 * count // INT4_GROUP
        return count * (item_bytes if self is Rounding.NONE else 1)


INT4_GROUP: Final = 32
"""Values of a row that share a scale at 4 bits."""


class ToolParser(StrEnum):
    """The form in which a model writes calls of tools."""

    AUTO = "auto"
    """The format that the chat template shows."""
    NONE = "none"
    """Calls stay text."""
    HERMES = "hermes"
    QWEN3_CODER = "qwen3_coder"
    LLAMA3_JSON = "llama3_json"
    PYTHONIC = "pythonic"
    OLMO3 = "olmo3"
    TOOL_CODE = "tool_code"
    MISTRAL = "mistral"
    GRANITE = "granite"
    PHI4 = "phi4"
    GEMMA4 = "gemma4"
    FUNCTIONGEMMA = "functiongemma"
    HARMONY = "harmony"


def tool_parser_of(word: object) -> str:
    """Return a `ToolParser`, or the name of a format that a package registers, by a word; raise
    PydanticKnownError for other words.
    """
    if isinstance(word, str) and word in set(ToolParser):
        return ToolParser(word)
    registered = names("tool_format")  # which reads the metadata of all packages
    if isinstance(word, str) and word in registered:
        return word
    *others, last = (repr(str(name)) for name in (*ToolParser, *registered))
    raise PydanticKnownError("enum", {"expected": f"{', '.join(others)} or {last}"})


ToolParserName = Annotated[str, PlainValidator(tool_parser_of, json_schema_input_type=ToolParser)]
"""A `ToolParser`, or the name of a format that a package registers."""


class ReasoningParser(StrEnum):
    """The marks between which a model reasons."""

    AUTO = "auto"
    """The format that the chat template shows."""
    NONE = "none"
    """Reasoning stays text."""
    THINK = "think"
    GRANITE = "granite"
    MISTRAL = "mistral"
    GEMMA4 = "gemma4"
    HARMONY = "harmony"


@dataclass(frozen=True)
class Parsers:
    """The parsers that a deployment, or a replica, sets for all its models."""

    tool: str = ToolParser.AUTO
    """See `ToolParserName`."""
    reasoning: ReasoningParser = ReasoningParser.AUTO


MAX_WEIGHT: Final = 1000.0


def unset(value: object) -> bool:
    """True for what a record leaves out, so that its bytes are those from before the field was there."""
    return value is None or value in ({}, ())


class Limits(BaseModel):
    """Limits of a model or a key. A limit that is not given is no bound, and the weight is 1."""

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    weight: float | None = Field(default=None, gt=0, le=MAX_WEIGHT, allow_inf_nan=False, exclude_if=unset)
    """Weight among models that compete: twice the weight is twice the tokens."""
    max_running: int | None = Field(default=None, ge=1, lt=2**31, exclude_if=unset)
    """Answers that are computed at once; others wait."""
    max_waiting: int | None = Field(default=None, ge=1, lt=2**31, exclude_if=unset)
    """Requests that wait for their first step; one more is refused as RATE_LIMITED."""
    tokens_per_minute: int | None = Field(default=None, ge=1, lt=2**53, exclude_if=unset)
    """Tokens of prompts and answers; after a minute's worth of them, requests are refused as RATE_LIMITED until
    the time for what was used has passed."""

    def over(self, other: Limits) -> Limits:
        """Return these limits, and the other's where these say nothing."""
        return other.model_copy(update=self.model_dump())


MAX_TEMPERATURE: Final = 100.0
"""Temperature at which every token of a usual model is about as likely as any other; 0 is greedy."""


class Pooling(StrEnum):
    """A choice among the hidden states behind the last norm, one for each token."""

    LAST = "last"
    """The hidden state of the last token."""
    MEAN = "mean"
    """Their mean."""
    CLS = "cls"
    """The hidden state of the first token, which has seen all others in an encoder alone."""
    ALL = "all"
    """All of them, one behind another: what heads of token classification read. No request names it."""
    SPARSE = "sparse"
    """For each token of the vocabulary the largest score over all of them, by the head of masked language
    modelling, as log(1 + score), and 0 for negative ones: SPLADE. No request names it."""


OF_DECODERS: Final = (Pooling.LAST, Pooling.MEAN)
OF_ENCODERS: Final = (Pooling.CLS, Pooling.MEAN, Pooling.LAST)


def _pooling_of(word: object) -> Pooling:
    """Return a pooling that makes one vector of a text; raise PydanticKnownError for other words."""
    if word not in OF_ENCODERS:
        raise PydanticKnownError("enum", {"expected": "'last', 'mean' or 'cls'"})
    return Pooling(str(word))


VectorPooling: TypeAlias = Annotated[
    Pooling,
    BeforeValidator(_pooling_of),
    WithJsonSchema({"type": "string", "enum": [Pooling.LAST, Pooling.MEAN, Pooling.CLS]}),
]

FILE: Final = "1_Pooling/config.json"
"""Pooling config of a base that was trained for vectors with sentence-transformers."""
MODES: Final = {
    **dict.fromkeys(("cls", "cls_token"), Pooling.CLS),
    **dict.fromkeys(("mean", "mean_tokens"), Pooling.MEAN),
    "lasttoken": Pooling.LAST,
}
"""Names of the modes there: in ``pooling_mode``, or each as a switch of its own."""


def pooling_in(folder: Path, *, encodes: bool = False) -> Pooling | None:
    """Return how the base in a folder was trained to make vectors.

    LAST where it says nothing, and MEAN of an encoder. None where it says what is not served: the beginning of
    a decoder, a maximum, weighted means, or several together. Raise CheckpointInvalid where the file is no JSON
    object.
    """
    fields = _read_object(folder, FILE)
    if fields is None:
        return Pooling.MEAN if encodes else Pooling.LAST
    mode = fields.get("pooling_mode")
    chosen = [mode] if mode is not None else [name for name in fields if fields[name] is True]
    modes = [str(name).removeprefix("pooling_mode_") for name in chosen if name not in ("include_prompt",)]
    found = MODES.get(modes[0]) if len(modes) == 1 else None
    return found if found in (OF_ENCODERS if encodes else OF_DECODERS) else None


PROMPTS: Final = "config_sentence_transformers.json"
"""Config of sentence-transformers, with the texts that a base was trained to read in front of others."""


def prompts_in(folder: Path) -> dict[str, str]:
    """Return these texts by their names; none where they are left out of the mean, which is not served.

    Raise CheckpointInvalid where a file is no JSON object, or they are no texts.
    """
    prompts = (_read_object(folder, PROMPTS) or {}).get("prompts") or {}
    if not isinstance(prompts, dict) or not all(isinstance(each, str) for each in prompts.values()):
        raise CheckpointInvalid(
            f"the base's {PROMPTS}: expected texts by their names as prompts. Correct or remove it."
        )
    return {} if (_read_object(folder, FILE) or {}).get("include_prompt") is False else prompts


def _read_object(folder: Path, name: str) -> dict[str, Any] | None:
    """Return an object of a base's file; None where it has none."""
    path = folder / name
    if not path.exists():
        return None
    try:
        fields = parse_json(path.read_bytes())
    except JsonInvalid as error:
        raise CheckpointInvalid(f"the base's {name} is not valid JSON. Correct or remove it.") from error
    if not isinstance(fields, dict):
        raise CheckpointInvalid(f"the base's {name} must be an object. Correct or remove it.")
    return fields
