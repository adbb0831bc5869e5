"""A converted LLaVA-Med answers in vLLM as in transformers and as the original's own forward pass."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_llava_med import NUM_PATCHES, Original, build_tiny_llava_med, original_pixels

from mmedpo_ray.convert.checkpoint import convert
from mmedpo_ray.models.loading import PromptWriter, load_model, load_processor

QUESTIONS = ["Is there a nodule in the left lung?", "What is shown in the image?"]
NUM_TOKENS = 8

VLLM_SCRIPT = """
if __name__ == "__main__":
    import base64, io, json, os, sys
    model, questions, folders = sys.argv[1], json.loads(sys.argv[2]), sys.argv[3:]
    from mmedpo_ray.models.settings import EngineConfig
    from mmedpo_ray.compat import vllm_preload as engine_preload
    from mmedpo_ray.models.vllm_engine import engine_settings
    settings = engine_settings(EngineConfig(kv_cache_gib=0.25), has_gpu=False, model=model)
    os.environ.update(settings.env)
    engine_preload.start()
    sys.path[:0] = folders
    from test_convert_engine import NUM_TOKENS, image
    from vllm import LLM, SamplingParams
    buffer = io.BytesIO()
    image().save(buffer, "PNG")
    url = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
    picture = {"type": "image_url", "image_url": {"url": url}}
    contents = [[picture, {"type": "text", "text": question}] for question in questions]
    chats = [[{"role": "user", "content": content}] for content in contents]
    engine = LLM(model, **settings.engine_kwargs)
    sampling = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True)
    outputs = engine.chat(chats, sampling, use_tqdm=False)
    found = [[list(output.prompt_token_ids), list(output.outputs[0].token_ids)] for output in outputs]
    print("TOKENS", json.dumps(found))
"""


def image() -> Image.Image:
    """Wider than high, so that it has to be padded."""
    return Image.fromarray(np.random.default_rng(3).integers(0, 255, (30, 50, 3), dtype=np.uint8))


def original_tokens(original: Original, question: str) -> list[int]:
    """Greedy decoding with the original's forward pass."""
    ids = original.prompt_ids(question)
    answer: list[int] = []
    for _ in range(NUM_TOKENS):
        answer.append(int(original.logits(ids + answer, original_pixels(image()))[-1].argmax()))
    return answer


def transformers_tokens(folder: Path, question: str) -> list[int]:
    model = load_model(str(folder), torch.float32)
    writer = PromptWriter(load_processor(str(folder)))
    ids = torch.tensor([writer.prompt(question)])
    assert model.generation_config is not None
    model.generation_config.eos_token_id = None
    output = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        pixel_values=writer.pixels([image()]),
        max_new_tokens=NUM_TOKENS,
        do_sample=False,
    )
    return output[0, ids.shape[1] :].tolist()


@pytest.mark.engine
@pytest.mark.slow
def test_the_same_greedy_tokens_in_vllm_transformers_and_the_original(tmp_path: Path) -> None:
    """In a process of its own: an engine in this one would outlive the test."""
    original = build_tiny_llava_med(tmp_path / "original")
    # Several shards, as the real one has.
    model = convert(original.folder, tmp_path / "converted", max_shard_bytes=200_000).out
    expected = [original_tokens(original, question) for question in QUESTIONS]
    assert expected[0] != expected[1]
    assert [transformers_tokens(model, question) for question in QUESTIONS] == expected
    script = tmp_path / "vllm_tokens.py"
    script.write_text(VLLM_SCRIPT)
    folders = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
    done = subprocess.run(
        [sys.executable, str(script), str(model), json.dumps(QUESTIONS), *folders],
        capture_output=True,
        text=True,
        timeout=280,
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("TOKENS ")]
    assert lines, done.stderr[-3000:]
    found = json.loads(lines[0].removeprefix("TOKENS "))
    assert [answer for _, answer in found] == expected
    image_id = original.pieces.piece_to_id("<0xFF>")
    for (prompt, _), question in zip(found, QUESTIONS, strict=True):
        widened: list[int] = []
        for token in original.prompt_ids(question):
            widened += [image_id] * NUM_PATCHES if token == -1 else [token]
        assert prompt == widened
