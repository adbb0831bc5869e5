"""MedKLIP: the same outputs as the original code, the official file layout, and its use as a visual tool."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tiny_medklip import build_bert, build_tiny_medklip, made_up_state, normal
from transformers import BertModel, ResNetConfig, ResNetModel

from mmedpo_ray.config.load import load
from mmedpo_ray.config.tree import Config
from mmedpo_ray.curate.tool_registry import TOOLS
from mmedpo_ray.curate.visual.tools.base import VisualTool
from mmedpo_ray.curate.visual.tools.medklip_network import MedklipNetwork, load_network
from mmedpo_ray.curate.visual.visual_pairs import PairMaker
from mmedpo_ray.errors import UserError
from mmedpo_ray.radiology.finding_prompts import OBSERVATIONS

GOLDEN = Path(__file__).parent.parent / "data" / "medklip_golden.safetensors"


def made_up_inputs() -> tuple[torch.Tensor, torch.Tensor]:
    """An image (1, 3, 224, 224) and observation embeddings (75, 768)."""
    return normal("image", (1, 3, 224, 224)), normal("observations", (len(OBSERVATIONS), 768))


@pytest.fixture(scope="module")
def state() -> dict[str, torch.Tensor]:
    return made_up_state()


@pytest.fixture(scope="module")
def network(state: dict[str, torch.Tensor]) -> MedklipNetwork:
    network = MedklipNetwork()
    network.load_state_dict(state)
    return network.eval()


def test_outputs_equal_the_original_code(network: MedklipNetwork) -> None:
    """Logits and the four attention maps, to 1e-5, on the same made-up weights.

    The golden file holds what the original network computed:
    ``Sample_Zero-Shot_Grounding_RSNA/models/model_MedKLIP.py`` of MediaBrain-SJTU/MedKLIP on GitHub, commit
    a58087d1b49a1612fec76ac1ab78465b81ab65c3, which returns logits and attention and which MMedPO uses. Its
    ``transformer.py`` was taken from Shef-AIRE/MeDSLIP (``PreTrain_MedKLIP/models``, commit
    036fc4221210deb32911c9693a3cec1cc54c7c95), a re-formatted copy, and torchvision's ResNet-50 from a
    stand-in with the same modules (the next test compares the trunk with another library's). Configuration:
    the official one (d_model 256, N 4, H 4, resnet50, 2 attributes). Weights: ``made_up_weights`` of its own
    state dict. Inputs: ``made_up_inputs``, the second as ``disease_book``.
    """
    golden = load_file(GOLDEN)
    with torch.inference_mode():
        logits, attention = network(*made_up_inputs())
    assert logits.shape == (1, 75, 2)
    assert attention.shape == (4, 1, 75, 196)
    torch.testing.assert_close(logits, golden["logits"], rtol=0, atol=1e-5)
    torch.testing.assert_close(attention, golden["attention"], rtol=0, atol=1e-5)
    # Not so flat that anything would be equal to it.
    assert golden["logits"].std() > 0.1
    assert golden["attention"].max() > 10 / 196


def test_the_trunk_is_the_resnet50_of_transformers(network: MedklipNetwork) -> None:
    config = ResNetConfig(
        embedding_size=64, hidden_sizes=[256, 512, 1024], depths=[3, 4, 6], layer_type="bottleneck"
    )
    reference = ResNetModel(config).eval()
    trunk = network.res_features.state_dict()
    weights = {}
    for name in reference.state_dict():
        parts = name.split(".")
        kind = "conv" if "convolution" in name else "bn"
        if parts[0] == "embedder":
            own = f"{0 if kind == 'conv' else 1}.{parts[-1]}"
        elif "shortcut" in name:
            own = f"{4 + int(parts[2])}.{parts[4]}.downsample.{0 if kind == 'conv' else 1}.{parts[-1]}"
        else:
            own = f"{4 + int(parts[2])}.{parts[4]}.{kind}{int(parts[6]) + 1}.{parts[-1]}"
        weights[name] = trunk.pop(own)
    assert not trunk
    reference.load_state_dict(weights)
    image = made_up_inputs()[0]
    with torch.inference_mode():
        expected = reference(image).last_hidden_state
        torch.testing.assert_close(network.res_features(image), expected, rtol=1e-5, atol=1e-5)


def test_each_image_of_a_batch_is_answered_alone(network: MedklipNetwork) -> None:
    image, observations = made_up_inputs()
    other = normal("other image", (1, 3, 224, 224))
    with torch.inference_mode():
        logits, attention = network(torch.cat([image, other]), observations)
        alone, alone_attention = network(other, observations)
    torch.testing.assert_close(logits[1:], alone, rtol=0, atol=1e-5)
    torch.testing.assert_close(attention[:, 1:], alone_attention, rtol=0, atol=1e-5)
    torch.testing.assert_close(attention.sum(-1), torch.ones(4, 2, 75), rtol=0, atol=1e-5)


# ---------------------------------------------------------------------- the checkpoint file


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("wrapped", [True, False])
def test_the_official_layout_loads(
    tmp_path: Path, state: dict[str, torch.Tensor], prefix: str, wrapped: bool
) -> None:
    weights = {prefix + name: value for name, value in state.items()}
    saved = {"model": weights, "optimizer": {"state": {}}, "config": {"N": 4}, "epoch": 9}
    torch.save(saved if wrapped else weights, tmp_path / "medklip.pth")
    network = load_network(tmp_path / "medklip.pth")
    assert not network.training
    assert all(torch.equal(value, state[name]) for name, value in network.state_dict().items())


def test_a_checkpoint_that_is_no_medklip_is_refused(tmp_path: Path, state: dict[str, torch.Tensor]) -> None:
    path = tmp_path / "c.pth"

    def refused(content: object) -> str:
        torch.save(content, path)
        with pytest.raises(UserError) as error:
            load_network(path)
        return str(error.value)

    incomplete = {name: value for name, value in state.items() if name != "classifier.bias"}
    message = refused({"model": incomplete | {"fc.weight": torch.zeros(1)}})
    assert "1 missing (classifier.bias)" in message
    assert "1 unexpected (fc.weight)" in message
    message = refused({"model": state | {"classifier.weight": torch.zeros(14, 256)}})
    assert "1 of another shape (classifier.weight)" in message
    assert "342 missing (" in refused({"model": {"fc.weight": torch.zeros(1)}})
    assert "no table of weights" in refused([1, 2])
    # An object that could run code is not opened.
    assert "weights only" in refused({"model": state, "args": Path("x")})
    path.write_bytes(b"not a checkpoint")
    with pytest.raises(UserError, match="weights only"):
        load_network(path)


# ---------------------------------------------------------------------- the tool


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_medklip(tmp_path_factory.mktemp("medklip") / "files")


def settings(folder: Path, *overrides: str) -> Config:
    visual = "curate.visual"
    return load(
        None,
        (
            f"{visual}.tool=medklip",
            f"{visual}.medklip.checkpoint={folder / 'medklip.pth'}",
            f"{visual}.medklip.text_model={folder / 'bert'}",
            *overrides,
        ),
    )


@pytest.fixture(scope="module")
def tool(folder: Path) -> VisualTool:
    return TOOLS["medklip"](settings(folder))


def sample(question: str, answer: str = "Yes") -> dict[str, Any]:
    return {"sample_id": "s", "question": question, "answer": answer, "mask_uri": None}


def test_the_tool_answers_for_the_observation_asked_about(tool: VisualTool, folder: Path) -> None:
    """The heat map is the mean attention of that observation, the confidence its probability; from the file
    to the result."""
    from mmedpo_ray.curate.visual.tools.medklip import embed_texts, read_texts

    rng = np.random.default_rng(3)
    image = Image.fromarray(rng.integers(0, 255, (224, 224, 3), dtype=np.uint8))
    rows = [sample("Is there a pleural effusion?"), sample("What is this?", "Pneumonia"), sample("Why?")]
    found = tool.localise([image] * 3, rows)

    pixels = (np.asarray(image) / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    texts = read_texts(folder / "observation explanation.json")
    with torch.inference_mode():
        logits, attention = load_network(folder / "medklip.pth")(
            torch.tensor(pixels.transpose(2, 0, 1)[None], dtype=torch.float32),
            embed_texts(texts, str(folder / "bert")),
        )
    for name, seen in zip(("effusion", "pneumonia", "disease"), found, strict=True):
        index = OBSERVATIONS.index(name)
        odds = logits[0, index].exp()
        assert seen.confidence == pytest.approx(float(odds[1] / odds.sum()), abs=1e-4)
        grid = attention[:, 0, index].mean(0).reshape(14, 14)
        scaled = (grid - grid.min()) / (grid.max() - grid.min())
        assert seen.heat_map is not None
        assert seen.heat_map.dtype == np.float32
        # Between the four middle pixels of a patch of 16 lies its centre.
        centres = seen.heat_map.reshape(14, 16, 14, 16)[:, 7:9, :, 7:9].mean((1, 3))
        assert np.abs(centres - scaled.numpy()).max() < 0.06
    assert len({seen.confidence for seen in found}) == 3


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "P", "I;16"])
def test_images_of_any_mode_and_shape(tool: VisualTool, mode: str) -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (40, 70, 3), dtype=np.uint8)
    image = (
        Image.fromarray(pixels[..., 0].astype(np.uint16) * 9)
        if mode == "I;16"
        else Image.fromarray(pixels).convert(mode)
    )
    [found] = tool.localise([image], [sample("Is there a mass?")])
    assert found.heat_map.shape == (40, 70)
    assert 0 <= found.heat_map.min() < 0.1
    assert 0.9 < found.heat_map.max() <= 1
    assert 0 < found.confidence < 1


def test_a_pair_is_the_same_whatever_shares_its_batch(folder: Path, tmp_path: Path) -> None:
    """As when a run goes on from where it was stopped: what is left fills other batches."""
    maker = PairMaker(settings(folder, "curate.visual.batch_images=3", f"run.folder={tmp_path}/run"))
    rows = []
    for number in range(4):
        uri = str(tmp_path / f"{number}.png")
        pixels = np.random.default_rng(number).integers(0, 255, (60, 70 + number), dtype=np.uint8)
        Image.fromarray(pixels).save(uri)
        for finding in ("mass", "effusion"):
            rows.append(
                sample(f"Is there a {finding}?")
                | {"sample_id": f"{number}{finding}", "image_id": uri, "image_uri": uri}
            )
    whole = {pair.row["sample_id"]: pair for pair in maker.make(rows)}
    assert len(whole) == len(rows)
    for some in ([rows[0]], rows[1:3], [*rows[6:], *rows[3:5]], rows[::-1]):
        for pair in maker.make(some):
            expected = whole[pair.row["sample_id"]]
            assert np.array_equal(pair.heat_map, expected.heat_map)
            assert pair.confidence == expected.confidence
            assert np.array_equal(pair.noised.pixels, expected.noised.pixels)


def test_the_text_is_read_as_the_official_scripts_do(folder: Path) -> None:
    """Lower case, [CLS] in front, no [SEP] behind, the first 64 tokens: equal to BERT on ids written by
    hand."""
    from mmedpo_ray.curate.visual.tools.medklip import embed_texts

    found = embed_texts(["It Means", "very " * 200, "it"], str(folder / "bert"))
    bert = BertModel.from_pretrained(folder / "bert").eval()
    for row, ids in zip(found, ([2, 5, 6], [2] + [7] * 63, [2, 5]), strict=True):
        with torch.inference_mode():
            expected = bert(input_ids=torch.tensor([ids])).last_hidden_state[0, 0]
        torch.testing.assert_close(row, expected, rtol=0, atol=1e-5)
    assert not torch.allclose(found[0], found[2], atol=1e-3)


def test_what_is_missing_is_named(folder: Path, tmp_path: Path, state: dict[str, torch.Tensor]) -> None:
    medklip = TOOLS["medklip"]

    def refused(config: Config) -> str:
        with pytest.raises(UserError) as error:
            medklip(config)
        return str(error.value)

    absent = settings(folder, "curate.visual.medklip.checkpoint=/nowhere/m.pth")
    assert "no MedKLIP checkpoint /nowhere/m.pth" in refused(absent)
    (tmp_path / "medklip.pth").write_bytes((folder / "medklip.pth").read_bytes())
    moved = settings(folder, f"curate.visual.medklip.checkpoint={tmp_path / 'medklip.pth'}")
    assert "observation explanation.json" in refused(moved)
    texts = json.loads((folder / "observation explanation.json").read_text())
    for content, says in (
        ("{", "cannot be read as JSON"),
        ("[1]", "not a table of texts"),
        (json.dumps(dict(list(texts.items())[:74])), "74 entries, not 75"),
        (json.dumps(dict(reversed(texts.items()))), "entry 0 differs"),
    ):
        (tmp_path / "observation explanation.json").write_text(content)
        assert says in refused(moved)
    assert f"cannot load {tmp_path}" in refused(
        settings(folder, f"curate.visual.medklip.text_model={tmp_path}")
    )
    build_bert(tmp_path / "narrow", width=64)
    assert "has width 64" in refused(
        settings(folder, f"curate.visual.medklip.text_model={tmp_path / 'narrow'}")
    )
    build_bert(tmp_path / "mute")
    (tmp_path / "mute" / "vocab.txt").unlink()
    assert "vocab.txt" in refused(settings(folder, f"curate.visual.medklip.text_model={tmp_path / 'mute'}"))


def test_another_checkpoint_is_another_fingerprint(folder: Path, tmp_path: Path) -> None:
    before = TOOLS["medklip"].fingerprint(settings(folder))
    assert before == TOOLS["medklip"].fingerprint(settings(folder))
    for name in ("medklip.pth", "observation explanation.json"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    copied = settings(folder, f"curate.visual.medklip.checkpoint={tmp_path / 'medklip.pth'}")
    assert TOOLS["medklip"].fingerprint(copied) == before
    texts = json.loads((tmp_path / "observation explanation.json").read_text())
    changed = texts | {"normal": "Nothing is wrong."}
    (tmp_path / "observation explanation.json").write_text(json.dumps(changed))
    assert TOOLS["medklip"].fingerprint(copied) != before
    # Known before any model is loaded.
    (tmp_path / "observation explanation.json").unlink()
    with pytest.raises(UserError, match="observation texts are not at"):
        TOOLS["medklip"].fingerprint(copied)


def test_real_radiographs(tool: VisualTool, shared_data: Path) -> None:
    folder = shared_data / "cxr_masks"
    images = [Image.open(path) for path in sorted((folder / "images").iterdir())[:4]]
    found = tool.localise(images, [sample("Is there a consolidation?")] * len(images))
    for image, seen in zip(images, found, strict=True):
        assert seen.heat_map.shape == (image.height, image.width)
        assert seen.problem is None
