"""The weights of a checkpoint: names, vision tower, damaged files, and where the result is written."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from convert_world import copied, fails, write_json
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tiny_llava_med import (
    TOWER,
    Original,
    build_tiny_llava_med,
    random_weights,
    save_weights,
)

from mmedpo_ray.convert.checkpoint import convert
from mmedpo_ray.convert.weight_names import converted_name, is_recomputed, original_name
from mmedpo_ray.errors import UserError


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Original:
    return build_tiny_llava_med(tmp_path_factory.mktemp("convert") / "original")


def save_clip(folder: Path, original: Original, *, whole: bool) -> dict[str, torch.Tensor]:
    """Saves another tower, alone or in a whole CLIP; returns its weights by their names there."""
    tensors = random_weights(original.config, original.vision, seed=9)
    tower = {name.removeprefix(TOWER): value for name, value in tensors.items() if name.startswith(TOWER)}
    folder.mkdir()
    extra = (
        {"logit_scale": torch.ones(1), "text_model.final_layer_norm.weight": torch.ones(4)} if whole else {}
    )
    save_weights(folder, tower | extra, "bin" if whole else "safetensors", 1)
    config = original.vision.to_dict()
    content = {"model_type": "clip", "vision_config": config} if whole else config
    (folder / "config.json").write_text(json.dumps(content))
    return tower


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("tower", [False, True])
def test_a_tower_given_by_hand(tmp_path: Path, whole: bool, tower: bool) -> None:
    original = build_tiny_llava_med(tmp_path / "original", tower=tower)
    weights = save_clip(tmp_path / "clip", original, whole=whole)
    done = convert(original.folder, tmp_path / "out", vision_tower=tmp_path / "clip")
    written = load_file(done.out / "model.safetensors")
    for name, value in weights.items():
        assert torch.equal(written[f"vision_tower.{name}"], value)
    assert any("left out" in note for note in done.notes) is tower
    assert json.loads((done.out / "conversion.json").read_text())["tower_from"] == "clip"


def test_a_tower_of_another_shape_or_kind(original: Original, tmp_path: Path) -> None:
    save_clip(tmp_path / "clip", original, whole=False)
    config = tmp_path / "clip/config.json"
    config.write_text(json.dumps(original.vision.to_dict() | {"patch_size": 4}))
    fails(original.folder, tmp_path, r"another shape.*patch_embedding.*64×3×8×8, not 64×3×4×4", tower="clip")
    config.write_text(json.dumps(original.vision.to_dict() | {"patch_size": "large"}))
    fails(original.folder, tmp_path, "cannot be understood.*patch_size", tower="clip")
    config.write_text(json.dumps({"model_type": "siglip_vision_model"}))
    fails(original.folder, tmp_path, "siglip_vision_model", tower="clip")
    fails(original.folder, tmp_path, "no vision tower", tower="nowhere")


def test_a_tower_that_the_original_names_by_its_folder(tmp_path: Path) -> None:
    original = build_tiny_llava_med(tmp_path / "original", tower=False)
    shutil.rmtree(original.folder / "tower")
    weights = save_clip(original.folder / "tower", original, whole=False)
    written = load_file(convert(original.folder, tmp_path / "out").out / "model.safetensors")
    assert all(torch.equal(written[f"vision_tower.{name}"], value) for name, value in weights.items())


def test_without_a_tower_anywhere(tmp_path: Path) -> None:
    original = build_tiny_llava_med(tmp_path / "original", tower=False)
    fails(original.folder, tmp_path, "no weights of the vision tower.*--vision-tower")
    shutil.rmtree(original.folder / "tower")
    fails(original.folder, tmp_path, "names the vision tower tower.*--vision-tower")


_PARTS = st.text(alphabet="abcdefghijklmnopqrstuvwxyz_.0123456789", min_size=1, max_size=30)


_ORIGINAL_PREFIXES = (
    "model.layers.",
    "model.embed_tokens.",
    "model.norm.",
    "lm_head.",
    "model.mm_projector.0.",
    "model.mm_projector.2.",
    f"{TOWER}vision_model.",
)


_NAMES = st.builds(lambda prefix, rest: prefix + rest, st.sampled_from(_ORIGINAL_PREFIXES), _PARTS)


@given(names=st.sets(_NAMES, min_size=1, max_size=30))
def test_names_are_mapped_one_to_one(names: set[str]) -> None:
    converted = {converted_name(name) for name in names}
    assert None not in converted
    assert len(converted) == len(names)
    assert {original_name(name) for name in converted if name} == names


@given(name=_PARTS)
def test_a_name_of_no_known_part_is_not_mapped(name: str) -> None:
    known = name.startswith(_ORIGINAL_PREFIXES)
    assert (converted_name(name) is not None) is known


@settings(max_examples=20)
@given(
    stranger=_PARTS.filter(lambda name: not name.startswith(_ORIGINAL_PREFIXES) and not is_recomputed(name))
)
def test_no_tensor_is_left_out_silently(
    original: Original, tmp_path_factory: pytest.TempPathFactory, stranger: str
) -> None:
    folder = copied(original, tmp_path_factory.mktemp("stranger"), weights=False)
    save_weights(folder, original.tensors | {stranger: torch.ones(1)}, "safetensors", 1)
    with pytest.raises(UserError, match="no place for") as caught:
        convert(folder, folder.parent / "out")
    assert stranger in str(caught.value)


def test_a_tensor_that_has_its_new_name_already(original: Original, tmp_path: Path) -> None:
    folder = copied(original, tmp_path, weights=False)
    twice = {"language_model.model.norm.weight": torch.ones(64)}
    save_weights(folder, original.tensors | twice, "safetensors", 1)
    fails(folder, tmp_path, r"no place for \(language_model.model.norm.weight\)")


def test_tables_that_old_versions_saved_are_recomputed(original: Original, tmp_path: Path) -> None:
    folder = copied(original, tmp_path, weights=False)
    tables = {
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(16),
        f"{TOWER}vision_model.embeddings.position_ids": torch.arange(17)[None],
    }
    save_weights(folder, original.tensors | tables, "safetensors", 2)
    done = convert(folder, tmp_path / "out")
    assert done.tensors == len(original.tensors)
    assert any("2 saved tables" in note for note in done.notes)


@pytest.mark.parametrize(
    "weight_map", [[], {}, {"a": 5}, {"a": "../x.safetensors"}, {"a": "config.json"}, {"a": ""}, {"a": "\0"}]
)
def test_an_index_that_names_no_shards(original: Original, tmp_path: Path, weight_map: object) -> None:
    folder = copied(original, tmp_path)
    write_json(folder / "model.safetensors.index.json", {"weight_map": weight_map})
    fails(folder, tmp_path, r"original/model\.safetensors\.index\.json cannot be understood: weight_map")


def test_a_place_below_a_file(original: Original, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match=r"file/deeper/out.*--out"):
        convert(original.folder, tmp_path / "file/deeper/out")


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), SafetensorError("No space left on device")]
)
def test_folders_made_for_an_output_that_never_came_are_removed(
    original: Original, tmp_path: Path, error: Exception
) -> None:
    def full(done: int, total: int) -> None:
        raise error

    with pytest.raises(UserError, match=r"No space left.*--out"):
        convert(original.folder, tmp_path / "new/deeper/out", progress=full)
    assert not list(tmp_path.iterdir())


def test_missing_files(original: Original, tmp_path: Path) -> None:
    fails(tmp_path / "nowhere", tmp_path, "no folder")
    folder = copied(original, tmp_path)
    for name in ("model-00001-of-00003.safetensors", "model-00003-of-00003.safetensors"):
        (folder / name).unlink()
    fails(folder, tmp_path, r"missing \(model-00001-of-00003.safetensors, model-00003-of-00003.safetensors\)")
    (folder / "model.safetensors.index.json").unlink()
    fails(folder, tmp_path, "no weights")
    (folder / "config.json").unlink()
    fails(folder, tmp_path, "no config.json")


@pytest.mark.parametrize("file_format", ["safetensors", "bin"])
def test_damaged_files(tmp_path: Path, file_format: str) -> None:
    folder = build_tiny_llava_med(tmp_path / "original", file_format=file_format).folder
    shard = sorted(folder.glob(f"*-00002-of-*.{file_format}"))[0]
    whole = shard.read_bytes()
    for content, message in [
        (whole[: len(whole) // 2], "not completely downloaded"),
        (b"", "not completely downloaded"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "git lfs pull"),
    ]:
        shard.write_bytes(content)
        fails(folder, tmp_path, message)


def test_a_torch_file_that_runs_code_or_holds_something_else(tmp_path: Path) -> None:
    folder = build_tiny_llava_med(tmp_path / "original", file_format="bin", shards=1).folder
    torch.save({"model.norm.weight": Path("/")}, folder / "pytorch_model.bin")
    fails(folder, tmp_path, "cannot read")
    torch.save({"state": {"model.norm.weight": torch.ones(2)}}, folder / "pytorch_model.bin")
    fails(folder, tmp_path, "does not hold named tensors")


def test_an_index_that_does_not_fit(original: Original, tmp_path: Path) -> None:
    folder = copied(original, tmp_path)
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    del index["weight_map"]["model.norm.weight"]
    path.write_text(json.dumps(index))
    fails(folder, tmp_path, r"does not fit .*\(model.norm.weight\)")
    path.write_text("{}")
    fails(folder, tmp_path, "index.json has no weight_map")


def test_quantised_weights(original: Original, tmp_path: Path) -> None:
    folder = copied(original, tmp_path, weights=False)
    quantised = {"model.norm.weight": torch.ones(64, dtype=torch.int8)}
    save_file(original.tensors | quantised, folder / "model.safetensors")
    fails(folder, tmp_path, "model.norm.weight .* not floating point")


def test_a_place_that_cannot_be_written_to(original: Original, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/notes.txt").write_text("mine")
    fails(original.folder, tmp_path, "not an empty folder")
    assert (tmp_path / "out/notes.txt").read_text() == "mine"


def test_an_interrupted_conversion_leaves_nothing(original: Original, tmp_path: Path) -> None:
    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(original.folder, tmp_path / "out", max_shard_bytes=200_000, progress=interrupt)
    assert not list(tmp_path.iterdir())


def test_what_a_killed_conversion_left_is_cleared_away(original: Original, tmp_path: Path) -> None:
    left = tmp_path / ".out.unfinished"
    left.mkdir()
    (left / "model-00001-of-00009.safetensors").write_bytes(b"half")
    (tmp_path / "out").mkdir()
    convert(original.folder, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert not (tmp_path / "out/model-00001-of-00009.safetensors").exists()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("file_format", ["safetensors", "bin"])
def test_weights_that_are_no_numbers_are_refused_by_name(
    original: Original, tmp_path: Path, value: float, file_format: str
) -> None:
    folder = tmp_path / "damaged"
    shutil.copytree(original.folder, folder)
    tensors = {name: tensor.clone() for name, tensor in original.tensors.items()}
    name = sorted(tensors)[-1]
    tensors[name].view(-1)[0] = value
    for file in [*folder.glob("*.safetensors*"), *folder.glob("*.bin*")]:
        file.unlink()
    save_weights(folder, tensors, file_format, 1)
    with pytest.raises(UserError) as error:
        convert(folder, tmp_path / "out")
    assert name in str(error.value)
    assert not (tmp_path / "out" / "config.json").exists()
