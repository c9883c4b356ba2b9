"""The commands of the pages for trainers serve what each of them saves, run as written."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pytest
from transformers import LlamaConfig

from tests.golden.wild.shapes import UNSLOTH
from tests.support.hub import HubRepo, serve_hub
from tests.support.processes.up import LORAMUX
from tests.support.processes.watching import await_line
from tests.support.root import ROOT
from tests.support.s3_gateway import free_ports
from tests.support.tiny import SIZES, make_adapter, make_checkpoint
from tests.support.waiting import BOUND_S

FILES = ("adapter_config.json", "adapter_model.safetensors")
TEMPLATE = "{% for message in messages %}{{ message.content }}{% endfor %}"
USUAL = {"http": "127.0.0.1:8000", "grpc": "127.0.0.1:50052", "builder": "127.0.0.1:50051"}
"""Addresses that commands take or name where none is given."""
TAKEN = {"check": (), "run": tuple(USUAL), "push": ("builder",), "rollout": (), "chat": ("grpc",)}
"""Addresses that the commands of the pages take."""
TRAIN = """
import sys
from datasets import Dataset
from peft import LoraConfig
from transformers import PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

tokenizer = PreTrainedTokenizerFast.from_pretrained(sys.argv[1], pad_token="<0>", eos_token="<2>")
arguments = SFTConfig("trained", max_steps=4, save_steps=2, bf16=False, report_to="none", use_cpu=True)
texts = [{"role": "user", "content": "My order is late."}, {"role": "assistant", "content": "Sorry."}]
trainer = SFTTrainer(
    sys.argv[1],
    args=arguments,
    train_dataset=Dataset.from_list([{"messages": texts}] * 8),
    peft_config=LoraConfig(r=4, target_modules="all-linear"),
    processing_class=tokenizer,
)
trainer.train()
trainer.save_model()
"""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The base that the pages name, but tiny."""
    folder = tmp_path_factory.mktemp("hub") / "Qwen" / "Qwen2.5-0.5B-Instruct"
    make_checkpoint(folder, LlamaConfig(**SIZES))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    return folder


def save_unsloth(base: Path, folder: Path) -> None:
    """Save a pattern for all parts and the name of the base in 4 bits, beside a tokenizer, and a checkpoint."""
    for name in ("lora_model", "outputs/checkpoint-60"):
        make_adapter(base, folder / name, 1, target_modules=UNSLOTH % "language|text")
        _rename_base(folder / name, "unsloth/qwen2.5-0.5b-instruct-unsloth-bnb-4bit")
        shutil.copy(base / "tokenizer.json", folder / name)
    (folder / "outputs/checkpoint-60/optimizer.pt").touch()


def save_axolotl(base: Path, folder: Path) -> None:
    """Save the adapter in the folder of the run, with the base's config and checkpoints."""
    for name in ("outputs/lora-out", "outputs/lora-out/checkpoint-10"):
        make_adapter(base, folder / name, 1, target_modules=["q_proj", "v_proj", "down_proj"])
        _rename_base(folder / name, "Qwen/Qwen2.5-0.5B-Instruct")
        shutil.copy(base / "tokenizer.json", folder / name)
    shutil.copy(base / "config.json", folder / "outputs/lora-out")
    (folder / "outputs/lora-out/checkpoint-10/optimizer.pt").touch()


def save_trl(base: Path, folder: Path) -> None:
    """Train a few steps, with the trainer itself."""
    command = [sys.executable, "-c", TRAIN, base.relative_to(base.parents[1])]
    done = subprocess.run(command, cwd=base.parents[1], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    shutil.move(base.parents[1] / "trained", folder)


def _rename_base(folder: Path, name: str) -> None:
    config = folder / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": name}))


def commands_of(page: str) -> list[str]:
    """Return the commands of a page, each in one line."""
    blocks = re.findall(r"```console\n(.*?)```", (ROOT / "docs/move" / page).read_text(), re.S)
    return [command.replace("\\\n", "").strip() for block in blocks for command in block.split("$ ")[1:]]


def on_addresses(command: str, apis: Mapping[str, str]) -> str:
    """Return a command with these addresses instead of the usual ones."""
    for name, address in apis.items():
        command = command.replace(USUAL[name], address)
    word = re.search(r"loramux (\S+)", command)
    flags = [f" --{name} {apis[name]}" for name in TAKEN[word[1]]] if word else []
    return command + "".join(flags)


@contextmanager
def serving(command: str, folder: Path, environment: Mapping[str, str]) -> Iterator[None]:
    """Run a command until it serves; end it as Ctrl-C does."""
    log = folder / "run.log"
    with log.open("w") as output:
        process = subprocess.Popen(
            ["bash", "-c", f"exec {command}"], cwd=folder, env=environment, stdout=output, stderr=output
        )
    try:
        await_line(process, log, "^ready")
        yield
    finally:
        process.terminate()
        process.wait(BOUND_S)


@pytest.mark.usefixtures("native_folder")
@pytest.mark.parametrize(
    ("page", "save"),
    [
        ("unsloth.md", save_unsloth),
        pytest.param("axolotl.md", save_axolotl, marks=pytest.mark.sweep),
        pytest.param("trl.md", save_trl, marks=pytest.mark.sweep),
    ],
)
def test_commands_of_a_page_serve_what_a_trainer_saved(
    page: str, save: Callable[[Path, Path], None], base: Path, tmp_path: Path
) -> None:
    """Six commands, on free ports, check, serve, ask and update; the base comes from a hub."""
    if save is save_trl:
        pytest.importorskip("trl", reason="the trainer is an extra: pip install 'loramux[trl]'")
    save(base, tmp_path)
    apis = {name: f"127.0.0.1:{port}" for name, port in zip(USUAL, free_ports(3), strict=True)}

    check, serve, *rest = (on_addresses(command, apis) for command in commands_of(page))
    assert len(rest) == 4
    with serve_hub() as hub:
        files = {file.name: file.read_bytes() for file in base.iterdir()}
        for owner in ("Qwen", "unsloth"):
            hub.repos[f"{owner}/{base.name}"] = HubRepo({"main": "a" * 40}, files)
        environment = os.environ | {
            "HF_ENDPOINT": hub.endpoint,
            "HOME": str(tmp_path),
            "PATH": f"{LORAMUX.parent}:{os.environ['PATH']}",
        }

        def run(command: str) -> str:
            done = subprocess.run(
                ["bash", "-c", command],
                cwd=tmp_path,
                env=environment,
                check=False,
                capture_output=True,
                text=True,
            )
            assert done.returncode == 0, (command, done.stdout, done.stderr)
            return done.stdout

        assert "accepted: no errors" in run(check)
        with serving(serve, tmp_path, environment):
            completion, *others = map(run, rest)
    answer = json.loads(completion)
    assert answer["model"] == "tuned"
    assert answer["choices"][0]["message"]["content"]
    assert others[-1].strip()
