"""Models of 1 to 4 billion parameters on a CPU, beside llama.cpp and vLLM: decoding, prompts and memory.

Weights are random, in the shapes of Llama-3.2-1B, Qwen3-1.7B and Qwen3-4B; bfloat16, int8, Q8_0 and Q4_K_M.
Contenders run one after another, each as a process of its own, so that none takes another's memory; rounds
repeat all of them, and figures are medians. Decoding is tokens a second while all streams decode, at the client
for servers, and llama.cpp's own S_TG; prompts are tokens over the seconds to the first one, and S_PP.
Memory is what is resident at the end, and the peak. llama-quantize makes the files of few bits.

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
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
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
RANKS: Final = {"of rank 16": (16,) * 8, "of ranks 8 to 64": (8, 16, 32, 64) * 8}
STREAMS: Final = {1: 64, 8: 64, 32: 192}
"""New tokens of each answer by streams: enough for all to be under way at once."""
PROMPTS: Final = (128, 1024)
"""Tokens; decoding is measured behind the first."""
BEGIN_S: Final = 600.0

Found = dict[str, float]
"""Figures of a contender by what they are of."""


@dataclass(frozen=True)
class Contender:
    """A server, or llama.cpp's own benchmark."""

    label: str
    measure: Callable[[], Found]


def write_files(work: Path, shape: dict[str, Any], llama_cpp: Path | None) -> dict[str, list[str]]:
    """Write the base, its adapters, and for llama.cpp the files of few bits; return the adapters by group."""
    checkpoint.write_base(work / "base", shape, torch.device("cpu"))
    groups = {}
    for group, ranks in RANKS.items():
        groups[group] = [f"r{rank}-{number}-{len(ranks)}" for number, rank in enumerate(ranks)]
        for name, rank in zip(groups[group], ranks, strict=True):
            checkpoint.write_adapter(work / "adapters" / name, shape, rank, torch.device("cpu"))
    bases = {"whole": work / "base"}
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


def llama_cpp(folder: Path, model: Path) -> Found:
    """Return what llama-batched-bench prints, and its memory."""
    found: Found = {}
    for tokens, streams in ((PROMPTS[0], [*STREAMS]), (PROMPTS[1], [1])):
        context = max(count * (tokens + STREAMS[count]) for count in streams)
        command = [folder / "build/bin/llama-batched-bench", "-m", model, "-c", context, "-npp", tokens]
        command += ["-ntg", min(STREAMS.values()), "-npl", ",".join(map(str, streams))]
        command += ["-t", len(os.sched_getaffinity(0))]
        rows, peak_gb = llama_rows(*map(str, command))
        found[f"prompt {tokens}"] = rows[0][PROMPT_TOKENS_PER_S]
        if tokens == PROMPTS[0]:
            found |= {f"base @{count}": row[TOKENS_PER_S] for count, row in zip(streams, rows, strict=True)}
        found["peak GB"] = max(peak_gb, found.get("peak GB", 0.0))
    return found


def decoding(answers: Sequence[Answer]) -> float:
    """Return the tokens a second while all answers are under way; NaN where they never are at once."""
    began, ended = max(each.times_s[0] for each in answers), min(each.times_s[-1] for each in answers)
    tokens = sum(began < at <= ended for each in answers for at in each.times_s)
    return tokens / (ended - began) if ended > began else math.nan


async def ask_for(
    ask: Ask, models: Mapping[str, Sequence[str]], vocab: int, counts: Sequence[int] = (*STREAMS,)
) -> Found:
    """Return what a server does for groups of models: prompts alone first, then decoding of so many streams."""
    draw, found = random.Random(0), Found()

    async def answers(group: Sequence[str], streams: int, tokens: int, new: int) -> list[Answer]:
        reading = (
            ask(group[place % len(group)], draw.choices(range(3, vocab), k=tokens), new)
            for place in range(streams)
        )
        return await asyncio.gather(*(Answer().read(each) for each in reading))

    for group in models.values():
        await answers(group, len(group), 16, 2)  # adapters come, and what is compiled is
    for tokens in PROMPTS:
        [answer] = await answers(models["base"], 1, tokens, 2)
        found[f"prompt {tokens}"] = tokens / answer.first_s
    for label, group in models.items():
        for streams in counts:
            found[f"{label} @{streams}"] = decoding(await answers(group, streams, PROMPTS[0], STREAMS[streams]))
    return found


def memory_of(process: psutil.Process) -> Found:
    """Return the memory of a process and its children, resident now and at its peak."""
    family = [process, *process.children(recursive=True)]
    peaks = [Path(f"/proc/{each.pid}/status").read_text().partition("VmHWM:")[2].split()[0] for each in family]
    return {
        "resident GB": sum(each.memory_info().rss for each in family) / 1e9,
        "peak GB": sum(map(int, peaks)) * 1024 / 1e9,
    }


def loramux(
    work: Path, deployment: str, models: Mapping[str, Sequence[str]], vocab: int, **settings: Any
) -> Found:
    """Measure a replica of a deployment."""

    async def run(service: Service) -> Found:
        async with AsyncClient(inference=service.grpc) as client:
            return await ask_for(over_grpc(client), models, vocab)

    usual = {"kv_memory_gb": 2.0, "cache_dir": work / "cache", "speculative_tokens": 0}
    with Service("inference_service", work, "--deployment", deployment, **usual | settings) as service:
        return asyncio.run(run(service)) | memory_of(service.process)


@contextmanager
def vllm_server(command: Path, work: Path, names: Sequence[str]) -> Iterator[tuple[str, psutil.Process]]:
    """Serve the base and adapters, until the context ends."""
    host, _, port = free_address().rpartition(":")
    line = [
        str(command),
        "serve",
        str(work / "base"),
        "--served-model-name",
        "base",
        "--host",
        host,
        "--port",
        port,
    ]
    line += ["--dtype", "bfloat16", "--max-model-len", "2048", "--enable-lora", "--max-lora-rank", "64"]
    line += ["--max-loras", "8", "--lora-modules", *(f"{name}={work / 'adapters' / name}" for name in names)]
    with (work / "vllm.log").open("w") as log:
        variables = os.environ | {"VLLM_CPU_KVCACHE_SPACE": "2"}
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


def vllm(command: Path, work: Path, models: Mapping[str, Sequence[str]], vocab: int) -> Found:
    """Measure vLLM with the same adapters."""

    async def run(url: str) -> Found:
        limits = httpx.Limits(max_connections=64)
        async with httpx.AsyncClient(timeout=BEGIN_S, limits=limits) as web:
            return await ask_for(over_http(web, url), models, vocab, [1, 8])  # 32 would take half an hour

    names = [name for group, some in models.items() if group != "base" for name in some]
    with vllm_server(command, work, names) as (url, process):
        return asyncio.run(run(url)) | memory_of(process)


def contenders(options: Any, work: Path, groups: Mapping[str, Sequence[str]], vocab: int) -> list[Contender]:
    """Return all that are there, in turn."""
    models = {"base": ["base"], **groups}
    found = [
        Contender("loramux bf16", partial(loramux, work, "whole", models, vocab)),
        Contender("loramux int8", partial(loramux, work, "whole", models, vocab, quantization="int8")),
    ]
    if options.llama_cpp:
        found.append(Contender("llama.cpp bf16", partial(llama_cpp, options.llama_cpp, work / "bf16.gguf")))
        for kind, name in FILES.items():
            found += [
                Contender(f"loramux {kind}", partial(loramux, work, kind, models, vocab)),
                Contender(f"llama.cpp {kind}", partial(llama_cpp, options.llama_cpp, work / name)),
            ]
    if options.vllm:
        few = {"base": ["base"], "of rank 16": groups["of rank 16"]}
        found.append(Contender("vLLM bf16", partial(vllm, options.vllm, work, few, vocab)))
    return [each for each in found if not options.only or each.label in options.only]


def main() -> None:
    """Measure, and print a table of medians in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--llama-cpp", type=Path, help="the folder of its source, built")
    parser.add_argument("--vllm", type=Path, help="the command of an installation of vLLM for CPUs")
    parser.add_argument("--only", action="append", default=[], help="a contender's label; may be repeated")
    options = parser.parse_args()
    shape = SHAPES[options.shape] | USUAL
    with tempfile.TemporaryDirectory(prefix="loramux-sizes-") as folder:
        work = Path(folder)
        groups = write_files(work, shape, options.llama_cpp)
        runs = contenders(options, work, groups, shape["vocab_size"])
        found: dict[str, list[Found]] = {each.label: [] for each in runs}
        for _ in range(options.rounds):
            for each in runs:
                found[each.label].append(each.measure())
                print(each.label, json.dumps(found[each.label][-1]), file=sys.stderr, flush=True)
    print(f"{options.shape}: {machine()}", "", sep="\n")
    rows = dict.fromkeys(name for results in found.values() for result in results for name in result)
    print(f"| | {' | '.join(found)} |", f"|---|{'---|' * len(found)}", sep="\n")
    for name in rows:
        cells = [[each[name] for each in results if name in each] for results in found.values()]
        print(f"| {name} | {' | '.join(f'{statistics.median(some):.3g}' if some else '-' for some in cells)} |")


if __name__ == "__main__":
    main()
