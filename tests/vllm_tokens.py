"""Greedy answers of models in vLLM, in another process: an engine in this one would outlive the test."""

from __future__ import annotations

import base64
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from PIL import Image


def vllm_tokens(
    models: list[Path], prompts: list[tuple[Image.Image, str]], **sampling: Any
) -> list[list[dict[str, list[int]]]]:
    """For each model and prompt the token ids of ``prompt`` and ``answer``.

    Args:
        models: folders; one engine after the other.
        prompts: images and questions about them.
        **sampling: of ``vllm.SamplingParams``, such as ``max_tokens``.
    """
    work = {
        "models": list(map(str, models)),
        "prompts": [(_data_url(image), question) for image, question in prompts],
        "sampling": {"temperature": 0} | sampling,
    }
    done = subprocess.run(
        [sys.executable, __file__], input=json.dumps(work), capture_output=True, text=True, timeout=380
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("TOKENS ")]
    assert lines, done.stderr[-3000:]
    return json.loads(lines[0].removeprefix("TOKENS "))


def _data_url(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def main(models: list[str], prompts: list[tuple[str, str]], sampling: dict[str, Any]) -> None:
    from mmedpo_ray.compat import vllm_preload
    from mmedpo_ray.models.settings import EngineConfig
    from mmedpo_ray.models.vllm_engine import engine_settings

    settings = engine_settings(EngineConfig(kv_cache_gib=0.25), has_gpu=False, model=models[0])
    os.environ.update(settings.env)
    vllm_preload.start()
    from vllm import LLM, SamplingParams

    chats: Any = []
    for url, question in prompts:
        content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": question}]
        chats.append([{"role": "user", "content": content}])
    found = []
    for model in models:
        engine = LLM(model, **settings.engine_kwargs)
        outputs = engine.chat(chats, SamplingParams(**sampling), use_tqdm=False)
        found.append(
            [
                {"prompt": list(output.prompt_token_ids or []), "answer": list(output.outputs[0].token_ids)}
                for output in outputs
            ]
        )
        del engine
    print("TOKENS", json.dumps(found))


if __name__ == "__main__":
    main(**json.load(sys.stdin))
