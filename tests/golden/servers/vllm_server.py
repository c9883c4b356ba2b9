"""vLLM's server, started beside the tests from an environment of its own."""

import json
import os
import subprocess
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any, Final, Self

import numpy as np

from tests.golden.servers.reference import PROMPT, LogProbs
from tests.support.adapters import VOCAB

MAX_RANK: Final = 64
_START_S: Final = 400
_CALL_S: Final = 120


class Refused(Exception):
    """The server does not serve the adapter; the text is its own."""


class VllmServer:
    """One server of one base; it is started again where an adapter ended it."""

    def __init__(self, python: Path, base: Path, port: int, *options: str) -> None:
        self._argv = [
            str(python), "-m", "vllm.entrypoints.openai.api_server", "--model", str(base),
            "--served-model-name", "base", "--host", "127.0.0.1", "--port", str(port), "--dtype", "float32",
            "--max-model-len", "64", "--enable-lora", "--max-loras", "2", "--max-lora-rank", str(MAX_RANK),
            "--max-logprobs", str(VOCAB), "--enforce-eager", "--max-num-seqs", "4", *options,
        ]  # fmt: skip
        self._address = f"http://127.0.0.1:{port}"
        self._log = base.parent / f"{base.name}.log"
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        environment = os.environ | {
            "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1",
            "VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "PATH": f"{Path(self._argv[0]).parent}:{os.environ['PATH']}",
        }  # fmt: skip
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(self._argv, env=environment, stdout=log, stderr=log)
        deadline = time.monotonic() + _START_S
        while time.monotonic() < deadline and self._process.poll() is None:
            try:
                with urllib.request.urlopen(f"{self._address}/health", timeout=5):  # noqa: S310
                    return self
            except OSError:
                time.sleep(1)
        self.__exit__()
        raise TimeoutError(f"vLLM did not start: {self._log.read_text(errors='replace')[-6000:]}")

    def __exit__(self, *_: object) -> None:
        if self._process is not None:
            self._process.terminate()
            try:
                self._process.wait(60)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()

    def log_probs(self, model: str = "base") -> LogProbs:
        """Return what a model says about the prompt: at each place but the last."""
        answer = self._call(
            "/v1/completions",
            {
                "model": model,
                "prompt": list(PROMPT),
                "max_tokens": 1,
                "temperature": 0,
                "prompt_logprobs": VOCAB,
            },
        )
        places = answer["choices"][0]["prompt_logprobs"][1:]
        return np.array([[place[str(token)]["logprob"] for token in range(VOCAB)] for place in places])

    def try_adapter(self, folder: Path) -> LogProbs:
        """Return what the model with an adapter says; raise Refused with the server's words."""
        try:
            self._call("/v1/load_lora_adapter", {"lora_name": folder.name, "lora_path": str(folder)})
            found = self.log_probs(folder.name)
            self._call("/v1/unload_lora_adapter", {"lora_name": folder.name})
        except Refused:
            self._revive()
            raise
        return found

    @staticmethod
    def version(python: Path) -> str:
        """Return the version of an environment's vLLM."""
        argv = [str(python), "-c", "from importlib.metadata import version; print(version('vllm'))"]
        return subprocess.run(argv, check=True, capture_output=True, text=True).stdout.strip()

    def _revive(self) -> None:
        """Start the server again where it has ended."""
        try:
            with urllib.request.urlopen(f"{self._address}/health", timeout=10):  # noqa: S310
                return
        except OSError:
            self.__exit__()
            self.__enter__()

    def _last_error(self) -> str:
        """Return the last error in the server's log, where that has ended the engine."""
        lines = [line for line in self._log.read_text(errors="replace").splitlines() if "Error: " in line]
        return (
            f": {lines[-1].rpartition('] ')[2].strip()}"
            if "EngineCore encountered" in "".join(lines[-3:])
            else ""
        )

    def _call(self, path: str, body: dict[str, Any]) -> Any:
        request = urllib.request.Request(  # noqa: S310
            self._address + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=_CALL_S) as reply:  # noqa: S310
                text = reply.read()
        except urllib.error.HTTPError as error:
            raise Refused(f"{_message(error.read())}{self._last_error()}") from error
        except OSError as error:
            raise Refused(f"the server ended: {error}") from error
        return json.loads(text) if text.startswith(b"{") else text.decode()


def _message(body: bytes) -> str:
    """Return the message of an error in OpenAI's form."""
    try:
        return str(json.loads(body)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return body.decode(errors="replace")[:500]
