"""Scaling of the replicas: as many as hold all sequences, those that wait included."""

import math
from typing import Any

from ray.serve.config import AutoscalingContext


def by_sequences(context: AutoscalingContext) -> tuple[float, dict[str, Any]]:
    """Return the replicas that hold what runs and waits, each its `target_ongoing_requests`.

    Sequences count where they are more than the requests that Ray knows: one may ask for many answers. Ray
    applies delays and bounds.
    """
    metrics = context.aggregated_metrics or {}
    sequences = sum(sum(metrics.get(name, {}).values()) for name in ("running", "waiting"))
    assert context.config is not None  # noqa: S101 - Ray gives it
    target = context.config.get_target_ongoing_requests()
    return math.ceil(max(context.total_num_requests, sequences) / target), {}
