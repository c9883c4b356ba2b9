"""What Ray's part decides without a cluster: where requests go, how many replicas there are, who is let in."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from ray.exceptions import ActorDiedError, RayTaskError
from ray.serve.exceptions import BackPressureError
from ray.serve.schema import ServeDeploySchema

from loramux_shared.faults import InternalFault, PermissionDenied, QueueFull, ReplicaFailed, SettingsInvalid
from ray_service.app import Options, build
from ray_service.calls import host_of, require_local
from ray_service.forwarding import _fault
from ray_service.names import MIDDLEWARES, SERVICERS, key_of
from ray_service.routing import order, rank
from ray_service.scaling import by_sequences

DEPLOY = Path(__file__).parents[2] / "deploy" / "ray"


def test_requests_of_an_adapter_have_its_name_as_key_however_it_is_written():
    """A version, and the base's name before it, go where the adapter goes; the base goes anywhere."""
    assert [key_of(name, "base") for name in ("a", "a@0123abcd", "base:a", "base", "")] == [
        "a",
        "a",
        "a",
        "",
        "",
    ]


def test_a_replica_that_leaves_moves_its_own_models_alone():
    """Of 300 models on four replicas, those of the other three stay, and each replica has its share."""
    replicas = ["r1", "r2", "r3", "r4"]
    home = {model: min(replicas, key=lambda each: rank(model, each)) for model in map(str, range(300))}
    left = {model: min(replicas[:3], key=lambda each: rank(model, each)) for model in home}
    assert all(left[model] == home[model] for model in home if home[model] != "r4")
    assert all(50 < list(home.values()).count(each) < 100 for each in replicas)


@pytest.mark.parametrize(
    ("loads", "tried"),
    [([8, 0, 0], [0, 1, 2]), ([9, 0, 0], [1, 2, 0]), ([30, 30, 30], [0, 1, 2]), ([40, 30, 20], [1, 2, 0])],
)
def test_a_model_moves_on_when_its_replica_has_more_than_others(loads, tried):
    """The first choice stays it up to eight requests, and up to a quarter more than the average."""
    assert order(loads) == tried


def test_there_are_as_many_replicas_as_hold_what_runs_and_waits():
    """Sequences count where they are more than requests; without figures of replicas the requests do."""
    config = SimpleNamespace(get_target_ongoing_requests=lambda: 8)

    def wanted(requests: float, **metrics: dict[str, float]) -> float:
        context = SimpleNamespace(
            total_num_requests=requests, aggregated_metrics=metrics or None, config=config
        )
        return by_sequences(context)[0]

    assert wanted(0) == 0
    assert wanted(17) == 3
    assert wanted(2, running={"r1": 8, "r2": 8}, waiting={"r1": 0, "r2": 9}) == 4


@pytest.mark.parametrize(
    ("peer", "host", "let_in"),
    [
        ("ipv4:127.0.0.1:4711", "127.0.0.1", True),
        ("ipv6:%5B::1%5D:4711", "::1", True),
        ("ipv6:%5B::ffff:127.0.0.1%5D:4711", "::ffff:127.0.0.1", True),
        ("ipv4:10.0.0.7:4711", "10.0.0.7", False),
        ("ipv6:[2001:db8::1]:4711", "2001:db8::1", False),
        ("unknown", "", False),
    ],
)
def test_without_keys_only_this_machine_is_answered(peer, host, let_in):
    """Ray's gRPC doors listen everywhere, so where a call comes from decides."""
    assert host_of(peer) == host
    if let_in:
        require_local(host)
        return
    with pytest.raises(PermissionDenied, match="LORAMUX_KEYS_FILE"):
        require_local(host)


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ({"settings": {"deployment": "d"}, "replica": 2}, "replica: Extra"),
        ({"settings": {"treads": 2}}, "treads"),
    ],
)
def test_options_and_settings_that_nobody_knows_stop_a_deploy(args, said):
    """What is misspelt is named before anything starts."""
    with pytest.raises(SettingsInvalid, match=said):
        build(args)


def test_errors_of_ray_are_faults_of_ours_and_say_nothing_of_it():
    """A lost replica may be asked again, a full one later; what a replica raised stays in the log."""
    lost, full = _fault(ActorDiedError()), _fault(BackPressureError(9, 8))
    raised = _fault(RayTaskError("rpc", "Traceback: secret", ValueError("secret")))
    assert [type(each) for each in (lost, full, raised)] == [ReplicaFailed, QueueFull, InternalFault]
    assert lost.retry_after_s == full.retry_after_s == 1.0
    assert "secret" not in raised.message


def test_the_config_files_say_what_the_code_reads():
    """Serve takes the file, both applications their arguments, and KubeRay's manifest has the same config."""
    config = yaml.safe_load((DEPLOY / "serve.yaml").read_text())
    ServeDeploySchema(**config)
    builder, engine = config["applications"]
    assert set(builder["args"]) == {"store"}
    assert Options(**engine["args"]).num_gpus == 1
    assert config["grpc_options"]["grpc_servicer_functions"] == [SERVICERS]
    manifest = yaml.safe_load((DEPLOY / "rayservice.yaml").read_text())
    assert yaml.safe_load(manifest["spec"]["serveConfigV2"]) == config
    cluster = manifest["spec"]["rayClusterConfig"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        [container] = group["template"]["spec"]["containers"]
        values = {each["name"]: each.get("value") for each in container["env"]}
        assert values.items() >= MIDDLEWARES.items()
