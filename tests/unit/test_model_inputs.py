"""From scored rows to the inputs of a model: pairs, images, and log-probabilities that equal its own."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from align_world import write_scored
from pairs_in_memory import prepare_pairs
from PIL import Image
from tiny_llava import build_tiny_llava

from mmedpo_ray.align.data.batch import ImageLoader, pack_pairs, read_ahead
from mmedpo_ray.align.packing.logps import response_logps
from mmedpo_ray.align.packing.trees import TokenSequence, pack
from mmedpo_ray.errors import UserError
from mmedpo_ray.models.loading import load_model, load_processor
from mmedpo_ray.models.prompts import PromptWriter
from mmedpo_ray.tables import schemas


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_llava(tmp_path_factory.mktemp("model") / "llava")


@pytest.fixture(scope="module")
def writer(model_folder: Path) -> PromptWriter:
    return PromptWriter(load_processor(str(model_folder)))


def test_logps_equal_the_model_s_own_on_every_row(
    model_folder: Path, writer: PromptWriter, tmp_path: Path
) -> None:
    """Padded together with per-response images = each response alone through transformers' forward."""
    rows = write_scored(tmp_path, num_images=2)
    pairs, _ = prepare_pairs(
        schemas.to_table(rows, schemas.SCORED), writer, max_length=256, visual_coefficient=1.0
    )
    model = load_model(str(model_folder), torch.float32)
    batch = pack_pairs(pairs, ImageLoader(writer), writer.pad_token_id, both_sides=True)
    assert batch.images["pixel_values"].shape[0] == 4, "two images and their two noised ones, each once"
    found = response_logps(model, batch)
    images = ImageLoader(writer)
    sides = [(pair.prompt, pair.chosen, pair.image_uri) for pair in pairs]
    sides += [(pair.prompt, pair.rejected, pair.rejected_image_uri) for pair in pairs]
    for row, (prompt, response, uri) in enumerate(sides):
        ids = torch.tensor([prompt + response])
        with torch.no_grad():
            logits = model(input_ids=ids, **images([uri])).logits[0]
        logps = torch.log_softmax(logits[len(prompt) - 1 : -1].double(), -1)
        expected = logps.gather(1, torch.tensor(response)[:, None]).sum()
        assert found.logps[row].item() == pytest.approx(expected.item(), rel=1e-4)
        assert found.num_tokens[row] == len(response)
    visual = next(index for index, pair in enumerate(pairs) if pair.is_visual)
    assert found.logps[visual] != found.logps[visual + len(pairs)], "the noised image must matter"


def test_rows_that_cannot_be_trained_on_are_dropped_with_the_reason(
    writer: PromptWriter, tmp_path: Path
) -> None:
    rows = write_scored(
        tmp_path,
        num_images=2,
        **{
            "s000-0:text": {"weight": 0.0},
            "s000-1:text": {"rejected": "In the left lower zone. "},
            "s000-2:text": {"question": "Describe " + "the lungs " * 40},
            "s001-0:text": {"chosen": "No. <image>"},
        },
    )
    scored = schemas.to_table(rows, schemas.SCORED)
    pairs, dropped = prepare_pairs(scored, writer, max_length=64, visual_coefficient=0.5)
    assert {row["pair_id"]: row[schemas.DROP_REASON] for row in dropped} == {
        "s000-0:text": "weight_zero",
        "s000-1:text": "equal_sides",
        "s000-2:text": "prompt_too_long",
        "s001-0:text": "image_placeholder_in_text",
    }
    assert len(pairs) + len(dropped) == len(rows)
    weights = {row["pair_id"]: row["weight"] for row in rows}
    for pair in pairs:
        assert pair.weight == pytest.approx(weights[pair.pair_id] * (0.5 if pair.is_visual else 1.0))
    # The visual pair of the second image shares its answer with a text pair; that of the first has lost its
    # own.
    assert {pair.pair_id: pair.counts_nll for pair in pairs if pair.is_visual} == {
        "s000-1:visual": True,
        "s001-1:visual": False,
    }


def test_a_long_answer_is_cut_and_its_prompt_is_not(writer: PromptWriter, tmp_path: Path) -> None:
    rows = write_scored(tmp_path, num_images=1, **{"s000-2:text": {"chosen": "The heart is normal. " * 30}})
    pairs, _ = prepare_pairs(
        schemas.to_table(rows, schemas.SCORED), writer, max_length=128, visual_coefficient=1.0
    )
    cut = next(pair for pair in pairs if pair.pair_id == "s000-2:text")
    assert len(cut.prompt) + len(cut.chosen) == 128
    assert cut.prompt == writer.prompt(rows[-1]["question"])


@pytest.mark.parametrize("ids", [15, 17, 32])
def test_another_number_of_ids_than_features_is_refused(
    model_folder: Path, writer: PromptWriter, ids: int
) -> None:
    model = load_model(str(model_folder), torch.float32)
    prompt = [1] + [writer.image_token_id] * ids + [5, 6]
    batch = pack(
        [TokenSequence(prompt, [7, 8], image) for image in (0, 1)],
        {"pixel_values": torch.zeros(2, 3, 32, 32)},
        0,
    )
    with pytest.raises(UserError, match=rf"{ids} ids .* 16 features"):
        response_logps(model, batch)


@pytest.mark.parametrize("weight", [-0.5, float("nan")])
def test_an_impossible_weight_stops_the_run(writer: PromptWriter, tmp_path: Path, weight: float) -> None:
    rows = write_scored(tmp_path, num_images=1, **{"s000-0:text": {"weight": weight}})
    with pytest.raises(UserError, match="s000-0:text"):
        prepare_pairs(schemas.to_table(rows, schemas.SCORED), writer, max_length=128, visual_coefficient=1.0)


def test_a_missing_image_stops_the_run_by_name(writer: PromptWriter, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"gone\.png"):
        ImageLoader(writer)([str(tmp_path / "gone.png")])


def test_images_read_in_threads_keep_their_order(writer: PromptWriter, tmp_path: Path) -> None:
    uris = [str(tmp_path / f"{number}.png") for number in range(9)]
    for number, uri in enumerate(uris):
        pixels = np.random.default_rng(number).integers(0, 256, (20 + number, 30), np.uint8)
        Image.fromarray(pixels).save(uri)
    asked = [*uris, uris[2], uris[0]]
    ours, theirs = (ImageLoader(writer, threads=number)(asked)["pixel_values"] for number in (3, 1))
    assert torch.equal(ours, theirs)
    with pytest.raises(UserError, match="cannot be read any more"):
        ImageLoader(writer, threads=3)([*uris, str(tmp_path / "gone.png")])


def test_images_are_kept_up_to_a_size(writer: PromptWriter, tmp_path: Path) -> None:
    uris = [str(tmp_path / f"{number}.png") for number in range(3)]
    for number, uri in enumerate(uris):
        Image.new("L", (32, 32), 40 * number).save(uri)
    one = 3 * 32 * 32 * 4
    images = ImageLoader(writer, cached_bytes=2 * one)
    expected = images(uris)["pixel_values"]
    assert expected.shape[0] == 3, "a batch may be larger than what is kept"
    for uri in uris:
        Path(uri).unlink()
    assert torch.equal(images(uris[1:])["pixel_values"], expected[1:])
    with pytest.raises(UserError, match=r"0\.png"):
        images(uris[:1])


def test_one_item_is_read_ahead_and_no_more() -> None:
    read: list[int] = []

    def square(number: int) -> int:
        if number == 3:
            raise ValueError("unreadable")
        read.append(number)
        return number**2

    squares = read_ahead(square, range(3))
    assert next(squares) == 0
    assert read in ([0], [0, 1]), "the next may be read by now, the one after it must not"
    assert list(squares) == [1, 4]
    assert list(read_ahead(square, [])) == []
    failing = read_ahead(square, range(5))
    assert [next(failing) for _ in range(3)] == [0, 1, 4]
    with pytest.raises(ValueError, match="unreadable"):
        next(failing)
