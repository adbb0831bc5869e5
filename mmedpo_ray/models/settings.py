"""Settings of the model and of its vLLM engine."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from mmedpo_ray.config.base import Section, Share


class EngineConfig(Section):
    """vLLM, for sampling, judging and serving. CPU or GPU is detected unless set."""

    device: Literal["auto", "cpu", "gpu"] = "auto"
    dtype: str = Field("auto", description="auto: float32 on CPU, bfloat16 on GPU")
    max_model_len: int = Field(
        4096, ge=64, description="longest prompt + answer in tokens, image tokens included"
    )
    max_num_seqs: int = Field(64, ge=1, description="sequences decoded together")
    tensor_parallel_size: int = Field(1, ge=1)
    kv_cache_gib: float = Field(1.0, gt=0, description="CPU only: memory for the KV cache")
    gpu_memory_utilization: Share = 0.9
    enforce_eager: bool | None = Field(None, description="null: true on CPU, false on GPU")
    replicas: int = Field(1, ge=1, description="engines in parallel when mapping over a table")
    batch_rows: int = Field(
        64, ge=1, description="rows handed to an engine at a time (judges: at least 8 × max_num_seqs)"
    )
    extra: dict[str, Any] = Field(default_factory=dict, description="further vLLM engine arguments")


class ModelConfig(Section):
    """The model to align, which is also the reference and the target of sampling."""

    path: str = Field("phantom", description="'phantom' (embedded), a local folder, or a hub name")
    name: str = Field("base", description="name under which the unaligned model is served")
    engine: EngineConfig = EngineConfig()
