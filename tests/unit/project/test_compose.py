"""The deployment artefacts against the code: settings, commands, images and packaging agree."""

import importlib.util
import os
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from inference_service.engine.kernels.cpu import build
from loramux_shared.settings import (
    CLIENT_VARIABLES,
    PREFIX,
    BuilderSettings,
    InferenceSettings,
    Settings,
    load_settings,
)
from loramux_shared.storage.open import open_store
from tests.support.processes.commands import assert_takes
from tests.support.root import ROOT

COMPOSE_TEXT = (ROOT / "docker-compose.yml").read_text(encoding="utf-8")
RAW: dict[str, dict[str, Any]] = yaml.safe_load(COMPOSE_TEXT)["services"]
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
DOCKERFILES = sorted((ROOT / "deploy").glob("*.Dockerfile"))
SERVICES: dict[str, type[Settings]] = {"builder": BuilderSettings, "inference": InferenceSettings}
_VARIABLE = re.compile(r"\$\{(\w+)(?::[-?]([^}]*))?\}")


def _env_example() -> dict[str, str]:
    lines = (ROOT / ".env.example").read_text(encoding="utf-8").splitlines()
    return dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))


def _environment(service: str) -> dict[str, str]:
    """A service's variables as compose fills them in when a person set every variable of .env."""
    values = {name: value or "set-by-a-person" for name, value in _env_example().items()}
    provided = RAW[service].get("environment", {})
    return {name: _VARIABLE.sub(lambda match: values[match[1]], text) for name, text in provided.items()}


def _dockerfile(service: str) -> str:
    return (ROOT / str(RAW[service]["build"]["dockerfile"])).read_text(encoding="utf-8")


def _one_shot(service: str) -> bool:
    return bool(RAW[service]["restart"] == "no")


def settings_in(environment: dict[str, str], service: str) -> Any:
    """A service's settings: every LORAMUX_* variable is one, or a client's, as replicas are builders'."""
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith(PREFIX)]:
            patch.delenv(name)
        for name, value in environment.items():
            patch.setenv(name, value)
        settings = load_settings(SERVICES[service])
        own = {name.removeprefix(PREFIX).lower() for name in environment if name.startswith(PREFIX)}
        assert own - {name.lower() for name in CLIENT_VARIABLES} <= settings.model_fields_set
        assert open_store(settings.store).uri == settings.store
    return settings


@pytest.mark.parametrize("service", SERVICES)
def test_the_services_start_with_these_settings(service):
    """The environment of a service is a valid configuration of it."""
    assert isinstance(settings_in(_environment(service), service), SERVICES[service])


def test_both_services_use_one_store() -> None:
    """Builder and inference name the same store, and the bucket is made before they start."""
    builder, inference = _environment("builder"), _environment("inference")
    store = {name: value for name, value in builder.items() if name.startswith(("AWS_", "LORAMUX_STORE"))}
    assert store.items() <= inference.items()
    assert store["LORAMUX_STORE"].replace("s3://", "store/") in RAW["bucket"]["command"][0]


@pytest.mark.parametrize("service", SERVICES)
def test_ports_agree(service: str) -> None:
    """The port of a service is that of its health check, its image and its clients."""
    host, port = _environment(service)["LORAMUX_GRPC"].split(":")
    assert host == "0.0.0.0"  # noqa: S104 - inside a container
    assert RAW[service]["healthcheck"]["test"][-1] == f"127.0.0.1:{port}"
    assert f"EXPOSE {port}\n" in _dockerfile(service)
    assert RAW["build"]["command"][-1] == f"builder:{_environment('builder')['LORAMUX_GRPC'].split(':')[1]}"


def test_the_openai_api_is_reached() -> None:
    """The port of the OpenAI API is exposed and published on this machine."""
    port = _environment("inference")["LORAMUX_HTTP"].removeprefix("0.0.0.0:")
    assert f"EXPOSE {port}\n" in _dockerfile("inference")
    assert f"127.0.0.1:{port}:{port}" in RAW["inference"]["ports"]


def test_published_ports_are_local() -> None:
    """Ports without authentication are published on this machine alone."""
    ports = [port for service in RAW.values() for port in service.get("ports", ())]
    assert ports
    assert all(port.startswith("127.0.0.1:") for port in ports)


def test_images_are_pinned() -> None:
    """Every image has a version; ours has that of the project."""
    images = {service: RAW[service]["image"] for service in RAW}
    for service, image in images.items():
        name, _, tag = image.rpartition(":")
        assert re.search(r"\d+\.\d+|RELEASE\.\d{4}-\d\d-\d\d", tag), image
        if name.startswith("loramux-"):
            assert tag == PROJECT["version"], service
    bases = [base for path in DOCKERFILES for base in re.findall(r"^FROM (\S+)", path.read_text(), re.M)]
    assert len(bases) == 2 * len(DOCKERFILES)
    assert all(re.fullmatch(r"python:3\.\d+-slim-\w+(@sha256:[0-9a-f]{64})?", base) for base in bases)
    assert len(set(bases)) == 1


def test_the_images_python_is_supported() -> None:
    """The images run the oldest Python that the project promises, which is the one tested."""
    oldest = PROJECT["requires-python"].removeprefix(">=")
    assert all(f"FROM python:{oldest}-slim" in path.read_text() for path in DOCKERFILES)


def test_long_running_services_have_health_checks() -> None:
    """The services that stay have a health check, and one-shot services have none."""
    assert {service for service in RAW if not _one_shot(service)} == {
        service for service in RAW if "healthcheck" in RAW[service]
    }


def test_waiting_can_end() -> None:
    """A service waits for the end of a one-shot service, or for the health of one that stays."""
    conditions = [
        (other, wait["condition"])
        for service in RAW.values()
        for other, wait in service.get("depends_on", {}).items()
    ]
    assert conditions
    for other, condition in conditions:
        assert condition == ("service_completed_successfully" if _one_shot(other) else "service_healthy")


def test_inference_waits_for_everything() -> None:
    """Inference starts behind the build, which starts behind the builder and its bucket."""
    chain, service = [], "inference"
    while "depends_on" in RAW[service]:
        [service] = RAW[service]["depends_on"]
        chain.append(service)
    assert chain == ["build", "builder", "bucket", "minio"]


@pytest.mark.parametrize("service", SERVICES)
def test_stopping_leaves_time_to_drain(service: str) -> None:
    """The grace period of a service is longer than its time to drain."""
    grace_s = int(RAW[service]["stop_grace_period"].removesuffix("s"))
    assert grace_s > SERVICES[service].model_fields["drain_timeout_s"].default


def test_credentials_come_from_the_environment() -> None:
    """No credential is written down, and compose refuses to start without the store's."""
    secret = re.compile(r"KEY|PASSWORD|SECRET|_USER")
    texts = {
        f"{service}.{name}": text
        for service in RAW
        for name, text in RAW[service].get("environment", {}).items()
        if secret.search(name)
    }
    optional = {name: text for name, text in texts.items() if "LORAMUX_API_KEY" in name}
    required = texts.items() - optional.items()
    assert required
    assert all(re.fullmatch(r"\$\{\w+:\?[^}]+\}", text) for _, text in required), required
    assert set(optional.values()) == {"${LORAMUX_API_KEYS:-}", "${LORAMUX_API_KEY:-}"}
    assert _env_example()["MINIO_ROOT_PASSWORD"] == ""


def test_every_variable_is_documented() -> None:
    """The example of an environment has every variable of the compose file, and no other."""
    assert {match[1] for match in _VARIABLE.finditer(COMPOSE_TEXT)} == set(_env_example())


@pytest.mark.parametrize("service", SERVICES)
def test_volumes_can_be_written(service: str) -> None:
    """A named volume is mounted where the image has a folder of the user that it runs as."""
    named = [volume.split(":")[1] for volume in RAW[service]["volumes"] if isinstance(volume, str)]
    text = _dockerfile(service)
    assert named
    assert all(f"install --directory --owner=loramux {folder}\n" in text for folder in named)
    assert text.index("useradd --uid 10001") < text.index("\nUSER 10001\n") < text.index("\nCMD ")


@pytest.mark.parametrize("service", SERVICES)
def test_images_run_modules_that_exist(service: str) -> None:
    """The command of an image is a module of this repository."""
    [command] = re.findall(r"^CMD \[(.*)\]$", _dockerfile(service), re.M)
    python, flag, module = [part.strip(' "') for part in command.split(",")]
    assert (python, flag) == ("python", "-m")
    assert importlib.util.find_spec(f"{module}.__main__") is not None


def test_commands_exist() -> None:
    """The commands of the compose file are scripts of the project, with options that they have."""
    commands = [RAW["build"]["command"], *(RAW[name]["healthcheck"]["test"][1:] for name in SERVICES)]
    assert {command[0] for command in commands} <= set(PROJECT["scripts"])
    for _, name, *arguments in commands:
        assert_takes(name, arguments)


def _requirements(extra: str) -> set[str]:
    """The names of everything that an extra asks for, through the extras that it names."""
    names: set[str] = set()
    for requirement in PROJECT["optional-dependencies"][extra]:
        name, inner = re.match(r"([\w.-]+)(?:\[([\w,-]+)\])?", requirement).groups()  # type: ignore[union-attr]
        if name == PROJECT["name"]:
            names = names.union(*map(_requirements, inner.split(",")))
        else:
            names.add(name)
    return names


def test_the_builder_image_has_no_torch() -> None:
    """The builder's image installs no torch, the inference image does; both know every source."""
    installed = {}
    for service in SERVICES:
        [extras] = re.findall(r"'\.\[([\w,]+)\]'", _dockerfile(service))
        installed[service] = set().union(*map(_requirements, extras.split(",")))
        assert {"boto3", "huggingface-hub", "google-auth", "azure-storage-blob"} <= installed[service]
    assert not {"torch", "triton", "transformers", "peft"} & installed["builder"]
    assert "torch" in installed["inference"]


def test_the_inference_image_has_compiled_operations() -> None:
    """The stage with the compiler makes them where the package is installed, before that is copied."""
    install, run = re.split(r"^FROM .+$", _dockerfile("inference"), flags=re.M)[1:]
    assert "install --yes --no-install-recommends g++" in install
    [module] = re.findall(r"^RUN cd / && /opt/loramux/bin/python -m (\S+)$", install, re.M)
    assert module == build.__name__
    assert Path(build.__file__).parent == build.BEFOREHAND.parent
    assert install.index("/bin/pip install") < install.index(module)
    assert "COPY --from=install /opt/loramux /opt/loramux" in run
    assert "g++" not in run


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_images_get_all_that_the_package_is_made_of(path: Path) -> None:
    """Packages of pyproject.toml are copied into the image's build, and reach it past .dockerignore."""
    wheel = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
    needed = {"pyproject.toml", "hatch_build.py", "README.md", *PROJECT["license-files"]}
    needed |= {package.partition("/")[0] for package in wheel["packages"]}
    examples = {"examples"}  # which the builder's image has beside the wheel
    copied = {
        source
        for line in re.findall(r"^COPY (?!--from)(.+)$", path.read_text(), re.M)
        for source in line.split()[:-1]
    }
    sent = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    assert copied - examples == sent - examples == needed
    assert (examples <= copied) == (path.name == "builder.Dockerfile")
    assert all((ROOT / source).exists() for source in copied - {"extensions"})  # which may be gone


def test_the_file_for_gpus_changes_the_service_that_computes() -> None:
    """Laid over the main file it gives the inference service, and no other, one device: a replica uses one."""
    over = yaml.safe_load((ROOT / "deploy" / "gpu.yml").read_text(encoding="utf-8"))["services"]
    assert list(over) == ["inference"]
    assert "deploy" not in RAW["inference"]
    [device] = over["inference"]["deploy"]["resources"]["reservations"]["devices"]
    assert device == {"driver": "nvidia", "count": 1, "capabilities": ["gpu"]}
    assert "# COMPOSE_FILE=docker-compose.yml:deploy/gpu.yml" in (ROOT / ".env.example").read_text()


def test_the_file_for_another_s3_server_changes_the_store_alone() -> None:
    """Laid over the main file it serves the same folder on the same port with the same password, by rclone."""
    over = yaml.safe_load((ROOT / "deploy" / "rclone.yml").read_text(encoding="utf-8"))["services"]
    assert list(over) == ["minio", "bucket"]
    [at] = re.findall(r"http://minio(:\d+)", RAW["builder"]["environment"]["AWS_ENDPOINT_URL_S3"])
    secrets = "${MINIO_ROOT_USER},${MINIO_ROOT_PASSWORD}"
    assert over["minio"]["command"] == ["serve", "s3", "--addr", at, "--auth-key", secrets, "/data"]
    assert over["bucket"]["volumes"] == RAW["minio"]["volumes"] == ["store:/data"]
    bucket = RAW["builder"]["environment"]["LORAMUX_STORE"].removeprefix("s3://")
    assert over["bucket"]["command"] == ["mkdir", f"/data/{bucket}"]


def test_a_password_that_was_not_set_is_reported_as_such() -> None:
    """The error of a missing password says to set one, and not to copy .env."""
    stated = re.findall(r"MINIO_ROOT_PASSWORD:[?]([^}]*)", COMPOSE_TEXT)
    assert stated
    assert all("set a password" in text for text in stated)
