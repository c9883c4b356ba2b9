"""Expected outputs of an adapter, computed from its own files by a reference, and recorded in its manifest."""

from typing import Annotated, Final

from pydantic import Field

from loramux_shared.deployment import Model

Finite = Annotated[float, Field(allow_inf_nan=False)]
Token = Annotated[int, Field(ge=0)]
PROBE_LENGTHS: Final = (5, 9, 14, 20)
"""Tokens of the probes that are written: 48 in all, which a replica computes in one step."""


class ProbeLogprob(Model):
    """A token and its log probability."""

    id: Token
    logprob: Finite


class Probe(Model):
    """A sequence, and the most likely tokens behind it; best first."""

    tokens: tuple[Token, ...] = Field(min_length=1)
    top: tuple[ProbeLogprob, ...] = Field(min_length=1)


class Effect(Model):
    """The contribution of a row of the bundle to its module's output, at the last tokens of the probes.

    The outputs of all probes are one vector, probe after probe; dots are its products with eight fixed sign
    vectors, see docs/reference/bundle-format.md.
    """

    norm: Finite = Field(ge=0)
    dots: tuple[Finite, ...] = Field(min_length=8, max_length=8)


class Proof(Model):
    """Replayed by a replica before it serves the adapter."""

    probes: tuple[Probe, ...] = Field(min_length=1)
    effects: tuple[Effect, ...]
    """One per row of the manifest, in its order."""
