"""What a vLLM engine needs to run here: arguments, environment and Ray resources, on CPU or GPU.

One place decides, so that sampling, judging and serving start the same engine. Nothing here imports vLLM or CUDA.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from mmedpo_ray.errors import UserError
from mmedpo_ray.models.settings import EngineConfig

Device = Literal["cpu", "gpu"]

_GIB = 1024**3
# Prompts read together on CPU; at least the longest of them.
_PREFILL_TOKENS = 4096

# Every engine process works from local files and reports to nobody.
_QUIET_ENVIRONMENT = {
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "TOKENIZERS_PARALLELISM": "false",
    "VLLM_DISABLE_LOG_LOGO": "1",
}
# Kept as the caller has them; a hub model may have to be downloaded.
_PASSED_ON = ("HF_HUB_OFFLINE", "HF_HOME", "TRANSFORMERS_OFFLINE", "VLLM_CPU_NUM_OF_RESERVED_CPU")


@dataclass(frozen=True)
class EngineSettings:
    """One vLLM engine, ready for ``ray.data.llm``, ``ray.serve.llm`` or ``vllm.LLM``.

    Attributes:
        device: where the engine runs.
        engine_kwargs: keyword arguments of ``vllm.LLM`` / ``AsyncEngineArgs`` without the model itself.
        env: environment variables of every process of the engine (a Ray ``runtime_env["env_vars"]``).
        num_cpus: CPUs an actor holding the engine asks Ray for.
        num_gpus: GPUs it asks for.
        bundles: placement-group bundles, one a worker of the engine.
    """

    device: Device
    engine_kwargs: dict[str, Any]
    env: dict[str, str]
    num_cpus: float
    num_gpus: float
    bundles: list[dict[str, float]] = field(default_factory=list)

    @property
    def placement_group_config(self) -> dict[str, Any]:
        """For ``placement_group_config`` of ``ray.data.llm`` and ``ray.serve.llm``."""
        return {"bundles": [dict(bundle) for bundle in self.bundles]}


def engine_settings(
    engine: EngineConfig, *, has_gpu: bool, model: str | Path | None = None
) -> EngineSettings:
    """Turns the engine section of the configuration into vLLM's and Ray's terms.

    Args:
        engine: the settings.
        has_gpu: whether the cluster has a GPU (:func:`mmedpo_ray.compat.cluster.has_gpu`); decides ``device: auto``.
        model: local folder (or cached hub name) of the model, whose ``config.json`` caps ``max_model_len`` and
            says whether it takes images.

    Raises:
        UserError: ``device: gpu`` without a GPU, or tensor parallelism on CPU.
    """
    device = _device(engine, has_gpu)
    on_cpu = device == "cpu"
    model_config = read_model_config(model) if model is not None else None
    limit = max_positions(model_config) if model_config else None
    arguments: dict[str, Any] = {
        "dtype": _dtype(engine, device),
        "max_model_len": min(engine.max_model_len, limit) if limit else engine.max_model_len,
        "max_num_seqs": engine.max_num_seqs,
        "tensor_parallel_size": engine.tensor_parallel_size,
        "enforce_eager": on_cpu if engine.enforce_eager is None else engine.enforce_eager,
        "enable_prefix_caching": True,
        "disable_log_stats": True,
    }
    if model_config is None or "vision_config" in model_config:
        # One question is about one image; a smaller limit also means less memory set aside.
        arguments["limit_mm_per_prompt"] = {"image": 1}
    if on_cpu:
        # A given size also spares the engine a profiling run at start.
        arguments["kv_cache_memory_bytes"] = int(engine.kv_cache_gib * _GIB)
        arguments["skip_mm_profiling"] = True
        arguments["mm_processor_cache_gb"] = 0.5
        # After part of a prompt vLLM 0.32 rewinds the generator of a seeded request, which a generator on CPU cannot:
        # "CPU Generator does not use offset" ends the engine. Whole prompts need no rewinding.
        arguments["enable_chunked_prefill"] = False
        arguments["max_num_batched_tokens"] = max(
            _PREFILL_TOKENS, arguments["max_model_len"], engine.max_num_seqs
        )
    else:
        arguments["gpu_memory_utilization"] = engine.gpu_memory_utilization
    arguments.update(engine.extra)
    workers = engine.tensor_parallel_size
    bundle: dict[str, float] = {"CPU": 1.0} if on_cpu else {"CPU": 1.0, "GPU": 1.0}
    return EngineSettings(
        device=device,
        engine_kwargs=arguments,
        env=_environment(device),
        num_cpus=float(workers),
        num_gpus=0.0 if on_cpu else float(workers),
        bundles=[dict(bundle) for _ in range(workers)],
    )


def start_engine(model: str, arguments: dict[str, Any]) -> Any:
    """A ``vllm.LLM``.

    Raises:
        UserError: vLLM does not load the model.
    """
    import vllm

    try:
        return vllm.LLM(model=model, **arguments)
    except Exception as error:
        lines = str(error).strip().splitlines() or [""]
        raise UserError(
            f"vLLM does not load the model {model} ({type(error).__name__}: {lines[-1][:300]}). Check its files and "
            "model.engine (memory, max_model_len, dtype); Ray's logs (worker-*.err) say more."
        ) from error


def read_model_config(model: str | Path) -> dict[str, Any] | None:
    """The model's ``config.json``; ``None`` where ``model`` is a hub name that is not in the local cache.

    Raises:
        UserError: the folder exists but holds no readable ``config.json``.
    """
    folder = Path(model).expanduser()
    if folder.is_dir():
        path = folder / "config.json"
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise UserError(
                f"{folder} is no model: it has no config.json. Give the folder that save_pretrained wrote."
            ) from error
        except json.JSONDecodeError as error:
            raise UserError(
                f"{path} is not valid JSON ({error}). The model is damaged; export it again."
            ) from error
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        cached = try_to_load_from_cache(str(model), "config.json")
    except HFValidationError as error:
        raise UserError(
            f"there is no model {model}: neither a folder here nor a hub name (owner/model)."
        ) from error
    return json.loads(Path(cached).read_text(encoding="utf-8")) if isinstance(cached, str) else None


def max_positions(model_config: dict[str, Any]) -> int | None:
    """Longest sequence of the language model in tokens; ``None`` where the configuration does not say."""
    text = model_config.get("text_config") or model_config
    value = text.get("max_position_embeddings")
    return int(value) if value else None


def _device(engine: EngineConfig, has_gpu: bool) -> Device:
    device: Device = ("gpu" if has_gpu else "cpu") if engine.device == "auto" else engine.device
    if device == "gpu" and not has_gpu:
        raise UserError(
            "the engine's device is gpu, but the Ray cluster has no GPU. Set device to auto or cpu, or join a cluster "
            "with GPUs (ray.address)."
        )
    if device == "cpu" and engine.tensor_parallel_size > 1:
        raise UserError(
            f"tensor_parallel_size={engine.tensor_parallel_size} needs GPUs; on CPU it must be 1 (use replicas)."
        )
    return device


def _dtype(engine: EngineConfig, device: Device) -> str:
    if engine.dtype != "auto":
        return engine.dtype
    return "float32" if device == "cpu" else "bfloat16"


def _environment(device: Device) -> dict[str, str]:
    environment = dict(_QUIET_ENVIRONMENT)
    environment["VLLM_LOGGING_LEVEL"] = os.environ.get("VLLM_LOGGING_LEVEL", "WARNING")
    environment.update({key: os.environ[key] for key in _PASSED_ON if key in os.environ})
    if device == "cpu":
        # Engines, data tasks and the driver share the cores: binding threads to cores would stack engines on the
        # same ones, and several threads a process would fight. Half the cores suit one engine on its own.
        environment["VLLM_CPU_OMP_THREADS_BIND"] = os.environ.get("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        environment["OMP_NUM_THREADS"] = os.environ.get(
            "OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 2) // 2))
        )
    return environment
