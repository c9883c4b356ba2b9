"""The demo's base model and adapters, and the answers of transformers and PEFT with them."""

import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM

from loramux_shared.deployment import Deployment
from loramux_shared.deployment_file import load_deployment
from tests.support.root import ROOT

Answers = dict[tuple[str, int], list[int]]
"""The tokens that a model says, by its name and the place of the prompt."""
EXAMPLES = ROOT / "examples"
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


@cache
def deployment() -> Deployment:
    """Return the example's deployment; its base is made on first use."""
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


def oracle_choices(found: Deployment, query: list[list[int]], answers: Answers) -> Answers:
    """The token that each model finds likeliest in float32 after the prompt and each prefix of its answer."""
    base = Path(found.build.checkpoint_repository.repo)
    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    choices = _choices(model, query, answers, found.served_model_name)
    for name, repository in found.build.lora_adapters.items():
        adapted = PeftModel.from_pretrained(model, repository.repo).eval()
        choices |= _choices(adapted, query, answers, name)
        model = adapted.unload()  # the base as it was
    return choices


@torch.inference_mode()
def _choices(model: Any, query: list[list[int]], answers: Answers, name: str) -> Answers:
    """The choices of one model, prompt by prompt, so that nothing is padded."""
    choices: Answers = {}
    for (answering, place), answer in answers.items():
        if answering == name:
            ids = torch.tensor([[*query[place], *answer[:-1]]])
            logits = model(input_ids=ids, logits_to_keep=len(answer)).logits[0]
            choices[name, place] = logits.argmax(-1).tolist()
    return choices
