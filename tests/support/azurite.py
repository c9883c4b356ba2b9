"""Azure Blob Storage for tests: Azurite, Microsoft's emulator, which `make azurite` installs with npm."""

import base64
import ctypes
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest
from azure.core.exceptions import AzureError
from azure.storage.blob import BlobServiceClient

from tests.support.processes.watching import kill_at_end
from tests.support.s3_gateway import free_port
from tests.support.waiting import wait_until

PROGRAM = Path(sys.prefix) / "azurite" / "node_modules" / "azurite" / "dist" / "src" / "blob" / "main.js"
ACCOUNT = "loramuxtests"
_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class Azure:
    """The address of the server, and its key."""

    endpoint_url: str
    account_key: str

    def client(self) -> BlobServiceClient:
        credential = {"account_name": ACCOUNT, "account_key": self.account_key}
        return BlobServiceClient(self.endpoint_url, credential, retry_total=0)


@contextmanager
def azurite() -> Iterator[Azure]:
    """Run Azurite on a free port, in memory; it dies with this process."""
    node = shutil.which("node")
    if node is None or not PROGRAM.is_file():
        pytest.skip("Azurite is not installed: it needs node and npm, then `make azurite`")
    port, key = free_port(), base64.b64encode(os.urandom(64)).decode()
    server = Azure(f"http://127.0.0.1:{port}/{ACCOUNT}", key)
    options = ["--silent", "--inMemoryPersistence", "--disableTelemetry", "--skipApiVersionCheck"]
    options += ["--blobPort", str(port), "--extentMemoryLimit", "256"]
    prctl = ctypes.CDLL(None).prctl if sys.platform == "linux" else None
    with tempfile.TemporaryDirectory(prefix="loramux-azurite-") as folder:
        process = subprocess.Popen(
            [node, str(PROGRAM), *options],
            cwd=folder,
            env={"PATH": os.environ["PATH"], "HOME": folder, "AZURITE_ACCOUNTS": f"{ACCOUNT}:{key}"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            preexec_fn=prctl and (lambda: prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)),
        )
        with kill_at_end(process):
            _wait_until_it_answers(server, process)
            yield server


def _wait_until_it_answers(server: Azure, process: subprocess.Popen[bytes]) -> None:
    client = server.client()

    def answers() -> bool:
        assert process.poll() is None, "Azurite did not start"
        with suppress(AzureError):
            client.get_account_information()
            return True
        return False

    wait_until(answers, "Azurite")
