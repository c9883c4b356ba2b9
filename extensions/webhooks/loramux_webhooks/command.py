"""``loramux webhooks``: a hub's news of repositories become updates of their adapters."""

from pathlib import Path
from typing import Annotated, Final

import typer

from loramux.cli import shell
from loramux.client import BUILDER, Client
from loramux_shared.deployment_file import load_deployment
from loramux_shared.faults import SettingsInvalid
from loramux_webhooks.receiver import Followed, Receiver, Updates

DEBOUNCE_S: Final = 10.0


@shell.command
def webhooks(
    file: shell.File,
    secret_file: Annotated[
        Path, typer.Option("--secret-file", metavar="FILE", help="File with the webhook's secret.")
    ],
    listen: Annotated[
        str, typer.Option("--listen", metavar="HOST:PORT", help="Address for the hub.")
    ] = "127.0.0.1:8090",
    builder: shell.Builder = BUILDER,
    debounce: Annotated[
        float, typer.Option("--debounce", min=0.0, metavar="S", help="Quiet seconds before an update.")
    ] = DEBOUNCE_S,
) -> None:
    """Update adapters when their Hugging Face repositories change.

    Example: loramux webhooks deployment.yaml --secret-file hook.secret
    """
    deployment = load_deployment(file).deployment
    followed = Followed(deployment.build.lora_adapters)
    if not followed.adapters:
        raise SettingsInvalid(
            f"{file}: expected an adapter of source HF whose revision is no commit, found none to follow."
        )
    try:
        secret = secret_file.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsInvalid(
            f"--secret-file {secret_file}: it cannot be read: {type(error).__name__}"
        ) from error
    if not secret:
        raise SettingsInvalid(f"--secret-file {secret_file}: expected the secret of the webhook, found nothing")
    with Client(builder=builder) as client:
        updates = Updates(client, deployment.model_name, debounce)
        with Receiver(listen, secret, followed, updates) as receiver, updates:
            shell.show(f"webhooks on http://{receiver.address}, following {', '.join(followed.adapters)}")
            receiver.serve_forever()
