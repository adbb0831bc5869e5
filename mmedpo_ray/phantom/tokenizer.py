"""Tokenizer, chat template and processor of the embedded LLaVA.

A byte-level BPE trained on the phantom world's own text plus a list of common radiology words: what the phantom says
is one token a word, and any other text is still representable byte by byte, so there is no unknown token.

One format for training and inference, `<s>[INST] <image>\\nquestion [/INST] answer</s>`: the beginning token
is written by the template alone (the tokenizer adds none), so it can never come twice.
"""

from __future__ import annotations

from collections.abc import Iterable

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlavaProcessor, PreTrainedTokenizerFast
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

BOS, EOS, PAD, IMAGE, USER_START, USER_END = "<s>", "</s>", "<pad>", "<image>", "[INST]", "[/INST]"
SPECIAL_TOKENS = (PAD, BOS, EOS, IMAGE, USER_START, USER_END)

# Text may be a string or OpenAI-style parts; images come first wherever the parts put them, as in training.
CHAT_TEMPLATE = """{{- bos_token }}
{%- for message in messages %}
  {%- if message.content is string %}
    {%- set text = message.content | trim %}
    {%- set images = 0 %}
  {%- else %}
    {%- set parts = namespace(text='', images=0) %}
    {%- for part in message.content %}
      {%- if part.type in ('image', 'image_url') %}
        {%- set parts.images = parts.images + 1 %}
      {%- elif part.type == 'text' %}
        {%- set parts.text = parts.text + part.text %}
      {%- endif %}
    {%- endfor %}
    {%- set text = parts.text | trim %}
    {%- set images = parts.images %}
  {%- endif %}
  {%- if message.role == 'assistant' %}
    {{- ' ' + text + eos_token }}
  {%- else %}
    {{- '[INST] ' + '<image>\\n' * images + text + ' [/INST]' }}
  {%- endif %}
{%- endfor %}"""

# Words that real questions about radiology images use, so that they need not be spelt out in bytes.
RADIOLOGY_WORDS = (
    "What Where Which Is Are Does Do Can How Was Were There The This These In On Has Have Why Who When",
    "is are the a an of in on at to and or with by for from does do this that it its be been has have can see seen",
    "image scan picture shown show shows showing visible visualized evidence present absent normal abnormal",
    "CT MRI MR X-ray x-ray radiograph ultrasound contrast weighted T1 T2 FLAIR axial coronal sagittal plane view AP PA",
    "brain head skull chest abdomen abdominal pelvis spine neck lung lungs heart liver kidney kidneys spleen bowel",
    "colon stomach pancreas gallbladder bladder aorta artery vein ventricle ventricles lobe temporal frontal parietal",
    "occipital cerebral cerebellum hemisphere matter grey gray white midline trachea diaphragm ribs rib clavicle bone",
    "mass lesion tumor cyst fluid air edema hemorrhage hematoma infarct ischemia fracture abscess mediastinum hilum",
    "pneumonia atelectasis opacity density infiltrate enlarged enlargement shift thickening calcification metastasis",
    "left right bilateral upper lower middle anterior posterior lateral medial superior inferior base apex side",
    "mild moderate severe small large acute chronic diffuse focal patient patients organ system part type modality",
    "Yes No yes no not none both one two three more than other left-sided right-sided hyperintense hypodense size",
)


def train_tokenizer(texts: Iterable[str], vocab_size: int = 1024) -> PreTrainedTokenizerFast:
    """Train the byte-level BPE.

    Args:
        texts: Corpus of the phantom world.
        vocab_size: Upper bound, special tokens and the 256 bytes included.

    Raises:
        ValueError: If `vocab_size` cannot hold the bytes and special tokens.
    """
    if vocab_size < 256 + len(SPECIAL_TOKENS):
        raise ValueError(f"vocab_size must be at least {256 + len(SPECIAL_TOKENS)}, not {vocab_size}")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    corpus = [f" {text}\n{text}" for text in texts] + [f" {line}" for line in RADIOLOGY_WORDS] * 3
    tokenizer.train_from_iterator(corpus, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        extra_special_tokens={"image_token": IMAGE, "user_start": USER_START, "user_end": USER_END},
        chat_template=CHAT_TEMPLATE,
        padding_side="left",
        model_max_length=1024,
        clean_up_tokenization_spaces=False,
    )


def make_processor(tokenizer: PreTrainedTokenizerFast, image_size: int, patch_size: int) -> LlavaProcessor:
    """Image processing, tokenizer and template in one, as LLaVA models on the hub have it."""
    image_processor = CLIPImageProcessorPil(
        size={"shortest_edge": image_size},
        crop_size={"height": image_size, "width": image_size},
        image_mean=[0.5, 0.5, 0.5],
        image_std=[0.25, 0.25, 0.25],
    )
    return LlavaProcessor(
        image_processor=image_processor,
        tokenizer=tokenizer,
        patch_size=patch_size,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )


def chat(question: str, answer: str | None = None) -> list[dict]:
    """One turn about one image as messages; without an answer it is a prompt."""
    user = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}
    if answer is None:
        return [user]
    return [user, {"role": "assistant", "content": [{"type": "text", "text": answer}]}]


def encode_turn(processor: LlavaProcessor, question: str, answer: str) -> tuple[list[int], list[int]]:
    """Token ids of one turn, as the processor makes them with the image at hand.

    Returns:
        prompt: ids up to and including `[/INST]`, with one id per image patch.
        response: ids of the answer with the end token.
    """
    tokenizer = processor.tokenizer
    size = processor.image_processor.crop_size["height"] // processor.patch_size
    text = tokenizer.apply_chat_template(chat(question, answer), tokenize=False)
    ids = tokenizer(text.replace(IMAGE, IMAGE * size**2, 1), add_special_tokens=False)["input_ids"]
    end = ids.index(tokenizer.convert_tokens_to_ids(USER_END)) + 1
    return ids[:end], ids[end:]
