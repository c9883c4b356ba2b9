"""Lines to try against a running server: each works as it stands, in the terminal that it is printed on."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path

from loramux.cli import shell
from loramux.client import INFERENCE
from loramux.connection import API_KEY, Credentials

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
