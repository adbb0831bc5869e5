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
    models: list[Path],
    prompts: list[tuple[Image.Image, str]],
    *,
    adapter: Path | None = None,
    **sampling: Any,
) -> list[list[dict[str, Any]]]:
    """For each model and prompt the token ids of ``prompt`` and ``answer``.

    With ``logprobs=N`` also ``first``: the N likeliest first tokens with their log-probabilities.

    Args:
        models: folders; one engine after the other.
        prompts: images and questions about them.
        adapter: answers under this LoRA adapter of the (last) model follow as one more entry.
        **sampling: of ``vllm.SamplingParams``, such as ``max_tokens``.
    """
    work = {
        "models": list(map(str, models)),
        "adapter": str(adapter) if adapter is not None else None,
        "prompts": [(_data_url(image), question) for image, question in prompts],
        "sampling": {"temperature": 0} | sampling,
    }
    done = subprocess.run(
        [sys.executable, __file__], input=json.dumps(work), capture_output=True, text=True, timeout=380
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("TOKENS ")]
    assert lines, done.stderr[-3000:]
    return json.loads(lines[0].removeprefix("TOKENS "))


def _tokens(output: Any) -> dict[str, Any]:
    answer = output.outputs[0]
    found = {"prompt": list(output.prompt_token_ids or []), "answer": list(answer.token_ids)}
    if answer.logprobs:
        found["first"] = {token: value.logprob for token, value in answer.logprobs[0].items()}
    return found


def _data_url(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def main(
    models: list[str], prompts: list[tuple[str, str]], sampling: dict[str, Any], adapter: str | None
) -> None:
    from mmedpo_ray.compat import vllm_preload
    from mmedpo_ray.models.settings import EngineConfig
    from mmedpo_ray.models.vllm_engine import engine_settings

    settings = engine_settings(EngineConfig(kv_cache_gib=0.25), has_gpu=False, model=models[0])
    os.environ.update(settings.env)
    vllm_preload.start()
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    if adapter is not None:
        settings.engine_kwargs.update(enable_lora=True, max_loras=1, max_lora_rank=8)
    if "logprobs" in sampling:
        settings.engine_kwargs["max_logprobs"] = sampling["logprobs"]

    chats: Any = []
    for url, question in prompts:
        content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": question}]
        chats.append([{"role": "user", "content": content}])
    found = []
    for model in models:
        engine = LLM(model, **settings.engine_kwargs)
        requests: list[Any] = [None]
        if adapter is not None and model == models[-1]:
            requests.append(LoRARequest("adapter", 1, adapter))
        for request in requests:
            outputs = engine.chat(chats, SamplingParams(**sampling), use_tqdm=False, lora_request=request)
            found.append([_tokens(output) for output in outputs])
        del engine
    print("TOKENS", json.dumps(found))


if __name__ == "__main__":
    main(**json.load(sys.stdin))
