"""``loramux kernels``: what a replica on a GPU would compile at its start, compiled for an image."""

import subprocess
from pathlib import Path
from typing import Annotated, Any

import typer

from loramux.cli import shell
from loramux.cli.documents import emit
from loramux.cli.exits import Exit
from loramux_shared.faults import FAULTS
from loramux_shared.process import python
from loramux_shared.settings import require_triton
from loramux_shared.untrusted_json import parse_json


@shell.command
def kernels(
    base: Annotated[Path, typer.Argument(metavar="DIR", help="Checkpoint; config.json is enough.")],
    arch: Annotated[str, typer.Option("--arch", metavar="SM", help="Architecture of the GPU, as sm_90.")],
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Folder, TRITON_CACHE_DIR of replicas.")],
    max_lora_rank: Annotated[
        int, typer.Option("--max-lora-rank", metavar="N", min=1, help="As in the deployment.")
    ] = 64,
    max_seq_len: Annotated[
        int | None, typer.Option("--max-seq-len", metavar="N", min=1, help="As in the deployment.")
    ] = None,
    as_json: shell.Json = False,
) -> None:
    """Compile the kernels of a base for a GPU; none is needed here.

    Settings of replicas are read as a replica reads them.

    Example: loramux kernels ./my-base --arch sm_90 --out ./kernels
    """
    require_triton("triton")
    sizes = [str(max_lora_rank), *([str(max_seq_len)] if max_seq_len else [])]
    command = python("inference_service.startup.compile_kernels", str(base), arch, str(out))
    with shell.working(f"compiling for {arch}"):
        done = subprocess.run([*command, *sizes], stdout=subprocess.PIPE, text=True, check=False)  # noqa: S603 - our own module
    if done.returncode:
        raise typer.Exit(Exit.FAILED)
    answer: dict[str, Any] = parse_json(done.stdout)
    if "fault" in answer:
        raise FAULTS[answer["fault"]["reason"]](answer["fault"]["message"])
    if as_json:
        emit({"kernels": answer["kernels"]})
    else:
        shell.show(f"{sum(answer['kernels'].values())} kernels for {arch} in {out}")
