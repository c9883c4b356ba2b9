"""A request that goes from replica to replica: which ones it asks, and when it gives up."""

from __future__ import annotations

import pytest

from loramux.placement import Placement, order
from loramux_fleet.trip import TRIES, Trip
from loramux_shared.faults import (
    Fault,
    ModelNotFound,
    QueueFull,
    ReplicaBehind,
    ServerUnavailable,
    ShuttingDown,
)
from tests.unit.client.test_placement import REPLICAS


def trip(placement: Placement, repeat: bool = True) -> Trip:
    """A request for ``support`` without a deadline."""
    return Trip(placement, "support", None, repeat=repeat)


def travel(placement: Placement, fault: Fault) -> tuple[list[str], Fault]:
    """Return the replicas that a request tries when all fail so, and its final fault."""
    way, query = trip(placement), []
    try:
        while True:
            query.append(way.begin())
            way.failed(fault)
    except Fault as raised:
        return query, raised


def test_a_trip_asks_everyone_once() -> None:
    """A trip tries every unreachable replica once; the fault has their number, and nothing stays counted."""
    placement = Placement(REPLICAS, 0.0)
    query, fault = travel(placement, ServerUnavailable("down"))
    assert query == list(order("support", REPLICAS))
    assert fault.message == "none of 5 replicas took it; the last: down"
    assert not any(placement._open.values())


@pytest.mark.parametrize("fault", [QueueFull("full"), ShuttingDown("leaving"), ReplicaBehind("behind")])
def test_few_are_asked_that_refuse(fault: Fault) -> None:
    """A fleet that is full is not asked from end to end by every request."""
    query, raised = travel(Placement(REPLICAS), fault)
    assert len(query) == TRIES < len(REPLICAS)
    assert type(raised) is type(fault)


def test_what_another_cannot_help_is_raised() -> None:
    """An unknown model, a started answer and a request that must not run twice are not retried."""
    for fault, repeat, answered in (
        (ModelNotFound("no model"), True, False),
        (ServerUnavailable("cut"), True, True),
        (ServerUnavailable("cut"), False, False),
    ):
        way = trip(Placement(REPLICAS), repeat)
        way.begin()
        with pytest.raises(type(fault)) as caught:
            way.failed(fault, answered=answered)
        assert caught.value is fault


def test_what_concerns_one_adapter_is_nothing_of_the_replica() -> None:
    """A replica that is behind keeps its other models; one that is full is left alone as long as it says."""
    placement = Placement(REPLICAS, 0.0)
    first, second, *_ = order("support", REPLICAS)
    for fault, found in ((ReplicaBehind("behind"), first), (QueueFull("full"), second)):
        way = trip(placement)
        way.begin()
        way.failed(fault)
        assert trip(placement).begin() == found
