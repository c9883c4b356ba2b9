"""Generations of a deployment as a build would publish them."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from loramux_shared.bundle.generation import AdapterRecord, BaseRecord, Generation
from loramux_shared.deployment import Dtype, Repository, SourceKind

if TYPE_CHECKING:
    from inference_service.adapters.catalog import Catalog


def _source(name: str) -> Repository:
    return Repository(source=SourceKind.HF, repo=f"org/{name}", revision="0" * 40)


def record(name: str, **fields: Any) -> AdapterRecord:
    """An adapter, whose digest follows from its name."""
    return AdapterRecord(
        **({"digest": name.encode().hex().ljust(64, "0")[:64], "source": _source(name)} | fields)
    )


def generation(*names: str, **fields: Any) -> Generation:
    values = {
        "deployment": "tiny", "number": 1, "create_time": datetime(2026, 1, 1, tzinfo=UTC),
        "served_model_name": "tiny", "base": BaseRecord(source=_source("base"), files={}),
        "adapters": {name: record(name) for name in names}, "max_lora_rank": 8, "lora_dtype": Dtype.BFLOAT16,
    }  # fmt: skip
    return Generation(**(values | fields))


def change_deployed(catalog: Catalog, **fields: Any) -> None:
    """Give the generation that a catalog serves other values of fields, and leave its models."""
    catalog.deployed = catalog.deployed.model_copy(update=fields)
