"""The parts of a call beside its message: deadline, and metadata."""

import time
from typing import Any, Final

import grpc

from inference_service.rpc.mapping import texts_of
from inference_service.serving.request import hinted
from loramux_shared.faults import Finding, RequestInvalid
from loramux_shared.routes import MODEL_HEADER

MODEL: Final = MODEL_HEADER
"""Names what answers, where the message has no field for it."""
RANK: Final = "x-data-parallel-rank"
"""vLLM's: which rank is to answer. A replica is one."""


def call_options(context: grpc.aio.ServicerContext, sticky_key: str = "") -> dict[str, Any]:
    """Return the fields of a `Request` that a call says, and not its message.

    Raises:
        RequestInvalid: metadata is wrong, or names another rank than the only one.
    """
    metadata = texts_of(context)
    refuse_rank(metadata.get(RANK, "0"), RANK)
    remaining = context.time_remaining()
    deadline_s = None if remaining is None else time.monotonic() + remaining
    return {"deadline_s": deadline_s} | hinted(metadata, 0, sticky_key)._asdict()


def refuse_rank(rank: object, where: str) -> None:
    """Refuse every rank but the first.

    Raises:
        RequestInvalid: it is another.
    """
    if str(rank) != "0":
        finding = Finding(
            code="E_BAD_FIELD", where=where, expected="0: there is one rank", found=str(rank)[:20]
        )
        raise RequestInvalid("the request names a rank that does not exist.", [finding])
