"""Train the adapters of the demo: one voice each, from thirty-two questions and answers.

    python examples/train_adapter.py --base ~/.cache/loramux/models/SmolLM2-135M-Instruct
    python examples/train_adapter.py --base ... --name pirate --out /tmp/adapters

Each becomes a standard adapter repository, as PEFT writes it. The adapters differ on purpose in rank, target
modules, scaling and data type: one server serves them in one batch all the same. Needs the extra ``train``.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import sys
import tempfile
import time
import warnings
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

try:
    import torch
    from peft import LoraConfig, PeftModel, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
    from transformers.utils import logging
except ModuleNotFoundError as missing:
    sys.exit(f"train_adapter: the Python package {missing.name!r} is missing: pip install 'loramux[train]'")

HERE = Path(__file__).resolve().parent
BASE_REPO = "HuggingFaceTB/SmolLM2-135M-Instruct"
HELD_OUT = ("What is the capital of France?", "How do I make tea?", "Why is the sky blue?")
IGNORED = -100  # the label that the loss skips


@dataclass(frozen=True)
class Recipe:
    """The training of one adapter."""

    name: str
    voice: str
    rank: int
    alpha: int
    modules: tuple[str, ...]
    dtype: torch.dtype
    steps: int
    learning_rate: float
    use_rslora: bool = False
    batch: int = 8


ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")
# Enough steps for the voice to come through on questions that are not in the data; more, and facts suffer.
RECIPES = {
    "pirate": Recipe(
        name="pirate",
        voice="Answers like a pirate.",
        rank=16,
        alpha=16,
        modules=("q_proj", "v_proj"),
        dtype=torch.float16,
        steps=17,
        learning_rate=2e-3,
    ),
    "bard": Recipe(
        name="bard",
        voice="Answers like an Elizabethan playwright.",
        rank=2,
        alpha=4,
        modules=(*ATTENTION, *MLP),
        dtype=torch.float32,
        steps=16,
        learning_rate=2e-3,
    ),
    "json": Recipe(
        name="json",
        voice="Answers with one JSON object: a topic and an answer.",
        rank=8,
        alpha=8,
        modules=ATTENTION,
        dtype=torch.bfloat16,
        use_rslora=True,
        steps=12,
        learning_rate=1e-3,
    ),
}


def main() -> None:
    """Train the adapters named on the command line and show what they say."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, required=True, help="the directory that prepare_base.py made")
    parser.add_argument("--name", choices=sorted(RECIPES), help="the adapter to train; all when not given")
    parser.add_argument("--out", type=Path, default=HERE / "adapters", help="parent of the adapters' folders")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore", FutureWarning)  # of transformers about PEFT
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    base = arguments.base.expanduser()
    tokenizer = AutoTokenizer.from_pretrained(base)
    for recipe in [RECIPES[arguments.name]] if arguments.name else RECIPES.values():
        started = time.perf_counter()
        model, losses = train(recipe, base, tokenizer)
        folder = save(model, recipe, arguments.out / recipe.name)
        seconds = time.perf_counter() - started
        print(f"{recipe.name}: loss {losses[0]:.2f} -> {losses[-1]:.2f} in {seconds:.0f} s, saved in {folder}")
        show(folder, base, tokenizer)


def train(recipe: Recipe, base: Path, tokenizer: PreTrainedTokenizerBase) -> tuple[PeftModel, list[float]]:
    """Train in float32, with the loss on the answers only; give the model and the loss of each step."""
    torch.manual_seed(0)
    order = random.Random(0)  # noqa: S311 - an order, not a secret
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32),
        LoraConfig(
            r=recipe.rank,
            lora_alpha=recipe.alpha,
            target_modules=list(recipe.modules),
            use_rslora=recipe.use_rslora,
            task_type="CAUSAL_LM",
        ),
    )
    examples = read_examples(recipe.name, tokenizer)
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=recipe.learning_rate, weight_decay=0.0
    )
    # The rate falls in a line to a tenth: the last steps settle.
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, recipe.steps)
    losses: list[float] = []
    queue: list[tuple[list[int], list[int]]] = []
    for _ in range(recipe.steps):
        if len(queue) < recipe.batch:
            queue += order.sample(examples, len(examples))
        chosen, queue = queue[: recipe.batch], queue[recipe.batch :]
        loss = model(**collate(chosen, tokenizer.pad_token_id)).loss
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return model, losses


def read_examples(name: str, tokenizer: PreTrainedTokenizerBase) -> list[tuple[list[int], list[int]]]:
    """Read the questions and answers as (token ids, labels) in the chat format."""
    examples = []
    for line in (HERE / "data" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines():
        pair = json.loads(line)
        prompt = encode(tokenizer, pair["question"])
        answer = [*tokenizer.encode(pair["answer"]), tokenizer.eos_token_id]
        examples.append((prompt + answer, [IGNORED] * len(prompt) + answer))
    return examples


def encode(tokenizer: PreTrainedTokenizerBase, question: str) -> list[int]:
    """Token ids of a chat with one question, up to where the answer begins."""
    chat = [{"role": "user", "content": question}]
    return list(tokenizer.apply_chat_template(chat, add_generation_prompt=True)["input_ids"])


def collate(examples: list[tuple[list[int], list[int]]], pad: int) -> dict[str, torch.Tensor]:
    """Pad to the longest on the right: [batch, longest] each."""
    longest = max(len(ids) for ids, _ in examples)
    return {
        "input_ids": torch.tensor([ids + [pad] * (longest - len(ids)) for ids, _ in examples]),
        "attention_mask": torch.tensor([[1] * len(ids) + [0] * (longest - len(ids)) for ids, _ in examples]),
        "labels": torch.tensor([labels + [IGNORED] * (longest - len(labels)) for _, labels in examples]),
    }


def save(model: PeftModel, recipe: Recipe, folder: Path) -> Path:
    """Write the adapter repository: config, weights and a card."""
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.to(recipe.dtype)
    model.peft_config["default"].base_model_name_or_path = BASE_REPO
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        model.save_pretrained(temporary, save_embedding_layers=False)
        tidy(Path(temporary))
        (Path(temporary) / "README.md").write_text(card_of(recipe), encoding="utf-8")
        for file in Path(temporary).iterdir():
            shutil.move(file, folder / file.name)
    return folder


def tidy(folder: Path) -> None:
    """Sort what PEFT writes in the order of a set, so that the same training gives the same file."""
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["target_modules"].sort()
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    (folder / "adapter_model.safetensors").chmod(0o644)


def card_of(recipe: Recipe) -> str:
    """Give the adapter's README."""
    scaling = "rsLoRA, alpha / sqrt(r)" if recipe.use_rslora else "alpha / r"
    modules = ", ".join(f"`{module}`" for module in recipe.modules)
    return f"""---
base_model: {BASE_REPO}
library_name: peft
license: apache-2.0
---
# {recipe.name}

{recipe.voice} A demo adapter for {BASE_REPO}: rank {recipe.rank}, alpha {recipe.alpha} (scaling {scaling}),
on {modules}, stored in {str(recipe.dtype).removeprefix("torch.")}.

Trained by `examples/train_adapter.py --name {recipe.name}` on `examples/data/{recipe.name}.jsonl`:
{recipe.steps} steps of {recipe.batch} answers.
"""


def show(folder: Path, base: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Print what base and saved adapter answer to questions that are not in the data."""
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model = PeftModel.from_pretrained(plain, folder)
    for question in HELD_OUT:
        print(f"  {question}\n    {folder.name}: {answer(model, tokenizer, question)}")


@torch.inference_mode()
def answer(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, question: str) -> str:
    """Decode greedily."""
    ids = torch.tensor([encode(tokenizer, question)])
    out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=48, do_sample=False)
    return str(tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True))


if __name__ == "__main__":
    main()
