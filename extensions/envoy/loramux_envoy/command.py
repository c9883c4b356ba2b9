"""``loramux envoy``: the configuration of an Envoy before several replicas."""

from pathlib import Path
from typing import Annotated

import typer

from loramux.cli import shell
from loramux_envoy.config import ADMIN_PORT, GRPC_PORT, HTTP_PORT, Fleet, Tls, listen_of, render, replica_of
from loramux_shared.faults import SettingsInvalid


@shell.command
def envoy(
    replicas: Annotated[
        list[str],
        typer.Argument(metavar="HOST...", help="HOST or HOST:GRPC_PORT:HTTP_PORT.", show_default=False),
    ],
    listen_grpc: Annotated[
        str, typer.Option("--listen-grpc", metavar="HOST:PORT", help="Envoy's gRPC address.")
    ] = f"127.0.0.1:{GRPC_PORT}",
    listen_http: Annotated[
        str, typer.Option("--listen-http", metavar="HOST:PORT", help="Envoy's HTTP address.")
    ] = f"127.0.0.1:{HTTP_PORT}",
    admin_port: Annotated[
        int, typer.Option("--admin-port", metavar="PORT", help="Envoy's admin port, on loopback.")
    ] = ADMIN_PORT,
    tls_ca: Annotated[
        Path | None,
        typer.Option("--tls-ca", metavar="FILE", help="Authority (PEM) of the replicas' certificates."),
    ] = None,
    tls_name: Annotated[
        str | None, typer.Option("--tls-name", metavar="NAME", help="Name in these certificates.")
    ] = None,
) -> None:
    """Print the configuration of an Envoy before replicas.

    Example: loramux envoy 10.0.0.4 10.0.0.5 > envoy.yaml && envoy -c envoy.yaml
    """
    if (tls_ca is None) != (tls_name is None):
        raise SettingsInvalid("TLS to replicas takes --tls-ca and --tls-name together; one of them is missing.")
    fleet = Fleet(
        replicas=[replica_of(text) for text in replicas],
        grpc=listen_of(listen_grpc),
        http=listen_of(listen_http),
        admin_port=admin_port,
        tls=Tls(str(tls_ca), tls_name) if tls_ca and tls_name else None,
    )
    shell.out.out(render(fleet), end="")
