"""``make compose``: docker-compose.yml as a person runs it, and what a person or a machine may do to it.

It needs docker with compose, a registry, the stack's ports, and the example's base, which ``make demo``
downloads (BASE names another folder). Project, password and volumes are the run's own, removed at its end.
COMPOSE_FILE, and the variables of ``.env.example`` that are set, count as they do for ``docker compose``.
"""

import argparse
import json
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

ROOT: Final = Path(__file__).parents[1]
BASE: Final = Path(os.environ.get("BASE", "~/.cache/loramux/models/SmolLM2-135M-Instruct")).expanduser()
PROJECT: Final = os.environ.get("COMPOSE_PROJECT_NAME", "loramux-check")
VERSION: Final = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
BUILDER_IMAGE: Final = f"loramux-builder:{VERSION}"
MODEL: Final = "smollm2-demo"
DIRECT, ENVOY = 8000, 8001
"""Ports on this machine: a replica's, and Envoy's with ``--fleet``."""
MAX_WAIT_S: Final = 300.0
SMALL_STORE: Final = "volumes: {store: {driver_opts: {type: tmpfs, device: tmpfs, o: size=64m}}}\n"
FILL: Final = """
try:
    with open('/data/filler', 'wb', buffering=0) as file:
        while file.write(bytes(4096)): pass
except OSError as error: print(error)
"""


def end(message: str) -> None:
    """End the run with what was expected and found."""
    sys.exit(f"compose: {message}")


@contextmanager
def step(what: str) -> Iterator[None]:
    """Print what was done, and the seconds that it took."""
    began = time.monotonic()
    yield
    print(f"{time.monotonic() - began:6.1f} s  {what}", flush=True)  # noqa: T201


def run(*command: str, fails: bool = False, **environment: str) -> str:
    """Run a command, and return what it printed; end where it succeeds or fails against what is expected."""
    done = subprocess.run(  # noqa: S603 - ours
        command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, check=False
    )
    if bool(done.returncode) != fails:
        end(f"{' '.join(command)} ended with {done.returncode}:\n{(done.stdout + done.stderr)[-4000:]}")
    return done.stdout + (done.stderr if fails else "")


def wait_for(what: str, holds: Callable[[], bool]) -> None:
    """Wait until something holds; end where it does not within MAX_WAIT_S."""
    until = time.monotonic() + MAX_WAIT_S
    while not holds():
        if time.monotonic() > until:
            end(f"{what} did not happen in {MAX_WAIT_S:.0f} s")
        time.sleep(0.5)


def post(model: str, port: int = DIRECT, key: str = "") -> tuple[int, Any]:
    """Ask for eight tokens at temperature 0; return the status and the body, 0 where nobody listens."""
    body = json.dumps({"model": model, "prompt": "The sea", "max_tokens": 8, "temperature": 0}).encode()
    headers = {"content-type": "application/json"} | ({"authorization": f"Bearer {key}"} if key else {})
    request = urllib.request.Request(f"http://127.0.0.1:{port}/v1/completions", body, headers)
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:  # noqa: S310 - this machine's
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)
    except OSError:
        return 0, None


def ask(model: str, port: int = DIRECT, key: str = "") -> str:
    """Return the text of an answer; wait while the stack does not serve the model."""
    wait_for(f"an answer of {model} on port {port}", lambda: post(model, port, key)[0] == 200)
    return str(post(model, port, key)[1]["choices"][0]["text"])


class Stack:
    """The project of compose, with a deployment folder of its own."""

    def __init__(self, folder: Path) -> None:
        """Copy the example and its base, and set what a person sets in ``.env``."""
        self.deployment = folder / "deployment"
        shutil.copytree(ROOT / "examples", self.deployment)
        shutil.copytree(BASE, self.deployment / "base")
        file = self.deployment / "deployment.yaml"
        file.write_text(file.read_text().replace("~/.cache/loramux/models/SmolLM2-135M-Instruct", "base"))
        for path in (folder, *folder.rglob("*")):  # the services are another user
            path.chmod(0o755 if path.is_dir() else 0o644)
        (folder / "small.yml").write_text(SMALL_STORE)
        lines = [line for line in (ROOT / ".env.example").read_text().splitlines() if line[:1] not in ("", "#")]
        self.environment = {
            name: os.environ.get(name, value) for name, _, value in (line.partition("=") for line in lines)
        }
        self.environment |= {
            "COMPOSE_PROJECT_NAME": PROJECT,
            "COMPOSE_FILE": os.environ.get("COMPOSE_FILE", "docker-compose.yml"),
            "MINIO_ROOT_PASSWORD": secrets.token_hex(16),
            "DEPLOYMENT_FOLDER": str(self.deployment),
            "DEPLOYMENT_FILE": file.name,
            "DEPLOYMENT": MODEL,
            "SECRETS_FOLDER": str(folder / "secrets"),
        }

    def compose(self, *arguments: str, fails: bool = False) -> str:
        """Run ``docker compose``, and return what it printed."""
        return run("docker", "compose", *arguments, fails=fails, **self.environment)

    def loramux(self, *arguments: str, fails: bool = False) -> str:
        """Run the command line beside the builder, and return what it printed."""
        return self.compose("exec", "-T", "builder", "loramux", *arguments, fails=fails)

    def state(self, service: str) -> tuple[int, str]:
        """Return how often a service was restarted, its process, and how it is."""
        container = self.compose("ps", "--quiet", service).strip()
        form = "{{.RestartCount}} {{.State.Pid}} {{.State.Health.Status}}"
        count, rest = run("docker", "inspect", "--format", form, container).strip().split(" ", 1)
        return int(count), rest

    def kill(self, service: str) -> None:
        """Kill a service's process, as the kernel does; wait until it was started again and is healthy."""
        count, rest = self.state(service)
        python = ("python", "-c", f"import os; os.kill({rest.split()[0]}, 9)")
        run("docker", "run", "--rm", "--pid", "host", "--user", "0", BUILDER_IMAGE, *python)
        wait_for(
            f"a restart of {service}",
            lambda: self.state(service)[0] > count and self.state(service)[1].endswith(" healthy"),
        )

    def in_store(self, code: str) -> str:
        """Run Python with the store's volume as /data, and return what it printed."""
        volume = ("--volume", f"{PROJECT}_store:/data", "--user", "0")
        return run("docker", "run", "--rm", *volume, BUILDER_IMAGE, "python", "-c", code)


def serve(stack: Stack) -> dict[str, str]:
    """Build the images and start everything; return the answer of each model."""
    with step("build of both images"):
        stack.compose("build")
    for service in ("builder", "inference"):
        size = run("docker", "images", "--format", "{{.Size}}", f"loramux-{service}:{VERSION}").strip()
        print(f"          loramux-{service}: {size}")  # noqa: T201
    with step("first start"):
        stack.compose("up", "--detach", "--wait")
    with step("a question to each adapter and the base"):
        answers = {model: ask(model) for model in ("pirate", "bard", "json", "SmolLM2-135M-Instruct")}
    if len(set(answers.values())) != len(answers):
        end(f"expected four different answers, and got {answers}")
    return answers


def change(stack: Stack, answers: dict[str, str]) -> None:
    """Add an adapter, and change the files of another."""
    with step("an adapter added while it serves"):
        stack.loramux("add", "added", "/deployment/adapters/bard")
        expect("added", answers["bard"])
    with step("a changed file of an adapter, built and served"):
        shutil.copytree(
            stack.deployment / "adapters/json", stack.deployment / "adapters/pirate", dirs_exist_ok=True
        )
        stack.compose("up", "build")
        stack.compose("restart", "inference")
        expect("pirate", answers["json"])


def expect(model: str, answer: str, port: int = DIRECT, key: str = "") -> None:
    """End the run where a model's answer is another."""
    if (found := ask(model, port, key)) != answer:
        end(f"{model}: expected {answer!r}, and got {found!r}")


def disturb(stack: Stack, answers: dict[str, str]) -> None:
    """Restart and kill services, and stop and start everything; the adapters stay."""
    with step("a restart of inference"):
        stack.compose("restart", "inference")
        expect("bard", answers["bard"])
    for service in ("inference", "builder", "minio"):
        with step(f"kill -9 of {service}"):
            stack.kill(service)
            expect("bard", answers["bard"])
    with step("down and up"):
        stack.compose("down")
        stack.compose("up", "--detach", "--wait")
        expect("added", answers["bard"])


def require_keys(stack: Stack, answers: dict[str, str]) -> None:
    """Set keys, as .env has them: who has none is refused, and compose's build goes on."""
    made = {
        scope: json.loads(stack.loramux("keys", "new", "--scope", scope, "--json"))
        for scope in ("infer", "build")
    }
    stack.environment |= {
        "LORAMUX_API_KEYS": "\n".join(json.dumps(each["entry"]) for each in made.values()),
        "LORAMUX_API_KEY": made["build"]["key"],
    }
    with step("keys: a start with them"):
        stack.compose("up", "--detach", "--wait")
        expect("bard", answers["bard"], key=made["infer"]["key"])
    found = [post("bard", key=key)[0] for key in ("", made["build"]["key"])]
    if found != [401, 403]:
        end(f"expected 401 without a key and 403 with that of the build, and got {found}")
    stack.environment |= {"LORAMUX_API_KEYS": "", "LORAMUX_API_KEY": ""}


def fill_the_store(stack: Stack, answers: dict[str, str]) -> None:
    """Fill a store of 64 MB: what it has is served, and an adapter is refused until there is room."""
    stack.compose("down", "--volumes")
    stack.environment["COMPOSE_FILE"] += f":{stack.deployment.with_name('small.yml')}"
    with step("a start with a store of 64 MB"):
        stack.compose("up", "--detach", "--wait")
    with step("the full store: an adapter is refused, and the others are served"):
        stack.in_store(FILL)
        found = stack.loramux("add", "added", "/deployment/adapters/bard", fails=True)
        if "STORE_UNAVAILABLE" not in found:
            end(f"expected STORE_UNAVAILABLE of a full store, and got {found}")
        expect("bard", answers["bard"])
    with step("room again: the adapter is added"):
        stack.in_store("import os; os.remove('/data/filler')")
        stack.loramux("add", "added", "/deployment/adapters/bard")
        expect("added", answers["bard"])


def serve_a_fleet(stack: Stack, answers: dict[str, str]) -> None:
    """Ask two replicas through Envoy."""
    with step("--profile fleet"):
        stack.compose("--profile", "fleet", "up", "--detach", "--wait")
        expect("bard", answers["bard"], ENVOY)


def main() -> None:
    """Run everything, and remove it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--fleet", action="store_true", help="Run a second replica, and Envoy before both.")
    fleet = parser.parse_args().fleet
    if not (BASE / "config.json").exists():
        end(f"no checkpoint in {BASE}; run `make demo` first, or set BASE")
    (ROOT / "build").mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=ROOT / "build", prefix="compose-") as folder:
        stack = Stack(Path(folder))
        try:
            answers = serve(stack)
            change(stack, answers)
            disturb(stack, answers)
            require_keys(stack, answers)
            fill_the_store(stack, answers)
            if fleet:
                serve_a_fleet(stack, answers)
        except SystemExit:
            print(stack.compose("logs", "--tail", "20"), file=sys.stderr)  # noqa: T201
            raise
        finally:
            stack.compose("--profile", "fleet", "down", "--volumes", "--timeout", "40")


if __name__ == "__main__":
    main()
