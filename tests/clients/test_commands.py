"""Evaluation and load tools as they are, as commands against the demo.

Run with ``--sweep``; a command that is not installed is skipped. docs/reference/clients.md has the versions.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.e2e.real import deployment

pytestmark = [pytest.mark.sweep, pytest.mark.timeout(600)]
QUESTIONS = (("The capital of France is", [" Paris", " Rome"], 0), ("Snow is", [" green", " white"], 1))
CHOICE = """
task: tiny_choice
dataset_path: json
dataset_kwargs: {data_files: {test: data.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
target_delimiter: ""
metric_list: [{metric: acc}]
"""
INSPECT = """
from inspect_ai import Task, task
from inspect_ai.dataset import Sample
from inspect_ai.scorer import includes
from inspect_ai.solver import generate

@task
def capitals():
    samples = [Sample(input="The capital of France?", target="a")]
    return Task(dataset=samples, solver=[generate()], scorer=includes())
"""


def command(name: str) -> str:
    """Return the path of a command, beside this Python or on the path."""
    found = shutil.which(name, path=str(Path(sys.executable).parent)) or shutil.which(name)
    if found is None:
        pytest.skip(f"needs the command {name}")
    return found


def run(folder: Path, *arguments: str, **settings: str) -> str:
    """Run a command that reaches no hub; it must succeed."""
    offline = {"HF_HUB_OFFLINE": "1", "OPENAI_API_KEY": "none", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(
        arguments, cwd=folder, env=os.environ | offline | settings, capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout + done.stderr


@pytest.fixture
def tokenizer() -> str:
    """The base's folder."""
    return deployment().build.checkpoint_repository.repo


def test_lm_eval_scores_choices(url: str, tokenizer: str, tmp_path: Path) -> None:
    """Log probabilities of continuations, by echo."""
    rows = [{"question": each, "choices": choices, "answer": answer} for each, choices, answer in QUESTIONS]
    (tmp_path / "data.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    (tmp_path / "tiny_choice.yaml").write_text(CHOICE)
    reported = run(
        tmp_path,
        *(command("lm_eval"), "--model", "local-completions", "--include_path", ".", "--tasks", "tiny_choice"),
        *("--model_args", f"model=pirate,base_url={url}/v1/completions,tokenizer={tokenizer}"),
    )
    assert "|tiny_choice|" in reported


def test_inspect(url: str, tmp_path: Path) -> None:
    """An evaluation by chat."""
    (tmp_path / "capitals.py").write_text(INSPECT)
    reported = run(
        tmp_path,
        *(command("inspect"), "eval", "capitals.py", "--model", "vllm/bard", "--max-tokens", "24"),
        VLLM_BASE_URL=f"{url}/v1",
        VLLM_API_KEY="none",
        INSPECT_DISPLAY="plain",
    )
    assert "accuracy" in reported


def test_guidellm(url: str, tokenizer: str, tmp_path: Path) -> None:
    """Six requests, two at a time."""
    reported = run(
        tmp_path,
        *(command("guidellm"), "run", "--backend", f"kind=openai_http,target={url},model=pirate"),
        *("--profile", "kind=concurrent,streams=2", "--constraint", "kind=max_requests,count=6"),
        *("--tokenizer", f"kind=hf_auto,model={tokenizer}", "--disable-progress"),
        *("--data", "kind=synthetic_text,prompt_tokens=32,output_tokens=8"),
    )
    assert "Benchmarking complete" in reported


def test_promptfoo(url: str, tmp_path: Path) -> None:
    """Chat and responses of two adapters; every answer is something."""
    providers = [
        {"id": f"openai:{route}", "config": {"apiBaseUrl": f"{url}/v1", "apiKey": "none", "max_tokens": 16}}
        for route in ("chat:pirate", "responses:bard")
    ]
    tests = [{"assert": [{"type": "javascript", "value": "output.length > 0"}]}]
    expected = {"prompts": ["The capital of France?"], "providers": providers, "tests": tests}
    (tmp_path / "promptfoo.json").write_text(json.dumps(expected))
    run(
        tmp_path,
        *(
            command("promptfoo"),
            "eval",
            "-c",
            "promptfoo.json",
            "--no-cache",
            "--no-write",
            "--no-progress-bar",
        ),
        PROMPTFOO_DISABLE_TELEMETRY="1",
        PROMPTFOO_DISABLE_UPDATE="1",
        PROMPTFOO_CONFIG_DIR=str(tmp_path / "home"),
    )
