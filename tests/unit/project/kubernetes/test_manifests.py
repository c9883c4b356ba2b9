"""Every manifest is one that a cluster takes: rendered, and checked field by field."""

import os
import re
from pathlib import Path

import pytest
import yaml

from tests.support.root import ROOT
from tests.unit.project.kubernetes import manifests


@pytest.mark.parametrize("overlay", manifests.OVERLAYS)
def test_every_overlay_is_taken(overlay: str) -> None:
    """An overlay renders without a warning; each resource is unique, and has known fields only."""
    resources = manifests.rendered(overlay)
    for each in resources:
        manifests.check(each)
    names = [(each["kind"], each["metadata"]["name"]) for each in resources]
    assert len(set(names)) == len(names)
    if overlay != "base":
        assert all(each["metadata"]["namespace"] == "loramux" for each in resources)


def test_what_is_applied_as_it_is_is_taken() -> None:
    """KServe's, Ray's and whatever else lies beside the overlays, with the pods in it."""
    found = manifests.plain()
    assert {"LLMInferenceService", "LLMInferenceServiceConfig"} <= {each["kind"] for each in found}
    for each in found:
        manifests.check(each)


def test_an_overlay_of_ones_own(tmp_path: Path) -> None:
    """The overlay of the page about fleets names its store, images and model."""
    [text] = re.findall(r"```yaml\n(# my-overlay.+?)```", (ROOT / "docs/guides/fleet.md").read_text(), re.S)
    overlay = yaml.safe_load(text)
    overlay["resources"] = [os.path.relpath(manifests.KUBERNETES / "base", tmp_path.resolve())]
    (tmp_path / "kustomization.yaml").write_text(yaml.safe_dump(overlay))
    (tmp_path / "deployment.yaml").write_text("model_name: my-model\n")
    resources = manifests.render(tmp_path)
    for each in resources:
        manifests.check(each)
    stated = yaml.safe_dump_all(resources)
    for mine in ("s3://my-bucket/loramux", "LORAMUX_DEPLOYMENT: my-model", "model_name: my-model"):
        assert mine in stated
    assert (stated.count("image: registry.example.com/loramux-"), stated.count(": my-base")) == (4, 2)
