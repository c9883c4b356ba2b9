"""The dashboard, Prometheus and Grafana in compose, against the metrics that the code exports."""

import json
import re
from typing import Any

import yaml

from tests.golden.metrics.script import everything, of_builder
from tests.support.root import ROOT

DASHBOARD: dict[str, Any] = json.loads((ROOT / "deploy/grafana/loramux.json").read_text())
COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
PROMETHEUS: dict[str, Any] = yaml.safe_load((ROOT / "deploy/prometheus.yml").read_text())
[DATASOURCE] = yaml.safe_load((ROOT / "deploy/grafana/datasources.yml").read_text())["datasources"]
PANELS: list[dict[str, Any]] = DASHBOARD["panels"]
QUERIES = [target["expr"] for panel in PANELS for target in panel.get("targets", ())]
VARIABLES = [variable["query"]["query"] for variable in DASHBOARD["templating"]["list"]]
LINES = [*everything().names(), *of_builder().names()]
EXPORTED = {line.split(" ")[0]: line.partition("{")[2][:-1].split(",") for line in LINES}


def _family(name: str) -> str:
    return re.sub(r"_(bucket|count|sum)$", "", name)


def test_every_query_asks_for_what_is_exported() -> None:
    """The metrics and labels of every query exist."""
    for query in (*QUERIES, *VARIABLES):
        names = re.findall(r"\b(?:loramux|process|vllm)[a-z_:]+", query)
        assert names, query
        assert set(names) <= set(EXPORTED), query
        known = {label for name in names for label in EXPORTED[name]} | {"instance"}
        labels = re.findall(r"(\w+)=~", query) + re.findall(r"by \((.*?)\)", query)
        assert {part for label in labels for part in label.split(", ")} <= known, query


def test_everything_that_is_exported_for_people_is_shown() -> None:
    """Every family of metrics has a place in the dashboard."""
    printed = set(re.findall(r"loramux_[a-z_]+", " ".join((*QUERIES, *VARIABLES))))
    families = {_family(name) for name in EXPORTED if name.startswith("loramux_")}
    assert {_family(name) for name in printed} == families


def test_every_metric_is_documented() -> None:
    """The operator's page names each metric that is exported, and no other."""
    page = (ROOT / "docs/reference/metrics.md").read_text()
    families = {_family(name) for name in EXPORTED if not name.startswith("process_")}
    assert set(re.findall(r"`((?:loramux_|vllm:)[a-z_]+)`", page)) == families


def test_rates_are_taken_of_counters_alone() -> None:
    """A rate of a gauge is a number without a meaning, and so is a counter without its rate."""
    counters = {name for name in EXPORTED if name.endswith(("_total", "_bucket", "_count", "_sum"))}
    for query in QUERIES:
        rated = set(re.findall(r"(?:rate|increase)\(([\w:]+)", query))
        assert rated == counters & set(re.findall(r"[\w:]+", query)), query


def test_panels_use_the_provisioned_source() -> None:
    """The dashboard's source is the one that Grafana is given, and that is compose's Prometheus."""
    used = {panel["datasource"]["uid"] for panel in PANELS if panel["type"] != "row"}
    assert used == {DATASOURCE["uid"]}
    assert DATASOURCE["url"] == "http://prometheus:9090"
    assert DATASOURCE["jsonData"]["timeInterval"] == PROMETHEUS["global"]["scrape_interval"]


def test_prometheus_scrapes_both_services() -> None:
    """The targets are where compose has both services listen, and the key lies where compose puts it."""
    job, builder = PROMETHEUS["scrape_configs"]
    for name, each, setting in (("inference", job, "LORAMUX_HTTP"), ("builder", builder, "LORAMUX_METRICS")):
        port = SERVICES[name]["environment"][setting].rpartition(":")[2]
        assert each["static_configs"] == [{"targets": [f"{name}:{port}"]}]
    [config] = SERVICES["prometheus"]["configs"]
    assert config["source"] in COMPOSE["configs"]
    assert job["authorization"]["credentials_file"] == config["target"]


def test_grafana_finds_its_files() -> None:
    """The folder that the provider names is the one that the dashboard is mounted in."""
    [provider] = yaml.safe_load((ROOT / "deploy/grafana/dashboards.yml").read_text())["providers"]
    home = SERVICES["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]
    mounted = dict(volume.split(":")[:2] for volume in SERVICES["grafana"]["volumes"])
    assert home == f"{provider['options']['path']}/loramux.json" == mounted["./deploy/grafana/loramux.json"]
