"""The Serve application of some models: one engine per whole model, behind one OpenAI ingress.

A model is a folder. A folder with an ``adapter_config.json`` is a LoRA adapter: it shares the engine of the
base model, which saves memory on a GPU and most of the start-up time on a small machine. Any other folder is
a whole model with its own engine.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ray import serve
from ray.serve.config import RequestRouterConfig

from mmedpo_ray.config.tree import Config
from mmedpo_ray.errors import UserError
from mmedpo_ray.io.storage import join
from mmedpo_ray.models.architectures import ARCHITECTURES
from mmedpo_ray.models.loading import load_processor, read_model_config
from mmedpo_ray.models.prompts import template_with_bos
from mmedpo_ray.models.vllm_engine import EngineSettings, engine_settings
from mmedpo_ray.serve.engine_watch import deployment_name
from mmedpo_ray.serve.settings import ServeConfig
from mmedpo_ray.serve.versions import ADAPTER_CONFIG, VersionFolder
from mmedpo_ray.tables.run_folder import RunFolder

if TYPE_CHECKING:
    from ray.serve.deployment import Application

Models = dict[str, str | Path]
"""Served name → folder (or hub name)."""

_IMAGE_ROUTER = "mmedpo_ray.serve.image_router:ImageAffinityRouter"
# vLLM would configure logging for the whole process, which closes the log handlers of Serve. A controller
# that is started again then takes the replica for broken and stops it.
_REPLICA_ENVIRONMENT = {"VLLM_CONFIGURE_LOGGING": "0"}
# Ranks for which vLLM has LoRA kernels (vllm.config.lora.MaxLoRARanks).
_LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)


def build_app(
    config: Config,
    models: Models,
    *,
    has_gpu: bool,
    key_hashes: frozenset[bytes] = frozenset(),
    listen: tuple[str, int] | None = None,
    versions: VersionFolder | None = None,
) -> Application:
    """The Serve application: one deployment per whole model, its adapters with it, behind one OpenAI ingress.

    Args:
        config: all settings (``model.engine``, ``serve``).
        models: what to serve. The first whole model is the base of every adapter.
        has_gpu: whether the cluster has a GPU.
        key_hashes: of the API keys; empty: no key is asked for.
        listen: host and port of this machine on which the ingress itself listens; None: it is reached through
            Serve's proxies alone, which takes about twice the CPU time per request.
        versions: where new adapters come from while the endpoint runs; None: it keeps those of ``models``.

    Raises:
        UserError: a folder is no model, or adapters come without a base.
    """
    from mmedpo_ray.serve.engine import EngineServer
    from mmedpo_ray.serve.ingress import THROUGHPUT, build_ingress
    from mmedpo_ray.serve.page.heat_map import build_heat_maps

    engines, names_of = {}, {}
    for group in engine_groups(models):
        (name, path), *adapters = group.items()
        settings = engine_settings(config.model.engine, has_gpu=has_gpu, model=path)
        if versions is not None:
            for adapter_name, adapter in adapters:
                versions.start(adapter_name, Path(adapter))
        llm_config = _llm_config(name, path, settings, dict(adapters), versions)
        _add_limits(llm_config, config)
        options = _deployment_options(
            config.serve, settings, settings.env | THROUGHPUT | _REPLICA_ENVIRONMENT
        )
        make = serve.deployment(name=deployment_name(name), **options)
        engines[name] = make(EngineServer).bind(llm_config, dict(adapters), versions if adapters else None)
        names_of[name] = list(group)
    return build_ingress(
        engines,
        names_of,
        config.serve,
        max_pixels=_max_pixels(config),
        key_hashes=key_hashes,
        votes_folder=_votes_folder(config),
        listen=listen,
        heat_maps=build_heat_maps(config, _max_pixels(config)),
        versions=versions,
    )


def _votes_folder(config: Config) -> str | None:
    folder = config.serve.votes_folder
    return join(RunFolder(config.run.folder).root, "votes") if folder is None else folder or None


def engine_groups(models: Models) -> list[dict[str, str]]:
    """The models that share an engine: one group for each whole model, all adapters in the first.

    Raises:
        UserError: there is no whole model.
    """
    wholes = {name: str(path) for name, path in models.items() if not is_adapter(path)}
    adapters = {name: str(path) for name, path in models.items() if is_adapter(path)}
    if not wholes:
        raise UserError(
            f"cannot serve {', '.join(models) or 'nothing'}: adapters need the base model beside them."
        )
    first, *others = ({name: path} for name, path in wholes.items())
    return [first | adapters, *others]


def is_adapter(path: str | Path) -> bool:
    """Whether a folder holds a LoRA adapter rather than a whole model."""
    return (Path(path).expanduser() / ADAPTER_CONFIG).is_file()


def check_model(path: str | Path) -> None:
    """Checks that a path is a model or an adapter.

    Raises:
        UserError: it is neither.
    """
    if is_adapter(path):
        _adapter_rank(path)
    else:
        read_model_config(path)


def _llm_config(
    name: str, path: str, settings: EngineSettings, adapters: dict[str, str], versions: VersionFolder | None
) -> dict[str, Any]:
    """Arguments of ``ray.serve.llm.LLMConfig``, plain data so that only the replica imports vLLM."""
    arguments = dict(settings.engine_kwargs)
    if (read_model_config(path) or {}).get("model_type", "") in ARCHITECTURES:
        # The model's own template may leave out the beginning token, which an endpoint does not add.
        template = template_with_bos(load_processor(path))
        arguments |= {"chat_template": template} if template is not None else {}
    if adapters:
        loaded = list(adapters.values())
        # While a version rolls in, requests of two run in one batch.
        arguments |= {"enable_lora": True, "max_loras": len(adapters) + (versions is not None)}
        if versions is not None:
            loaded = [str(versions.path(version)) for version in versions.names()]
            arguments["max_cpu_loras"] = 2 * len(adapters) + 1
        # model.engine.extra may leave room for adapters of a higher rank.
        arguments["max_lora_rank"] = max(_served_rank(loaded), arguments.get("max_lora_rank", 0))
    result: dict[str, Any] = {
        "model_loading_config": {"model_id": name, "model_source": path},
        "engine_kwargs": arguments,
        "placement_group_config": {"bundles": settings.bundles},
        "runtime_env": {"env_vars": dict(settings.env)},
        "log_engine_metrics": False,
    }
    if settings.device == "cpu":
        result["accelerator_config"] = {"kind": "cpu"}
    return result


def _add_limits(llm_config: dict[str, Any], config: Config) -> None:
    """What the ingress checks before, once more in the engine."""
    arguments, variables = llm_config["engine_kwargs"], llm_config["runtime_env"]["env_vars"]
    if "limit_mm_per_prompt" in arguments and "limit_mm_per_prompt" not in config.model.engine.extra:
        arguments["limit_mm_per_prompt"] = {"image": config.serve.max_images}
    # Where a request sets no max_tokens.
    arguments["override_generation_config"] = {
        "max_new_tokens": config.serve.max_output_tokens
    } | arguments.get("override_generation_config", {})
    # No host is called so: the engine fetches nothing.
    arguments.setdefault("allowed_media_domains", ["none.invalid"])
    variables |= {
        "VLLM_MAX_IMAGE_PIXELS": str(_max_pixels(config)),
        "VLLM_MEDIA_URL_ALLOW_REDIRECTS": "0",
        "VLLM_MAX_N_SEQUENCES": str(config.serve.max_samples),
    }
    # A streamed token leaves at once, not in a batch of 50 ms.
    llm_config["experimental_configs"] = {"stream_batching_interval_ms": 0}


def _max_pixels(config: Config) -> int:
    return min(config.data.max_pixels, config.serve.max_image_pixels)


def _deployment_options(
    settings: ServeConfig, engine: EngineSettings, variables: dict[str, str]
) -> dict[str, Any]:
    router = {"request_router_class": _IMAGE_ROUTER} if settings.router == "image" else {}
    return {
        "request_router_config": RequestRouterConfig.model_validate(router),
        "autoscaling_config": {
            "min_replicas": settings.min_replicas,
            "initial_replicas": max(1, settings.min_replicas),
            "max_replicas": settings.max_replicas,
            # Ray's default for models, 1e9, never scales.
            "target_ongoing_requests": settings.target_ongoing_requests,
            "upscale_delay_s": settings.upscale_delay_s,
            "downscale_delay_s": settings.downscale_delay_s,
        },
        "max_ongoing_requests": settings.max_ongoing_requests,
        # The replica's event loop stands still while it imports and loads; a short limit would end it then.
        "health_check_timeout_s": 120,
        # A dead engine is noticed after about so long, and started again.
        "health_check_period_s": 2,
        "graceful_shutdown_timeout_s": settings.drain_timeout_s,
        # The engine's bundle has the resources; the replica itself only passes requests on.
        "ray_actor_options": {"num_cpus": 0, "runtime_env": {"env_vars": variables}},
        "placement_group_bundles": [dict(bundle) for bundle in engine.bundles],
        "placement_group_strategy": "PACK",
    }


def _served_rank(adapters: Iterable[str]) -> int:
    """The smallest rank that vLLM has kernels for and that fits every adapter."""
    largest = max(map(_adapter_rank, adapters))
    fitting = [rank for rank in _LORA_RANKS if rank >= largest]
    if not fitting:
        raise UserError(
            f"the adapter has rank {largest}; vLLM serves ranks up to {_LORA_RANKS[-1]}. Serve model/merged "
            "instead."
        )
    return fitting[0]


def _adapter_rank(path: str | Path) -> int:
    file = Path(path).expanduser() / ADAPTER_CONFIG
    try:
        return int(json.loads(file.read_text(encoding="utf-8"))["r"])
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{file} is no LoRA adapter's configuration ({error!r}). Export the adapter again."
        ) from error
