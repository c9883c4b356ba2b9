"""Parsers of untrusted bytes, each with what judges any bytes, valid ones to begin with, and draws of others.

A judge returns "accepted" or "refused", and raises for all else: another exception than the parser's own
refusal, a refusal that names a path of this machine, a value that its writer does not write back.
"""

import json
import tracemalloc
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory
from typing import Final

import safetensors
from safetensors.numpy import save

from builder_service.domain.adapter_config import parse_config
from builder_service.domain.safetensors_header import HeaderInvalid, read_header
from inference_service.engine.models.shard import TYPES, ShardInvalid, read_shard
from loramux_shared.faults import BundleCorrupt, CheckpointInvalid
from tests.fuzz import bundles, ggufs, templates, test_adapter_config, test_safetensors
from tests.fuzz.mutate import check_findings, mutations

Judge = Callable[[bytes], str]
LONGEST_MESSAGE: Final = 4000
"""Characters: what a file says is not repeated at length."""


@dataclass(frozen=True)
class FuzzTarget:
    """A parser."""

    judge: Callable[[Path], Judge]
    """Takes a folder for its files."""
    seeds: Callable[[], list[bytes]]
    drawn: Callable[[Random], bytes]
    growth: int
    """Bytes of memory that Python may take for a byte of input, at most."""

    def case(self, rng: Random) -> bytes:
        """Return bytes to judge: drawn, or a seed with other bytes."""
        return self.drawn(rng) if rng.random() < 0.5 else mutations(rng.choice(self.seeds()), rng)


LEAST_GROWTH: Final = 4 << 20
"""Bytes that any input may take: what a parser, a process or a cache needs once."""


def judged(target: FuzzTarget, judge: Judge, data: bytes) -> str:
    """Return a judge's word; raise AssertionError where Python took more memory than the input may cost."""
    tracemalloc.reset_peak()
    before = tracemalloc.get_traced_memory()[0]
    outcome = judge(data)
    taken = tracemalloc.get_traced_memory()[1] - before
    assert taken <= LEAST_GROWTH + target.growth * len(data), f"{taken >> 10} KB for {len(data)} bytes"
    return outcome


@contextmanager
def opened(name: str) -> Iterator[Callable[[bytes], str]]:
    """Yield what judges bytes for a target, in bounded memory."""
    target = TARGETS[name]
    with TemporaryDirectory() as folder, ExitStack() as stack:
        judge = target.judge(Path(folder))
        if isinstance(judge, templates.TemplateJudge):
            stack.callback(judge.close)
        tracemalloc.start()
        stack.callback(tracemalloc.stop)
        yield lambda data: judged(target, judge, data)


def _refused(error: Exception, path: Path) -> str:
    """Check a refusal: it is short text, and names the file without its folder."""
    message = str(error)
    message.encode()
    assert str(path.parent) not in message, message
    assert len(message) <= LONGEST_MESSAGE, message
    return "refused"


def _safetensors(folder: Path) -> Judge:
    """A builder takes what the library takes, and reads the same; a replica takes what a builder does."""
    path = folder / "model.safetensors"

    def judge(data: bytes) -> str:
        path.write_bytes(data)
        try:
            shard = read_shard(path)
        except ShardInvalid as error:
            shard = None
            _refused(error, path)
        try:
            file = read_header(path)
        except HeaderInvalid as error:
            return _refused(error, path)
        theirs = {name: tuple(info["shape"]) for name, info in safetensors.deserialize(data)}
        assert theirs == {name: tensor.shape for name, tensor in file.tensors.items()}
        assert shard is not None
        assert {name: tuple(tensor.shape) for name, tensor in shard.tensors.items()} == {
            name: tensor.shape for name, tensor in file.tensors.items() if tensor.dtype in TYPES
        }
        return "accepted"

    return judge


def _adapter_config(_: Path) -> Judge:
    """A config has a meaning for any module, or findings with codes."""

    def judge(data: bytes) -> str:
        parsed = parse_config(data)
        check_findings(parsed.findings, 0)
        if parsed.config is None:
            assert parsed.findings
            return "refused"
        config, findings = parsed.config.with_default_targets("llama")
        check_findings(findings, 0)
        for rank in (0, 1, 8):
            assert isinstance(config.scale_of("model.layers.0.self_attn.q_proj", rank), float)
        config.indices_of("model.embed_tokens")
        config.default_note.encode()
        return "accepted"

    return judge


def _gguf(folder: Path) -> Judge:
    path = folder / "model.gguf"

    def judge(data: bytes) -> str:
        path.write_bytes(data)
        try:
            ggufs.judge(path)
        except CheckpointInvalid as error:
            return _refused(error, path)
        return "accepted"

    return judge


def _gguf_adapter(folder: Path) -> Judge:
    path, model = folder / "adapter.gguf", ggufs.model()

    def judge(data: bytes) -> str:
        path.write_bytes(data)
        return ggufs.judge_adapter(path, model)

    return judge


def _bundle(folder: Path) -> Judge:
    def judge(data: bytes) -> str:
        try:
            bundles.judge(data)
        except BundleCorrupt as error:
            return _refused(error, folder / "x")
        return "accepted"

    return judge


TARGETS: Final[Mapping[str, FuzzTarget]] = {
    "safetensors": FuzzTarget(
        _safetensors,
        lambda: [save(seed, test_safetensors.METADATA) for seed in test_safetensors.SEEDS],
        test_safetensors.mutated,
        200,
    ),
    "adapter-config": FuzzTarget(
        _adapter_config,
        lambda: [json.dumps(seed).encode() for seed in test_adapter_config.SEEDS],
        lambda rng: test_adapter_config.mutated(rng, costly=False),
        200,
    ),
    "gguf": FuzzTarget(_gguf, ggufs.seeds, ggufs.drawn, 200),
    "gguf-adapter": FuzzTarget(
        _gguf_adapter, lambda: [ggufs.LORA.pack()], lambda rng: ggufs.drawn(rng, [ggufs.LORA]), 200
    ),
    "bundle": FuzzTarget(_bundle, bundles.seeds, bundles.drawn, 200),
    "template": FuzzTarget(lambda _: templates.TemplateJudge(), templates.seeds, templates.drawn, 1 << 10),
    "sandbox-answer": FuzzTarget(
        lambda _: templates.judge_answer, lambda: list(templates.ANSWERS), templates.drawn_answer, 200
    ),
}
