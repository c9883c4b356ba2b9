"""``loramux doctor``: installed packages, memory, faults of settings."""

import json
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
import torch
from structlog.testing import capture_logs
from typer.testing import CliRunner

from loramux.cli.doctor import installed
from loramux.cli.doctor.command import Diagnosis, services, show_diagnosis
from loramux.cli.doctor.installed import Extra
from loramux.cli.doctor.machine import Inference, look_at_machine, look_at_store
from loramux.cli.doctor.sizes import PROCESS_BYTES, TOUCHED_BYTES, read_base, sizes_of, weight_files_bytes
from loramux.cli.main import app
from loramux_shared.access.guard import Guard
from loramux_shared.bases.groups import features_of
from loramux_shared.bases.memory import MemoryPlan, cache_of, count_weights, needs_of, plan_on
from loramux_shared.bases.read import read_config, read_fields
from loramux_shared.faults import CheckpointInvalid, ResourcesExhausted
from loramux_shared.settings import InferenceSettings
from tests.support.access import Certificates
from tests.support.adapters import BASE_CONFIG
from tests.support.hub_configs import HUB_CONFIGS
from tests.support.lowbit_files import KINDS, keep
from tests.support.services.fake_grpc import Fakes, open_fakes
from tests.support.tiny import SIZES, make_world
from tests.support.weights import adapter_of
from tests.unit.bases.test_base_weights import REFUSED

SETTINGS = InferenceSettings(deployment="none")
LLAMA = SIZES | {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "head_dim": 8}
LLAMA |= {"rms_norm_eps": 1e-5, "torch_dtype": "bfloat16"}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A folder with a config.json."""
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    return tmp_path


def doctor(*args: str | Path) -> tuple[int, str]:
    """Run the command; returns its exit code and stdout."""
    result = CliRunner().invoke(app, ["doctor", *map(str, args)])
    return result.exit_code, result.stdout


def test_extras_name_what_they_lack() -> None:
    """An extra that includes others needs their packages; extras for development are left out."""
    requirements = [
        "typer>=0.15",
        "numpy>=2; extra == 'store'",
        'no-such-thing>=1; extra == "store"',
        "loramux[store]; extra == 'builder'",
        "pydantic[email]>=2; extra == 'builder'",
        "neither; extra == 'test'",
    ]
    store, builder = installed.extras(requirements)
    assert (store.name, store.missing) == ("store", ("no-such-thing",))
    assert (builder.name, builder.missing) == ("builder", ("no-such-thing",))
    assert builder.cure == "pip install 'loramux[builder]'"


def test_an_adapter_takes_what_its_settings_name(base: Path) -> None:
    """The bytes of an adapter are those that the engine's own packing takes."""
    config = read_config(base)
    rows = [
        (
            layer,
            module,
            torch.zeros(8, inside, dtype=torch.bfloat16),
            torch.zeros(outside, 8, dtype=torch.bfloat16),
        )
        for layer in range(config.dims.num_layers)
        for module, (inside, outside) in features_of(config.layer_groups[layer]).items()
    ]
    packed = adapter_of(rows, config.layer_groups)
    tensors = [
        tensor
        for layer in packed.layers
        for group in layer.values()
        for tensor in (*group.a, *group.b)
        if tensor is not None
    ]
    stated = sizes_of(LLAMA, SETTINGS, 10**9).fits[0]
    assert stated.rank == 8
    assert stated.adapter_bytes == sum(tensor.nbytes for tensor in tensors)


def test_what_fits_beside_weights_and_cache() -> None:
    """Adapters share the memory that weights, steps and a cache of the given size leave."""
    settings = InferenceSettings(deployment="none", kv_memory_gb=0.001)
    sizes = sizes_of(LLAMA, settings, 20_000_000, "float32")
    assert sizes.kv_token_bytes == 2 * 2 * 2 * 8 * 4
    assert sizes.kv_tokens == 1_000_000 // sizes.kv_token_bytes // 16 * 16
    room = 20_000_000 - sizes.weights_bytes - sizes.steps_bytes - 1_000_000
    assert [fit.adapters for fit in sizes.fits] == [room // fit.adapter_bytes for fit in sizes.fits]
    assert sizes.fits[0].adapters > 0
    assert sizes.ready_bytes == PROCESS_BYTES + sizes.weights_bytes + sizes.kv_bytes
    longer = sizes_of(LLAMA | {"max_position_embeddings": 2**20}, SETTINGS, 10**9, "float32")
    assert longer.ready_bytes == PROCESS_BYTES + longer.weights_bytes + 2 * TOUCHED_BYTES


def test_a_checkpoint_of_4_bits_stays_packed_on_a_gpu() -> None:
    """Half a byte a number, and five for each group; on a CPU, and with desc_act, it is widened."""
    awq = {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "GEMM"}
    gptq = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": True}
    on_gpu, on_cpu, ordered = (
        sizes_of(LLAMA | {"quantization_config": config}, SETTINGS, 10**9, "bfloat16", device)
        for config, device in ((awq, "cuda"), (awq, "cpu"), (gptq, "cuda"))
    )
    config = read_fields(LLAMA)
    linears = sum(g.in_features * sum(g.out_features) for layer in config.layer_groups for g in layer)
    assert on_cpu.weights_bytes - on_gpu.weights_bytes == 2 * linears - (linears // 2 + linears // 32 * 5)
    assert "stay awq (int4)" in on_gpu.widened
    assert "widened from" in on_cpu.widened
    assert "widened from" in ordered.widened


PLACES = list(product([("cpu", "float32"), ("cpu", "bfloat16"), ("cuda", "float16")], [None, 4.0]))
"""A device with a dtype, and a size of the cache; each base is tried in two."""


@pytest.mark.parametrize(
    ("name", "device", "dtype", "kv_memory_gb"),
    [
        (name, *place, kv_memory_gb)
        for number, name in enumerate(HUB_CONFIGS)
        for place, kv_memory_gb in (PLACES[number % 6], PLACES[(number + 3) % 6])
    ],
)
def test_the_doctors_figures_are_those_of_the_plan(
    name: str, device: str, dtype: str, kv_memory_gb: float | None
) -> None:
    """A replica with as many adapters as the doctor allows starts with this cache; one more does not fit."""
    settings, free = InferenceSettings(deployment="none", kv_memory_gb=kv_memory_gb), 10**12
    config, item = read_fields(HUB_CONFIGS[name]), getattr(torch, dtype).itemsize
    sizes = sizes_of(HUB_CONFIGS[name], settings, free, dtype, device, graphs=device == "cuda")

    def plan(adapters: int, kv_bytes: int | None) -> MemoryPlan:
        needs = needs_of(config, item, adapters, settings, device, graphs=device == "cuda")
        assert (sizes.weights_bytes, sizes.steps_bytes) == (needs.weights, needs.activations + needs.graphs)
        cache = replace(cache_of(config, item, settings, device), kv_bytes=kv_bytes)
        return plan_on(device, free - needs.weights - adapters, needs, cache)

    stated = None if kv_memory_gb is None else int(kv_memory_gb * 1e9)
    assert (sizes.refusal, sizes.kv_bytes) == ("", plan(0, stated).kv_bytes)
    assert sizes.kv_is_set == (stated is not None)
    for fit in sizes.fits:
        assert plan(fit.adapters * fit.adapter_bytes, stated or sizes.kv_bytes).kv_bytes == sizes.kv_bytes
        with pytest.raises(ResourcesExhausted):
            plan((fit.adapters + 1) * fit.adapter_bytes, stated or sizes.kv_bytes)


@pytest.mark.parametrize(("free_gb", "ranks"), [(24, 1), (14, 2), (8, 4), (2, 0)])
def test_the_doctor_counts_the_gpus_that_a_base_needs(free_gb: float, ranks: int) -> None:
    """The least number of GPUs on which each rank's part fits; none where no number suffices."""
    settings, free = InferenceSettings(deployment="none"), int(free_gb * 1e9)
    fields = HUB_CONFIGS["Llama-3.1"]
    sizes = sizes_of(fields, settings, free, "bfloat16", "cuda", graphs=True)
    assert (sizes.ranks, bool(sizes.refusal)) == (ranks, ranks != 1)
    if ranks > 1:
        enough = settings.model_copy(update={"tensor_parallel": ranks})
        assert not sizes_of(fields, enough, free, "bfloat16", "cuda", graphs=True).refusal


def test_a_replica_plans_what_the_doctor_says(tmp_path: Path) -> None:
    """Weights, steps and tokens of the cache of a loaded model are the doctor's of its config."""
    world = make_world(tmp_path)
    with capture_logs() as logs:
        ready = world.load(world.built(), kv_memory_gb=0.01)
    planned = {entry["item"]: entry["gb"] for entry in logs if entry["event"] == "memory"}
    settings = InferenceSettings(deployment="none", kv_memory_gb=0.01)
    sizes = sizes_of(read_base(world.base), settings, 10**10, "float32")
    found = (sizes.weights_bytes, sizes.steps_bytes, sizes.kv_bytes)
    assert [round(size / 1e9, 3) for size in found] == [
        planned["weights"],
        round(planned["activations"] + planned["graphs"], 3),
        planned["key-value cache"],
    ]
    assert sizes.kv_tokens == ready.engine.stats.blocks_total * ready.engine.stats.block_size


def test_a_base_is_a_folder_or_its_config(base: Path) -> None:
    """The folder of a base and its config name the same file; other paths are refused as a base."""
    assert read_base(base) == read_base(base / "config.json") == LLAMA
    (base / "list.json").write_text("[]")
    for wrong in (base / "list.json", base / "nowhere.json"):
        with pytest.raises(CheckpointInvalid, match="expected"):
            read_base(wrong)


def test_a_store_answers_or_not(tmp_path: Path) -> None:
    """A store is fine when it answers, empty or not; a wrong address is reported."""
    assert look_at_store(f"file://{tmp_path}").state == "answers, 0 deployments"
    assert not look_at_store("ftp://nowhere").ok


def test_all_of_it(base: Path, fakes: Fakes) -> None:
    """The doctor prints device, backend, services and memory, as text and as JSON, and finds no fault."""
    at = ("--grpc", fakes.inference_address, "--builder", "127.0.0.1:1", "--store", f"file://{base}")
    code, text = doctor("--base", base, "--kv-gb", "0.001", *at, "--json")
    found = json.loads(text)["diagnosis"]
    warned = found["inference"]["warning"]  # without a C++ compiler
    assert (code, found["problems"]) == ((1, [warned]) if warned else (0, []))
    assert found["inference"]["device"] == ("cuda" if torch.cuda.is_available() else "cpu")
    assert found["inference"]["backend"] in ("native", "torch", "triton")
    assert [place["ok"] for place in found["places"]] == [True, False, True]
    assert [fit["rank"] for fit in found["base"]["fits"]] == [8, 16, 32, 64]


def test_what_matters_comes_first(capsys: pytest.CaptureFixture[str]) -> None:
    """The verdict is the first line; extras come last: those that lack something, the others in one line."""
    found = Diagnosis(
        problems=(),
        versions={"loramux": "1.0", "triton": None},
        extras=(Extra("cli", ()), Extra("s3", ("boto3",)), Extra("store", ())),
        machine=look_at_machine(Path("/")),
        inference="no torch",
        places=(),
        base=None,
    )
    show_diagnosis(found)
    first, _, *_, runs, _, installed, lacking, complete = capsys.readouterr().out.splitlines()
    assert first == "nothing is wrong"
    assert runs == "runs on      nothing: no torch"
    assert installed == "installed    loramux 1.0"
    assert lacking == "[s3]         lacks boto3: pip install 'loramux[s3]'"
    assert complete == "extras       complete: cli, store"


def test_slow_operations_are_exit_1(monkeypatch: pytest.MonkeyPatch) -> None:
    """Slow operations are a failure: a replica would start, and its slowness would have no explanation."""
    slow = "torch operations (no C++ compiler found): slower; install g++"
    chosen = Inference(
        "cpu", "Some", 2, 1, "float32", "torch", "torch operations", "float32 by torch", "", slow, 2
    )
    monkeypatch.setattr("loramux.cli.doctor.command.look_at_inference", lambda _: chosen)
    code, text = doctor("--grpc", "127.0.0.1:1", "--builder", "127.0.0.1:1")
    assert code == 1
    assert text.startswith(f"wrong: {slow}\n")


def test_what_is_wrong_is_exit_1(monkeypatch: pytest.MonkeyPatch) -> None:
    """A setting that stops a service is an error here too; a service that does not run is none."""
    monkeypatch.setenv("LORAMUX_STORRE", "x")
    code, text = doctor("--grpc", "127.0.0.1:1", "--builder", "127.0.0.1:1")
    assert code == 1
    assert "wrong: LORAMUX_STORRE: unknown setting, did you mean LORAMUX_STORE?" in text
    assert "inference    127.0.0.1:1: nothing answers there" in text


async def test_the_doctor_asks_all(fakes: Fakes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The doctor asks each replica of a list or of a DNS name, and reports a name without addresses."""
    certificates = Certificates(tmp_path)
    certificates.issue("server", certificates.ours, "localhost")
    monkeypatch.setenv("LORAMUX_TLS_CA", str(tmp_path / "ours.pem"))

    async def reported(where: str) -> list[tuple[str, str]]:
        places = await services(where, "127.0.0.1:1")
        return [(each.address, each.state) for each in places if each.name == "inference"]

    states = ("SERVING", "nothing answers there", "SERVING")
    with open_fakes(Guard(tls=certificates.server)) as one, open_fakes() as other:
        three = fakes.inference_address, "127.0.0.1:1", other.inference_address
        assert await reported(",".join(three)) == list(zip(three, states, strict=True))
        port = one.inference_address.rpartition(":")[2]
        assert (f"grpcs://127.0.0.1:{port}", "SERVING") in await reported(f"grpcs://dns:///localhost:{port}")
    [(_, state)] = await reported("dns:///no.such.host.invalid:1")
    assert "expected dns:///NAME:PORT of a name that resolves" in state


def test_the_doctor_asks_the_same_reader() -> None:
    """A head that a family ties by default counts once on a GPU; a refused base has no sizes."""
    gemma = {"architectures": ["Gemma2ForCausalLM"], "model_type": "gemma2"}
    untied = gemma | {"tie_word_embeddings": False}
    for device, times in (("cuda", 1), ("cpu", 0)):  # products of a CPU have a copy of their own
        weights = [sizes_of(each, SETTINGS, 10**11, device=device).weights_bytes for each in (untied, gemma)]
        assert weights[0] - weights[1] == times * 2 * 256000 * 2304
    with pytest.raises(CheckpointInvalid, match="FalconForCausalLM is not supported"):
        sizes_of(BASE_CONFIG | REFUSED["Falcon"], SETTINGS, 10**11)


@pytest.mark.parametrize("beside", [False, True])
def test_what_widening_takes_is_reported_beforehand(tmp_path: Path, beside: bool) -> None:
    """The doctor reports the memory for widening in a start's words, also for a base with quantize_config."""
    plain = make_world(tmp_path / "plain")
    keep(plain.base, KINDS["gptq"], tmp_path / "kept", tmp_path / "widened")
    if beside:
        config = json.loads((tmp_path / "kept" / "config.json").read_bytes())
        (tmp_path / "kept" / "quantize_config.json").write_text(json.dumps(config.pop("quantization_config")))
        (tmp_path / "kept" / "config.json").write_text(json.dumps(config))
    kept, file_bytes = tmp_path / "kept", weight_files_bytes(tmp_path / "kept")
    files = (kept / "model.safetensors").stat().st_size / 1e6
    memory = 4 * count_weights(read_config(kept)) / 1e6
    sizes = sizes_of(read_base(kept), SETTINGS, 10**9, "float32", file_bytes=file_bytes)
    assert sizes.widened == (
        f"widened from gptq (int4) at load: {files:.1f} MB in the files, {memory:.1f} MB in memory as float32"
    )
