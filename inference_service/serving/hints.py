"""What headers, or gRPC's metadata, say of the version that is to answer."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Final

from loramux_shared.faults import Finding, RequestInvalid

MIN_GENERATION: Final = "x-loramux-min-generation"
STICKY_KEY: Final = "x-loramux-key"
MAX_GENERATION: Final = 2**63 - 1


def hinted(headers: Mapping[str, str], min_generation: int = 0, sticky_key: str = "") -> dict[str, Any]:
    """Return the fields of a request that are also said in headers, from these and from the body's own.

    Of two generations the higher one counts, and a header's key comes before the body's: proxies set headers.

    Raises:
        RequestInvalid: a header is no number, or the number is none of a generation.
    """
    said = headers.get(MIN_GENERATION, "0")
    if not re.fullmatch(r"[0-9]{1,19}", said):
        raise _out_of_bounds(MIN_GENERATION, repr(said[:80]))
    wanted = max(int(said), min_generation)
    if wanted > MAX_GENERATION:
        raise _out_of_bounds("min_generation", str(wanted))
    return {"min_generation": wanted, "sticky_key": headers.get(STICKY_KEY) or sticky_key}


def _out_of_bounds(where: str, found: str) -> RequestInvalid:
    finding = Finding(
        code="E_BAD_FIELD",
        where=where,
        expected=f"the number of a generation, 0 to {MAX_GENERATION}",
        found=found,
    )
    return RequestInvalid("the request asks for no generation.", [finding])
