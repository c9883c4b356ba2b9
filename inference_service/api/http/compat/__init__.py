"""Routes that vLLM and SGLang have beside OpenAI's: for trainers, gateways, and between text and tokens."""

from typing import Final

from inference_service.api.http.compat import loads, tokens, trainers
from inference_service.api.http.endpoint import Endpoint
from loramux_shared import routes

ROUTES: Final = (
    Endpoint(routes.PAUSE, trainers.pause, query=trainers.PauseQuery),
    Endpoint(routes.RESUME, trainers.resume),
    Endpoint(routes.IS_PAUSED, trainers.is_paused),
    Endpoint(routes.WORLD_SIZE, trainers.get_world_size),
    Endpoint(routes.SERVER_INFO, trainers.server_info, query=trainers.InfoQuery),
    Endpoint(routes.LOADS, loads.show_loads),
    Endpoint(routes.LOADS_V1, loads.show_loads),
    Endpoint(routes.TOKENIZE, tokens.tokenize, tokens.TokenizeBody, fails=(404,)),
    Endpoint(routes.DETOKENIZE, tokens.detokenize, tokens.DetokenizeBody, fails=(404,)),
)
"""Routes of vLLM and SGLang that trainers and gateways call."""
