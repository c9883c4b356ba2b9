"""A builder process among others that publish one deployment at once."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from multiprocessing.connection import Connection
from os import environ

from loramux_shared.bundle.deployments import publish_generation
from loramux_shared.bundle.generation import BaseRecord, Generation
from loramux_shared.deployment import Dtype, Repository, SourceKind
from loramux_shared.storage.open import open_store


def publishes(uri: str, first: int, count: int, peer: Connection, variables: Mapping[str, str]) -> None:
    """Publish so many generations once the other end says so; tells it the number of each."""
    environ.update(variables)
    store = open_store(uri)
    base = BaseRecord(source=Repository(source=SourceKind.HF, repo="org/base", revision="0" * 40), files={})
    peer.send("ready")
    assert peer.recv() == "go"
    for i in range(count):
        required = Generation(
            deployment="tiny", number=1, create_time=datetime.now(UTC), served_model_name="tiny", base=base,
            adapters={}, max_seq_len=first + i, max_lora_rank=8, lora_dtype=Dtype.BFLOAT16,
        )  # fmt: skip
        peer.send(publish_generation(store, required).number)
