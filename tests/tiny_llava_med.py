"""An original LLaVA-Med 1.5 checkpoint in miniature, and the original's forward pass written out.

    original = build_tiny_llava_med(tmp_path / "llava-med", file_format="safetensors", shards=3)

Same layout, names and kind of tokenizer (SentencePiece BPE with byte fallback) as the published checkpoint;
random weights. What the original computes from them is computed here from its parts, without
transformers' LLaVA.
"""

from __future__ import annotations

import io
import json
from dataclasses import dataclass
from pathlib import Path

import sentencepiece
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from transformers import CLIPVisionConfig, CLIPVisionModel, MistralConfig, MistralForCausalLM

IMAGE_SIZE = 32
PATCH_SIZE = 8
NUM_PATCHES = (IMAGE_SIZE // PATCH_SIZE) ** 2
HEAD_SIZE = 32  # the smallest that vLLM supports on CPU
TOWER = "model.vision_tower.vision_tower."
MEAN, STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
_TEXT = [
    "Is there a nodule in the left lung? Yes, there is a nodule. No.",
    "What is shown in the image? [INST] [/INST]",
]


@dataclass(frozen=True)
class Original:
    """The checkpoint and what is in it.

    Attributes:
        folder: of the checkpoint.
        tensors: under their original names.
        config: what its config.json says.
        vision: architecture of the tower.
        pieces: the tokenizer.
    """

    folder: Path
    tensors: dict[str, torch.Tensor]
    config: dict
    vision: CLIPVisionConfig
    pieces: sentencepiece.SentencePieceProcessor

    def prompt_ids(self, question: str) -> list[int]:
        """Ids as `tokenizer_image_token` makes them: each side of the image on its own; -1 is the image."""
        before, after = f"[INST] <image>\n{question} [/INST]".split("<image>", 1)
        return [self.pieces.bos_id(), *self.pieces.encode(before), -1, *self.pieces.encode(after)]

    @torch.inference_mode()
    def logits(self, ids: list[int], pixels: torch.Tensor) -> torch.Tensor:
        """The original's forward pass, (T with the image widened, V)."""
        tower = CLIPVisionModel(self.vision).eval()
        loaded = tower.load_state_dict(
            {
                name.removeprefix(f"{TOWER}vision_model."): value
                for name, value in self.tensors.items()
                if name.startswith(TOWER)
            }
        )
        assert not loaded.missing_keys
        assert not loaded.unexpected_keys
        features = tower(pixels, output_hidden_states=True).hidden_states[-2][:, 1:]
        first, second = "model.mm_projector.0.", "model.mm_projector.2."
        hidden = F.linear(features, self.tensors[first + "weight"], self.tensors[first + "bias"])
        image = F.linear(F.gelu(hidden), self.tensors[second + "weight"], self.tensors[second + "bias"])[0]
        language = MistralForCausalLM(self.language_config()).eval()
        language.load_state_dict(
            {
                name: value
                for name, value in self.tensors.items()
                if "vision_tower" not in name and "mm_" not in name
            }
        )
        table = self.tensors["model.embed_tokens.weight"]
        place = ids.index(-1)
        spliced = torch.cat(
            [
                F.embedding(torch.tensor(ids[:place]), table),
                image,
                F.embedding(torch.tensor(ids[place + 1 :]), table),
            ]
        )
        return language(inputs_embeds=spliced[None]).logits[0]

    def language_config(self) -> MistralConfig:
        keys = {key: value for key, value in self.config.items() if not key.startswith(("mm_", "image_"))}
        return MistralConfig(**{key: value for key, value in keys.items() if key != "model_type"})


def build_tiny_llava_med(
    folder: Path, *, file_format: str = "safetensors", shards: int = 3, tower: bool = True, seed: int = 0
) -> Original:
    """Saves a checkpoint; the same seed gives the same weights.

    Args:
        folder: created.
        file_format: safetensors or bin.
        shards: 1 for a single file without an index.
        tower: whether it carries the tower's weights.
        seed: of the weights.
    """
    folder.mkdir(parents=True, exist_ok=True)
    pieces = save_tokenizer(folder)
    config = original_config(pieces.vocab_size())
    vision = CLIPVisionConfig(
        hidden_size=2 * HEAD_SIZE,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=IMAGE_SIZE,
        patch_size=PATCH_SIZE,
        projection_dim=16,
    )
    # A folder beside the weights, which mm_vision_tower may name as well as a hub model.
    vision.save_pretrained(folder / config["mm_vision_tower"])
    tensors = random_weights(config, vision, seed)
    (folder / "config.json").write_text(json.dumps(config))
    saved = {name: value for name, value in tensors.items() if tower or not name.startswith(TOWER)}
    save_weights(folder, saved, file_format, shards)
    return Original(folder, tensors, config, vision, pieces)


def original_config(vocab_size: int) -> dict:
    """The fields of the published config.json, with small numbers."""
    return {
        "architectures": ["LlavaMistralForCausalLM"],
        "model_type": "llava_mistral",
        "vocab_size": vocab_size,
        "hidden_size": 2 * HEAD_SIZE,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "hidden_act": "silu",
        "max_position_embeddings": 512,
        "initializer_range": 0.02,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1000000.0,
        "sliding_window": None,
        "attention_dropout": 0.0,
        "tie_word_embeddings": False,
        "use_cache": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "torch_dtype": "float32",
        "image_aspect_ratio": "pad",
        "mm_hidden_size": 2 * HEAD_SIZE,
        "mm_projector_type": "mlp2x_gelu",
        "mm_use_im_patch_token": False,
        "mm_use_im_start_end": False,
        "mm_vision_select_feature": "patch",
        "mm_vision_select_layer": -2,
        "mm_vision_tower": "tower",
    }


def random_weights(config: dict, vision: CLIPVisionConfig, seed: int) -> dict[str, torch.Tensor]:
    """Every tensor of the original; far larger than a fresh model's, so that no mistake hides in rounding."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        language = MistralForCausalLM(Original(Path(), {}, config, vision, None).language_config())  # type: ignore[arg-type]
        tower = CLIPVisionModel(vision)
        tensors = {name: value.clone() for name, value in language.state_dict().items()}
        tensors |= {
            f"{TOWER}vision_model.{name}": value.clone() for name, value in tower.state_dict().items()
        }
        width = config["hidden_size"]
        tensors["model.mm_projector.0.weight"] = torch.randn(width, vision.hidden_size) * 0.2
        tensors["model.mm_projector.2.weight"] = torch.randn(width, width) * 0.5
        for layer in (0, 2):
            tensors[f"model.mm_projector.{layer}.bias"] = torch.randn(width) * 0.1
        for name, value in tensors.items():
            if name.startswith(("model.layers", "model.embed", "lm_head")) and value.ndim == 2:
                value.mul_(5.0)
            elif value.ndim == 1 and not name.startswith("model.mm"):
                value.add_(torch.randn_like(value) * 0.1)
    return tensors


def save_weights(folder: Path, tensors: dict[str, torch.Tensor], file_format: str, shards: int) -> None:
    """One file, or shards with the index that transformers writes."""
    stem, suffix = ("model", "safetensors") if file_format == "safetensors" else ("pytorch_model", "bin")
    names = list(tensors)
    weight_map = {}
    for number in range(shards):
        part = {name: tensors[name].contiguous() for name in names[number::shards]}
        file = f"{stem}.{suffix}" if shards == 1 else f"{stem}-{number + 1:05d}-of-{shards:05d}.{suffix}"
        if suffix == "bin":
            torch.save(part, folder / file)
        else:
            save_file(part, folder / file, {"format": "pt"})
        weight_map.update(dict.fromkeys(part, file))
    if shards > 1:
        index = {"metadata": {}, "weight_map": weight_map}
        (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps(index))


def save_tokenizer(folder: Path, vocab_size: int = 384) -> sentencepiece.SentencePieceProcessor:
    """Trains and saves a tokenizer of Mistral's kind: `tokenizer.model` and its settings alone."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(_TEXT),
        model_writer=model,
        model_type="bpe",
        vocab_size=vocab_size,
        byte_fallback=True,
        hard_vocab_limit=False,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        split_digits=True,
        minloglevel=2,
    )
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    save_tokenizer_settings(folder)
    return sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())


def save_tokenizer_settings(folder: Path) -> None:
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    settings = {
        "tokenizer_class": "LlamaTokenizer",
        "add_bos_token": True,
        "add_eos_token": False,
        "legacy": True,
        "added_tokens_decoder": {
            str(i): {"content": t, **flags} for i, t in enumerate(("<unk>", "<s>", "</s>"))
        },
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "pad_token": "<unk>",
        "padding_side": "right",
        "model_max_length": 2048,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def original_pixels(image: Image.Image) -> torch.Tensor:
    """`process_images` with image_aspect_ratio "pad": a square in the mean colour, CLIP's processing."""
    image = image.convert("RGB")
    side = max(image.size)
    square = Image.new("RGB", (side, side), tuple(int(value * 255) for value in MEAN))
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    resized = square.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BICUBIC)
    pixels = torch.frombuffer(bytearray(resized.tobytes()), dtype=torch.uint8).view(IMAGE_SIZE, IMAGE_SIZE, 3)
    scaled = pixels.permute(2, 0, 1).float() / 255
    return ((scaled - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None])[None]
