"""``loramux ray``: a deployment on a Ray cluster."""

import functools
import importlib.util
import json
import os
import secrets
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from loramux.cli import shell
from loramux.cli.build import build_with_bars, read_deployment
from loramux.cli.build_view import show_built
from loramux.cli.documents import emit
from loramux.cli.local.tree import ProcessTree, free_address, run_tree
from loramux.cli.local.up import DEFAULT_STORE, OPENAI, UpPlan, keep, preflight, reachable
from loramux.client import INFERENCE, AsyncClient
from loramux_shared.deployment import Deployment
from loramux_shared.faults import SettingsInvalid
from loramux_shared.process import python

app = typer.Typer(
    help="Serve a deployment on a Ray cluster.\n\nExample: loramux ray up deployment.yaml",
    no_args_is_help=True,
)

Replicas = Annotated[int, typer.Option("--replicas", metavar="N", min=1, help="Least replicas of the engine.")]
MaxReplicas = Annotated[
    int | None,
    typer.Option("--max-replicas", metavar="N", min=1, help="Most replicas; else always --replicas."),
]
Gpus = Annotated[
    float, typer.Option("--num-gpus", metavar="N", min=0, help="GPUs per replica, or per rank of one.")
]
Cpus = Annotated[
    float | None, typer.Option("--num-cpus", metavar="N", min=0, help="CPUs per replica: its threads.")
]
Http = Annotated[str, typer.Option("--http", metavar="HOST:PORT", help="Address of Ray's HTTP proxies.")]
Grpc = Annotated[str, typer.Option("--grpc", metavar="HOST:PORT", help="Ray's gRPC address.")]


@app.command()
@shell.command
def up(
    file: shell.File,
    store: shell.Store = DEFAULT_STORE,
    grpc: Grpc = "",
    http: Http = "",
    replicas: Replicas = 1,
    max_replicas: MaxReplicas = None,
    num_cpus: Cpus = None,
    num_gpus: Gpus = 0,
    as_json: shell.Json = False,
) -> None:
    """Start a Ray cluster here, build a file and serve it, until Ctrl-C.

    Addresses that are not given are 127.0.0.1:50052 (gRPC, builder included) and
    :8000 (OpenAI's API), or free ports.

    Example: loramux ray up deployment.yaml --replicas 2
    """
    _require_ray()
    grpc = grpc or free_address(INFERENCE)
    plan = UpPlan(
        deployment=read_deployment(file).deployment,
        store=store,
        builder=grpc,
        inference=grpc,
        http=http or free_address(OPENAI),
        roots=[file.absolute().parent],
    )
    preflight(plan)
    most = max_replicas or replicas
    each = num_cpus or max(1, (os.cpu_count() or 1) // most)
    options = {"replicas": replicas, "max_replicas": max_replicas, "num_cpus": each, "num_gpus": num_gpus}
    options |= parts_of(plan.deployment, each, num_gpus)
    cpus = round(most * each + 0.5) + 1  # the builder's
    os.environ.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=secrets.token_hex(16))  # an open Ray runs any job
    # Ray's sockets want short paths, and its last process writes until it ends.
    with tempfile.TemporaryDirectory(prefix="loramux-ray-", dir="/tmp", ignore_cleanup_errors=True) as folder:
        head = ["--cpus", str(cpus), "--folder", folder]
        run_tree(functools.partial(_up, plan=plan, options=options, head=head, as_json=as_json))


def parts_of(deployment: Deployment, num_cpus: float | None, num_gpus: float) -> dict[str, Any]:
    """Return the placement of a replica of several ranks: all of their GPUs on one node."""
    ranks = deployment.build.tensor_parallel_count
    if ranks == 1:
        return {}
    return {"placement_group_bundles": [{"CPU": num_cpus or ranks, "GPU": num_gpus * ranks}]}


async def _up(
    tree: ProcessTree, plan: UpPlan, options: Mapping[str, Any], head: Sequence[str], as_json: bool
) -> None:
    with shell.step("Ray cluster"):
        await tree.serve("ray", [*_ray("head", plan), *head])
    address = (Path(head[-1]) / "address").read_text()
    async with AsyncClient(inference=reachable(plan.inference), builder=reachable(plan.builder)) as client:
        await _bring_up(tree, client, plan, address, options, builds=True, as_json=as_json)
        models = await client.models()
    await keep(tree, plan, models, as_json=as_json)


@app.command()
@shell.command
def deploy(
    file: shell.File,
    address: Annotated[
        str, typer.Option("--address", metavar="ADDRESS", help="Cluster's address; auto on a node.")
    ] = "auto",
    store: Annotated[str, typer.Option("--store", metavar="URI", help="Store that all nodes reach.")] = "",
    grpc: Grpc = INFERENCE,
    http: Http = "0.0.0.0:8000",
    builder: Annotated[
        str,
        typer.Option("--builder", metavar="HOST:PORT", help="Builder's address; else the cluster gets one."),
    ] = "",
    replicas: Replicas = 1,
    max_replicas: MaxReplicas = None,
    num_cpus: Cpus = None,
    num_gpus: Gpus = 0,
    as_json: shell.Json = False,
) -> None:
    """Build a file, and serve it on a Ray cluster that runs.

    Its nodes have loramux[ray], and LORAMUX_ variables for keys and the rest. Where Ray's proxies run already,
    --http and --grpc only say where.

    Example: loramux ray deploy deployment.yaml --store s3://bucket/prefix
    """
    _require_ray()
    if not store:
        raise SettingsInvalid("--store is not given; expected one that all nodes of the cluster reach.")
    plan = UpPlan(
        deployment=read_deployment(file).deployment,
        store=store,
        builder=builder or grpc,
        inference=grpc,
        http=http,
    )
    options = {"replicas": replicas, "max_replicas": max_replicas, "num_gpus": num_gpus}
    options |= {} if num_cpus is None else {"num_cpus": num_cpus}
    options |= parts_of(plan.deployment, num_cpus, num_gpus)
    here = not builder
    run_tree(
        functools.partial(_deploy, plan=plan, address=address, options=options, builds=here, as_json=as_json)
    )


async def _deploy(
    tree: ProcessTree, plan: UpPlan, address: str, options: Mapping[str, Any], *, builds: bool, as_json: bool
) -> None:
    async with AsyncClient(inference=reachable(plan.inference), builder=reachable(plan.builder)) as client:
        await _bring_up(tree, client, plan, address, options, builds=builds, as_json=as_json)
        models = await client.models()
    name = plan.deployment.model_name
    if as_json:
        emit({"deployment": name, "address": address, "models": [model.name for model in models]})
    else:
        shell.show(f"{name} is served on the cluster at {address}", "bold green")


async def _bring_up(
    tree: ProcessTree,
    client: AsyncClient,
    plan: UpPlan,
    address: str,
    options: Mapping[str, Any],
    *,
    builds: bool,
    as_json: bool,
) -> None:
    """Run the builder where it is to be there, build, and run the engine."""
    command = [*_ray("deploy", plan), "--address", address]
    roots = [str(os.path.realpath(folder.expanduser())) for folder in plan.local_roots]
    common = {"store": plan.store, "local_roots": roots}
    if builds:
        with shell.step("builder service"):
            await tree.run("deploy-builder", [*command, "--builder", json.dumps(common)])
    built = await build_with_bars(client, plan.deployment)
    if not as_json:
        show_built(built)
    settings = common | {"deployment": plan.deployment.model_name, "builder": reachable(plan.builder)}
    with shell.step("inference service"):
        await tree.run("deploy", [*command, "--options", json.dumps({**options, "settings": settings})])


def _ray(command: str, plan: UpPlan) -> list[str]:
    addresses = ["--grpc", plan.inference, "--http", plan.http or OPENAI]
    return [*python("loramux_ray", command), *addresses]


def _require_ray() -> None:
    if importlib.util.find_spec("ray") is None:
        raise SettingsInvalid("this needs Ray, not installed here: pip install 'loramux[ray]'")
