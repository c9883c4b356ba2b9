"""``loramux up``: builder and inference service of one deployment, as children of one process.

Certain failures are found before anything is started or built: see `preflight`.
"""

import asyncio
import functools
import json
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Final

import typer

from loramux.cli import shell
from loramux.cli.build import Exact, build_with_bars, read_deployment
from loramux.cli.build_view import show_built
from loramux.cli.documents import emit
from loramux.cli.local.services import builder_command, inference_command, local_roots
from loramux.cli.local.tree import ProcessTree, listening_address, run_tree
from loramux.client import BUILDER, INFERENCE, AsyncClient
from loramux.connection import Credentials
from loramux.records import ModelInfo
from loramux_shared.access import API_KEY
from loramux_shared.access.guard import open_guard
from loramux_shared.access.keyring import Keyring
from loramux_shared.access.keys import Scope
from loramux_shared.bundle.generation import current_key
from loramux_shared.deployment import Deployment
from loramux_shared.faults import PermissionDenied, Unauthenticated
from loramux_shared.process import READY, notify
from loramux_shared.rpc.options import require_free
from loramux_shared.settings import BuilderSettings, InferenceSettings, load_settings, require_triton
from loramux_shared.storage.base import ObjectMissing
from loramux_shared.storage.open import open_store
from loramux_shared.wording import listed

WITHOUT_TLS: Final = dict.fromkeys(("tls_cert", "tls_key", "tls_client_ca"))
"""Children are called on loopback, which certificates do not name."""


@dataclass(frozen=True)
class UpPlan:
    """The plan of `loramux up`: services to start, and their addresses."""

    deployment: Deployment
    store: str
    builder: str
    inference: str
    engine: Mapping[str, str | int | None] = field(default_factory=dict)
    """Settings of the inference service that are about speed; None: its default."""
    http: str | None = None
    """Address of the HTTP APIs; None keeps them closed."""
    roots: Sequence[Path] = ()
    """Folders below which LOCAL repositories may lie, beside those that the deployment names."""
    exact: bool = False
    """True if adapters that were added or pushed to the deployment are to leave."""

    @property
    def local_roots(self) -> list[Path]:
        """The folders that the services may read."""
        named = local_roots(self.deployment.repositories)
        roots = [root.expanduser().resolve() for root in self.roots]
        others = [each for each in named if not any(each.resolve().is_relative_to(root) for root in roots)]
        return list(dict.fromkeys([*others, *roots]))


def preflight(plan: UpPlan) -> None:
    """Look at settings, keys, addresses and the store's credentials.

    Raises:
        SettingsInvalid: a setting, an address or a file of keys or certificates is no good.
        Unauthenticated, PermissionDenied: the services will ask for a key, and ours is none that opens both.
        StoreUnavailable: the store does not let us in.
    """
    name = plan.deployment.model_name
    load_settings(BuilderSettings, store=plan.store, grpc=plan.builder)
    settings = load_settings(
        InferenceSettings, deployment=name, store=plan.store, grpc=plan.inference, http=plan.http, **plan.engine
    )
    if settings.backend == "triton":
        require_triton(settings.backend)
    addresses = [each for each in (plan.builder, plan.inference, plan.http) if each]
    guard = open_guard(settings.model_copy(update=WITHOUT_TLS), *addresses)
    if guard.keyring is not None:
        _require_key(guard.keyring)
    for address in addresses:
        require_free(address)
    with suppress(ObjectMissing):
        open_store(plan.store).get(current_key(name))


def _require_key(keyring: Keyring) -> None:
    """Require a key for both services, since this command calls both."""
    for scope in (Scope.BUILD, Scope.INFER):
        try:
            keyring.authorize(Credentials().api_key, scope)
        except (Unauthenticated, PermissionDenied) as fault:
            raise fault.with_message(
                f"{fault.message} This command calls both services: give it a key with the scopes build and "
                f"infer, as {API_KEY} or --api-key. `loramux keys new --scope build --scope infer --file FILE` "
                "makes one."
            ) from fault


OPENAI = "127.0.0.1:8000"
HttpAddress = Annotated[str, typer.Option("--http", metavar="HOST:PORT", help="Address of the HTTP APIs.")]
DEFAULT_STORE = "file://~/.local/share/loramux/store"


@shell.command
def up(
    file: shell.File,
    store: shell.Store = DEFAULT_STORE,
    grpc: shell.Grpc = "",
    http: HttpAddress = "",
    builder: shell.Builder = "",
    backend: shell.Backend = None,
    dtype: shell.Dtype = None,
    threads: shell.Threads = None,
    local_root: shell.LocalRoots = None,
    exact: Exact = False,
    as_json: shell.Json = False,
) -> None:
    """Build a deployment file and serve it, here, until Ctrl-C.

    Ports: 50051 (builder), 50052 (inference), 8000 (OpenAI), or free ones.

    Example: loramux up deployment.yaml
    """
    engine = {"backend": backend, "dtype": dtype, "threads": threads}
    plan = plan_of(read_deployment(file).deployment, store, grpc, http, builder, engine)
    plan = replace(plan, roots=(file.absolute().parent, *(local_root or ())), exact=exact)
    preflight(plan)
    serve(plan, as_json=as_json)


def plan_of(
    deployment: Deployment,
    store: str,
    grpc: str,
    http: str,
    builder: str,
    engine: Mapping[str, str | int | None] | None = None,
) -> UpPlan:
    """Return the plan of a deployment; an address that is empty is the usual one, or a free one."""
    return UpPlan(
        deployment=deployment,
        store=store,
        builder=listening_address(builder, BUILDER),
        inference=listening_address(grpc, INFERENCE),
        engine=engine or {},
        http=listening_address(http, OPENAI),
    )


def serve(plan: UpPlan, *, as_json: bool) -> None:
    """Build and serve until Ctrl-C."""
    run_tree(functools.partial(_up, plan=plan, as_json=as_json))


async def _up(tree: ProcessTree, plan: UpPlan, as_json: bool) -> None:
    async with AsyncClient(inference=reachable(plan.inference), builder=reachable(plan.builder)) as client:
        await start_builder(tree, plan)
        built = await build_with_bars(client, plan.deployment, exact=plan.exact)
        if not as_json:
            show_built(built)
        await start_inference(tree, plan)
        models = await client.models()
    await keep(tree, plan, models, as_json=as_json)


async def start_builder(tree: ProcessTree, plan: UpPlan) -> None:
    """Start the builder and wait until it is ready."""
    argv = builder_command(plan.store, plan.builder, plan.local_roots)
    with shell.step(f"builder service on {plan.builder}"):
        await tree.serve("builder", argv)


async def start_inference(tree: ProcessTree, plan: UpPlan) -> None:
    """Start the inference service and wait until it is ready, which takes as long as the base loads."""
    name = plan.deployment.model_name
    engine = {
        **plan.engine,
        "builder": reachable(plan.builder),
    }  # so that adapters that are added later are served at once
    argv = inference_command(name, plan.store, plan.inference, plan.local_roots, engine, plan.http)
    with shell.step(f"inference service on {plan.inference}") as came:
        await tree.serve("inference", argv, came.tell)


async def keep(tree: ProcessTree, plan: UpPlan, models: Sequence[ModelInfo], *, as_json: bool = False) -> None:
    """Say where everything is, and stay until a signal ends the tree."""
    if as_json:
        emit(ready_fields(plan, models, tree.folder))
    else:
        show_ready(plan, models, tree.folder)
    tree.ready = True
    notify(READY)
    shell.say("serving until Ctrl-C", "dim")
    await asyncio.Event().wait()


def ready_fields(plan: UpPlan, models: Sequence[ModelInfo], logs: Path) -> dict[str, object]:
    """Return for JSON what `show_ready` prints."""
    names = [model.name for model in models]
    addresses = {"inference": plan.inference, "http": plan.http, "builder": plan.builder}
    return {**addresses, "models": names, "logs": logs}


def show_ready(plan: UpPlan, models: Sequence[ModelInfo], logs: Path) -> None:
    """Print where everything is, and what to try."""
    shell.show()
    shell.show("ready", "bold green")
    shell.show(f"  inference  {plan.inference}")
    shell.show(f"  OpenAI     http://{reachable(plan.http or OPENAI)}/v1")
    shell.show(f"  page       http://{reachable(plan.http or OPENAI)}/")
    shell.show(f"  builder    {plan.builder}")
    shell.show(f"  models     {listed([model.name for model in models])}")
    shell.show(f"  logs       {logs}")
    if generating := [model for model in models if model.generates]:
        show_lines_to_try(plan.inference, plan.http or OPENAI, generating[-1].name)
        return
    body = json.dumps({"model": models[-1].name, "input": ["Hi"]})
    shell.show(f"  try        POST /v1/embeddings {body}")


MAX_TOKENS = 64
MESSAGES = [{"role": "user", "content": "Hi"}]


def show_lines_to_try(inference: str, http: str, model: str) -> None:
    """Print a line each for the command line, Python, curl and grpcurl."""
    inference, http = reachable(inference), reachable(http)
    flag = "" if inference == INFERENCE else f" --grpc {inference}"
    argument = "" if inference == INFERENCE else f'"{inference}"'
    header = f' -H "authorization: Bearer ${API_KEY}"' if Credentials().api_key else ""
    call = f'complete("{model}", {json.dumps(MESSAGES)}, max_tokens={MAX_TOKENS})'
    chat = json.dumps({"model": model, "messages": MESSAGES, "max_tokens": MAX_TOKENS})
    generate = json.dumps(
        {"model": model, "messages": {"messages": MESSAGES}, "sampling": {"max_tokens": MAX_TOKENS}}
    )
    shell.show("try", "bold")
    for line in (
        f"{program('loramux')} chat {model}{flag}",
        "",
        f"{program('python')} -c 'import loramux; print(loramux.Client({argument}).{call}.text)'",
        "",
        f"curl http://{http}/v1/chat/completions{header} -H 'content-type: application/json' \\",
        f"  -d '{chat}'",
        "",
        f"grpcurl -plaintext{header} -d '{generate}' \\",
        f"  {inference} loramux.inference.v1.InferenceService/Generate",
    ):
        shell.show(f"  {line}".rstrip())


def reachable(address: str) -> str:
    """Return an address of this machine for one where a server listens: 0.0.0.0 is nobody's."""
    host, _, port = address.rpartition(":")
    return f"127.0.0.1:{port}" if host in ("0.0.0.0", "[::]") else address  # noqa: S104 - compared, not bound


def program(name: str) -> str:
    """Return what starts a program of this Python's environment: its name where PATH leads there."""
    here = Path(sys.executable).parent / name
    found = shutil.which(name)
    if found and Path(found).parent.samefile(here.parent):
        return name
    near = os.path.relpath(here)
    return str(here) if near.startswith("..") else near
