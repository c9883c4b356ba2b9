"""``loramux envoy``: the configuration of an Envoy before several replicas."""

from pathlib import Path
from typing import Annotated

import typer

from loramux.cli import shell
from loramux_envoy.config import render
from loramux_envoy.fleet import Fleet, Tls, listen_of, replica_of, require_distinct
from loramux_shared.faults import SettingsInvalid


@shell.command
def envoy(
    replicas: Annotated[
        list[str],
        typer.Argument(
            metavar="REPLICA...",
            help="HOST, HOST:GRPC[:HTTP], or dns:///NAME of all.",
            show_default=False,
        ),
    ],
    grpc_port: Annotated[int, typer.Option("--grpc-port", metavar="PORT", help="Replicas' gRPC port.")] = 50052,
    http_port: Annotated[int, typer.Option("--http-port", metavar="PORT", help="Replicas' HTTP port.")] = 8000,
    listen_grpc: Annotated[
        str, typer.Option("--listen-grpc", metavar="HOST:PORT", help="Envoy's gRPC address.")
    ] = "127.0.0.1:50052",
    listen_http: Annotated[
        str, typer.Option("--listen-http", metavar="HOST:PORT", help="Envoy's HTTP address.")
    ] = "127.0.0.1:8000",
    admin_port: Annotated[
        int, typer.Option("--admin-port", metavar="PORT", help="Envoy's admin port, on loopback.")
    ] = 9901,
    first_token_s: Annotated[
        float,
        typer.Option(
            "--first-token",
            metavar="SECONDS",
            min=0,
            max=86400,
            help="Time until a retry elsewhere; 0: never.",
        ),
    ] = 120.0,
    tls_ca: Annotated[
        Path | None,
        typer.Option("--tls-ca", metavar="FILE", help="Authority (PEM) of the replicas' certificates."),
    ] = None,
    tls_name: Annotated[
        str | None, typer.Option("--tls-name", metavar="NAME", help="Name in these certificates.")
    ] = None,
) -> None:
    """Print the configuration of an Envoy before replicas.

    Each model has a replica; docs/guides/fleet.md says what that means.

    Example: loramux envoy 10.0.0.4 10.0.0.5 > envoy.yaml && envoy -c envoy.yaml
    """
    if (tls_ca is None) != (tls_name is None):
        raise SettingsInvalid("TLS to replicas takes --tls-ca and --tls-name together; one of them is missing.")
    fleet = Fleet(
        replicas=tuple(replica_of(text, grpc_port, http_port) for text in replicas),
        grpc=listen_of(listen_grpc),
        http=listen_of(listen_http),
        admin_port=admin_port,
        tls=Tls(str(tls_ca), tls_name) if tls_ca and tls_name else None,
        first_token_s=first_token_s,
    )
    require_distinct(fleet)
    shell.out.out(render(fleet), end="")
