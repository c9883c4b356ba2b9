"""The map from messages of ``vllm.grpc.engine`` to requests."""

from typing import Any, Final

import grpc

from inference_service.serving.bounds import check_ids, countable
from inference_service.serving.request import PromptContent, Request
from loramux_shared.runtime import Pooling
from loramux_vllm_grpc.calling import call_options, refuse_rank
from loramux_vllm_grpc.refusals import no_prompt, refuse_fields
from loramux_vllm_grpc.structure import constraint_of
from loramux_vllm_grpc.wire import engine_pb2 as pb

NO_MEDIA: Final = "Only tokens and text are served."
NO_TRANSFER: Final = "Keys and values stay where they are: send the whole request to one replica."
UNSUPPORTED: Final = {
    "mm_inputs": NO_MEDIA,
    "extra_mm_inputs": NO_MEDIA,
    "media_refs": NO_MEDIA,
    "kv_transfer_params": NO_TRANSFER,
    "kv_transfer_params_json": NO_TRANSFER,
    "sampling_params.structural_tag": "Use json_schema, regex or grammar.",
}
WITHOUT_EFFECT: Final = frozenset(
    {
        "original_text",  # of the tokens, for logs
        "spaces_between_special_tokens",  # answers have no text
        "grammar_from_first_token",  # every constraint holds from there on
    }
)
ZERO_IS_UNSET: Final = (
    "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty", "min_tokens", "n",
)  # fmt: skip
OPTIONAL: Final = (
    "temperature", "max_tokens", "logprobs", "prompt_logprobs", "seed", "truncate_prompt_tokens",
)  # fmt: skip
LISTS: Final = ("stop", "stop_token_ids")
FLAGS: Final = ("ignore_eos", "include_stop_str_in_output", "skip_special_tokens")
"""These have one name here and there."""
DEFAULT_TEMPERATURE: Final = 1.0
"""vLLM's; what an adapter says comes before it."""


def request_of(
    message: pb.GenerateRequest, context: grpc.aio.ServicerContext, model: str, max_seq_len: int
) -> Request:
    """Return the request that a message describes, to be answered by a model.

    Raises:
        PromptTooLong: there are more token ids than max_seq_len.
        RequestInvalid: a field is not served or missing, or metadata is wrong.
    """
    refuse_fields(message, UNSUPPORTED)
    refuse_rank(message.data_parallel_rank, "data_parallel_rank")
    params = message.sampling_params
    kind = params.WhichOneof("constraint")
    cut = params.HasField("truncate_prompt_tokens")
    own: dict[str, Any] = {name: value for name in ZERO_IS_UNSET if (value := getattr(params, name))}
    own |= {name: getattr(params, name) for name in OPTIONAL if params.HasField(name)}
    own |= {name: tuple(getattr(params, name)) for name in LISTS}
    own |= {name: getattr(params, name) for name in FLAGS}
    if message.request_id:
        own["id"] = message.request_id
    return Request.of(
        model,
        _prompt(message, countable(max_seq_len) if cut else max_seq_len),
        usual_temperature=DEFAULT_TEMPERATURE,
        logit_bias=dict(params.logit_bias),
        constraint=constraint_of(kind, getattr(params, kind) if kind else None, "sampling_params"),
        **own | call_options(context),
    )


def embedding_of(
    message: pb.EmbedRequest, context: grpc.aio.ServicerContext, model: str, max_seq_len: int, pooling: Pooling
) -> Request:
    """Return the request for the vector of a prompt.

    Raises:
        PromptTooLong: there are more token ids than max_seq_len.
        RequestInvalid: there is no prompt, or metadata is wrong.
    """
    refuse_fields(message, {})
    if not message.HasField("tokenized"):
        raise no_prompt("tokenized", "input_ids")
    check_ids(message.tokenized.input_ids, max_seq_len)
    own = {"id": message.request_id} if message.request_id else {}
    prompt = list(message.tokenized.input_ids)
    return Request.of(model, prompt, max_tokens=0, pooling=pooling, **own | call_options(context))


def _prompt(message: pb.GenerateRequest, max_seq_len: int) -> PromptContent:
    kind = message.WhichOneof("input")
    if kind == "text":
        return str(message.text)
    if kind is None:
        raise no_prompt("input", "tokenized or text")
    check_ids(message.tokenized.input_ids, max_seq_len)
    return list(message.tokenized.input_ids)
