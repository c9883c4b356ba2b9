"""The applications, as Serve's config files and `serve.run` take them."""

from typing import Any, Final

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from ray import serve
from ray.serve import Application
from ray.serve.config import AutoscalingConfig, AutoscalingPolicy, RequestRouterConfig

from loramux_ray.builder import BuilderReplica
from loramux_ray.engine import Engine
from loramux_ray.ingress import Ingress
from loramux_ray.names import BUILDER, ENGINE, INGRESS
from loramux_ray.settings import engine_settings
from loramux_shared.faults import SettingsInvalid
from loramux_shared.settings import BuilderSettings, load_settings

ROUTER: Final = "loramux_ray.routing.AffineRouter"
MARGIN_S: Final = 5.0
"""Seconds for a replica to end itself, beside the time that requests may take to end."""


class Options(BaseModel):
    """The `args` of a config file; Serve's own fields have all else of a deployment."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    settings: dict[str, Any] = {}
    """Settings by name, `deployment` and `store` for example; all others are the variables of the nodes."""
    replicas: int = Field(default=1, ge=1)
    """At least so many of the engine."""
    max_replicas: int | None = Field(default=None, ge=1)
    """At most so many; not given: always `replicas`."""
    target_sequences: float = Field(default=32, gt=0)
    """Sequences that run or wait, for each replica, beyond which there is to be one more."""
    max_requests: int = Field(default=1024, ge=1)
    """Requests that one replica may have; others wait in Ray's proxies."""
    num_cpus: float = Field(default=1, ge=0)
    num_gpus: float = Field(default=0, ge=0)
    """GPUs of each replica of the engine."""
    placement_group_bundles: list[dict[str, float]] | None = None
    """Resources of a replica in several parts, the first of which is its process; in place of the two above."""
    ingresses: int = Field(default=1, ge=1)
    """Processes that read HTTP requests for Ray's proxies; one for each node keeps them near."""


def build(args: dict[str, Any]) -> Application:
    """Return the application of a deployment, the engine and what reads HTTP requests; args are `Options`.

    Raises:
        SettingsInvalid: an option, or a setting, is unknown or has a wrong value.
    """
    try:
        options = Options(**args)
    except ValidationError as error:
        wrong = [f"{each['loc'][0]}: {each['msg']}" for each in error.errors(include_url=False)]
        raise SettingsInvalid(f"options of the application: {'; '.join(wrong)}.") from error
    drain_s = engine_settings(options.settings).drain_timeout_s
    engine = serve.deployment(
        name=ENGINE,
        max_ongoing_requests=options.max_requests,
        request_router_config=RequestRouterConfig.model_validate({"request_router_class": ROUTER}),
        graceful_shutdown_wait_loop_s=0.5,
        graceful_shutdown_timeout_s=drain_s + MARGIN_S,
        health_check_period_s=5,
        health_check_timeout_s=30,
        **_scale(options),
        **_resources(options),
    )(Engine)
    ingress = serve.deployment(
        name=INGRESS,
        num_replicas=options.ingresses,
        max_ongoing_requests=10 * options.max_requests,
        graceful_shutdown_timeout_s=drain_s + MARGIN_S,
        ray_actor_options={"num_cpus": 0},
    )(Ingress)
    return ingress.bind(engine.bind(options.settings))


def build_builder(options: dict[str, Any]) -> Application:
    """Return the application of a builder; options are settings, of which the others are the nodes' variables.

    Raises:
        SettingsInvalid: one is unknown or has a wrong value.
    """
    drain_s = load_settings(BuilderSettings, **options).drain_timeout_s
    builder = serve.deployment(
        name=BUILDER,
        num_replicas=1,
        max_ongoing_requests=1024,
        graceful_shutdown_timeout_s=drain_s + MARGIN_S,
        ray_actor_options={"num_cpus": 1},
    )(BuilderReplica)
    return builder.bind(options)


def _scale(options: Options) -> dict[str, Any]:
    if options.max_replicas is None:
        return {"num_replicas": options.replicas}
    return {
        "autoscaling_config": AutoscalingConfig(
            min_replicas=options.replicas,
            max_replicas=options.max_replicas,
            target_ongoing_requests=options.target_sequences,
            policy=AutoscalingPolicy(policy_function="loramux_ray.scaling:by_sequences"),  # type: ignore[no-untyped-call]
        )
    }


def _resources(options: Options) -> dict[str, Any]:
    if options.placement_group_bundles:
        first = {"CPU": 0.0, "GPU": 0.0} | options.placement_group_bundles[0]
        own = {"num_cpus": first["CPU"], "num_gpus": first["GPU"]}
        return {"placement_group_bundles": options.placement_group_bundles, "ray_actor_options": own}
    return {"ray_actor_options": {"num_cpus": options.num_cpus, "num_gpus": options.num_gpus}}
