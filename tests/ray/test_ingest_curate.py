"""`ingest` and `curate` on a real cluster, with a real vLLM engine: nothing lost, resumed, skipped, clear
errors."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from chat_server import MODEL, Reply, running
from PIL import Image
from tiny_llava import build_tiny_llava

from mmedpo_ray.config.load import load
from mmedpo_ray.config.tree import Config
from mmedpo_ray.curate.samples import train_samples
from mmedpo_ray.curate.settings import VisualCurationConfig
from mmedpo_ray.curate.stage import curate, key_settings
from mmedpo_ray.curate.text.filters import problem
from mmedpo_ray.curate.visual.stage import draw_visual_samples
from mmedpo_ray.errors import DroppedShareError, UserError
from mmedpo_ray.ingest.stage import ingest
from mmedpo_ray.io import storage
from mmedpo_ray.tables import schemas, stage_runner
from mmedpo_ray.tables.run_folder import RunFolder

pytestmark = pytest.mark.engine
IMAGES, TEST_IMAGES = 8, 2


@pytest.fixture(autouse=True)
def _cluster(ray_cluster: None) -> None:
    pass


def phantom_config(folder: Path, *overrides: str) -> Config:
    small = (
        f"data.phantom.images={IMAGES}",
        f"data.phantom.test_images={TEST_IMAGES}",
        "run.max_dropped_share=1.0",
    )
    return load(None, (f"run.folder={folder}", "curate.text.method=rule_edit", *small, *overrides))


@pytest.fixture(scope="module")
def ingested(tmp_path_factory: pytest.TempPathFactory, ray_cluster: None) -> Path:
    folder = tmp_path_factory.mktemp("ingested") / "run"
    manifest = ingest(phantom_config(folder))
    assert manifest.extra["train"]["images"] == IMAGES
    assert manifest.extra["test"]["images"] == TEST_IMAGES
    assert manifest.extra["train"]["with_mask"] == manifest.extra["train"]["questions"]
    return folder


def pairs_of(folder: Path) -> list[dict]:
    return stage_runner.read_table(RunFolder(str(folder)).pairs, schemas.PAIRS, "pairs").to_pylist()


def test_every_question_and_image_gets_its_pair(ingested: Path) -> None:
    config = phantom_config(ingested)
    samples = train_samples(config)
    manifest = curate(config)
    assert manifest.rows_in == samples.num_rows + IMAGES
    assert manifest.rows_in == manifest.rows_out + sum(manifest.dropped.values())
    by_id = {row["sample_id"]: row for row in samples.to_pylist()}
    pairs = pairs_of(ingested)
    for pair in pairs:
        sample = by_id[pair["sample_id"]]
        assert pair["chosen"] == sample["answer"]
        if pair["kind"] == "text":
            assert pair["rejected"] != pair["chosen"]
            assert pair["rejected_image_uri"] == pair["image_uri"]
        else:
            original = np.asarray(Image.open(pair["image_uri"]))
            noised = np.asarray(Image.open(pair["rejected_image_uri"]))
            lesion = np.asarray(Image.open(sample["mask_uri"])) > 0
            assert np.array_equal(original[~lesion], noised[~lesion])
            assert (original != noised)[lesion].mean() > 0.5
            assert np.array_equal(np.asarray(Image.open(pair["heat_map_uri"])) > 0, lesion)
            assert json.loads(pair["noise"])["mask_share"] == pytest.approx(lesion.mean(), abs=1e-5)
    assert curate(config).finished_at == manifest.finished_at, "finished work is skipped"


def test_a_resumed_stage_writes_the_same_table(ingested: Path, tmp_path: Path) -> None:
    config = phantom_config(ingested)
    curate(config)
    whole = pairs_of(ingested)
    pictures = {p["pair_id"]: Path(p["rejected_image_uri"]).read_bytes() for p in whole}
    shutil.rmtree(RunFolder(str(ingested)).pairs)
    # An attempt that died after some rows.
    stage = stage_runner.StageRunner(
        "curate",
        RunFolder(str(ingested)).pairs,
        config,
        settings=key_settings(config),
        inputs=[RunFolder(str(ingested)).samples, RunFolder(str(ingested)).visual],
    )
    stage.done_ids("pair_id")
    stage.write_part(whole[::3], schemas.PAIRS, "pair_id")
    curate(config)
    assert pairs_of(ingested) == whole
    assert {p["pair_id"]: Path(p["rejected_image_uri"]).read_bytes() for p in whole} == pictures


def test_other_text_pairs_leave_the_noised_images_alone(ingested: Path) -> None:
    config = phantom_config(ingested)
    curate(config)
    whole = pairs_of(ingested)
    run = RunFolder(str(ingested))
    made = {path: path.stat().st_mtime_ns for path in Path(run.noised).glob("*/*.png")}
    visual = stage_runner.read_manifest(run.visual)
    assert visual is not None
    assert visual.rows_in == IMAGES
    manifest = curate(phantom_config(ingested, "curate.text.method=none"))
    assert manifest.rows_in == IMAGES == manifest.rows_out + sum(manifest.dropped.values())
    assert pairs_of(ingested) == [pair for pair in whole if pair["kind"] == "visual"]
    curate(phantom_config(ingested, "curate.visual.tool=none"))
    assert pairs_of(ingested) == [pair for pair in whole if pair["kind"] == "text"]
    curate(config)
    assert pairs_of(ingested) == whole
    assert stage_runner.read_manifest(run.visual) == visual
    assert {path: path.stat().st_mtime_ns for path in Path(run.noised).glob("*/*.png")} == made


def test_going_back_after_an_attempt_with_other_settings_makes_the_images_again(ingested: Path) -> None:
    config = phantom_config(ingested)
    curate(config)
    whole = pairs_of(ingested)
    pictures = {p["pair_id"]: Path(p["rejected_image_uri"]).read_bytes() for p in whole}
    # Noise too weak to change a pixel makes no pair.
    other = (
        "curate.visual.noise.mode=additive",
        "curate.visual.noise.std=1e-6",
        "run.max_dropped_share=0",
    )
    with pytest.raises(Exception, match="rows would be dropped"):
        curate(phantom_config(ingested, *other))
    curate(config)
    assert pairs_of(ingested) == whole
    assert {p["pair_id"]: Path(p["rejected_image_uri"]).read_bytes() for p in whole} == pictures


def test_images_of_a_killed_attempt_are_not_deleted(ingested: Path) -> None:
    """A task that outlives its driver may still write there; what it writes is what comes anyway."""
    config = phantom_config(ingested)
    curate(config)
    whole = pairs_of(ingested)
    run = RunFolder(str(ingested))
    for path in [
        *storage.list_files(run.visual, ".parquet"),
        storage.join(run.visual, stage_runner.MANIFEST),
    ]:
        storage.remove(path)
    late = next(Path(pair["heat_map_uri"]) for pair in whole if pair["heat_map_uri"]).with_name("late.png")
    late.write_bytes(b"whole")
    half = late.with_name("late.png.0123.tmp")
    half.write_bytes(b"half")
    curate(config)
    assert late.exists()
    assert not half.exists()
    assert pairs_of(ingested) == whole
    curate(phantom_config(ingested, "curate.visual.noise.steps=400"))
    assert not late.exists()
    assert pairs_of(ingested) != whole


@contextlib.contextmanager
def withheld(*uris: str) -> Iterator[None]:
    """Files that nobody may read meanwhile: the kernel refuses to read this one to root, too."""
    for uri in uris:
        Path(uri).rename(f"{uri}.kept")
        Path(uri).symlink_to("/proc/sys/vm/drop_caches")
    yield
    for uri in uris:
        Path(f"{uri}.kept").replace(uri)


def contents(*folders: str) -> dict[str, list[dict[str, Any]]]:
    """The rows of some tables, kept and dropped."""
    places = [place for folder in folders for place in (folder, storage.join(folder, "dropped"))]
    return {
        place: storage.dataset(place).to_table().to_pylist()
        for place in places
        if storage.list_files(place, ".parquet")
    }


def dropped_of(folder: str) -> dict[str, int]:
    manifest = stage_runner.read_manifest(folder)
    assert manifest is not None
    return manifest.dropped


@pytest.fixture(scope="module")
def with_an_empty_mask(tmp_path_factory: pytest.TempPathFactory, ray_cluster: None) -> Path:
    """An ingested run in which the first image's mask marks nothing."""
    folder = tmp_path_factory.mktemp("withheld") / "run"
    config = phantom_config(folder)
    ingest(config)
    mask = Path(train_samples(config).to_pylist()[0]["mask_uri"])
    Image.new("L", Image.open(mask).size).save(mask)
    return folder


@pytest.mark.parametrize(
    ("images", "masks"),
    [((1, 2), (3,)), ((), (0,)), (tuple(range(IMAGES)), ())],
    ids=["some", "empty", "all"],
)
def test_withheld_files_are_tried_again(
    with_an_empty_mask: Path, images: tuple[int, ...], masks: tuple[int, ...]
) -> None:
    config, run = phantom_config(with_an_empty_mask), RunFolder(str(with_an_empty_mask))
    rows = {row["image_id"]: row for row in train_samples(config).to_pylist()}
    by_image = [rows[name] for name in sorted(rows)]
    curate(config)
    assert dropped_of(run.visual) == {"tool_found_nothing": 1}
    whole, totals = contents(run.visual, run.pairs), dropped_of(run.pairs)
    pictures = {path.name: path.read_bytes() for path in Path(run.noised).glob("*/*.png")}
    for folder in (run.visual, run.pairs, run.noised):
        shutil.rmtree(folder)

    with withheld(*(by_image[i]["image_uri"] for i in images), *(by_image[i]["mask_uri"] for i in masks)):
        curate(config)
        reasons = {"image_unreadable": len(images), "mask_unreadable": len(masks)}
        reasons["tool_found_nothing"] = int(0 not in images + masks)
        failed = {reason: count for reason, count in reasons.items() if count}
        assert dropped_of(run.visual) == failed
        assert dropped_of(run.pairs).items() >= failed.items()
        made = {path: path.stat().st_mtime_ns for path in Path(run.noised).glob("*/*.png")}
        assert len(made) == 2 * (IMAGES - sum(failed.values()))
        curate(config)
        assert dropped_of(run.visual) == failed, "nothing has changed yet"
    curate(config)
    assert contents(run.visual, run.pairs) == whole
    assert dropped_of(run.visual) == {"tool_found_nothing": 1}
    assert dropped_of(run.pairs) == totals
    assert {path.name: path.read_bytes() for path in Path(run.noised).glob("*/*.png")} == pictures
    assert all(path.stat().st_mtime_ns == time for path, time in made.items()), "the others stay"
    finished = stage_runner.read_manifest(run.pairs)
    assert curate(config) == finished


def test_candidates_of_withheld_images_are_sampled_again(ingested: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(RunFolder(str(ingested)).samples, folder / "samples")
    run = RunFolder(str(folder))
    config = phantom_config(
        folder,
        "curate.text.method=on_policy",
        "curate.text.num_candidates=2",
        "curate.text.max_tokens=12",
        "curate.visual.tool=none",
        f"model.path={build_tiny_llava(tmp_path / 'llava')}",
        "model.engine.max_model_len=256",
        "model.engine.kv_cache_gib=0.25",
    )
    samples = train_samples(config).to_pylist()
    image = samples[0]["image_uri"]
    with withheld(image):
        curate(config)
        about = {row["sample_id"] for row in samples if row["image_uri"] == image}
        assert dropped_of(run.candidates) == {"image_unreadable": 2 * len(about)}
        first = contents(run.candidates, run.pairs)
        (row, *_) = first[storage.join(run.candidates, "dropped")]
        assert row["drop_detail"] == f"{image}: PermissionError"
    curate(config)
    again = contents(run.candidates, run.pairs)
    assert dropped_of(run.candidates) == {}
    kept = [row for row in again[run.candidates] if row["sample_id"] not in about]
    assert kept == first[run.candidates], "the others are not sampled again"
    for path in (run.candidates, run.pairs):
        shutil.rmtree(path)
    curate(config)
    assert contents(run.candidates, run.pairs) == again


def test_visual_questions_are_drawn_by_seed(ingested: Path) -> None:
    samples = train_samples(phantom_config(ingested))
    asked = VisualCurationConfig(per_image=2)
    two = draw_visual_samples(samples, asked, seed=0)
    counts = pc.value_counts(two["image_id"]).to_pylist()
    assert {item["counts"] for item in counts} == {2}
    assert len(counts) == IMAGES
    assert (
        two["sample_id"].to_pylist() == draw_visual_samples(samples, asked, seed=0)["sample_id"].to_pylist()
    )
    assert (
        two["sample_id"].to_pylist() != draw_visual_samples(samples, asked, seed=1)["sample_id"].to_pylist()
    )


def test_visual_pairs_of_questions_about_findings_alone() -> None:
    texts = {
        "modality": ("What modality is used to take this image?", "MRI"),
        "finding": ("Is there a pneumothorax?", "No"),
        "any": ("Does this image look normal?", "No"),
        "answer": ("What is seen?", "A small left pleural effusion."),
        "organ": ("Does the picture contain liver?", "Yes"),
    }
    rows = [
        {"sample_id": name, "image_id": "one", "question": question, "answer": answer}
        for name, (question, answer) in texts.items()
    ]
    samples = pa.Table.from_pylist(rows)

    def drawn(**settings: Any) -> set[str]:
        chosen = draw_visual_samples(samples, VisualCurationConfig(per_image=9, **settings), seed=0)
        return set(chosen["sample_id"].to_pylist())

    assert drawn() == set(texts)
    assert drawn(questions="finding") == {"finding", "any", "answer"}
    only_organs = samples.filter(pc.equal(samples["sample_id"], "organ"))
    assert draw_visual_samples(only_organs, VisualCurationConfig(questions="finding"), seed=0).num_rows == 0


def test_answers_sampled_with_vllm(ingested: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(RunFolder(str(ingested)).samples, folder / "samples")
    # One image is lost between the stages: its rows are dropped, the others go on.
    samples = stage_runner.read_table(str(folder / "samples"), schemas.SAMPLES, "samples").to_pylist()
    lost = next(row["image_id"] for row in samples if row["split"] == "train")
    for row in samples:
        if row["image_id"] == lost:
            row["image_uri"] = str(tmp_path / "lost.png")
    for path in storage.list_files(folder / "samples", ".parquet"):
        storage.remove(path)
    storage.write_parquet(folder / "samples" / "part-0.parquet", schemas.to_table(samples, schemas.SAMPLES))
    model = build_tiny_llava(tmp_path / "llava")
    sampling = (
        "curate.text.method=on_policy",
        "curate.text.num_candidates=2",
        "curate.text.temperature=[0.7, 1.2]",
        "curate.text.max_tokens=12",
        f"model.path={model}",
        "model.engine.max_model_len=256",
        "model.engine.kv_cache_gib=0.25",
    )
    visual = ("curate.visual.tool=self_attention", "curate.visual.min_confidence=0")
    manifest = curate(phantom_config(folder, *sampling, *visual))
    questions = sum(row["split"] == "train" for row in samples)
    lost_questions = sum(row["image_id"] == lost for row in samples)
    sampled = stage_runner.read_manifest(RunFolder(str(folder)).candidates)
    assert sampled is not None
    assert sampled.rows_in == 2 * questions
    assert sampled.dropped == {"image_missing": 2 * lost_questions}
    candidates = stage_runner.read_table(
        RunFolder(str(folder)).candidates, schemas.CANDIDATES, "candidates"
    ).to_pylist()
    train = {row["sample_id"]: row for row in samples if row["split"] == "train"}
    assert len({row["seed"] for row in candidates}) == len(candidates)
    assert all(0 < row["num_tokens"] <= 12 for row in candidates)
    assert manifest.rows_in == questions + IMAGES
    assert manifest.dropped["image_missing"] == 1
    assert manifest.extra["kinds"]["visual"] == IMAGES - 1
    filtered = manifest.extra["turned_down"].get("candidates", {})
    assert sum(filtered.values()) == sum(
        problem(train[row["sample_id"]]["answer"], row["candidate"], 4.0, train[row["sample_id"]]["question"])
        is not None
        for row in candidates
    )
    assert not Path(RunFolder(str(folder)).pairs, ".discarded").exists()
    assert {row["temperature"] for row in candidates if row["candidate_id"].endswith("#0")} == {0.7}
    assert {row["temperature"] for row in candidates if row["candidate_id"].endswith("#1")} == {1.2}
    said = {(row["sample_id"], row["candidate"]) for row in candidates}
    for pair in pairs_of(folder):
        if pair["kind"] == "text" and pair["generator"] != "rule_edit":
            assert (pair["sample_id"], pair["rejected"]) in said
            assert pair["generator"] == str(model)
        if pair["kind"] == "visual":
            assert 0 < pair["tool_confidence"] < 1
    check_judge_and_rewrite_behind_an_endpoint(folder, sampling, sampled)


def check_judge_and_rewrite_behind_an_endpoint(
    folder: Path, sampling: tuple[str, ...], sampled: stage_runner.Manifest
) -> None:
    """The candidates that are there, now judged by a model that knows every third question, which then writes
    itself."""
    opposites = {"Yes": "No", "No": "Yes", "left": "right", "right": "left", "Left": "Right", "Right": "Left"}

    def answer(body: dict[str, Any], before: int) -> Reply:
        (line,) = [text for text in body["messages"][0]["content"].splitlines() if text.startswith("{")]
        asked = json.loads(line)
        if "answers" in asked:
            knows = len(asked["reference_answer"]) % 3 == 0
            return Reply(json.dumps({"choice": str(len(asked["answers"])) if knows else "none"}))
        reference = asked["reference_answer"]
        found = re.search(rf"\\b(?:{'|'.join(opposites)})\\b", reference)
        if found is None:
            return Reply("I would rather not.")
        other = opposites[found.group(0)]
        rewritten = reference[: found.start()] + other + reference[found.end() :]
        fields = {"original_span": found.group(0), "new_span": other, "changed": "side"}
        return Reply(json.dumps(fields | {"rewritten": rewritten}))

    run = RunFolder(str(folder))
    with running() as server:
        server.answer = answer
        endpoint = (f"curate.text.endpoint.base_url={server.url}", f"curate.text.endpoint.model={MODEL}")
        behind = ("curate.text.judge=endpoint", "curate.text.fallback=rewrite", "curate.visual.tool=none")
        manifest = curate(phantom_config(folder, *sampling, *endpoint, *behind))
        requests = len(server.requests)
    assert stage_runner.read_manifest(run.candidates) == sampled, "nothing is sampled again"
    train = {row["sample_id"]: row for row in train_samples(phantom_config(folder)).to_pylist()}
    chosen = {row["sample_id"]: row for row in storage.dataset(run.choices).to_table().to_pylist()}
    rewrites = {row["sample_id"]: row for row in storage.dataset(run.rewrites).to_table().to_pylist()}
    unread = storage.dataset(storage.join(run.rewrites, "dropped")).to_table()["sample_id"].to_pylist()
    assert requests == len(chosen) + len(rewrites) + len(unread)
    picked = {name for name, row in chosen.items() if row["candidate_id"] is not None}
    assert picked
    assert set(chosen) - picked
    assert set(train) == picked | set(rewrites) | set(unread), (
        "who has no candidate is rewritten, nobody else"
    )
    assert not picked & (set(rewrites) | set(unread))
    pairs = {pair["sample_id"]: pair for pair in pairs_of(folder)}
    assert set(pairs) == picked | set(rewrites)
    assert manifest.dropped == {"rewrite_unreadable": len(unread)}
    candidates = stage_runner.read_table(run.candidates, schemas.CANDIDATES, "candidates").to_pylist()
    text_of = {row["candidate_id"]: row["candidate"] for row in candidates}
    for name in picked:
        assert pairs[name]["rejected"] == text_of[chosen[name]["candidate_id"]]
    for name, row in rewrites.items():
        assert (pairs[name]["rejected"], pairs[name]["generator"]) == (row["rewritten"], "rewrite")
        assert row["original_span"] in train[name]["answer"]


def test_released_rows_of_real_images(shared_data: Path, tmp_path: Path) -> None:
    config = load(
        None,
        (
            f"run.folder={tmp_path}",
            "data.format=mmedpo_json",
            f"data.root={shared_data / 'vqa_rad_sample'}",
            "data.train_file=rows.json",
            "curate.text.method=released",
            "curate.text.max_length_ratio=40",
            "curate.visual.tool=none",
        ),
    )
    manifest = ingest(config)
    assert (manifest.rows_in, manifest.dropped) == (162, {"leaked_prompt": 3})
    released = stage_runner.read_table(RunFolder(str(tmp_path)).released, schemas.PAIRS, "released")
    assert released.num_rows == 159
    assert pc.min(released["source_score"]).as_py() == 0
    pairs = curate(config)
    train = manifest.extra["train"]["questions"]
    assert pairs.rows_in == train == pairs.rows_out + sum(pairs.dropped.values())
    assert all(row["generator"] == "released" for row in pairs_of(tmp_path))
    assert not any(row["rejected"].startswith(" ") for row in pairs_of(tmp_path))


def test_released_rows_without_their_images(shared_data: Path, tmp_path: Path) -> None:
    config = load(
        None,
        (
            f"run.folder={tmp_path}",
            "data.format=mmedpo_json",
            f"data.root={shared_data / 'released'}",
            "data.train_file=vqa-rad_dpo_weighted.json",
        ),
    )
    with pytest.raises(DroppedShareError, match=r"1,79\d of 1,797 rows would be dropped \(.*image_missing"):
        ingest(config)


def test_curate_without_samples_says_what_to_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="Run the stage"):
        curate(phantom_config(tmp_path))


def test_no_train_row_says_why(ingested: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(RunFolder(str(ingested)).samples, folder / "samples")
    samples = stage_runner.read_table(str(folder / "samples"), schemas.SAMPLES, "samples")
    test_only = samples.filter(pc.equal(samples["split"], "test"))
    for path in storage.list_files(folder / "samples", ".parquet"):
        storage.remove(path)
    storage.write_parquet(folder / "samples" / "part-0.parquet", test_only)
    with pytest.raises(UserError, match=r"data\.test_share"):
        curate(phantom_config(folder))
