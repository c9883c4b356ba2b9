"""Models of 1 to 4 billion parameters on a CPU, beside llama.cpp and vLLM: decoding, prompts and memory.

Weights are random, in the shapes of Llama-3.2-1B, Qwen3-1.7B and Qwen3-4B; bfloat16, int8, Q8_0 and Q4_K_M.
For one type after the other all contenders are there, and do each load in turn, round by round, so that all
meet the same machine; figures are medians. Decoding is tokens a second while all streams decode, at the
client for servers, and llama.cpp's own S_TG; prompts are tokens over the seconds to the first one, and
S_PP. Memory is what is resident at the end, and the peak. llama-quantize makes the files of few bits.

    python -m benchmarks.sizes llama-3.2-1b --llama-cpp ~/llama.cpp --vllm ~/vllm/bin/vllm
"""

import argparse
import asyncio
import json
import math
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import gguf
import httpx
import numpy as np
import psutil
import torch
from safetensors import safe_open
from tokenizers.pre_tokenizers import ByteLevel

from benchmarks.figures import machine
from benchmarks.on_gpu import checkpoint
from benchmarks.peers import PROMPT_TOKENS_PER_S, TOKENS_PER_S, llama_rows
from benchmarks.service import Answer, Ask, Service, end_process, over_grpc, over_http
from loramux import AsyncClient
from loramux.cli.local.tree import free_address

SHAPES: Final[Mapping[str, dict[str, Any]]] = {
    "llama-3.2-1b": (
        {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "vocab_size": 128256}
        | {"num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64, "rope_theta": 500000.0}
    ),
    "qwen3-1.7b": (
        {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "head_dim": 128}
        | {"hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 28, "vocab_size": 151936}
        | {"num_attention_heads": 16, "num_key_value_heads": 8, "rope_theta": 1000000.0}
    ),
    "qwen3-4b": (
        {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "head_dim": 128}
        | {"hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36, "vocab_size": 151936}
        | {"num_attention_heads": 32, "num_key_value_heads": 8, "rope_theta": 1000000.0}
    ),
}
USUAL: Final = {"max_position_embeddings": 8192, "tie_word_embeddings": True}
FILES: Final = {"Q8_0": "q8_0.gguf", "Q4_K_M": "q4_k_m.gguf"}
KINDS: Final = ("bf16", *FILES)
RANKS: Final = {"of rank 16": (16,) * 8, "of ranks 8 to 64": (8, 16, 32, 64) * 8}
BEGIN_S: Final = 600.0


@dataclass(frozen=True)
class Load:
    """So many answers at once."""

    label: str
    streams: int
    tokens: int
    """Tokens of each prompt."""
    new: int = 0
    """New tokens of each answer, whose rate is measured; 0: that of the prompts is."""


LOADS: Final = (
    *(Load(f"prompt of {tokens}", 1, tokens) for tokens in (128, 1024)),
    *(Load(f"decoding @{streams}", streams, 32, 64) for streams in (1, 8, 32)),
)
Run = Callable[[Load], Awaitable[float]]
"""A load to its tokens a second."""
Found = dict[str, list[float]]
"""Figures by load, one of each round."""


def write_files(work: Path, shape: dict[str, Any], llama_cpp: Path | None) -> dict[str, list[str]]:
    """Write the base, its adapters, and for llama.cpp the files of few bits; return the adapters by group."""
    checkpoint.write_base(work / "base", shape, torch.device("cpu"))
    groups = {}
    for group, ranks in RANKS.items():
        groups[group] = [f"r{rank}-{number}-{len(ranks)}" for number, rank in enumerate(ranks)]
        for name, rank in zip(groups[group], ranks, strict=True):
            checkpoint.write_adapter(work / "adapters" / name, shape, rank, torch.device("cpu"))
    bases = {"bf16": work / "base"}
    if llama_cpp:
        write_gguf(work / "bf16.gguf", work / "base")
        for kind, name in FILES.items():
            quantize = llama_cpp / "build/bin/llama-quantize"
            command = [str(quantize), str(work / "bf16.gguf"), str(work / name), kind]
            subprocess.run(command, check=True, capture_output=True)  # noqa: S603 - the operator's
            bases[kind] = work / name
    for deployment, base in bases.items():
        names = [name for group in groups.values() for name in group]
        checkpoint.build_deployment(work, deployment, names, USUAL["max_position_embeddings"], base)
    return groups


def write_gguf(path: Path, base: Path) -> None:
    """Write a checkpoint as llama.cpp reads it, in bfloat16; random heads need not be reordered."""
    fields = json.loads((base / "config.json").read_text())
    arch, layers = fields["model_type"], fields["num_hidden_layers"]
    writer = gguf.GGUFWriter(path, arch, use_temp_file=True)
    writer.add_block_count(layers)
    writer.add_context_length(fields["max_position_embeddings"])
    writer.add_embedding_length(fields["hidden_size"])
    writer.add_feed_forward_length(fields["intermediate_size"])
    writer.add_head_count(fields["num_attention_heads"])
    writer.add_head_count_kv(fields["num_key_value_heads"])
    writer.add_key_length(fields["head_dim"])
    writer.add_value_length(fields["head_dim"])
    writer.add_layer_norm_rms_eps(fields["rms_norm_eps"])
    writer.add_rope_freq_base(fields["rope_theta"])
    words = [*sorted(ByteLevel.alphabet()), "he"]
    words += [f"<|{number}|>" for number in range(len(words), fields["vocab_size"])]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(words)
    types = (gguf.TokenType.CONTROL if len(word) > 2 else gguf.TokenType.NORMAL for word in words)
    writer.add_token_types([int(kind) for kind in types])
    writer.add_token_merges(["h e"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[arch.upper()], layers)
    with safe_open(base / "model.safetensors", "pt") as tensors:
        for name in tensors.keys():  # noqa: SIM118 - it is no mapping
            value = tensors.get_tensor(name)
            matrix = value.ndim == 2
            data = value.view(torch.uint8).numpy() if matrix else value.float().numpy()
            kind = gguf.GGMLQuantizationType.BF16 if matrix else gguf.GGMLQuantizationType.F32
            writer.add_tensor(
                names.get_name(name, (".weight",)) or name, np.ascontiguousarray(data), raw_dtype=kind
            )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def llama_cpp(folder: Path, model: Path, found: Found) -> Run:
    """Have llama-batched-bench do a load; its peak of memory is noted."""

    async def run(load: Load) -> float:
        context = load.streams * (load.tokens + load.new + 1)
        command = [folder / "build/bin/llama-batched-bench", "-m", model, "-c", context, "-npp", load.tokens]
        command += ["-ntg", load.new or 1, "-npl", load.streams, "-t", len(os.sched_getaffinity(0))]
        [row], peak_gb = await asyncio.to_thread(llama_rows, *map(str, command))
        found["peak GB"] = [max(peak_gb, *found.get("peak GB", [0.0]))]
        return row[TOKENS_PER_S if load.new else PROMPT_TOKENS_PER_S]

    return run


def server(ask: Ask, models: Sequence[str], vocab: int, most: int = 32) -> Run:
    """Ask a server for models in turn, at most so many at once: NaN for a load of more."""
    draw = random.Random(0)

    async def run(load: Load) -> float:
        if load.streams > most:
            return math.nan
        reading = (
            ask(models[place % len(models)], draw.choices(range(3, vocab), k=load.tokens), max(load.new, 2))
            for place in range(load.streams)
        )
        answers = await asyncio.gather(*(Answer().read(each) for each in reading))
        return decoding(answers) if load.new else load.tokens / answers[0].first_s

    return run


def decoding(answers: Sequence[Answer]) -> float:
    """Return the tokens a second while all answers are under way; NaN where they never are at once."""
    began, ended = max(each.times_s[0] for each in answers), min(each.times_s[-1] for each in answers)
    tokens = sum(began < at <= ended for each in answers for at in each.times_s)
    return tokens / (ended - began) if ended > began else math.nan


def memory_of(process: psutil.Process) -> Found:
    """Return the memory of a process and its children, resident now and at its peak."""
    family = [process, *process.children(recursive=True)]
    peaks = [Path(f"/proc/{each.pid}/status").read_text().partition("VmHWM:")[2].split()[0] for each in family]
    return {
        "resident GB": [sum(each.memory_info().rss for each in family) / 1e9],
        "peak GB": [sum(map(int, peaks)) * 1024 / 1e9],
    }


@contextmanager
def vllm_server(command: Path, work: Path, names: Sequence[str]) -> Iterator[tuple[str, psutil.Process]]:
    """Serve the base and adapters, until the context ends."""
    host, _, port = free_address().rpartition(":")
    line = [str(command), "serve", str(work / "base"), "--served-model-name", "base", "--host", host]
    line += ["--port", port, "--dtype", "bfloat16", "--max-model-len", "2048", "--enable-lora"]
    line += ["--max-lora-rank", "64", "--max-loras", "8"]
    line += ["--lora-modules", *(f"{name}={work / 'adapters' / name}" for name in names)]
    with (work / "vllm.log").open("w") as log:
        path = f"{command.parent}:{os.environ['PATH']}"
        variables = os.environ | {"VLLM_CPU_KVCACHE_SPACE": "2", "PATH": path}
        process = psutil.Popen(line, stdout=log, stderr=log, env=variables)
    url, until_s = f"http://{host}:{port}", time.monotonic() + BEGIN_S
    try:
        while not _answers(url):
            if process.poll() is not None or time.monotonic() > until_s:
                raise RuntimeError((work / "vllm.log").read_text()[-2000:])
            time.sleep(1)
        yield f"{url}/v1", process
    finally:
        end_process(process)


def _answers(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health").is_success
    except httpx.HTTPError:
        return False


async def measure(options: Any, work: Path, kind: str, groups: Mapping[str, Sequence[str]], vocab: int) -> Any:
    """Return the figures of all contenders of a type, by their labels."""
    runs: dict[str, Run] = {}
    processes: dict[str, psutil.Process] = {}
    found: dict[str, Found] = defaultdict(dict)
    models = {"base": ["base"], **groups}
    async with AsyncExitStack() as stack:
        ours = {f"loramux {kind}": replica_settings(work)}
        if kind == "Q8_0":
            ours["loramux int8"] = replica_settings(work) | {"quantization": "int8"}
        for label, settings in ours.items():
            deployment = kind if label.endswith(kind) else "bf16"
            command = "inference_service", work, "--deployment", deployment
            service = stack.enter_context(Service(*command, **settings))
            ask = over_grpc(await stack.enter_async_context(AsyncClient(inference=service.grpc)))
            processes[f"{label}, base"] = service.process
            runs |= {f"{label}, {group}": server(ask, names, vocab) for group, names in models.items()}
        if options.vllm and kind == "bf16":
            few = groups["of rank 16"]
            url, process = stack.enter_context(vllm_server(options.vllm, work, few))
            web = await stack.enter_async_context(httpx.AsyncClient(timeout=BEGIN_S))
            processes["vLLM bf16, base"] = process
            for group, names in (("base", ["base"]), ("of rank 16", few)):
                runs[f"vLLM bf16, {group}"] = server(
                    over_http(web, url), names, vocab, most=8
                )  # 32: half an hour
        if options.llama_cpp:
            label, file = f"llama.cpp {kind}", work / FILES.get(kind, "bf16.gguf")
            runs[label] = llama_cpp(options.llama_cpp, file, found[label])
        for run in runs.values():
            await run(Load("", 32, 16, 4))  # adapters come, and what is compiled is
            await run(LOADS[0])
        for load in LOADS:
            for _ in range(options.rounds):
                for label, run in runs.items():
                    found[label].setdefault(load.label, []).append(await run(load))
            print(kind, load.label, {label: each[load.label] for label, each in found.items()}, file=sys.stderr)
        for label, process in processes.items():
            found[label] |= memory_of(process)
    return found


def replica_settings(work: Path) -> dict[str, Any]:
    """Return the settings of a replica."""
    return {"kv_memory_gb": 1.0, "cache_dir": work / "cache", "speculative_tokens": 0}


def report(found: Mapping[str, Found]) -> None:
    """Print medians, a row for each contender, in Markdown."""
    columns = dict.fromkeys(name for each in found.values() for name in each)
    print(f"| | {' | '.join(columns)} |", f"|---|{'---|' * len(columns)}", sep="\n")
    for label, each in found.items():
        cells = (f"{statistics.median(each[name]):.3g}" if name in each else "-" for name in columns)
        print(f"| {label} | {' | '.join(cells)} |")


def main() -> None:
    """Measure, and print a table of medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--kinds", default=",".join(KINDS), help="types of weights, separated by commas")
    parser.add_argument(
        "--llama-cpp", type=Path, help="the folder of its source, built; makes Q8_0 and Q4_K_M too"
    )
    parser.add_argument("--vllm", type=Path, help="the command of an installation of vLLM for CPUs")
    options = parser.parse_args()
    shape = SHAPES[options.shape] | USUAL
    with tempfile.TemporaryDirectory(prefix="loramux-sizes-") as folder:
        work = Path(folder)
        groups = write_files(work, shape, options.llama_cpp)
        found: dict[str, Found] = {}
        for kind in options.kinds.split(","):
            found |= asyncio.run(measure(options, work, kind, groups, shape["vocab_size"]))
    print(f"{options.shape}: {machine()}", "", sep="\n")
    report(found)


if __name__ == "__main__":
    main()
