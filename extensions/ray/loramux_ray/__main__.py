"""``python -m loramux_ray head | deploy``: what ``loramux ray`` runs, since nothing else here imports Ray."""

import argparse
import asyncio
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import ray
import structlog
from ray import serve
from ray.exceptions import RayError
from ray.serve.api import RunTarget
from ray.serve.exceptions import RayServeException

from loramux_ray.app import build, build_builder
from loramux_ray.names import APP, BUILDER_APP, MIDDLEWARES, SERVICERS
from loramux_shared.faults import Fault, ServerUnavailable, SettingsInvalid
from loramux_shared.process import READY, log_to_stderr, notify
from loramux_shared.rpc.stopping import Stop

log = structlog.get_logger()

STORE_BYTES: Final = 200 * 1024 * 1024
"""Ray's object store on a machine that is tried out; what passes it is small."""
ADDRESS: Final = "address"
"""The file that holds the cluster's address."""
QUIET: Final = {"RAY_USAGE_STATS_ENABLED": "0"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status."""
    flags = _parser().parse_args(arguments)
    log_to_stderr()
    try:
        asyncio.run(head(flags)) if flags.command == "head" else deploy(flags)
    except SettingsInvalid as fault:
        return _say(fault, 2)
    except Fault as fault:
        return _say(fault, 1)
    return 0


async def head(flags: argparse.Namespace) -> None:
    """Be a cluster of one node until SIGTERM or SIGINT; what Ray starts ends with this process."""
    os.environ.update(QUIET | MIDDLEWARES)
    stop = Stop()
    ray.init(
        num_cpus=flags.cpus,
        object_store_memory=STORE_BYTES,
        include_dashboard=False,
        log_to_driver=True,
        _temp_dir=str(flags.folder),
    )
    _start(flags)
    address = ray.get_runtime_context().gcs_address
    (flags.folder / ADDRESS).write_text(address)
    log.info("Ray cluster ready", address=address, grpc=flags.grpc, http=flags.http)
    notify(READY)
    await stop.wait()
    serve.shutdown()  # type: ignore[no-untyped-call]
    ray.shutdown()


def deploy(flags: argparse.Namespace) -> None:
    """Run applications on a cluster that exists; returns when they run.

    Raises:
        ServerUnavailable: there is no such cluster, or an application does not come up.
        SettingsInvalid: the options of an application are wrong.
    """
    try:
        ray.init(address=flags.address, log_to_driver=False)
        _start(flags)
        serve.run_many(_targets(flags))
    except (ConnectionError, RayError, RayServeException, RuntimeError) as error:
        first = str(error).strip().partition("\n")[0][:500]
        raise ServerUnavailable(f"Ray at {flags.address}: {first}. `serve status` there says more.") from error


def _targets(flags: argparse.Namespace) -> list[RunTarget]:
    targets = []
    if flags.builder is not None:
        targets.append(RunTarget(build_builder(flags.builder), BUILDER_APP, route_prefix=None))
    if flags.options is not None:
        targets.append(RunTarget(build(flags.options), APP))
    return targets


def _start(flags: argparse.Namespace) -> None:
    """Open Ray's proxies, where they are not open already: then they stay as they are."""
    host, _, port = flags.http.rpartition(":")
    serve.start(
        proxy_location="EveryNode",
        http_options={"host": host, "port": int(port)},
        grpc_options={
            "port": int(flags.grpc.rpartition(":")[2]),
            "grpc_servicer_functions": [SERVICERS],
            "enable_reflection": False,  # Ray's requires no key
        },
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m loramux_ray", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    first = commands.add_parser("head", help="start a cluster of one node")
    first.add_argument("--cpus", type=int, help="resources that Ray counts, whatever the machine has")
    first.add_argument("--folder", type=Path, required=True, help="folder of Ray's files and of its address")
    second = commands.add_parser("deploy", help="run applications on a cluster")
    second.add_argument(
        "--address", required=True, help="address of the cluster: HOST:PORT, auto or ray://HOST:PORT"
    )
    second.add_argument("--builder", type=json.loads, help="settings of a builder, as JSON")  # noqa: TID251 - an operator writes it
    second.add_argument("--options", type=json.loads, help="`loramux_ray.app.Options`, as JSON")  # noqa: TID251 - an operator writes it
    for each in (first, second):
        each.add_argument(
            "--grpc", required=True, help="HOST:PORT of Ray's gRPC proxies; the host is Ray's choice"
        )
        each.add_argument("--http", required=True, help="HOST:PORT of Ray's HTTP proxies")
    return parser


def _say(fault: Fault, status: int) -> int:
    sys.stderr.write(f"loramux_ray: {fault.reason}: {fault}\n")
    return status


if __name__ == "__main__":
    sys.exit(main())
