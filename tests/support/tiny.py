"""A tiny random Llama and adapters saved by the real PEFT, through the real builder and engine."""

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    Llama4ForConditionalGeneration,
    LlamaConfig,
    Mxfp4Config,
    PreTrainedConfig,
)

from builder_service.pipeline.context import BuildContext
from inference_service.adapters.ports import Publisher
from inference_service.core.adapter import activation
from inference_service.core.sampling import SamplingParams
from inference_service.core.sequence import EndReason, Sequence as EngineSequence, StepOutput
from inference_service.engine.backends.base import LoraBackend
from inference_service.engine.engine import Engine
from inference_service.engine.scheduling.queues import SchedulerLimits
from inference_service.startup.bank import OpenBank
from inference_service.startup.base import LoadedBase
from inference_service.startup.engine import BuildEngine, build_engine
from inference_service.startup.load import Ready, load
from loramux_shared.bundle.generation import Generation
from loramux_shared.deployment import Deployment
from loramux_shared.deployment_file import parse_deployment
from loramux_shared.faults import Fault
from loramux_shared.settings import InferenceSettings
from loramux_shared.sources.open import open_sources
from loramux_shared.storage.base import Store
from loramux_shared.storage.memory import MemoryStore
from tests.support.cases import cases
from tests.support.folders import run_build
from tests.support.native import reuse_native
from tests.support.tokens import VOCAB as VOCAB, write_tokenizer as write_tokenizer

ADAPTERS: dict[str, dict[str, Any]] = cases(__file__, "ADAPTERS")
SIZES: dict[str, Any] = cases(__file__, "SIZES")
"""Fields of the Llama's config; the range of its weights is large enough for it to have opinions."""


def make_checkpoint(
    folder: Path, config: PreTrainedConfig, dtype: torch.dtype = torch.float32, max_shard_size: str = "1GB"
) -> None:
    """Save a random model, with a tokenizer."""
    torch.manual_seed(0)
    model = _class_of(config).from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Norms and biases begin as ones and zeros, which say nothing.
            if parameter.dim() == 1 or name.endswith("_bias"):
                parameter.add_(torch.randn(parameter.shape) * 0.2)
        for name, buffer in model.named_buffers():
            if name.endswith(("layer_scalar", "e_score_correction_bias", "act_fn.beta")):  # and so do these
                buffer.add_(torch.randn(buffer.shape) * 0.2)
        table = model.get_input_embeddings()
        table.weight.div_(getattr(table, "scalar_embed_scale", 1.0))  # else Gemma repeats the last token
    written = model if dtype == torch.float32 else model.to(dtype)  # towers may have complex buffers
    written.save_pretrained(folder, max_shard_size=max_shard_size)
    write_tokenizer(folder)


def make_adapter(base: Path, folder: Path, seed: int, **config: Any) -> None:
    """Save an adapter with random A and B, and with magnitudes and biases other than the initial ones."""
    model = get_peft_model(_loaded(base), LoraConfig(task_type="CAUSAL_LM", **config))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                began = parameter if "bias" in name or "magnitude" in name else 0.0
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2 + began)
    model.create_or_update_model_card = lambda _: None  # a template that takes longer than the rest
    model.save_pretrained(folder)


def _class_of(config: PreTrainedConfig) -> Any:
    return AutoModelForImageTextToText if hasattr(config, "vision_config") else AutoModelForCausalLM


def _loaded(base: Path) -> Any:
    """A model of one's own; the last checkpoint that was read is copied."""
    files = sorted((path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in base.iterdir())
    return copy.deepcopy(_read(base, tuple(files)))


@lru_cache(maxsize=1)
def _read(base: Path, _files: tuple[tuple[Any, ...], ...]) -> Any:
    config = AutoConfig.from_pretrained(base)
    settings: dict[str, Any] = {"dtype": torch.float32}
    if getattr(config, "quantization_config", {}).get("quant_method") == "mxfp4":
        # transformers 5.25 asks the hub for kernels otherwise
        settings["quantization_config"] = Mxfp4Config(dequantize=True)
    return _class_of(config).from_pretrained(base, **settings)


def oracle(base: Path, adapter: Path | None) -> Any:
    """The model as transformers and PEFT run it, in float32."""
    model = _loaded(base).eval()
    whole = model if adapter is None else PeftModel.from_pretrained(model, adapter).eval()
    # transformers 5.24 fails to run Llama 4 with its tower, and runs the decoder in it
    return model.language_model if isinstance(model, Llama4ForConditionalGeneration) else whole


def oracle_tokens(model: Any, prompt: Sequence[int], new: int) -> list[int]:
    ids = torch.tensor([list(prompt)])
    out = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=new,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    return [int(token) for token in out[0, len(prompt) :]]


@dataclass(frozen=True)
class Replica(Ready):
    """A loaded deployment, with the parts of its engine: until its thread starts, a test runs the steps."""

    core: Engine
    """The engine without its thread."""
    base: LoadedBase
    limits: SchedulerLimits

    @property
    def lora(self) -> LoraBackend:
        """Return the backend that adds adapters in its steps."""
        return self.base.backend.new_lora() if self.bank is None else self.bank.lora


def load_replica(
    settings: InferenceSettings,
    store: Store,
    publisher: Publisher | None = None,
    build: BuildEngine = build_engine,
) -> Replica:
    """Load a deployment as a replica does, and note the parts that its engine is built of."""
    parts: dict[str, Any] = {}

    def noted(
        agreed: InferenceSettings, generation: Generation, base: LoadedBase, bank: OpenBank | None
    ) -> tuple[Engine, SchedulerLimits]:
        engine, limits = build(agreed, generation, base, bank)
        parts.update(core=engine, base=base, limits=limits)
        return engine, limits

    ready = load(settings, store, publisher=publisher, build=noted)
    return Replica(**vars(ready), **parts)


@dataclass(frozen=True)
class World:
    """A checkpoint, its adapters, and the deployment that names them."""

    base: Path
    adapters: Mapping[str, Path]
    root: Path
    max_seq_len: int | None = None

    def deployment(self, **lora: Any) -> Deployment:
        """The deployment, in float32 by default."""
        data = {
            "model_name": "tiny",
            "build": {
                "max_seq_len": self.max_seq_len,
                "checkpoint_repository": {"source": "LOCAL", "repo": str(self.base)},
                "lora_adapters": {
                    name: {"source": "LOCAL", "repo": str(path)} for name, path in self.adapters.items()
                },
                "lora_configuration": {"dtype": "float32"} | lora,
            },
            "runtime": {"served_model_name": "base"},
        }
        return parse_deployment(data).deployment

    def build(self, store: Store, **lora: Any) -> None:
        self._build(store, self.deployment(**lora))

    def built(self, **lora: Any) -> MemoryStore:
        """Build the world's deployment into a new store."""
        store = MemoryStore()
        self.build(store, **lora)
        return store

    def build_with(self, store: Store, **blocks: Mapping[str, Any]) -> None:
        """Build the deployment with other fields in the blocks ``build`` and ``runtime``."""
        data = self.deployment().model_dump(mode="json")
        for name, fields in blocks.items():
            data[name] |= fields
        self._build(store, Deployment.model_validate(data))

    def _build(self, store: Store, deployment: Deployment) -> None:
        run_build(deployment, BuildContext(store, open_sources(local_roots=[self.root])))

    def load(
        self,
        store: Store,
        publisher: Publisher | None = None,
        build: BuildEngine = build_engine,
        **settings: Any,
    ) -> Replica:
        values = {
            "deployment": "tiny",
            "dtype": "float32",
            "local_roots": (self.root,),
            "kv_memory_gb": 0.01,
            "adapter_disk_gb": 0,  # the folder of this machine's user is nobody's business
        }
        with reuse_native():
            return load_replica(InferenceSettings(**(values | settings)), store, publisher, build)


def refusal(ready: Ready, name: str) -> Fault | None:
    """Why an adapter that was to be loaded before the start is not resident."""
    adapter = ready.service.local.catalog.get(name).adapter
    standing = ready.bank.residency.standing(adapter)
    assert (standing.failure is None) == (adapter.slot is not None)
    return standing.failure


def make_world(root: Path, **config: Any) -> World:
    """Make a Llama and the adapters below a folder."""
    return make_world_of(root, LlamaConfig(**(SIZES | config)), ADAPTERS)


def make_world_of(
    root: Path,
    config: PreTrainedConfig,
    adapters: Mapping[str, Mapping[str, Any]],
    max_seq_len: int | None = None,
) -> World:
    base = root / "base"
    make_checkpoint(base, config)
    folders = {}
    for seed, (name, settings) in enumerate(adapters.items()):
        folders[name] = root / name
        make_adapter(base, folders[name], seed, **settings)
    return World(base, folders, root, max_seq_len)


def sequence(
    ready: Ready, number: str, model: str, prompt: Sequence[int], params: SamplingParams
) -> EngineSequence:
    """Return the sequence that the service makes of a request."""
    served = ready.service.local.catalog.resolve(model)
    adapter, invocation = activation(served.mixture or served.adapter, prompt)
    return EngineSequence(number, list(prompt), params, adapter, invocation=invocation)


@dataclass(frozen=True)
class Answers:
    """A world, and what transformers and PEFT answer in it."""

    world: World
    store: MemoryStore
    requests: list[tuple[str, list[int]]]
    expected: list[list[int]]


def run_sequences(ready: Replica, sequences: Iterable[EngineSequence]) -> dict[str, list[StepOutput]]:
    """Run sequences together through the engine, without threads; return the outputs of each by its id."""
    engine = ready.core
    outputs: dict[str, list[StepOutput]] = {}
    for each in sequences:
        engine.add(each)
        outputs[each.id] = []
    while not engine.idle:
        ready.engine.inbox.receive(0)
        for output in engine.step():
            outputs[output.seq_id].append(output)
    return outputs


def run_engine(
    ready: Replica, requests: Sequence[tuple[str, Sequence[int]]], new: int, **sampling: Any
) -> list[list[int]]:
    """Run (model, prompt) pairs together; return the new tokens of each."""
    found = _run(ready, requests, SamplingParams(max_tokens=new, **sampling))
    ends = {output.finish for outputs in found for output in outputs}
    assert ends <= {None, EndReason.LENGTH, EndReason.STOP}
    return [[output.token.id for output in outputs] for outputs in found]


def next_logprobs(ready: Replica, requests: Sequence[tuple[str, Sequence[int]]]) -> list[dict[int, float]]:
    """The log probability of every token behind each of (model, prompt) pairs, computed together."""
    found = _run(ready, requests, SamplingParams(max_tokens=1, logprobs=VOCAB))
    return [dict(outputs[-1].token.top) for outputs in found]


def _run(
    ready: Replica, requests: Sequence[tuple[str, Sequence[int]]], params: SamplingParams
) -> list[list[StepOutput]]:
    made = [sequence(ready, str(number), *request, params) for number, request in enumerate(requests)]
    return list(run_sequences(ready, made).values())
