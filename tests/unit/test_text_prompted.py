"""Text-prompted models of transformers as visual tools: tiny ones of each architecture, with their real
processors."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    AutoModelForZeroShotObjectDetection,
    BertConfig,
    CLIPSegConfig,
    CLIPSegForImageSegmentation,
    CLIPTokenizer,
    GroundingDinoConfig,
    GroundingDinoForObjectDetection,
    MMGroundingDinoConfig,
    MMGroundingDinoForObjectDetection,
    Owlv2Config,
    Owlv2ForObjectDetection,
    OwlViTConfig,
    OwlViTForObjectDetection,
    SamConfig,
    SamModel,
    SwinConfig,
)
from transformers.models.grounding_dino.image_processing_pil_grounding_dino import (
    GroundingDinoImageProcessorPil,
)
from transformers.models.owlv2.image_processing_pil_owlv2 import Owlv2ImageProcessorPil
from transformers.models.owlvit.image_processing_pil_owlvit import OwlViTImageProcessorPil
from transformers.models.sam.image_processing_pil_sam import SamImageProcessorPil
from transformers.models.sam3.configuration_sam3 import Sam3Config, Sam3ViTConfig
from transformers.models.sam3.modeling_sam3 import Sam3Model
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from mmedpo_ray.config.load import load
from mmedpo_ray.config.tree import Config
from mmedpo_ray.curate.tool_registry import TOOLS
from mmedpo_ray.curate.visual.tools.base import Localisation, VisualTool
from mmedpo_ray.curate.visual.tools.text_prompted import Seen, heat_map
from mmedpo_ray.errors import UserError

TEXT = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
LETTERS = "abcdefghijklmnopqrstuvwxyz"


def clip_tokenizer() -> CLIPTokenizer:
    """Spells words in letters."""
    pieces = [*LETTERS, *(f"{letter}</w>" for letter in LETTERS), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(
        vocab={piece: i for i, piece in enumerate(pieces)}, merges=[], model_max_length=16, pad_token="a"
    )


def clip_text(vocabulary: int) -> dict[str, Any]:
    return TEXT | {
        "vocab_size": vocabulary,
        "max_position_embeddings": 16,
        "bos_token_id": vocabulary - 2,
        "eos_token_id": vocabulary - 1,
        "pad_token_id": 0,
    }


def build_clipseg(folder: Path) -> None:
    tokenizer = clip_tokenizer()
    config = CLIPSegConfig(
        text_config=clip_text(len(tokenizer)),
        vision_config=TEXT | {"num_hidden_layers": 2, "image_size": 32, "patch_size": 8},
        projection_dim=16,
        reduce_dim=8,
        extract_layers=[0, 1],
        decoder_num_attention_heads=2,
        decoder_intermediate_size=16,
    )
    save(folder, CLIPSegForImageSegmentation(config), tokenizer, ViTImageProcessorPil(size=square(32)))


def build_owlvit(folder: Path) -> None:
    tokenizer = clip_tokenizer()
    vision = TEXT | {"image_size": 64, "patch_size": 16}
    config = OwlViTConfig(text_config=clip_text(len(tokenizer)), vision_config=vision, projection_dim=32)
    save(folder, OwlViTForObjectDetection(config), tokenizer, OwlViTImageProcessorPil(size=square(64)))


def build_owlv2(folder: Path) -> None:
    tokenizer = clip_tokenizer()
    vision = TEXT | {"image_size": 64, "patch_size": 16}
    config = Owlv2Config(text_config=clip_text(len(tokenizer)), vision_config=vision, projection_dim=32)
    save(folder, Owlv2ForObjectDetection(config), tokenizer, Owlv2ImageProcessorPil(size=square(64)))


def build_grounding_dino(
    folder: Path, model_class: Any = GroundingDinoForObjectDetection, config_class: Any = GroundingDinoConfig
) -> None:
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", ".", *LETTERS, *(f"##{c}" for c in LETTERS)]
    config = config_class(
        backbone_config=SwinConfig(
            image_size=32,
            embed_dim=8,
            depths=[1, 1, 1, 1],
            num_heads=[1, 1, 1, 1],
            window_size=2,
            out_features=["stage2", "stage3", "stage4"],
        ),
        text_config=BertConfig(vocab_size=len(words), max_position_embeddings=128, **TEXT).to_dict(),
        d_model=32,
        encoder_layers=1,
        decoder_layers=2,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        num_queries=8,
        max_text_len=128,
    )
    processor = GroundingDinoImageProcessorPil(size={"shortest_edge": 64, "longest_edge": 96})
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join(words))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "BertTokenizer"}))
    save(folder, model_class(config), None, processor)


def build_mm_grounding_dino(folder: Path) -> None:
    build_grounding_dino(folder, MMGroundingDinoForObjectDetection, MMGroundingDinoConfig)


def build_sam3(folder: Path) -> None:
    tokenizer = clip_tokenizer()
    part = {"hidden_size": 32, "num_attention_heads": 2}
    vit = Sam3ViTConfig(
        **TEXT | {"num_hidden_layers": 2},
        image_size=112,
        patch_size=14,
        window_size=4,
        global_attn_indexes=[1],
        pretrain_image_size=56,
    )
    layers = part | {"num_layers": 1, "intermediate_size": 32}
    config = Sam3Config(
        vision_config={
            "backbone_config": vit.to_dict(),
            "fpn_hidden_size": 32,
            "backbone_feature_sizes": [[32, 32], [16, 16], [8, 8]],
        },
        text_config=clip_text(len(tokenizer)) | {"max_position_embeddings": 32, "projection_dim": 32},
        geometry_encoder_config=layers,
        detr_encoder_config=layers,
        detr_decoder_config=layers | {"num_queries": 5},
        mask_decoder_config=part,
    )
    save(folder, Sam3Model(config), tokenizer, ViTImageProcessorPil(size=square(112)))


def build_sam(folder: Path) -> None:
    config = SamConfig(
        vision_config={
            "hidden_size": 32,
            "output_channels": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "image_size": 64,
            "patch_size": 8,
            "mlp_dim": 32,
            "window_size": 4,
            "global_attn_indexes": [0],
            "num_pos_feats": 8,
        },
        prompt_encoder_config={
            "hidden_size": 16,
            "image_size": 64,
            "patch_size": 8,
            "mask_input_channels": 4,
        },
        mask_decoder_config={
            "hidden_size": 16,
            "mlp_dim": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "iou_head_hidden_dim": 16,
        },
    )
    save(folder, SamModel(config), None, SamImageProcessorPil(size={"longest_edge": 64}, pad_size=square(64)))


def square(side: int) -> dict[str, int]:
    return {"height": side, "width": side}


def save(folder: Path, model: Any, tokenizer: Any, processor: Any) -> None:
    state = np.random.RandomState(5)
    with torch.no_grad():
        for parameter in model.parameters():
            # Far from the usual small start, so that images, prompts and masks make a difference.
            scale = 2.0 / max(parameter[0].numel() if parameter.ndim else 1, 1) ** 0.5
            values = state.standard_normal(tuple(parameter.shape)) * (scale if parameter.ndim > 1 else 0.3)
            parameter.copy_(torch.from_numpy(np.asarray(values, dtype=np.float32)))
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)


BUILDERS: dict[str, Callable[[Path], None]] = {
    "clipseg": build_clipseg,
    "grounding-dino": build_grounding_dino,
    "mm-grounding-dino": build_mm_grounding_dino,
    "owlvit": build_owlvit,
    "owlv2": build_owlv2,
    "sam3": build_sam3,
    "sam": build_sam,
}
FINDERS = [name for name in BUILDERS if name != "sam"]
DETECTORS = ["grounding-dino", "mm-grounding-dino", "owlvit", "owlv2"]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for name, build in BUILDERS.items():
        build(folder / name)
    return folder


def settings(model: Path | str, *overrides: str, threshold: float = 0.02) -> Config:
    section = "curate.visual.text_prompted"
    return load(
        None,
        (
            "curate.visual.tool=text_prompted",
            f"{section}.model={model}",
            f"{section}.box_threshold={threshold}",
            *overrides,
        ),
    )


def make(model: Path | str, *overrides: str, threshold: float = 0.02) -> VisualTool:
    return TOOLS["text_prompted"](settings(model, *overrides, threshold=threshold))


def with_sam(models: Path, name: str = "sam") -> str:
    return f"curate.visual.text_prompted.segmenter={models / name}"


def sample(question: str = "Is there a nodule?") -> dict[str, Any]:
    return {"sample_id": "s", "question": question, "answer": "Yes", "mask_uri": None}


def pictures() -> list[Image.Image]:
    rng = np.random.default_rng(0)
    return [
        Image.fromarray(rng.integers(0, 255, (*size, 3), dtype=np.uint8))
        for size in ((60, 90), (80, 50), (60, 90))
    ]


def maps(found: list[Localisation]) -> list[np.ndarray]:
    assert all(one.heat_map is not None for one in found)
    return [one.heat_map for one in found if one.heat_map is not None]


@pytest.mark.parametrize("name", [*FINDERS, "grounding-dino+sam", "owlvit+sam", "owlv2+sam"])
def test_every_model_gives_heat_maps(models: Path, name: str) -> None:
    """In a batch as alone, of the image's size, different for another image and for another prompt."""
    finder, _, segmenter = name.partition("+")
    tool = make(models / finder, *([with_sam(models)] if segmenter else []))
    images = pictures()
    found = tool.localise(images, [sample()] * 3)
    for image, one, heat in zip(images, found, maps(found), strict=True):
        assert heat.shape == (image.height, image.width)
        assert heat.dtype == np.float32
        assert heat.min() >= 0
        assert heat.max() <= one.confidence + 1e-6 <= 1 + 1e-6
    assert not np.array_equal(found[0].heat_map, found[2].heat_map)
    [again] = tool.localise(images[:1], [sample()])
    assert again.confidence == pytest.approx(found[0].confidence, abs=1e-5)
    np.testing.assert_allclose(again.heat_map, found[0].heat_map, atol=1e-4)
    mixed = tool.localise(images, [sample(), sample(), sample("Is there a pleural effusion?")])
    assert mixed[0].confidence == pytest.approx(found[0].confidence, abs=1e-5)
    assert mixed[2].confidence != pytest.approx(found[2].confidence, abs=1e-5)


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "I;16"])
def test_images_of_any_mode(models: Path, mode: str) -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (40, 70, 3), dtype=np.uint8)
    image = (
        Image.fromarray(pixels[..., 0].astype(np.uint16) * 9)
        if mode == "I;16"
        else Image.fromarray(pixels).convert(mode)
    )
    [heat] = maps(make(models / "clipseg").localise([image], [sample()]))
    assert heat.shape == (40, 70)
    assert heat.max() > heat.min()


# ---------------------------------------------------------------------- against transformers' own pipelines


def test_clipseg_is_the_probability_of_each_pixel(models: Path) -> None:
    from transformers import CLIPSegProcessor

    folder = models / "clipseg"
    image = pictures()[0]
    processor = CLIPSegProcessor(ViTImageProcessorPil.from_pretrained(folder), clip_tokenizer())
    model = CLIPSegForImageSegmentation.from_pretrained(folder).eval()
    with torch.inference_mode():
        inputs = processor(text=["nodule"], images=[image], return_tensors="pt", padding=True)
        expected = model(**inputs).logits.reshape(32, 32).sigmoid()
    [found] = make(folder).localise([image], [sample()])
    assert found.confidence == pytest.approx(float(expected.max()), abs=1e-5)
    spread = torch.nn.functional.interpolate(expected[None, None], (60, 90), mode="bilinear")
    np.testing.assert_allclose(found.heat_map, spread[0, 0].numpy(), atol=1e-5)


def library_boxes(folder: Path, image: Image.Image, prompt: str) -> tuple[np.ndarray, np.ndarray]:
    """Scores and boxes as transformers' documentation gets them for these models."""
    from transformers import (
        BertTokenizer,
        GroundingDinoProcessor,
        Owlv2Processor,
        OwlViTProcessor,
    )

    sizes = torch.tensor([(image.height, image.width)])
    with torch.inference_mode():
        if folder.name.endswith("grounding-dino"):
            dino = GroundingDinoProcessor(
                GroundingDinoImageProcessorPil.from_pretrained(folder), BertTokenizer.from_pretrained(folder)
            )
            inputs = dino(images=image, text=[[prompt]], return_tensors="pt")
            outputs = AutoModelForZeroShotObjectDetection.from_pretrained(folder).eval()(**inputs)
            [found] = dino.post_process_grounded_object_detection(
                outputs, inputs.input_ids, threshold=0.02, target_sizes=sizes
            )
        else:
            old = folder.name == "owlvit"
            pil = (OwlViTImageProcessorPil if old else Owlv2ImageProcessorPil).from_pretrained(folder)
            owl = (OwlViTProcessor if old else Owlv2Processor)(pil, clip_tokenizer())
            inputs = owl(text=[[prompt]], images=image, return_tensors="pt")
            model = (OwlViTForObjectDetection if old else Owlv2ForObjectDetection).from_pretrained(folder)
            [found] = owl.post_process_grounded_object_detection(
                model.eval()(**inputs), threshold=0.02, target_sizes=sizes
            )
    return found["scores"].numpy(), found["boxes"].numpy()


@pytest.mark.parametrize("name", DETECTORS)
def test_boxes_are_those_of_transformers(models: Path, name: str) -> None:
    """Each pixel has the best score among the boxes that touch it."""
    found = make(models / name).localise(pictures(), [sample()] * 3)
    drawn = 0
    for image, one in zip(pictures(), found, strict=True):
        scores, boxes = library_boxes(models / name, image, "nodule")
        expected = np.zeros((image.height, image.width))
        for score, (left, top, right, bottom) in zip(scores, boxes, strict=True):
            y, x = np.mgrid[0 : image.height, 0 : image.width]
            touched = (x + 1 > left) & (x < right) & (y + 1 > top) & (y < bottom)
            expected[touched] = np.maximum(expected[touched], score)
            drawn += touched.any()
        # An edge that lies on a pixel's border may fall to either side.
        assert np.mean(np.abs(one.heat_map - expected) > 1e-4) < 0.01
        assert one.confidence == pytest.approx(expected.max(), abs=1e-4)
    assert drawn > 3


def test_masks_are_those_of_sam(models: Path) -> None:
    """Equal to transformers' SAM on the same boxes, each mask weighted by its box's score."""
    from transformers import SamProcessor

    image = pictures()[1]
    scores, boxes = library_boxes(models / "owlvit", image, "nodule")
    boxes = np.clip(boxes, 0, [50, 80, 50, 80])
    processor = SamProcessor(SamImageProcessorPil.from_pretrained(models / "sam"))
    inputs = processor(image, input_boxes=[boxes.tolist()], return_tensors="pt")
    with torch.inference_mode():
        masks = SamModel.from_pretrained(models / "sam").eval()(**inputs, multimask_output=False).pred_masks
    weighted = (masks[0, :, 0].sigmoid() * torch.tensor(scores)[:, None, None]).amax(0)
    [expected] = processor.image_processor.post_process_masks(
        [weighted[None, None]], inputs["original_sizes"], inputs["reshaped_input_sizes"], binarize=False
    )
    [found] = make(models / "owlvit", with_sam(models)).localise([image], [sample()])
    np.testing.assert_allclose(found.heat_map, expected[0, 0].numpy(), atol=1e-4)
    assert found.confidence == pytest.approx(scores.max(), abs=1e-5)
    assert len(scores) > 1


def test_sam3_weighs_masks_by_instance_and_presence(models: Path) -> None:
    image = pictures()[0]
    folder = models / "sam3"
    inputs = ViTImageProcessorPil.from_pretrained(folder)([image], return_tensors="pt")
    tokens = clip_tokenizer()(["nodule"], padding="max_length", max_length=32, return_tensors="pt")
    with torch.inference_mode():
        out = Sam3Model.from_pretrained(folder).eval()(**inputs, **tokens)
    scores = out.pred_logits[0].sigmoid() * out.presence_logits[0].sigmoid()
    [found] = make(folder).localise([image], [sample()])
    assert found.confidence == pytest.approx(float(scores.max()), abs=1e-5)
    low_resolution = (out.pred_masks[0].sigmoid() * scores[:, None, None]).amax(0)
    spread = torch.nn.functional.interpolate(low_resolution[None, None], (60, 90), mode="bilinear")
    np.testing.assert_allclose(found.heat_map, spread[0, 0].numpy(), atol=1e-4)


# ---------------------------------------------------------------------- thresholds and bad input


@pytest.mark.parametrize("name", [*DETECTORS, "sam3", "owlv2+sam"])
def test_nothing_over_the_threshold_is_nothing_found(models: Path, name: str) -> None:
    finder, _, segmenter = name.partition("+")
    tool = make(models / finder, *([with_sam(models)] if segmenter else []), threshold=0.99)
    for one, image in zip(tool.localise(pictures(), [sample()] * 3), pictures(), strict=True):
        assert one.confidence == 0
        assert one.heat_map is not None
        assert one.heat_map.shape == (image.height, image.width)
        assert not one.heat_map.any()


def test_the_best_of_overlapping_boxes_wins() -> None:
    seen = Seen([0.9, 0.3, 0.5], np.array([[2, 1, 4, 3], [0, 0, 10, 6], [3.5, 0, 6, 6.0]]))
    heat = heat_map(seen, 6, 10)
    assert heat[0, 0] == pytest.approx(0.3)
    assert heat[2, 3] == pytest.approx(0.9)
    assert heat[0, 3] == pytest.approx(0.5)
    assert heat[5, 5] == pytest.approx(0.5)
    assert heat[5, 6] == pytest.approx(0.3)


def test_models_that_do_not_fit_are_refused(models: Path, tmp_path: Path) -> None:
    def refused(*arguments: Any) -> str:
        with pytest.raises(UserError) as error:
            make(*arguments)
        return str(error.value)

    unknown = refused(models / "sam")
    assert "is sam, which cannot be used" in unknown
    assert all(name in unknown for name in FINDERS)
    assert "cannot read the configuration" in refused(tmp_path / "nowhere")
    (tmp_path / "config.json").write_text("{}")
    assert "clipseg" in refused(tmp_path)
    assert "segmenter would be ignored" in refused(models / "clipseg", with_sam(models))
    assert "segmenter would be ignored" in refused(models / "sam3", with_sam(models))
    # Known before any model is loaded.
    with pytest.raises(UserError, match="segmenter would be ignored"):
        TOOLS["text_prompted"].fingerprint(settings(models / "sam3", with_sam(models)))
    assert "is owlvit, which cannot be used" in refused(models / "owlvit", with_sam(models, "owlvit"))


@pytest.mark.parametrize("name", FINDERS)
def test_a_model_that_is_not_whole_is_refused(models: Path, tmp_path: Path, name: str) -> None:
    from safetensors.torch import load_file, save_file

    def copy(*left_out: str) -> Path:
        for file in (models / name).iterdir():
            (tmp_path / file.name).unlink(missing_ok=True)
            if file.name not in left_out:
                (tmp_path / file.name).write_bytes(file.read_bytes())
        return tmp_path

    with pytest.raises(UserError, match=r"the tokenizer of"):
        make(copy("tokenizer.json", "vocab.txt", "tokenizer_config.json"))
    with pytest.raises(UserError, match="the image processing of"):
        make(copy("preprocessor_config.json"))
    weights = load_file(copy() / "model.safetensors")
    some = sorted(weights)[len(weights) // 2]
    save_file(
        {n: w for n, w in weights.items() if n != some}, tmp_path / "model.safetensors", {"format": "pt"}
    )
    with pytest.raises(UserError, match="lacks 1 weights"):
        make(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match="cannot load"):
        make(tmp_path)


def test_another_model_is_another_fingerprint(models: Path, tmp_path: Path) -> None:
    tool = TOOLS["text_prompted"]
    alone = tool.fingerprint(settings(models / "owlvit"))
    assert alone == tool.fingerprint(settings(models / "owlvit"))
    assert alone != tool.fingerprint(settings(models / "owlv2"))
    assert len(tool.fingerprint(settings(models / "owlvit", with_sam(models)))) == 2
    assert tool.fingerprint(settings("google/owlvit-base-patch32")) != alone


def test_real_radiographs(models: Path, shared_data: Path) -> None:
    paths = sorted((shared_data / "cxr_masks" / "images").iterdir())[:3]
    images = [Image.open(path) for path in paths]
    for name in ("clipseg", "grounding-dino"):
        found = make(models / name).localise(images, [sample("Is there a consolidation?")] * len(images))
        for image, heat in zip(images, maps(found), strict=True):
            assert heat.shape == (image.height, image.width)
