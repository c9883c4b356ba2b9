"""Filters that find the model of a request without `x-loramux-model`."""

from typing import Any, Final

from loramux_shared.routes import INFERENCE_SERVICE, MODEL_HEADER, OF_A_MODEL

Json = dict[str, Any]

HEADER: Final = MODEL_HEADER
METHODS: Final = tuple(f"/{INFERENCE_SERVICE}/{method}" for method in OF_A_MODEL)
METADATA: Final = "loramux"
_FILTERS: Final = "type.googleapis.com/envoy.extensions.filters.http"

OF_JSON: Final = f"""\
-- The model of an OpenAI request is in its body; a streamed one may be sent elsewhere until its first token.
function envoy_on_request(request)
  local headers = request:headers()
  local body = request:streamInfo():dynamicMetadata():get("{METADATA}") or {{}}
  if headers:get("{HEADER}") == nil and type(body.model) == "string" and #body.model <= 512
      and not body.model:find("[^ -~]") then
    headers:add("{HEADER}", body.model)
  end
  headers:remove("x-envoy-upstream-rq-per-try-timeout-ms")
  if body.stream == true and FIRST_TOKEN_MS > 0 then
    headers:add("x-envoy-upstream-rq-per-try-timeout-ms", tostring(FIRST_TOKEN_MS))
  end
end
"""
OF_PROTOBUF: Final = f"""\
-- The model is field 1 of what these read, and serializers begin with it: 5 bytes of gRPC's frame, then the
-- tag 0x0a, the length in one or two bytes, and the name. What looks otherwise goes to any replica.
local ANSWERS = {{{", ".join(f'["{method}"] = true' for method in METHODS)}}}
function envoy_on_request(request)
  local headers = request:headers()
  if headers:get("{HEADER}") ~= nil or not ANSWERS[headers:get(":path")] then
    return
  end
  local body = request:body()
  if body == nil or body:length() < 8 then
    return
  end
  local head = body:getBytes(0, math.min(body:length(), 520))
  local compressed, tag, length, more = head:byte(1), head:byte(6), head:byte(7), head:byte(8)
  local begin = 8
  if length >= 128 then
    length, begin = length - 128 + 128 * more, 9
  end
  local model = head:sub(begin, begin + length - 1)
  if compressed == 0 and tag == 10 and length > 0 and #model == length and not model:find("[^ -~]") then
    request:headers():add("{HEADER}", model)
  end
end
"""


def filters_of_json(first_token_s: float) -> list[Json]:
    """Return the filters of the HTTP listener."""
    rules = [
        {
            "selectors": [{"key": key}],
            "on_present": {"metadata_namespace": METADATA, "key": key},
        }
        for key in ("model", "stream")
    ]
    return [
        {
            "name": "envoy.filters.http.json_to_metadata",
            "typed_config": {
                "@type": f"{_FILTERS}.json_to_metadata.v3.JsonToMetadata",
                "request_rules": {"rules": rules},
            },
        },
        lua(OF_JSON.replace("FIRST_TOKEN_MS", str(round(first_token_s * 1000)))),
    ]


def filters_of_protobuf() -> list[Json]:
    """Return the filters of the gRPC listener."""
    return [lua(OF_PROTOBUF)]


def lua(text: str) -> Json:
    """Return the filter of a program."""
    return {
        "name": "envoy.filters.http.lua",
        "typed_config": {
            "@type": f"{_FILTERS}.lua.v3.Lua",
            "default_source_code": {"inline_string": text},
        },
    }
