"""The commands of the core: a function imports each, and its docstring is the line in the list of commands."""

import typer

from loramux.cli.late import Command, Load, Run


def demo() -> Run:
    """Build small adapters, serve them, ask all of them at once."""
    from loramux.cli.local.demo import demo

    return demo


def run() -> Run:
    """Serve a base and adapters without a file, until Ctrl-C."""
    from loramux.cli.local.run import run

    return run


def up() -> Run:
    """Build a deployment file and serve it, here, until Ctrl-C."""
    from loramux.cli.local.up import up

    return up


def build() -> Run:
    """Fetch, check, convert and publish a file's adapters."""
    from loramux.cli.build import build

    return build


def check() -> Run:
    """Check an adapter against a base; exit 1 if it is refused."""
    from loramux.cli.check import check

    return check


def prove() -> Run:
    """Build a file, and record what each adapter should answer."""
    from loramux.cli.build import prove

    return prove


def add() -> Run:
    """Add an adapter to a deployment, or replace one."""
    from loramux.cli.change import add

    return add


def remove() -> Run:
    """Remove adapters from a deployment."""
    from loramux.cli.change import remove

    return remove


def push() -> Run:
    """Send an adapter of this machine to a deployment."""
    from loramux.cli.change import push

    return push


def models() -> Run:
    """List the models that are served: base first, then adapters."""
    from loramux.cli.serving import models

    return models


def serve() -> Run:
    """Run the inference service of a deployment until SIGTERM."""
    from loramux.cli.local.services import serve

    return serve


def builder() -> Run:
    """Run the builder service until SIGTERM; needs no torch."""
    from loramux.cli.local.services import builder

    return builder


def health() -> Run:
    """Ask a server for its health; exit 0 when it is SERVING."""
    from loramux.cli.serving import health

    return health


def cancel() -> Run:
    """End the running build of a deployment."""
    from loramux.cli.deployments import cancel

    return cancel


def chat() -> Run:
    """Chat with a model; piped input: one answer per line."""
    from loramux.cli.chat import chat

    return chat


def deployments() -> Run:
    """List the deployments of a builder, or show one."""
    from loramux.cli.deployments import deployments

    return deployments


def doctor() -> Run:
    """Look at this installation; exit 1 if something is wrong."""
    from loramux.cli.doctor.command import doctor

    return doctor


def gc() -> Run:
    """List what nothing in a store refers to, or remove it."""
    from loramux.cli.gc import gc

    return gc


def history() -> Run:
    """List the generations of a deployment with their changes."""
    from loramux.cli.deployments import history

    return history


def import_bundle() -> Run:
    """Check and publish npy files of another converter."""
    from loramux.cli.import_bundle import import_bundle

    return import_bundle


def kernels() -> Run:
    """Compile the kernels of a base for a GPU; none is needed here."""
    from loramux.cli.kernels import kernels

    return kernels


def pin() -> Run:
    """Keep an adapter in a replica's memory."""
    from loramux.cli.replica import pin

    return pin


def rollback() -> Run:
    """Serve what an older generation of a deployment says."""
    from loramux.cli.deployments import rollback

    return rollback


def rollout() -> Run:
    """Watch replicas until all serve a generation."""
    from loramux.cli.rollout import rollout

    return rollout


def unpin() -> Run:
    """Let an adapter leave a replica's memory again."""
    from loramux.cli.replica import unpin

    return unpin


def watch() -> Run:
    """Follow the build of a deployment to its end."""
    from loramux.cli.deployments import watch

    return watch


def keys() -> typer.Typer:
    """Make, list and remove API keys."""
    from loramux.cli.keys import app

    return app


FIRST: tuple[Load, ...] = (
    demo,
    run,
    up,
    build,
    check,
    prove,
    add,
    remove,
    push,
    models,
    serve,
    builder,
    health,
)
"""The commands that most people use, in the order of the list."""
OTHERS = {
    "cancel": Command(cancel),
    "chat": Command(chat),
    "deployments": Command(deployments),
    "doctor": Command(doctor),
    "gc": Command(gc),
    "history": Command(history),
    "import-bundle": Command(import_bundle),
    "kernels": Command(kernels),
    "pin": Command(pin),
    "rollback": Command(rollback),
    "rollout": Command(rollout),
    "unpin": Command(unpin),
    "watch": Command(watch),
    "keys": Command(keys, is_group=True),
}
"""The list has them by name."""
