"""Changes to the internals of dependencies: each works, and is still needed."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from ray._private import worker

from mmedpo_ray.compat import ray_serve_shutdown


@pytest.mark.skipif(torch.version.cuda is not None, reason="with CUDA, torchvision imports by itself")
def test_torchvision_imports_beside_a_cpu_torch_and_images_stay_with_pillow() -> None:
    # -S: without the .pth file that installs it at the start of every interpreter.
    paths = f"import sys; sys.path[:] = {sys.path!r}"
    needed = subprocess.run(
        [sys.executable, "-S", "-c", f"{paths}; import torchvision"], capture_output=True, timeout=120
    )
    assert b"torchvision::nms does not exist" in needed.stderr, "torchvision_on_cpu is no longer needed"
    check = (
        f"{paths}; from mmedpo_ray.compat import torchvision_on_cpu as patch; patch.install()\n"
        "from transformers import Qwen2VLVideoProcessor\n"
        "from mmedpo_ray.models.loading import load_processor\n"
        "Qwen2VLVideoProcessor()\n"
        "assert type(load_processor('phantom').image_processor).__name__ == 'CLIPImageProcessorPil'"
    )
    subprocess.run([sys.executable, "-S", "-c", check], check=True, timeout=120)


def test_only_the_report_of_serves_shutdown_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[str] = []

    def show(data: dict[str, Any], ignore_prefix: bool) -> None:
        assert ignore_prefix is False
        shown.extend(data["lines"])

    monkeypatch.setattr(worker, "print_to_stdstream", show)
    ray_serve_shutdown.install()
    installed = worker.print_to_stdstream
    ray_serve_shutdown.install()
    assert worker.print_to_stdstream is installed
    for line in ("Task ServeController.graceful_shutdown failed.", "Task train failed."):
        worker.print_to_stdstream({"lines": [line]}, ignore_prefix=False)
    assert shown == ["Task train failed."]
