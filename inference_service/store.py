"""The stores of a replica."""

from typing import Any, Final

from loramux_shared.extensions import need_extension
from loramux_shared.settings import InferenceSettings, variable
from loramux_shared.signatures import signed_store
from loramux_shared.storage.base import Store
from loramux_shared.storage.open import open_store
from loramux_shared.storage.patient import PatientStore

START_PAUSES_S: Final = (1.0,)
"""Pauses before a store that did not answer is asked once more; the supervisor starts the process again."""


def open_replica_store(settings: InferenceSettings) -> Store:
    """Return the store that settings name, which gives only signed generations where they ask for it.

    Raises:
        SettingsInvalid: the address or the signers are no good.
    """
    signed = signed_store(open_store(settings.store), settings.require_signature)
    return PatientStore(signed, pauses_s=START_PAUSES_S)


def open_batches(settings: InferenceSettings) -> Any:
    """Return the files and batches of the store that settings name: what the extension has of them, or None.

    Raises:
        SettingsInvalid: the address is no good, or the extension is not installed.
    """
    if settings.batch_store is None:
        return None
    part = need_extension("batches", f"{variable('batch_store')} is set")
    return part.BatchStore(PatientStore(open_store(settings.batch_store), pauses_s=START_PAUSES_S))
