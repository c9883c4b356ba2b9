"""``loramux pin`` and ``unpin``: which adapters stay in a replica's memory."""

from typing import Annotated

import typer

from loramux.cli import shell
from loramux.cli.documents import emit
from loramux.client import INFERENCE, Client
from loramux_shared.operations import AdapterStatus

AdapterName = Annotated[str, typer.Argument(metavar="NAME", help="Name of the adapter.", show_default=False)]


@shell.command
def pin(name: AdapterName, grpc: shell.Grpc = INFERENCE, as_json: shell.Json = False) -> None:
    """Keep an adapter in a replica's memory.

    Whatever version its name stands for, until it is unpinned or the replica ends.

    Example: loramux pin support
    """
    with Client(inference=grpc) as client:
        _show_pin(client.pin(name), as_json=as_json)


@shell.command
def unpin(name: AdapterName, grpc: shell.Grpc = INFERENCE, as_json: shell.Json = False) -> None:
    """Let an adapter leave a replica's memory again.

    Example: loramux unpin support
    """
    with Client(inference=grpc) as client:
        _show_pin(client.unpin(name), as_json=as_json)


def _show_pin(adapter: AdapterStatus, *, as_json: bool) -> None:
    if as_json:
        emit({"adapter": adapter})
        return
    pinned = "pinned" if adapter.pinned else "not pinned"
    shell.show(f"{adapter.name}: {pinned}, {shell.digest(adapter.digest)}, {adapter.residency}")
