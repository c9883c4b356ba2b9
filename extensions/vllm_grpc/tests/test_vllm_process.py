"""The inference service as a process, with an address that stands for one model."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import grpc
import pytest

from inference_service import __main__ as process_of
from loramux_shared import extensions
from loramux_shared.faults import SettingsInvalid
from loramux_shared.settings import InferenceSettings
from loramux_shared.storage.local import LocalStore
from loramux_vllm_grpc.wire import engine_pb2, engine_pb2_grpc
from tests.support.served_process import serving
from tests.support.tiny import make_world


def test_an_address_of_a_model_drains_with_the_replica(tmp_path: Path) -> None:
    """A SIGTERM lets the open stream finish, and the exit status is 0."""
    world = make_world(tmp_path / "world")
    world.build(LocalStore(world.root / "store"))
    with (
        serving(world, tmp_path, LORAMUX_MODEL_PORTS="wide=127.0.0.1:0") as (process, ready),
        grpc.insecure_channel(ready["model_ports"].removeprefix("wide=")) as channel,
    ):
        params = engine_pb2.SamplingParams(max_tokens=200, ignore_eos=True)
        api = engine_pb2_grpc.VllmEngineStub(channel)
        assert api.GetModelInfo(engine_pb2.GetModelInfoRequest()).served_model_name == "wide"
        of_model = api.Generate(engine_pb2.GenerateRequest(text="HELLO", sampling_params=params, stream=True))
        next(of_model)
        os.kill(process.pid, signal.SIGTERM)
        assert list(of_model)[-1].complete.completion_tokens == 200
        assert process.wait() == 0


def test_without_this_extension_there_are_no_addresses_of_models(monkeypatch: pytest.MonkeyPatch) -> None:
    """The start is refused before the load, and names the missing package."""
    settings = InferenceSettings(deployment="any", model_ports=("wide=127.0.0.1:0",))
    process_of.require_services_of_models(settings)
    monkeypatch.setattr(extensions, "find_spec", lambda _: None)
    with pytest.raises(SettingsInvalid, match="LORAMUX_MODEL_PORTS is set: expected an extension"):
        process_of.require_services_of_models(settings)
    process_of.require_services_of_models(InferenceSettings(deployment="any"))
