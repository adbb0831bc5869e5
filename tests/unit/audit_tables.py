"""Tables of pairs and samples for tests of the audit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from PIL import Image

from mmedpo_ray.audit.stage import audit_command
from mmedpo_ray.config.load import load
from mmedpo_ray.tables import schemas


def pair(number: int, **changes: Any) -> dict[str, Any]:
    """A text pair without any fault; its sides have one form, and each is the longer one in turn."""
    fillers = (("Small nodule", "Large nodule on the left"), ("Small nodule on the left", "Large nodule"))
    chosen, rejected = fillers[number % 2]
    return {
        "pair_id": f"p{number}",
        "sample_id": f"s{number}",
        "image_id": f"i{number}",
        "dataset": "made",
        "task": "vqa",
        "answer_type": "open",
        "kind": "text",
        "image_uri": f"/images/{number}.png",
        "rejected_image_uri": f"/images/{number}.png",
        "question": "What is seen?" if number % 3 else "Where is it?",
        "chosen": f"{chosen} {number}",
        "rejected": f"{rejected} {number}",
        "generator": "rewrite",
        "score": 0.5,
        # Unrelated to the question (period 3) and to the answers (period 2).
        "weight": 0.8 + 0.1 * ((number * 7) % 5),
        "consensus": True,
        "rounds": 1,
        "history": [],
    } | changes


def visual(number: int, **changes: Any) -> dict[str, Any]:
    answer = f"Small nodule {number}"
    noise = json.dumps({"mode": "diffusion", "mask_share": 0.1})
    defaults = {
        "pair_id": f"v{number}",
        "kind": "visual",
        "image_uri": f"/images/v{number}.png",
        "rejected_image_uri": f"/noised/v{number}.png",
        "question": "What is seen in the noise?",
        "chosen": answer,
        "rejected": answer,
        "noise": noise,
    }
    return pair(number, **(defaults | changes))


def write(folder: Path, rows: list[dict[str, Any]], files: int = 1) -> str:
    """A scored table, over several files."""
    folder.mkdir(parents=True, exist_ok=True)
    for index, part in enumerate(np.array_split(np.arange(len(rows)), files)):
        table = schemas.to_table([rows[i] for i in part], schemas.SCORED)
        pq.write_table(table, folder / f"part-{index}.parquet", row_group_size=7)
    return str(folder)


def samples(folder: Path, rows: list[dict[str, Any]]) -> str:
    defaults = {
        "dataset": "made",
        "task": "vqa",
        "answer_type": "open",
        "question": "What is seen?",
        "split": "train",
    }
    complete = [
        {
            "image_id": f"i-{r['sample_id']}",
            "image_uri": f"/images/{r['sample_id']}.png",
            "image_sha256": r["sample_id"],
        }
        | defaults
        | r
        for r in rows
    ]
    folder.mkdir(parents=True)
    pq.write_table(schemas.to_table(complete, schemas.SAMPLES), folder / "part-0.parquet")
    return str(folder)


def run(tmp_path: Path, table: str, known: str | None = None, **options: Any) -> dict[str, Any]:
    out = str(tmp_path / "found.json")
    config = load(
        None, [f"run.folder={tmp_path}", *(f"audit.{key}={value}" for key, value in options.items())]
    )
    assert audit_command(config, table, known, out, None) in (0, 1)
    return json.loads(Path(out).read_text())


def found(result: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {item["check"]: item for item in result["findings"]}


def leak(row: dict[str, Any]) -> dict[str, Any]:
    return row | {"chosen": f"Question: {row['question']}\n-Original Answer: No\n{row['chosen']}"}


def write_images(folder: Path, name: str, region: tuple[slice, slice] | None) -> tuple[str, str]:
    """An image and a copy with other pixels in a region."""
    folder.mkdir(exist_ok=True)
    pixels = np.random.default_rng(0).integers(60, 190, (40, 40)).astype(np.uint8)
    noised = pixels.copy()
    if region is not None:
        noised[region] = 255 - noised[region] // 2
    paths = []
    for suffix, values in (("", pixels), ("_noised", noised)):
        paths.append(str(folder / f"{name}{suffix}.png"))
        Image.fromarray(values).save(paths[-1])
    return paths[0], paths[1]


def released(number: int, image: str, question: str, chosen: str, rejected: str) -> dict[str, Any]:
    def turns(answer: str) -> list[dict[str, str]]:
        return [{"from": "human", "value": f"<image>\n{question}"}, {"from": "gpt", "value": answer}]

    row = {"id": number, "image": image, "conversations": turns(chosen)}
    return row | {"rejected_conversations": turns(rejected), "weighted_score": 0.5}
