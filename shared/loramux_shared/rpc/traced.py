"""The spans of gRPC calls."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

import grpc

from loramux_shared.faults import Fault, InternalFault
from loramux_shared.tracing.spans import ServerSpans, Value


@contextmanager
def traced(spans: ServerSpans | None, context: grpc.aio.ServicerContext, method: str) -> Iterator[None]:
    """Make the span of a call, if traces are on; an exception marks it as failed, and is raised again."""
    if spans is None:
        yield
        return
    headers = {name: value for name, value in context.invocation_metadata() if isinstance(value, str)}
    service, _, name = method.strip("/").rpartition("/")
    attributes: dict[str, Value] = {"rpc.system": "grpc", "rpc.service": service, "rpc.method": name}
    with spans.call(method.strip("/"), headers, attributes) as span:
        try:
            yield
        except Fault as fault:
            span.note("rpc.grpc.status_code", fault.status.value)
            span.fail(fault.reason)
            raise
        except (asyncio.CancelledError, GeneratorExit):
            span.note("rpc.grpc.status_code", grpc.StatusCode.CANCELLED.value[0])
            span.fail("CANCELLED")
            raise
        except Exception:
            span.note("rpc.grpc.status_code", InternalFault.status.value)
            span.fail(InternalFault.reason)
            raise
        span.note("rpc.grpc.status_code", grpc.StatusCode.OK.value[0])
