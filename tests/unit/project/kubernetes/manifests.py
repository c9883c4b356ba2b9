"""The manifests as a cluster would get them, and the schemas for their check."""

import json
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import yaml

from tests.support.root import ROOT

Resource = dict[str, Any]
KUBERNETES = ROOT / "deploy/kubernetes"
VERSIONS = ("1.31", "1.37")
"""Versions of Kubernetes: the oldest that is promised, and the newest whose schemas exist."""
OVERLAYS = ("base", *sorted(f"overlays/{path.name}" for path in (KUBERNETES / "overlays").iterdir()))
HERE = Path(__file__).parent


@cache
def rendered(overlay: str) -> list[Resource]:
    return render(KUBERNETES / overlay)


def render(folder: Path) -> list[Resource]:
    kubectl = str(Path(sys.executable).with_name("kubectl"))
    done = subprocess.run([kubectl, "kustomize", str(folder)], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    return list(yaml.load_all(done.stdout, yaml.CSafeLoader))


@cache
def plain() -> list[Resource]:
    """Manifests that are applied as they are: whatever lies below deploy/ but is no part of an overlay."""
    parts = tuple(KUBERNETES / part for part in ("base", "overlays"))
    paths = [
        path for path in (ROOT / "deploy").rglob("*.y*ml") if not any(part in path.parents for part in parts)
    ]
    documents = [each for path in sorted(paths) for each in yaml.load_all(path.read_text(), yaml.CSafeLoader)]
    return [each for each in documents if isinstance(each, dict) and {"apiVersion", "kind"} <= each.keys()]


def of_kind(resources: list[Resource], *kinds: str) -> dict[str, Resource]:
    return {each["metadata"]["name"]: each for each in resources if each["kind"] in kinds}


def check(resource: Resource) -> None:
    """Raise where a resource is none that the cluster knows, or has a field that it does not know."""
    _check(json.dumps(resource))


@cache  # overlays have most of their resources from the base
def _check(text: str) -> None:
    resource = json.loads(text)
    schema = _schemas().get((resource["apiVersion"], resource["kind"]))
    if schema is not None:
        jsonschema.validate(resource, schema)
        for pod in custom_pods(resource):
            check({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "pod"}, "spec": pod})
        return
    for version in VERSIONS:
        kubernetes_validate.validate(resource, version, strict=True)


def custom_pods(resource: Resource) -> Iterator[Resource]:
    """The pods' specs of a kind that clusters learn later."""
    spec = resource.get("spec", {})
    if resource["kind"].startswith("LLMInferenceService") and "template" in spec:
        yield spec["template"]
    if resource["kind"] == "RayService":
        cluster = spec["rayClusterConfig"]
        for group in (cluster["headGroupSpec"], *cluster.get("workerGroupSpecs", ())):
            yield group["template"]["spec"]


def pods(resources: list[Resource]) -> Iterator[tuple[dict[str, str], Resource]]:
    for each in resources:
        if each["kind"] in ("Deployment", "Job"):
            template = each["spec"]["template"]
            yield template["metadata"]["labels"], template["spec"]
        for pod in custom_pods(each):
            yield each["spec"].get("labels", {}), pod


def containers(pod: Resource) -> list[Resource]:
    return [*pod.get("initContainers", ()), *pod["containers"]]


@cache
def _schemas() -> dict[tuple[str, str], Resource]:
    found: dict[tuple[str, str], Resource] = {}
    for path in sorted((HERE / "crds").glob("*.yaml")):
        for each in yaml.load_all(path.read_text(), yaml.CSafeLoader):
            named = {"apiVersion": {"const": each["apiVersion"]}, "kind": {"const": each["kind"]}}
            if "fields" in each:
                fields = each["fields"]
            elif "same" in each["spec"]:
                same = found[each["apiVersion"], each["spec"]["same"]]["properties"]["spec"]
                fields = {"metadata": {"type": "object"}, "spec": same | {"required": []}}
            else:
                fields = {"metadata": {"type": "object"}, "spec": each["spec"]}
            schema = {"required": ["apiVersion", "kind"], "properties": named | fields}
            found[each["apiVersion"], each["kind"]] = _strict(schema)
    return found


def _strict(schema: Any) -> Any:
    """Let no object have fields that are not listed."""
    if isinstance(schema, list):
        return [_strict(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    strict = {key: _strict(value) for key, value in schema.items()}
    listed = isinstance(schema.get("properties"), dict)
    return {"type": "object", "additionalProperties": False} | strict if listed else strict
