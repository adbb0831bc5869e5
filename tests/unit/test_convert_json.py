"""Wrong or damaged JSON files of a checkpoint: the error names file, key and value; nothing is written."""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from convert_world import copied, fails, fast_tokenizer, logits, picture, write_json
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_llava_med import (
    Original,
    build_tiny_llava_med,
)

from mmedpo_ray.convert.checkpoint import convert
from mmedpo_ray.errors import UserError


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Original:
    return build_tiny_llava_med(tmp_path_factory.mktemp("convert") / "original")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"model_type": "llava_llama"}, "llava_llama.*llava_mistral"),
        ({"model_type": None}, "model_type None"),
        ({"model_type": "llava"}, "already"),
        ({"mm_projector_type": "linear"}, "mm_projector_type='linear'"),
        ({"image_aspect_ratio": "anyres"}, "image_aspect_ratio='anyres'"),
        ({"mm_use_im_start_end": True}, "mm_use_im_start_end"),
        ({"hidden_size": 128}, r"embed_tokens.weight is 378×64, not 378×128"),
        ({"vocab_size": 400}, "378×64, not 400×64"),
        ({"num_hidden_layers": 1}, r"no place for \(model\.layers\.1\..* and 4 more"),
        ({"num_hidden_layers": 3}, r"incomplete: .*model\.layers\.2\..* and 4 more"),
        ({"rms_norm_eps": "small"}, "cannot be understood"),
        ({"mm_vision_tower": "somebody/else"}, "somebody/else, which is no folder"),
    ],
)
def test_another_configuration(original: Original, tmp_path: Path, changed: dict, message: str) -> None:
    fails(copied(original, tmp_path, **changed), tmp_path, message)


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("num_attention_heads", 0, "1"),
        ("num_attention_heads", 3, "hidden_size, which is 64"),
        ("num_attention_heads", True, "integer"),
        ("num_key_value_heads", 0, "1"),
        ("num_key_value_heads", 4, "num_attention_heads, which is 2"),
        ("num_hidden_layers", -1, "1"),
        ("num_hidden_layers", 10**9, "1024"),
        ("hidden_size", "64", "integer"),
        ("vocab_size", [378], "integer"),
        ("hidden_act", "nope", "'silu'"),
        ("hidden_act", ["silu"], "'silu'"),
        ("rms_norm_eps", float("nan"), "finite"),
        ("rope_theta", 0, "greater than 0"),
        ("rope_scaling", {"type": "nonsense"}, "linear"),
        ("rope_scaling", {"type": "linear"}, "factor"),
        ("rope_scaling", {"type": "linear", "factor": 0}, "factor"),
        ("rope_scaling", "linear", "dictionary"),
        ("eos_token_id", 400, "vocab_size"),
        ("eos_token_id", [], "at least 1"),
        ("pad_token_id", -5, "-1"),
        ("tie_word_embeddings", "no", "boolean"),
        ("mm_vision_select_layer", -99, "-4 to 3"),
        ("mm_vision_select_layer", 4, "-4 to 3"),
        ("mm_vision_select_layer", "x", "integer"),
        ("mm_vision_select_layer", [-2], "integer"),
        ("mm_vision_tower", 5, "string"),
    ],
)
def test_a_wrong_setting_is_named(
    original: Original, tmp_path: Path, key: str, value: object, expected: str
) -> None:
    """With its file, its value and what is expected."""
    folder = copied(original, tmp_path, **{key: value})
    fails(folder, tmp_path, rf"(?s)original/config\.json.*{key}={re.escape(repr(value))}.*{expected}")


def test_a_wrong_end_token_in_a_list_is_named(original: Original, tmp_path: Path) -> None:
    fails(copied(original, tmp_path, eos_token_id=[2, "x"]), tmp_path, r"config\.json.*eos_token_id\.1='x'")


@pytest.mark.parametrize("name", ["~nobody-of-this-name/tower", "x" * 5000, "a\0b"])
def test_a_tower_whose_name_no_folder_can_have(original: Original, tmp_path: Path, name: str) -> None:
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
def test_a_missing_setting_is_named(original: Original, tmp_path: Path, key: str) -> None:
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
        (b"[]", "not valid JSON with an object"),
        (b"null", "not valid JSON with an object"),
        (b'"text"', "not valid JSON with an object"),
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
        ({"num_attention_heads": 0}, "num_attention_heads=0.*1"),
        ({"num_attention_heads": 3}, "num_attention_heads=3.*hidden_size, which is 64"),
        ({"patch_size": 0}, "patch_size=0.*1"),
        ({"patch_size": [8, 8]}, r"patch_size=\[8, 8\].*integer"),
        ({"image_size": 33}, "image_size=33.*patch_size, which is 8"),
        ({"image_size": 0}, "image_size=0.*1"),
        ({"hidden_act": "nope"}, "hidden_act='nope'.*quick_gelu"),
        ({"num_channels": 1}, "num_channels=1.*3"),
        ({"layer_norm_eps": None}, "layer_norm_eps=None.*number"),
    ],
)
def test_a_wrong_setting_of_the_tower_is_named(
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
    [
        {"image_mean": [0.5]},
        {"image_mean": "grey"},
        {"image_mean": [-(2**70), 0.4, 0.4]},
        {"image_std": [0.0, 0.5, 0.5]},
        {"image_std": 1},
    ],
)
def test_a_wrong_normalisation_is_named(original: Original, tmp_path: Path, changed: dict) -> None:
    folder = copied(original, tmp_path)
    write_json(folder / "tower/preprocessor_config.json", changed)
    fails(folder, tmp_path, rf"tower/preprocessor_config\.json cannot be understood: {next(iter(changed))}")


def without(content: dict, key: str) -> dict:
    return {name: value for name, value in content.items() if name != key}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: [], "not valid JSON with an object"),
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
        (lambda content: content | {"added_tokens": [5]}, "added_tokens.0=5"),
        (lambda content: content | {"added_tokens": [{"id": 0}]}, "has no added_tokens.0.content"),
        (
            lambda content: content | {"added_tokens": [{"id": "0", "content": "<unk>"}]},
            "added_tokens.0.id='0'",
        ),
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
def test_a_wrong_setting_of_the_tokenizer_is_named(original: Original, tmp_path: Path, changed: dict) -> None:
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


def test_a_tokenizer_that_is_missing_or_of_another_model(original: Original, tmp_path: Path) -> None:
    folder = copied(original, tmp_path)
    (folder / "tokenizer.model").write_bytes(b"nothing of the kind")
    fails(folder, tmp_path, "cannot read the tokenizer")
    (folder / "tokenizer.model").unlink()
    fails(folder, tmp_path, "has no tokenizer")
    tokenizer = Path(__file__).parents[2] / "mmedpo_ray/phantom/phantom_llava/tokenizer.json"
    shutil.copyfile(tokenizer, folder / "tokenizer.json")
    fails(folder, tmp_path, "tokenizer")


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


@settings(max_examples=60)
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
