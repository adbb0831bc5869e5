"""Engine settings for CPU and GPU, and what a user can get wrong about them."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from mmedpo_ray.errors import UserError
from mmedpo_ray.models.loading import read_model_config
from mmedpo_ray.models.settings import EngineConfig
from mmedpo_ray.models.vllm_engine import engine_settings


def model_folder(tmp_path, **config):
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path


def test_cpu_is_found_out():
    settings = engine_settings(EngineConfig(kv_cache_gib=0.5), has_gpu=False)
    assert settings.device == "cpu"
    assert settings.num_gpus == 0
    assert settings.bundles == [{"CPU": 1.0}]
    assert settings.engine_kwargs["dtype"] == "float32"
    assert settings.engine_kwargs["enforce_eager"] is True
    assert settings.engine_kwargs["kv_cache_memory_bytes"] == 2**29
    assert settings.env["VLLM_NO_USAGE_STATS"] == "1"


def test_gpu_is_found_out():
    settings = engine_settings(EngineConfig(tensor_parallel_size=2), has_gpu=True)
    assert settings.device == "gpu"
    assert settings.num_gpus == 2
    assert settings.bundles == [{"CPU": 1.0, "GPU": 1.0}] * 2
    assert settings.engine_kwargs["dtype"] == "bfloat16"
    assert settings.engine_kwargs["enforce_eager"] is False
    assert "kv_cache_memory_bytes" not in settings.engine_kwargs
    assert "OMP_NUM_THREADS" not in settings.env


def test_what_the_user_sets_wins():
    engine = EngineConfig(
        device="cpu", dtype="bfloat16", enforce_eager=False, extra={"max_num_batched_tokens": 512}
    )
    settings = engine_settings(engine, has_gpu=True)
    assert settings.device == "cpu"
    assert settings.engine_kwargs["dtype"] == "bfloat16"
    assert settings.engine_kwargs["enforce_eager"] is False
    assert settings.engine_kwargs["max_num_batched_tokens"] == 512


def test_a_model_that_vllm_computes_otherwise_on_cpu_is_warned_about(tmp_path, caplog):
    """Gemma 3: before the engine starts, on CPU only."""
    folder = model_folder(tmp_path, model_type="gemma3", vision_config={}, text_config={})
    engine_settings(EngineConfig(), has_gpu=True, model=folder)
    assert not caplog.records
    engine_settings(EngineConfig(), has_gpu=False, model=folder)
    (record,) = caplog.records
    assert record.levelname == "WARNING" and "Gemma 3" in record.getMessage()


def test_length_is_capped_by_the_model(tmp_path):
    folder = model_folder(tmp_path, vision_config={}, text_config={"max_position_embeddings": 1024})
    assert engine_settings(EngineConfig(), has_gpu=False, model=folder).engine_kwargs["max_model_len"] == 1024
    short = EngineConfig(max_model_len=256)
    assert engine_settings(short, has_gpu=False, model=folder).engine_kwargs["max_model_len"] == 256


def test_a_text_model_gets_no_image_limit(tmp_path):
    folder = model_folder(tmp_path, max_position_embeddings=512)
    settings = engine_settings(EngineConfig(), has_gpu=False, model=folder)
    assert settings.engine_kwargs["max_model_len"] == 512
    assert "limit_mm_per_prompt" not in settings.engine_kwargs


@pytest.mark.parametrize(
    ("engine", "part"),
    [({"device": "gpu"}, "no GPU"), ({"tensor_parallel_size": 2}, "needs GPUs")],
)
def test_what_cannot_run_here_is_refused(engine, part):
    with pytest.raises(UserError, match=part):
        engine_settings(EngineConfig(**engine), has_gpu=False)


def test_a_folder_that_is_no_model_is_named(tmp_path):
    with pytest.raises(UserError, match=r"config\.json"):
        read_model_config(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match="not valid JSON"):
        read_model_config(tmp_path)
    with pytest.raises(UserError, match="no model"):
        read_model_config(tmp_path / "absent")


def test_settings_need_neither_vllm_nor_torch():
    code = (
        "import sys\n"
        "from mmedpo_ray.models.settings import EngineConfig\n"
        "from mmedpo_ray.models.vllm_engine import engine_settings\n"
        "engine_settings(EngineConfig(), has_gpu=False)\n"
        "assert not {'vllm', 'torch'} & set(sys.modules), 'imported'\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
