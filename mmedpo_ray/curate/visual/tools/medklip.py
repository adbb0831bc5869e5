"""MedKLIP as a visual tool: where a chest radiograph shows a finding, as in the MMedPO paper.

Needs the official checkpoint, beside it the official list of observation texts, and the clinical BERT that reads them once. The
heat map is the attention of the prompted observation, averaged over heads and the four decoder layers (as MedKLIP's and MMedPO's own
scripts do) and spread bilinearly over the image; the confidence is the probability of that observation in the image. MMedPO always
asks for "disease": ``curate.visual.prompt: generic``.

Trained on frontal chest radiographs only: what it says about other images means nothing.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from mmedpo_ray.config.tree import Config
from mmedpo_ray.curate.visual.tools.base import Localisation, VisualTool, upsample
from mmedpo_ray.curate.visual.tools.pretrained import check_vocabulary, load_pretrained, path_fingerprint
from mmedpo_ray.errors import UserError
from mmedpo_ray.io.images import to_rgb
from mmedpo_ray.radiology.finding_prompts import OBSERVATIONS, observation_for

if TYPE_CHECKING:
    import torch

TEXTS_NAME = "observation explanation.json"
# As the official scripts read them: at most 64 tokens with the first one, [CLS], and no [SEP] at the end.
_TEXT_TOKENS = 64
# One name is misspelt in the official file.
_SPELLED = {"eumonia": "pneumonia"}
_MEAN = np.array([0.485, 0.456, 0.406], dtype=np.float32)
_STD = np.array([0.229, 0.224, 0.225], dtype=np.float32)


class Medklip(VisualTool):
    """Attention and probability of one of MedKLIP's 75 observations.

    Raises:
        UserError: checkpoint, texts or BERT are missing, or are not MedKLIP's.
    """

    has_model = True

    @classmethod
    def fingerprint(cls, config: Config) -> list[str]:
        checkpoint = _checkpoint(config)
        read_texts(_texts_path(checkpoint))
        paths = (str(checkpoint), str(_texts_path(checkpoint)), config.curate.visual.medklip.text_model)
        return [path_fingerprint(path) for path in paths]

    def __init__(self, config: Config) -> None:
        import torch

        from mmedpo_ray.curate.visual.tools.medklip_network import load_network

        super().__init__(config)
        checkpoint = _checkpoint(config)
        texts = read_texts(_texts_path(checkpoint))
        self._torch = torch
        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        # A sixth faster on CPUs than the usual layout.
        self._layout = torch.channels_last
        network: Any = load_network(checkpoint)
        self._network = network.to(self._device, memory_format=self._layout)
        self._observations = embed_texts(texts, config.curate.visual.medklip.text_model).to(self._device)

    def localise(self, images: list[Image.Image], rows: list[dict[str, Any]]) -> list[Localisation]:
        settings = self.config.curate.visual
        generic, is_generic = settings.generic_prompt, settings.prompt == "generic"
        observations = [
            observation_for(row["question"], row["answer"], generic, always_generic=is_generic)
            for row in rows
        ]
        asked = list(map(OBSERVATIONS.index, observations))
        pixels = self._torch.from_numpy(np.stack([pixels_of(image) for image in images]))
        pixels = pixels.to(self._device, memory_format=self._layout)
        with self._torch.inference_mode():
            logits, attention = self._network(pixels, self._observations)
            present = logits.softmax(-1)[..., 1].double().cpu().numpy()
            maps = attention.mean(0).double().cpu().numpy()
        found = []
        for i, (image, observation) in enumerate(zip(images, asked, strict=True)):
            grid = maps[i, observation]
            side = round(grid.size**0.5)
            heat_map = upsample(grid.reshape(side, side), image.height, image.width)
            found.append(Localisation(heat_map, float(present[i, observation])))
        return found


def pixels_of(image: Image.Image) -> np.ndarray:
    """What the network sees of an image: float32 (3, 224, 224), squeezed to a square as in the official scripts."""
    from mmedpo_ray.curate.visual.tools.medklip_network import IMAGE_SIZE

    small = to_rgb(image).resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BILINEAR)
    values = (np.asarray(small, dtype=np.float32) / 255.0 - _MEAN) / _STD
    return np.ascontiguousarray(values.transpose(2, 0, 1))


def read_texts(path: Path) -> list[str]:
    """The official texts about the 75 observations, in their order.

    Raises:
        UserError: the file is missing, or is not that list.
    """
    remedy = f"Put `{TEXTS_NAME}` of the official MedKLIP repository, unchanged, beside the checkpoint."
    try:
        texts = json.loads(path.read_text("utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"MedKLIP's observation texts are not at {path}. {remedy}") from error
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as JSON ({type(error).__name__}). {remedy}") from error
    if not isinstance(texts, dict) or not all(isinstance(text, str) for text in texts.values()):
        raise UserError(f"{path} is not a table of texts. {remedy}")
    names = [_SPELLED.get(name, name) for name in texts]
    if names != list(OBSERVATIONS):
        wrong = next(
            (i for i, pair in enumerate(zip(names, OBSERVATIONS, strict=False)) if pair[0] != pair[1]), None
        )
        place = f"{len(names)} entries, not 75" if wrong is None else f"entry {wrong} differs"
        raise UserError(f"{path} is not MedKLIP's list of observations ({place}). {remedy}")
    return list(texts.values())


def embed_texts(texts: list[str], text_model: str) -> torch.Tensor:
    """The clinical BERT's last hidden state at [CLS], float32 (N, 768).

    Raises:
        UserError: there is no such model, or it has another width.
    """
    import torch
    from transformers import BertModel, BertTokenizer

    from mmedpo_ray.curate.visual.tools.medklip_network import TEXT_SIZE

    setting = "curate.visual.medklip.text_model"
    bert = load_pretrained(BertModel, text_model, setting, add_pooling_layer=False)
    if bert.config.hidden_size != TEXT_SIZE:
        raise UserError(
            f"the text model {text_model} has width {bert.config.hidden_size}, MedKLIP reads {TEXT_SIZE}. "
            f"Set {setting} to Bio_ClinicalBERT."
        )
    tokenizer = BertTokenizer.from_pretrained(text_model)
    check_vocabulary(tokenizer, bert.config.vocab_size, text_model)
    # The official reader lowers the case, although the vocabulary is cased.
    ids = [
        [tokenizer.cls_token_id, *tokenizer(text.lower(), add_special_tokens=False).input_ids][:_TEXT_TOKENS]
        for text in texts
    ]
    longest = max(map(len, ids))
    padded = torch.tensor([row + [tokenizer.pad_token_id] * (longest - len(row)) for row in ids])
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in ids])
    with torch.inference_mode():
        hidden = bert(input_ids=padded, attention_mask=mask).last_hidden_state
    return hidden[:, 0].float().clone()


def _checkpoint(config: Config) -> Path:
    name = config.curate.visual.medklip.checkpoint
    assert name is not None, "the configuration asks for it"
    path = Path(name).expanduser()
    if not path.is_file():
        raise UserError(
            f"there is no MedKLIP checkpoint {name}. Set curate.visual.medklip.checkpoint to a file that every node sees."
        )
    return path


def _texts_path(checkpoint: Path) -> Path:
    return checkpoint.parent / TEXTS_NAME
