"""Bases that score a document for a query by logits of the next token, as sentence-transformers has it.

Qwen3-Reranker and others are decoders that answer yes or no. `modules.json` of such a base names a module
``LogitScore``; its config names the tokens, and the chat template renders messages of two roles, query and
document.
"""

from pathlib import Path
from typing import Any, Final

from loramux_shared.bases.config import LogitScore, ModelConfig
from loramux_shared.bases.hf_config import read_json
from loramux_shared.faults import CheckpointInvalid
from loramux_shared.runtime import PROMPTS

LOGIT_SCORE: Final = "1_LogitScore/config.json"
"""Config of the module."""


def logit_score_in(folder: Path, model: ModelConfig) -> LogitScore | None:
    """Return how the base in a folder scores documents; None where it does not.

    Raise CheckpointInvalid where a file says something else than is meant here, or the base's logits are no
    products of its head alone.
    """
    fields = read_json(folder / LOGIT_SCORE)
    if fields is None:
        return None
    if model.head_bias or model.logit_softcap is not None:
        raise CheckpointInvalid(
            f"{LOGIT_SCORE}: expected a head without a bias, and logits without a cap. Remove the "
            "file to serve the base without scores."
        )
    tokens = fields.get("true_token_id"), fields.get("false_token_id")
    known = range(model.dims.vocab)
    for name, token in zip(("true_token_id", "false_token_id"), tokens, strict=True):
        absent = token is None and name == "false_token_id"
        if not absent and (not isinstance(token, int) or isinstance(token, bool) or token not in known):
            raise CheckpointInvalid(
                f"{LOGIT_SCORE}: {name}: expected a token from 0 to {known[-1]}, found {token!r:.80}."
            )
    about = read_json(folder / PROMPTS) or {}
    activation = str(about.get("activation_fn") or "")
    if activation and not activation.endswith((".Identity", ".Sigmoid")):
        raise CheckpointInvalid(
            f"{PROMPTS}: activation_fn: expected Identity or Sigmoid, found {activation:.80}."
        )
    instruction = _usual_prompt(about)
    return LogitScore(*tokens, instruction, activation.endswith(".Identity"))  # type: ignore[arg-type]  # see above


def _usual_prompt(about: dict[str, Any]) -> str:
    """Return the prompt that is used where none is named; empty where there is none."""
    prompts, usual = about.get("prompts"), about.get("default_prompt_name")
    found = prompts.get(usual, "") if isinstance(prompts, dict) and isinstance(usual, str) else ""
    if not isinstance(found, str):
        raise CheckpointInvalid(f"{PROMPTS}: prompts: expected texts, found {found!r:.80}.")
    return found
