"""The manifests against the code, the images and each other: settings, ports, selectors, secrets and times."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from loramux_shared.deployment_file import parse_deployment
from tests.golden.metrics.script import NAMES
from tests.support.processes.commands import assert_takes
from tests.support.root import ROOT
from tests.unit.project.kubernetes.manifests import (
    KUBERNETES,
    OVERLAYS,
    Resource,
    containers,
    of_kind,
    plain,
    pods,
    rendered,
)
from tests.unit.project.test_compose import settings_in

IMAGES = {
    service["image"]
    for service in yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"].values()
    if service["image"].startswith("loramux-")
}
OURS = re.compile(r"loramux-(builder|inference):")
PACKAGES = Path("/opt/loramux/lib/python3.11/site-packages/loramux")
"""Folder of the package in the images."""
each_set = pytest.mark.parametrize("name", [*OVERLAYS, "plain"])


def made(name: str) -> list[Resource]:
    return plain() if name == "plain" else rendered(name)


def services(resources: list[Resource]) -> Iterator[tuple[str, Resource, Resource]]:
    """The pods that run a service of ours: which one, the pod, and the container."""
    for _, pod in pods(resources):
        [container, *_] = pod["containers"]
        match = OURS.match(container["image"])
        if match and container.get("ports"):
            yield match[1], pod, container


def environment(container: Resource, resources: list[Resource]) -> dict[str, str]:
    """Return the environment of a container's process; secrets are any text."""
    found: dict[str, str] = {}
    for source in container.get("envFrom", ()):
        if "configMapRef" in source:
            found |= of_kind(resources, "ConfigMap")[source["configMapRef"]["name"]]["data"]
    for each in container.get("env", ()):
        source = each.get("valueFrom", {})
        field = source.get("resourceFieldRef", {}).get("resource", "")
        requested = container["resources"]["requests"].get(field.removeprefix("requests."), "a secret")
        found[each["name"]] = each.get("value", requested)
    return found


def seconds(probe: Resource) -> float:
    """Return how long a probe fails before it has an effect."""
    return float(probe.get("periodSeconds", 10) * probe.get("failureThreshold", 3))


def selectors(resources: list[Resource]) -> Iterator[tuple[str, dict[str, str]]]:
    for each in resources:
        spec, name = each.get("spec", {}), f"{each['kind']} {each['metadata']['name']}"
        if each["kind"] == "Service":
            yield name, spec["selector"]
        elif each["kind"] == "NetworkPolicy":
            yield name, spec["podSelector"].get("matchLabels", {})
            for peer in (*spec.get("ingress", ()), *spec.get("egress", ())):
                for side in (*peer.get("from", ()), *peer.get("to", ())):
                    yield name, side.get("podSelector", {}).get("matchLabels", {})
        elif "selector" in spec:
            yield name, spec["selector"]["matchLabels"]


@each_set
def test_the_services_start_with_these_settings(name):
    """The environment of every pod is a valid configuration, with the bucket, and keys or a reason for none."""
    for service, _, container in services(made(name)):
        settings = settings_in(environment(container, made(name)), service)
        assert settings.store == "s3://loramux"
        assert settings.keys_file or settings.insecure


@each_set
def test_times_fit_into_each_other(name: str) -> None:
    """A pod may drain before it is killed, no probe kills one that drains; a first start has half an hour."""
    for service, pod, container in services(made(name)):
        provided = environment(container, made(name))
        drain = float(provided.get("LORAMUX_DRAIN_DELAY_S", 0)) + float(provided["LORAMUX_DRAIN_TIMEOUT_S"])
        assert pod["terminationGracePeriodSeconds"] > drain + 5
        assert seconds(container["livenessProbe"]) > drain + 5
        if service == "inference":
            assert seconds(container["readinessProbe"]) < float(provided["LORAMUX_DRAIN_DELAY_S"])
            assert seconds(container["startupProbe"]) == 1800


@each_set
def test_ports_agree(name: str) -> None:
    """A container has the ports that its service listens on, which its image exposes and its probes use."""
    for service, _, container in services(made(name)):
        provided, ports = environment(container, made(name)), container["ports"]
        listens = {
            int(value.rpartition(":")[2])
            for variable, value in provided.items()
            if variable in ("LORAMUX_GRPC", "LORAMUX_HTTP", "LORAMUX_METRICS")
        }
        assert {port["containerPort"] for port in ports} == listens
        exposed = re.findall(r"^EXPOSE (\d+)", (ROOT / f"deploy/{service}.Dockerfile").read_text(), re.M)
        assert set(map(int, exposed)) <= listens
        known = {port["name"] for port in ports} | listens
        for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
            query = container[probe].get("httpGet") or container[probe]["grpc"]
            assert query["port"] in known
            assert query.get("path", "/health") == "/health"


@each_set
def test_selectors_find_pods(name: str) -> None:
    """Every selector of pods finds some, and none of another kind of ours."""
    labels = [each for each, _ in pods(made(name))]
    for caller, expected in selectors(made(name)):
        found = [each for each in labels if expected.items() <= each.items()]
        assert found, caller
        if "app.kubernetes.io/component" in expected:
            assert len(found) == 1, caller


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_named_ports_are_there(overlay: str) -> None:
    """Services, monitors and policies go to ports that the pods they select have."""
    resources = rendered(overlay)
    ports = [
        (port, labels)
        for labels, pod in pods(resources)
        for container in pod["containers"]
        for each in container.get("ports", ())
        for port in (each["name"], each["containerPort"])
    ]
    for each in resources:
        spec, requests = each.get("spec", {}), []
        if each["kind"] == "Service":
            requests = [(port["targetPort"], spec["selector"]) for port in spec["ports"]]
        elif each["kind"] == "PodMonitor":
            requests = [(end["port"], spec["selector"]["matchLabels"]) for end in spec["podMetricsEndpoints"]]
        elif each["kind"] == "NetworkPolicy":
            own = spec["podSelector"].get("matchLabels", {})
            requests = [(port["port"], own) for rule in spec.get("ingress", ()) for port in rule["ports"]]
        for port, expected in requests:
            owners = [labels for known, labels in ports if known == port]
            assert any(expected.items() <= labels.items() for labels in owners), each


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_what_is_referred_to_exists(overlay: str) -> None:
    """Scalers, roles and config maps name existing resources."""
    resources = rendered(overlay)
    there = {(each["kind"], each["metadata"]["name"]) for each in resources}
    for each in of_kind(resources, "ScaledObject").values():
        target = each["spec"]["scaleTargetRef"]
        assert (target["kind"], target["name"]) in there
        assert "replicas" not in of_kind(resources, "Deployment")[target["name"]]["spec"]
    for _, pod in pods(resources):
        assert "serviceAccountName" not in pod or ("ServiceAccount", pod["serviceAccountName"]) in there
        for volume in pod.get("volumes", ()):
            assert "configMap" not in volume or ("ConfigMap", volume["configMap"]["name"]) in there
        mounted = {mount["name"] for each in containers(pod) for mount in each.get("volumeMounts", ())}
        assert mounted == {volume["name"] for volume in pod.get("volumes", ())}


@each_set
def test_a_missing_secret_is_refused_with_how_to_make_it(name: str) -> None:
    """Every secret and each of its keys that is read stands in the commands of the page about fleets."""
    page = (ROOT / "docs/guides/fleet.md").read_text(encoding="utf-8")
    for kind, secret, key in _secrets(made(name)):
        assert f"create secret generic {secret}" in page, (kind, secret)
        assert not key or re.search(rf"--from-(literal|file)={key}=", page), (kind, secret, key)


def _secrets(resources: list[Resource]) -> Iterator[tuple[str, str, str]]:
    for _, pod in pods(resources):
        for volume in pod.get("volumes", ()):
            if "secret" in volume:
                yield "volume", volume["secret"]["secretName"], ""
        for each in containers(pod):
            for source in each.get("envFrom", ()):
                if "secretRef" in source:
                    yield "environment", source["secretRef"]["name"], ""
            for variable in each.get("env", ()):
                if (required := variable.get("valueFrom", {}).get("secretKeyRef")) is not None:
                    yield variable["name"], required["name"], required["key"]
    for monitor in of_kind(resources, "PodMonitor").values():
        for end in monitor["spec"]["podMetricsEndpoints"]:
            if "authorization" in end:
                required = end["authorization"]["credentials"]
                yield "monitor", required["name"], required["key"]


@each_set
def test_images_are_those_of_compose(name: str) -> None:
    """Ours have the project's version; all others name theirs."""
    for _, pod in pods(made(name)):
        for container in containers(pod):
            image = container["image"]
            ours = image.replace("loramux-ray", "loramux-inference")  # the same with more extras
            assert ours in IMAGES if ours.startswith("loramux-") else re.search(r":v?\d+\.\d+", image), image


@each_set
def test_pods_may_do_little(name: str) -> None:
    """A pod runs without root, writable files, capabilities and a token of Kubernetes, within its resources."""
    for _, pod in pods(made(name)):
        assert pod["enableServiceLinks"] is False
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        autoscales = pod["containers"][0]["name"] == "ray-head"  # and asks Kubernetes for workers
        assert pod.get("serviceAccountName") or pod["automountServiceAccountToken"] is autoscales
        for container in containers(pod):
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }
            assert "memory" in container["resources"]["limits"]
            assert {"cpu", "memory"} <= container["resources"]["requests"].keys()
            if container["image"].startswith("loramux-"):
                user = f"USER {pod['securityContext']['runAsUser']}\n"
                assert user in (ROOT / "deploy/inference.Dockerfile").read_text()


@each_set
def test_what_is_written_lies_on_volumes(name: str) -> None:
    """Cache, work folder, home and the folders of the images are on volumes of the pod that may be written."""
    for service, pod, container in services(made(name)):
        provided = environment(container, made(name))
        of_image = re.findall(r"TRITON_CACHE_DIR=(\S+)", (ROOT / f"deploy/{service}.Dockerfile").read_text())
        expected = {provided["HOME"], "/tmp", *of_image}  # noqa: S108 - the folder in the container
        expected |= {provided[key] for key in ("LORAMUX_CACHE_DIR", "LORAMUX_WORK_DIR") if key in provided}
        empty = {volume["name"] for volume in pod["volumes"] if "emptyDir" in volume}
        mounts = [Path(each["mountPath"]) for each in container["volumeMounts"] if each["name"] in empty]
        for folder in map(Path, expected):
            assert any(mount == folder or mount in folder.parents for mount in mounts), folder


def test_the_example_is_what_is_served() -> None:
    """The file is valid, replicas serve its name, labels name its base, and the image has its adapters."""
    file = yaml.safe_load((KUBERNETES / "base/deployment.yaml").read_text())
    deployment = parse_deployment(file).deployment
    for resources in map(made, (*OVERLAYS, "plain")):
        for service, _, container in services(resources):
            if service == "inference":
                provided = environment(container, resources)
                assert provided["LORAMUX_DEPLOYMENT"] == deployment.model_name
    base = file["runtime"]["served_model_name"]
    [labels] = [labels for labels, _ in pods(rendered("base")) if "model" in labels]
    assert labels["model"] == labels["model.aibrix.ai/name"] == base
    assert labels["model.aibrix.ai/port"] == "8000"
    [kserve] = of_kind(plain(), "LLMInferenceService").values()
    assert kserve["spec"]["model"]["name"] == base
    adapters = file["build"]["lora_adapters"]
    assert {each["name"] for each in kserve["spec"]["model"]["lora"]["adapters"]} == set(adapters)
    for each in adapters.values():
        assert (ROOT / Path(each["repo"]).relative_to(PACKAGES) / "adapter_config.json").is_file()
    [builder] = [each for service, _, each in services(rendered("base")) if service == "builder"]
    assert environment(builder, rendered("base"))["LORAMUX_LOCAL_ROOTS"] == str(PACKAGES / "examples")
    image = f"python:{PACKAGES.parts[4].removeprefix('python')}-slim"
    assert image in (ROOT / "deploy/builder.Dockerfile").read_text()


def test_the_autoscaler_asks_for_metrics_that_exist() -> None:
    """The query of the autoscaler names an exported metric and the overlay's namespace."""
    exported = {line.split()[1] for line in NAMES.read_text().splitlines()}
    [keda] = of_kind(rendered("overlays/gpu"), "ScaledObject").values()
    query = keda["spec"]["triggers"][0]["metadata"]["query"]
    assert set(re.findall(r"vllm:\w+", query)) <= exported
    assert 'namespace="loramux"' in query
    assert keda["metadata"]["namespace"] == "loramux"


def test_commands_exist() -> None:
    """The commands of pods are commands of loramux, with options that they have."""
    ran = [each.get("command", [""]) for _, pod in pods(rendered("base")) for each in containers(pod)]
    ours = [words for words in ran if words[0] == "loramux"]
    assert len(ours) == 2
    for _, name, *arguments in ours:
        assert_takes(name, arguments)
