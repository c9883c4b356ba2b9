"""``python -m inference_service.engine.models.lowbit.widen``: weights of few bits, widened as a replica does.

A JSON object a line comes in on stdin, and one a line goes out on stdout, until stdin ends::

    {"base": DIR, "name": "model.layers.0.self_attn.q_proj.weight", "shape": [OUT, IN], "into": FILE}
    {}
    {"fault": {"reason": "CHECKPOINT_INVALID", "message": "..."}}

DIR has the base's config.json, and those of its safetensors files that the weight is in. FILE is then one with
the weight in float32, under its name. The builder imports no torch, and asks this where torch is installed.
"""

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from inference_service.engine.models import gguf
from inference_service.engine.models.lowbit.find import Found
from inference_service.engine.models.packed import PackedWeights, Pieces, widened
from loramux_shared.bases.files import gguf_files
from loramux_shared.bases.read import read_config
from loramux_shared.faults import CheckpointInvalid, Fault


def main() -> int:
    """Answer the requests on stdin; returns the exit status."""
    for line in sys.stdin:
        answer: dict[str, Any] = {}
        try:
            request = json.loads(line)  # noqa: TID251 - a process of ours asks
            weight = widen(Path(request["base"]), request["name"], tuple(request["shape"]))
            save_file({request["name"]: weight}, request["into"])
        except Fault as fault:
            answer = {"fault": {"reason": fault.reason, "message": fault.message}}
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()
    return 0


def widen(base: Path, name: str, shape: tuple[int, ...]) -> Tensor:
    """Return a weight of few bits in float32.

    Raises:
        CheckpointInvalid: there is none of this name and shape, or its tensors do not go together.
    """
    quantization, blocks = read_config(base).quantization, gguf_files(path.name for path in base.iterdir())
    where: Mapping[str, Path]
    found: PackedWeights | None
    if blocks:
        where = {each: base / file for file in blocks for each in gguf.names_of(base / file)}
        found, read = gguf.FoundBlocks(where), gguf.read_tensor
    else:
        where, read = _tensors(base), _read
        found = None if quantization is None else Found(quantization.format, where)
    if quantization is None or found is None or name not in found:
        raise CheckpointInvalid(f"{name}: expected a weight of few bits, found none.")
    tensors = {role: read(where[each], each) for role, each in found.parts(name).items()}
    packed = found.open(Pieces(name, shape, quantization, tensors))
    return widened(packed, torch.float32).contiguous()


def _tensors(base: Path) -> Mapping[str, Path]:
    """Return the tensors that are there, each with its file."""
    found: dict[str, Path] = {}
    for path in sorted(base.glob("*.safetensors")):
        try:
            with safe_open(path, framework="pt") as file:
                found |= dict.fromkeys(file.keys(), path)
        except (SafetensorError, OSError) as error:
            raise CheckpointInvalid(f"{path.name} is not a readable safetensors file: {error}") from error
    return found


def _read(path: Path, name: str) -> Tensor:
    with safe_open(path, framework="pt") as file:
        tensor: Tensor = file.get_tensor(name)
        return tensor


if __name__ == "__main__":
    sys.exit(main())
