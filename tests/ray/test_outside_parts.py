"""The examples of CONTRIBUTING.md as another package: one part of each kind."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

MMEDPO = str(Path(sys.executable).parent / "mmedpo")
RUN = """
import sys
from mmedpo_ray.config.load import load
from mmedpo_ray.pipeline import run_stage
from mmedpo_ray.stages.registry import stages

settings = sys.argv[1:]
for name in ("ingest", "curate", "score", "tally", "audit", "align"):
    assert name in stages()
    run_stage(stages()[name], load(None, settings))
"""


@pytest.fixture
def package(repository: Path, tmp_path: Path) -> Path:
    """A folder with the package `my_parts` and the metadata of an installed distribution."""
    page = (repository / "CONTRIBUTING.md").read_text()
    files = re.findall(r"```python\n# (my_\w+\.py)\n(.*?)```", page, re.DOTALL)
    assert len(files) == 7
    folder = tmp_path / "site"
    (folder / "my_parts").mkdir(parents=True)
    (folder / "my_parts" / "__init__.py").touch()
    for name, code in files:
        (folder / "my_parts" / name).write_text(code)
    [toml] = re.findall(r"```toml\n(.*?)```", page, re.DOTALL)
    groups = re.sub(r'\[project\.entry-points\."(.*?)"\]', r"[\1]", toml)
    metadata = folder / "my_parts-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: my-parts\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text(groups.replace('"', ""))
    return folder


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Twelve images with a question each, in the layout of the format of the page."""
    root = tmp_path / "data"
    (root / "images").mkdir(parents=True)
    rows = []
    for number in range(12):
        pixels = np.random.default_rng(number).integers(0, 255, (64, 64), dtype=np.uint8)
        Image.fromarray(pixels).save(root / "images" / f"{number}.png")
        answer = "No pleural effusion." if number % 2 else "There is a large left pleural effusion."
        rows.append({"id": str(number), "image": f"{number}.png", "q": "Is there an effusion?", "a": answer})
    (root / "cases.json").write_text(json.dumps(rows))
    return root


@pytest.mark.engine
@pytest.mark.timeout(400)
def test_parts_of_another_package_work_in_every_stage(package: Path, data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    environment["PYTHONPATH"] = os.pathsep.join([str(package), *sys.path])
    settings = [
        "data.format=cases",
        f"data.root={data}",
        f"run.folder={run}",
        "curate.text.method=rule_edit",
        "curate.visual.tool=centre",
        "score.agents=[{kind: length}]",
        "align.loss=squared",
        "align.max_steps=1",
        "align.num_workers=1",
        "control.enabled=false",
    ]
    done = subprocess.run(
        [sys.executable, "-c", RUN, *settings], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]

    assert set(json.loads((run / "tally.json").read_text())) == {"text", "visual"}
    audit = json.loads((run / "audit.json").read_text())
    assert "long_answers" in json.dumps(audit)
    assert (run / "align" / "metrics.jsonl").read_text().count("\n") == 1

    listed = subprocess.run([MMEDPO, "--help"], env=environment, capture_output=True, text=True, check=True)
    assert "tally" in listed.stdout
    answers = tmp_path / "answers.jsonl"
    answers.write_text(
        json.dumps(
            {"answer_type": "open", "question": "Where?", "reference": "left", "prediction": "on the left"}
        )
    )
    found = tmp_path / "scores.json"
    command = [MMEDPO, "evaluate", "--answers", str(answers), "--json", str(found)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    [scores] = json.loads(found.read_text())["models"].values()
    assert scores["open_words"]["value"] == 3
