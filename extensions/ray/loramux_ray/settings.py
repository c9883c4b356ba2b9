"""Settings of the engine under Ray, whose proxies are the servers."""

from collections.abc import Mapping
from typing import Any, Final

from loramux_shared.faults import SettingsInvalid
from loramux_shared.settings import InferenceSettings, load_settings

ADDRESSES: Final = ("grpc", "http")
"""Settings that name addresses, which Ray has.

Variables of these on a node may be there for another service.
"""


def engine_settings(values: Mapping[str, Any]) -> InferenceSettings:
    """Return settings from values by name, and the environment where those say nothing.

    Raises:
        SettingsInvalid: one is unknown, wrong, or of a server that Ray does not have.
    """
    settings = load_settings(InferenceSettings, **values)
    wrong = [
        f"{name}: Ray's proxies listen where Ray is told" for name in ADDRESSES if values.get(name) is not None
    ]
    if wrong:
        raise SettingsInvalid("; ".join(wrong))
    return settings
