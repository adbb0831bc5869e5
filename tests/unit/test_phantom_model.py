"""The embedded model: its tokenizer and prompts, a reduced build, and what the shipped one can do."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from safetensors import safe_open
from torch.nn import functional as F

from mmedpo_ray.errors import UserError
from mmedpo_ray.models.loading import EMBEDDED_FOLDER, load_model, load_processor
from mmedpo_ray.models.prompts import PromptWriter, chat_messages
from mmedpo_ray.phantom import training
from mmedpo_ray.phantom.build_model import PhantomBuildConfig, build_command, build_phantom_llava
from mmedpo_ray.phantom.model_scores import answer, score_answers, score_model
from mmedpo_ray.phantom.tokenizer import train_tokenizer
from mmedpo_ray.phantom.world import generate

TINY = PhantomBuildConfig(
    image_size=32,
    vision_width=32,
    vision_layers=1,
    text_width=32,
    text_layers=1,
    text_mlp=64,
    vocab_size=512,
    tower_images=40,
    tower_steps=12,
    train_images=24,
    train_steps=12,
    score_images=2,
)


def silent(what, done, total):
    pass


def load(folder):
    return load_model(str(folder), torch.float32), load_processor(str(folder))


@pytest.fixture(scope="module")
def shipped():
    return load(EMBEDDED_FOLDER)


@pytest.fixture(scope="module")
def rebuilt(tmp_path_factory):
    folder = tmp_path_factory.mktemp("phantom") / "model"
    return folder, build_phantom_llava(folder, TINY, silent)


@given(text=st.text(st.characters(exclude_categories=["Cs"])))
def test_any_text_survives_the_tokenizer(shipped, text):
    for token in ("<image>", "[INST]", "[/INST]", "<s>", "</s>", "<pad>"):
        text = text.replace(token, "")
    tokenizer = shipped[1].tokenizer
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_frequent_words_are_single_tokens(shipped):
    text = " There is a small left pleural effusion in the lower zone. No pneumothorax."
    assert len(shipped[1].tokenizer.tokenize(text)) == len(text.split()) + 2


def test_content_as_string_and_as_parts_give_the_same_prompt(shipped):
    template = shipped[1].apply_chat_template
    expected = "<s>[INST] <image>\nIs the heart enlarged? [/INST]"
    question = {"type": "text", "text": " Is the heart enlarged? "}
    for content in (
        "<image>\nIs the heart enlarged?",
        [{"type": "image"}, question],
        [question, {"type": "image_url", "image_url": {"url": "data:"}}],
    ):
        assert template([{"role": "user", "content": content}], add_generation_prompt=True) == expected
    assert template(chat_messages("Is the heart enlarged?", " No")) == f"{expected} No</s>"


def test_training_and_inference_see_the_same_tokens(shipped):
    processor = shipped[1]
    image = Image.new("L", (80, 50)).convert("RGB")
    writer = PromptWriter(processor)
    prompt = writer.prompt("Where is the nodule?")
    response = writer.response("Where is the nodule?", "Left upper zone")
    text = processor.apply_chat_template(chat_messages("Where is the nodule?"), add_generation_prompt=True)
    assert processor(text=text, images=image)["input_ids"][0] == prompt
    tokenizer = processor.tokenizer
    assert prompt.count(processor.image_token_id) == 64
    assert prompt.count(tokenizer.bos_token_id) == 1
    assert tokenizer.convert_ids_to_tokens(response) == ["ĠLeft", "Ġupper", "Ġzone", "</s>"]


def test_a_vocabulary_too_small_for_bytes_is_refused():
    with pytest.raises(ValueError, match="vocab_size must be at least 262"):
        train_tokenizer(["text"], 200)


def test_a_reduced_model_is_built_and_loads(rebuilt):
    folder, scores = rebuilt
    assert scores == json.loads((folder / "scores.json").read_text())
    assert scores["uniform"]["closed_accuracy"]["n"] == 8
    with safe_open(folder / "model.safetensors", "pt") as weights:
        names = list(weights.keys())
    tower = [name for name in names if name.startswith("vision_tower.")]
    assert tower
    assert all(name.startswith("vision_tower.vision_model.") for name in tower)  # the spelling vLLM loads
    model, processor = load(folder)
    phantoms = list(generate("test", TINY.score_images, size=TINY.image_size))
    assert score_model(model, processor, phantoms, silent) == scores["uniform"]


def test_the_build_is_reproducible(rebuilt, tmp_path):
    folder, _ = rebuilt
    build_phantom_llava(tmp_path, TINY, silent)
    for name in ("model.safetensors", "tokenizer.json", "config.json", "scores.json"):
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes(), name


def test_training_lowers_the_loss(shipped):
    _, processor = shipped
    phantoms = list(generate("train", 8))
    trees = [training._tree(PromptWriter(processor), phantom) for phantom in phantoms]
    torch.manual_seed(0)
    model = type(shipped[0])(shipped[0].config)
    model.model.vision_tower.load_state_dict(shipped[0].model.vision_tower.state_dict())
    features = training._patch_features(model, training.pixel_values(processor, phantoms)).detach()
    with torch.no_grad():
        before = training._tree_loss(model, features, trees).item()
    config = PhantomBuildConfig(train_steps=10)
    training.train_language(model, processor, phantoms, config, silent)
    with torch.no_grad():
        after = training._tree_loss(model, features, trees).item()
    assert after < 0.7 * before


def test_the_tree_loss_equals_the_loss_of_separate_rows(shipped):
    model, processor = shipped
    phantoms = list(generate("train", 2))
    writer = PromptWriter(processor)
    pixels = training.pixel_values(processor, phantoms)
    trees = [training._tree(PromptWriter(processor), phantom) for phantom in phantoms]
    with torch.no_grad():
        tree_loss = training._tree_loss(model, training._patch_features(model, pixels), trees).item()
        losses = []
        for phantom, image in zip(phantoms, pixels, strict=True):
            for question in phantom.questions:
                prompt = writer.prompt(question.question)
                response = writer.response(question.question, question.answer)
                ids = torch.tensor([prompt + response])
                logits = model(input_ids=ids, pixel_values=image[None]).logits[0, len(prompt) - 1 : -1]
                losses.append(F.cross_entropy(logits, torch.tensor(response)).item())
    assert tree_loss == pytest.approx(sum(losses) / len(losses), rel=1e-4)


def test_the_shipped_model_is_small_and_its_card_tells_its_scores():
    assert sum(path.stat().st_size for path in EMBEDDED_FOLDER.iterdir()) < 12e6
    scores = json.loads((EMBEDDED_FOLDER / "scores.json").read_text())
    card = (EMBEDDED_FOLDER / "README.md").read_text()
    for world in ("biased", "uniform"):
        for score in scores[world].values():
            assert f"{score['value']:.3f}" in card
    assert scores["config"] == json.loads(json.dumps(vars(PhantomBuildConfig())))


def test_the_shipped_model_answers_under_the_priors_and_hallucinates_without(shipped):
    scores = {}
    for world in ("biased", "uniform"):
        phantoms = list(generate("test", 25, 5, prior=world))
        scores[world] = {
            key: value["value"] for key, value in score_model(*shipped, phantoms, silent).items()
        }
    assert scores["biased"]["closed_accuracy"] > 0.8
    assert scores["biased"]["closed_accuracy"] > scores["uniform"]["closed_accuracy"] + 0.08
    assert scores["biased"]["report_f1"] > scores["uniform"]["report_f1"] + 0.2
    assert scores["uniform"]["closed_accuracy"] > 0.58


def test_the_shipped_model_looks_at_the_image(shipped):
    phantoms = [p for p in generate("test", 60) if any(f.kind == "effusion" for f in p.findings)]
    question = "Is there a pleural effusion?"
    blank = Image.new("RGB", (64, 64), (128, 128, 128))
    ill = answer(*shipped, [(Image.fromarray(p.image), question) for p in phantoms], 4)
    healthy = [p for p in generate("test", 60) if all(f.kind != "effusion" for f in p.findings)]
    well = answer(*shipped, [(Image.fromarray(p.image), question) for p in healthy], 4)
    assert ill.count("Yes") / len(ill) > well.count("Yes") / len(well) + 0.4
    assert answer(*shipped, [(blank, question)], 4)[0] in ("Yes", "No")


def test_scores_of_given_answers():
    questions = [q for phantom in generate("test", 20) for q in phantom.questions]
    perfect = score_answers(questions, [q.answer.lower() + "." for q in questions])
    assert {score["value"] for score in perfect.values()} == {1.0}
    constant = score_answers(questions, ["Yes"] * len(questions))
    assert constant["closed_accuracy"]["value"] == 0.5
    assert constant["open_exact"]["value"] == constant["report_f1"]["value"] == 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"patch_size": 7}, "multiple of patch_size"),
        ({"text_width": 100}, "text_width must be a multiple of 32"),
    ],
)
def test_impossible_sizes_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        PhantomBuildConfig(**settings)


def test_a_folder_with_files_is_not_overwritten(tmp_path: Path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="not an empty folder"):
        build_command(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
