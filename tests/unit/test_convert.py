"""Converting an original LLaVA-Med 1.5 checkpoint gives the same tokens, pixels and logits."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import sentencepiece
import torch
from convert_world import QUESTION, copied, fails, logits, picture
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file
from tiny_llava_med import (
    NUM_PATCHES,
    Original,
    build_tiny_llava_med,
    original_pixels,
    save_tokenizer_settings,
)
from transformers import CLIPVisionConfig, LlavaConfig, MistralConfig

from mmedpo_ray.convert.checkpoint import convert, convert_command
from mmedpo_ray.convert.llava_med_processor import make_processor
from mmedpo_ray.convert.weight_names import converted_name
from mmedpo_ray.convert.weights import list_tensors
from mmedpo_ray.models.architectures.llava import saved_parameter
from mmedpo_ray.models.loading import load_model, load_processor, resolve_model
from mmedpo_ray.models.prompts import PromptWriter


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Original:
    return build_tiny_llava_med(tmp_path_factory.mktemp("convert") / "original")


@pytest.fixture(scope="module")
def converted(original: Original) -> Path:
    return convert(original.folder, original.folder.parent / "converted").out


@pytest.fixture(scope="module")
def writer(converted: Path) -> PromptWriter:
    return PromptWriter(load_processor(str(converted)))


def original_logits(original: Original, writer: PromptWriter, image: Image.Image) -> torch.Tensor:
    return original.logits(original.prompt_ids(QUESTION), writer.pixels([image])["pixel_values"])


@pytest.mark.parametrize(
    ("file_format", "shards"), [("safetensors", 3), ("bin", 2), ("safetensors", 1), ("bin", 1)]
)
def test_logits_are_those_of_the_original(tmp_path: Path, file_format: str, shards: int) -> None:
    original = build_tiny_llava_med(tmp_path / "original", file_format=file_format, shards=shards)
    out = convert(original.folder, tmp_path / "converted").out
    found = logits(out, picture(40, 25))
    expected = original_logits(original, PromptWriter(load_processor(str(out))), picture(40, 25))
    # The same vocabulary: nothing added, so the log-probabilities are the original's too.
    assert found.shape == expected.shape
    assert expected.std() > 0.5
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    changed = original_logits(original, PromptWriter(load_processor(str(out))), picture(25, 40))
    assert (found - changed).abs().max() > 0.1


def test_weights_are_the_same_bytes(original: Original, converted: Path) -> None:
    written = load_file(converted / "model.safetensors")
    assert len(written) == len(original.tensors)
    for name, value in original.tensors.items():
        assert torch.equal(written[converted_name(name) or ""], value), name


def test_saved_names_are_those_of_the_hub(converted: Path) -> None:
    names = dict(load_model(str(converted), torch.float32).named_parameters())
    assert {saved_parameter(name) for name in names} == set(load_file(converted / "model.safetensors"))


@given(question=st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=60))
def test_prompts_have_the_ids_of_the_original(
    original: Original, writer: PromptWriter, question: str
) -> None:
    text = question.strip()
    if any(token in text for token in ("<image>", "<s>", "</s>", "<unk>")):
        return
    expected: list[int] = []
    for token in original.prompt_ids(text):
        expected += [writer.image_token_id] * NUM_PATCHES if token == -1 else [token]
    assert writer.prompt(question) == expected


def test_an_answer_is_written_as_the_original_does(original: Original, writer: PromptWriter) -> None:
    after_image = original.pieces.encode(f"\n{QUESTION} [/INST] Yes, there is. ")
    response = writer.response(QUESTION, "Yes, there is.")
    assert response is not None
    assert (
        original.prompt_ids(QUESTION)[-3:] + response
        == [*after_image, original.pieces.eos_id()][-3 - len(response) :]
    )


def test_several_turns_and_a_system_message(converted: Path) -> None:
    processor = load_processor(str(converted))
    turn = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": " Is it? "}]}
    chat = [turn, {"role": "assistant", "content": "Yes."}, {"role": "user", "content": "Why?"}]
    text = processor.apply_chat_template(chat, add_generation_prompt=True)
    assert text == "<s>[INST] <image>\nIs it? [/INST] Yes. </s>[INST] Why? [/INST]"
    text = processor.apply_chat_template([{"role": "system", "content": "Be brief."}, turn])
    assert text == "<s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\n<image>\nIs it? [/INST]"


@pytest.mark.parametrize(("width", "height", "mode"), [(40, 25, "RGB"), (25, 41, "RGB"), (50, 30, "L")])
def test_images_are_padded_as_in_the_original(
    writer: PromptWriter, width: int, height: int, mode: str
) -> None:
    image = picture(width, height, mode).convert("RGB")
    torch.testing.assert_close(
        writer.pixels([image])["pixel_values"], original_pixels(image), atol=1e-6, rtol=0
    )


def test_images_are_cropped_where_the_original_did(original: Original, tmp_path: Path) -> None:
    folder = copied(original, tmp_path, image_aspect_ratio="square")
    processor = load_processor(str(convert(folder, tmp_path / "out").out))
    assert processor.image_processor.do_pad is False
    assert PromptWriter(processor).pixels([picture(60, 20)])["pixel_values"].shape == (1, 3, 32, 32)


def test_the_configuration_says_what_the_original_did(original: Original, converted: Path) -> None:
    config = LlavaConfig.from_pretrained(converted)
    text, vision = config.text_config, config.vision_config
    assert isinstance(text, MistralConfig)
    assert isinstance(vision, CLIPVisionConfig)
    assert text.rope_parameters["rope_theta"] == 1e6
    assert text.sliding_window is None
    assert (text.num_key_value_heads, text.vocab_size) == (1, original.pieces.vocab_size())
    assert (config.vision_feature_layer, config.vision_feature_select_strategy) == (-2, "default")
    assert (config.image_seq_length, config.image_token_index) == (
        NUM_PATCHES,
        original.pieces.piece_to_id("<0xFF>"),
    )
    assert (config.bos_token_id, config.eos_token_id, config.dtype) == (1, 2, torch.float32)
    assert resolve_model(str(converted)) == str(converted)


def test_shards_of_the_output_carry_an_index(original: Original, converted: Path, tmp_path: Path) -> None:
    seen = []
    done = convert(
        original.folder,
        tmp_path / "out",
        max_shard_bytes=200_000,
        progress=lambda done, total: seen.append((done, total)),
    )
    files = sorted(file.name for file in done.out.glob("*.safetensors"))
    assert len(files) > 2
    assert seen[-1] == (done.tensors, done.tensors)
    assert [total for total, _ in seen] == sorted({total for total, _ in seen})
    index = json.loads((done.out / "model.safetensors.index.json").read_text())
    assert sorted(set(index["weight_map"].values())) == files
    assert index["metadata"]["total_size"] == done.bytes
    assert all((done.out / name).stat().st_size < 250_000 for name in files)
    torch.testing.assert_close(
        logits(done.out, picture(30, 30)), logits(converted, picture(30, 30)), atol=0, rtol=0
    )


def test_another_precision(original: Original, tmp_path: Path) -> None:
    done = convert(original.folder, tmp_path / "out", dtype="bfloat16")
    assert {tensor.dtype for tensor in list_tensors(done.out)} == {torch.bfloat16}
    assert LlavaConfig.from_pretrained(done.out).dtype == torch.bfloat16
    assert any("higher precision" in note for note in done.notes)


def test_the_real_tokenizer_of_mistral(tmp_path: Path) -> None:
    """Mistral 7B's own vocabulary, which mistral-common carries, gives the known ids of LLaVA-Med."""
    common = pytest.importorskip("mistral_common")
    shutil.copyfile(Path(common.__file__).parent / "data/tokenizer.model.v1", tmp_path / "tokenizer.model")
    save_tokenizer_settings(tmp_path)
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    vision = CLIPVisionConfig(image_size=32, patch_size=8)
    made = make_processor(tmp_path, vision, tower=None, pad=True, vocab_size=32000)
    writer = PromptWriter(made)
    expected = [1, *pieces.encode("[INST] "), *[258] * 16, *pieces.encode(f"\n{QUESTION} [/INST]")]
    assert expected[:5] + expected[21:23] == [1, 733, 16289, 28793, 28705, 28705, 13]
    assert writer.prompt(QUESTION) == expected
    assert writer.response(QUESTION, "No.") == [1770, 28723, 28705, 2]
    # Saved by a version that puts a blank before the first piece only: the same ids all the same.
    content = json.loads(made.tokenizer.backend_tokenizer.to_str())
    content["normalizer"] = None
    content["pre_tokenizer"] = {
        "type": "Metaspace",
        "replacement": "▁",
        "prepend_scheme": "first",
        "split": False,
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    again = make_processor(tmp_path, vision, tower=None, pad=True, vocab_size=32000)
    assert PromptWriter(again).prompt(QUESTION) == expected


def test_an_unknown_precision_is_refused(original: Original, tmp_path: Path) -> None:
    fails(original.folder, tmp_path, "bfloat16, float16, float32", dtype="int4")


def test_the_command_says_what_to_know_and_what_comes_next(
    original: Original, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out[1]"
    convert_command(original.folder, out, vision_tower=None, dtype=None)
    said = capsys.readouterr().err
    assert "--vision-tower" in said
    assert f"model.path={out}" in said
    assert (out / "config.json").is_file()
