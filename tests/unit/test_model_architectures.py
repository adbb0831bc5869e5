"""Finding a model's architecture: what is known, what is refused, and that nobody else knows a class."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import mmedpo_ray
from mmedpo_ray import cli
from mmedpo_ray.config.tree import Config
from mmedpo_ray.errors import UserError
from mmedpo_ray.io.images import load_rgb, read_size
from mmedpo_ray.models.architectures import ARCHITECTURES, find_architecture
from mmedpo_ray.serve.models import run_models
from mmedpo_ray.tables.run_folder import RunFolder

# What is about LLaVA-Med's checkpoints and the embedded model, which are LLaVAs.
OF_LLAVA = ("convert", "phantom", "models/architectures")


@pytest.mark.parametrize("kind", ["idefics3", "paligemma", "qwen3_5", "mistral", None])
def test_an_unknown_architecture_is_refused_with_all_that_are_known(kind: str | None) -> None:
    with pytest.raises(UserError) as caught:
        find_architecture({"model_type": kind}, "someone/model")
    assert "someone/model" in str(caught.value)
    assert all(known in str(caught.value) for known in ARCHITECTURES)


@pytest.mark.parametrize(
    ("kind", "text", "key"),
    [
        ("gemma3", {"final_logit_softcapping": 30.0}, "final_logit_softcapping"),
        ("gemma3", {"layer_types": ["linear_attention"]}, "linear_attention"),
        ("qwen2_5_vl", {"use_sliding_window": True}, "use_sliding_window"),
        ("qwen3_vl", {"layer_types": ["linear_attention"]}, "linear_attention"),
    ],
)
def test_a_model_that_would_not_be_computed_exactly_is_refused(
    kind: str, text: dict[str, Any], key: str
) -> None:
    with pytest.raises(UserError, match=key):
        find_architecture({"model_type": kind, "text_config": text}, "someone/model")


def test_models_lists_every_architecture(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["models"]) == 0
    shown = capsys.readouterr().out
    assert all(kind in shown for kind in ARCHITECTURES)


def test_nothing_else_knows_a_class_name() -> None:
    root = Path(mmedpo_ray.__file__).parent
    names = re.compile(r"\w+ForConditionalGeneration|LlavaProcessor|LlavaConfig")
    knowing = [
        str(file.relative_to(root))
        for file in root.rglob("*.py")
        if names.search(file.read_text()) and not str(file.relative_to(root)).startswith(OF_LLAVA)
    ]
    assert knowing == []


@pytest.mark.parametrize(("kind", "served"), [("llava_next", "adapter"), ("llava_onevision", "merged")])
def test_the_merged_model_is_served_where_adapters_are_not(tmp_path: Path, kind: str, served: str) -> None:
    base = tmp_path / "base"
    base.mkdir()
    (base / "config.json").write_text(f'{{"model_type": "{kind}"}}')
    config = Config()
    config.model.path, config.run.folder = str(base), str(tmp_path / "run")
    model = RunFolder(config.run.folder).model()
    for name, file in (("adapter", "adapter_config.json"), ("merged", "config.json")):
        (model / name).mkdir(parents=True)
        (model / name / file).write_text("{}")
    assert run_models(config)["aligned"] == model / served


@pytest.mark.parametrize("name", ["plain.png", "plain.jpg", "turned.jpg", "plain.bmp", "deep.tiff"])
def test_the_size_in_a_header_is_that_of_the_decoded_image(tmp_path: Path, name: str) -> None:
    exif = Image.Exif()
    if name == "turned.jpg":
        exif[0x0112] = 6
    buffer = io.BytesIO()
    mode = "I;16" if name.startswith("deep") else "L"
    Image.new(mode, (30, 20)).save(buffer, Path(name).suffix[1:].replace("jpg", "jpeg"), exif=exif)
    (tmp_path / name).write_bytes(buffer.getvalue())
    uri = str(tmp_path / name)
    assert read_size(uri) == load_rgb(uri).size
    assert read_size(uri) == ((20, 30) if name == "turned.jpg" else (30, 20))
