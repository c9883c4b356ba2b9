"""The stores of a replica."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Protocol

from loramux_shared.access.asgi import App
from loramux_shared.ports import required
from loramux_shared.settings import InferenceSettings, variable
from loramux_shared.signatures import signed_store
from loramux_shared.storage.base import Store
from loramux_shared.storage.open import open_store
from loramux_shared.storage.patient import PatientStore


class Batches(Protocol):
    """Files and batches of OpenAI's API."""

    async def work(self, app: App, settings: InferenceSettings, max_queue: int) -> None:
        """Answer batches by an HTTP API, whose engine has a queue of so many, until cancelled."""


@dataclass(frozen=True)
class BatchesOpener:
    """The port of what keeps files and batches of OpenAI's API in a store."""

    open_batches: Callable[[Store], Batches]


START_PAUSES_S: Final = (1.0,)
"""Pauses before a store that did not answer is asked once more; the supervisor starts the process again."""


def open_replica_store(settings: InferenceSettings) -> Store:
    """Return the store that settings name, which gives only signed generations where they ask for it.

    Raises:
        SettingsInvalid: the address or the signers are no good.
    """
    signed = signed_store(open_store(settings.store), settings.require_signature)
    return PatientStore(signed, pauses_s=START_PAUSES_S)


def open_batches(settings: InferenceSettings) -> Batches | None:
    """Return the files and batches of the store that settings name; None where they name none.

    Raises:
        SettingsInvalid: the address is no good, or nothing that is installed keeps batches.
    """
    if settings.batch_store is None:
        return None
    opener = required("batches", BatchesOpener, f"{variable('batch_store')} is set")
    return opener.open_batches(PatientStore(open_store(settings.batch_store), pauses_s=START_PAUSES_S))
