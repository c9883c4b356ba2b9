"""The place of a model on the hash ring: one, and for a popular model several."""

from typing import Any, Final

from loramux_envoy.model import HEADER, lua

PLACE: Final = "x-loramux-place"
"""Header that the ring hashes."""
HOST: Final = "x-loramux-host"
"""Header with the replica that answered; no client sees it."""

PLACES: Final = f"""\
-- A model has a place on the ring for each log2(replicas)-th part of one replica's share of all requests; one
-- is drawn for each request. Every worker counts what it sees, and after 10000 requests keeps the half of all
-- counts: it never holds more names, and forgets models without requests. Replicas are those that answered.
local asked, total = {{}}, 0
local hosts, seen, replicas = {{}}, 0, 1

local function forget()
  for model, count in pairs(asked) do
    asked[model] = count > 1 and math.floor(count / 2) or nil
  end
  total = total / 2
  hosts, seen, replicas = {{}}, 0, math.max(seen, 1)
end

local function place_of(model)
  local count = asked[model] or 0
  asked[model], total = count + 1, total + 1
  if total >= 10000 then
    forget()
  end
  local places = math.ceil(count / math.max(total, 1000) * replicas * math.log(replicas) / math.log(2))
  local place = math.random(math.max(1, math.min(places, replicas)))
  return place == 1 and model or model .. " " .. place
end

function envoy_on_request(request)
  local headers = request:headers()
  local model = headers:get("{HEADER}")
  headers:remove("{PLACE}")
  if model ~= nil then
    headers:add("{PLACE}", #model <= 512 and place_of(model) or model)
  end
end

function envoy_on_response(response)
  local headers = response:headers()
  local host = headers:get("{HOST}")
  headers:remove("{HOST}")
  if host ~= nil and not hosts[host] then
    hosts[host], seen = true, seen + 1
    replicas = math.max(replicas, seen)
  end
end
"""


def filter_of_places() -> dict[str, Any]:
    """Return the filter that comes behind those that know the model."""
    return lua(PLACES)


def replica_header(replica: str) -> dict[str, Any]:
    """Return the header of an answer by which that filter knows the replica, whose format is given."""
    return {
        "header": {"key": HOST, "value": replica},
        "append_action": "OVERWRITE_IF_EXISTS_OR_ADD",
    }
