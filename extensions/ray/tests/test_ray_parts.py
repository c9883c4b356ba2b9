"""The decisions of Ray's part without a cluster: routing, the number of replicas, access."""

from types import SimpleNamespace

import pytest
import yaml
from ray.exceptions import ActorDiedError, RayTaskError
from ray.serve.exceptions import BackPressureError
from ray.serve.schema import ServeDeploySchema

from loramux_ray.app import Options, _resources, build
from loramux_ray.calls import host_of, require_local
from loramux_ray.command import parts_of
from loramux_ray.forwarding import _fault
from loramux_ray.names import MIDDLEWARES, SERVICERS, key_of
from loramux_ray.scaling import by_sequences
from loramux_shared.deployment_file import parse_deployment
from loramux_shared.faults import InternalFault, PermissionDenied, QueueFull, ReplicaFailed, SettingsInvalid
from tests.support.cases import cases
from tests.support.root import ROOT

DEPLOY = ROOT / "deploy" / "ray"


def test_requests_of_an_adapter_have_its_name_as_key_however_it_is_written():
    """Versions, scales and blends go where their adapters go, and the base anywhere."""
    for name in ("a", "a@0123abcd", "base:a", "a*0.5", "base:a*0.5 + a"):
        assert key_of(name, "base") == "a"
    assert key_of("b*0.7+a", "base") == key_of("base:a*0.1 + b@0123abcd*2", "base") == "a+b"
    assert key_of("base", "base") == key_of("", "base") == ""


def test_a_replica_of_several_ranks_asks_for_their_gpus_on_one_node():
    """A placement group of one bundle has the CPUs and GPUs of all ranks, which are processes of one node."""
    build = {"checkpoint_repository": {"source": "HF", "repo": "a/b"}, "tensor_parallel_count": 2}
    deployment = parse_deployment({"model_name": "m", "build": build}).deployment
    parts = parts_of(deployment, 8, 1)
    assert parts == {"placement_group_bundles": [{"CPU": 8, "GPU": 2}]}
    assert _resources(Options(**parts)) == parts | {"ray_actor_options": {"num_cpus": 8, "num_gpus": 2}}
    one = deployment.model_copy(
        update={"build": deployment.build.model_copy(update={"tensor_parallel_count": 1})}
    )
    assert parts_of(one, 8, 1) == {}


def test_there_are_as_many_replicas_as_hold_what_runs_and_waits():
    """Sequences count where they are more than requests; without figures of replicas the requests do."""
    config = SimpleNamespace(get_target_ongoing_requests=lambda: 8)

    def expected(requests: float, **metrics: dict[str, float]) -> float:
        context = SimpleNamespace(
            total_num_requests=requests, aggregated_metrics=metrics or None, config=config
        )
        return by_sequences(context)[0]

    assert expected(0) == 0
    assert expected(17) == 3
    assert expected(2, running={"r1": 8, "r2": 8}, waiting={"r1": 0, "r2": 9}) == 4


@pytest.mark.parametrize(("peer", "host", "let_in"), cases(__file__, "KEYLESS"))
def test_without_keys_only_this_machine_is_answered(peer, host, let_in):
    """Ray's gRPC proxies listen on all addresses, so the origin of a call decides."""
    assert host_of(peer) == host
    if let_in:
        require_local(host)
        return
    with pytest.raises(PermissionDenied, match="LORAMUX_KEYS_FILE"):
        require_local(host)


@pytest.mark.parametrize(("args", "expected"), cases(__file__, "UNKNOWN"))
def test_options_and_settings_that_nobody_knows_stop_a_deploy(args, expected):
    """An option that is misspelt, or of a server that Ray does not have, is named before anything starts."""
    with pytest.raises(SettingsInvalid, match=expected):
        build(args)


def test_errors_of_ray_are_faults_of_ours_and_say_nothing_of_it():
    """A lost replica can be retried, a full one later; the log has the exception of a replica."""
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
