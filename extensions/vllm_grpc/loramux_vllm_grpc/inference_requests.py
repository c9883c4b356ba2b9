"""The map from messages of ``vllm.Inference`` to requests."""

import uuid
from typing import Any, Final

import grpc

from inference_service.serving.bounds import check_ids, countable
from inference_service.serving.request import PromptContent, Request
from loramux_shared.faults import Finding, RequestInvalid
from loramux_vllm_grpc.calling import call_options
from loramux_vllm_grpc.refusals import no_prompt, refuse_fields
from loramux_vllm_grpc.structure import constraint_of
from loramux_vllm_grpc.wire import inference_pb2 as pb

NO_TRANSFER: Final = "Keys and values stay where they are: send the whole request to one replica."
UNSUPPORTED: Final = {
    "media": "Only tokens and text are served.",
    "kv_hints": "Leave it out.",
    "kv.kv_transfer_params": NO_TRANSFER,
    "kv.ec_transfer_params": NO_TRANSFER,
    "decoding.structural_tag": "Use json, regex or grammar.",
    "response.prompt_candidates.token_ids": "Use top_n.",
    "response.prompt_candidates.all": "Use top_n.",
    "response.output_candidates.token_ids": "Use top_n.",
    "response.output_candidates.all": "Use top_n.",
}
WITHOUT_EFFECT: Final = frozenset(
    {
        "watermarking",  # there is none
        "chat_template_kwargs",  # of a parser that is not here
    }
)


def request_of(message: pb.GenerateRequest, context: grpc.aio.ServicerContext, max_seq_len: int) -> Request:
    """Return the request that a message describes.

    Raises:
        PromptTooLong: there are more token ids than max_seq_len.
        RequestInvalid: a field is not served or missing, or metadata is wrong.
    """
    refuse_fields(message, UNSUPPORTED)
    _refuse_thinking(message)
    cut = message.truncate_prompt_tokens
    own = _named(message) | _drawn(message) | _ended(message.stopping) | _response_options(message.response)
    if message.request_id:
        own["id"] = message.request_id
    return Request.of(
        prompt=_prompt(message, countable(max_seq_len) if cut else max_seq_len),
        truncate_prompt_tokens=cut or None,
        priority=-message.priority,
        cache_salt=_salt(message.kv),
        **own | call_options(context, message.session_id),
    )


def _named(message: pb.GenerateRequest) -> dict[str, Any]:
    """Return what is to answer: a LoRA of the model, or the model."""
    if not message.lora_name:
        return {"model": message.model}
    if not message.model:
        return {"model": message.lora_name}
    return {"model": message.model, "lora_path": message.lora_name}


def _drawn(message: pb.GenerateRequest) -> dict[str, Any]:
    sampling, decoding = message.sampling, message.decoding
    kind = decoding.WhichOneof("structured_output")
    own: dict[str, Any] = {
        name: getattr(sampling, name) for name in ("top_k", "top_p", "min_p", "seed") if sampling.HasField(name)
    }
    own |= {
        name: value
        for name in ("presence_penalty", "frequency_penalty", "repetition_penalty")
        if (value := getattr(decoding, name))
    }
    if message.HasField("temperature"):
        own["temperature"] = message.temperature
    return own | {
        "n": sampling.num_sequences or 1,
        "logit_bias": dict(decoding.logit_bias),
        "allowed_token_ids": tuple(decoding.allowed_token_ids) or None,
        "bad_words_token_ids": tuple(tuple(word.ids) for word in decoding.bad_words_token_ids),
        "constraint": constraint_of(kind, getattr(decoding, kind) if kind else None, "decoding"),
    }


def _ended(stopping: pb.StoppingCriteria) -> dict[str, Any]:
    return {
        "max_tokens": stopping.max_new_tokens or None,
        "min_tokens": stopping.min_new_tokens or None,
        "stop": tuple(stopping.stop_strings),
        "stop_token_ids": tuple(stopping.stop_token_ids),
        "include_stop_str_in_output": stopping.include_stop_strings,
        "ignore_eos": stopping.ignore_eos,
    }


def _response_options(response: pb.ResponseOptions) -> dict[str, Any]:
    return {
        "logprobs": response.output_candidates.top_n if response.output_logprobs else None,
        "prompt_logprobs": response.prompt_candidates.top_n if response.prompt_logprobs else None,
        "skip_special_tokens": not response.HasField("skip_special_tokens") or response.skip_special_tokens,
    }


def _salt(kv: pb.KVCacheParameters) -> str | None:
    """Return who shares cached prompts; one that bypasses them shares with nobody."""
    return uuid.uuid4().hex if kv.bypass_prefix_cache else kv.cache_salt or None


def _prompt(message: pb.GenerateRequest, max_seq_len: int) -> PromptContent:
    kind = message.WhichOneof("prompt")
    if kind == "text":
        return str(message.text)
    if kind is None:
        raise no_prompt("prompt", "text or token_ids")
    check_ids(message.token_ids.ids, max_seq_len)
    return list(message.token_ids.ids)


def _refuse_thinking(message: pb.GenerateRequest) -> None:
    """Refuse what wants thoughts to be told from the answer: nobody here parses them."""
    gate, stopping = message.engine_reasoning_gate, message.stopping
    wrong = {
        "engine_reasoning_gate.reasoning_ended": (
            gate.HasField("reasoning_ended") and not gate.reasoning_ended,
            "true, or not set: a constraint holds from the first token on",
        ),
        "stopping.thinking_token_budget": (
            stopping.HasField("thinking_token_budget") and stopping.thinking_token_budget != -1,
            "-1, or not set: reasoning is not separated from the answer",
        ),
    }
    findings = [
        Finding(code="E_BAD_FIELD", where=where, expected=expected)
        for where, (is_wrong, expected) in wrong.items()
        if is_wrong
    ]
    if findings:
        raise RequestInvalid("the request asks to separate reasoning from the answer.", findings)
