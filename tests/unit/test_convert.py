"""Converting an original LLaVA-Med 1.5 checkpoint: the same tokens, pixels and logits, or a clear error and no trace."""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tiny_llava_med import (
    NUM_PATCHES,
    TOWER,
    Original,
    build_tiny_llava_med,
    original_pixels,
    random_weights,
    save_tokenizer_settings,
    save_weights,
)
from transformers import CLIPVisionConfig, LlamaTokenizer, LlavaConfig, MistralConfig

from mmedpo_ray.convert.checkpoint import convert, convert_command
from mmedpo_ray.convert.llava_med_processor import make_processor
from mmedpo_ray.convert.weight_names import converted_name, is_recomputed, original_name, saved_name
from mmedpo_ray.convert.weights import list_tensors
from mmedpo_ray.errors import UserError
from mmedpo_ray.models.loading import PromptWriter, load_model, load_processor, resolve_model

QUESTION = "Is there a nodule in the left lung?"


def picture(width: int, height: int, mode: str = "RGB") -> Image.Image:
    values = np.random.default_rng(width).integers(0, 255, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values).convert(mode)


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
    return original.logits(original.prompt_ids(QUESTION), writer.pixels([image]))


def logits(folder: Path, image: Image.Image) -> torch.Tensor:
    model = load_model(str(folder), torch.float32)
    writer = PromptWriter(load_processor(str(folder)))
    ids = torch.tensor([writer.prompt(QUESTION)])
    with torch.inference_mode():
        return model(input_ids=ids, pixel_values=writer.pixels([image])).logits[0]


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


@given(question=st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=60))
@settings(deadline=None)
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
    torch.testing.assert_close(writer.pixels([image]), original_pixels(image), atol=1e-6, rtol=0)


def test_images_are_cropped_where_the_original_did(original: Original, tmp_path: Path) -> None:
    folder = copied(original, tmp_path, image_aspect_ratio="square")
    processor = load_processor(str(convert(folder, tmp_path / "out").out))
    assert processor.image_processor.do_pad is False
    assert PromptWriter(processor).pixels([picture(60, 20)]).shape == (1, 3, 32, 32)


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
    """Mistral 7B's own vocabulary, which mistral-common carries, gives the ids known of LLaVA-Med's prompts."""
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


# The vision tower -----------------------------------------------------------------------------------------------------


def save_clip(folder: Path, original: Original, *, whole: bool) -> dict[str, torch.Tensor]:
    """Another tower than the checkpoint's, alone or in a whole CLIP; returns its weights by their names there."""
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


# The names ------------------------------------------------------------------------------------------------------------

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


@settings(max_examples=20, deadline=None)
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
    fails(folder, tmp_path, r"1 tensor \(language_model.model.norm.weight\)")


def test_saved_names_are_those_of_the_hub(converted: Path) -> None:
    names = dict(load_model(str(converted), torch.float32).named_parameters())
    assert {saved_name(name) for name in names} == set(load_file(converted / "model.safetensors"))


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


# What can be wrong ----------------------------------------------------------------------------------------------------


def copied(original: Original, folder: Path, *, weights: bool = True, **config: object) -> Path:
    """A copy of the checkpoint to damage, with some settings changed."""
    target = folder / "original"
    ignore = None if weights else shutil.ignore_patterns("model*.safetensors*")
    shutil.copytree(original.folder, target, ignore=ignore)
    (target / "config.json").write_text(json.dumps(original.config | config))
    return target


def fails(source: Path, folder: Path, message: str, *, tower: str | None = None, **options: object) -> None:
    """Converting ends with a UserError and leaves nothing behind."""
    before = sorted(folder.iterdir())
    with pytest.raises(UserError, match=message):
        convert(
            source,
            folder / "out",
            vision_tower=folder / tower if tower else None,
            **options,  # type: ignore[arg-type]
        )
    assert sorted(folder.iterdir()) == before


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"model_type": "llava_llama"}, "model_type llava_llama. Only llava_mistral"),
        ({"model_type": None}, "model_type None"),
        ({"model_type": "llava"}, "already"),
        ({"mm_projector_type": "linear"}, "mm_projector_type='linear'"),
        ({"image_aspect_ratio": "anyres"}, "Other variants of LLaVA"),
        ({"mm_use_im_start_end": True}, "mm_use_im_start_end"),
        ({"hidden_size": 128}, r"embed_tokens.weight is 378×64, not 378×128"),
        ({"vocab_size": 400}, "378×64, not 400×64"),
        ({"num_hidden_layers": 1}, r"9 tensors \(model\.layers\.1\..*no place for"),
        ({"num_hidden_layers": 3}, r"incomplete: 9 tensors \(model\.layers\.2\..* and 4 more\) are in none"),
        ({"rms_norm_eps": "small"}, "cannot be understood"),
        ({"mm_vision_tower": "somebody/else"}, "somebody/else, which is no folder"),
    ],
)
def test_another_configuration(original: Original, tmp_path: Path, changed: dict, message: str) -> None:
    fails(copied(original, tmp_path, **changed), tmp_path, message)


def write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("num_attention_heads", 0, "whole number"),
        ("num_attention_heads", 3, "divides hidden_size"),
        ("num_attention_heads", True, "whole number"),
        ("num_key_value_heads", 0, "whole number"),
        ("num_key_value_heads", 4, "divides num_attention_heads"),
        ("num_hidden_layers", -1, "whole number"),
        ("num_hidden_layers", 10**9, "whole number"),
        ("hidden_size", "64", "whole number"),
        ("vocab_size", [378], "whole number"),
        ("hidden_act", "nope", "'silu'"),
        ("hidden_act", ["silu"], "'silu'"),
        ("rms_norm_eps", float("nan"), "number"),
        ("rope_theta", 0, "number"),
        ("rope_scaling", {"type": "nonsense"}, "linear"),
        ("rope_scaling", {"type": "linear"}, "factor"),
        ("rope_scaling", {"type": "linear", "factor": 0}, "factor"),
        ("rope_scaling", "linear", "an object"),
        ("eos_token_id", 400, "vocab_size"),
        ("eos_token_id", [2, "x"], "token"),
        ("pad_token_id", -5, "token"),
        ("tie_word_embeddings", "no", "true or false"),
        ("mm_vision_select_layer", -99, "-4 to 3"),
        ("mm_vision_select_layer", 4, "-4 to 3"),
        ("mm_vision_select_layer", "x", "-4 to 3"),
        ("mm_vision_select_layer", [-2], "-4 to 3"),
        ("mm_vision_tower", 5, "text"),
    ],
)
def test_a_setting_that_cannot_be(
    original: Original, tmp_path: Path, key: str, value: object, expected: str
) -> None:
    """The message names the file, the key, the value and what is expected."""
    folder = copied(original, tmp_path, **{key: value})
    shown = re.escape(repr(value))
    fails(folder, tmp_path, rf"(?s)original/config\.json.*{key}.*{shown}.*{expected}")


@pytest.mark.parametrize("name", ["~nobody-of-this-name/tower", "x" * 5000, "a\0b"])
def test_a_tower_whose_name_can_be_no_folder(original: Original, tmp_path: Path, name: str) -> None:
    folder = copied(original, tmp_path, mm_vision_tower=name)
    fails(folder, tmp_path, rf"config\.json names the vision tower {name[:9]}.*no folder.*mm_vision_tower")


@pytest.mark.parametrize(
    "key",
    [
        *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
        *("num_key_value_heads", "hidden_act", "max_position_embeddings", "rms_norm_eps", "rope_theta"),
        *("mm_vision_select_layer", "mm_projector_type"),
    ],
)
def test_a_setting_that_is_missing(original: Original, tmp_path: Path, key: str) -> None:
    """No default of transformers takes the place of a setting on which the result depends."""
    folder = copied(original, tmp_path)
    write_json(
        folder / "config.json", {name: value for name, value in original.config.items() if name != key}
    )
    fails(folder, tmp_path, rf"original/config\.json has no {key}")


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json", "model.safetensors.index.json"])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[]", "holds a list, not an object"),
        (b"null", "holds null, not an object"),
        (b'"text"', "holds a text, not an object"),
        (b"{", "not valid JSON"),
        (b"", "not valid JSON"),
        (b"\xff\xfe\x00{", "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
    ],
)
def test_a_file_that_is_no_json_object(
    original: Original, tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    folder = copied(original, tmp_path)
    (folder / name).write_bytes(content)
    fails(folder, tmp_path, rf"{re.escape(str(folder / name))}.*{message}")


def test_a_folder_in_place_of_a_file(original: Original, tmp_path: Path) -> None:
    folder = copied(original, tmp_path)
    (folder / "config.json").unlink()
    (folder / "config.json").mkdir()
    fails(folder, tmp_path, "config.json cannot be read")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"num_attention_heads": 0}, "num_attention_heads=0.*whole number"),
        ({"num_attention_heads": 3}, "num_attention_heads=3.*divides hidden_size"),
        ({"patch_size": 0}, "patch_size=0.*whole number"),
        ({"patch_size": [8, 8]}, r"patch_size=\[8, 8\].*whole number"),
        ({"image_size": 33}, "image_size=33.*multiple of patch_size"),
        ({"image_size": 0}, "image_size=0.*whole number"),
        ({"hidden_act": "nope"}, "hidden_act='nope'.*quick_gelu"),
        ({"num_channels": 1}, "num_channels=1.*3"),
        ({"layer_norm_eps": None}, "layer_norm_eps=None.*number"),
    ],
)
def test_a_setting_of_the_tower_that_cannot_be(
    original: Original, tmp_path: Path, changed: dict, message: str
) -> None:
    folder = copied(original, tmp_path)
    write_json(folder / "tower/config.json", original.vision.to_dict() | changed)
    fails(folder, tmp_path, rf"tower/config\.json cannot be understood: {message}")
    write_json(
        folder / "tower/config.json",
        {"model_type": "clip", "vision_config": original.vision.to_dict() | changed},
    )
    fails(folder, tmp_path, rf"tower/config\.json cannot be understood: vision_config.{message}")


@pytest.mark.parametrize(
    "content", [[], {}, {"model_type": "clip"}, {"model_type": "clip", "vision_config": 5}]
)
def test_a_tower_without_a_configuration(original: Original, tmp_path: Path, content: object) -> None:
    folder = copied(original, tmp_path)
    write_json(folder / "tower/config.json", content)
    fails(folder, tmp_path, r"tower/config\.json")


@pytest.mark.parametrize(
    "changed",
    [{"image_mean": [0.5]}, {"image_mean": "grey"}, {"image_std": [0.0, 0.5, 0.5]}, {"image_std": 1}],
)
def test_a_normalisation_that_cannot_be(original: Original, tmp_path: Path, changed: dict) -> None:
    folder = copied(original, tmp_path)
    write_json(folder / "tower/preprocessor_config.json", changed)
    fails(folder, tmp_path, rf"tower/preprocessor_config\.json cannot be understood: {next(iter(changed))}=")


def test_a_number_that_no_pixel_can_have(original: Original, tmp_path: Path) -> None:
    folder = copied(original, tmp_path)
    write_json(folder / "tower/preprocessor_config.json", {"image_mean": [-(2**70), 0.4, 0.4]})
    fails(folder, tmp_path, r"cannot process an image \(OverflowError\)\. Mend the numbers")


def fast_tokenizer(folder: Path) -> dict:
    """What `tokenizer.json` of the checkpoint in a folder would hold."""
    return json.loads(LlamaTokenizer.from_pretrained(str(folder)).backend_tokenizer.to_str())


def without(content: dict, key: str) -> dict:
    return {name: value for name, value in content.items() if name != key}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: [], "holds a list"),
        (lambda content: {}, "has no model"),
        (lambda content: content | {"model": []}, r"model=\[\]"),
        (lambda content: content | {"model": without(content["model"], "vocab")}, "has no model.vocab"),
        (lambda content: content | {"model": without(content["model"], "type")}, "has no model.type"),
        (lambda content: content | {"model": without(content["model"], "merges")}, "has no model.merges"),
        (lambda content: content | {"model": content["model"] | {"type": "WordPiece"}}, "'WordPiece'.*BPE"),
        (lambda content: content | {"model": content["model"] | {"vocab": {"<0xFF>": "3"}}}, "model.vocab"),
        (lambda content: content | {"model": content["model"] | {"vocab": {"a": 3, "b": 3}}}, "model.vocab"),
        (lambda content: content | {"model": content["model"] | {"merges": [5]}}, "tokenizer.json"),
        (lambda content: without(content, "added_tokens"), "has no added_tokens"),
        (lambda content: content | {"added_tokens": {}}, r"added_tokens=\{\}"),
        (lambda content: content | {"added_tokens": [5]}, r"added_tokens\[0\]=5"),
        (lambda content: content | {"added_tokens": [{"id": 0}]}, r"added_tokens\[0\]=\{'id': 0\}"),
        (lambda content: content | {"added_tokens": [{"id": "0", "content": "<unk>"}]}, r"added_tokens\[0\]"),
        (lambda content: content | {"decoder": {"type": "nope"}}, "tokenizer.json"),
    ],
)
def test_a_fast_tokenizer_that_is_damaged(
    original: Original, tmp_path: Path, change: Callable[[dict], object], message: str
) -> None:
    folder = copied(original, tmp_path)
    write_json(folder / "tokenizer.json", change(fast_tokenizer(folder)))
    fails(
        folder,
        tmp_path,
        rf"(?s)original/tokenizer\.json.*{message}" if message != "tokenizer.json" else message,
    )


@pytest.mark.parametrize(
    "changed",
    [
        {"eos_token": 5},
        {"eos_token": {"content": 5}},
        {"bos_token": {}},
        {"bos_token": "<begin>"},
        {"unk_token": []},
        {"model_max_length": "long"},
        {"model_max_length": -1},
    ],
)
def test_settings_of_the_tokenizer_that_cannot_be(original: Original, tmp_path: Path, changed: dict) -> None:
    folder = copied(original, tmp_path)
    path = folder / "tokenizer_config.json"
    write_json(folder / "tokenizer.json", fast_tokenizer(folder))
    write_json(path, json.loads(path.read_text()) | changed)
    fails(folder, tmp_path, rf"tokenizer_config\.json cannot be understood: {next(iter(changed))}=")


@pytest.mark.parametrize(("key", "token"), [("eos_token", "<s>"), ("bos_token", "</s>")])
def test_special_tokens_on_which_two_files_disagree(
    original: Original, tmp_path: Path, key: str, token: str
) -> None:
    folder = copied(original, tmp_path)
    path = folder / "tokenizer_config.json"
    write_json(folder / "tokenizer.json", fast_tokenizer(folder))
    write_json(path, json.loads(path.read_text()) | {key: token})
    fails(folder, tmp_path, rf"tokenizer_config\.json.*{key}.*{token}.*config\.json.*{key}_id")


@pytest.mark.parametrize(
    "weight_map", [[], {}, {"a": 5}, {"a": "../x.safetensors"}, {"a": "config.json"}, {"a": ""}, {"a": "\0"}]
)
def test_an_index_that_names_no_shards(original: Original, tmp_path: Path, weight_map: object) -> None:
    folder = copied(original, tmp_path)
    write_json(folder / "model.safetensors.index.json", {"weight_map": weight_map})
    fails(folder, tmp_path, r"original/model\.safetensors\.index\.json is no index of shards.*weight_map")


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


_SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from([-(2**70), -99, -1, 0, 1, 2, 3, 5, 10**9, 2**70, 0.0, -0.5, 1e-300, 1e300, float("nan")]),
    st.sampled_from(["", "text", "<s>", "~nobody/x", "\0", "../..", "model.safetensors"]),
    st.text(max_size=5),
)
_VALUES = st.recursive(
    _SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(
            st.sampled_from(["type", "rope_type", "factor", "content", "id", "a"]), inner, max_size=3
        ),
    ),
    max_leaves=4,
)


def names_in(folder: str) -> list[str]:
    return sorted(path.name for path in Path(folder).iterdir())


def mutated(text: str, data: st.DataObject) -> bytes:
    """A JSON file with a value replaced, a key or an item removed, or its end cut off."""
    kind = data.draw(st.sampled_from(["replace", "replace", "remove", "truncate"]), "kind")
    if kind == "truncate":
        return text.encode()[: data.draw(st.integers(0, len(text.encode()) - 1), "length")]
    whole: Any = [json.loads(text)]
    holder, key = whole, 0
    while isinstance(holder[key], (dict, list)) and holder[key] and data.draw(st.booleans(), "deeper"):
        holder = holder[key]
        key = data.draw(
            st.sampled_from(list(holder) if isinstance(holder, dict) else range(len(holder))), "key"
        )
    if kind == "remove" and holder is not whole:
        del holder[key]
    else:
        holder[key] = data.draw(_VALUES, "value")
    return json.dumps(whole[0]).encode()


@pytest.fixture(scope="module")
def full(original: Original, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint with every JSON file that can be beside it."""
    folder = copied(original, tmp_path_factory.mktemp("full"))
    write_json(folder / "tokenizer.json", fast_tokenizer(folder))
    write_json(
        folder / "tower/preprocessor_config.json",
        {"image_mean": [0.5, 0.4, 0.4], "image_std": [0.3, 0.3, 0.3]},
    )
    return folder


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_a_damaged_file_ends_in_a_model_that_works_or_in_a_user_error(
    full: Path, data: st.DataObject
) -> None:
    name = data.draw(
        st.sampled_from(
            [
                *("config.json", "config.json", "tower/config.json", "tower/preprocessor_config.json"),
                *("tokenizer.json", "tokenizer_config.json", "model.safetensors.index.json"),
            ]
        ),
        "file",
    )
    content = mutated((full / name).read_text(), data)
    with tempfile.TemporaryDirectory() as folder:
        source, out = Path(folder) / "original", Path(folder) / "out"
        shutil.copytree(full, source, copy_function=os.link)
        (source / name).unlink()
        (source / name).write_bytes(content)
        if name != "tokenizer.json" and data.draw(st.booleans(), "SentencePiece only"):
            (source / "tokenizer.json").unlink()
        try:
            convert(source, out)
        except UserError as error:
            assert str(error)
            assert names_in(folder) == ["original"]
        else:
            assert logits(out, picture(30, 30)).ndim == 2
            assert names_in(folder) == ["original", "out"]


def test_missing_files(original: Original, tmp_path: Path) -> None:
    fails(tmp_path / "nowhere", tmp_path, "no folder")
    folder = copied(original, tmp_path)
    for name in ("model-00001-of-00003.safetensors", "model-00003-of-00003.safetensors"):
        (folder / name).unlink()
    fails(folder, tmp_path, r"2 files \(model-00001-of-00003.safetensors, model-00003-of-00003.safetensors\)")
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
        (whole[: len(whole) // 2], "not wholly downloaded"),
        (b"", "not wholly downloaded"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "git lfs pull"),
    ]:
        shard.write_bytes(content)
        fails(folder, tmp_path, message)


def test_a_torch_file_that_runs_code_or_holds_something_else(tmp_path: Path) -> None:
    folder = build_tiny_llava_med(tmp_path / "original", file_format="bin", shards=1).folder
    torch.save({"model.norm.weight": Path("/")}, folder / "pytorch_model.bin")
    fails(folder, tmp_path, "cannot read")
    torch.save({"state": {"model.norm.weight": torch.ones(2)}}, folder / "pytorch_model.bin")
    fails(folder, tmp_path, "something else than named tensors")


def test_an_index_that_does_not_fit(original: Original, tmp_path: Path) -> None:
    folder = copied(original, tmp_path)
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    del index["weight_map"]["model.norm.weight"]
    path.write_text(json.dumps(index))
    fails(folder, tmp_path, r"1 tensor \(model.norm.weight\)")
    path.write_text("{}")
    fails(folder, tmp_path, "no index of shards")


def test_quantised_weights(original: Original, tmp_path: Path) -> None:
    folder = copied(original, tmp_path, weights=False)
    quantised = {"model.norm.weight": torch.ones(64, dtype=torch.int8)}
    save_file(original.tensors | quantised, folder / "model.safetensors")
    fails(folder, tmp_path, "model.norm.weight .* not floating point")


def test_a_tokenizer_that_is_missing_or_of_another_model(original: Original, tmp_path: Path) -> None:
    folder = copied(original, tmp_path)
    (folder / "tokenizer.model").write_bytes(b"nothing of the kind")
    fails(folder, tmp_path, "cannot read the tokenizer")
    (folder / "tokenizer.model").unlink()
    fails(folder, tmp_path, "has no tokenizer")
    tokenizer = Path(__file__).parents[2] / "mmedpo_ray/phantom/phantom_llava/tokenizer.json"
    shutil.copyfile(tokenizer, folder / "tokenizer.json")
    fails(folder, tmp_path, "tokenizer")


def test_a_place_that_cannot_be_written_to(original: Original, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/notes.txt").write_text("mine")
    fails(original.folder, tmp_path, "not an empty folder")
    assert (tmp_path / "out/notes.txt").read_text() == "mine"


def test_another_precision_than_there_is(original: Original, tmp_path: Path) -> None:
    fails(original.folder, tmp_path, "bfloat16, float16, float32", dtype="int4")


def test_an_interrupted_conversion_leaves_nothing(original: Original, tmp_path: Path) -> None:
    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(original.folder, tmp_path / "out", max_shard_bytes=200_000, progress=interrupt)
    assert not list(tmp_path.iterdir())


def test_what_a_killed_conversion_left_is_cleared_away(original: Original, tmp_path: Path) -> None:
    left = tmp_path / ".out.converting"
    left.mkdir()
    (left / "model-00001-of-00009.safetensors").write_bytes(b"half")
    (tmp_path / "out").mkdir()
    convert(original.folder, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert not (tmp_path / "out/model-00001-of-00009.safetensors").exists()


def test_the_command_says_what_to_know_and_what_comes_next(
    original: Original, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out[1]"
    convert_command(original.folder, out, vision_tower=None, dtype=None)
    said = capsys.readouterr().err
    assert "--vision-tower" in said
    assert f"model.path={out}" in said
    assert (out / "config.json").is_file()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("file_format", ["safetensors", "bin"])
def test_weights_that_are_no_numbers_are_refused_by_name(original, tmp_path, value, file_format):
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
