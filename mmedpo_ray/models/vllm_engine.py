"""What a vLLM engine needs to run here: arguments, environment and Ray resources, on CPU or GPU.

Sampling, judging and serving all start the same engine from these settings. Nothing here imports vLLM or
CUDA.
"""

from __future__ import annotations

import functools
import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from mmedpo_ray.errors import UserError
from mmedpo_ray.models.architectures import ARCHITECTURES
from mmedpo_ray.models.loading import read_model_config
from mmedpo_ray.models.settings import EngineConfig

log = logging.getLogger(__name__)

Device = Literal["cpu", "gpu"]

_GIB = 1024**3
# Prompt tokens per step on CPU, unless a single prompt may be longer.
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
        bundles: placement-group bundles, one per worker of the engine.
    """

    device: Device
    engine_kwargs: dict[str, Any]
    env: dict[str, str]
    bundles: list[dict[str, float]]

    @property
    def num_cpus(self) -> float:
        """CPUs that an actor holding the engine asks Ray for."""
        return sum(bundle["CPU"] for bundle in self.bundles)

    @property
    def num_gpus(self) -> float:
        """GPUs that it asks for."""
        return sum(bundle.get("GPU", 0.0) for bundle in self.bundles)


def engine_settings(
    engine: EngineConfig, *, has_gpu: bool, model: str | Path | None = None
) -> EngineSettings:
    """Turns the engine section of the configuration into vLLM's and Ray's terms.

    Args:
        engine: the settings.
        has_gpu: whether the cluster has a GPU (:func:`mmedpo_ray.compat.cluster.has_gpu`); decides ``device:
            auto``.
        model: local folder (or cached hub name) of the model, whose ``config.json`` caps ``max_model_len``
            and says whether it takes images.

    Raises:
        UserError: ``device: gpu`` without a GPU, or tensor parallelism on CPU.
    """
    device = _device(engine, has_gpu)
    on_cpu = device == "cpu"
    if on_cpu and model is not None:
        _warn_of_another_model(model)
    auto_dtype = "float32" if on_cpu else "bfloat16"
    model_config = read_model_config(model) if model is not None else None
    text_config = model_config.get("text_config") or model_config if model_config else {}
    limit = text_config.get("max_position_embeddings") or engine.max_model_len
    arguments: dict[str, Any] = {
        "dtype": auto_dtype if engine.dtype == "auto" else engine.dtype,
        "max_model_len": min(engine.max_model_len, int(limit)),
        "max_num_seqs": engine.max_num_seqs,
        "tensor_parallel_size": engine.tensor_parallel_size,
        "enforce_eager": on_cpu if engine.enforce_eager is None else engine.enforce_eager,
        "enable_prefix_caching": True,
        "disable_log_stats": True,
    }
    if model_config is None or "vision_config" in model_config:
        # One question is about one image; a smaller limit also reserves less memory.
        arguments["limit_mm_per_prompt"] = {"image": 1}
    if on_cpu:
        arguments |= {
            # A given size also spares the engine a profiling run at start.
            "kv_cache_memory_bytes": int(engine.kv_cache_gib * _GIB),
            "skip_mm_profiling": True,
            "mm_processor_cache_gb": 0.5,
            # After part of a prompt vLLM 0.32 rewinds the generator of a seeded request, which a CPU
            # generator cannot: "CPU Generator does not use offset" ends the engine. Whole prompts need no
            # rewinding.
            "enable_chunked_prefill": False,
            "max_num_batched_tokens": max(_PREFILL_TOKENS, arguments["max_model_len"], engine.max_num_seqs),
        }
    else:
        arguments["gpu_memory_utilization"] = engine.gpu_memory_utilization
    bundle = {"CPU": 1.0} if on_cpu else {"CPU": 1.0, "GPU": 1.0}
    return EngineSettings(
        device=device,
        engine_kwargs=arguments | engine.extra,
        env=_environment(device),
        bundles=[dict(bundle) for _ in range(engine.tensor_parallel_size)],
    )


@functools.lru_cache
def _warn_of_another_model(model: str | Path) -> None:
    """Says once where answers on CPU would not be the model's own."""
    kind = (read_model_config(model) or {}).get("model_type", "")
    if kind in ARCHITECTURES and not (architecture := ARCHITECTURES[kind]()).exact_on_cpu:
        log.warning(
            "vLLM on CPU does not compute %s as its authors do (%s): answers and scores are those of "
            "another model. Use them to try the pipeline, and a GPU for results",
            architecture.title,
            model,
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
            f"vLLM does not load the model {model} ({type(error).__name__}: {lines[-1][:300]}). Check its "
            "files and model.engine (memory, max_model_len, dtype); Ray's logs (worker-*.err) say more."
        ) from error


def _device(engine: EngineConfig, has_gpu: bool) -> Device:
    device: Device = ("gpu" if has_gpu else "cpu") if engine.device == "auto" else engine.device
    if device == "gpu" and not has_gpu:
        raise UserError(
            "the engine's device is gpu, but the Ray cluster has no GPU. Set device to auto or cpu, or join "
            "a cluster with GPUs (ray.address)."
        )
    if device == "cpu" and engine.tensor_parallel_size > 1:
        raise UserError(
            f"tensor_parallel_size={engine.tensor_parallel_size} needs GPUs; on CPU it must be 1 (use "
            "replicas)."
        )
    return device


def _environment(device: Device) -> dict[str, str]:
    defaults = {"VLLM_LOGGING_LEVEL": "WARNING"}
    if device == "cpu":
        # Engines, data tasks and the driver share the cores: binding threads to cores would put all engines
        # on the same ones, and several threads per process would compete. Half the cores suit one engine on
        # its own.
        defaults["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
        defaults["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 2) // 2))
    passed_on = {key: os.environ[key] for key in (*_PASSED_ON, *defaults) if key in os.environ}
    return _QUIET_ENVIRONMENT | defaults | passed_on
