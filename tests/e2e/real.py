"""The demo's base model and adapters, and what transformers and PEFT answer with them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM

from loramux_shared.deployment import Deployment
from loramux_shared.deployment_file import load_deployment

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
_QUESTIONS = (
    "What is the capital of France?",
    "Tell me about the sea.",
    "How do I make tea?",
    "Why is the sky blue?",
    "Name three animals that can fly.",
    "What should I eat for breakfast?",
    "Explain gravity to a child.",
    "Who wrote Romeo and Juliet?",
    "How long is a year on Mars?",
    "Give me a reason to go for a walk.",
    "What does a blacksmith do?",
    "How are clouds made? " * 12,  # longer than several cache blocks
)
_TEXTS = (
    "Once upon a time",
    "The quick brown fox",
    "1, 2, 3, 4,",
    "def fibonacci(n):\n    ",
    "Dear Sir or Madam,",
    "In the beginning",
    "Water boils at",
    "The history of the steam engine begins in the seventeenth century, when " * 6,
)


def deployment() -> Deployment:
    """The example's deployment; its base is made when it is not there."""
    found = load_deployment(EXAMPLES / "deployment.yaml").deployment
    base = found.build.checkpoint_repository.repo
    subprocess.run([sys.executable, EXAMPLES / "prepare_base.py", base], check=True, capture_output=True)
    return found


def in_float32(original: Deployment) -> Deployment:
    """The same deployment with bundles that lose nothing of float32 adapters."""
    data = original.model_dump(mode="json")
    data["build"]["lora_configuration"]["dtype"] = "float32"
    return Deployment.model_validate(data)


def prompts(base: Path, *, every: int = 1) -> list[list[int]]:
    """Twenty prompts, or every so many of them: chat turns and plain texts, from 3 to about 90 tokens."""
    tokenizer = Tokenizer.from_file(str(base / "tokenizer.json"))
    chats = [f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n" for text in _QUESTIONS]
    return [tokenizer.encode(text).ids for text in (*chats, *_TEXTS)[::-1][::every]]


def oracle_answers(found: Deployment, asked: list[list[int]], new: int) -> dict[str, list[list[int]]]:
    """Greedy answers of so many tokens of every model to every prompt in float32."""
    base = Path(found.build.checkpoint_repository.repo)
    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    answers = {found.served_model_name: _generate(model, asked, new)}
    for name, repository in found.build.lora_adapters.items():
        adapted = PeftModel.from_pretrained(model, repository.repo).eval()
        answers[name] = _generate(adapted, asked, new)
        model = adapted.unload()  # the base as it was
    return answers


def _generate(model: Any, asked: list[list[int]], new: int) -> list[list[int]]:
    longest = max(map(len, asked))
    ids = torch.zeros(len(asked), longest, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(asked):
        ids[row, longest - len(prompt) :] = torch.tensor(prompt)
        mask[row, longest - len(prompt) :] = 1
    out = model.generate(
        input_ids=ids,
        attention_mask=mask,
        max_new_tokens=new,
        min_new_tokens=new,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    return [[int(token) for token in row] for row in out[:, longest:]]
