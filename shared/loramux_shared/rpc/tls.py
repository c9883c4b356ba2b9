"""TLS of a gRPC server."""

from __future__ import annotations

from functools import partial
from typing import Any

import grpc

from loramux_shared.access.tls import TlsFiles


def server_credentials(files: TlsFiles) -> Any:
    """Return credentials whose handshakes use the files as they are then; broken files are not taken.

    Raises:
        SettingsInvalid: a file cannot be read, or they do not belong together.
    """
    read = partial(_configuration, files)
    renewed = files.follow(read)
    return grpc.dynamic_ssl_server_credentials(read(), renewed, files.client_ca is not None)


def _configuration(files: TlsFiles) -> Any:
    pem = files.pem()
    return grpc.ssl_server_certificate_configuration([(pem.key, pem.chain)], root_certificates=pem.client_ca)
