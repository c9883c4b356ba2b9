"""The store that a replica reads."""

from __future__ import annotations

from typing import Final

from loramux_shared.settings import InferenceSettings
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
