"""Visual pairs of a batch: files that do not depend on the batch, nothing lost, every image decoded once."""

from __future__ import annotations

import errno
import json
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from mmedpo_ray.config.load import load
from mmedpo_ray.config.tree import Config
from mmedpo_ray.curate.tool_registry import TOOLS
from mmedpo_ray.curate.visual import visual_pairs
from mmedpo_ray.curate.visual.stage import _key_settings, make_visual_pairs
from mmedpo_ray.curate.visual.tools.base import Localisation, VisualTool
from mmedpo_ray.curate.visual.visual_pairs import VisualPairs, heat_map_pixels
from mmedpo_ray.io import images, storage
from mmedpo_ray.tables import schemas
from mmedpo_ray.tables.stage_runner import StageRunner, read_manifest


def config(folder: Path, *overrides: str) -> Config:
    return load(None, (f"run.folder={folder}", "curate.visual.tool=dataset_mask", *overrides))


def sample(folder: Path, name: str, question: int = 0, *, lesion: bool = True) -> dict[str, Any]:
    """A sample with its image and mask on disk, made by its name alone."""
    rng = np.random.default_rng(list(name.encode()))
    image, mask = folder / f"{name}.png", folder / f"{name}_mask.png"
    if not image.exists():
        Image.fromarray(rng.integers(0, 256, (40, 30, 3), dtype=np.uint8)).save(image)
        marked = np.zeros((40, 30), bool)
        marked[5:15, 8:20] = lesion
        Image.fromarray(marked).save(mask)
    return {
        "sample_id": f"{name}/{question}",
        "image_id": name,
        "dataset": "made",
        "split": "train",
        "task": "vqa",
        "answer_type": "open",
        "image_uri": str(image),
        "image_sha256": "",
        "question": "what is it?",
        "answer": "a nodule",
        "mask_uri": str(mask),
    }


def made(settings_: Config, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return VisualPairs(settings_)(schemas.to_table(rows, schemas.SAMPLES)).to_pylist()


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (folder / "noised").glob("*/*.png")}


def test_the_same_files_from_any_order_and_batch(tmp_path: Path) -> None:
    rows = [sample(tmp_path, name, question) for name in "abcde" for question in range(3)]
    whole = made(config(tmp_path / "1"), rows)
    mixed = [rows[i] for i in np.random.default_rng(0).permutation(len(rows))]
    split = config(tmp_path / "2", "curate.visual.batch_images=2")
    parts = made(split, mixed[:4]) + made(split, mixed[4:])
    assert files(tmp_path / "1") == files(tmp_path / "2")
    assert len(files(tmp_path / "1")) == 2 * len(rows)
    by_id = {pair["pair_id"]: pair for pair in parts}
    for pair in whole:
        other = by_id[pair["pair_id"]]
        assert (pair["noise"], pair["seed"]) == (other["noise"], other["seed"])
    # Three questions about one image get three different noises, another run seed others again.
    assert len({files(tmp_path / "1")[Path(p["rejected_image_uri"]).name] for p in whole}) == len(rows)
    made(config(tmp_path / "3", "run.seed=1"), rows)
    assert not set(files(tmp_path / "3").values()) & {
        data for name, data in files(tmp_path / "1").items() if "heat" not in name
    }


def test_files_are_spread_over_folders(tmp_path: Path) -> None:
    """Of many millions no folder has all; several tasks make the same folders at once."""
    rows = [sample(tmp_path, f"i{number}") for number in range(40)]
    settings_ = config(tmp_path / "run")
    with ThreadPoolExecutor(8) as threads:
        batches = threads.map(
            partial(made, settings_), [rows[start : start + 5] for start in range(0, 40, 5)]
        )
        pairs = [pair for batch in batches for pair in batch]
    noised = tmp_path / "run" / "noised"
    assert all(path.is_dir() for path in noised.iterdir())
    assert len(list(noised.iterdir())) > 20
    assert {str(path) for path in noised.glob("*/*.png")} == {
        pair[key] for pair in pairs for key in ("rejected_image_uri", "heat_map_uri")
    }
    for pair in pairs:
        path = Path(pair["rejected_image_uri"])
        assert path.parent == noised / path.name[:2]
        assert Path(pair["heat_map_uri"]) == path.with_name(f"{path.stem}_heat.png")


def test_every_image_is_decoded_once_a_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    load_image = images.load_image

    def spy(uri: str, *arguments: Any) -> Image.Image:
        read.append(uri)
        return load_image(uri, *arguments)

    monkeypatch.setattr(images, "load_image", spy)
    rows = [sample(tmp_path, name, question) for question in range(5) for name in "abc"]
    made(config(tmp_path / "run", "curate.visual.batch_images=4"), rows)
    decoded = [uri for uri in read if not uri.endswith("_mask.png")]
    assert sorted(decoded) == sorted({row["image_uri"] for row in rows})


def test_what_gives_no_pair_is_dropped_with_its_reason(tmp_path: Path) -> None:
    good, missing, unmarked, maskless, torn, small = (
        sample(tmp_path, name, lesion=name != "c") for name in "abcdef"
    )
    missing["image_uri"] = str(tmp_path / "nowhere.png")
    maskless["mask_uri"] = None
    Path(torn["image_uri"]).write_bytes(Path(torn["image_uri"]).read_bytes()[:60])
    Image.new("1", (5, 5)).save(small["mask_uri"])
    rows = [good, missing, unmarked, maskless, torn, small]
    pairs = made(config(tmp_path / "run"), rows)
    assert {pair["sample_id"]: pair[schemas.DROP_REASON] for pair in pairs} == {
        "a/0": None,
        "b/0": "image_missing",
        "c/0": "tool_found_nothing",
        "d/0": "no_mask",
        "e/0": "image_undecodable",
        "f/0": "mask_size",
    }
    assert len(files(tmp_path / "run")) == 2
    details = " ".join(pair[schemas.DROP_DETAIL] or "" for pair in pairs)
    assert "nodule" not in details
    assert "what is it" not in details


def refuse(monkeypatch: pytest.MonkeyPatch, *names: str, error: OSError) -> None:
    """A store that does not give out the files of these names."""
    whole = storage.read_bytes

    def read_bytes(uri: str, *arguments: Any) -> bytes:
        if Path(uri).name in names:
            raise error
        return whole(uri, *arguments)

    monkeypatch.setattr(storage, "read_bytes", read_bytes)
    monkeypatch.setattr(images, "WAITS", (0.0,))


class Middle(VisualTool):
    """A tool that sees a lesion in the middle and reads no file."""

    def localise(self, images: list[Image.Image], rows: list[dict[str, Any]]) -> list[Localisation]:
        heat_map = np.zeros((40, 30), np.float32)
        heat_map[10:20, 10:20] = 1
        return [Localisation(heat_map, 1.0) for _ in images]


def use_tool(monkeypatch: pytest.MonkeyPatch, tool: type[VisualTool]) -> None:
    """Has `self_attention` be this tool."""
    monkeypatch.setattr(
        visual_pairs, "TOOLS", {"dataset_mask": TOOLS["dataset_mask"], "self_attention": tool}
    )


@pytest.mark.parametrize("tool", ["dataset_mask", "self_attention"])
@pytest.mark.parametrize(
    "error", [PermissionError(errno.EACCES, "denied"), OSError("AWS Error SLOW_DOWN"), TimeoutError()]
)
def test_files_that_a_store_does_not_give_out_drop_their_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tool: str, error: OSError
) -> None:
    use_tool(monkeypatch, Middle)
    rows = [sample(tmp_path, name, question) for name in "abcd" for question in range(2)]
    settings_ = config(tmp_path / "run", f"curate.visual.tool={tool}")
    with monkeypatch.context() as failing:
        refuse(failing, "b.png", "c_mask.png", error=error)
        pairs = made(settings_, rows)
    assert {pair["sample_id"]: pair[schemas.DROP_REASON] for pair in pairs if pair[schemas.DROP_REASON]} == {
        "b/0": "image_unreadable",
        "b/1": "image_unreadable",
        "c/0": "mask_unreadable",
        "c/1": "mask_unreadable",
    }
    details = {pair["sample_id"]: pair[schemas.DROP_DETAIL] for pair in pairs}
    assert details["b/0"] == f"{tmp_path}/b.png: {type(error).__name__}"
    assert details["c/0"] == f"{tmp_path}/c_mask.png: {type(error).__name__}"
    kept = [pair for pair in pairs if pair[schemas.DROP_REASON] is None]
    again = made(settings_, rows[2:6])
    assert sorted(kept + again, key=itemgetter("pair_id")) == sorted(
        made(settings_, rows), key=itemgetter("pair_id")
    )


def test_what_a_tool_covers_is_told_of_lesions_that_the_data_marks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_tool(monkeypatch, Middle)
    rows = [sample(tmp_path, name, lesion=name != "c") for name in "abcd"]
    rows[1]["mask_uri"] = None
    Path(rows[3]["mask_uri"]).write_text("no mask")
    pairs = made(config(tmp_path / "run", "curate.visual.tool=self_attention"), rows)
    covered = [json.loads(pair["noise"]).get("lesion_covered") for pair in pairs]
    # 5 of 10 rows and 10 of 12 columns.
    assert covered == [pytest.approx(50 / 120, rel=1e-5), None, None, None]


def test_a_failure_of_a_tool_with_a_model_is_no_dropped_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Broken(Middle):
        def localise(self, images: list[Image.Image], rows: list[dict[str, Any]]) -> list[Localisation]:
            raise OSError("no space left on device")

    use_tool(monkeypatch, Broken)
    with pytest.raises(OSError, match="no space"):
        made(config(tmp_path / "run", "curate.visual.tool=self_attention"), [sample(tmp_path, "a")])


def test_a_pair_whose_images_are_equal_is_dropped(tmp_path: Path) -> None:
    row = sample(tmp_path, "flat")
    Image.new("RGB", (30, 40), (90, 90, 90)).save(row["image_uri"])
    (pair,) = made(config(tmp_path / "run", "curate.visual.noise.mode=blur"), [row])
    assert pair[schemas.DROP_REASON] == "noise_changed_nothing"
    assert not (tmp_path / "run" / "noised").exists()


@pytest.mark.parametrize("mode", ["diffusion", "additive", "blur", "released"])
def test_parameters_tell_what_was_noised(tmp_path: Path, mode: str) -> None:
    row = sample(tmp_path, "a")
    (pair,) = made(config(tmp_path / "run", f"curate.visual.noise.mode={mode}"), [row])
    noise = json.loads(pair["noise"])
    before, after = (np.asarray(Image.open(pair[key])) for key in ("image_uri", "rejected_image_uri"))
    assert noise["mode"] == mode
    assert noise["changed_share"] == pytest.approx((before != after).any(axis=2).mean(), rel=1e-5)
    assert noise["lesion_covered"] == 1
    if mode == "released":
        assert noise["mask_share"] > 0.5
    else:
        assert noise["mask_share"] == pytest.approx(120 / 1200)
    lesion = np.asarray(Image.open(row["mask_uri"]))
    assert np.array_equal(np.asarray(Image.open(pair["heat_map_uri"])) == 255, lesion)


def test_a_large_heat_map_can_be_stored_smaller() -> None:
    ramp = np.linspace(0, 1, 600 * 900, dtype=np.float32).reshape(600, 900)
    assert np.array_equal(heat_map_pixels(ramp), np.floor(ramp * 255 + 0.5).astype(np.uint8))
    small = heat_map_pixels(ramp, 256)
    assert small.shape == (300, 450)
    spread = np.asarray(Image.fromarray(small).resize((900, 600), Image.Resampling.BILINEAR), np.float32)
    assert np.abs(spread / 255 - ramp).max() < 0.01
    assert heat_map_pixels(ramp[:300], 256).shape == (300, 900)


def test_an_empty_batch_is_an_empty_table(tmp_path: Path) -> None:
    result = VisualPairs(config(tmp_path))(schemas.SAMPLES.empty_table())
    assert isinstance(result, pa.Table)
    assert result.num_rows == 0


@pytest.mark.parametrize(
    ("dropped", "remedy"),
    [
        ({"no_mask": 1200}, "curate.visual.tool=self_attention, medklip"),
        ({"no_mask": 1199, "mask_size": 1}, "visual/dropped has the reason of each"),
        ({"tool_found_nothing": 1200}, "visual/dropped has the reason of each"),
    ],
)
def test_no_visual_pair_at_all_is_warned_of(
    dropped: dict[str, int], remedy: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    asked = config(tmp_path)
    samples = StageRunner("ingest", f"{tmp_path}/samples", asked)
    samples.finish()
    stage = StageRunner(
        "visual", f"{tmp_path}/visual", asked, settings=_key_settings(asked), inputs=[samples.folder]
    )
    stage.finish(rows_in=1200, dropped=dropped)
    make_visual_pairs(asked, lambda: pytest.fail("nothing is to be made"))
    [said] = caplog.messages
    assert "none of the 1,200 visual pairs of curate.visual.tool=dataset_mask could be made" in said
    assert all(f"{reason} {count:,}" in said for reason, count in dropped.items())
    assert remedy in said and "curate.visual.tool=none if that is meant" in said
    caplog.clear()
    stage.finish(rows_in=1200, rows_out=1, dropped={"no_mask": 1199})
    make_visual_pairs(asked, lambda: pytest.fail("nothing is to be made"))
    assert not caplog.messages


def test_no_question_about_a_finding_is_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    asked = config(tmp_path, "curate.visual.questions=finding")
    samples = StageRunner("ingest", f"{tmp_path}/samples", asked)
    samples.finish()
    row = {"question": "What is the plane?", "answer": "Axial", "image_id": "one", "sample_id": "a"}
    make_visual_pairs(asked, lambda: pa.Table.from_pylist([row]))
    [said] = caplog.messages
    assert "curate.visual.questions=finding" in said
    manifest = read_manifest(f"{tmp_path}/visual")
    assert manifest is not None and (manifest.rows_in, manifest.rows_out) == (0, 0)
