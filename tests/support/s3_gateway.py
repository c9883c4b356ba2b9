"""A real S3 server for tests: the JuiceFS gateway over a folder, with signatures and multipart."""

from __future__ import annotations

import ctypes
import functools
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import boto3
from botocore.config import Config

from tests.support.waiting import BOUND_S, wait_until

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

REGION = "us-east-1"
_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class S3Server:
    """The address of the server, and its credentials."""

    endpoint: str
    access_key: str
    secret_key: str

    @property
    def environment(self) -> dict[str, str]:
        """The variables with which any AWS client of any process finds the server and nothing else."""
        return {
            "AWS_ENDPOINT_URL_S3": self.endpoint, "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key, "AWS_DEFAULT_REGION": REGION,
            "AWS_CONFIG_FILE": os.devnull, "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
            "AWS_EC2_METADATA_DISABLED": "true",
        }  # fmt: skip

    @functools.cache  # noqa: B019 - there are as many servers as processes
    def client(self) -> S3Client:
        """A client that is independent of the product's settings; the same each time, as it takes a while."""
        return boto3.session.Session().client(
            "s3",
            endpoint_url=self.endpoint,
            region_name=REGION,
            aws_access_key_id=self.access_key,
            aws_secret_access_key=self.secret_key,
            config=Config(request_checksum_calculation="when_required"),
        )

    def new_bucket(self) -> str:
        name = f"test-{uuid.uuid4().hex[:16]}"
        self.client().create_bucket(Bucket=name)
        return name


@contextmanager
def s3_gateway() -> Iterator[S3Server]:
    """Run a gateway on a free port; it writes below one temporary folder, and dies with this process."""
    folder = Path(tempfile.mkdtemp(prefix="loramux-s3-"))
    try:
        server = S3Server(f"http://127.0.0.1:{free_port()}", "loramux-tests", uuid.uuid4().hex)
        process = _start(folder, server)
        try:
            _wait_until_it_answers(server, process, folder / "output")
            yield server
        finally:
            _stop(process)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def free_port() -> int:
    """Return a port of the loopback address on which nothing listens."""
    return free_ports(1)[0]


def free_ports(count: int) -> list[int]:
    """Return different ports of the loopback address on which nothing listens."""
    with ExitStack() as taken:
        listeners = [taken.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [int(each.getsockname()[1]) for each in listeners]


def _start(folder: Path, server: S3Server) -> subprocess.Popen[bytes]:
    juicefs = str(Path(sys.executable).with_name("juicefs"))
    meta = f"sqlite3://{folder}/meta.db"
    environment = {
        "PATH": os.environ["PATH"],
        "HOME": str(folder),
        "MINIO_ROOT_USER": server.access_key,
        "MINIO_ROOT_PASSWORD": server.secret_key,
    }
    options = ["--storage", "file", "--bucket", f"{folder}/data/", "--no-update"]
    subprocess.run([juicefs, "format", *options, meta, "jfs"], env=environment, check=True, capture_output=True)
    options = ["--multi-buckets", "--keep-etag", "--object-meta", "--no-banner", "--no-usage-report"]
    options += ["--no-bgjob", "--backup-meta", "0", "--metrics", "127.0.0.1:0"]
    options += ["--cache-dir", f"{folder}/cache", "--log", f"{folder}/gateway.log"]
    prctl = ctypes.CDLL(None).prctl if sys.platform == "linux" else None
    with (folder / "output").open("wb") as output:
        return subprocess.Popen(
            [juicefs, "gateway", *options, meta, server.endpoint.removeprefix("http://")],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
            preexec_fn=prctl and (lambda: prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)),
        )


def _wait_until_it_answers(server: S3Server, process: subprocess.Popen[bytes], output: Path) -> None:
    def stated() -> str:
        return output.read_text(errors="replace")[-2000:]

    def answers() -> bool:
        assert process.poll() is None, f"the S3 gateway did not start:\n{stated()}"
        with suppress(urllib.error.URLError, ConnectionError, TimeoutError):
            urllib.request.urlopen(f"{server.endpoint}/minio/health/ready", timeout=BOUND_S).close()  # noqa: S310 - http
            return True
        return False

    wait_until(answers, "the S3 gateway", stated)


def _stop(process: subprocess.Popen[bytes]) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
