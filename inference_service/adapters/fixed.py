"""The adapters of a replica that has all of them from its start, and for good."""

from datetime import UTC, datetime

from inference_service.adapters.adapter_set import AdapterSet
from inference_service.adapters.catalog import Catalog
from inference_service.adapters.follower import FollowerStanding
from inference_service.adapters.manager import AdapterManager
from inference_service.adapters.views import Facts
from inference_service.core.adapter import Adapter
from inference_service.engine.scheduling.residents import AdapterState, ResidencyStats, Standing
from loramux_shared.faults import ReplicaBehind


class AllResident:
    """Adapters that have their slots for good: whatever is asked of them is so already."""

    num_bytes = capacity = 0

    def __init__(self, catalog: Catalog) -> None:
        self._catalog = catalog
        self.stats = ResidencyStats()

    def standing(self, adapter: Adapter) -> Standing:
        """Return a standing: resident, with unknown users."""
        return Standing(adapter, AdapterState.RESIDENT)

    def standings(self) -> list[Standing]:
        """All of them."""
        adapters = dict.fromkeys(model.adapter for model in self._catalog.everything)
        return [self.standing(adapter) for adapter in adapters if adapter is not None]

    def pin(self, adapter: Adapter) -> None:
        """Nothing to do, as for the others."""

    unpin = prefetch = drop = pin


class FollowsNothing:
    """Serves the generation of its start."""

    def __init__(self, generation: int) -> None:
        self.standing = FollowerStanding(generation, generation, follows=False)

    async def catch_up(self, number: int) -> None:
        """Return where the generation is new enough; raise ReplicaBehind where it never will be."""
        if number > self.standing.generation:
            raise ReplicaBehind(
                f"expected generation {number} or a newer one, this replica serves "
                f"{self.standing.generation} and follows no deployment. Retry with another replica."
            )


def fixed_manager(catalog: Catalog, facts: Facts | None = None) -> AdapterManager:
    """Return the manager of adapters that were there at the start and never change."""
    adapters = AdapterSet(catalog, AllResident(catalog), lambda command: command())
    facts = facts or Facts("", datetime.now(UTC))
    return AdapterManager(adapters, FollowsNothing(catalog.generation), facts)
