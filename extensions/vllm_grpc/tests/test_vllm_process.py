"""The inference service as a process, with an address that stands for one model."""

from __future__ import annotations

import pytest

from inference_service import __main__ as process_of
from loramux_shared import extensions
from loramux_shared.faults import SettingsInvalid
from loramux_shared.settings import InferenceSettings


def test_without_this_extension_there_are_no_addresses_of_models(monkeypatch: pytest.MonkeyPatch) -> None:
    """The start is refused before the load, and names the missing package."""
    settings = InferenceSettings(deployment="any", model_ports=("wide=127.0.0.1:0",))
    process_of.require_services_of_models(settings)
    monkeypatch.setattr(extensions, "find_spec", lambda _: None)
    with pytest.raises(SettingsInvalid, match="LORAMUX_MODEL_PORTS is set: expected an extension"):
        process_of.require_services_of_models(settings)
    process_of.require_services_of_models(InferenceSettings(deployment="any"))
