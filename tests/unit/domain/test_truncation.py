"""Truncation of adapters to a lower rank."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from builder_service.domain.low_rank import best_approximation
from builder_service.pipeline.context import BuildContext
from builder_service.pipeline.validate import check_deployment
from loramux.messages import deployment_from_message, deployment_to_message
from loramux_shared.bundle.reader import Bundle
from loramux_shared.deployment import Deployment
from loramux_shared.faults import AdapterInvalid, DeploymentInvalid
from tests.support import folders
from tests.support.adapters import tensors, write_adapter, write_base
from tests.support.folders import context_of, deployment_of


def pair(rank: int, features: int = 40, out: int = 24) -> tuple[Any, Any]:
    """A and B with values of all sizes."""
    draw = np.random.default_rng(rank)
    a = draw.normal(size=(rank, features)) * np.logspace(0, -3, rank)[:, None]
    return a.astype(np.float32), draw.normal(size=(out, rank)).astype(np.float32)


@pytest.mark.parametrize(("rank", "to"), [(16, 4), (16, 1), (32, 16), (30, 28), (24, 24)])
def test_it_is_the_best_of_its_rank(rank: int, to: int) -> None:
    """The product is that of numpy's SVD of the whole matrix, cut; so is the error, which no rank can beat."""
    a, b = pair(rank)
    low = best_approximation(a, b, 1.7, to)
    whole = 1.7 * b.astype(np.float64) @ a
    u, values, vt = np.linalg.svd(whole, full_matrices=False)
    best = (u[:, :to] * values[:to]) @ vt[:to]
    np.testing.assert_allclose(low.b.astype(np.float64) @ low.a, best, atol=1e-5 * values[0])
    expected = np.linalg.norm(whole - best) / np.linalg.norm(whole)
    assert low.error == pytest.approx(expected, rel=1e-6, abs=1e-12)
    assert (low.a.shape, low.b.shape) == ((min(to, 24), 40), (24, min(to, 24)))


def test_it_is_the_same_bytes_every_time_and_signs_are_fixed() -> None:
    """The largest element of every row of A is positive, whatever LAPACK returned, and nothing is drawn."""
    a, b = pair(12)
    first, again = best_approximation(a, b, 0.5, 5), best_approximation(a.copy(), b.copy(), 0.5, 5)
    assert (first.a.tobytes(), first.b.tobytes()) == (again.a.tobytes(), again.b.tobytes())
    assert (first.a[np.arange(5), np.abs(first.a).argmax(1)] > 0).all()
    turned = best_approximation(-a, -b, 0.5, 5)
    np.testing.assert_allclose(turned.a, first.a, atol=1e-6)


@pytest.fixture
def context(tmp_path: Path) -> BuildContext:
    """A workshop over an empty store, a base, and an adapter of rank 8 and 4."""
    write_base(tmp_path / "base")
    values = tensors(("q_proj",), rank=8) | tensors(("v_proj",), rank=4)
    write_adapter(tmp_path / "wide", values, r=8, rank_pattern={"v_proj": 4})
    return context_of(tmp_path)


def deployment(folder: Path, **lora: Any) -> Deployment:
    return deployment_of(folder, "wide", lora_configuration={"dtype": "float32"} | lora)


def built(required: Deployment, context: BuildContext) -> Bundle:
    return folders.run_build(required, context).bundle("wide")


def test_a_rank_above_the_ceiling_is_refused_unless_truncation_is_wished(tmp_path: Path, context: BuildContext):
    """max_lora_rank alone never changes an adapter; truncate_to_rank does, and records the loss."""
    with pytest.raises(AdapterInvalid, match="E_RANK_MAX"):
        built(deployment(tmp_path, max_lora_rank=4), context)
    whole = built(deployment(tmp_path), context)
    cut = built(deployment(tmp_path, max_lora_rank=4, truncate_to_rank=4), context)
    assert cut.manifest.ranks == (4,)
    for row, full in zip(cut.rows, whole.rows, strict=True):
        product, original = row.b.astype(np.float64) @ row.a, full.b.astype(np.float64) @ full.a
        error = np.linalg.norm(original - product) / np.linalg.norm(original)
        if full.row.rank == 8:
            assert row.row.truncation.rank == 8
            assert row.row.truncation.error == pytest.approx(error, rel=1e-3)
            assert row.row.norm_ba == pytest.approx(np.linalg.norm(product), rel=1e-4)
        else:
            assert row.row.truncation is None
            assert error == 0
    [warning] = [item for item in cut.manifest.warnings if item.code == "W_TRUNCATED"]
    worst = max(row.row.truncation.error for row in cut.rows if row.row.truncation)
    assert (warning.where, f"{worst:.2e}" in warning.found) == ("2 of 4 rows", True)


def test_it_cannot_be_above_the_ceiling(tmp_path: Path, context: BuildContext) -> None:
    """A rank of truncation above the largest rank is refused with its field."""
    with pytest.raises(DeploymentInvalid) as error:
        check_deployment(deployment(tmp_path, max_lora_rank=8, truncate_to_rank=9))
    assert error.value.findings[0].where == "build.lora_configuration.truncate_to_rank"


def test_the_wish_travels_to_the_builder(tmp_path: Path) -> None:
    """Truncation and proof are part of the message, and so of a build's identity."""
    expected = deployment(tmp_path, truncate_to_rank=3)
    expected = expected.model_copy(update={"build": expected.build.model_copy(update={"prove": True})})
    assert deployment_from_message(deployment_to_message(expected)) == expected
